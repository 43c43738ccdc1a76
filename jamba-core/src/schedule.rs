//! From periods and offsets to the kind of each layer; what a model costs in parameters.

use crate::config::Config;
use crate::tensor::Role;
use crate::weights::{ParamSpec, Weights};

/// How a layer mixes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MixerKind {
    /// Selective state space.
    Mamba,
    /// Grouped-query attention.
    Attention,
}

/// How a layer mixes channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeedForwardKind {
    /// Dense SwiGLU.
    Mlp,
    /// Routed SwiGLU experts.
    Moe,
}

/// The kind of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKind {
    /// Token mixer.
    pub mixer: MixerKind,
    /// Channel mixer.
    pub feed_forward: FeedForwardKind,
}

/// The kind of every layer (arXiv 2403.19887, section 2 and Figure 1).
///
/// ```
/// use jamba_core::Config;
/// use jamba_core::schedule::{MixerKind, Schedule};
///
/// let schedule = Schedule::new(&Config::preset("jamba-v0.1")?);
/// assert_eq!((schedule.attention_layers(), schedule.mamba_layers()), (4, 28));
/// let attention = schedule.iter().position(|layer| layer.mixer == MixerKind::Attention);
/// assert_eq!(attention, Some(4));
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    layers: Vec<LayerKind>,
}

impl Schedule {
    /// The schedule that a valid `config` describes.
    pub fn new(config: &Config) -> Self {
        let kind = |i: usize| LayerKind {
            mixer: if i % config.attn_layer_period == config.attn_layer_offset {
                MixerKind::Attention
            } else {
                MixerKind::Mamba
            },
            feed_forward: if config.num_experts > 1
                && i % config.expert_layer_period == config.expert_layer_offset
            {
                FeedForwardKind::Moe
            } else {
                FeedForwardKind::Mlp
            },
        };
        Self { layers: (0..config.num_hidden_layers).map(kind).collect() }
    }

    /// The layers in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = LayerKind> + '_ {
        self.layers.iter().copied()
    }

    /// Layers that mix by attention.
    pub fn attention_layers(&self) -> usize {
        self.iter().filter(|l| l.mixer == MixerKind::Attention).count()
    }

    /// Layers that mix by a state space.
    pub fn mamba_layers(&self) -> usize {
        self.layers.len() - self.attention_layers()
    }

    /// Layers with routed experts.
    pub fn moe_layers(&self) -> usize {
        self.iter().filter(|l| l.feed_forward == FeedForwardKind::Moe).count()
    }
}

/// How many parameters a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamCount {
    /// All of them; a tied head counts once.
    pub total: u64,
    /// Those that one token passes through: of the experts, `num_experts_per_tok` in each layer.
    pub active: u64,
}

impl ParamCount {
    /// Counts the parameters of the model that `config` describes.
    pub fn new(config: &Config) -> Self {
        let (mut total, mut active) = (0, 0);
        Weights::layout(config).for_each(|spec: &ParamSpec| {
            let all = spec.elements();
            total += all;
            active += match spec.role {
                Role::Experts => {
                    all / config.num_experts as u64 * config.num_experts_per_tok as u64
                }
                _ => all,
            };
        });
        Self { total, active }
    }
}
