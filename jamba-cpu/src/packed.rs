//! Quantised matrices in the order in which they are multiplied, and activations to match.
//!
//! A row is cut into groups of up to 16 blocks of 32. A group has its first four values of every
//! block, then the next four of every block, and so on: a lane of a vector of 32-bit integers is a
//! block, so that the scales of 16 blocks are applied at once, after all products of integers,
//! which are exact.
//!
//! Two rows are one stream, so that memory is read from one end to the other: for each group the scales
//! of the first row and of the second, where blocks have any, and then the quants of the first and of the
//! second. The scales of a whole group fill a line of the cache.

use jamba_core::host::Pages;
use jamba_core::quant::{BLOCK, Scales};
use jamba_core::{Packing, Quantized, Result};
use rayon::prelude::*;

use crate::columns::for_each_rows;
use crate::simd::{Isa, with_simd};

/// Blocks of a group: lanes of the widest vector.
pub(crate) const LANES: usize = 16;
/// Values that one lane multiplies at once.
pub(crate) const STEP: usize = 4;
/// Values of a group.
pub(crate) const GROUP: usize = LANES * BLOCK;
/// Rows that lie together.
pub(crate) const PAIR: usize = 2;
/// Bytes of a line of the cache: each pair begins with one.
const LINE: usize = 64;
/// What is out of memory, where there is none.
const WHAT: &str = "quantised weights";

/// A quantised matrix, `(rows, cols)`.
pub(crate) struct Packed {
    shape: Shape,
    rows: usize,
    cols: usize,
    /// Per pair of rows [`pair_bytes`](Shape::pair_bytes): the scales of blocks are bits of bf16.
    pairs: Pages<u8>,
    /// Per row for `Int8Row`; empty for the others, whose blocks have scales.
    row_scales: Pages<f32>,
}

/// Some rows of a [`Packed`] matrix.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a> {
    pub(crate) shape: Shape,
    /// Number of rows.
    pub(crate) len: usize,
    pub(crate) row_scales: &'a [f32],
    /// All of each pair that has any of them.
    pairs: &'a [u8],
    /// Rows of the first pair that come before them.
    skipped: usize,
}

/// What rows look like.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) packing: Packing,
    /// Blocks of a row.
    pub(crate) blocks: usize,
    /// Bytes of two rows.
    pub(crate) pair_bytes: usize,
}

/// Blocks of a row that lie together.
#[derive(Clone, Copy)]
pub(crate) struct PackedGroup<'a> {
    pub(crate) blocks: usize,
    pub(crate) quants: &'a [u8],
    /// Bits of bf16; empty if they have none.
    pub(crate) scales: &'a [u16],
}

impl Shape {
    fn new(packing: Packing, cols: usize) -> Self {
        let shape = Self { packing, blocks: cols.div_ceil(BLOCK), pair_bytes: 0 };
        let (whole, rest) = (shape.blocks / LANES, shape.blocks % LANES);
        let all = whole * shape.group_bytes(LANES) + shape.group_bytes(rest);
        Self { pair_bytes: all.next_multiple_of(LINE), ..shape }
    }

    /// Whether blocks have scales, and not rows.
    pub(crate) fn has_block_scales(self) -> bool {
        self.packing != Packing::Int8Row
    }

    /// Bytes of a group of two rows.
    pub(crate) fn group_bytes(self, blocks: usize) -> usize {
        let scale = if self.has_block_scales() { size_of::<u16>() } else { 0 };
        PAIR * blocks * (scale + block_bytes(self.packing))
    }

    /// Where group number `g` of a row of a pair has its scales and its quants, in bytes from where the
    /// pair begins, and how many blocks it has.
    pub(crate) fn group(self, row: usize, g: usize) -> ([usize; 2], usize) {
        let blocks = LANES.min(self.blocks - g * LANES);
        let (start, bytes) = (g * self.group_bytes(LANES), blocks * block_bytes(self.packing));
        let end = start + self.group_bytes(blocks);
        ([start + row * blocks * size_of::<u16>(), end - (PAIR - row) * bytes], blocks)
    }
}

