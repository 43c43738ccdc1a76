//! What the problems of blocks have in common: a small model with random weights.

use jamba_core::random::RandomParams;
use jamba_core::recording::{Recorded, Recording};
use jamba_core::trace::{Activation, Detail, Listener, Traced};
use jamba_core::weights::{ParamSpec, Weights};
use jamba_core::{Backend, Config, Error, HostTensor, Param, ParamSource, Result, Role, Scratch};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::bench::{self, Draw};
use super::ragged::{Ragged, ragged};
use crate::oracle::OracleBackend;
use crate::precision::{Format, Numbers, Precision};
use crate::random::Random;

/// The layer that a problem runs, of the two that its model has: one that mixes up the states of
/// layers is found.
pub(crate) const LAYER: usize = 1;

/// The sizes of a model, named in short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "those of Config, in short")]
pub struct Sizes {
    pub vocab: usize,
    pub hidden: usize,
    pub inter: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Period and offset of attention layers.
    pub attn: [usize; 2],
    /// Period and offset of layers with experts.
    pub expert: [usize; 2],
    pub experts: usize,
    pub top_k: usize,
    pub d_state: usize,
    pub d_conv: usize,
    pub expand: usize,
    pub dt_rank: usize,
    pub conv_bias: bool,
    pub proj_bias: bool,
    pub tied: bool,
    pub eps: f32,
}

impl Sizes {
    /// Two Mamba layers with dense MLPs, as small as they can be.
    pub fn small() -> Self {
        Self {
            vocab: 5,
            hidden: 4,
            inter: 3,
            layers: 2,
            heads: 1,
            kv_heads: 1,
            head_dim: 4,
            attn: [9, 8],
            expert: [9, 8],
            experts: 0,
            top_k: 1,
            d_state: 2,
            d_conv: 2,
            expand: 1,
            dt_rank: 1,
            conv_bias: true,
            proj_bias: false,
            tied: false,
            eps: 1e-6,
        }
    }

    /// The configuration of these sizes.
    ///
    /// # Panics
    /// If there can be no model of these sizes.
    pub fn config(&self) -> Config {
        let config = self.unchecked();
        config.validate().unwrap_or_else(|error| panic!("{self:?}: {error}"));
        config
    }

    /// [`config`](Self::config), which may not be one of a model.
    pub(crate) fn unchecked(&self) -> Config {
        let mut c = Config::preset("jamba-tales-11m").expect("a preset");
        c.vocab_size = self.vocab;
        c.hidden_size = self.hidden;
        c.intermediate_size = self.inter;
        c.num_hidden_layers = self.layers;
        c.num_attention_heads = self.heads;
        c.num_key_value_heads = self.kv_heads;
        c.head_dim = self.head_dim;
        [c.attn_layer_period, c.attn_layer_offset] = self.attn;
        [c.expert_layer_period, c.expert_layer_offset] = self.expert;
        c.num_experts = self.experts;
        c.num_experts_per_tok = self.top_k;
        c.mamba_d_state = self.d_state;
        c.mamba_d_conv = self.d_conv;
        c.mamba_expand = self.expand;
        c.mamba_dt_rank = self.dt_rank;
        c.mamba_conv_bias = self.conv_bias;
        c.mamba_proj_bias = self.proj_bias;
        c.tie_word_embeddings = self.tied;
        c.rms_norm_eps = self.eps;
        c.bos_token_id = None;
        c.eos_token_ids.clear();
        c
    }
}

/// Sizes small and odd, and those of the published models cut in `hidden_size`.
pub(crate) fn sizes() -> BoxedStrategy<Sizes> {
    let heads = (1..=3usize, 1..=3usize, 3..=20usize);
    let experts = (2..=6usize).prop_flat_map(|n| (Just(n), 1..=n));
    // The norm of a row of one or two elements loses digits wherever they happen to be small.
    let d_state = prop_oneof![2 => Just(16usize), 2 => 4..=18usize];
    let mamba = (d_state, 1..=5usize, 1..=3usize, 4..=11usize);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let small = (
        bench::width(40),
        bench::width(40),
        3..=40usize,
        heads,
        experts,
        mamba,
        flags,
        bench::eps(),
    )
        .prop_map(
            |(
                hidden,
                inter,
                vocab,
                (kv_heads, group, head_dim),
                (experts, top_k),
                mamba,
                flags,
                eps,
            )| {
                let (d_state, d_conv, expand, dt_rank) = mamba;
                let (conv_bias, proj_bias, tied) = flags;
                Sizes {
                    vocab,
                    hidden,
                    inter,
                    heads: kv_heads * group,
                    kv_heads,
                    head_dim,
                    experts,
                    top_k,
                    d_state,
                    d_conv,
                    expand,
                    dt_rank,
                    conv_bias,
                    proj_bias,
                    tied,
                    eps,
                    ..Sizes::small()
                }
            },
        );
    let published = prop::sample::select(vec![
        // Jamba v0.1, 1.5 Large and Reasoning 3B; the dense one without experts.
        (32, 8, 16, 256),
        (64, 8, 16, 512),
        (20, 1, 0, 160),
    ]);
    let published =
        (published, bench::width(33)).prop_map(|((heads, kv_heads, experts, dt_rank), hidden)| {
            let top_k = experts.clamp(1, 2);
            Sizes {
                hidden,
                inter: 40,
                heads,
                kv_heads,
                head_dim: 128,
                experts,
                top_k,
                d_state: 16,
                d_conv: 4,
                expand: 2,
                dt_rank,
                ..Sizes::small()
            }
        });
    prop_oneof![6 => small, 1 => published].boxed()
}

