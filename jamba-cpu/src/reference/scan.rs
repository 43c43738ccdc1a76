//! The selective scan: the state space model at the heart of Mamba.

use jamba_core::Batch;
use ndarray::{Array2, Array3, ArrayView1, ArrayView2};

use super::linear::silu;

/// Operands, named as in arXiv 2312.00752.
pub(super) struct Operands<'a> {
    /// `(tokens, d_inner)`, after convolution and SiLU.
    pub(super) x: ArrayView2<'a, f32>,
    /// `(tokens, d_inner)`, before bias and softplus.
    pub(super) dt: ArrayView2<'a, f32>,
    /// `(d_inner, d_state)`, negative.
    pub(super) a: ArrayView2<'a, f32>,
    /// `(tokens, d_state)`.
    pub(super) b: ArrayView2<'a, f32>,
    /// `(tokens, d_state)`.
    pub(super) c: ArrayView2<'a, f32>,
    /// `(d_inner)`.
    pub(super) d: ArrayView1<'a, f32>,
    /// `(tokens, d_inner)`, gate before SiLU.
    pub(super) z: ArrayView2<'a, f32>,
    /// `(d_inner)`.
    pub(super) dt_bias: ArrayView1<'a, f32>,
}

/// Per token t and channel i, with h_i in `state (slots, d_inner, d_state)`:
///
/// ```text
/// dt   = softplus(dt[t, i] + dt_bias[i])
/// h[n] = exp(dt A[i, n]) h[n] + dt B[t, n] x[t, i]
/// y    = (sum_n C[t, n] h[n] + D[i] x[t, i]) silu(z[t, i])
/// ```
pub(super) fn selective_scan(
    o: &Operands<'_>,
    batch: &Batch,
    state: &mut Array3<f32>,
) -> Array2<f32> {
    let (d_inner, d_state) = o.a.dim();
    let mut y = Array2::zeros(o.x.dim());
    let mut t = 0;
    for run in batch.runs() {
        for _ in 0..run.len {
            for i in 0..d_inner {
                let x = f64::from(o.x[[t, i]]);
                let dt = softplus(f64::from(o.dt[[t, i]]) + f64::from(o.dt_bias[i]));
                let mut sum = f64::from(o.d[i]) * x;
                for n in 0..d_state {
                    let h = &mut state[[run.slot, i, n]];
                    let decay = (dt * f64::from(o.a[[i, n]])).exp();
                    *h = (decay * f64::from(*h) + dt * f64::from(o.b[[t, n]]) * x) as f32;
                    sum += f64::from(o.c[[t, n]]) * f64::from(*h);
                }
                y[[t, i]] = (sum * silu(f64::from(o.z[[t, i]]))) as f32;
            }
            t += 1;
        }
    }
    y
}

/// `ln(1 + e^x)`, and x itself above 20 as in PyTorch.
fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::softplus;

    /// As PyTorch 2's in f32, down to where dt is the smallest subnormal and then zero.
    #[test]
    fn softplus_underflows_as_in_pytorch() {
        let smallest = f32::from_bits(1);
        for (x, expected) in [
            (-1e30, 0.0),
            (-800.0, 0.0),
            (-104.0, 0.0),
            (-103.0, smallest),
            (-100.0, 3.8e-44),
            (-88.0, 6.054_601e-39),
            (-50.0, 1.928_749_9e-22),
            (-20.0, 2.061_153_7e-9),
            (20.0, 20.0),
            (20.01, 20.01),
            (1e30, 1e30),
        ] {
            let got = softplus(f64::from(x as f32)) as f32;
            let near = (got - expected).abs() <= 1e-6 * expected;
            assert!(near || got.to_bits().abs_diff(expected.to_bits()) <= 1, "{x}: {got:e}");
        }
        assert!(softplus(f64::NAN).is_nan());
    }
}
