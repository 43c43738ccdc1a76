//! Beam search: several continuations at once, each in a slot of its own.

use std::cmp::Ordering;

use crate::backend::Limits;
use crate::batch::{Batch, Outputs};
use crate::error::{Error, Result, at_least_one};
use crate::generate::Hold;
use crate::model::LanguageModel;
use crate::runner::Runner;

/// Tokens of the prompt that are run in one step.
const CHUNK: usize = 512;

/// How [`beam_search`] searches.
#[derive(Clone, Debug, PartialEq)]
pub struct BeamOptions {
    /// Continuations that are followed at the same time, and returned. 1 is greedy.
    pub beams: usize,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// A continuation's score is the sum of its log-probabilities divided by the number of its
    /// tokens to this power. Above 0 it favours long ones, below 0 short ones.
    pub length_penalty: f32,
    /// Whether to end when there are `beams` finished continuations. If not, the search goes on
    /// while the best that is not finished could still be better than the worst that is, at its
    /// present length.
    pub early_stopping: bool,
    /// Tokens that end a continuation, instead of the model's.
    pub eos_token_ids: Option<Vec<u32>>,
    /// What every continuation must follow ([`GenerateOptions::grammar`](crate::GenerateOptions)).
    #[cfg(feature = "structured")]
    pub grammar: Option<crate::grammar::Grammar>,
}

impl Default for BeamOptions {
    fn default() -> Self {
        Self {
            beams: 4,
            max_tokens: 64,
            length_penalty: 1.0,
            early_stopping: false,
            eos_token_ids: None,
            #[cfg(feature = "structured")]
            grammar: None,
        }
    }
}

/// A continuation that beam search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// Its tokens, the end-of-text token included.
    pub ids: Vec<u32>,
    /// See [`BeamOptions::length_penalty`].
    pub score: f64,
}

/// A continuation that is not finished.
#[derive(Clone, Default)]
struct Beam {
    ids: Vec<u32>,
    /// Sum of the log-probabilities.
    sum: f64,
    hold: Hold,
}

/// A beam and a token after it.
#[derive(Clone, Copy)]
struct Candidate {
    beam: usize,
    id: u32,
    sum: f64,
}

impl Candidate {
    /// The more probable first, of equals the lower beam and the lower id.
    fn rank(&self, other: &Self) -> Ordering {
        let by_sum = other.sum.total_cmp(&self.sum);
        by_sum.then(self.beam.cmp(&other.beam)).then(self.id.cmp(&other.id))
    }
}

/// The most probable continuations of `prompt` that a beam search finds, best first: at most
/// [`BeamOptions::beams`]. The search is that of transformers (`num_beams` without sampling).
///
/// ```
/// use jamba_core::{BeamOptions, Model, Tokenizer, beam_search};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let tokenizer = Tokenizer::from_folder(folder)?;
/// let options = BeamOptions { beams: 3, max_tokens: 8, ..BeamOptions::default() };
/// let found = beam_search(&model, &tokenizer.encode("Once upon a time")?, &options)?;
/// assert_eq!(found.len(), 3);
/// assert!(found.is_sorted_by(|a, b| a.score >= b.score));
/// println!("{}", tokenizer.decode(&found[0].ids)?);
/// # Ok::<(), jamba_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Option`], [`Error::EmptyPrompt`], [`Error::Token`], [`Error::NonFinite`], or what the
/// backend reports.
pub fn beam_search(
    model: &dyn LanguageModel,
    prompt: &[u32],
    options: &BeamOptions,
) -> Result<Vec<Hypothesis>> {
    let &BeamOptions { beams, max_tokens, .. } = options;
    at_least_one(&[("beams", beams), ("max_tokens", max_tokens)])?;
    if !options.length_penalty.is_finite() {
        let value = options.length_penalty.to_string();
        let allowed = "it must be finite";
        return Err(Error::Option { option: "length_penalty", value, allowed });
    }
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let context = prompt.len().saturating_add(max_tokens);
    let tokens = prompt.len().min(CHUNK).max(beams);
    let limits = Limits { slots: beams, context, tokens, outputs: beams };
    let mut runner = model.runner(limits)?;
    let logits = read_prompt(&mut *runner, prompt, tokens)?;
    let eos = options.eos_token_ids.as_ref().unwrap_or(&model.config().eos_token_ids);
    #[cfg(feature = "structured")]
    let hold = Hold::new(options.grammar.as_ref(), None, model.config())?;
    #[cfg(not(feature = "structured"))]
    let hold = Hold::default();
    let first = Beam { hold, ..Beam::default() };
    Search { options, eos, running: vec![first], finished: Vec::new() }.run(
        &mut *runner,
        prompt.len(),
        logits,
    )
}

