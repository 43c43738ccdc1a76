//! The model, written once, in operators. Each function is the default of the [`Backend`]
//! method of its name, and what an override of it is tested against.

use crate::backend::{Backend, CausalConv1d, Cols, Scratch, SelectiveScan};
use crate::config::Config;
use crate::error::Result;
use crate::trace::Activation;
use crate::weights::{Attention, FeedForward, Layer, Mamba, Mixer, Mlp, Moe, Weights};

/// All columns of a tensor.
pub fn all<'a, B: Backend>(b: &B, tensor: &'a B::Tensor) -> Cols<'a, B::Tensor> {
    Cols { tensor, cols: 0..b.shape(tensor)[1] }
}

fn cols<T>(tensor: &T, cols: std::ops::Range<usize>) -> Cols<'_, T> {
    Cols { tensor, cols }
}

/// Default of [`Backend::forward`].
pub fn forward<B: Backend>(
    b: &B,
    config: &Config,
    w: &Weights<B::Weight>,
    s: &mut Scratch<B::Tensor>,
    state: &mut B::State,
) -> Result<()> {
    b.embed(&w.embed_tokens, state, &mut s.hidden)?;
    b.observe(Activation::model("embed"), all(b, &s.hidden))?;
    for (index, layer) in w.layers.iter().enumerate() {
        self::layer(b, config, layer, index, s, state)?;
    }
    head(b, config, w, s, state)
}

/// One decoder layer, `hidden -> hidden`: the unit of agreement between backends.
pub fn layer<B: Backend>(
    b: &B,
    config: &Config,
    w: &Layer<B::Weight>,
    index: usize,
    s: &mut Scratch<B::Tensor>,
    state: &mut B::State,
) -> Result<()> {
    let at = |name| Activation::layer(index, name);
    let eps = config.rms_norm_eps;

    b.rms_norm(&s.hidden, &w.input_layernorm, eps, &mut s.normed)?;
    b.observe(at("input_norm"), all(b, &s.normed))?;
    match &w.mixer {
        Mixer::Mamba(w) => {
            b.mamba_mixer(config, w, index, s, state)?;
            b.observe(at("mamba.out"), all(b, &s.block_out))?;
        }
        Mixer::Attention(w) => {
            b.attention_block(config, w, index, s, state)?;
            b.observe(at("attn.out"), all(b, &s.block_out))?;
        }
    }
    b.add_rms_norm(&w.pre_ff_layernorm, eps, s)?;
    b.observe(at("ff_norm"), all(b, &s.normed))?;
    match &w.feed_forward {
        FeedForward::Mlp(w) => b.mlp(w, s)?,
        FeedForward::Moe(w) => b.moe_ffn(config, w, index, s)?,
    }
    b.observe(at("ff"), all(b, &s.block_out))?;
    b.add_assign(&mut s.hidden, &s.block_out)?;
    b.observe(at("out"), all(b, &s.hidden))
}

/// Final norm and output head of the rows whose logits are asked for, `hidden -> logits`.
pub fn head<B: Backend>(
    b: &B,
    config: &Config,
    w: &Weights<B::Weight>,
    s: &mut Scratch<B::Tensor>,
    state: &mut B::State,
) -> Result<()> {
    b.output_rows(&s.hidden, state, &mut s.output_hidden)?;
    b.rms_norm(&s.output_hidden, &w.final_layernorm, config.rms_norm_eps, &mut s.output_normed)?;
    b.observe(Activation::model("final_norm"), all(b, &s.output_normed))?;
    b.linear(all(b, &s.output_normed), w.head(), None, &mut s.logits)?;
    b.observe(Activation::model("logits"), all(b, &s.logits))
}

/// Default of [`Backend::add_rms_norm`].
pub fn add_rms_norm<B: Backend>(
    b: &B,
    w: &B::Weight,
    eps: f32,
    s: &mut Scratch<B::Tensor>,
) -> Result<()> {
    b.add_assign(&mut s.hidden, &s.block_out)?;
    b.rms_norm(&s.hidden, w, eps, &mut s.normed)
}

