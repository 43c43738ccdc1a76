//! Products of bf16 on tiles, two values along k at a time.

use std::arch::asm;

use half::bf16;

use super::{Amx, Chunk, ROWS, Shapes, tiles};
use crate::columns::Block;
use crate::simd::Simd;

/// Values along k in a tile.
const STEP: usize = 32;
/// Tiles of W that are multiplied together.
const TILES: usize = 2;
/// Tiles of W whose sums with 16 rows of x are written together; a tile's rows are as far apart.
const TOGETHER: usize = 16;
/// Values in a cache line.
const LINE: usize = 32;
/// Cache lines of x that are fetched at each step of a chain.
const FETCHED: usize = 8;

/// Rows of x in chunks: for each two values along k, those two of every row of it. They are of 16
/// rows, some of them zero, or of one alone.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<'a> {
    /// `k * 16` values for each.
    pub(crate) values: &'a [bf16],
    pub(crate) chunks: &'a [Chunk],
    /// Values of a row.
    pub(crate) k: usize,
}

impl<'a> Pairs<'a> {
    /// The rows in this range, which begins and ends with a chunk.
    pub(crate) fn range(self, rows: std::ops::Range<usize>) -> Self {
        let range = Chunk::range(self.chunks, rows);
        let size = ROWS * self.k;
        let values = &self.values[range.start * size..range.end * size];
        Self { values, chunks: &self.chunks[range], ..self }
    }

    fn at(&self, chunk: usize) -> *const bf16 {
        let size = ROWS * self.k;
        self.values[chunk * size..(chunk + 1) * size].as_ptr()
    }
}

impl Chunk {
    /// Rows of a tile, with those that are zero.
    fn width(self) -> usize {
        if self.rows == 1 { 1 } else { ROWS }
    }
}

/// One sum of each row of W and each of x, in rows of x's.
type Sums = [f32; ROWS * ROWS];

/// Products of two tiles of W with two of x, on whole cache lines.
#[repr(C, align(64))]
struct Square([[Sums; 2]; TILES]);

/// Where two tiles of W are, and the bytes from a row to the next.
#[derive(Clone, Copy)]
struct Rows {
    at: [*const bf16; TILES],
    stride: usize,
}

impl Amx {
    /// Whether rows of so many values can be packed.
    pub(crate) fn takes(self, k: usize) -> bool {
        k > 0 && k.is_multiple_of(STEP)
    }