impl Packed {
    pub(crate) fn new(from: Quantized) -> Result<Self> {
        let (packing, [rows, cols]) = (from.packing(), from.shape());
        let shape = Shape::new(packing, cols);
        let mut pairs = Pages::zeros(WHAT, rows.div_ceil(PAIR) * shape.pair_bytes)?;
        let (block_scales, from_row_scales) = match from.scales() {
            Scales::Blocks(scales) => (scales, [].as_slice()),
            Scales::Rows(scales) => ([].as_slice(), scales),
        };
        let stored = packing.stride(cols);
        if stored > 0 {
            let all = pairs.par_chunks_exact_mut(shape.pair_bytes).enumerate();
            all.for_each(|(pair, to)| {
                for row in pair * PAIR..rows.min((pair + 1) * PAIR) {
                    let quants = from.quants()[row * stored..][..stored]
                        .chunks(LANES * block_bytes(packing));
                    for (g, quants) in quants.enumerate() {
                        let ([scales_at, quants_at], blocks) = shape.group(row % PAIR, g);
                        interleave(
                            packing,
                            quants,
                            &mut to[quants_at..][..blocks * block_bytes(packing)],
                        );
                        if shape.has_block_scales() {
                            let scales = &block_scales[row * shape.blocks + g * LANES..][..blocks];
                            to[scales_at..][..size_of_val(scales)]
                                .copy_from_slice(bytemuck::cast_slice(scales));
                        }
                    }
                }
            });
        }
        let mut row_scales = Pages::zeros(WHAT, from_row_scales.len())?;
        row_scales.copy_from_slice(from_row_scales);
        Ok(Self { shape, rows, cols, pairs, row_scales })
    }

    /// These rows.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> PackedRows<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let (first, pair_bytes) = (rows.start / PAIR, self.shape.pair_bytes);
        let pairs = &self.pairs[first * pair_bytes..rows.end.div_ceil(PAIR) * pair_bytes];
        let row_scales = match self.shape.has_block_scales() {
            true => &[][..],
            false => &self.row_scales[rows.clone()],
        };
        PackedRows {
            shape: self.shape,
            len: rows.len(),
            row_scales,
            pairs,
            skipped: rows.start % PAIR,
        }
    }

    /// The weights of some rows as f32, exact.
    pub(crate) fn widen(&self, rows: std::ops::Range<usize>, to: &mut [f32]) {
        let rows = self.rows(rows);
        for (row, to) in to.chunks_exact_mut(self.cols.max(1)).enumerate() {
            for (g, to) in to.chunks_mut(GROUP).enumerate() {
                let group = rows.group(row, g);
                for (i, to) in to.iter_mut().enumerate() {
                    let scale = match group.scales.get(i / BLOCK) {
                        Some(bits) => f32::from_bits(u32::from(*bits) << 16),
                        None => rows.row_scales[row],
                    };
                    *to = f32::from(group.quant(self.shape.packing, i)) * scale;
                }
            }
        }
    }
}

impl<'a> PackedRows<'a> {
    /// The pair that a row is of, and which row of it this is.
    #[inline(always)]
    pub(crate) fn pair(&self, row: usize) -> (&'a [u8], usize) {
        debug_assert!(row < self.len, "row {row} of {}", self.len);
        let (row, bytes) = (self.skipped + row, self.shape.pair_bytes);
        (&self.pairs[row / PAIR * bytes..][..bytes], row % PAIR)
    }

