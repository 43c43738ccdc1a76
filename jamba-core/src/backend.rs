//! The contract between the model and a device.
//!
//! Three rungs: required *operators* (one per equation), provided *blocks* composed of them, and
//! a provided *step* composed of blocks. A backend may override a provided rung to fuse; the
//! composition stays callable in [`compose`], so that a fused override can always be held to it.

use std::ops::Range;

use crate::batch::Batch;
use crate::compose;
use crate::config::Config;
use crate::error::Result;
use crate::memory;
use crate::quant::WeightFormat;
use crate::sampler::{Choice, Sampled};
use crate::tensor::Param;
use crate::trace::Activation;
use crate::transfer;
use crate::weights::{Attention, Mamba, Mlp, Moe, Weights};

/// Some columns of a row-major tensor: the only stride in the system.
#[derive(Debug)]
pub struct Cols<'a, T> {
    /// Tensor viewed.
    pub tensor: &'a T,
    /// Columns viewed.
    pub cols: Range<usize>,
}

/// Operands of [`Backend::causal_conv1d`].
#[derive(Debug)]
pub struct CausalConv1d<'a, T, W> {
    /// `(tokens, d_inner)`.
    pub x: Cols<'a, T>,
    /// `(d_inner, d_conv)`, oldest tap first.
    pub weight: &'a W,
    /// `(d_inner)`.
    pub bias: Option<&'a W>,
}

/// Operands of [`Backend::selective_scan`].
#[derive(Debug)]
pub struct SelectiveScan<'a, T, W> {
    /// `(tokens, d_inner)`, after convolution and SiLU.
    pub x: Cols<'a, T>,
    /// `(tokens, d_inner)`, before bias and softplus.
    pub dt: Cols<'a, T>,
    /// `(d_inner, d_state)`, `-exp(A_log)`.
    pub a: &'a W,
    /// `(tokens, d_state)`, normed.
    pub b: Cols<'a, T>,
    /// `(tokens, d_state)`, normed.
    pub c: Cols<'a, T>,
    /// `(d_inner)`.
    pub d: &'a W,
    /// `(tokens, d_inner)`, the gate before SiLU.
    pub z: Cols<'a, T>,
    /// `(d_inner)`, added to dt inside the softplus.
    pub dt_bias: &'a W,
}

/// How much a session may hold at most; what a backend allocates for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// State slots, one per sequence.
    pub slots: usize,
    /// Tokens of one sequence.
    pub context: usize,
    /// Tokens of one step, all sequences together.
    pub tokens: usize,
    /// Rows of logits of one step.
    pub outputs: usize,
}

/// What is about to be allocated, all of it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// The parameters of a model, which all its runners share. Those that are kept as they are stored
    /// need no memory of their own where their file is `mapped`.
    Weights {
        /// [`ParamSource::is_mapped`](crate::ParamSource::is_mapped).
        mapped: bool,
    },
    /// Scratch and state of a runner with these limits; the weights are there already.
    Runner(&'a Limits),
}

/// One tensor of the state of one layer and one slot, as [`Backend::read_state`] returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatePart {
    /// `(d_inner, d_conv - 1)`: the latest inputs of the convolution, oldest first.
    Conv,
    /// `(d_inner, d_state)`: h of the scan.
    Ssm,
    /// `(num_kv_heads, positions, head_dim)`.
    Keys,
    /// `(num_kv_heads, positions, head_dim)`.
    Values,
}

/// Activations of one step, allocated once and reused by every layer.
///
/// Each has as many rows as [`Limits`] says; operators set how many of them are in use.
#[derive(Debug)]
pub struct Scratch<T> {
    /// `(tokens, hidden_size)`: residual stream.
    pub hidden: T,
    /// `(tokens, hidden_size)`: input of the current block.
    pub normed: T,
    /// `(tokens, hidden_size)`: output of the current block.
    pub block_out: T,
    /// `(tokens, 2 * d_inner)`: columns `[x | z]`.
    pub xz: T,
    /// `(tokens, d_inner)`.
    pub conv_out: T,
    /// `(tokens, dt_rank + 2 * d_state)`: columns `[dt | B | C]`.
    pub x_dbl: T,
    /// `(tokens, d_inner)`: before bias and softplus.
    pub dt: T,
    /// `(tokens, d_inner)`: gated output of the scan.
    pub y: T,
    /// `(tokens, (num_heads + 2 * num_kv_heads) * head_dim)`: columns `[q | k | v]`.
    pub qkv: T,
    /// `(tokens, num_heads * head_dim)`.
    pub context: T,
    /// `(tokens, num_experts)`.
    pub router_logits: T,
    /// `(tokens, 2 * intermediate_size)`: columns `[gate | up]`.
    pub gate_up: T,
    /// `(tokens, intermediate_size)`.
    pub act: T,
    /// `(outputs, hidden_size)`: rows of the residual stream whose logits are wanted.
    pub output_hidden: T,
    /// `(outputs, hidden_size)`: the same, normed.
    pub output_normed: T,
    /// `(outputs, vocab_size)`.
    pub logits: T,
}

