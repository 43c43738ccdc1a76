//! The model's parameters, generic over the handle `W` that holds each one, and the one table
//! that says how each is called in a checkpoint and which shape it has.
//!
//! [`Weights<ParamSpec>`] describes, `Weights<B::Weight>` runs; [`Weights::try_map`] leads from
//! the first to the second, one parameter at a time.

use crate::config::Config;
use crate::schedule::{FeedForwardKind, LayerKind, MixerKind, Schedule};
use crate::tensor::Role;

/// All parameters.
#[derive(Clone, Debug)]
pub struct Weights<W> {
    /// Token embedding table, `(vocab_size, hidden_size)`.
    pub embed_tokens: W,
    /// Decoder layers in order: the schedule *is* this list.
    pub layers: Vec<Layer<W>>,
    /// Norm before the head, `(hidden_size)`.
    pub final_layernorm: W,
    /// Output head, `(vocab_size, hidden_size)`; `None` where it is tied to `embed_tokens`.
    pub lm_head: Option<W>,
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct Layer<W> {
    /// Norm before the mixer, `(hidden_size)`.
    pub input_layernorm: W,
    /// Token mixer.
    pub mixer: Mixer<W>,
    /// Norm before the feed-forward, `(hidden_size)`.
    pub pre_ff_layernorm: W,
    /// Channel mixer.
    pub feed_forward: FeedForward<W>,
}

/// The token mixer of a layer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "most layers are the large variant")]
pub enum Mixer<W> {
    /// Selective state space.
    Mamba(Mamba<W>),
    /// Grouped-query attention, no positional encoding.
    Attention(Attention<W>),
}

/// The channel mixer of a layer.
#[derive(Clone, Debug)]
pub enum FeedForward<W> {
    /// Dense SwiGLU.
    Mlp(Mlp<W>),
    /// Routed SwiGLU experts.
    Moe(Moe<W>),
}

/// Parameters of the Mamba mixer (arXiv 2312.00752, Algorithm 2, with Jamba's three norms).
#[derive(Clone, Debug)]
pub struct Mamba<W> {
    /// `(2 * d_inner, hidden_size)`, rows `[x; z]`.
    pub in_proj: W,
    /// `(2 * d_inner)`, where the model has it.
    pub in_proj_bias: Option<W>,
    /// `(d_inner, d_conv)`, oldest tap first.
    pub conv1d: W,
    /// `(d_inner)`, where the model has it.
    pub conv1d_bias: Option<W>,
    /// `(dt_rank + 2 * d_state, d_inner)`, rows `[dt; B; C]`.
    pub x_proj: W,
    /// `(dt_rank)`.
    pub dt_layernorm: W,
    /// `(d_state)`.
    pub b_layernorm: W,
    /// `(d_state)`.
    pub c_layernorm: W,
    /// `(d_inner, dt_rank)`.
    pub dt_proj: W,
    /// `(d_inner)`, added inside the softplus.
    pub dt_bias: W,
    /// `(d_inner, d_state)`, `-exp(A_log)`.
    pub a: W,
    /// `(d_inner)`.
    pub d: W,
    /// `(hidden_size, d_inner)`.
    pub out_proj: W,
    /// `(hidden_size)`, where the model has it.
    pub out_proj_bias: Option<W>,
}

/// Parameters of attention.
#[derive(Clone, Debug)]
pub struct Attention<W> {
    /// `((num_heads + 2 * num_kv_heads) * head_dim, hidden_size)`, rows `[q; k; v]`.
    pub qkv_proj: W,
    /// `(hidden_size, num_heads * head_dim)`.
    pub o_proj: W,
}

/// Parameters of the dense feed-forward.
#[derive(Clone, Debug)]
pub struct Mlp<W> {
    /// `(2 * intermediate_size, hidden_size)`, rows `[gate; up]`.
    pub gate_up_proj: W,
    /// `(hidden_size, intermediate_size)`.
    pub down_proj: W,
}

/// Parameters of the routed feed-forward.
#[derive(Clone, Debug)]
pub struct Moe<W> {
    /// `(num_experts, hidden_size)`.
    pub router: W,
    /// `(num_experts, 2 * intermediate_size, hidden_size)`, rows `[gate; up]` of each expert.
    pub gate_up_proj: W,
    /// `(num_experts, hidden_size, intermediate_size)`.
    pub down_proj: W,
}

/// What a parameter is called, which shape it has, and where a checkpoint keeps it.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// Name in the checkpoint's terms; unique in the model.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    pub(crate) source: Source,
}

/// How a checkpoint stores a parameter.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Under its own name, possibly with dimensions of 1 between.
    Stored(Vec<usize>),
    /// `-exp` of the tensor of this name.
    NegExp(String),
    /// These tensors, one below the other.
    Stacked(Vec<(String, Vec<usize>)>),
    /// One tensor under the parameter's own name, or else these, one below the other.
    StoredOrStacked(Vec<(String, Vec<usize>)>),
}

