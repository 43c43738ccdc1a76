//! One sequence on one backend: tokens in, logits out.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::backend::{Limits, StatePart};
use crate::batch::{Batch, Outputs};
use crate::config::Config;
use crate::error::{Error, Result, at_least_one};
use crate::runner::Runner;
use crate::sampler::{Choice, Sampled, Sampler};
use crate::state::{Lineage, Mark};
use crate::trace::{Detail, Listener};

mod rewind;
mod score;
#[cfg(test)]
mod tests;

pub use rewind::Rewound;

/// What a [`Session`] is made for. The default is a context of 4,096 tokens, chunks of 512 and one
/// row of logits. Chunks and outputs that are larger than what they are part of are cut to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Tokens that the sequence may have at most; the KV cache is allocated for them.
    pub context: usize,
    /// Tokens of a prompt that are run in one step. More are faster, take more scratch, and are
    /// waited for longer by whoever cancels.
    pub chunk: usize,
    /// Rows of logits that a step may return: 1 to generate, up to `chunk` to score.
    pub outputs: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { context: 4096, chunk: 512, outputs: 1 }
    }
}

impl SessionOptions {
    /// The limits of a runner for such a session.
    ///
    /// # Errors
    /// [`Error::Option`] where one is zero.
    pub fn limits(&self) -> Result<Limits> {
        at_least_one(&[
            ("context", self.context),
            ("chunk", self.chunk),
            ("outputs", self.outputs),
        ])?;
        let tokens = self.chunk.min(self.context);
        Ok(Limits { slots: 1, context: self.context, tokens, outputs: self.outputs.min(tokens) })
    }
}

/// One sequence: the tokens given so far, as convolution and SSM states and a KV cache.
///
/// Weights, scratch and state cannot be mixed up: a session owns them together. Its state is a
/// value: it can be taken and put back ([`snapshot`](Self::snapshot), [`restore`](Self::restore)),
/// shared by several sessions ([`fork`](Self::fork)), kept in a file ([`save`](Self::save)), and
/// taken back by any number of tokens ([`rewind`](Self::rewind)).
///
/// A session may be sent to another thread, and is used by one at a time. Where a backend computes
/// on a pool of threads (the CPU backend on rayon's), a task of that very pool that waits for a step
/// runs other tasks meanwhile: it must not hold a lock that they take. So do not share a
/// `Mutex<Session>` among rayon tasks; [fork](Self::fork) it, or use an [`Engine`](crate::Engine).
///
/// ```
/// use jamba_core::{LanguageModel, Model, SessionOptions};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let mut session = model.session(SessionOptions { context: 64, ..Default::default() })?;
/// let logits = session.append(&[1, 500, 600])?;
/// assert_eq!(logits.len(), model.config().vocab_size);
///
/// let mut other = session.fork()?;
/// session.append(&[700])?;
/// other.append(&[800])?;
/// session.rewind(1)?;
/// session.append(&[800])?;
/// assert_eq!(session.last_logits(), other.last_logits());
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub struct Session {
    runner: Box<dyn Runner>,
    batch: Batch,
    tokens: Vec<u32>,
    /// Positions at which steps ended, ascending.
    steps: Vec<usize>,
    /// Logits of the last step, row-major; not there where they are still with the backend.
    logits: OnceCell<Vec<f32>>,
    /// The token after the last, where the backend chose it.
    chosen: Option<Sampled>,
    /// Whether the state is that of `tokens`.
    sound: bool,
    lineage: Lineage,
    /// Ascending by position, from where a rewind may go on.
    checkpoints: Vec<Arc<Mark>>,
    checkpoint_every: usize,
}

impl Session {
    pub(crate) fn new(runner: Box<dyn Runner>) -> Self {
        Self {
            runner,
            batch: Batch::new(),
            tokens: Vec::new(),
            steps: Vec::new(),
            logits: Vec::new().into(),
            chosen: None,
            sound: true,
            lineage: Lineage::default(),
            checkpoints: Vec::new(),
            checkpoint_every: 0,
        }
    }

    /// The configuration of the model.
    pub fn config(&self) -> &Config {
        self.runner.config()
    }