/// A block of a small model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
#[allow(missing_docs, reason = "as for operators")]
pub struct Block {
    pub sizes: Sizes,
    pub batch: Ragged,
    pub weights: Format,
    pub precision: Precision,
    pub seed: u32,
}

/// A [`Block`] as it is written.
#[derive(Deserialize)]
struct Unchecked {
    sizes: Sizes,
    batch: Ragged,
    weights: Format,
    precision: Precision,
    seed: u32,
}

impl TryFrom<Unchecked> for Block {
    type Error = Error;

    fn try_from(from: Unchecked) -> Result<Self> {
        let Unchecked { sizes, batch, weights, precision, seed } = from;
        sizes.unchecked().validate()?;
        Ok(Self { sizes, batch, weights, precision, seed })
    }
}

/// A block on a backend, ready to run.
pub(crate) struct Loaded<B: Backend> {
    pub(crate) config: Config,
    pub(crate) weights: Weights<B::Weight>,
    pub(crate) scratch: Scratch<B::Tensor>,
    pub(crate) state: B::State,
}

impl Block {
    /// Blocks of models of any sizes, changed by `fit` to have the block.
    pub(crate) fn strategy(
        numbers: &Numbers,
        fit: impl Fn(Sizes) -> Sizes + 'static,
    ) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        (sizes(), ragged(20), bench::format(numbers), any::<u32>())
            .prop_map(move |(sizes, batch, weights, seed)| Self {
                sizes: fit(sizes),
                batch,
                weights,
                precision,
                seed,
            })
            .boxed()
    }

    pub(crate) fn source(&self) -> KitParams {
        KitParams { seed: self.seed.into(), format: self.weights }
    }

    /// Activations of these names, the weights whose names begin with `prefix`, and the states.
    pub(crate) fn inputs(&self, activations: &[&str], prefix: &str) -> Recording {
        let config = self.sizes.config();
        let mut draw = Draw::new(self.seed, self.precision);
        let shape = [self.batch.tokens(), config.hidden_size];
        activations.iter().for_each(|name| draw.activations(name, shape, |r| r.normal()));
        draw.states(&config, &self.batch);
        let source = self.source();
        Weights::layout(&config).for_each(|spec: &ParamSpec| {
            if spec.name.starts_with(prefix) {
                let values = source.param(spec).expect("random parameters").to_f32();
                let tensor = Recorded { shape: spec.shape.clone(), values };
                draw.inputs.tensors.insert(spec.name.clone(), tensor);
            }
        });
        draw.inputs
    }

    /// Weights, scratch full of NaN, and the states that `inputs` say.
    pub(crate) fn load<B: Backend>(&self, b: &B, inputs: &Recording) -> Result<Loaded<B>> {
        let config = self.sizes.config();
        let source = self.source();
        let weights = Weights::layout(&config)
            .try_map(&mut |spec: &ParamSpec| b.upload(source.param(spec)?))?;
        let limits = bench::limits(&self.batch);
        let mut scratch = Scratch::new(b, &config, &limits)?;
        let s = &mut scratch;
        let tokens = [
            &mut s.hidden,
            &mut s.normed,
            &mut s.block_out,
            &mut s.xz,
            &mut s.conv_out,
            &mut s.x_dbl,
            &mut s.dt,
            &mut s.y,
            &mut s.qkv,
            &mut s.context,
            &mut s.router_logits,
            &mut s.gate_up,
            &mut s.act,
        ];
        for tensor in tokens {
            bench::poison(b, tensor, limits.tokens)?;
        }
        for tensor in [&mut s.output_hidden, &mut s.output_normed, &mut s.logits] {
            bench::poison(b, tensor, limits.outputs)?;
        }
        let state = bench::state(b, &config, &self.batch, inputs)?;
        Ok(Loaded { config, weights, scratch, state })
    }

    /// Loads, stages, writes `hidden` and `normed` and `block_out` where they are inputs, runs
    /// `f`, and reads those three and all states.
    pub(crate) fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &Recording,
        f: impl FnOnce(&mut Loaded<B>) -> Result<()>,
        outputs: &[&str],
    ) -> Result<Recording> {
        let mut loaded = self.load(b, inputs)?;
        b.stage(&mut loaded.state, &self.batch.batch(&vec![0; self.batch.tokens()]))?;
        let s = &mut loaded.scratch;
        let named =
            [("hidden", &mut s.hidden), ("normed", &mut s.normed), ("block_out", &mut s.block_out)];
        for (name, tensor) in named {
            if let Some(values) = inputs.tensors.get(name) {
                b.write(tensor, &values.values)?;
            }
        }
        f(&mut loaded)?;
        let mut out = Recording::default();
        let s = &loaded.scratch;
        let named = [("hidden", &s.hidden), ("normed", &s.normed), ("block_out", &s.block_out)];
        for (name, tensor) in named {
            if outputs.contains(&name) {
                out.tensors.insert(name.into(), bench::read(b, tensor)?);
            }
        }
        let held = bench::held_after(&self.batch);
        bench::read_states(b, &loaded.config, &loaded.state, held, &mut out)?;
        Ok(out)
    }
}

