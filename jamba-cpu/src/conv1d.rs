//! The causal depthwise convolution, vectors across channels.

use jamba_core::Batch;

use crate::columns::{Block, Columns, ROWS_AHEAD, for_each, parallel, prefetch_row};
use crate::simd::{Isa, Simd, silu, with_simd};
use crate::tensor::View;
use crate::weight::PAD;

/// Channels that one task works on.
const BLOCK: usize = 128;

/// Operands: x `(tokens, d_inner)`, weight `(d_conv, padded d_inner)`, bias `(d_inner)`.
pub(crate) struct Operands<'a> {
    pub(crate) x: View<'a>,
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
}

/// `out = silu(bias + sum_j weight[j] x[t - d_conv + 1 + j])` per channel, where inputs before
/// the first come from `state`: per slot `(d_conv - 1, padded d_inner)`, oldest first, which then
/// holds the latest.
pub(crate) fn causal_conv1d(
    isa: Isa,
    operands: &Operands<'_>,
    batch: &Batch,
    state: &mut [f32],
    out: &mut [f32],
) {
    let d_inner = operands.x.cols;
    let stride = d_inner.next_multiple_of(PAD);
    let parallel = operands.x.rows * operands.weight.len() >= parallel::CONV;
    let out = Columns::new(out, d_inner, d_inner, BLOCK);
    let state = Columns::new(state, stride, d_inner, BLOCK);
    for_each([out, state], parallel, |[mut out, mut state]| {
        with_simd!(isa, s => block(s, operands, batch, &mut state, &mut out));
    });
}

#[inline(always)]
fn block<S: Simd>(
    s: S,
    o: &Operands<'_>,
    batch: &Batch,
    state: &mut Block<'_>,
    out: &mut Block<'_>,
) {
    let cols = out.cols();
    let stride = o.x.cols.next_multiple_of(PAD);
    let context = o.weight.len() / stride - 1;
    let mut first = 0;
    // Sequence by sequence, so that what a task has of a state is read in order.
    for run in batch.runs() {
        let slot = run.slot * context;
        // Of inputs counted from the oldest that the state has.
        let input = |state: &mut Block<'_>, i: usize, c: usize| match i.checked_sub(context) {
            Some(t) => s.load_partial(&o.x.row(first + t)[cols.clone()][c..]),
            None => s.load_partial(&state.row(slot + i)[c..]),
        };
        for t in 0..run.len {
            if t + ROWS_AHEAD < run.len {
                prefetch_row(&o.x.row(first + t + ROWS_AHEAD)[cols.clone()]);
            }
            for c in (0..cols.len()).step_by(S::LANES) {
                let mut sum =
                    o.bias.map_or(s.splat(0.0), |b| s.load_partial(&b[cols.clone()][c..]));
                for j in 0..=context {
                    let tap = s.load(&o.weight[j * stride + cols.start + c..]);
                    sum = s.fma(tap, input(state, t + j, c), sum);
                }
                s.store_partial(silu(s, sum), &mut out.row(first + t)[c..]);
            }
        }
        for j in 0..context {
            for c in (0..cols.len()).step_by(S::LANES) {
                let kept = input(state, run.len + j, c);
                s.store_partial(kept, &mut state.row(slot + j)[c..]);
            }
        }
        first += run.len;
    }
}