    /// Tokens given so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens given so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn context(&self) -> usize {
        self.runner.limits().context
    }

    /// Tokens that one step runs at most.
    pub fn chunk(&self) -> usize {
        self.runner.limits().tokens
    }

    /// Forgets all tokens.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn reset(&mut self) -> Result<()> {
        self.sound = false;
        self.runner.reset(0)?;
        self.tokens.clear();
        self.steps.clear();
        self.set_logits(Vec::new());
        self.lineage.cut(0);
        self.checkpoints.clear();
        self.sound = true;
        Ok(())
    }

    /// Appends tokens, in chunks, and returns the logits after the last: `vocab_size` values.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for no tokens, [`Error::Token`], [`Error::Context`]: the session is
    /// as before. [`Error::NonFinite`], or what the backend reports: the session must be
    /// [`reset`](Self::reset), [rewound](Self::rewind) or [restored](Self::restore); it has the
    /// tokens of the steps before the one that failed.
    pub fn append(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.append_while(tokens, || true)?;
        Ok(self.logits())
    }

    /// As [`append`](Self::append), but returns the next token, which `sampler` chooses and counts.
    /// Where the backend can it is chosen where the logits are: they are read only if they are asked
    /// for afterwards ([`logits`](Self::logits)). What the sampler knows of `tokens` was told
    /// before ([`Sampler::observe_prompt`]).
    ///
    /// # Errors
    /// As `append`, and those of [`Sampler::sample`], after which the tokens are appended.
    pub fn append_sampled(&mut self, tokens: &[u32], sampler: &mut Sampler) -> Result<Sampled> {
        self.append_choosing(tokens, Some(sampler.choice()), || true)?;
        match self.chosen {
            Some(chosen) => {
                sampler.observe(chosen.id);
                Ok(chosen)
            }
            None => sampler.sample(self.last_logits()),
        }
    }

    /// As [`append`](Self::append), but asks `keep_going` before every chunk, and stops where it
    /// says no. Returns how many tokens were appended; [`logits`](Self::logits) are there if all.
    ///
    /// # Errors
    /// As `append`.
    pub fn append_while(
        &mut self,
        tokens: &[u32],
        keep_going: impl FnMut() -> bool,
    ) -> Result<usize> {
        self.append_choosing(tokens, None, keep_going)
    }

    /// [`append_while`](Self::append_while), after which the next token may be
    /// [chosen](Self::take_chosen), if there is a choice; else its logits are read.
    pub(crate) fn append_choosing(
        &mut self,
        tokens: &[u32],
        choice: Option<Choice<'_>>,
        mut keep_going: impl FnMut() -> bool,
    ) -> Result<usize> {
        self.check(tokens)?;
        let mut done = 0;
        while done < tokens.len() && keep_going() {
            let part = &tokens[done..done + self.part(tokens.len() - done, self.chunk())];
            done += part.len();
            let is_last = done == tokens.len();
            let wanted = is_last || self.is_grid_point(self.position() + part.len());
            let outputs = if wanted { Outputs::Last } else { Outputs::None };
            self.run(part, outputs, None, choice.filter(|_| is_last))?;
        }
        Ok(done)
    }

    /// Tokens of the next step, of so many: it ends where a checkpoint is to be kept.
    fn part(&self, tokens: usize, chunk: usize) -> usize {
        let part = tokens.min(chunk);
        match self.position().checked_rem(self.checkpoint_every) {
            Some(past) => part.min(self.checkpoint_every - past),
            None => part,
        }
    }

    /// Whether a checkpoint is to be kept at this position.
    fn is_grid_point(&self, position: usize) -> bool {
        position.checked_rem(self.checkpoint_every) == Some(0)
    }

    /// Logits that the last step returned, rows of `vocab_size`; none after a chunk of a prompt
    /// that was not its last. Those of a step whose next token the backend chose
    /// ([`append_sampled`](Self::append_sampled)) are read now; none if that fails, which then every
    /// other call reports.
    pub fn logits(&self) -> &[f32] {
        self.logits.get_or_init(|| self.runner.logits().unwrap_or_default())
    }

    /// Logits after the last token, `vocab_size` values: the last row of
    /// [`logits`](Self::logits).
    pub fn last_logits(&self) -> &[f32] {
        let logits = self.logits();
        &logits[logits.len().saturating_sub(self.config().vocab_size)..]
    }

    /// The token after the last, if the backend chose it; told once.
    pub(crate) fn take_chosen(&mut self) -> Option<Sampled> {
        self.chosen.take()
    }

    /// Reads the logits that are still with the backend.
    fn read_logits(&self) -> Result<()> {
        if self.logits.get().is_none() {
            let logits = self.runner.logits()?;
            self.logits.get_or_init(|| logits);
        }
        Ok(())
    }

    fn set_logits(&mut self, logits: Vec<f32>) {
        self.logits = logits.into();
        self.chosen = None;
    }

    /// Appends tokens and calls `f` with the logits after each: its index in `tokens`, and
    /// `vocab_size` values. Runs [`SessionOptions::outputs`] tokens in a step.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_each(&mut self, tokens: &[u32], mut f: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        let vocab_size = self.config().vocab_size;
        let chunk = self.runner.limits().outputs;
        let mut done = 0;
        while done < tokens.len() {
            let part = &tokens[done..done + self.part(tokens.len() - done, chunk)];
            self.step(part, Outputs::All, None)?;
            let rows = self.logits().chunks_exact(vocab_size).enumerate();
            rows.for_each(|(row, logits)| f(done + row, logits));
            done += part.len();
        }
        Ok(())
    }

    /// Appends at most [`chunk`](Self::chunk) tokens in one step and tells `listener` every
    /// activation, with as many rows of logits as `outputs` asks for.
    ///
    /// # Errors
    /// As [`append`](Self::append), and [`Error::Batch`] for more tokens or outputs than fit.
    pub fn append_traced(
        &mut self,
        tokens: &[u32],
        outputs: Outputs,
        detail: Detail,
        listener: &mut Listener<'_>,
    ) -> Result<()> {
        self.check(tokens)?;
        self.step(tokens, outputs, Some((detail, listener)))
    }

    /// A part of the state of a layer, in the layout that [`StatePart`] states.
    ///
    /// # Errors
    /// [`Error::NoState`] for a layer without that part, or what the backend reports.
    pub fn read_state(&self, layer: usize, part: StatePart) -> Result<Vec<f32>> {
        self.runner.read_state(layer, part, 0, 0..self.position())
    }

    /// Whether all of `tokens` can be appended; told before any of them is.
    ///
    /// # Errors
    /// As [`append`](Self::append) before it begins.
    pub fn check(&self, tokens: &[u32]) -> Result<()> {
        if !self.sound {
            return Err(Error::Poisoned);
        }
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let vocab_size = self.config().vocab_size;
        if let Some(index) = tokens.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::Token { id: tokens[index], index, vocab_size });
        }
        let (needed, allocated) = (self.position().saturating_add(tokens.len()), self.context());
        if needed > allocated {
            return Err(Error::Context { needed, allocated });
        }
        Ok(())
    }

    fn step(
        &mut self,
        tokens: &[u32],
        outputs: Outputs,
        trace: Option<(Detail, &mut Listener<'_>)>,
    ) -> Result<()> {
        self.run(tokens, outputs, trace, None)
    }

    /// Runs one step; makes a choice of the token after it, or reads its logits.
    fn run(
        &mut self,
        tokens: &[u32],
        outputs: Outputs,
        trace: Option<(Detail, &mut Listener<'_>)>,
        choice: Option<Choice<'_>>,
    ) -> Result<()> {
        let position = self.position() + tokens.len();
        self.batch.clear();
        self.batch.push(0, self.tokens.len(), tokens, outputs);
        self.batch.check(self.runner.config(), &self.runner.limits())?;
        self.sound = false;
        self.set_logits(Vec::new());
        match trace {
            None => self.runner.step(&self.batch)?,
            Some((detail, listener)) => self.runner.step_traced(&self.batch, detail, listener)?,
        }
        match choice {
            Some(choice) => self.choose(position, choice)?,
            None => self.take_logits(position)?,
        }
        self.tokens.extend_from_slice(tokens);
        self.steps.push(position);
        self.sound = true;
        if self.is_grid_point(position) {
            self.mark()?;
        }
        Ok(())
    }

    fn take_logits(&mut self, position: usize) -> Result<()> {
        let logits = self.runner.logits()?;
        if !logits.iter().all(|v| v.is_finite()) {
            return Err(Error::NonFinite { position });
        }
        self.set_logits(logits);
        Ok(())
    }

    fn choose(&mut self, position: usize, choice: Choice<'_>) -> Result<()> {
        let Some(chosen) = self.runner.choose(&[Some(choice)])?.pop().flatten() else {
            return self.take_logits(position);
        };
        self.chosen = Some(chosen);
        self.logits = OnceCell::new();
        Ok(())
    }
}
