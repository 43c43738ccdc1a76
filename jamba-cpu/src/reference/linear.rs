//! Matrix products and the SwiGLU product.

use ndarray::{Array2, ArrayView1, ArrayView2, Zip};

/// `y = x W^T + b`: x `(tokens, k)`, W `(n, k)`, b `(n)`, y `(tokens, n)`.
pub(super) fn linear(
    x: ArrayView2<'_, f32>,
    weight: ArrayView2<'_, f32>,
    bias: Option<ArrayView1<'_, f32>>,
) -> Array2<f32> {
    let mut y = Array2::zeros((x.nrows(), weight.nrows()));
    Zip::indexed(&mut y).par_for_each(|(t, n), y| {
        let bias = bias.map_or(0.0, |b| f64::from(b[n]));
        *y = (dot(x.row(t), weight.row(n)) + bias) as f32;
    });
    y
}

/// `sum_i x_i y_i`.
pub(super) fn dot(x: ArrayView1<'_, f32>, y: ArrayView1<'_, f32>) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

/// `silu(gate) * up` where `gate_up (tokens, 2n) = [gate | up]`.
pub(super) fn silu_mul(gate_up: ArrayView2<'_, f32>) -> Array2<f32> {
    let n = gate_up.ncols() / 2;
    Array2::from_shape_fn((gate_up.nrows(), n), |(t, i)| {
        (silu(f64::from(gate_up[[t, i]])) * f64::from(gate_up[[t, n + i]])) as f32
    })
}

/// `silu(x) = x sigmoid(x)`.
pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