    /// Group number `g` of a row.
    #[inline(always)]
    pub(crate) fn group(&self, row: usize, g: usize) -> PackedGroup<'a> {
        let (pair, row) = self.pair(row);
        let ([scales, quants], blocks) = self.shape.group(row, g);
        let scales = match self.shape.has_block_scales() {
            true => bytemuck::cast_slice(&pair[scales..][..blocks * size_of::<u16>()]),
            false => &[],
        };
        let quants = &pair[quants..][..blocks * block_bytes(self.shape.packing)];
        PackedGroup { blocks, quants, scales }
    }
}

impl PackedGroup<'_> {
    /// Integer number i.
    fn quant(self, packing: Packing, i: usize) -> i8 {
        let (block, at) = (i / BLOCK, i % BLOCK);
        match packing {
            Packing::Int4Block => {
                let (pair, at) = (at / (2 * STEP), at % (2 * STEP));
                let byte = self.quants[(pair * self.blocks + block) * STEP + at % STEP];
                let nibble = if at < STEP { byte & 15 } else { byte >> 4 };
                nibble.cast_signed() - 8
            }
            _ => self.quants[(at / STEP * self.blocks + block) * STEP + at % STEP].cast_signed(),
        }
    }
}

/// Bytes of a block.
pub(crate) fn block_bytes(packing: Packing) -> usize {
    if packing == Packing::Int4Block { BLOCK / 2 } else { BLOCK }
}

/// A group of a row from the order of [`Quantized`] to this one.
fn interleave(packing: Packing, from: &[u8], to: &mut [u8]) {
    let bytes = block_bytes(packing);
    // A row with one scale need not have whole blocks.
    let blocks = from.len().div_ceil(bytes);
    for (b, from) in from.chunks(bytes).enumerate() {
        for (i, to) in to.chunks_exact_mut(blocks * STEP).enumerate() {
            let to = &mut to[b * STEP..(b + 1) * STEP];
            for (j, to) in to.iter_mut().enumerate() {
                let at = i * STEP + j;
                *to = match packing {
                    Packing::Int4Block => {
                        // Weights i * 8 + j and i * 8 + 4 + j.
                        let nibble = |at: usize| {
                            let byte = from[at % (BLOCK / 2)];
                            if at < BLOCK / 2 { byte & 15 } else { byte >> 4 }
                        };
                        nibble(2 * i * STEP + j) | nibble((2 * i + 1) * STEP + j) << 4
                    }
                    _ => from.get(at).copied().unwrap_or(0),
                };
            }
        }
    }
}

/// Up to 16 blocks of a row of activations as integers with a scale each, in the order of a group of
/// weights, filled up with zeros.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Group {
    pub(crate) quants: [i8; GROUP],
    pub(crate) scales: [f32; LANES],
    /// Minus the sum of the integers of each block.
    pub(crate) minus: [i32; LANES],
}

/// Rows of activations as integers.
#[derive(Default)]
pub(crate) struct Activations {
    groups: Vec<Group>,
    /// Groups of a row.
    per_row: usize,
}

impl Activations {
    /// Makes room.
    pub(crate) fn resize(&mut self, rows: usize, cols: usize) {
        self.per_row = cols.div_ceil(GROUP);
        if self.groups.len() < rows * self.per_row {
            let zero = Group { quants: [0; GROUP], scales: [0.0; LANES], minus: [0; LANES] };
            self.groups.resize(rows * self.per_row, zero);
        }
    }

    /// Rounds rows, on several threads if `parallel`.
    pub(crate) fn round<'a>(
        &mut self,
        isa: Isa,
        rows: usize,
        parallel: bool,
        row: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        let n = self.per_row;
        for_each_rows(&mut self.groups[..rows * n], n, 8, parallel, |first, groups| {
            with_simd!(isa, _s => {
                for (r, groups) in groups.chunks_exact_mut(n).enumerate() {
                    for (x, to) in row(first + r).chunks(GROUP).zip(groups) {
                        round_group(x, to);
                    }
                }
            });
        });
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[Group] {
        &self.groups[row * self.per_row..(row + 1) * self.per_row]
    }
}