impl<T> Scratch<T> {
    /// Allocates for steps of up to `limits`.
    ///
    /// # Errors
    /// Whatever [`Backend::alloc`] reports.
    pub fn new<B: Backend<Tensor = T>>(
        backend: &B,
        config: &Config,
        limits: &Limits,
    ) -> Result<Self> {
        Scratch::shapes(config, limits).try_map(&mut |[rows, cols]| backend.alloc(rows, cols))
    }

    /// The same of something else.
    pub(crate) fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Scratch<U>> {
        Ok(Scratch {
            hidden: f(self.hidden)?,
            normed: f(self.normed)?,
            block_out: f(self.block_out)?,
            xz: f(self.xz)?,
            conv_out: f(self.conv_out)?,
            x_dbl: f(self.x_dbl)?,
            dt: f(self.dt)?,
            y: f(self.y)?,
            qkv: f(self.qkv)?,
            context: f(self.context)?,
            router_logits: f(self.router_logits)?,
            gate_up: f(self.gate_up)?,
            act: f(self.act)?,
            output_hidden: f(self.output_hidden)?,
            output_normed: f(self.output_normed)?,
            logits: f(self.logits)?,
        })
    }
}

impl Scratch<[usize; 2]> {
    /// Rows, as many as `limits` says, and columns of each.
    pub(crate) fn shapes(config: &Config, limits: &Limits) -> Self {
        let tokens = |cols| [limits.tokens, cols];
        let outputs = |cols| [limits.outputs, cols];
        let (hidden, d_inner) = (config.hidden_size, config.d_inner());
        Self {
            hidden: tokens(hidden),
            normed: tokens(hidden),
            block_out: tokens(hidden),
            xz: tokens(2 * d_inner),
            conv_out: tokens(d_inner),
            x_dbl: tokens(config.mamba_dt_rank + 2 * config.mamba_d_state),
            dt: tokens(d_inner),
            y: tokens(d_inner),
            qkv: tokens(config.q_width() + 2 * config.kv_width()),
            context: tokens(config.q_width()),
            router_logits: tokens(config.num_experts),
            gate_up: tokens(2 * config.intermediate_size),
            act: tokens(config.intermediate_size),
            output_hidden: outputs(hidden),
            output_normed: outputs(hidden),
            logits: outputs(config.vocab_size),
        }
    }
}

/// A device that can run Jamba.
///
/// Operators work on the tokens of the *staged* batch: sequences of different lengths laid end to
/// end, without padding, each continuing from the state in its slot. There is no separate entry
/// for prompts and single tokens. A run of length zero is allowed and changes nothing.
///
/// An operator returns [`Error::Shape`](crate::Error::Shape) for operands that do not fit
/// ([`shape`](crate::shape) tells which do) and then leaves its results and the state as they
/// were. Otherwise it sets the row count of what it writes, and writes all of it.
pub trait Backend: Sized {
    /// Row-major f32 activations of `(rows, columns)` on the device, allocated for a maximum
    /// of rows. (The precision in which a backend keeps them is its own matter.)
    type Tensor: Send;
    /// A parameter in whatever form the backend likes: dense, quantised, packed.
    type Weight: Send + Sync;
    /// Convolution and SSM states, KV cache and the staged batch.
    type State: Send;

    /// Short name for messages: `reference`, `cpu`, `cuda`.
    fn name(&self) -> &'static str;
    /// The format in which [`upload`](Self::upload) keeps the weights; a state made in one is
    /// refused in another.
    ///
    /// Provided: as they are stored.
    fn weight_format(&self) -> WeightFormat {
        WeightFormat::Stored
    }

    // ---- memory ---------------------------------------------------------------------------