    /// Packs the rows of a chunk for [`Pairs`].
    pub(crate) fn pack_pairs<'a>(
        self,
        chunk: Chunk,
        row: impl Fn(usize) -> &'a [bf16],
        to: &mut [bf16],
    ) {
        if chunk.rows == 1 {
            let row = row(chunk.first);
            return to[..row.len()].copy_from_slice(row);
        }
        let mut rows = [&[][..]; ROWS];
        for (i, to) in rows.iter_mut().enumerate().take(chunk.rows) {
            *to = row(chunk.first + i);
        }
        let s = self.0.avx512();
        s.vectorize(
            #[inline(always)]
            || {
                for (step, to) in to.chunks_exact_mut(STEP * ROWS).enumerate() {
                    let mut square = [0; ROWS * ROWS];
                    for (row, to) in rows.iter().zip(square.chunks_exact_mut(ROWS)) {
                        if let Some(row) = row.get(step * STEP..(step + 1) * STEP) {
                            bytemuck::cast_slice_mut(to).copy_from_slice(row);
                        }
                    }
                    s.transpose(&mut square);
                    to.copy_from_slice(bytemuck::cast_slice(&square));
                }
            },
        );
    }

    /// Writes the products of the rows of x with those of `w`, into the columns of `out` from `at` on.
    pub(crate) fn pairs(self, x: Pairs<'_>, w: &[bf16], out: &mut Block<'_>, at: usize) {
        self.0.avx512().vectorize(
            #[inline(always)]
            || self.pairs_in(x, w, out, at),
        );
    }

    #[inline(always)]
    fn pairs_in(self, x: Pairs<'_>, w: &[bf16], out: &mut Block<'_>, at: usize) {
        let Some(start) = x.chunks.first().map(|chunk| chunk.first) else { return };
        let (k, steps) = (x.k, x.k / STEP);
        assert!(self.takes(k), "rows of {k} values");
        let n = w.len() / k;
        if let [chunk] = *x.chunks {
            return self.one_chunk(x.at(0), chunk, k, w, out, at);
        }
        let mut square = Square([[[0.0; ROWS * ROWS]; 2]; TILES]);
        let mut shapes = Shapes::default();
        let mut c = 0;
        while let Some(&chunk) = x.chunks.get(c) {
            let width = chunk.width();
            let second = x.chunks.get(c + 1).filter(|next| width > 1 && next.width() > 1);
            let number = if second.is_some() { 2 } else { 1 };
            let at_x = [x.at(c), second.map_or(std::ptr::null(), |_| x.at(c + 1))];
            // These rows of W stay in the second-level cache, the next ones of x come there.
            let mut next = Fetch::new(&x.values[(c + number) * ROWS * k..], number * ROWS * k);
            for first in (0..n).step_by(TILES * ROWS) {
                let rows = (n - first).min(TILES * ROWS);
                let of = w[first * k..].as_ptr();
                let of = Rows { at: [of, of.wrapping_add(ROWS * k)], stride: 2 * k };
                let [a, b] = [rows.min(ROWS), rows.saturating_sub(ROWS).max(1)];
                let [line_of_w, line_of_x] = [4 * ROWS, 4 * width];
                // Sums of two tiles of W with two of x; those of W, and of x.
                let [of_w, sums] = [line_of_w, line_of_x].map(|line| [(a, line), (b, line)]);
                let of_x = (ROWS, line_of_x);
                shapes
                    .set(self, [sums[0], sums[0], sums[1], sums[1], of_w[0], of_w[1], of_x, of_x]);
                match (rows > ROWS, number) {
                    // SAFETY: rows of W and chunks of x have `steps` tiles each, shaped so.
                    (true, 2) => unsafe {
                        two_by_two(of, at_x, steps, &mut square, next.take(steps));
                    },
                    // SAFETY: as above.
                    (true, _) => unsafe { two_by_one(of, at_x[0], width, steps, &mut square) },
                    (false, _) => {
                        for (x, sums) in at_x[..number].iter().zip(&mut square.0[0]) {
                            // SAFETY: as above.
                            unsafe { one_by_one(of, *x, width, steps, sums) };
                        }
                    }
                }
                for (i, chunk) in x.chunks[c..c + number].iter().enumerate() {
                    for (tile, sums) in square.0.iter_mut().enumerate() {
                        let cols = first + tile * ROWS..(first + (tile + 1) * ROWS).min(n);
                        if !cols.is_empty() {
                            let cols = at + cols.start..at + cols.end;
                            self.write(&mut sums[i], *chunk, start, cols, out);
                        }
                    }
                }
            }
            c += number;
        }
    }

    /// The products of one chunk, at the speed of memory: the rows of W in a tile lie apart, and each of these
    /// streams is read from start to end.
    #[inline(always)]
    fn one_chunk(
        self,
        x: *const bf16,
        chunk: Chunk,
        k: usize,
        w: &[bf16],
        out: &mut Block<'_>,
        at: usize,
    ) {
        let width = chunk.width();
        let size = ROWS * width;
        let mut sums = [0.0; TOGETHER * ROWS * ROWS];
        let together = ROWS * (sums.len() / size);
        let mut shapes = Shapes::default();
        for (part, w) in w.chunks(together * k).enumerate() {
            let (n, at) = (w.len() / k, at + part * together);
            // Those that fill no tile are one of their own.
            for (first, [rows, tiles]) in [(0, [ROWS, n / ROWS]), (n - n % ROWS, [n % ROWS, 1])] {
                if rows * tiles == 0 {
                    continue;
                }
                let [of_w, of_sums] = [4 * ROWS, 4 * width].map(|line| (rows, line));
                let of_x = (ROWS, 4 * width);
                shapes.set(self, [of_sums, of_sums, of_sums, of_sums, of_w, of_w, of_x, of_x]);
                for (i, sums) in sums.chunks_exact_mut(size).enumerate().take(tiles) {
                    let of_w = w[(first + i) * k..].as_ptr();
                    let of_w = Rows { at: [of_w; TILES], stride: 2 * k * tiles };
                    // SAFETY: rows of W and the chunk have so many tiles each, shaped so.
                    unsafe { one_by_one(of_w, x, width, k / STEP, sums) };
                }
                for m in 0..chunk.rows {
                    let out = &mut out.row(m)[at + first..at + first + rows * tiles];
                    for (row, out) in out.chunks_exact_mut(tiles).enumerate() {
                        for (out, sums) in out.iter_mut().zip(sums.chunks_exact(size)) {
                            *out = sums[row * width + m];
                        }
                    }
                }
            }
        }
    }

    /// Writes sums where they belong.
    #[inline(always)]
    fn write(
        self,
        sums: &mut Sums,
        chunk: Chunk,
        start: usize,
        cols: std::ops::Range<usize>,
        out: &mut Block<'_>,
    ) {
        if chunk.width() > 1 {
            self.0.avx512().transpose(bytemuck::cast_mut(sums));
        }
        for (i, sums) in sums.as_chunks::<ROWS>().0.iter().enumerate().take(chunk.rows) {
            let out = &mut out.row(chunk.first - start + i)[cols.clone()];
            match out.first_chunk_mut() {
                // A copy of a known length is one store.
                Some(out) => *out = *sums,
                None => out.copy_from_slice(&sums[..out.len()]),
            }
        }
    }
}

