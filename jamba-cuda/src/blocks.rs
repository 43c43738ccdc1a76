//! Fused blocks. Each computes the same bits as the composition of operators in
//! [`compose`](jamba_core::compose).

use jamba_core::backend::{Backend, CausalConv1d, Cols, Scratch, SelectiveScan};
use jamba_core::compose::{self, all};
use jamba_core::shape;
use jamba_core::weights::{Mamba, Mlp};
use jamba_core::{Config, Result};

use crate::backend::CudaBackend;
use crate::state::State;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// `hidden += block_out; normed = rms_norm(hidden)` in one kernel.
pub(crate) fn add_rms_norm(
    b: &CudaBackend,
    weight: &Weight,
    eps: f32,
    s: &mut Scratch<Tensor>,
) -> Result<()> {
    shape::add_assign(&s.hidden, &s.block_out)?;
    shape::rms_norm(&s.hidden, weight, &s.normed)?;
    s.normed.resize("add_rms_norm", s.hidden.rows())?;
    b.norm.add_rms_norm(&b.device, &mut s.hidden, &s.block_out, weight, eps, &mut s.normed)
}

/// The MLP with its activations rounded to bf16 as they are computed, where the product that
/// reads them would round them.
pub(crate) fn mlp(b: &CudaBackend, w: &Mlp<Weight>, s: &mut Scratch<Tensor>) -> Result<()> {
    if !b.linear.rounds(s.normed.rows()) {
        return compose::mlp(b, w, s);
    }
    b.linear(all(b, &s.normed), &w.gate_up_proj, None, &mut s.gate_up)?;
    shape::silu_mul(&s.gate_up, &s.act)?;
    s.act.resize("mlp", s.gate_up.rows())?;
    shape::linear(&all(b, &s.act), &w.down_proj, None, &s.block_out)?;
    s.block_out.resize("mlp", s.gate_up.rows())?;
    let cast = &mut b.workspaces().cast;
    let act = b.elementwise.silu_mul_bf16(&b.device, &s.gate_up, cast)?;
    b.linear.product(&b.device, act, &w.down_proj, None, &mut s.block_out)
}

/// The mixer with the norms of dt, B and C in one kernel.
pub(crate) fn mamba_mixer(
    b: &CudaBackend,
    config: &Config,
    w: &Mamba<Weight>,
    layer: usize,
    s: &mut Scratch<Tensor>,
    state: &mut State,
) -> Result<()> {
    let (d_inner, d_state, dt_rank) =
        (config.d_inner(), config.mamba_d_state, config.mamba_dt_rank);
    let b_cols = dt_rank..dt_rank + d_state;
    let c_cols = dt_rank + d_state..dt_rank + 2 * d_state;

    b.linear(all(b, &s.normed), &w.in_proj, w.in_proj_bias.as_ref(), &mut s.xz)?;
    let conv = CausalConv1d {
        x: Cols { tensor: &s.xz, cols: 0..d_inner },
        weight: &w.conv1d,
        bias: w.conv1d_bias.as_ref(),
    };
    b.causal_conv1d(conv, layer, state, &mut s.conv_out)?;

    b.linear(all(b, &s.conv_out), &w.x_proj, None, &mut s.x_dbl)?;
    let weights = [&w.dt_layernorm, &w.b_layernorm, &w.c_layernorm];
    b.norm.dt_b_c_norm(&b.device, &mut s.x_dbl, weights, config.rms_norm_eps)?;
    b.linear(Cols { tensor: &s.x_dbl, cols: 0..dt_rank }, &w.dt_proj, None, &mut s.dt)?;

    let scan = SelectiveScan {
        x: all(b, &s.conv_out),
        dt: all(b, &s.dt),
        a: &w.a,
        b: Cols { tensor: &s.x_dbl, cols: b_cols },
        c: Cols { tensor: &s.x_dbl, cols: c_cols },
        d: &w.d,
        z: Cols { tensor: &s.xz, cols: d_inner..2 * d_inner },
        dt_bias: &w.dt_bias,
    };
    b.selective_scan(scan, layer, state, &mut s.y)?;
    b.linear(all(b, &s.y), &w.out_proj, w.out_proj_bias.as_ref(), &mut s.block_out)
}
