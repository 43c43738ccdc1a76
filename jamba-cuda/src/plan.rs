//! What a model needs on the device, told before anything is allocated.

use std::fmt;

use jamba_core::schedule::Schedule;
use jamba_core::weights::Weights;
use jamba_core::{Config, Limits, Role, WeightFormat, memory};

use crate::error::{Error, Result};
use crate::ops::few::{Entries, FEW_ROWS, MOST_GROUPS_ROWS};
use crate::ops::linear::DENSE_BYTES;
use crate::ops::{attention_step, cublas, moe, packed, sample};
use crate::options::Precision;
use crate::state;
use crate::weight;

/// Bytes of a model and of one runner of it on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// All parameters. Shared by all runners of the model.
    pub weights: u64,
    /// Convolution and SSM states, KV cache and the staged batch.
    pub state: u64,
    /// Activations of a step.
    pub scratch: u64,
    /// Memory between kernels, shared by all runners of the backend.
    pub workspaces: u64,
    /// What was free on the device, if it was asked.
    pub free: Option<u64>,
}

impl Plan {
    /// The plan for a model of `config` and a runner with these limits, weights kept in `format`.
    /// Needs no device.
    pub fn new(
        config: &Config,
        limits: &Limits,
        precision: Precision,
        format: WeightFormat,
    ) -> Self {
        let mut weights = 0;
        Weights::layout(config).for_each(|spec| {
            weights += weight::bytes(spec.role, spec.matrix_shape(), precision, format);
        });
        let slots = limits.slots as u64;
        let staged = (state::staged_words(limits) as u64).saturating_mul(4);
        Self {
            weights,
            state: slots
                .saturating_mul(sequence_bytes(config, limits.context, precision))
                .saturating_add(staged),
            scratch: memory::scratch_bytes(config, limits),
            workspaces: workspaces(config, limits, precision, format)
                .into_iter()
                .fold(0, |sum, bytes| sum.saturating_add(bytes as u64)),
            free: None,
        }
    }

    /// All bytes together.
    pub fn total(&self) -> u64 {
        let parts = [self.weights, self.state, self.scratch, self.workspaces];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// Whether all of it fits into what is free.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] with this plan, if what is free is known and less.
    pub fn check(&self) -> Result<()> {
        self.check_part(0)
    }

    /// Whether the rest fits, where so many bytes of the plan are allocated already.
    pub(crate) fn check_part(&self, allocated: u64) -> Result<()> {
        let needed = self.total().saturating_sub(allocated);
        match self.free {
            Some(free) if needed > free => Err(Error::DoesNotFit(Box::new(*self))),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "weights {:.2} GiB, state {:.2}, scratch {:.2}, workspaces {:.2}, together {:.2} GiB",
            gib(self.weights),
            gib(self.state),
            gib(self.scratch),
            gib(self.workspaces),
            gib(self.total())
        )?;
        self.free.map_or(Ok(()), |free| write!(f, "; {:.2} GiB are free", gib(free)))
    }
}

/// Bytes of the state of a sequence of so many tokens: the KV cache in the precision of the
/// backend, convolution and SSM states in f32.
pub(crate) fn sequence_bytes(config: &Config, positions: usize, precision: Precision) -> u64 {
    let kv = memory::kv_bytes(config, positions, state::kv_element_bytes(precision));
    kv.saturating_add(memory::mamba_state_bytes(config, 4))
}

/// Bytes of the workspaces for steps within limits: operand of a product, parts of attention,
/// routes, activations and results of the experts, choice of tokens, dequantised weights, workspace of
/// cuBLASLt.
pub(crate) fn workspaces(
    config: &Config,
    limits: &Limits,
    precision: Precision,
    format: WeightFormat,
) -> [usize; 8] {
    let tokens = limits.tokens;
    let schedule = Schedule::new(config);
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let operands = [config.d_inner(), config.mamba_dt_rank, config.q_width(), inter];
    let operand = operands.into_iter().fold(hidden, usize::max);
    let cast = match precision {
        Precision::Bf16 => tokens.saturating_mul(2 * operand.next_multiple_of(8)),
        Precision::F32 => 0,
    };
    let parts = if schedule.attention_layers() > 0 { attention_step::PARTS_BYTES } else { 0 };
    let routing = (config.num_experts, config.num_experts_per_tok);
    let [routes, act, expert_out, sorted] = if schedule.moe_layers() > 0 {
        let [routes, act, out] = moe::workspace_bytes(tokens, routing, (hidden, inter), precision);
        let is_bf16 = precision == Precision::Bf16;
        [routes, act, out, if is_bf16 { moe::sorted_bytes(tokens, routing.1, hidden) } else { 0 }]
    } else {
        [0; 4]
    };
    let cast = cast.max(sorted);
    // Those of an MLP of few rows, in bf16, or in f32 of as many as are multiplied on CUDA cores.
    let few = (2 * tokens.min(MOST_GROUPS_ROWS)).max(4 * tokens.min(packed::MOST_ROWS));
    let few = few * inter.next_multiple_of(8);
    // A token for each sequence, however many rows of logits a step has.
    let chosen = sample::workspace_bytes(limits.slots.min(limits.outputs), config.vocab_size);
    let dense = dense(config, limits, precision, format);
    [cast, parts, routes, act.max(few), expert_out, chosen, dense, cublas::WORKSPACE_BYTES]
}

/// Bytes of the workspace in which weights are dequantised for the products of many rows.
fn dense(config: &Config, limits: &Limits, precision: Precision, format: WeightFormat) -> usize {
    let tokens = limits.tokens;
    let entries = tokens.saturating_mul(config.num_experts_per_tok);
    let mut most = 0;
    Weights::layout(config).for_each(|spec| {
        let is_packed = weight::packing(spec.role, precision, format).is_some();
        let [rows, cols] = spec.matrix_shape().map(|n| n as usize);
        let whole = rows.saturating_mul(2 * weight::padded(cols, precision));
        let (is_few, least) = match spec.role {
            Role::Embedding if !config.tie_word_embeddings => (true, 0),
            Role::Experts => {
                (Entries::are_few(entries, config.num_experts), whole / config.num_experts.max(1))
            }
            Role::Embedding | Role::Head => (limits.outputs <= FEW_ROWS, 0),
            Role::Mlp => (tokens <= FEW_ROWS, whole),
            _ => (tokens <= FEW_ROWS, 0),
        };
        if is_packed && !is_few {
            most = most.max(whole.min(DENSE_BYTES.max(least)));
        }
    });
    most
}

#[cfg(test)]
mod tests {
    use jamba_core::Layout;

