//! Matrix products, `y = x W^T + b`.
//!
//! Both operands have their sum index contiguous, so that a tile of rows of x and of W is a number
//! of dot products that share their loads: no packing, and W is read where it is stored, once for
//! all rows of x. (Where the machine multiplies tiles, x is packed, and quantised rows of W unpacked.)

use std::cell::Cell;
use std::marker::PhantomData;

use jamba_core::shape::Shaped;
use jamba_core::{Precision, Result};

use crate::columns::{Block, Columns, for_each, parallel};
use crate::operand::{Operand, Rounded};
use crate::packed::{PAIR, PackedRows};
use crate::simd::dots::{self, Dots, TILE_N, Turn, Widened};
use crate::simd::integers::Integers;
use crate::simd::quantised;
use crate::simd::{Isa, with_integers, with_simd};
use crate::tensor::View;
use crate::weight::{Rows, Weight};

/// Bytes of W that one task works on, which stay in the second-level cache.
const TASK: usize = 256 << 10;
/// The same where tiles of it are multiplied.
#[cfg(target_arch = "x86_64")]
const TILED: usize = 768 << 10;
/// Rows of x that stay in the last-level cache while all rows of W pass by.
const PANEL: usize = 512;
/// Streams of W in a tile of one row of x: with more at a time each of them is read slower.
const STREAMS: usize = 2;
/// Bytes of a row of W, or of a pair of them, from which on those that are read together are streams of their
/// own; shorter ones follow one another as one.
const LONG: usize = 1024;
/// Rows of x that pass all together over each few rows of W, at most.
const FEW: usize = 16;

/// How products are computed.
#[derive(Clone, Copy)]
pub(crate) struct Products {
    pub(crate) isa: Isa,
    pub(crate) precision: Precision,
}

impl Products {
    /// `out (x.rows, n) = x * W^T + bias`.
    pub(crate) fn linear(
        self,
        x: View<'_>,
        weight: &Weight,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        weight.check_matrix()?;
        let [n, k] = weight.shape();
        self.prepare(x, &[x.rows], weight, |x| {
            for (rows, out) in Self::panels(x.rows(), out, n) {
                let (x, parallel) =
                    (x.range(rows.clone()), rows.len() * k * n >= parallel::PRODUCTS);
                let out = self.tasks(rows.len(), [n, k], out, n, parallel);
                for_each([out], parallel, |[mut block]| {
                    let cols = block.cols();
                    self.products(x, weight, cols.start, &mut block);
                    if let Some(bias) = bias {
                        for m in 0..x.rows() {
                            let out = block.row(m).iter_mut();
                            out.zip(&bias[cols.clone()]).for_each(|(out, b)| *out += b);
                        }
                    }
                });
            }
        });
        Ok(())
    }

