//! Steps of many tokens in bf16 mode: what goes from one operator of a block to the next is
//! rounded to bf16 where it is written, instead of where a product reads it. The residual stream,
//! sums, softmax and states stay f32.
//!
//! The blocks are those of [`compose`]; what a block adds to the stream is added by the norm that
//! comes next.

use jamba_core::backend::{Backend, Scratch};
use jamba_core::compose;
use jamba_core::shape::Shaped;
use jamba_core::weights::{Attention, FeedForward, Mamba, Mixer, Mlp, Moe, Weights};
use jamba_core::{Config, Result};

use crate::backend::CudaBackend;
use crate::device::may_load;
use crate::ops::grouped::{Grouped, Groups, Matrices};
use crate::ops::linear::Operand;
use crate::ops::moe::Tokens;
use crate::ops::norm::{Addend, PROMPT_COLS};
use crate::ops::scan;
use crate::ops::workspace::{Workspace, Workspaces};
use crate::options::Precision;
use crate::state::State;
use crate::tensor::{Tensor, View};
use crate::weight::{Weight, padded};

/// Tokens from which on a step is bound by what goes between its operators as much as by the weights
/// that it reads, and its rows fill the tiles of `grouped.cu`. Fewer, single tokens of other
/// sequences among them, keep f32.
const PROMPT_TOKENS: usize = 128;

/// Whether the staged tokens are a prompt of sizes that the kernels for bf16 are made for.
fn is_prompt(b: &CudaBackend, config: &Config, state: &State) -> bool {
    let (inner, n) = (config.d_inner(), config.mamba_d_state);
    let eighths = [config.hidden_size, config.intermediate_size, inner, config.q_width()];
    b.precision() == Precision::Bf16
        && state.batch.tokens >= PROMPT_TOKENS
        && state.batch.longest > 1
        && eighths.iter().all(|size| size.is_multiple_of(8))
        && [config.mamba_dt_rank, n].iter().all(|size| size.is_multiple_of(4))
        && state.kernels.conv1d.as_ref().is_none_or(|conv| conv.rounds())
}

/// Whether [`mamba`] is for this mixer of these tokens.
pub(crate) fn is_for_mamba(
    b: &CudaBackend,
    config: &Config,
    w: &Mamba<Weight>,
    state: &State,
) -> bool {
    is_prompt(b, config, state) && w.in_proj_bias.is_none() && w.out_proj_bias.is_none()
}

/// Whether [`forward`] is for this step.
pub(crate) fn is_for(b: &CudaBackend, config: &Config, w: &Weights<Weight>, state: &State) -> bool {
    let mixer_fits = |mixer: &Mixer<Weight>| match mixer {
        Mixer::Mamba(w) => is_for_mamba(b, config, w, state),
        Mixer::Attention(_) => is_prompt(b, config, state),
    };
    let is_any = !w.layers.is_empty() && config.hidden_size <= PROMPT_COLS;
    is_any && w.layers.iter().all(|layer| mixer_fits(&layer.mixer))
}

/// The step as [`compose::forward`] does it, rounded.
pub(crate) fn forward(
    b: &CudaBackend,
    config: &Config,
    w: &Weights<Weight>,
    s: &mut Scratch<Tensor>,
    state: &mut State,
) -> Result<()> {
    let norm = |s: &mut Scratch<Tensor>, addend, weight| {
        let eps = config.rms_norm_eps;
        b.norm.rounded(&b.device, &mut s.hidden, addend, (weight, eps), &s.normed)
    };
    b.embed(&w.embed_tokens, state, &mut s.hidden)?;
    let loading = may_load();
    // Held until all kernels that use them are on the stream.
    let mut workspaces = b.workspaces();
    let mut addend = Addend::None;
    for (index, layer) in w.layers.iter().enumerate() {
        let x = norm(s, addend, &layer.input_layernorm)?;
        addend = match &layer.mixer {
            Mixer::Mamba(w) => mamba(b, &mut workspaces, config, w, index, x, s, state, false)?,
            Mixer::Attention(w) => attention(b, &mut workspaces, w, index, x, s, state)?,
        };
        let x = norm(s, addend, &layer.pre_ff_layernorm)?;
        let is_last = index + 1 == w.layers.len();
        addend = match &layer.feed_forward {
            FeedForward::Mlp(w) => mlp(b, &mut workspaces, w, x, s, is_last)?,
            FeedForward::Moe(w) => moe(b, &mut workspaces, config, w, x, s)?,
        };
    }
    // The head takes both itself.
    drop((workspaces, loading));
    // No norm of all rows comes after the last block, which therefore is in f32.
    b.elementwise.add_assign(&b.device, &mut s.hidden, &s.block_out)?;
    compose::head(b, config, w, s, state)
}

