//! How large a problem is, before any of it is built.

use jamba_core::memory;
use jamba_core::schedule::ParamCount;
use jamba_core::{Config, Error, Result};

use super::ragged::Ragged;

/// Elements of all tensors of a problem together.
const MOST: u64 = 1 << 27;
/// Layers of a model; presets have up to 72.
const LAYERS: usize = 1 << 10;

/// Elements of the tensors of a problem; `u64::MAX` if they are more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent(u64);

impl Extent {
    /// Of tensors of these shapes.
    pub(crate) fn of(shapes: &[&[usize]]) -> Self {
        shapes.iter().fold(Self(0), |sum, shape| sum.and(shape))
    }

    /// Another tensor.
    #[must_use]
    pub(crate) fn and(self, shape: &[usize]) -> Self {
        let elements = shape.iter().fold(1u64, |n, &size| n.saturating_mul(size as u64));
        Self(self.0.saturating_add(elements))
    }

    /// The states of a model, and its activations in `wide` columns.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such model.
    pub(crate) fn states(self, config: &Config, ragged: &Ragged, wide: usize) -> Result<Self> {
        if config.num_hidden_layers > LAYERS {
            let allowed = format!("{LAYERS} is the most");
            let value = config.num_hidden_layers.to_string();
            let (file, field) = ("problem", "num_hidden_layers");
            return Err(Error::Config { file, field, value, allowed });
        }
        config.validate()?;
        let reach = |s: &super::ragged::Sequence| s.past.saturating_add(s.len);
        let context = ragged.seqs.iter().map(reach).fold(0, usize::max).saturating_add(8);
        let tokens = ragged.seqs.iter().fold(1, |n: usize, s| n.saturating_add(s.len));
        let sequence = memory::sequence_bytes(config, context, 4) / 4;
        let states = sequence.saturating_mul(ragged.slots.saturating_add(1) as u64);
        Ok(Self(self.0.saturating_add(states)).and(&[tokens, wide]))
    }

    /// The whole model: weights, states and scratch.
    ///
    /// # Errors
    /// As [`states`](Self::states).
    pub(crate) fn model(config: &Config, ragged: &Ragged) -> Result<Self> {
        let Config { hidden_size: hidden, intermediate_size: inter, vocab_size, .. } = *config;
        let (experts, head_dim) = (config.num_experts.max(1), config.head_dim);
        let (expand, d_state) = (config.mamba_expand, config.mamba_d_state);
        let (d_conv, dt_rank) = (config.mamba_d_conv, config.mamba_dt_rank);
        // Each matrix by itself, before anything multiplies sizes without looking.
        let matrices: [&[usize]; 8] = [
            &[vocab_size, hidden],
            &[experts, inter, hidden],
            &[config.num_attention_heads, head_dim, hidden],
            &[config.num_key_value_heads, head_dim, hidden],
            &[3, hidden, expand, hidden],
            &[hidden, expand, d_state],
            &[hidden, expand, d_conv],
            &[hidden, expand, dt_rank],
        ];
        matrices.iter().try_for_each(|&shape| Self::of(&[shape]).check())?;
        let heads = config.num_attention_heads + config.num_key_value_heads;
        let wide = 4 * hidden * (1 + expand) + 3 * inter + 2 * heads * head_dim;
        let wide = wide + vocab_size + experts + dt_rank + 2 * d_state;
        let all = Self::default().states(config, ragged, wide)?;
        let weights = ParamCount::new(config).total;
        Ok(Self(all.0.saturating_add(weights)))
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.0 <= MOST {
            return Ok(());
        }
        let (value, allowed) = (format!("one of {} elements", self.0), "2^27 are the most");
        Err(Error::Option { option: "problem", value, allowed })
    }
}

/// Refuses sizes of zero.
pub(crate) fn some(sizes: &[(&'static str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        None => Ok(()),
        Some((option, _)) => {
            Err(Error::Option { option, value: "0".into(), allowed: "it must be at least 1" })
        }
    }
}
