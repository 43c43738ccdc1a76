//! Products of integers on tiles, four values along k at a time: a block of 32 at once.
//!
//! To the bit those of [`crate::simd::quantised`] on vectors of 16 lanes: the sums of a block are exact,
//! and what is done with them after is the same in the same order. A lane there is every 16th block.

use std::arch::asm;
use std::cell::Cell;
use std::ops::Range;

use jamba_core::Packing;
use jamba_core::quant::BLOCK;

use super::{Amx, Chunk, ROWS, Shapes, tiles};
use crate::columns::Block;
use crate::packed::{Group, LANES, PackedGroup, PackedRows, STEP};
use crate::simd::Simd;
use crate::simd::integers::Integers;

/// Vectors of four values in a block.
const FOURS: usize = BLOCK / STEP;
/// Blocks whose products are made at once.
const TOGETHER: usize = 4;

/// A block of 16 rows, and a scale of each. Of x for each four values along k those four of every row,
/// of W one row after the other.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tile {
    quants: [i8; ROWS * BLOCK],
    scales: [f32; ROWS],
}

impl Default for Tile {
    fn default() -> Self {
        Self { quants: [0; ROWS * BLOCK], scales: [0.0; ROWS] }
    }
}

/// Rows of x in chunks of 16, some of them zero.
#[derive(Clone, Copy)]
pub(crate) struct Fours<'a> {
    /// `blocks` for each chunk.
    pub(crate) values: &'a [Tile],
    pub(crate) chunks: &'a [Chunk],
    pub(crate) blocks: usize,
}

impl<'a> Fours<'a> {
    /// The rows in this range, which begins and ends with a chunk.
    pub(crate) fn range(self, rows: Range<usize>) -> Self {
        let range = Chunk::range(self.chunks, rows);
        let values = &self.values[range.start * self.blocks..range.end * self.blocks];
        Self { values, chunks: &self.chunks[range], ..self }
    }
}

/// A sum of each row of W and each of x.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums<T>([[T; ROWS]; ROWS]);

/// What sums are made with.
struct Work {
    /// Sums of one lane, two, four, eight, and all.
    levels: [Sums<f32>; 5],
    /// Sums of the blocks that are being added, and of the next.
    of_blocks: [[Sums<i32>; TOGETHER]; 2],
}

/// A block, and how many lanes end with it.
struct Next {
    block: usize,
    ends: usize,
}

/// So many blocks, lane after lane.
fn of_blocks(blocks: usize, order: &mut Vec<Next>) {
    order.clear();
    for lane in ORDER {
        order.extend((lane..blocks).step_by(LANES).map(|block| Next { block, ends: 0 }));
        if let Some(last) = order.last_mut() {
            last.ends += 1;
        }
    }
}

/// The lanes in the order in which [`Simd::sum4`] adds them two by two, then those sums, and so on.
const ORDER: [usize; LANES] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];