/// Default of [`Backend::mamba_mixer`] (arXiv 2312.00752, Algorithm 2; the norms on dt, B and C
/// are Jamba's, arXiv 2403.19887, section 6.4).
pub fn mamba_mixer<B: Backend>(
    b: &B,
    config: &Config,
    w: &Mamba<B::Weight>,
    layer: usize,
    s: &mut Scratch<B::Tensor>,
    state: &mut B::State,
) -> Result<()> {
    let at = |name| Activation::layer(layer, name);
    let (d_inner, d_state, dt_rank) =
        (config.d_inner(), config.mamba_d_state, config.mamba_dt_rank);
    let eps = config.rms_norm_eps;
    let dt_cols = 0..dt_rank;
    let b_cols = dt_rank..dt_rank + d_state;
    let c_cols = dt_rank + d_state..dt_rank + 2 * d_state;

    b.linear(all(b, &s.normed), &w.in_proj, w.in_proj_bias.as_ref(), &mut s.xz)?;
    b.observe(at("mamba.in_proj"), all(b, &s.xz))?;
    let conv = CausalConv1d {
        x: cols(&s.xz, 0..d_inner),
        weight: &w.conv1d,
        bias: w.conv1d_bias.as_ref(),
    };
    b.causal_conv1d(conv, layer, state, &mut s.conv_out)?;
    b.observe(at("mamba.conv"), all(b, &s.conv_out))?;

    b.linear(all(b, &s.conv_out), &w.x_proj, None, &mut s.x_dbl)?;
    b.rms_norm_cols(&mut s.x_dbl, dt_cols.clone(), &w.dt_layernorm, eps)?;
    b.rms_norm_cols(&mut s.x_dbl, b_cols.clone(), &w.b_layernorm, eps)?;
    b.rms_norm_cols(&mut s.x_dbl, c_cols.clone(), &w.c_layernorm, eps)?;
    b.observe(at("mamba.dt"), cols(&s.x_dbl, dt_cols.clone()))?;
    b.observe(at("mamba.B"), cols(&s.x_dbl, b_cols.clone()))?;
    b.observe(at("mamba.C"), cols(&s.x_dbl, c_cols.clone()))?;
    b.linear(cols(&s.x_dbl, dt_cols), &w.dt_proj, None, &mut s.dt)?;

    let scan = SelectiveScan {
        x: cols(&s.conv_out, 0..d_inner),
        dt: cols(&s.dt, 0..d_inner),
        a: &w.a,
        b: cols(&s.x_dbl, b_cols),
        c: cols(&s.x_dbl, c_cols),
        d: &w.d,
        z: cols(&s.xz, d_inner..2 * d_inner),
        dt_bias: &w.dt_bias,
    };
    b.selective_scan(scan, layer, state, &mut s.y)?;
    b.observe(at("mamba.scan"), all(b, &s.y))?;
    b.linear(all(b, &s.y), &w.out_proj, w.out_proj_bias.as_ref(), &mut s.block_out)
}

/// Default of [`Backend::attention_block`].
pub fn attention_block<B: Backend>(
    b: &B,
    config: &Config,
    w: &Attention<B::Weight>,
    layer: usize,
    s: &mut Scratch<B::Tensor>,
    state: &mut B::State,
) -> Result<()> {
    let at = |name| Activation::layer(layer, name);
    let (q, kv) = (config.q_width(), config.kv_width());

    b.linear(all(b, &s.normed), &w.qkv_proj, None, &mut s.qkv)?;
    b.observe(at("attn.q"), cols(&s.qkv, 0..q))?;
    b.observe(at("attn.k"), cols(&s.qkv, q..q + kv))?;
    b.observe(at("attn.v"), cols(&s.qkv, q + kv..q + 2 * kv))?;
    b.attention(&s.qkv, layer, state, &mut s.context)?;
    b.observe(at("attn.context"), all(b, &s.context))?;
    b.linear(all(b, &s.context), &w.o_proj, None, &mut s.block_out)
}

/// Default of [`Backend::mlp`] (SwiGLU).
pub fn mlp<B: Backend>(b: &B, w: &Mlp<B::Weight>, s: &mut Scratch<B::Tensor>) -> Result<()> {
    b.linear(all(b, &s.normed), &w.gate_up_proj, None, &mut s.gate_up)?;
    b.silu_mul(&s.gate_up, &mut s.act)?;
    b.linear(all(b, &s.act), &w.down_proj, None, &mut s.block_out)
}

/// Default of [`Backend::moe_ffn`].
pub fn moe_ffn<B: Backend>(
    b: &B,
    config: &Config,
    w: &Moe<B::Weight>,
    layer: usize,
    s: &mut Scratch<B::Tensor>,
) -> Result<()> {
    b.linear(all(b, &s.normed), &w.router, None, &mut s.router_logits)?;
    b.observe(Activation::layer(layer, "moe.router_logits"), all(b, &s.router_logits))?;
    b.moe_experts(&s.normed, &s.router_logits, w, config.num_experts_per_tok, &mut s.block_out)
}
