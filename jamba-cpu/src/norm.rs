//! RMSNorm, `y = x / sqrt(mean(x^2) + eps) * w`.

use std::ops::Range;

use crate::columns::{for_each_rows, parallel};
use crate::simd::{Isa, Simd, with_simd};

/// Rows of as many values as there are weights.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let cols = weight.len();
    let parallel = x.len() >= parallel::ELEMENTS;
    for_each_rows(y, cols, 16, parallel, |first, y| {
        let x = x[first * cols..].chunks_exact(cols);
        for (y, x) in y.chunks_exact_mut(cols).zip(x) {
            with_simd!(isa, s => {
                let scale = scale(s, x, eps);
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * scale * w;
                }
            });
        }
    });
}

/// Some columns of rows of `stride` values, over themselves.
pub(crate) fn rms_norm_cols(
    isa: Isa,
    x: &mut [f32],
    stride: usize,
    cols: Range<usize>,
    weight: &[f32],
    eps: f32,
) {
    for row in x.chunks_exact_mut(stride) {
        let x = &mut row[cols.clone()];
        with_simd!(isa, s => {
            let scale = scale(s, x, eps);
            for (x, w) in x.iter_mut().zip(weight) {
                *x = *x * scale * w;
            }
        });
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn scale<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sum = s.splat(0.0);
    let chunks = x.chunks_exact(S::LANES);
    let rest = s.load_partial(chunks.remainder());
    for chunk in chunks {
        let v = s.load(chunk);
        sum = s.fma(v, v, sum);
    }
    sum = s.fma(rest, rest, sum);
    (s.sum(sum) / x.len() as f32 + eps).sqrt().recip()
}