impl ParamSpec {
    fn new(name: String, role: Role, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), role, source: Source::Stored(shape.to_vec()) }
    }

    fn from(self, source: Source) -> Self {
        Self { source, ..self }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// The shape as a matrix: all dimensions but the last are rows; a vector is one row.
    pub fn matrix_shape(&self) -> [u64; 2] {
        let cols = self.shape.last().map_or(1, |&n| n as u64);
        [self.elements().checked_div(cols).unwrap_or(0), cols]
    }
}

impl Weights<ParamSpec> {
    /// The table: every parameter of the model that `config` describes.
    pub fn layout(config: &Config) -> Self {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let vector = |name: &str| ParamSpec::new(name.into(), Role::Vector, &[hidden]);
        let schedule = Schedule::new(config);
        let layers = schedule.iter().enumerate();
        Self {
            embed_tokens: ParamSpec::new(
                "model.embed_tokens.weight".into(),
                Role::Embedding,
                &[vocab, hidden],
            ),
            layers: layers.map(|(index, kind)| layer(config, index, kind)).collect(),
            final_layernorm: vector("model.final_layernorm.weight"),
            lm_head: (!config.tie_word_embeddings)
                .then(|| ParamSpec::new("lm_head.weight".into(), Role::Head, &[vocab, hidden])),
        }
    }
}

fn layer(config: &Config, index: usize, kind: LayerKind) -> Layer<ParamSpec> {
    let prefix = format!("model.layers.{index}");
    let norm = |name: &str| {
        ParamSpec::new(format!("{prefix}.{name}.weight"), Role::Vector, &[config.hidden_size])
    };
    Layer {
        input_layernorm: norm("input_layernorm"),
        mixer: match kind.mixer {
            MixerKind::Mamba => Mixer::Mamba(mamba(config, &format!("{prefix}.mamba"))),
            MixerKind::Attention => {
                Mixer::Attention(attention(config, &format!("{prefix}.self_attn")))
            }
        },
        pre_ff_layernorm: norm("pre_ff_layernorm"),
        feed_forward: match kind.feed_forward {
            FeedForwardKind::Mlp => {
                FeedForward::Mlp(mlp(config, &format!("{prefix}.feed_forward")))
            }
            FeedForwardKind::Moe => {
                FeedForward::Moe(moe(config, &format!("{prefix}.feed_forward")))
            }
        },
    }
}

fn mamba(config: &Config, prefix: &str) -> Mamba<ParamSpec> {
    let (hidden, d_inner) = (config.hidden_size, config.d_inner());
    let (d_state, d_conv, dt_rank) =
        (config.mamba_d_state, config.mamba_d_conv, config.mamba_dt_rank);
    let spec =
        |name: &str, role, shape: &[usize]| ParamSpec::new(format!("{prefix}.{name}"), role, shape);
    let linear = |name, shape| spec(name, Role::Linear, shape);
    let selection = |name, shape| spec(name, Role::Selection, shape);
    let vector = |name, len| spec(name, Role::Vector, &[len]);
    let proj_bias = |name, len| config.mamba_proj_bias.then(|| vector(name, len));
    Mamba {
        in_proj: linear("in_proj.weight", &[2 * d_inner, hidden]),
        in_proj_bias: proj_bias("in_proj.bias", 2 * d_inner),
        conv1d: spec("conv1d.weight", Role::Conv, &[d_inner, d_conv])
            .from(Source::Stored(vec![d_inner, 1, d_conv])),
        conv1d_bias: config.mamba_conv_bias.then(|| vector("conv1d.bias", d_inner)),
        x_proj: selection("x_proj.weight", &[dt_rank + 2 * d_state, d_inner]),
        dt_layernorm: vector("dt_layernorm.weight", dt_rank),
        b_layernorm: vector("b_layernorm.weight", d_state),
        c_layernorm: vector("c_layernorm.weight", d_state),
        dt_proj: selection("dt_proj.weight", &[d_inner, dt_rank]),
        dt_bias: vector("dt_proj.bias", d_inner),
        a: spec("A", Role::A, &[d_inner, d_state]).from(Source::NegExp(format!("{prefix}.A_log"))),
        d: vector("D", d_inner),
        out_proj: linear("out_proj.weight", &[hidden, d_inner]),
        out_proj_bias: proj_bias("out_proj.bias", hidden),
    }
}

fn attention(config: &Config, prefix: &str) -> Attention<ParamSpec> {
    let (hidden, q, kv) = (config.hidden_size, config.q_width(), config.kv_width());
    let spec = |name: &str, shape: &[usize]| {
        ParamSpec::new(format!("{prefix}.{name}.weight"), Role::Linear, shape)
    };
    let part = |name: &str, rows: usize| (format!("{prefix}.{name}.weight"), vec![rows, hidden]);
    Attention {
        qkv_proj: spec("qkv_proj", &[q + 2 * kv, hidden]).from(Source::Stacked(vec![
            part("q_proj", q),
            part("k_proj", kv),
            part("v_proj", kv),
        ])),
        o_proj: spec("o_proj", &[hidden, q]),
    }
}

