//! The selective scan, vectors across channels.

use jamba_core::Batch;

use crate::columns::{Block, Columns, for_each, parallel};
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
    // The states of LANES channels stay in registers where there are 16, the usual number.
    if o.b.cols == 16 {
        states::<S, 16>(s, o, batch, state, y);
    } else {
        states::<S, 1>(s, o, batch, state, y);
    }
}

/// All channels of a block, N states of each at a time.
#[inline(always)]
fn states<S: Simd, const N: usize>(
    s: S,
    o: &Operands<'_>,
    batch: &Batch,
    state: &mut Block<'_>,
    y: &mut Block<'_>,
) {
    let cols = y.cols();
    let d_state = o.b.cols;
    let first_state = state.cols().start;
    let mut first = 0;
    for run in batch.runs() {
        let states = state.row(run.slot);
        for c in (0..cols.len()).step_by(S::LANES) {
            let width = S::LANES.min(cols.len() - c);
            let at = cols.start + c..cols.start + c + width;
            let load = |row: &[f32]| {
                if width == S::LANES { s.load(row) } else { s.load_partial(row) }
            };
            let (d, dt_bias) = (load(&o.d[at.clone()]), load(&o.dt_bias[at.clone()]));
            // State number n of these channels, counted from the first of the block.
            let of = |n: usize| (c / PAD * d_state + n) * PAD + c % PAD;
            if run.len == 1 {
                // A state is read and written once: it needs no register of its own.
                let x = load(&o.x.row(first)[at.clone()]);
                let dt = softplus(s, s.add(load(&o.dt.row(first)[at.clone()]), dt_bias));
                let dt_x = s.mul(dt, x);
                let dt = s.mul(dt, s.splat(std::f32::consts::LOG2_E));
                let mut sum = s.mul(d, x);
                for (n, (b, c)) in o.b.row(first).iter().zip(o.c.row(first)).enumerate() {
                    let decay = exp2(s, s.mul(dt, s.load(&o.a[first_state + of(n)..])));
                    let state = &mut states[of(n)..];
                    let h = s.fma(decay, s.load(state), s.mul(dt_x, s.splat(*b)));
                    sum = s.fma(h, s.splat(*c), sum);
                    s.store(h, state);
                }
                sum = s.mul(sum, silu(s, load(&o.z.row(first)[at.clone()])));
                let out = &mut y.row(first)[c..c + width];
                if width == S::LANES {
                    s.store(sum, out)
                } else {
                    s.store_partial(sum, out)
                }
                continue;
            }
            for n0 in (0..d_state).step_by(N) {
                let mut a = [s.splat(0.0); N];
                let mut h = [s.splat(0.0); N];
                for n in 0..N {
                    a[n] = s.load(&o.a[first_state + of(n0 + n)..]);
                    h[n] = s.load(&states[of(n0 + n)..]);
                }
                for t in first..first + run.len {
                    let x = load(&o.x.row(t)[at.clone()]);
                    let dt = softplus(s, s.add(load(&o.dt.row(t)[at.clone()]), dt_bias));
                    let dt_x = s.mul(dt, x);
                    // exp(dt A) as a power of two.
                    let dt = s.mul(dt, s.splat(std::f32::consts::LOG2_E));
                    let (b_row, c_row) = (&o.b.row(t)[n0..n0 + N], &o.c.row(t)[n0..n0 + N]);
                    let out = &mut y.row(t)[c..c + width];
                    let mut sum = if n0 == 0 { s.mul(d, x) } else { load(out) };
                    for (((h, a), b), c) in h.iter_mut().zip(&a).zip(b_row).zip(c_row) {
                        let decay = exp2(s, s.mul(dt, *a));
                        *h = s.fma(decay, *h, s.mul(dt_x, s.splat(*b)));
                        sum = s.fma(*h, s.splat(*c), sum);
                    }
                    if n0 + N == d_state {
                        sum = s.mul(sum, silu(s, load(&o.z.row(t)[at.clone()])));
                    }
                    if width == S::LANES { s.store(sum, out) } else { s.store_partial(sum, out) }
                }
                // Past the last channel they are zero, and stay so.
                for (n, h) in h.into_iter().enumerate() {
                    s.store(h, &mut states[of(n0 + n)..]);
                }
            }
        }
        first += run.len;
    }
}