/// What is to be fetched while products are made.
struct Fetch {
    from: *const bf16,
    left: usize,
}

impl Fetch {
    /// The first `len` of these values.
    fn new(next: &[bf16], len: usize) -> Self {
        Self { from: next.as_ptr(), left: next.len().min(len) }
    }

    /// As much as so many steps fetch: where it begins, and the bytes from one step to the next, 0 where
    /// nothing is left.
    fn take(&mut self, steps: usize) -> (*const bf16, usize) {
        let (from, len) = (self.from, steps * FETCHED * LINE);
        if self.left < len {
            return (from, 0);
        }
        self.left -= len;
        self.from = from.wrapping_add(len);
        (from, 2 * FETCHED * LINE)
    }
}

/// The products of two tiles of W with two of x, at each step along k.
///
/// # Safety
/// The tiles must be shaped for it, and all operands have so many tiles.
unsafe fn two_by_two(
    w: Rows,
    x: [*const bf16; 2],
    steps: usize,
    sums: &mut Square,
    (fetched, fetched_along): (*const bf16, usize),
) {
    // SAFETY: the caller's; what is fetched need not be readable.
    unsafe {
        tiles!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{w0} + {stride}]",
            "tileloadd tmm6, [{x0} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{x1} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{w1} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetcht1 [{fetched}]",
            "prefetcht1 [{fetched} + 64]",
            "prefetcht1 [{fetched} + 128]",
            "prefetcht1 [{fetched} + 192]",
            "prefetcht1 [{fetched} + 256]",
            "prefetcht1 [{fetched} + 320]",
            "prefetcht1 [{fetched} + 384]",
            "prefetcht1 [{fetched} + 448]",
            "add {w0}, {along}", "add {w1}, {along}",
            "add {x0}, 1024", "add {x1}, 1024",
            "add {fetched}, {fetched_along}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3";
            w0 = inout(reg) w.at[0] => _,
            w1 = inout(reg) w.at[1] => _,
            stride = in(reg) w.stride,
            along = in(reg) 2 * STEP,
            x0 = inout(reg) x[0] => _,
            x1 = inout(reg) x[1] => _,
            line = in(reg) 4 * ROWS,
            fetched = inout(reg) fetched => _,
            fetched_along = in(reg) fetched_along,
            steps = inout(reg) steps => _,
            sums = in(reg) std::ptr::from_mut(sums),
        );
    }
}

