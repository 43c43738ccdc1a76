//! Feed-forward blocks, SwiGLU: one for all tokens, or routed experts with tokens grouped by
//! expert, one pass over each expert that any token uses.

use std::cell::Cell;

use jamba_core::Result;
use jamba_core::shape::Shaped;
use jamba_core::weights::{Mlp, Moe};

use crate::columns::{Block, Columns, for_each, for_each_group, for_each_rows, parallel};
use crate::elementwise::silu_mul;
use crate::linear::Products;
use crate::operand::Operand;
use crate::tensor::View;
use crate::weight::Weight;

/// What a step needs for its routed tokens, kept by each thread for the next.
#[derive(Default)]
struct Buffers {
    uses: Vec<Use>,
    /// Token of each use.
    tokens: Vec<usize>,
    /// Expert of each group, and where in the uses it ends.
    experts: Vec<usize>,
    ends: Vec<usize>,
    /// For each token and each of its experts, the use, by index of the expert.
    of_token: Vec<usize>,
    /// Uses of each token that were found.
    seen: Vec<usize>,
    /// `(uses, inter)`.
    act: Vec<f32>,
    /// `(uses, hidden)`.
    y: Vec<f32>,
}

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
    products: Products,
    x: View<'_>,
    router_logits: View<'_>,
    weights: &Moe<Weight>,
    (top_k, inter): (usize, usize),
    out: &mut [f32],
) -> Result<()> {
    thread_local! {
        // Taken out while they are used: another session may run on this thread meanwhile.
        static BUFFERS: Cell<Buffers> = Cell::default();
    }
    weights.gate_up_proj.check_matrix()?;
    weights.down_proj.check_matrix()?;
    let hidden = x.cols;
    let mut buffers = BUFFERS.take();
    let Buffers { uses, tokens, experts, ends, of_token, seen, act, y } = &mut buffers;
    uses.clear();
    for token in 0..x.rows {
        route(router_logits.row(token), top_k, |expert, p| uses.push(Use { expert, token, p }));
    }
    uses.sort_unstable_by_key(|u| (u.expert, u.token));
    tokens.clear();
    tokens.extend(uses.iter().map(|u| u.token));
    experts.clear();
    ends.clear();
    for group in uses.chunk_by(|a, b| a.expert == b.expert) {
        experts.push(group[0].expert);
        ends.push(ends.last().unwrap_or(&0) + group.len());
    }
    let group = |g: usize| if g == 0 { 0..ends[0] } else { ends[g - 1]..ends[g] };

    let act = sized(act, uses.len() * inter);
    products.prepare(x.select(tokens), ends, &weights.gate_up_proj, |x| {
        let matrix = Columns::new(act, inter, inter, products.task_rows(hidden, 2 * inter));
        let parallel = uses.len() * hidden * 2 * inter >= parallel::PRODUCTS;
        let widest = matrix.widest();
        for_each_group(&matrix, ends, parallel, |g, mut block| {
            let x = x.range(group(g));
            let first = experts[g] * 2 * inter;
            gate_up(products, x, &weights.gate_up_proj, (first, inter), widest, &mut block);
        });
    });
    let y = sized(y, uses.len() * hidden);
    products.prepare(View::new(act, inter), ends, &weights.down_proj, |act| {
        let matrix = Columns::new(y, hidden, hidden, products.task_rows(inter, hidden));
        let parallel = uses.len() * hidden * inter >= parallel::PRODUCTS;
        for_each_group(&matrix, ends, parallel, |g, mut block| {
            let first = experts[g] * hidden + block.cols().start;
            products.products(act.range(group(g)), &weights.down_proj, first, &mut block);
        });
    });

    let used = uses.len().checked_div(x.rows).unwrap_or(0);
    of_token.clear();
    of_token.resize(uses.len(), 0);
    seen.clear();
    seen.resize(x.rows, 0);
    for (i, u) in uses.iter().enumerate() {
        of_token[u.token * used + seen[u.token]] = i;
        seen[u.token] += 1;
    }
    for_each_rows(out, hidden, 16, uses.len() * hidden >= parallel::PRODUCTS, |first, out| {
        for (token, out) in out.chunks_exact_mut(hidden).enumerate() {
            out.fill(0.0);
            for &i in &of_token[(first + token) * used..][..used] {
                let (p, y) = (uses[i].p, &y[i * hidden..][..hidden]);
                out.iter_mut().zip(y).for_each(|(out, y)| *out += p * y);
            }
        }
    });
    BUFFERS.set(buffers);
    Ok(())
}

/// `act (tokens, inter)`, `out (tokens, hidden)`: see [`Backend::mlp`](jamba_core::Backend::mlp).
pub(crate) fn mlp(
    products: Products,
    x: View<'_>,
    weights: &Mlp<Weight>,
    act: &mut [f32],
    out: &mut [f32],
) -> Result<()> {
    weights.gate_up_proj.check_matrix()?;
    let (tokens, hidden, inter) = (x.rows, x.cols, weights.down_proj.shape()[1]);
    products.prepare(x, &[tokens], &weights.gate_up_proj, |x| {
        for (rows, act) in Products::panels(tokens, act, inter) {
            let (x, parallel) =
                (x.range(rows.clone()), rows.len() * hidden * 2 * inter >= parallel::PRODUCTS);
            let weight = &weights.gate_up_proj;
            let matrix = products.tasks(rows.len(), [2 * inter, hidden], act, inter, parallel);
            let widest = matrix.widest();
            for_each([matrix], parallel, |[mut block]| {
                gate_up(products, x, weight, (0, inter), widest, &mut block);
            });
        }
    });
    products.linear(View::new(act, inter), &weights.down_proj, None, out)
}

/// Some columns of `act = silu(gate(x)) * up(x)`, gate and up being `inter` rows each of the
/// weight, from `first` on. Other blocks have up to `widest` columns: there is room for them at once, as a later
/// step must not allocate.
fn gate_up(
    products: Products,
    x: Operand<'_>,
    weight: &Weight,
    (first, inter): (usize, usize),
    widest: usize,
    act: &mut Block<'_>,
) {
    thread_local! {
        static BOTH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let (rows, cols) = (x.rows(), act.cols());
    let mut buffer = BOTH.take();
    let both = &mut sized(&mut buffer, 2 * rows * widest)[..2 * rows * cols.len()];
    let (gate, up) = both.split_at_mut(rows * cols.len());
    let of = |half: &mut [f32], start| {
        products.products(x, weight, start, &mut Block::new(half, cols.len()));
    };
    of(gate, first + cols.start);
    of(up, first + inter + cols.start);
    silu_mul(products.isa, gate, up, act);
    BOTH.set(buffer);
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
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
