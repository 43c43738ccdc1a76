//! Sums and products element by element.

use crate::columns::{Block, for_each_rows, parallel};
use crate::simd::{Isa, Simd, silu, with_simd};

/// `x += y`.
pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) {
    let parallel = x.len() >= parallel::ELEMENTS;
    for_each_rows(x, 1, parallel::ELEMENTS / 4, parallel, |first, x| {
        x.iter_mut().zip(&y[first..]).for_each(|(x, y)| *x += y);
    });
}

/// `out (rows, n) = silu(gate) * up` where `gate_up (rows, 2n) = [gate | up]`.
pub(crate) fn silu_mul_halves(isa: Isa, gate_up: &[f32], n: usize, out: &mut [f32]) {
    let parallel = out.len() >= parallel::ELEMENTS;
    for_each_rows(out, n, (parallel::ELEMENTS / 4 / n.max(1)).max(1), parallel, |first, out| {
        let gate_up = gate_up[first * 2 * n..].chunks_exact(2 * n);
        with_simd!(isa, s => {
            for (gate_up, out) in gate_up.zip(out.chunks_exact_mut(n)) {
                let (gate, up) = gate_up.split_at(n);
                silu_mul_row(s, gate, up, out);
            }
        });
    });
}

/// `out = silu(gate) * up`, gate and up in rows of as many columns as `out` has.
pub(crate) fn silu_mul(isa: Isa, gate: &[f32], up: &[f32], out: &mut Block<'_>) {
    let n = out.cols().len();
    with_simd!(isa, s => {
        for (row, (gate, up)) in gate.chunks_exact(n).zip(up.chunks_exact(n)).enumerate() {
            silu_mul_row(s, gate, up, out.row(row));
        }
    });
}

#[inline(always)]
fn silu_mul_row<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let lanes = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(out.chunks_mut(S::LANES));
    for ((gate, up), out) in lanes {
        s.store_partial(s.mul(silu(s, s.load_partial(gate)), s.load_partial(up)), out);
    }
}
