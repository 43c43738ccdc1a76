//! Matrix products, `y = x W^T + b`.
//!
//! Both operands have their sum index contiguous, so that a tile of M rows of x and N rows of W
//! is M * N dot products that share their loads: no packing, and W is read in its stored dtype.
//! Each output is one chain of fused multiply-adds whatever the tile: a row's result does not
//! depend on which other rows are in the batch.

use crate::simd::columns::{Block, Columns, for_each};
use crate::simd::{Element, Isa, Simd, with_simd};
use crate::tensor::View;
use crate::weight::{Rows, Weight};

/// Rows of W that one task works on.
const BLOCK_N: usize = 32;
/// Rows of x that stay in the second-level cache while a task passes through its rows of W.
const BLOCK_M: usize = 64;
/// Multiply-adds below which threads are not worth waking.
const PARALLEL: usize = 1 << 19;

/// `out (x.rows, len) = x * W[start..start + len]^T + bias`.
pub(crate) fn linear(
    isa: Isa,
    x: View<'_>,
    weight: &Weight,
    (start, len): (usize, usize),
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> jamba_core::Result<()> {
    // Fails before any thread starts if the weight is not a matrix.
    weight.pieces(0, 0, |_, _| ())?;
    let parallel = x.rows * x.cols * len >= PARALLEL;
    for_each([Columns::new(out, len, len, BLOCK_N)], parallel, |[mut block]| {
        let cols = block.cols();
        let bias = bias.map(|b| &b[cols.clone()]);
        let done = weight.pieces(start + cols.start, cols.len(), |at, rows| match rows {
            Rows::F32(w) => with_simd!(isa, s => products(s, x, w, bias, &mut block, at)),
            Rows::F16(w) => with_simd!(isa, s => products(s, x, w, bias, &mut block, at)),
            Rows::Bf16(w) => with_simd!(isa, s => products(s, x, w, bias, &mut block, at)),
            // Eight rows at a time become f32: what the tiles of one token take.
            Rows::Packed(weights, rows) => {
                let mut tile = vec![0.0; 8 * x.cols];
                for first in rows.clone().step_by(8) {
                    let some = first..rows.end.min(first + 8);
                    let (tile, at) = (&mut tile[..some.len() * x.cols], at + first - rows.start);
                    Rows::Packed(weights, some).widen(tile);
                    with_simd!(isa, s => products(s, x, tile, bias, &mut block, at));
                }
            }
        });
        debug_assert!(done.is_ok());
    });
    Ok(())
}

/// All products of the rows of x with some rows of W, into the columns of `block` from `at` on.
#[inline(always)]
fn products<S: Simd, E: Element>(
    s: S,
    x: View<'_>,
    w: &[E],
    bias: Option<&[f32]>,
    block: &mut Block<'_>,
    at: usize,
) {
    let k = x.cols;
    let n = w.len().checked_div(k).unwrap_or(0);
    let row = |j: usize| &w[j * k..(j + 1) * k];
    let mut put = |m: usize, j: usize, sums: &[f32]| {
        let to = &mut block.row(m)[at + j..at + j + sums.len()];
        to.copy_from_slice(sums);
        if let Some(bias) = bias {
            to.iter_mut().zip(&bias[at + j..]).for_each(|(to, b)| *to += b);
        }
    };
    if x.rows == 1 {
        let mut j = 0;
        while j + 8 <= n {
            let [sums] = tile(s, [x.row(0)], std::array::from_fn::<_, 8, _>(|i| row(j + i)));
            put(0, j, &sums);
            j += 8;
        }
        while j < n {
            let [sums] = tile(s, [x.row(0)], [row(j)]);
            put(0, j, &sums);
            j += 1;
        }
        return;
    }
    for m0 in (0..x.rows).step_by(BLOCK_M) {
        let m1 = (m0 + BLOCK_M).min(x.rows);
        let mut j = 0;
        while j < n {
            let four = j + 4 <= n;
            let mut m = m0;
            while m < m1 {
                if four && m + 4 <= m1 && S::TILE_M == 4 {
                    let rows = std::array::from_fn::<_, 4, _>(|i| x.row(m + i));
                    let sums = tile(s, rows, std::array::from_fn::<_, 4, _>(|i| row(j + i)));
                    (0..4).for_each(|i| put(m + i, j, &sums[i]));
                    m += 4;
                } else if four && m + 2 <= m1 {
                    let rows = [x.row(m), x.row(m + 1)];
                    let sums = tile(s, rows, std::array::from_fn::<_, 4, _>(|i| row(j + i)));
                    (0..2).for_each(|i| put(m + i, j, &sums[i]));
                    m += 2;
                } else if four {
                    let [sums] =
                        tile(s, [x.row(m)], std::array::from_fn::<_, 4, _>(|i| row(j + i)));
                    put(m, j, &sums);
                    m += 1;
                } else {
                    let [sums] = tile(s, [x.row(m)], [row(j)]);
                    put(m, j, &sums);
                    m += 1;
                }
            }
            j += if four { 4 } else { 1 };
        }
    }
}

/// The M * N dot products of rows of x and rows of W, all of the same length.
#[inline(always)]
pub(crate) fn tile<S: Simd, E: Element, const M: usize, const N: usize>(
    s: S,
    x: [&[f32]; M],
    w: [&[E]; N],
) -> [[f32; N]; M] {
    let k = x[0].len();
    let full = k - k % S::LANES;
    let mut sums = [[s.splat(0.0); N]; M];
    let mut i = 0;
    while i < full {
        let mut loaded = [s.splat(0.0); N];
        for n in 0..N {
            loaded[n] = E::load(s, &w[n][i..i + S::LANES]);
        }
        for m in 0..M {
            let x = s.load(&x[m][i..i + S::LANES]);
            for n in 0..N {
                sums[m][n] = s.fma(x, loaded[n], sums[m][n]);
            }
        }
        i += S::LANES;
    }
    if full < k {
        let mut loaded = [s.splat(0.0); N];
        for n in 0..N {
            loaded[n] = E::load_partial(s, &w[n][full..k]);
        }
        for m in 0..M {
            let x = s.load_partial(&x[m][full..k]);
            for n in 0..N {
                sums[m][n] = s.fma(x, loaded[n], sums[m][n]);
            }
        }
    }
    // Loops, because closures given to `array::map` are compiled for the plain instruction set.
    let mut out = [[0.0; N]; M];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = s.sum(sum);
        }
    }
    out
}
