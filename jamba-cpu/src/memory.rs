//! What a model takes of the machine's memory, asked before it is taken.

use jamba_core::backend::{Backend, Need};
use jamba_core::weights::{ParamSpec, Weights};
use jamba_core::{Config, Result, memory};

/// Refuses what there is no room for; `weight` tells the bytes that a parameter takes, in mapped files or
/// not.
pub(crate) fn check(
    backend: &impl Backend,
    config: &Config,
    need: Need<'_>,
    weight: impl Fn(&ParamSpec, bool) -> u64,
) -> Result<()> {
    match need {
        Need::Weights { mapped } => {
            let mut bytes = 0;
            Weights::layout(config).for_each(|spec| bytes += weight(spec, mapped));
            memory::check("the weights of a model", bytes)
        }
        Need::Runner(limits) => {
            let sequence = backend.sequence_bytes(config, limits.context);
            let states = sequence.saturating_mul(limits.slots as u64);
            let bytes = states.saturating_add(memory::scratch_bytes(config, limits));
            memory::check("states and the activations of a step", bytes)
        }
    }
}