/// `out = x weight^T`, rounded to bf16, or in f32 where `wide`.
fn project(
    b: &CudaBackend,
    dense: &mut Workspace,
    x: Operand,
    weight: &Weight,
    out: &mut Tensor,
    wide: bool,
) -> Result<Addend> {
    if !wide {
        return Ok(Addend::Bf16(b.linear.rounded(&b.device, x, weight, dense, out)?.ptr));
    }
    out.resize("linear", x.rows)?;
    b.linear.product(&b.device, x, weight, None, dense, out)?;
    Ok(Addend::F32(out.ptr()))
}

/// The Mamba mixer of normed tokens, to `block_out`.
pub(crate) fn mamba(
    b: &CudaBackend,
    workspaces: &mut Workspaces,
    config: &Config,
    w: &Mamba<Weight>,
    layer: usize,
    x: Operand,
    s: &mut Scratch<Tensor>,
    state: &mut State,
    wide: bool,
) -> Result<Addend> {
    let (d_inner, d_state, dt_rank) =
        (config.d_inner(), config.mamba_d_state, config.mamba_dt_rank);
    let xz = b.linear.rounded(&b.device, x, &w.in_proj, &mut workspaces.dense, &s.xz)?;
    let conv_out = s.conv_out.rounded("causal_conv1d", x.rows)?;
    let (batch, kernels) = (&state.batch, &state.kernels);
    if let Some(conv) = &kernels.conv1d {
        let parameters = (&w.conv1d, w.conv1d_bias.as_ref());
        conv.rounded(&b.device, xz, parameters, batch, state.conv(layer)?, conv_out)?;
    }

    s.x_dbl.resize("linear", x.rows)?;
    b.linear.product(&b.device, conv_out, &w.x_proj, None, &mut workspaces.dense, &mut s.x_dbl)?;
    let weights = [&w.dt_layernorm, &w.b_layernorm, &w.c_layernorm];
    let ldt = dt_rank.next_multiple_of(8);
    let dt = workspaces.cast.reserve(&b.device, 2 * x.rows * ldt)?;
    let dt = (dt, ldt as u32);
    let dt = b.norm.dt_b_c_rounded(&b.device, &mut s.x_dbl, weights, config.rms_norm_eps, dt)?;
    let dt = b.linear.rounded(&b.device, dt, &w.dt_proj, &mut workspaces.dense, &s.dt)?;

    let rounded = |of: Operand, first: usize| View {
        ptr: of.ptr + 2 * first as u64,
        rows: of.rows,
        cols: d_inner,
        ld: of.ld,
    };
    let states = |first: usize| View {
        ptr: s.x_dbl.ptr() + 4 * first as u64,
        rows: x.rows,
        cols: d_state,
        ld: s.x_dbl.cols() as u32,
    };
    let operands = scan::Operands {
        x: rounded(conv_out, 0),
        dt: rounded(dt, 0),
        a: &w.a,
        b: states(dt_rank),
        c: states(dt_rank + d_state),
        d: &w.d,
        z: rounded(xz, d_inner),
        dt_bias: &w.dt_bias,
    };
    let y = s.y.rounded("selective_scan", x.rows)?;
    if let Some(scan) = &kernels.scan {
        scan.rounded(&b.device, &operands, batch, state.ssm(layer)?, y.ptr)?;
    }
    project(b, &mut workspaces.dense, y, &w.out_proj, &mut s.block_out, wide)
}

