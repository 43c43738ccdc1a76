//! Routed experts.

use ndarray::{Array2, ArrayView1, ArrayView2, s};

use super::attention::softmax;
use super::linear::{linear, silu_mul};

/// Per token, with `p = softmax(router_logits)` over all experts:
///
/// ```text
/// out = sum_{e in top_k(p)} p[e] W_down[e] (silu(W_gate[e] x) * W_up[e] x)
/// ```
///
/// x `(tokens, hidden)`, `gate_up (experts * 2 inter, hidden)` with rows `[gate; up]` per expert,
/// `down (experts * hidden, inter)`. The chosen p are not renormalised.
pub(super) fn moe_experts(
    x: ArrayView2<'_, f32>,
    router_logits: ArrayView2<'_, f32>,
    gate_up: ArrayView2<'_, f32>,
    down: ArrayView2<'_, f32>,
    top_k: usize,
) -> Array2<f32> {
    let (hidden, inter) = (x.ncols(), down.ncols());
    let mut out = Array2::<f64>::zeros(x.dim());
    for t in 0..x.nrows() {
        for (e, p) in route(router_logits.row(t), top_k) {
            let gate_up = gate_up.slice(s![e * 2 * inter..(e + 1) * 2 * inter, ..]);
            let down = down.slice(s![e * hidden..(e + 1) * hidden, ..]);
            let act = silu_mul(linear(x.slice(s![t..=t, ..]), gate_up, None).view());
            let y = linear(act.view(), down, None);
            for i in 0..hidden {
                out[[t, i]] += p * f64::from(y[[0, i]]);
            }
        }
    }
    out.mapv(|v| v as f32)
}

/// The `top_k` experts of largest logit, lower index first among equals, with their probability
/// among *all* experts.
fn route(logits: ArrayView1<'_, f32>, top_k: usize) -> Vec<(usize, f64)> {
    let p = softmax(&logits.mapv(f64::from).to_vec());
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.truncate(top_k);
    order.into_iter().map(|e| (e, p[e])).collect()
}