impl Amx {
    /// Packs the rows of a chunk for [`Fours`].
    pub(crate) fn pack_fours<'a>(
        self,
        chunk: Chunk,
        row: impl Fn(usize) -> &'a [Group],
        to: &mut [Tile],
    ) {
        let mut rows = [&[][..]; ROWS];
        for (i, to) in rows.iter_mut().enumerate().take(chunk.rows) {
            *to = row(chunk.first + i);
        }
        let s = self.vectors().avx512();
        Simd::vectorize(
            s,
            #[inline(always)]
            || {
                for (g, blocks) in to.chunks_mut(LANES).enumerate() {
                    for i in 0..FOURS {
                        let mut square = [0; ROWS * ROWS];
                        for (row, to) in rows.iter().zip(square.as_chunks_mut::<LANES>().0) {
                            if let Some(group) = row.get(g) {
                                let four = &group.quants.as_chunks::<{ LANES * STEP }>().0[i];
                                *to = bytemuck::cast(*four);
                            }
                        }
                        s.transpose(&mut square);
                        for (block, from) in blocks.iter_mut().zip(square.as_chunks::<LANES>().0) {
                            let fours = block.quants.as_chunks_mut::<{ ROWS * STEP }>().0;
                            fours[i] = bytemuck::cast(*from);
                        }
                    }
                    let mut square = [0; ROWS * ROWS];
                    for (row, to) in rows.iter().zip(square.as_chunks_mut::<LANES>().0) {
                        if let Some(group) = row.get(g) {
                            *to = bytemuck::cast(group.scales);
                        }
                    }
                    s.transpose(&mut square);
                    for (block, from) in blocks.iter_mut().zip(square.as_chunks::<LANES>().0) {
                        block.scales = bytemuck::cast(*from);
                    }
                }
            },
        );
    }

    /// Writes the products of the rows of x with those of `w`, into the columns of `out` from `at` on.
    pub(crate) fn fours(self, x: Fours<'_>, w: PackedRows<'_>, out: &mut Block<'_>, at: usize) {
        Integers::vectorize(
            self.vectors(),
            #[inline(always)]
            || self.fours_in(x, w, out, at),
        );
    }

    #[inline(always)]
    fn fours_in(self, x: Fours<'_>, w: PackedRows<'_>, out: &mut Block<'_>, at: usize) {
        thread_local! {
            static BUFFERS: Cell<(Vec<Tile>, Vec<Next>)> = const { Cell::new((Vec::new(), Vec::new())) };
        }
        let Some(start) = x.chunks.first().map(|chunk| chunk.first) else { return };
        let (n, blocks) = (w.len, w.shape.blocks);
        assert!(x.blocks == blocks, "rows of {} and of {blocks} blocks", x.blocks);
        if n == 0 || blocks == 0 {
            return;
        }
        let (mut unpacked, mut order) = BUFFERS.take();
        // All rows of W stay in the second-level cache while those of x pass by.
        let len = n.div_ceil(ROWS) * blocks;
        if unpacked.len() < len {
            unpacked.resize(len, Tile::default());
        }
        for (first, to) in (0..n).step_by(ROWS).zip(unpacked.chunks_exact_mut(blocks)) {
            self.unpack(w, first..n.min(first + ROWS), to);
        }
        of_blocks(blocks, &mut order);
        let s = self.vectors().avx512();
        let mut work = Work {
            levels: [Sums([[0.0; ROWS]; ROWS]); 5],
            of_blocks: [[Sums([[0; ROWS]; ROWS]); TOGETHER]; 2],
        };
        let mut shapes = Shapes::default();
        let (sums, of_w, of_x) = ((ROWS, 4 * ROWS), (ROWS, BLOCK), (FOURS, 4 * ROWS));
        shapes.set(self, [sums, sums, sums, sums, of_w, of_w, of_x, of_x]);
        for (chunk, of_x) in x.chunks.iter().zip(x.values.chunks_exact(x.blocks)) {
            for (first, of_w) in (0..n).step_by(ROWS).zip(unpacked.chunks_exact(blocks)) {
                let cols = first..n.min(first + ROWS);
                self.sums(of_x, of_w, &order, &mut work);
                let sums = &mut work.levels[4].0;
                if !w.row_scales.is_empty() {
                    let scales = &w.row_scales[cols.clone()];
                    for (sums, scale) in sums.iter_mut().zip(scales) {
                        sums.iter_mut().for_each(|sum| *sum *= scale);
                    }
                }
                s.transpose(bytemuck::cast_mut(sums));
                for (i, sums) in sums.iter().enumerate().take(chunk.rows) {
                    let out = &mut out.row(chunk.first - start + i)[at..][cols.clone()];
                    match out.first_chunk_mut() {
                        // A copy of a known length is one store.
                        Some(out) => *out = *sums,
                        None => out.copy_from_slice(&sums[..out.len()]),
                    }
                }
            }
        }
        drop(shapes);
        BUFFERS.set((unpacked, order));
    }

    /// The sums of all products of 16 rows of W with 16 of x: the last of the levels.
    #[inline(always)]
    fn sums(self, x: &[Tile], w: &[Tile], order: &[Next], work: &mut Work) {
        let d = self.vectors();
        let s = Integers::simd(d);
        let Work { levels, of_blocks: [these, next] } = work;
        let (mut these, mut next) = (these, next);
        self.blocks(x, w, order, these);
        let (mut lane, mut sums) = (0usize, [s.splat(0.0); ROWS]);
        for (group, blocks) in order.chunks(TOGETHER).enumerate() {
            // The next products are made while these are added.
            if (group + 1) * TOGETHER < order.len() {
                self.blocks(x, w, &order[(group + 1) * TOGETHER..], next);
            }
            for (Next { block, ends }, of_block) in blocks.iter().zip(&*these) {
                let (x, w) = (&x[*block], &w[*block]);
                let x_scales = s.load(&x.scales);
                for ((sum, scale), row) in sums.iter_mut().zip(&w.scales).zip(&of_block.0) {
                    // SAFETY: a row is a vector.
                    let row = unsafe { d.load_bytes(row.as_ptr().cast()) };
                    let scale = s.mul(s.splat(*scale), x_scales);
                    *sum = s.fma(d.convert(row), scale, *sum);
                }
                for _ in 0..*ends {
                    // Each level has the sums of twice as many lanes as the one before.
                    let level = lane.trailing_ones() as usize;
                    for earlier in &levels[..level] {
                        for (sum, earlier) in sums.iter_mut().zip(&earlier.0) {
                            *sum = s.add(s.load(earlier), *sum);
                        }
                    }
                    for (sum, to) in sums.iter_mut().zip(&mut levels[level].0) {
                        s.store(*sum, to);
                        *sum = s.splat(0.0);
                    }
                    lane += 1;
                }
            }
            std::mem::swap(&mut these, &mut next);
        }
    }

    /// The products of the first four of these blocks. Past the last it stands in for those that are not
    /// there.
    #[inline(always)]
    fn blocks(self, x: &[Tile], w: &[Tile], order: &[Next], sums: &mut [Sums<i32>; TOGETHER]) {
        let block = |i: usize| order[i.min(order.len() - 1)].block;
        let blocks = [block(0), block(1), block(2), block(3)];
        // SAFETY: the tiles are shaped for it.
        unsafe { four_blocks(blocks.map(|b| &w[b]), blocks.map(|b| &x[b]), sums) }
    }

    /// Rows of W as tiles. What is in those that are not there does not matter.
    #[inline(always)]
    fn unpack(self, w: PackedRows<'_>, rows: Range<usize>, to: &mut [Tile]) {
        let s = self.vectors().avx512();
        for first in rows.clone().step_by(2) {
            // Two rows are as wide as a vector.
            for (g, blocks) in to.chunks_mut(LANES).enumerate() {
                let mut square = [0u32; ROWS * LANES];
                let vectors: &mut [[u8; LANES * STEP]; ROWS] = bytemuck::cast_mut(&mut square);
                for (half, row) in vectors.chunks_exact_mut(FOURS).zip(first..rows.end) {
                    fours(w.shape.packing, w.group(row, g), half);
                }
                s.transpose(&mut square);
                let at = (first - rows.start) / 2;
                for (block, from) in blocks.iter_mut().zip(square.as_chunks::<LANES>().0) {
                    block.quants.as_chunks_mut::<{ 2 * BLOCK }>().0[at] = bytemuck::cast(*from);
                }
            }
        }
        for (i, row) in rows.enumerate() {
            for (g, blocks) in to.chunks_mut(LANES).enumerate() {
                let scales = w.group(row, g).scales;
                for (b, block) in blocks.iter_mut().enumerate() {
                    block.scales[i] = match scales.get(b) {
                        Some(bits) => f32::from_bits(u32::from(*bits) << 16),
                        None => 1.0,
                    };
                }
            }
        }
    }
}