/// Attention of normed tokens, to `block_out`. Queries, keys and values are rounded by the kernels
/// that take them, and the context by the one that gives it to a product.
fn attention(
    b: &CudaBackend,
    workspaces: &mut Workspaces,
    w: &Attention<Weight>,
    layer: usize,
    x: Operand,
    s: &mut Scratch<Tensor>,
    state: &mut State,
) -> Result<Addend> {
    s.qkv.resize("linear", x.rows)?;
    b.linear.product(&b.device, x, &w.qkv_proj, None, &mut workspaces.dense, &mut s.qkv)?;
    b.attend(&s.qkv, layer, state, &mut workspaces.parts, &mut s.context)?;
    let context = View::from(&compose::all(b, &s.context));
    let context = b.linear.cast(&b.device, context, &mut workspaces.cast)?;
    project(b, &mut workspaces.dense, context, &w.o_proj, &mut s.block_out, false)
}

/// The dense feed-forward of normed tokens, to `block_out`.
pub(crate) fn mlp(
    b: &CudaBackend,
    workspaces: &mut Workspaces,
    w: &Mlp<Weight>,
    x: Operand,
    s: &mut Scratch<Tensor>,
    wide: bool,
) -> Result<Addend> {
    let [inter, k] = [s.act.cols(), w.gate_up_proj.shape()[1]];
    let act = match &b.grouped {
        Some(grouped) if x.rows >= PROMPT_TOKENS && Grouped::fits(inter) => {
            let act = s.act.rounded("mlp", x.rows)?;
            let (gate_up, dense) = (&w.gate_up_proj, &mut workspaces.dense);
            b.linear.per_expert(&b.device, (gate_up, 1), dense, |_, _, ptr| {
                let matrix = Matrices { ptr, ld: padded(k, b.precision()) as u32 };
                let out = (act.ptr, inter);
                // SAFETY: x has k columns, the matrix 2 inter rows of as many, and act room for
                // more than the rows of x; tensors, workspaces and weights are aligned.
                #[allow(unsafe_code, reason = "the operands are checked here")]
                unsafe { grouped.swiglu(&b.device, (x, k), matrix, Groups::One, out) }?;
                Ok(())
            })?;
            act
        }
        _ => {
            s.gate_up.resize("linear", x.rows)?;
            b.linear.product(
                &b.device,
                x,
                &w.gate_up_proj,
                None,
                &mut workspaces.dense,
                &mut s.gate_up,
            )?;
            b.elementwise.silu_mul_bf16(&b.device, &s.gate_up, &mut workspaces.cast)?
        }
    };
    project(b, &mut workspaces.dense, act, &w.down_proj, &mut s.block_out, wide)
}

/// The routed feed-forward of normed tokens, to `block_out`.
fn moe(
    b: &CudaBackend,
    workspaces: &mut Workspaces,
    config: &Config,
    w: &Moe<Weight>,
    x: Operand,
    s: &mut Scratch<Tensor>,
) -> Result<Addend> {
    s.router_logits.resize("linear", x.rows)?;
    b.linear.product(&b.device, x, &w.router, None, &mut workspaces.dense, &mut s.router_logits)?;
    s.block_out.resize("moe_experts", x.rows)?;
    let (top_k, inter) = (config.num_experts_per_tok, config.intermediate_size);
    let shared = (&b.linear, b.grouped.as_ref(), workspaces);
    let tokens = (Tokens::Rounded(x), &s.router_logits);
    b.experts.run(&b.device, tokens, w, (top_k, inter), shared, &mut s.block_out)?;
    Ok(Addend::F32(s.block_out.ptr()))
}
