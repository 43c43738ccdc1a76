//! The causal depthwise convolution before the scan.

use jamba_core::Batch;
use ndarray::{Array2, Array3, ArrayView1, ArrayView2};

use super::linear::silu;

/// `y[t, i] = silu(b[i] + sum_j w[i, j] x[t - d_conv + 1 + j, i])`: x and y `(tokens, d_inner)`,
/// w `(d_inner, d_conv)`.
///
/// Inputs before the first token come from `state (slots, d_inner, d_conv - 1)`, oldest first,
/// which then holds the latest inputs.
pub(super) fn causal_conv1d(
    x: ArrayView2<'_, f32>,
    weight: ArrayView2<'_, f32>,
    bias: Option<ArrayView1<'_, f32>>,
    batch: &Batch,
    state: &mut Array3<f32>,
) -> Array2<f32> {
    let (d_inner, d_conv) = weight.dim();
    let mut y = Array2::zeros(x.dim());
    let mut t = 0;
    for run in batch.runs() {
        for _ in 0..run.len {
            for i in 0..d_inner {
                // The d_conv latest inputs of this channel, oldest first.
                let mut window: Vec<f32> =
                    (0..d_conv - 1).map(|j| state[[run.slot, i, j]]).collect();
                window.push(x[[t, i]]);

                let taps = window.iter().zip(weight.row(i));
                let sum: f64 = taps.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let bias = bias.map_or(0.0, |b| f64::from(b[i]));
                y[[t, i]] = silu(sum + bias) as f32;

                for j in 0..d_conv - 1 {
                    state[[run.slot, i, j]] = window[j + 1];
                }
            }
            t += 1;
        }
    }
    y
}
