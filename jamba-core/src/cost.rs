//! What a step computes and moves at least, from the configuration alone: the floor under its time.
//!
//! Counted are the operations of the matrices that a token passes through, of attention, of the
//! convolution and of the scan; and the bytes of the weights that are used, read once, and of the
//! states, read and written once. Not counted are norms, activations and the residual stream,
//! which are small, and everything that a backend does beyond what it must.
//!
//! ```
//! use jamba_core::cost::{Cost, Span, StateBytes};
//! use jamba_core::{Config, WeightFormat, memory};
//!
//! let config = Config::preset("jamba-reasoning-3b")?;
//! let state = StateBytes { empty: memory::mamba_state_bytes(&config, 4), per_token: 1024 };
//! let next = Span { past: 512, tokens: 1, outputs: 1 };
//! let cost = Cost::new(&config, |role| WeightFormat::Stored.layout(role), state, &[next]);
//! // A token of a 3B model reads 3 billion weights and multiplies and adds each once.
//! assert!((5.9e9..6.2e9).contains(&cost.bytes) && (5.9e9..6.2e9).contains(&cost.operations));
//! # Ok::<(), jamba_core::Error>(())
//! ```

use std::iter::Sum;
use std::ops::Add;

use crate::config::Config;
use crate::quant::Layout;
use crate::schedule::Schedule;
use crate::tensor::{Dtype, Role};
use crate::weights::Weights;

/// Operations of one element of the SSM state and one token: `dt * A`, its exponential, the
/// product with h, the product of `dt * x` with B, their sum, the product with C, and its sum.
const SCAN_OPERATIONS: f64 = 7.0;

/// What one sequence has in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Tokens that it has already.
    pub past: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// Rows of logits.
    pub outputs: usize,
}

/// Bytes of the state of a sequence, as the backend keeps it
/// ([`Backend::sequence_bytes`](crate::Backend::sequence_bytes)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateBytes {
    /// Convolution and SSM states: those of a sequence without tokens.
    pub empty: u64,
    /// Keys and values of one token.
    pub per_token: u64,
}

/// The least that a step, or several, can do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Additions, multiplications and other operations on numbers; a multiply-add counts as two.
    pub operations: f64,
    /// Bytes read and written.
    pub bytes: f64,
}