    use super::*;

    const LIMITS: Limits = Limits { slots: 2, context: 1 << 16, tokens: 8192, outputs: 1 };

    #[test]
    fn the_3b_is_what_its_shape_says() {
        let config = Config::preset("jamba-reasoning-3b").unwrap();
        let plan = Plan::new(&config, &LIMITS, Precision::Bf16, WeightFormat::Stored);
        // 3.03 parameters of 2 bytes; 64 MiB of KV cache and 9.65 MiB of states per slot.
        assert!((6.0..6.2).contains(&(plan.weights as f64 / 1e9)), "{plan}");
        assert!((147.0..148.0).contains(&(plan.state as f64 / f64::from(1 << 20))), "{plan}");
        assert!(plan.check().is_ok(), "nothing is known of the device");
        let known = Plan { free: Some(plan.total()), ..plan };
        assert!(known.check().is_ok());
        let error = Plan { free: Some(plan.total() - 1), ..plan }.check().unwrap_err().to_string();
        for word in ["weights 5.6", "state 0.14", "scratch", "free"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn limits_without_bounds_do_not_overflow() {
        for name in ["jamba-v0.1", "jamba-reasoning-3b"] {
            let config = Config::preset(name).unwrap();
            let (slots, context, tokens) = (usize::MAX, usize::MAX, usize::MAX);
            let limits = Limits { slots, context, tokens, outputs: usize::MAX };
            for precision in [Precision::Bf16, Precision::F32] {
                let plan = Plan::new(&config, &limits, precision, WeightFormat::Stored);
                assert_eq!(plan.total(), u64::MAX);
                assert!(Plan { free: Some(1 << 40), ..plan }.check().is_err());
            }
        }
    }

    /// The shapes of the published models need no padding, so that both count the same but for what
    /// is kept in bf16 here.
    #[test]
    fn weights_are_those_of_their_format() {
        for name in ["jamba-v0.1", "jamba-reasoning-3b"] {
            let config = Config::preset(name).unwrap();
            for format in WeightFormat::ALL {
                let plan = Plan::new(&config, &LIMITS, Precision::Bf16, format);
                let mut more = 0;
                Weights::layout(&config).for_each(|spec| {
                    let [rows, cols] = spec.matrix_shape();
                    if matches!(format.layout(spec.role), Layout::Packed(packing)
                        if weight::packing(spec.role, Precision::Bf16, format) != Some(packing))
                    {
                        more += rows * cols * 30 / 32;
                    }
                });
                let expected = memory::weight_bytes(&config, format) + more;
                assert_eq!(plan.weights, expected, "{name} {format}");
                assert!(40 * more < plan.weights, "{name} {format}: {more}");
            }
        }
    }

    #[test]
    fn f32_takes_twice_the_matrices() {
        let config = Config::preset("jamba-tales-11m").unwrap();
        let [bf16, f32] = [Precision::Bf16, Precision::F32]
            .map(|p| Plan::new(&config, &LIMITS, p, WeightFormat::Stored).weights);
        assert!((1.9..2.0).contains(&(f32 as f64 / bf16 as f64)), "{f32} and {bf16}");
    }
}