    /// The products of all rows of x with as many rows of W as `out` has columns, from `start` on.
    pub(crate) fn products(
        self,
        x: Operand<'_>,
        weight: &Weight,
        start: usize,
        out: &mut Block<'_>,
    ) {
        thread_local! {
            static WIDENED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
        }
        let isa = self.isa;
        let len = out.cols().len();
        let done = weight.pieces(start, len, |at, rows| match (isa, x.bf16, rows) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx(tiles), _, Rows::Packed(weights, rows))
                if let Some(x) = x.fours.filter(|x| !x.chunks.is_empty()) =>
            {
                tiles.fours(x, weights.rows(rows), out, at);
            }
            (_, _, Rows::Packed(weights, rows)) if let Some(int8) = x.int8 => {
                let weights = weights.rows(rows);
                with_integers!(isa, d => {
                    Integer { d, x: int8, rows: x.rows(), w: weights }.products(out, at)
                });
            }
            // A few rows at a time become f32.
            (_, _, Rows::Packed(weights, rows)) => {
                let mut tile = WIDENED.take();
                tile.resize(TILE_N * x.f32.cols, 0.0);
                for first in rows.clone().step_by(TILE_N) {
                    let some = first..rows.end.min(first + TILE_N);
                    let tile = &mut tile[..some.len() * x.f32.cols];
                    Rows::Packed(weights, some).widen(tile);
                    with_simd!(isa, s => {
                        let dots = Widened::<_, f32>(s, PhantomData);
                        Stored { d: dots, x: x.f32, w: tile }.products(out, at + first - rows.start)
                    });
                }
                WIDENED.set(tile);
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx(tiles), _, Rows::Bf16(w)) if let Some(x) = x.pairs => {
                tiles.pairs(x, w, out, at);
            }
            #[cfg(target_arch = "x86_64")]
            (isa, Some(x), Rows::Bf16(w)) if let Some(d) = isa.bf16() => Dots::vectorize(
                d,
                #[inline(always)]
                || Stored { d, x, w }.products(out, at),
            ),
            (_, _, Rows::F32(w)) => with_simd!(isa, s => {
                Stored { d: Widened(s, PhantomData), x: x.f32, w }.products(out, at)
            }),
            (_, _, Rows::F16(w)) => with_simd!(isa, s => {
                Stored { d: Widened(s, PhantomData), x: x.f32, w }.products(out, at)
            }),
            (_, _, Rows::Bf16(w)) => with_simd!(isa, s => {
                Stored { d: Widened(s, PhantomData), x: x.f32, w }.products(out, at)
            }),
        });
        debug_assert!(done.is_ok());
    }

    /// Rows of x that are multiplied with all of W before the next are, so that a long prompt is a
    /// number of short ones to the caches, and the rows of `out (rows, n)` that they make.
    pub(crate) fn panels(
        rows: usize,
        out: &mut [f32],
        n: usize,
    ) -> impl Iterator<Item = (std::ops::Range<usize>, &mut [f32])> {
        let starts = (0..rows).step_by(PANEL).map(move |first| first..rows.min(first + PANEL));
        starts.zip(out.chunks_mut((PANEL * n).max(1)))
    }

    /// The columns of `out (rows, cols)`, made from a weight of n rows of k values, in tasks.
    pub(crate) fn tasks(
        self,
        rows: usize,
        [n, k]: [usize; 2],
        out: &mut [f32],
        cols: usize,
        parallel: bool,
    ) -> Columns<'_> {
        match self.isa {
            // Its tiles want tasks of their own; not measured for what it multiplies in vectors.
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(_) => {}
            // All rows of x pass by while W is there: the longer its streams, the faster they are read.
            _ if rows <= FEW => return Columns::halving(out, cols, parallel),
            _ => {}
        }
        Columns::new(out, cols, cols, self.task_rows(k, n))
    }

    /// Rows of W that one task works on: enough tasks for the threads to end at the same time.
    pub(crate) fn task_rows(self, k: usize, n: usize) -> usize {
        let (task, [least, most], step, parts) = match self.isa {
            #[cfg(target_arch = "x86_64")]
            // Up to two tiles of 16 rows are multiplied together, it takes a while to shape them, and
            // tiles are so fast that reading x again for each task takes longest.
            Isa::Amx(_) => (TILED, [32, 512], 32, 8),
            _ => (TASK, [16, 256], TILE_N, 16),
        };
        let rows = (task / (2 * k.max(1))).clamp(least, most);
        rows.min(n.div_ceil(parts)).next_multiple_of(step).max(least)
    }
}

/// Products of rows of x with rows of W by tiles.
trait Tiles {
    /// Rows of x in the largest tile: 6, 4 or 2.
    const TILE_M: usize;
    /// Rows of W that lie together: 1 or 2.
    const UNIT: usize;

    /// Rows of x, and of W.
    fn rows(&self) -> [usize; 2];

    /// Whether the rows of W that are read together are streams, each from a part of it that is read from
    /// start to end, and not neighbours.
    fn has_streams(&self) -> bool;

    /// The products of M rows of x from number `m` on with these of W.
    fn tile<const M: usize, const N: usize>(
        &self,
        m: usize,
        w: [usize; N],
        turn: Turn,
    ) -> [[f32; N]; M];

    /// Writes all products, into the columns of `out` from `at` on.
    #[inline(always)]
    fn products(&self, out: &mut Block<'_>, at: usize) {
        let [rows, n] = self.rows();
        let tiles = rows.div_ceil(Self::TILE_M);
        // Few rows of x pass all together over each few rows of W, at the speed of memory. With more,
        // each tile of them stays in the first-level cache while it passes over all rows of W, which
        // the first one has brought into the second.
        let is_few = rows <= FEW;
        let streams = self.has_streams();
        if rows == 1 {
            let turn = Turn { tiles, turn: 0, streams };
            return match Self::UNIT {
                1 => self.pass::<1, STREAMS>(0, 0..n.div_ceil(STREAMS), turn, out, at),
                _ => self.pass::<1, { PAIR * STREAMS }>(
                    0,
                    0..n.div_ceil(PAIR * STREAMS),
                    turn,
                    out,
                    at,
                ),
            };
        }
        let tiles_of_w = n.div_ceil(TILE_N);
        let width = if is_few { 1 } else { tiles_of_w };
        for first in (0..tiles_of_w).step_by(width.max(1)) {
            let (mut m, mut turn) = (0, 0);
            macro_rules! tiles {
                ($m:literal) => {
                    while rows - m >= $m && $m <= Self::TILE_M {
                        let turn_of_tile = match is_few {
                            true => Turn { tiles, turn, streams },
                            false if turn == 0 => Turn { tiles: 1, turn, streams },
                            false => Turn::NEVER,
                        };
                        self.pass::<$m, TILE_N>(m, first..first + width, turn_of_tile, out, at);
                        turn += 1;
                        m += $m;
                    }
                };
            }
            tiles!(6);
            tiles!(4);
            tiles!(2);
            tiles!(1);
        }
    }

