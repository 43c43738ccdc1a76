//! What steps a model: its scratch and states, and what each slot holds.

use std::ops::Range;

use crate::backend::{Backend, Limits, Need, Scratch, StatePart};
use crate::batch::Batch;
use crate::compose;
use crate::config::Config;
use crate::error::{Error, Result, at_least_one};
use crate::fingerprint::Fingerprint;
use crate::model::{LanguageModel, Model};
use crate::quant::WeightFormat;
use crate::sampler::{Choice, Sampled};
use crate::schedule::{MixerKind, Schedule};
use crate::spans;
use crate::trace::{Detail, Listener, Traced};
use crate::transfer;

/// A model with scratch and state: runs batches. The rung below [`Session`](crate::Session).
///
/// One prompt, read once and continued in two ways:
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
/// runner.copy_slot(0, 1, 3)?;
/// batch.clear();
/// batch.push(0, 3, &[8], Outputs::Last);
/// batch.push(1, 3, &[9], Outputs::Last);
/// runner.step(&batch)?;
/// let logits = runner.logits()?;
/// let (of_8, of_9) = logits.split_at(model.config().vocab_size);
/// assert_ne!(of_8, of_9);
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub trait Runner: Send {
    /// The configuration of the model.
    fn config(&self) -> &Config;

    /// What was allocated.
    fn limits(&self) -> Limits;

    /// Runs a batch: each run continues the sequence in its slot, at the position where that ends.
    /// Without Mamba layers a run may begin at any earlier position too: the rest is cut off.
    ///
    /// A slot ends where its last step did, or where a [copy](Self::copy_slot) or the convolution
    /// or SSM states that were [written](Self::write_state) say.
    ///
    /// A batch that is refused ([`Batch::check`], or one with a run at another position) changes
    /// nothing. After another error the slots of the batch hold no sequence until they are
    /// [`reset`](Self::reset) or written.
    ///
    /// # Errors
    /// Those of [`Batch::check`], [`Error::Batch`] for a run at another position, or what the
    /// backend reports.
    fn step(&mut self, batch: &Batch) -> Result<()>;

    /// [`step`](Self::step), with every activation told to `listener`.
    ///
    /// # Errors
    /// As `step`.
    fn step_traced(
        &mut self,
        batch: &Batch,
        detail: Detail,
        listener: &mut Listener<'_>,
    ) -> Result<()>;

    /// Logits of the last step: a row of `vocab_size` for every output of its batch.
    ///
    /// # Errors
    /// What the backend reports.
    fn logits(&self) -> Result<Vec<f32>>;

    /// Chooses tokens where the logits are: for every output of the last step's batch there is a
    /// choice, and in its place the token, or `None` where the host is to choose
    /// ([`Backend::choose`]).
    ///
    /// # Errors
    /// What the backend reports.
    fn choose(&self, choices: &[Option<Choice<'_>>]) -> Result<Vec<Option<Sampled>>> {
        Ok(vec![None; choices.len()])
    }

    /// Makes a slot ready for a new sequence.
    ///
    /// # Errors
    /// What the backend reports.
    fn reset(&mut self, slot: usize) -> Result<()>;

    /// [`Backend::read_state`].
    ///
    /// # Errors
    /// [`Error::NoState`], or what the backend reports.
    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>>;

    /// [`Backend::write_state`].
    ///
    /// # Errors
    /// [`Error::NoState`], [`Error::Batch`] for keys and values at positions that do not follow what the
    /// slot holds, or what the backend reports.
    fn write_state(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()>;

    /// [`Backend::copy_slot`].
    ///
    /// # Errors
    /// [`Error::Batch`] or [`Error::Context`] for what does not fit and for more or other positions
    /// than `from` holds, or what the backend reports.
    fn copy_slot(&mut self, from: usize, to: usize, positions: usize) -> Result<()>;

    /// Moves sequences of `positions` tokens between slots, all at once: afterwards slot `i` holds
    /// what slot `sources[i]` held. A slot may be a source several times, or not at all.
    ///
    /// # Errors
    /// As [`copy_slot`](Self::copy_slot).
    fn gather(&mut self, sources: &[usize], positions: usize) -> Result<()> {
        check_slots(sources, &self.limits())?;
        transfer::gather(self, sources, positions)
    }

    /// Tells the model from others.
    fn fingerprint(&self) -> Fingerprint;

    /// [`Backend::weight_format`]. Provided: as they are stored.
    fn weight_format(&self) -> WeightFormat {
        WeightFormat::Stored
    }

    /// [`Backend::sequence_bytes`].
    fn sequence_bytes(&self, positions: usize) -> u64;

    /// [`Backend::is_chunk_invariant`].
    fn is_chunk_invariant(&self) -> bool;

    /// [`Backend::for_each`]. Provided: one after the other.
    fn for_each(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(f);
    }

    /// Another runner of the same model, with limits of its own and all slots empty.
    ///
    /// # Errors
    /// [`Error::Option`], or what the backend reports.
    fn sibling(&self, limits: Limits) -> Result<Box<dyn Runner>>;
}

fn check_slots(slots: &[usize], limits: &Limits) -> Result<()> {
    let beyond = slots.iter().copied().chain(slots.len().checked_sub(1));
    match beyond.max() {
        Some(slot) if slot >= limits.slots => {
            let allowed = format!("but there are {} slots", limits.slots);
            Err(Error::Batch { what: "slot", got: slot, allowed })
        }
        _ => Ok(()),
    }
}

/// The [`Runner`] of a [`Model`].
pub struct ModelRunner<B: Backend> {
    model: Model<B>,
    limits: Limits,
    scratch: Scratch<B::Tensor>,
    state: B::State,
    held: Vec<Held>,
    /// Whether the model has Mamba layers, and attention layers.
    has: [bool; 2],
}

/// What is known of a slot.
#[derive(Clone, Copy)]
struct Held {
    /// Positions that have keys and values, from the first on.
    positions: usize,
    /// Tokens that the convolution and SSM states are after; `None` after a step that failed.
    state: Option<usize>,
}

impl Held {
    const fn tokens(positions: usize) -> Self {
        Self { positions, state: Some(positions) }
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Allocates scratch and state for steps of up to `limits`.
    ///
    /// # Errors
    /// [`Error::Option`] for a limit of zero, or what the backend reports.
    pub fn new(model: Model<B>, limits: Limits) -> Result<Self> {
        at_least_one(&[
            ("slots", limits.slots),
            ("context", limits.context),
            ("tokens", limits.tokens),
            ("outputs", limits.outputs),
        ])?;
        model.backend().check_memory(model.config(), Need::Runner(&limits))?;
        let scratch = Scratch::new(model.backend(), model.config(), &limits)?;
        let state = model.backend().new_state(model.config(), &limits)?;
        let schedule = Schedule::new(model.config());
        let has = [schedule.mamba_layers() > 0, schedule.attention_layers() > 0];
        let held = vec![Held::tokens(0); limits.slots];
        Ok(Self { model, limits, scratch, state, held, has })
    }

    /// Whether a layer has this part of the state.
    fn check_part(&self, layer: usize, part: StatePart) -> Result<()> {
        let schedule = Schedule::new(self.model.config());
        let reason = match (schedule.iter().nth(layer).map(|kind| kind.mixer), part) {
            (Some(MixerKind::Mamba), StatePart::Conv | StatePart::Ssm)
            | (Some(MixerKind::Attention), StatePart::Keys | StatePart::Values) => return Ok(()),
            (Some(MixerKind::Mamba), _) => "it is a Mamba layer, which has Conv and Ssm".into(),
            (Some(MixerKind::Attention), _) => {
                "it is an attention layer, which has Keys and Values".into()
            }
            (None, _) => format!("the model has {} layers", schedule.iter().count()),
        };
        Err(Error::NoState { layer, part, reason })
    }

    /// Whether a slot holds a sequence that goes on after so many tokens.
    fn check_position(&self, slot: usize, position: usize) -> Result<()> {
        let held = &self.held[slot];
        let [has_mamba, has_attention] = self.has;
        let fits = (!has_mamba || held.state == Some(position))
            && (!has_attention || position <= held.positions);
        if fits {
            return Ok(());
        }
        let allowed = match if has_mamba { held.state } else { Some(held.positions) } {
            Some(tokens) => format!("but slot {slot} holds {tokens} tokens"),
            None => format!("but a step of slot {slot} failed: reset it, or write a state"),
        };
        Err(Error::Batch { what: "position", got: position, allowed })
    }

    /// Runs a batch that `run` computes, and keeps account of what the slots hold.
    fn account(&mut self, batch: &Batch, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        batch.check(self.model.config(), &self.limits)?;
        batch.runs().iter().try_for_each(|run| self.check_position(run.slot, run.position))?;
        for run in batch.runs() {
            self.held[run.slot] = Held { positions: run.position, state: None };
        }
        let _span = spans::step(batch);
        run(self)?;
        for run in batch.runs() {
            self.held[run.slot] = Held::tokens(run.position + run.len);
        }
        Ok(())
    }
}

impl<B: Backend + Send + Sync + 'static> Runner for ModelRunner<B> {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        self.account(batch, |this| {
            let (backend, config) = (this.model.backend(), this.model.config());
            let weights = this.model.weights();
            backend.stage(&mut this.state, batch)?;
            backend.forward(config, weights, &mut this.scratch, &mut this.state)
        })
    }

    fn step_traced(
        &mut self,
        batch: &Batch,
        detail: Detail,
        listener: &mut Listener<'_>,
    ) -> Result<()> {
        self.account(batch, |this| {
            let (backend, config) = (this.model.backend(), this.model.config());
            let weights = this.model.weights();
            backend.stage(&mut this.state, batch)?;
            let mut forward = |at, shape: [usize; 2], values: &[f32]| listener(at, shape, values);
            let traced = Traced::new(backend, detail, &mut forward);
            compose::forward(&traced, config, weights, &mut this.scratch, &mut this.state)
        })
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let backend = self.model.backend();
        backend.read(compose::all(backend, &self.scratch.logits))
    }

    fn choose(&self, choices: &[Option<Choice<'_>>]) -> Result<Vec<Option<Sampled>>> {
        self.model.backend().choose(&self.scratch.logits, choices)
    }

    fn reset(&mut self, slot: usize) -> Result<()> {
        check_slots(&[slot], &self.limits)?;
        self.model.backend().reset_slot(&mut self.state, slot)?;
        self.held[slot] = Held::tokens(0);
        Ok(())
    }

    fn read_state(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        self.check_part(layer, part)?;
        self.model.backend().read_state(&self.state, layer, part, slot, positions)
    }

    fn write_state(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        self.check_part(layer, part)?;
        check_slots(&[slot], &self.limits)?;
        let (held, end) = (self.held[slot].positions, positions.end);
        let is_mamba = matches!(part, StatePart::Conv | StatePart::Ssm);
        if !is_mamba && positions.start > held {
            let allowed = format!("but slot {slot} has keys and values of {held}");
            return Err(Error::Batch { what: "first position", got: positions.start, allowed });
        }
        let backend = self.model.backend();
        backend.write_state(&mut self.state, layer, part, slot, positions, values)?;
        match is_mamba {
            true => self.held[slot].state = Some(end),
            false => self.held[slot].positions = held.max(end),
        }
        Ok(())
    }

    fn copy_slot(&mut self, from: usize, to: usize, positions: usize) -> Result<()> {
        check_slots(&[from.max(to)], &self.limits)?;
        if positions > self.limits.context {
            return Err(Error::Context { needed: positions, allocated: self.limits.context });
        }
        self.check_position(from, positions)?;
        let (backend, config) = (self.model.backend(), self.model.config());
        self.held[to] = Held { positions: 0, state: None };
        backend.copy_slot(config, &mut self.state, from, to, positions)?;
        self.held[to] = Held::tokens(positions);
        Ok(())
    }

    fn fingerprint(&self) -> Fingerprint {
        self.model.fingerprint()
    }

    fn weight_format(&self) -> WeightFormat {
        self.model.backend().weight_format()
    }

    fn sequence_bytes(&self, positions: usize) -> u64 {
        self.model.backend().sequence_bytes(self.model.config(), positions)
    }

    fn is_chunk_invariant(&self) -> bool {
        self.model.backend().is_chunk_invariant()
    }

    fn for_each(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.model.backend().for_each(tasks, f);
    }

    fn sibling(&self, limits: Limits) -> Result<Box<dyn Runner>> {
        self.model.runner(limits)
    }
}