fn mlp(config: &Config, prefix: &str) -> Mlp<ParamSpec> {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let spec = |name: &str, shape: &[usize]| {
        ParamSpec::new(format!("{prefix}.{name}.weight"), Role::Mlp, shape)
    };
    let part = |name: &str| (format!("{prefix}.{name}.weight"), vec![inter, hidden]);
    Mlp {
        gate_up_proj: spec("gate_up_proj", &[2 * inter, hidden])
            .from(Source::Stacked(vec![part("gate_proj"), part("up_proj")])),
        down_proj: spec("down_proj", &[hidden, inter]),
    }
}

fn moe(config: &Config, prefix: &str) -> Moe<ParamSpec> {
    let (hidden, inter, experts) =
        (config.hidden_size, config.intermediate_size, config.num_experts);
    let spec = |name: &str, shape: &[usize], parts: &[(&str, [usize; 2])]| {
        // Published checkpoints have a tensor per expert, transformers 5 writes them stacked.
        let part = |e: usize, name: &str, shape: [usize; 2]| {
            (format!("{prefix}.experts.{e}.{name}.weight"), shape.to_vec())
        };
        let parts = (0..experts).flat_map(|e| parts.iter().map(move |&(n, s)| part(e, n, s)));
        ParamSpec::new(format!("{prefix}.experts.{name}"), Role::Experts, shape)
            .from(Source::StoredOrStacked(parts.collect()))
    };
    Moe {
        router: ParamSpec::new(format!("{prefix}.router.weight"), Role::Router, &[experts, hidden]),
        gate_up_proj: spec(
            "gate_up_proj",
            &[experts, 2 * inter, hidden],
            &[("gate_proj", [inter, hidden]), ("up_proj", [inter, hidden])],
        ),
        down_proj: spec("down_proj", &[experts, hidden, inter], &[("down_proj", [hidden, inter])]),
    }
}

impl<W> Weights<W> {
    /// The output head: `lm_head`, or `embed_tokens` where they are tied.
    pub fn head(&self) -> &W {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The same parameters in other handles; stops at the first error.
    pub fn try_map<V, E>(&self, f: &mut impl FnMut(&W) -> Result<V, E>) -> Result<Weights<V>, E> {
        Ok(Weights {
            embed_tokens: f(&self.embed_tokens)?,
            layers: self.layers.iter().map(|layer| layer.try_map(f)).collect::<Result<_, E>>()?,
            final_layernorm: f(&self.final_layernorm)?,
            lm_head: self.lm_head.as_ref().map(&mut *f).transpose()?,
        })
    }

    /// Calls `f` with every parameter, in the order of [`try_map`](Self::try_map).
    pub fn for_each(&self, mut f: impl FnMut(&W)) {
        let mut visit = |w: &W| {
            f(w);
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(_) = self.try_map(&mut visit);
    }
}

impl<W> Layer<W> {
    fn try_map<V, E>(&self, f: &mut impl FnMut(&W) -> Result<V, E>) -> Result<Layer<V>, E> {
        Ok(Layer {
            input_layernorm: f(&self.input_layernorm)?,
            mixer: match &self.mixer {
                Mixer::Mamba(w) => Mixer::Mamba(Mamba {
                    in_proj: f(&w.in_proj)?,
                    in_proj_bias: w.in_proj_bias.as_ref().map(&mut *f).transpose()?,
                    conv1d: f(&w.conv1d)?,
                    conv1d_bias: w.conv1d_bias.as_ref().map(&mut *f).transpose()?,
                    x_proj: f(&w.x_proj)?,
                    dt_layernorm: f(&w.dt_layernorm)?,
                    b_layernorm: f(&w.b_layernorm)?,
                    c_layernorm: f(&w.c_layernorm)?,
                    dt_proj: f(&w.dt_proj)?,
                    dt_bias: f(&w.dt_bias)?,
                    a: f(&w.a)?,
                    d: f(&w.d)?,
                    out_proj: f(&w.out_proj)?,
                    out_proj_bias: w.out_proj_bias.as_ref().map(&mut *f).transpose()?,
                }),
                Mixer::Attention(w) => {
                    Mixer::Attention(Attention { qkv_proj: f(&w.qkv_proj)?, o_proj: f(&w.o_proj)? })
                }
            },
            pre_ff_layernorm: f(&self.pre_ff_layernorm)?,
            feed_forward: match &self.feed_forward {
                FeedForward::Mlp(w) => FeedForward::Mlp(Mlp {
                    gate_up_proj: f(&w.gate_up_proj)?,
                    down_proj: f(&w.down_proj)?,
                }),
                FeedForward::Moe(w) => FeedForward::Moe(Moe {
                    router: f(&w.router)?,
                    gate_up_proj: f(&w.gate_up_proj)?,
                    down_proj: f(&w.down_proj)?,
                }),
            },
        })
    }
}