fn read_prompt(runner: &mut dyn Runner, prompt: &[u32], tokens: usize) -> Result<Vec<f32>> {
    let mut position = 0;
    for part in prompt.chunks(tokens) {
        let last = position + part.len() == prompt.len();
        let outputs = if last { Outputs::Last } else { Outputs::None };
        runner.step(&Batch::single(0, position, part, outputs))?;
        position += part.len();
    }
    runner.logits()
}

struct Search<'a> {
    options: &'a BeamOptions,
    eos: &'a [u32],
    /// Best first; each is in the slot of its index.
    running: Vec<Beam>,
    /// Best first.
    finished: Vec<Hypothesis>,
}

impl Search<'_> {
    /// `logits` are those of the running beams, which are `position` tokens long.
    fn run(
        mut self,
        runner: &mut dyn Runner,
        mut position: usize,
        mut logits: Vec<f32>,
    ) -> Result<Vec<Hypothesis>> {
        let mut batch = Batch::new();
        loop {
            if !logits.iter().all(|v| v.is_finite()) {
                return Err(Error::NonFinite { position });
            }
            let sources = self.choose(&logits)?;
            if self.is_done() {
                return Ok(self.finished);
            }
            runner.gather(&sources, position)?;
            batch.clear();
            for (slot, beam) in self.running.iter().enumerate() {
                let last = beam.ids.last().copied().into_iter().collect::<Vec<_>>();
                batch.push(slot, position, &last, Outputs::Last);
            }
            runner.step(&batch)?;
            logits = runner.logits()?;
            position += 1;
        }
    }

    /// Takes the next token of every beam. Returns from which slot each of the new ones comes.
    fn choose(&mut self, logits: &[f32]) -> Result<Vec<usize>> {
        let &BeamOptions { beams, max_tokens, .. } = self.options;
        let len = self.running.first().map_or(0, |beam| beam.ids.len()) + 1;
        let mut running = Vec::new();
        let mut sources = Vec::new();
        let is_open = !self.is_full() || !self.stops_early();
        // Those that end must leave enough that go on.
        let kept = beams.saturating_mul(2.max(1 + self.eos.len()));
        for (rank, candidate) in self.candidates(logits, kept)?.into_iter().enumerate() {
            let Candidate { beam, id, sum } = candidate;
            let ids = || [&self.running[beam].ids[..], &[id]].concat();
            let mut hold = self.running[beam].hold.clone();
            let is_complete = hold.push(id, self.eos)?;
            if !self.eos.contains(&id) && !is_complete && len < max_tokens {
                if running.len() < beams {
                    running.push(Beam { ids: ids(), sum, hold });
                    sources.push(beam);
                }
            } else if rank < beams && is_open {
                let score = sum / self.length(len);
                let hypothesis = Hypothesis { ids: ids(), score };
                let at = self.finished.partition_point(|other| other.score >= score);
                self.finished.insert(at, hypothesis);
                self.finished.truncate(beams);
            }
        }
        self.running = running;
        Ok(sources)
    }

    /// The most probable pairs of a beam and its next token, best first.
    fn candidates(&mut self, logits: &[f32], kept: usize) -> Result<Vec<Candidate>> {
        let vocab_size = logits.len() / self.running.len().max(1);
        let mut all = Vec::with_capacity(logits.len());
        let rows = logits.chunks_exact(vocab_size.max(1));
        for (beam, (row, Beam { sum, hold, .. })) in rows.zip(&mut self.running).enumerate() {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
            let normaliser = f64::from(max) + total.ln();
            let allowed = hold.mask(self.eos)?;
            let may_come = |id: u32| {
                let word = |allowed: &[u32]| allowed.get(id as usize / 32).copied().unwrap_or(0);
                allowed.is_none_or(|allowed| word(allowed) >> (id % 32) & 1 == 1)
            };
            all.extend((0..).zip(row).filter(|(id, _)| may_come(*id)).map(|(id, logit)| {
                Candidate { beam, id, sum: *sum + f64::from(*logit) - normaliser }
            }));
        }
        if kept < all.len() {
            all.select_nth_unstable_by(kept, Candidate::rank);
            all.truncate(kept);
        }
        all.sort_unstable_by(Candidate::rank);
        Ok(all)
    }

    fn length(&self, tokens: usize) -> f64 {
        (tokens as f64).powf(self.options.length_penalty.into())
    }

    fn is_full(&self) -> bool {
        self.finished.len() >= self.options.beams
    }

    /// One beam is greedy: it ends with its first end-of-text token.
    fn stops_early(&self) -> bool {
        self.options.early_stopping || self.options.beams == 1
    }

    fn is_done(&self) -> bool {
        let Some(best) = self.running.first() else { return true };
        let Some(worst) = self.finished.last().filter(|_| self.is_full()) else { return false };
        self.stops_early() || best.sum / self.length(best.ids.len()) <= worst.score
    }
}
