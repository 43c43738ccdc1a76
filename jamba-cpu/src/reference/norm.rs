//! RMSNorm.

use ndarray::{Array2, ArrayView1, ArrayView2};

/// `y_i = x_i / sqrt(mean_j(x_j^2) + eps) * w_i` per row: x and y `(tokens, n)`, w `(n)`.
pub(super) fn rms_norm(
    x: ArrayView2<'_, f32>,
    weight: ArrayView1<'_, f32>,
    eps: f32,
) -> Array2<f32> {
    let mut y = Array2::zeros(x.dim());
    for (x, mut y) in x.rows().into_iter().zip(y.rows_mut()) {
        let mean_square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = (mean_square + f64::from(eps)).sqrt().recip();
        for i in 0..x.len() {
            y[i] = (f64::from(x[i]) * scale * f64::from(weight[i])) as f32;
        }
    }
    y
}
