//! Sums and products element by element.

use crate::simd::{Isa, Simd, silu, with_simd};

/// `x += y`.
pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `out (rows, n) = silu(gate) * up` where `gate_up (rows, 2n) = [gate | up]`.
pub(crate) fn silu_mul(isa: Isa, gate_up: &[f32], n: usize, out: &mut [f32]) {
    with_simd!(isa, s => {
        for (gate_up, out) in gate_up.chunks_exact(2 * n).zip(out.chunks_exact_mut(n)) {
            let (gate, up) = gate_up.split_at(n);
            silu_mul_row(s, gate, up, out);
        }
    });
}

#[inline(always)]
fn silu_mul_row<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let lanes = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(out.chunks_mut(S::LANES));
    for ((gate, up), out) in lanes {
        if out.len() == S::LANES {
            s.store(s.mul(silu(s, s.load(gate)), s.load(up)), out);
        } else {
            s.store_partial(s.mul(silu(s, s.load_partial(gate)), s.load_partial(up)), out);
        }
    }
}