/// The products of two tiles of W with one of x, of 16 rows or one.
///
/// # Safety
/// As for [`two_by_two`].
unsafe fn two_by_one(w: Rows, x: *const bf16, width: usize, steps: usize, sums: &mut Square) {
    // SAFETY: the caller's.
    unsafe {
        tiles!(
            "tilezero tmm0", "tilezero tmm2",
            "2:",
            "tileloadd tmm6, [{x} + {line}]",
            "tileloadd tmm4, [{w0} + {stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{w1} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {w0}, {along}", "add {w1}, {along}", "add {x}, {tile}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 2048], tmm2";
            w0 = inout(reg) w.at[0] => _,
            w1 = inout(reg) w.at[1] => _,
            stride = in(reg) w.stride,
            along = in(reg) 2 * STEP,
            x = inout(reg) x => _,
            line = in(reg) 4 * width,
            tile = in(reg) 4 * width * ROWS,
            steps = inout(reg) steps => _,
            sums = in(reg) std::ptr::from_mut(sums),
        );
    }
}

/// The products of a tile of W with one of x, of 16 rows or one. What comes after is fetched meanwhile.
///
/// # Safety
/// As for [`two_by_two`].
unsafe fn one_by_one(w: Rows, x: *const bf16, width: usize, steps: usize, sums: &mut [f32]) {
    assert!(sums.len() >= ROWS * width, "{} sums", sums.len());
    // SAFETY: the caller's; what is fetched need not be readable.
    unsafe {
        tiles!(
            "tilezero tmm0",
            "2:",
            "prefetcht1 [{w} + 512]",
            "prefetcht1 [{w} + {stride} + 512]",
            "prefetcht1 [{w} + 2*{stride} + 512]",
            "prefetcht1 [{w} + {three} + 512]",
            "prefetcht1 [{w} + 4*{stride} + 512]",
            "prefetcht1 [{w} + {five} + 512]",
            "prefetcht1 [{w} + 2*{three} + 512]",
            "prefetcht1 [{w} + {seven} + 512]",
            "prefetcht1 [{half} + 512]",
            "prefetcht1 [{half} + {stride} + 512]",
            "prefetcht1 [{half} + 2*{stride} + 512]",
            "prefetcht1 [{half} + {three} + 512]",
            "prefetcht1 [{half} + 4*{stride} + 512]",
            "prefetcht1 [{half} + {five} + 512]",
            "prefetcht1 [{half} + 2*{three} + 512]",
            "prefetcht1 [{half} + {seven} + 512]",
            "tileloadd tmm6, [{x} + {line}]",
            "tileloadd tmm4, [{w} + {stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "add {w}, {along}", "add {half}, {along}", "add {x}, {tile}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0";
            w = inout(reg) w.at[0] => _,
            half = inout(reg) w.at[0].wrapping_byte_add(8 * w.stride) => _,
            stride = in(reg) w.stride,
            three = in(reg) 3 * w.stride,
            five = in(reg) 5 * w.stride,
            seven = in(reg) 7 * w.stride,
            along = const 2 * STEP,
            x = inout(reg) x => _,
            line = in(reg) 4 * width,
            tile = in(reg) 4 * width * ROWS,
            steps = inout(reg) steps => _,
            sums = in(reg) sums.as_mut_ptr(),
        );
    }
}
