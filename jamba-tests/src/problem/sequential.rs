//! Problems that go on from a state: what laws are about.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, Config, Result};

use super::Problem;
use super::bench;
use super::ragged::{Feed, Ragged};

/// A problem of rows in, rows out and a state between.
pub(crate) trait Sequential: Problem {
    /// Weights and scratch on the backend.
    type Held<B: Backend>;

    /// A model that has the state.
    fn config(&self) -> Config;

    /// The sequences.
    fn ragged(&self) -> &Ragged;

    /// The same problem of other sequences.
    fn with_ragged(&self, ragged: Ragged) -> Self;

    /// Makes the token in this row another one.
    fn alter(&self, inputs: &mut Recording, row: usize);

    /// Uploads.
    fn hold<B: Backend>(&self, b: &B, inputs: &Recording) -> Result<Self::Held<B>>;

    /// One step: the output rows of these input rows.
    fn step<B: Backend>(
        &self,
        b: &B,
        held: &mut Self::Held<B>,
        inputs: &Recording,
        feeds: &[Feed],
        state: &mut B::State,
    ) -> Result<Recorded>;
}

/// All rows in one step, then all states.
pub(crate) fn run<P: Sequential, B: Backend>(problem: &P, b: &B) -> Result<Recording> {
    let inputs = problem.inputs();
    let (config, ragged) = (problem.config(), problem.ragged());
    let mut held = problem.hold(b, &inputs)?;
    let mut state = bench::state(b, &config, ragged, &inputs)?;
    let mut out = bench::only(problem.step(b, &mut held, &inputs, &ragged.feeds(), &mut state)?);
    bench::read_states(b, &config, &state, bench::held_after(ragged), &mut out)?;
    Ok(out)
}

/// Stages the feeds: every row gets an output.
pub(crate) fn stage<B: Backend>(
    b: &B,
    state: &mut B::State,
    feeds: &[Feed],
    ids: impl Fn(usize) -> u32,
) -> Result<usize> {
    let mut batch = jamba_core::Batch::new();
    for feed in feeds {
        let ids: Vec<u32> = feed.rows.clone().map(&ids).collect();
        batch.push(feed.slot, feed.position, &ids, jamba_core::Outputs::All);
    }
    b.stage(state, &batch)?;
    Ok(batch.tokens().len())
}
