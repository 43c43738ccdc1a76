//! RMSNorm, `y = x / sqrt(mean(x^2) + eps) * w`.

use crate::simd::{Isa, Simd, with_simd};

/// One row; x and y may be the same memory only through [`rms_norm_in_place`].
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let scale = with_simd!(isa, s => scale(s, x, eps));
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * w;
    }
}

/// One row, over itself.
pub(crate) fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = with_simd!(isa, s => scale(s, x, eps));
    for (x, w) in x.iter_mut().zip(weight) {
        *x *= scale;
        *x *= w;
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