    /// Writes the products of M rows of x from number `m` on with some tiles of N rows of W.
    #[inline(always)]
    fn pass<const M: usize, const N: usize>(
        &self,
        m: usize,
        of_w: std::ops::Range<usize>,
        turn: Turn,
        out: &mut Block<'_>,
        at: usize,
    ) {
        let [_, n] = self.rows();
        // In units.
        let together = N / Self::UNIT;
        let (next, apart) = match turn.streams {
            true => (1, n.div_ceil(Self::UNIT).div_ceil(together)),
            false => (together, 1),
        };
        for j in of_w {
            // Past the last row it stands in for those that are not there.
            let w = std::array::from_fn(|i| {
                let unit = j * next + i / Self::UNIT * apart;
                (unit * Self::UNIT + i % Self::UNIT).min(n - 1)
            });
            let sums = self.tile::<M, N>(m, w, turn);
            for (i, sums) in sums.iter().enumerate() {
                let out = &mut out.row(m + i)[at..at + n];
                match out[w[0]..].first_chunk_mut() {
                    // A copy of a known length is one store.
                    Some(out) if apart == 1 => *out = *sums,
                    _ => w.iter().zip(sums).for_each(|(w, sum)| out[*w] = *sum),
                }
            }
        }
    }
}

/// Rows of W as they are stored.
struct Stored<'a, D: Dots> {
    d: D,
    x: View<'a, D::X>,
    w: &'a [D::W],
}

impl<D: Dots> Tiles for Stored<'_, D> {
    const TILE_M: usize = D::TILE_M;
    const UNIT: usize = 1;

    #[inline(always)]
    fn rows(&self) -> [usize; 2] {
        [self.x.rows, self.w.len().checked_div(self.x.cols).unwrap_or(0)]
    }

    #[inline(always)]
    fn has_streams(&self) -> bool {
        // Tiles that take turns fetch the rows of the next tile, which are one stream.
        self.x.rows <= D::TILE_M && size_of_val(self.w) / self.rows()[1].max(1) >= LONG
    }

    #[inline(always)]
    fn tile<const M: usize, const N: usize>(
        &self,
        m: usize,
        w: [usize; N],
        turn: Turn,
    ) -> [[f32; N]; M] {
        let k = self.x.cols;
        let of_w = w.map(|row| &self.w[row * k..][..k]);
        let mut of_x = [&[][..]; M];
        for (i, of_x) in of_x.iter_mut().enumerate() {
            *of_x = self.x.row(m + i);
        }
        dots::tile::<_, M, N>(self.d, of_x, of_w, turn)
    }
}

/// Quantised rows of W, with rows of x as integers.
struct Integer<'a, D: Integers> {
    d: D,
    x: Rounded<'a>,
    rows: usize,
    w: PackedRows<'a>,
}