/// A group of a row of W as vectors of the first four values of every block, the next
/// four, and so on.
#[inline(always)]
fn fours(packing: Packing, group: PackedGroup<'_>, to: &mut [[u8; LANES * STEP]]) {
    let vectors = group.quants.chunks_exact(group.blocks * STEP);
    match packing {
        Packing::Int4Block => {
            for (vector, to) in vectors.zip(to.as_chunks_mut::<2>().0) {
                let [low, high] = to;
                for ((byte, low), high) in vector.iter().zip(low).zip(high) {
                    (*low, *high) = ((byte & 15).wrapping_sub(8), (byte >> 4).wrapping_sub(8));
                }
            }
        }
        Packing::Int8Row | Packing::Int8Block => {
            for (vector, to) in vectors.zip(to) {
                match vector.first_chunk() {
                    // A copy of a known length is one store.
                    Some(vector) => *to = *vector,
                    None => to[..vector.len()].copy_from_slice(vector),
                }
            }
        }
    }
}

/// The products of four blocks.
///
/// # Safety
/// The tiles must be shaped for it.
#[inline(always)]
unsafe fn four_blocks(
    w: [&Tile; TOGETHER],
    x: [&Tile; TOGETHER],
    sums: &mut [Sums<i32>; TOGETHER],
) {
    let (w, x) = (w.map(|w| w.quants.as_ptr()), x.map(|x| x.quants.as_ptr()));
    // SAFETY: the caller's.
    unsafe {
        tiles!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tileloadd tmm4, [{w0} + {of_w}]",
            "tileloadd tmm6, [{x0} + {of_x}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{w1} + {of_w}]",
            "tileloadd tmm7, [{x1} + {of_x}]",
            "tdpbssd tmm1, tmm5, tmm7",
            "tileloadd tmm4, [{w2} + {of_w}]",
            "tileloadd tmm6, [{x2} + {of_x}]",
            "tdpbssd tmm2, tmm4, tmm6",
            "tileloadd tmm5, [{w3} + {of_w}]",
            "tileloadd tmm7, [{x3} + {of_x}]",
            "tdpbssd tmm3, tmm5, tmm7",
            "tilestored [{sums} + {of_x}], tmm0",
            "tilestored [{sums} + {of_x} + 1024], tmm1",
            "tilestored [{sums} + {of_x} + 2048], tmm2",
            "tilestored [{sums} + {of_x} + 3072], tmm3";
            w0 = in(reg) w[0],
            w1 = in(reg) w[1],
            w2 = in(reg) w[2],
            w3 = in(reg) w[3],
            x0 = in(reg) x[0],
            x1 = in(reg) x[1],
            x2 = in(reg) x[2],
            x3 = in(reg) x[3],
            of_w = in(reg) BLOCK,
            of_x = in(reg) ROWS * STEP,
            sums = in(reg) sums.as_mut_ptr(),
        );
    }
}