/// The part of a model that a problem expects at [`LAYER`].
///
/// # Errors
/// Says that the sizes of the problem describe another layer.
pub(crate) fn wrong_layer<T>(what: &str) -> Result<T> {
    Err(Error::Unsupported { backend: "kit", what: format!("a problem whose layer has no {what}") })
}

/// [`RandomParams`] of the values that a format can hold, with some dt past 20 where softplus is
/// the identity.
#[derive(Clone, Copy)]
pub(crate) struct KitParams {
    pub(crate) seed: u64,
    pub(crate) format: Format,
}

impl ParamSource for KitParams {
    fn param(&self, spec: &ParamSpec) -> Result<Param> {
        let dtype = self.format.dtype();
        let param = RandomParams { seed: self.seed, dtype }.param(spec)?;
        let mut values = param.to_f32();
        let tensor = match spec.role {
            Role::Vector if spec.name.ends_with("dt_proj.bias") => {
                let mut random = Random::new(self.seed, &spec.name);
                let raise = |v| if random.below(32) == 0 { 22.0 } else { v };
                HostTensor::from_f32(param.shape, values.into_iter().map(raise).collect())
            }
            Role::Vector | Role::Conv | Role::A => return Ok(param),
            role => {
                self.format.round(role, param.matrix_shape()[1], &mut values);
                self.format.store(param.shape, &values)
            }
        };
        Ok(Param::new(param.name, param.role, tensor))
    }
}

/// Token ids as values.
pub(crate) fn ids(vocab: usize) -> impl FnMut(&mut Random, usize) -> f32 {
    move |r, _| r.below(vocab) as f32
}

/// How far the last chosen expert's logit is above the first not chosen.
pub(crate) fn margin(logits: &[f32], top_k: usize) -> f32 {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    match sorted.get(top_k) {
        Some(next) => sorted[top_k - 1] - next,
        None => f32::INFINITY,
    }
}

/// The margin that leaves no doubt which experts are chosen. Logits are about 1.
pub(crate) fn decisive(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 1e-3,
        Precision::Bf16Products | Precision::Bf16 => 0.06,
    }
}

/// The smallest margin of any token and layer when the oracle runs `f`.
pub(crate) fn smallest_margin(
    top_k: usize,
    f: impl FnOnce(&Traced<'_, OracleBackend>) -> Result<()>,
) -> f32 {
    let mut smallest = f32::INFINITY;
    let mut listen = |at: Activation, shape: [usize; 2], values: &[f32]| {
        if at.name == "moe.router_logits" {
            let rows = values.chunks_exact(shape[1].max(1)).map(|row| margin(row, top_k));
            smallest = rows.fold(smallest, f32::min);
        }
    };
    let listener: &mut Listener<'_> = &mut listen;
    f(&Traced::new(&OracleBackend, Detail::Operators, listener)).expect("the oracle runs it");
    smallest
}

/// The first of some seeds from this one on that leaves no doubt which experts are chosen, and
/// which `sound` accepts; an error is the one that leaves least doubt, where there is none.
pub(crate) fn settle(
    seed: u32,
    precision: Precision,
    margin: impl Fn(u32) -> f32,
    sound: impl Fn(u32) -> bool,
) -> std::result::Result<u32, u32> {
    let tries = if precision == Precision::F32 { 20 } else { 200 };
    let mut best = (f32::NEG_INFINITY, seed);
    for seed in (0..tries).map(|i| seed.wrapping_add(i)) {
        let margin = margin(seed);
        if margin >= decisive(precision) && sound(seed) {
            return Ok(seed);
        }
        if margin > best.0 {
            best = (margin, seed);
        }
    }
    Err(best.1)
}