impl<D: Integers> Tiles for Integer<'_, D> {
    const TILE_M: usize = D::TILE_M;
    const UNIT: usize = PAIR;

    #[inline(always)]
    fn rows(&self) -> [usize; 2] {
        [self.rows, self.w.len]
    }

    #[inline(always)]
    fn has_streams(&self) -> bool {
        self.w.shape.pair_bytes >= LONG
    }

    #[inline(always)]
    fn tile<const M: usize, const N: usize>(
        &self,
        m: usize,
        w: [usize; N],
        turn: Turn,
    ) -> [[f32; N]; M] {
        let mut of_x = [&[][..]; M];
        for (i, of_x) in of_x.iter_mut().enumerate() {
            *of_x = self.x.row(m + i);
        }
        quantised::tile::<_, M, N>(self.d, of_x, self.w, w, turn)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use jamba_core::{Dtype, HostTensor, Param, Role, WeightFormat};

    use super::*;
    use crate::packed::{Activations, GROUP, LANES, STEP};

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn weight([n, k]: [usize; 2], dtype: Dtype, format: WeightFormat) -> Weight {
        let bits = values(n * k, 1).into_iter().map(|v| bf16::from_f32(v).to_bits()).collect();
        let tensor = match dtype {
            Dtype::F32 => HostTensor::from_f32(vec![n, k], values(n * k, 1)),
            dtype => HostTensor::from_halves(dtype, vec![n, k], bits),
        };
        Weight::new(Param::new("w", Role::Mlp, tensor), format).unwrap()
    }

    /// What activations are after rounding to int8.
    fn rounded(x: &[f32], k: usize) -> Vec<f64> {
        let mut all = Activations::default();
        all.resize(x.len() / k, k);
        all.round(Isa::portable(), x.len() / k, false, |r| &x[r * k..(r + 1) * k]);
        let value = |i: usize| {
            let (row, i) = (all.row(i / k), i % k);
            let (group, b, at) = (i / GROUP, i / 32 % LANES, i % 32);
            let q = row[group].quants[at / STEP * LANES * STEP + b * STEP + at % STEP];
            f64::from(q) * f64::from(row[group].scales[b])
        };
        (0..x.len()).map(value).collect()
    }

    #[test]
    fn quantised_products_are_exact_but_for_f32_and_do_not_depend_on_the_batch() {
        use WeightFormat::{ExpertsInt8, Int4, Int8};
        // Together in tiles where there are any, alone in vectors.
        const ROWS: usize = if cfg!(miri) { 3 } else { 33 };
        for isa in Isa::available() {
            let products = Products { isa, precision: Precision::Bf16 };
            for format in [ExpertsInt8, Int8, Int4] {
                let sizes = [
                    [1, 1],
                    [3, 32],
                    [9, 100],
                    [5, 512],
                    [7, 600],
                    [6, 1024],
                    [7, 1100],
                    [20, 2560],
                    [333, 1024],
                ];
                for [n, k] in sizes.into_iter().take(if cfg!(miri) { 3 } else { 9 }) {
                    let weight = weight([n, k], Dtype::F32, format);
                    let mut w = vec![0.0; n * k];
                    weight.pieces(0, n, |_, rows| rows.widen(&mut w)).unwrap();
                    let x = values(ROWS * k, 5);
                    let expected = rounded(&x, k);
                    let mut out = vec![0.0; ROWS * n];
                    products.linear(View::new(&x, k), &weight, None, &mut out).unwrap();
                    for (i, got) in out.iter().enumerate() {
                        let (x, w) = (&expected[i / n * k..][..k], &w[i % n * k..][..k]);
                        let sum: f64 = x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum();
                        let error = (sum - f64::from(*got)).abs();
                        let name = isa.name();
                        assert!(
                            error < 2e-6 * k as f64,
                            "{name} {format} {n}x{k}: {got} not {sum}"
                        );
                    }
                    for m in 0..ROWS {
                        let mut alone = vec![0.0; n];
                        let row = View::new(&x[m * k..(m + 1) * k], k);
                        products.linear(row, &weight, None, &mut alone).unwrap();
                        assert_eq!(alone, out[m * n..(m + 1) * n], "{} {format}", isa.name());
                    }
                    // One to seven tiles of them, together up to 16 rows.
                    for rows in [2, 5, 7, 13, 16, 17, 23].into_iter().filter(|rows| *rows < ROWS) {
                        let mut some = vec![0.0; rows * n];
                        let x = View::new(&x[..rows * k], k);
                        products.linear(x, &weight, None, &mut some).unwrap();
                        assert_eq!(some, out[..rows * n], "{} {format} {rows}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_bf16_round_activations_once_and_do_not_depend_on_the_batch() {
        let sizes = [
            [7, 133, 5],
            [1, 32, 1],
            [16, 32, 2],
            [33, 64, 16],
            [70, 96, 17],
            [100, 320, 150],
            [7, 640, 5],
            // Tasks of more tiles than are written together.
            [2400, 32, 16],
        ];
        for isa in Isa::available() {
            let of = |precision| Products { isa, precision };
            for [n, k, rows] in sizes.into_iter().take(if cfg!(miri) { 3 } else { 8 }) {
                let weight = weight([n, k], Dtype::Bf16, WeightFormat::Stored);
                let x = values(rows * k, 5);
                let near: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
                let (mut a, mut b) = (vec![f32::NAN; rows * n], vec![0.0; rows * n]);
                of(Precision::Bf16).linear(View::new(&x, k), &weight, None, &mut a).unwrap();
                let exact = if isa.has_bf16() { &near } else { &x };
                of(Precision::F32).linear(View::new(exact, k), &weight, None, &mut b).unwrap();
                for (a, b) in a.iter().zip(&b) {
                    let name = isa.name();
                    assert!((a - b).abs() < 1e-4, "{name} {n}x{k}, {rows}: {a} not {b}");
                }
                for m in 0..rows {
                    let mut alone = vec![0.0; n];
                    let row = View::new(&x[m * k..(m + 1) * k], k);
                    of(Precision::Bf16).linear(row, &weight, None, &mut alone).unwrap();
                    assert_eq!(alone, a[m * n..(m + 1) * n], "{}, row {m}", isa.name());
                }
            }
        }
    }
}
