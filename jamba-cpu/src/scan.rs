//! The selective scan, vectors across channels.

use jamba_core::Batch;

use crate::columns::{Block, Columns, ROWS_AHEAD, for_each, parallel, prefetch_row};
use crate::simd::{Isa, Simd, exp2, silu, softplus, with_simd};
use crate::tensor::View;
use crate::weight::PAD;

/// Channels that one task works on.
const BLOCK: usize = 64;

/// Operands, named as in arXiv 2312.00752.
pub(crate) struct Operands<'a> {
    /// `(tokens, d_inner)`.
    pub(crate) x: View<'a>,
    /// `(tokens, d_inner)`, before bias and softplus.
    pub(crate) dt: View<'a>,
    /// `(padded d_inner / PAD, d_state, PAD)`.
    pub(crate) a: &'a [f32],
    /// `(tokens, d_state)`.
    pub(crate) b: View<'a>,
    /// `(tokens, d_state)`.
    pub(crate) c: View<'a>,
    /// `(d_inner)`.
    pub(crate) d: &'a [f32],
    /// `(tokens, d_inner)`, gate before SiLU.
    pub(crate) z: View<'a>,
    /// `(d_inner)`.
    pub(crate) dt_bias: &'a [f32],
}

/// Per token and channel, h in `state`, per slot `(padded d_inner / PAD, d_state, PAD)`: what a task
/// has of a slot is contiguous, so that the states of many sequences stream through the caches.
///
/// ```text
/// dt = softplus(dt + dt_bias)
/// h  = exp(dt A) h + dt B x
/// y  = (C . h + D x) silu(z)
/// ```
pub(crate) fn selective_scan(
    isa: Isa,
    operands: &Operands<'_>,
    batch: &Batch,
    state: &mut [f32],
    y: &mut [f32],
) {
    let d_inner = operands.x.cols;
    let (d_state, stride) = (operands.b.cols, operands.a.len());
    let parallel = operands.x.rows * operands.a.len() >= parallel::SCAN;
    let y = Columns::new(y, d_inner, d_inner, BLOCK);
    let state = Columns::new(state, stride, stride, BLOCK * d_state);
    for_each([y, state], parallel, |[mut y, mut state]| {
        with_simd!(isa, s => block(s, operands, batch, &mut state, &mut y));
    });
}

#[inline(always)]
fn block<S: Simd>(s: S, o: &Operands<'_>, batch: &Batch, state: &mut Block<'_>, y: &mut Block<'_>) {
    let (cols, d_state) = (y.cols(), o.b.cols);
    let (a, _) = o.a[state.cols()].as_chunks::<PAD>();
    let mut first = 0;
    for run in batch.runs() {
        let (states, _) = state.row(run.slot).as_chunks_mut::<PAD>();
        for t in first..first + run.len {
            if t + ROWS_AHEAD < first + run.len {
                for operand in [&o.x, &o.dt, &o.z] {
                    prefetch_row(&operand.row(t + ROWS_AHEAD)[cols.clone()]);
                }
            }
            let y = y.row(t);
            for c in (0..cols.len()).step_by(S::LANES) {
                let load = |row: &[f32]| s.load_partial(&row[cols.clone()][c..]);
                let x = load(o.x.row(t));
                let dt = softplus(s, s.add(load(o.dt.row(t)), load(o.dt_bias)));
                let dt_x = s.mul(dt, x);
                // exp(dt A) as a power of two.
                let dt = s.mul(dt, s.splat(std::f32::consts::LOG2_E));
                let mut sum = s.mul(load(o.d), x);
                // Where the states of these channels are. Past the last channel they are zero, and stay so.
                let (group, lane) = (c / PAD * d_state..(c / PAD + 1) * d_state, c % PAD);
                let of_each = a[group.clone()].iter().zip(&mut states[group]);
                for ((a, h), (b, c)) in of_each.zip(o.b.row(t).iter().zip(o.c.row(t))) {
                    let (a, h) = (&a[lane..], &mut h[lane..]);
                    let decay = exp2(s, s.mul(dt, s.load(a)));
                    let new = s.fma(decay, s.load(h), s.mul(dt_x, s.splat(*b)));
                    sum = s.fma(new, s.splat(*c), sum);
                    s.store(new, h);
                }
                s.store_partial(s.mul(sum, silu(s, load(o.z.row(t)))), &mut y[c..]);
            }
        }
        first += run.len;
    }
}
