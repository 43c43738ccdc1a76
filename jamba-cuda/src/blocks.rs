//! Fused blocks. Each computes the same bits as the composition of operators in
//! [`compose`](jamba_core::compose), but for the mixer and the MLP of [prompts](crate::prompt) and
//! where sums are added in another order.

use jamba_core::backend::{Backend, CausalConv1d, Cols, Scratch, SelectiveScan};
use jamba_core::compose::{self, all};
use jamba_core::shape;
use jamba_core::weights::{Mamba, Mlp};
use jamba_core::{Config, Result};

use crate::backend::CudaBackend;
use crate::device::may_load;
use crate::ops::linear::Operand;
use crate::ops::packed::{Input, Norm};
use crate::ops::scan;
use crate::ops::workspace::Workspaces;
use crate::prompt;
use crate::state::State;
use crate::tensor::{Tensor, View};
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

/// What a block begins with.
#[derive(Clone, Copy)]
pub(crate) enum Begin<'a> {
    /// `normed` is there.
    Normed,
    /// It is the norm of `hidden`, to which `block_out` is added first, if it is not the first of all.
    Norm { weight: &'a Weight, eps: f32, adds: bool },
}

impl Begin<'_> {
    /// Sees to it that `normed` is there.
    pub(crate) fn norm(self, b: &CudaBackend, s: &mut Scratch<Tensor>) -> Result<()> {
        match self {
            Self::Normed => Ok(()),
            Self::Norm { weight, eps, adds: true } => add_rms_norm(b, weight, eps, s),
            Self::Norm { weight, eps, adds: false } => {
                b.rms_norm(&s.hidden, weight, eps, &mut s.normed)
            }
        }
    }

    /// What the first product of the block takes, if it is one that norms on the way. The sum then goes
    /// to the memory of `normed`: [`took`](Self::took) is to be called afterwards.
    fn input(
        self,
        b: &CudaBackend,
        product: &Weight,
        s: &mut Scratch<Tensor>,
    ) -> Result<Option<Input>> {
        let Self::Norm { weight, eps, adds } = self else { return Ok(None) };
        let x = View::from(&all(b, &s.hidden));
        if !(b.linear.packed.takes(x, product) && b.linear.packed.norms(x)) {
            return Ok(None);
        }
        if adds {
            shape::add_assign(&s.hidden, &s.block_out)?;
        }
        shape::rms_norm(&s.hidden, weight, &s.normed)?;
        s.normed.resize("rms_norm", x.rows)?;
        let addend = adds.then(|| [s.block_out.ptr(), s.normed.ptr()]);
        let norm = Some(Norm { weight: weight.vector()?, eps, addend });
        Ok(Some(Input { x, is_next: adds, norm }))
    }

    /// Makes the sum `hidden`.
    fn took(self, s: &mut Scratch<Tensor>) {
        if let Self::Norm { adds: true, .. } = self {
            std::mem::swap(&mut s.hidden, &mut s.normed);
        }
    }
}

/// The MLP, its activations in the form in which the product takes them that reads them.
pub(crate) fn mlp(
    b: &CudaBackend,
    w: &Mlp<Weight>,
    s: &mut Scratch<Tensor>,
    begin: Begin<'_>,
) -> Result<()> {
    if packed_mlp(b, w, s, begin)? {
        return Ok(());
    }
    begin.norm(b, s)?;
    let rows = s.normed.rows();
    let is_few = b.linear.few.takes_rows(rows, &w.gate_up_proj);
    if rows == 0 || !(is_few || b.linear.rounds(rows, &w.gate_up_proj)) {
        return compose::mlp(b, w, s);
    }
    let normed = all(b, &s.normed);
    shape::linear(&normed, &w.gate_up_proj, None, &s.gate_up)?;
    s.gate_up.resize("mlp", rows)?;
    shape::silu_mul(&s.gate_up, &s.act)?;
    s.act.resize("mlp", rows)?;
    shape::linear(&all(b, &s.act), &w.down_proj, None, &s.block_out)?;
    let _loading = may_load();
    let workspaces = &mut *b.workspaces();
    if is_few {
        s.block_out.resize("mlp", rows)?;
        let (x, inter) = (View::from(&normed), s.act.cols());
        let ld = inter.next_multiple_of(8);
        let ptr = workspaces.act.reserve(&b.device, 2 * rows * ld)?;
        let x = b.linear.cast(&b.device, x, &mut workspaces.cast)?;
        let act = Operand { ptr, rows, ld: ld as u32 };
        b.linear.few.gated(&b.device, x, &w.gate_up_proj, act)?;
        return b.linear.few.linear(&b.device, act, &w.down_proj, None, s.block_out.ptr());
    }
    let x = rounded(b, s, workspaces)?;
    prompt::mlp(b, workspaces, w, x, s, true).map(drop)
}