impl Cost {
    /// The cost of one step of the model that a valid `config` describes, its weights as `layout`
    /// says: [`WeightFormat::layout`](crate::WeightFormat::layout), or what a backend makes of it.
    /// What is kept as stored counts in the dtype of the configuration, bf16 where it names none.
    ///
    /// Of the experts of a layer those are read that some token of the step is expected to use,
    /// where every expert is equally likely: of 16 with 2 for each token, 14 for 16 tokens.
    pub fn new(
        config: &Config,
        layout: impl Fn(Role) -> Layout,
        state: StateBytes,
        sequences: &[Span],
    ) -> Self {
        let sum = |f: fn(&Span) -> usize| sequences.iter().map(f).sum::<usize>() as f64;
        let (tokens, outputs) = (sum(|s| s.tokens), sum(|s| s.outputs));
        if tokens == 0.0 {
            return Self::default();
        }
        let chosen = config.num_experts_per_tok as f64 / config.num_experts.max(1) as f64;
        let used_experts = 1.0 - (1.0 - chosen).powf(tokens);
        let is_tied = config.tie_word_embeddings;
        let with_head = if outputs > 0.0 { 1.0 } else { 0.0 };

        let mut cost = Self::default();
        let stored = config.dtype.unwrap_or(Dtype::Bf16);
        Weights::layout(config).for_each(|param| {
            let elements = param.elements() as f64;
            let bytes = layout(param.role).bytes(param.matrix_shape(), stored) as f64;
            let row = bytes / param.shape[0] as f64;
            let (operations, bytes) = match param.role {
                Role::Linear | Role::Selection | Role::Router | Role::Mlp => {
                    (2.0 * elements * tokens, bytes)
                }
                Role::Experts => (2.0 * elements * chosen * tokens, bytes * used_experts),
                Role::Head => (2.0 * elements * outputs, bytes * with_head),
                Role::Embedding if is_tied => (2.0 * elements * outputs, bytes * with_head),
                Role::Embedding => (0.0, row * tokens),
                Role::Conv => (2.0 * elements * tokens, bytes),
                Role::A => (SCAN_OPERATIONS * elements * tokens, bytes),
                Role::Vector => (0.0, bytes),
            };
            cost = cost + Self { operations, bytes };
        });
        // Every query with every key that it sees, then every value.
        let pairs = |s: &Span| s.tokens as f64 * (s.past as f64 + (s.tokens as f64 + 1.0) / 2.0);
        let layers = Schedule::new(config).attention_layers() as f64;
        let of_pair = 4.0 * config.q_width() as f64 * layers;
        cost.operations += of_pair * sequences.iter().map(pairs).sum::<f64>();
        for s in sequences.iter().filter(|s| s.tokens > 0) {
            cost.bytes += 2.0 * state.empty as f64;
            cost.bytes += state.per_token as f64 * (s.past + s.tokens) as f64;
        }
        cost
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { operations: self.operations + other.operations, bytes: self.bytes + other.bytes }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::quant::WeightFormat;
    use crate::schedule::ParamCount;

    const STATE: StateBytes = StateBytes { empty: 0, per_token: 0 };

    fn cost(name: &str, state: StateBytes, sequences: &[Span]) -> Cost {
        let stored = |role| WeightFormat::Stored.layout(role);
        Cost::new(&Config::preset(name).unwrap(), stored, state, sequences)
    }

    /// Two operations for each active parameter, but for the embedding, and some for the scan.
    #[test]
    fn a_token_passes_through_the_active_parameters() {
        for name in ["jamba-v0.1", "jamba-reasoning-3b", "jamba-tales-11m"] {
            let config = Config::preset(name).unwrap();
            let one = [Span { past: 0, tokens: 1, outputs: 1 }];
            let cost = cost(name, STATE, &one);
            let table = (config.vocab_size * config.hidden_size) as f64;
            let untied = if config.tie_word_embeddings { 0.0 } else { table };
            let active = ParamCount::new(&config).active as f64 - untied;
            let ratio = cost.operations / (2.0 * active);
            assert!((1.0..1.06).contains(&ratio), "{name}: {ratio}");
            let ratio = cost.bytes / (2.0 * active);
            assert!((1.0..1.06).contains(&ratio), "{name}: {ratio}");
        }
    }

    #[test]
    fn many_tokens_use_all_experts_and_few_do_not() {
        let bytes = |tokens| {
            let span = Span { past: 0, tokens, outputs: 1 };
            cost("jamba-v0.1", STATE, &[span]).bytes
        };
        let all = memory::weight_bytes(&Config::preset("jamba-v0.1").unwrap(), WeightFormat::Stored)
            as f64;
        assert!(bytes(1) < 0.25 * all && bytes(8) > 0.6 * all);
        assert!((0.98..1.0).contains(&(bytes(4096) / all)));
    }

    #[test]
    fn attention_and_states_count() {
        let state = StateBytes { empty: 1000, per_token: 10 };
        let at = |past| cost("jamba-tales-11m", state, &[Span { past, tokens: 2, outputs: 0 }]);
        let (first, later) = (at(0), at(5));
        assert_eq!(later.bytes - first.bytes, 50.0);
        // One layer of 4 heads of 64: two tokens see five positions more.
        let config = Config::preset("jamba-tales-11m").unwrap();
        let layers = Schedule::new(&config).attention_layers() as f64;
        let expected = layers * 2.0 * 5.0 * 4.0 * config.q_width() as f64;
        assert_eq!(later.operations - first.operations, expected);
        let none = [Span { past: 9, tokens: 0, outputs: 0 }];
        assert_eq!(cost("jamba-tales-11m", state, &none), Cost::default());
        let both: Cost = [first, later].into_iter().sum();
        assert_eq!(both.operations, first.operations + later.operations);
    }
}
