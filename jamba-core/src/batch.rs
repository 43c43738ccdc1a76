//! The tokens of one step: several sequences of different lengths laid end to end.

use crate::backend::Limits;
use crate::config::Config;
use crate::error::{Error, Result};

/// Consecutive tokens of one sequence within a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// State slot of the sequence.
    pub slot: usize,
    /// Position of the run's first token in its sequence: how many tokens the slot holds already.
    pub position: usize,
    /// Number of tokens.
    pub len: usize,
}

/// Where one token of a [`Batch`] belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// State slot of its sequence.
    pub slot: usize,
    /// Its position in its sequence: how many tokens come before it.
    pub position: usize,
}

/// Which tokens of a run get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// None: a chunk of a prompt that is not its last.
    None,
    /// The last.
    Last,
    /// Every one.
    All,
}

/// The tokens of one step. Prompts, parts of prompts and single tokens may share it.
///
/// ```
/// use jamba_core::{Batch, LanguageModel, Limits, Model, Outputs};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let limits = Limits { slots: 2, context: 16, tokens: 8, outputs: 2 };
/// let mut runner = model.runner(limits)?;
/// let mut batch = Batch::new();
/// batch.push(0, 0, &[5, 6, 7], Outputs::None);
/// runner.step(&batch)?;
/// // The first goes on while the second begins.
/// batch.clear();
/// batch.push(0, 3, &[8], Outputs::Last);
/// batch.push(1, 0, &[5, 6], Outputs::Last);
/// runner.step(&batch)?;
/// assert_eq!(runner.logits()?.len(), 2 * model.config().vocab_size);
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    tokens: Vec<u32>,
    runs: Vec<Run>,
    outputs: Vec<usize>,
}

impl Clone for Batch {
    fn clone(&self) -> Self {
        let Self { tokens, runs, outputs } = self;
        Self { tokens: tokens.clone(), runs: runs.clone(), outputs: outputs.clone() }
    }

    /// Keeps the memory, which a derived one does not.
    fn clone_from(&mut self, from: &Self) {
        self.tokens.clone_from(&from.tokens);
        self.runs.clone_from(&from.runs);
        self.outputs.clone_from(&from.outputs);
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch of one run.
    pub fn single(slot: usize, position: usize, tokens: &[u32], outputs: Outputs) -> Self {
        let mut batch = Self::new();
        batch.push(slot, position, tokens, outputs);
        batch
    }

    /// Makes the batch empty, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.runs.clear();
        self.outputs.clear();
    }

    /// Adds a run: the sequence in `slot`, `position` tokens long so far, goes on with `tokens`.
    pub fn push(&mut self, slot: usize, position: usize, tokens: &[u32], outputs: Outputs) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        let end = self.tokens.len();
        self.runs.push(Run { slot, position, len: tokens.len() });
        self.outputs.extend(match outputs {
            Outputs::None => end..end,
            Outputs::Last => end.saturating_sub(1).max(start)..end,
            Outputs::All => start..end,
        });
    }

    /// Token ids, sequences laid end to end.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The runs, in the order of their tokens.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Every token's slot and its position in its sequence, in the order of
    /// [`tokens`](Self::tokens).
    pub fn places(&self) -> impl Iterator<Item = Place> {
        let of = |run: &Run| {
            let Run { slot, position, len } = *run;
            (position..position + len).map(move |position| Place { slot, position })
        };
        self.runs.iter().flat_map(of)
    }

    /// Indices into [`tokens`](Self::tokens) of those that get logits, ascending.
    pub fn outputs(&self) -> &[usize] {
        &self.outputs
    }

    /// Checks that a model of `config` can run the batch within `limits`.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Context`] or [`Error::Batch`].
    pub fn check(&self, config: &Config, limits: &Limits) -> Result<()> {
        let vocab_size = config.vocab_size;
        if let Some(index) = self.tokens.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::Token { id: self.tokens[index], index, vocab_size });
        }
        at_most("number of tokens (SessionOptions::chunk)", self.tokens.len(), limits.tokens)?;
        at_most(
            "number of logit rows (SessionOptions::outputs)",
            self.outputs.len(),
            limits.outputs,
        )?;
        for (i, run) in self.runs.iter().enumerate() {
            at_most("slot", run.slot, limits.slots.saturating_sub(1))?;
            let needed = run.position.saturating_add(run.len);
            if needed > limits.context {
                return Err(Error::Context { needed, allocated: limits.context });
            }
            if self.runs[..i].iter().any(|other| other.slot == run.slot) {
                let allowed = "but only one run of a batch may use a slot".into();
                return Err(Error::Batch { what: "repeated slot", got: run.slot, allowed });
            }
        }
        Ok(())
    }
}

fn at_most(what: &'static str, got: usize, max: usize) -> Result<()> {
    if got <= max {
        Ok(())
    } else {
        Err(Error::Batch { what, got, allowed: format!("but at most {max} is allowed here") })
    }
}