/// The MLP of few rows of quantised weights; says whether it is for these.
fn packed_mlp(
    b: &CudaBackend,
    w: &Mlp<Weight>,
    s: &mut Scratch<Tensor>,
    begin: Begin<'_>,
) -> Result<bool> {
    let x = match begin {
        Begin::Normed => View::from(&all(b, &s.normed)),
        Begin::Norm { .. } => View::from(&all(b, &s.hidden)),
    };
    let (rows, inter) = (x.rows, s.act.cols());
    let ld = inter.next_multiple_of(8);
    // Its memory is taken below.
    let act = View { ptr: 0, rows, cols: inter, ld: ld as u32 };
    let packed = &b.linear.packed;
    if !(packed.takes(x, &w.gate_up_proj) && packed.takes(act, &w.down_proj)) {
        return Ok(false);
    }
    let input = match begin.input(b, &w.gate_up_proj, s)? {
        Some(input) => input,
        None => {
            begin.norm(b, s)?;
            View::from(&all(b, &s.normed)).into()
        }
    };
    shape::linear(&all(b, &s.normed), &w.gate_up_proj, None, &s.gate_up)?;
    s.gate_up.resize("mlp", rows)?;
    shape::silu_mul(&s.gate_up, &s.act)?;
    s.act.resize("mlp", rows)?;
    shape::linear(&all(b, &s.act), &w.down_proj, None, &s.block_out)?;
    let _loading = may_load();
    let workspaces = &mut *b.workspaces();
    let ptr = workspaces.act.reserve(&b.device, 4 * rows * ld)?;
    let act = View { ptr, ..act };
    packed.gated(&b.device, input, &w.gate_up_proj, act)?;
    if input.norm.is_some() {
        begin.took(s);
    }
    s.block_out.resize("mlp", rows)?;
    let act = Input { is_next: true, ..act.into() };
    packed.linear(&b.device, act, &w.down_proj, None, s.block_out.ptr())?;
    Ok(true)
}

/// The tokens of a block as an operand of a product.
fn rounded(b: &CudaBackend, s: &Scratch<Tensor>, workspaces: &mut Workspaces) -> Result<Operand> {
    b.linear.cast(&b.device, View::from(&all(b, &s.normed)), &mut workspaces.cast)
}