/// Rounds up to 16 blocks: `q = round(x / scale)`, ties to even, `scale = max |x| / 127`. Plain loops
/// over whole blocks, which the compiler makes vectors of.
#[inline(always)]
fn round_group(x: &[f32], to: &mut Group) {
    let (blocks, rest) = x.as_chunks::<BLOCK>();
    for (b, block) in blocks.iter().enumerate() {
        round_block(b, block, to);
    }
    if x.len() < GROUP {
        let mut padded = [0.0; BLOCK];
        padded[..rest.len()].copy_from_slice(rest);
        round_block(blocks.len(), &padded, to);
        for b in blocks.len() + 1..LANES {
            round_block(b, &[0.0; BLOCK], to);
        }
    }
}

#[inline(always)]
fn round_block(b: usize, x: &[f32; BLOCK], to: &mut Group) {
    // Of numbers without sign the bits are in the order of the values, and NaN comes last: it goes
    // on, into the scale.
    let mut largest = 0;
    for v in x {
        largest = largest.max(v.to_bits() & 0x7fff_ffff);
    }
    let scale = f32::from_bits(largest) / 127.0;
    to.scales[b] = scale;
    let inverse = if scale >= f32::MIN_POSITIVE { scale.recip() } else { 0.0 };
    let mut quants = [0i32; BLOCK];
    for (q, v) in quants.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 leaves no bits below the point.
        const MAGIC: f32 = 12_582_912.0;
        let bits = (v * inverse + MAGIC).to_bits().cast_signed();
        *q = (bits - MAGIC.to_bits().cast_signed()).clamp(-127, 127);
    }
    let mut sum = 0;
    for q in quants {
        sum += q;
    }
    to.minus[b] = -sum;
    let mut bytes = [0i8; BLOCK];
    for (to, q) in bytes.iter_mut().zip(quants) {
        *to = q as i8;
    }
    let steps = to.quants.as_chunks_mut::<{ LANES * STEP }>().0;
    for (to, four) in steps.iter_mut().zip(bytes.as_chunks::<STEP>().0) {
        to[b * STEP..(b + 1) * STEP].copy_from_slice(four);
    }
}

#[cfg(test)]
mod tests {
    use jamba_core::{HostTensor, Param, Role};

    use super::*;

    #[test]
    fn packing_keeps_every_weight() {
        for cols in [1, 31, 32, 100, 512, 600, 1024].into_iter().filter(|n| !cfg!(miri) || *n < 513)
        {
            let values: Vec<f32> =
                (0..3 * cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            let param = Param::new("w", Role::Linear, HostTensor::from_f32(vec![3, cols], values));
            for packing in [Packing::Int8Row, Packing::Int8Block, Packing::Int4Block] {
                let quantized = || Quantized::new(&param, packing).unwrap();
                let mut got = vec![0.0; 3 * cols];
                let packed = Packed::new(quantized()).unwrap();
                packed.widen(0..3, &mut got);
                assert_eq!(got, quantized().dequantize(), "{packing:?} of {cols}");
                // From the second row of a pair on.
                let mut rest = vec![0.0; 2 * cols];
                packed.widen(1..3, &mut rest);
                assert_eq!(rest, got[cols..], "{packing:?} of {cols}");
            }
        }
    }

    #[test]
    fn activations_are_off_by_half_a_scale_at_most() {
        let x: Vec<f32> = (0..700).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect();
        let mut rounded = Activations::default();
        rounded.resize(1, x.len());
        rounded.round(Isa::portable(), 1, false, |_| &x);
        let row = rounded.row(0);
        for (i, x) in x.iter().enumerate() {
            let (group, b, at) = (i / GROUP, i / BLOCK % LANES, i % BLOCK);
            let scale = row[group].scales[b];
            let q = row[group].quants[at / STEP * LANES * STEP + b * STEP + at % STEP];
            assert!((f32::from(q) * scale - x).abs() <= 0.5001 * scale, "{i}");
        }
    }
}