    /// Asked before anything of `need` is allocated, so that what does not fit is refused with a
    /// plan of the memory and not in the middle of loading.
    ///
    /// Provided: nothing is refused.
    fn check_memory(&self, config: &Config, need: Need<'_>) -> Result<()> {
        let _ = (config, need);
        Ok(())
    }
    /// Takes one parameter, and keeps it in the [`Layout`](crate::Layout) that
    /// [`weight_format`](Self::weight_format) has for its role. What [`Role`](crate::Role) calls a
    /// vector, conv or A stays f32.
    fn upload(&self, param: Param) -> Result<Self::Weight>;
    /// Allocates activations for up to `rows` rows; none is in use.
    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// Overwrites activations with `src`, row-major, a multiple of the tensor's columns.
    fn write(&self, dst: &mut Self::Tensor, src: &[f32]) -> Result<()>;
    /// Reads the rows in use, row-major.
    fn read(&self, src: Cols<'_, Self::Tensor>) -> Result<Vec<f32>>;
    /// Chooses tokens where the logits are. For each row in use of `logits` there is a choice; the
    /// result is the token that [`Choice::sample`] gives, as far as sums in another order allow;
    /// `None` where there is no choice, and where the host is to choose, or to say why no token can
    /// be chosen.
    ///
    /// Provided: leaves all to the host. Override it where logits are that the host would have to read, or
    /// copy.
    fn choose(
        &self,
        logits: &Self::Tensor,
        choices: &[Option<Choice<'_>>],
    ) -> Result<Vec<Option<Sampled>>> {
        let _ = logits;
        Ok(vec![None; choices.len()])
    }
    /// Rows in use, and columns.
    fn shape(&self, tensor: &Self::Tensor) -> [usize; 2];
    /// Allocates state; every slot is as after [`reset_slot`](Self::reset_slot).
    fn new_state(&self, config: &Config, limits: &Limits) -> Result<Self::State>;
    /// Makes a slot ready for a new sequence: convolution and SSM states become zero.
    fn reset_slot(&self, state: &mut Self::State, slot: usize) -> Result<()>;
    /// Reads a part of the state as f32, in the layout that [`StatePart`] states: of keys and values
    /// these positions; of the others all, of a sequence of `positions.end` tokens.
    fn read_state(
        &self,
        state: &Self::State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>>;
    /// Writes what [`read_state`](Self::read_state) returned; other positions stay.
    fn write_state(
        &self,
        state: &mut Self::State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()>;
    /// Makes slot `to` hold what slot `from` does, a sequence of `positions` tokens.
    ///
    /// Provided: through the host. Override it to copy on the device.
    fn copy_slot(
        &self,
        config: &Config,
        state: &mut Self::State,
        from: usize,
        to: usize,
        positions: usize,
    ) -> Result<()> {
        for (layer, part) in transfer::parts(config) {
            let values = self.read_state(state, layer, part, from, 0..positions)?;
            self.write_state(state, layer, part, to, 0..positions, &values)?;
        }
        Ok(())
    }
    /// Bytes that [`new_state`](Self::new_state) takes for a sequence of `positions` tokens.
    ///
    /// Provided: everything in f32.
    fn sequence_bytes(&self, config: &Config, positions: usize) -> u64 {
        memory::sequence_bytes(config, positions, 4)
    }
    /// Whether cutting a prompt into other chunks, or sharing a step with other sequences, never
    /// changes a bit of the result. Where it may, a replay repeats the steps as they were.
    fn is_chunk_invariant(&self) -> bool {
        false
    }
    /// Calls `f` with every number below `tasks`: for work on the host beside a step, such as choosing
    /// the tokens that [`choose`](Self::choose) leaves out, and writing the text of each sequence.
    ///
    /// Provided: one after the other, on this thread. Override it where the backend has threads.
    fn for_each(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(f);
    }
    /// Makes `batch` the batch that operators work on: the step's only upload. The caller has
    /// checked it ([`Batch::check`]).
    fn stage(&self, state: &mut Self::State, batch: &Batch) -> Result<()>;

    // ---- operators: required --------------------------------------------------------------

    /// `out (tokens, hidden_size)` = rows of `table` for the staged tokens.
    fn embed(
        &self,
        table: &Self::Weight,
        state: &Self::State,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out (rows, n) = x (rows, k) * weight (n, k)^T + bias (n)`.
    fn linear(
        &self,
        x: Cols<'_, Self::Tensor>,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = x / sqrt(mean(x^2) + eps) * weight` per row, statistics in f32 or better.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// [`rms_norm`](Self::rms_norm) of some columns, in place.
    fn rms_norm_cols(
        &self,
        x: &mut Self::Tensor,
        cols: Range<usize>,
        weight: &Self::Weight,
        eps: f32,
    ) -> Result<()>;

    /// `x += y`.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// `out (rows, n) = silu(gate) * up` where `gate_up (rows, 2n) = [gate | up]`.
    fn silu_mul(&self, gate_up: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// `out = silu(conv(x) + bias)`, causal and depthwise, continuing from and updating the
    /// convolution state of `layer`.
    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, Self::Tensor, Self::Weight>,
        layer: usize,
        state: &mut Self::State,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// The selective scan (arXiv 2312.00752, equations 2a and 2b with the discretisation of
    /// Algorithm 2), continuing from and updating the SSM state h of `layer`. Per channel:
    ///
    /// ```text
    /// dt = softplus(dt + dt_bias)
    /// h  = exp(dt * A) h + dt * B * x        h and B of d_state elements, in f32
    /// y  = (C . h + D * x) * silu(z)
    /// ```
    fn selective_scan(
        &self,
        args: SelectiveScan<'_, Self::Tensor, Self::Weight>,
        layer: usize,
        state: &mut Self::State,
        y: &mut Self::Tensor,
    ) -> Result<()>;

    /// Causal attention with grouped queries over the cache of `layer`, to which this step's
    /// keys and values are appended at their positions. No positional encoding;
    /// scale `head_dim^-0.5`; softmax in f32.
    fn attention(
        &self,
        qkv: &Self::Tensor,
        layer: usize,
        state: &mut Self::State,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = sum over the top_k experts e of p[e] * down(silu(gate(x)) * up(x))`, where
    /// `p = softmax(router_logits)` over *all* experts, in f32; the weights of the chosen are not
    /// renormalised; of equal ones the lower index is chosen.
    fn moe_experts(
        &self,
        x: &Self::Tensor,
        router_logits: &Self::Tensor,
        weights: &Moe<Self::Weight>,
        top_k: usize,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out (outputs, n)` = the rows of `x (tokens, n)` whose logits the staged batch asks for.
    fn output_rows(
        &self,
        x: &Self::Tensor,
        state: &Self::State,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    // ---- blocks: provided, override to fuse -----------------------------------------------

    /// `normed -> block_out` through the Mamba mixer.
    fn mamba_mixer(
        &self,
        config: &Config,
        weights: &Mamba<Self::Weight>,
        layer: usize,
        scratch: &mut Scratch<Self::Tensor>,
        state: &mut Self::State,
    ) -> Result<()> {
        compose::mamba_mixer(self, config, weights, layer, scratch, state)
    }

    /// `normed -> block_out` through attention.
    fn attention_block(
        &self,
        config: &Config,
        weights: &Attention<Self::Weight>,
        layer: usize,
        scratch: &mut Scratch<Self::Tensor>,
        state: &mut Self::State,
    ) -> Result<()> {
        compose::attention_block(self, config, weights, layer, scratch, state)
    }

    /// `normed -> block_out` through the dense feed-forward.
    fn mlp(&self, weights: &Mlp<Self::Weight>, scratch: &mut Scratch<Self::Tensor>) -> Result<()> {
        compose::mlp(self, weights, scratch)
    }

    /// `normed -> block_out` through the routed feed-forward of `layer`.
    fn moe_ffn(
        &self,
        config: &Config,
        weights: &Moe<Self::Weight>,
        layer: usize,
        scratch: &mut Scratch<Self::Tensor>,
    ) -> Result<()> {
        compose::moe_ffn(self, config, weights, layer, scratch)
    }

    /// `hidden += block_out; normed = rms_norm(hidden)`.
    fn add_rms_norm(
        &self,
        weight: &Self::Weight,
        eps: f32,
        scratch: &mut Scratch<Self::Tensor>,
    ) -> Result<()> {
        compose::add_rms_norm(self, weight, eps, scratch)
    }

    // ---- step: provided, override to replay a graph ---------------------------------------

    /// Staged tokens to `logits`, one row per output that the batch asks for.
    fn forward(
        &self,
        config: &Config,
        weights: &Weights<Self::Weight>,
        scratch: &mut Scratch<Self::Tensor>,
        state: &mut Self::State,
    ) -> Result<()> {
        compose::forward(self, config, weights, scratch, state)
    }

    /// Told of every named activation by the composition. Does nothing, at no cost;
    /// [`Traced`](crate::trace::Traced) overrides it.
    #[inline(always)]
    fn observe(&self, at: Activation, x: Cols<'_, Self::Tensor>) -> Result<()> {
        let _ = (at, x);
        Ok(())
    }
}