/// The mixer with the norms of dt, B and C in one kernel, and of single tokens all between x_proj
/// and out_proj.
pub(crate) fn mamba_mixer(
    b: &CudaBackend,
    config: &Config,
    w: &Mamba<Weight>,
    layer: usize,
    s: &mut Scratch<Tensor>,
    state: &mut State,
    begin: Begin<'_>,
) -> Result<()> {
    let (d_inner, d_state, dt_rank) =
        (config.d_inner(), config.mamba_d_state, config.mamba_dt_rank);
    let b_cols = dt_rank..dt_rank + d_state;
    let c_cols = dt_rank + d_state..dt_rank + 2 * d_state;

    if prompt::is_for_mamba(b, config, w, state) {
        begin.norm(b, s)?;
        shape::linear(&all(b, &s.normed), &w.in_proj, None, &s.xz)?;
        let _loading = may_load();
        let workspaces = &mut *b.workspaces();
        let x = rounded(b, s, workspaces)?;
        return prompt::mamba(b, workspaces, config, w, layer, x, s, state, true).map(drop);
    }
    if let Some(input) = begin.input(b, &w.in_proj, s)? {
        let bias = w.in_proj_bias.as_ref();
        shape::linear(&all(b, &s.normed), &w.in_proj, bias, &s.xz)?;
        s.xz.resize("linear", input.x.rows)?;
        b.linear.packed.linear(&b.device, input, &w.in_proj, bias, s.xz.ptr())?;
        begin.took(s);
    } else {
        begin.norm(b, s)?;
        b.linear(all(b, &s.normed), &w.in_proj, w.in_proj_bias.as_ref(), &mut s.xz)?;
    }
    let conv = CausalConv1d {
        x: Cols { tensor: &s.xz, cols: 0..d_inner },
        weight: &w.conv1d,
        bias: w.conv1d_bias.as_ref(),
    };
    b.causal_conv1d(conv, layer, state, &mut s.conv_out)?;

    b.linear(all(b, &s.conv_out), &w.x_proj, None, &mut s.x_dbl)?;
    if state.batch.is_decode() && dt_scan(b, config, w, layer, s, state)? {
        return b.linear(all(b, &s.y), &w.out_proj, w.out_proj_bias.as_ref(), &mut s.block_out);
    }
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

/// Of one token in each run: the norms of dt, B and C, dt_proj and the scan in one kernel,
/// `x_dbl -> y`. Says whether there is one for these sizes.
fn dt_scan(
    b: &CudaBackend,
    config: &Config,
    w: &Mamba<Weight>,
    layer: usize,
    s: &mut Scratch<Tensor>,
    state: &State,
) -> Result<bool> {
    let Some(kernels) = state.kernels.scan_step.as_ref().filter(|k| k.has_dt_proj()) else {
        return Ok(false);
    };
    if w.dt_proj.packing().is_some() {
        return Ok(false);
    }
    let (d_inner, d_state, dt_rank) =
        (config.d_inner(), config.mamba_d_state, config.mamba_dt_rank);
    let (b_at, c_at) = (dt_rank, dt_rank + d_state);
    let (dt_cols, b_cols, c_cols) = (0..b_at, b_at..c_at, c_at..c_at + d_state);
    let norms = [&w.dt_layernorm, &w.b_layernorm, &w.c_layernorm];
    for (weight, cols) in norms.into_iter().zip([&dt_cols, &b_cols, &c_cols]) {
        shape::rms_norm_cols(&s.x_dbl, cols, weight)?;
    }
    let dt = Cols { tensor: &s.x_dbl, cols: dt_cols };
    shape::linear(&dt, &w.dt_proj, None, &s.dt)?;
    let args = SelectiveScan {
        x: all(b, &s.conv_out),
        // In the place of what dt_proj would give.
        dt: all(b, &s.conv_out),
        a: &w.a,
        b: Cols { tensor: &s.x_dbl, cols: b_cols },
        c: Cols { tensor: &s.x_dbl, cols: c_cols },
        d: &w.d,
        z: Cols { tensor: &s.xz, cols: d_inner..2 * d_inner },
        dt_bias: &w.dt_bias,
    };
    let (batch, ssm) = (&state.batch, state.ssm(layer)?);
    shape::selective_scan(&args, batch.tokens, [ssm.channels, ssm.per_channel], &s.y)?;
    let operands = scan::Operands { dt: View::from(&dt), ..scan::Operands::from(&args) };
    s.y.resize("dt_scan", batch.tokens)?;
    kernels.dt_scan(&b.device, &operands, (w, config.rms_norm_eps), batch, ssm, &mut s.y)?;
    Ok(true)
}
