//! Routed experts: tokens grouped by expert, one pass over each expert that any token uses.

use jamba_core::Result;
use jamba_core::weights::Moe;

use crate::elementwise::silu_mul;
use crate::linear::linear;
use crate::simd::Isa;
use crate::tensor::View;
use crate::weight::Weight;

/// A token that uses an expert, and the weight that it gives it.
#[derive(Clone, Copy)]
struct Use {
    expert: usize,
    token: usize,
    p: f32,
}

/// `out (tokens, hidden)`: see [`Backend::moe_experts`](jamba_core::Backend::moe_experts). A
/// token's experts are added in the order of their index.
pub(crate) fn moe_experts(
    isa: Isa,
    x: View<'_>,
    router_logits: View<'_>,
    weights: &Moe<Weight>,
    (top_k, inter): (usize, usize),
    out: &mut [f32],
) -> Result<()> {
    let hidden = x.cols;
    let mut uses = Vec::with_capacity(x.rows * top_k);
    for token in 0..x.rows {
        route(router_logits.row(token), top_k, |expert, p| uses.push(Use { expert, token, p }));
    }
    uses.sort_unstable_by_key(|u| (u.expert, u.token));

    out.fill(0.0);
    let (mut gathered, mut gate_up, mut act, mut y) = (vec![], vec![], vec![], vec![]);
    for group in uses.chunk_by(|a, b| a.expert == b.expert) {
        let (n, expert) = (group.len(), group[0].expert);
        gathered.clear();
        group.iter().for_each(|u| gathered.extend_from_slice(x.row(u.token)));
        gate_up.resize(n * 2 * inter, 0.0);
        act.resize(n * inter, 0.0);
        y.resize(n * hidden, 0.0);

        let rows = (expert * 2 * inter, 2 * inter);
        linear(isa, View::new(&gathered, hidden), &weights.gate_up_proj, rows, None, &mut gate_up)?;
        silu_mul(isa, &gate_up, inter, &mut act);
        let rows = (expert * hidden, hidden);
        linear(isa, View::new(&act, inter), &weights.down_proj, rows, None, &mut y)?;

        for (u, y) in group.iter().zip(y.chunks_exact(hidden)) {
            let out = &mut out[u.token * hidden..(u.token + 1) * hidden];
            out.iter_mut().zip(y).for_each(|(out, y)| *out += u.p * y);
        }
    }
    Ok(())
}

/// Tells the `top_k` experts of largest logit, lower index first among equals, each with its
/// probability among all experts.
fn route(logits: &[f32], top_k: usize, mut tell: impl FnMut(usize, f32)) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - max).exp()).sum();
    let mut last: Option<usize> = None;
    for _ in 0..top_k {
        let better = |a: usize, b: usize| logits[a].total_cmp(&logits[b]).is_gt();
        // The best of those that come after the last in the order (logit descending, index).
        let comes_after = |e: usize| match last {
            None => true,
            Some(l) => better(l, e) || (!better(e, l) && e > l),
        };
        let best = (0..logits.len())
            .filter(|e| comes_after(*e))
            .reduce(|best, e| if better(e, best) { e } else { best });
        let Some(best) = best else { return };
        tell(best, (logits[best] - max).exp() / sum);
        last = Some(best);
    }
}
