//! The reading of a prompt and the generation of tokens, measured beside what the machine can do.

use std::fmt;
use std::num::NonZeroUsize;
use std::time::Instant;

use jamba_core::cost::{Cost, Span, StateBytes};
use jamba_core::random::RandomParams;
use jamba_core::{
    Batch, Config, Dtype, Error, LanguageModel, Layout, Outputs, Result, Role, Runner, Sampler,
    Sampling, WeightFormat,
};
use serde_json::{Value, json};

use crate::BackendName;
use crate::machine::{Limit, Machine};

/// A preset, or so many of its layers, and what that is called.
///
/// # Errors
/// [`Error::UnknownPreset`].
pub fn preset(name: &str, layers: Option<NonZeroUsize>) -> Result<(String, Config)> {
    let mut config = Config::preset(name)?;
    let all = config.num_hidden_layers;
    config.num_hidden_layers = layers.map_or(all, NonZeroUsize::get);
    let title = match config.num_hidden_layers {
        kept if kept == all => name.to_lowercase(),
        kept => format!("{kept} of {all} layers of {}", name.to_lowercase()),
    };
    Ok((title, config))
}

/// A model of this shape with random weights, drawn in bf16.
///
/// # Errors
/// As [`BackendName::model`].
pub fn random_model(
    backend: BackendName,
    config: Config,
    format: WeightFormat,
    seed: u64,
) -> Result<Box<dyn LanguageModel>> {
    backend.model(config, &RandomParams { seed, dtype: Dtype::Bf16 }, format)
}

/// A model as a backend keeps it, which decides what a step reads.
#[derive(Clone, Debug)]
pub struct Kept {
    config: Config,
    backend: BackendName,
    format: WeightFormat,
}

impl Kept {
    /// The model of a valid `config` in this format, which the backend may keep otherwise.
    pub fn new(backend: BackendName, config: &Config, format: WeightFormat) -> Self {
        let mut config = config.clone();
        config.dtype = match backend {
            BackendName::Cuda => Some(Dtype::Bf16),
            BackendName::Cpu | BackendName::CpuF32 => config.dtype,
            BackendName::CudaF32 | BackendName::Reference => Some(Dtype::F32),
        };
        Self { config, backend, format }
    }

    /// How the parameters of a role are kept.
    fn layout(&self, role: Role) -> Layout {
        match self.backend {
            #[cfg(feature = "cuda")]
            BackendName::Cuda => jamba_cuda::layout(role, jamba_cuda::Precision::Bf16, self.format),
            #[cfg(feature = "cuda")]
            BackendName::CudaF32 => {
                jamba_cuda::layout(role, jamba_cuda::Precision::F32, self.format)
            }
            // What it quantises it keeps dequantised.
            BackendName::Reference => WeightFormat::Stored.layout(role),
            _ => self.format.layout(role),
        }
    }

    /// What a step of these sequences must do.
    pub fn cost(&self, state: StateBytes, sequences: &[Span]) -> Cost {
        Cost::new(&self.config, |role| self.layout(role), state, sequences)
    }
}

/// A model that reads and generates random text: experts are used as evenly as the router allows.
pub struct Subject<'a> {
    model: &'a dyn LanguageModel,
    machine: &'a Machine,
    kept: Kept,
    sampler: Sampler,
    seed: u64,
}

impl<'a> Subject<'a> {
    /// A model on the machine of its backend; its tokens are chosen as `sampling` says, whose seed is
    /// that of the text too.
    ///
    /// # Errors
    /// [`Error::Option`] for a sampling that makes no sense.
    pub fn new(
        model: &'a dyn LanguageModel,
        (machine, backend): (&'a Machine, BackendName),
        sampling: Sampling,
    ) -> Result<Self> {
        let kept = Kept::new(backend, model.config(), model.weight_format());
        let seed = sampling.seed;
        let sampler = Sampler::new(sampling, model.config().vocab_size)?;
        Ok(Self { model, machine, kept, sampler, seed })
    }

    /// The model.
    pub fn model(&self) -> &'a dyn LanguageModel {
        self.model
    }

    /// Reads a text of so many tokens in slot 0, from its beginning, and chooses the next: the median
    /// of so many runs, after one that does not count and ends with the first step. The slot holds the
    /// text afterwards.
    ///
    /// # Errors
    /// What the runner reports.
    pub fn prefill(&self, runner: &mut dyn Runner, tokens: usize, runs: usize) -> Result<Phase> {
        let chunk = runner.limits().tokens.min(tokens);
        let mut read = |tokens| {
            runner.reset(0)?;
            self.read(runner, tokens)?;
            self.choose(runner, 1)
        };
        read(chunk)?;
        let seconds = median(runs, || read(tokens))?;
        let state = state_bytes(runner);
        let chunks = (0..tokens).step_by(chunk.max(1)).map(|past| {
            let end = tokens.min(past + chunk);
            let outputs = usize::from(end == tokens);
            self.kept.cost(state, &[Span { past, tokens: end - past, outputs }])
        });
        let limit = self.machine.limit(chunks.clone());
        let cost = chunks.sum();
        Ok(Phase { name: "prefill", batch: 1, past: 0, tokens, seconds, cost, limit })
    }

    /// Runs the first tokens of a text in slot 0, which is empty, in steps as long as the limits allow;
    /// the last has logits.
    ///
    /// # Errors
    /// What the runner reports.
    pub fn read(&self, runner: &mut dyn Runner, tokens: usize) -> Result<()> {
        let chunk = runner.limits().tokens;
        for past in (0..tokens).step_by(chunk) {
            let end = tokens.min(past + chunk);
            let ids: Vec<u32> = (past..end).map(|position| self.id(0, position)).collect();
            let outputs = if end == tokens { Outputs::Last } else { Outputs::None };
            runner.step(&Batch::single(0, past, &ids, outputs))?;
        }
        Ok(())
    }

    /// Gives every slot the `past` tokens that slot 0 holds.
    ///
    /// # Errors
    /// What the runner reports.
    pub fn share(&self, runner: &mut dyn Runner, past: usize) -> Result<()> {
        (1..runner.limits().slots).try_for_each(|slot| runner.copy_slot(0, slot, past))
    }

    /// Generates in all slots, which hold `past` tokens: the median of `runs` of so many steps, after
    /// as many that do not count. Every sequence goes on with tokens of its own.
    ///
    /// # Errors
    /// What the runner reports.
    pub fn decode(
        &self,
        runner: &mut dyn Runner,
        past: usize,
        steps: usize,
        runs: usize,
    ) -> Result<Phase> {
        let mut position = past;
        let mut work = || {
            for _ in 0..steps {
                self.step(runner, position)?;
                position += 1;
            }
            Ok(())
        };
        work()?;
        let seconds = median(runs, work)? / steps as f64;
        // In the middle of what was measured.
        Ok(self.decoded("decode", runner, past + steps + steps * runs / 2, seconds))
    }

    /// Generates in all slots, which hold `past` tokens, for so many steps: the median times of the
    /// first 1,000 and of the last (of half the steps, where they are fewer).
    ///
    /// # Errors
    /// What the runner reports.
    pub fn endure(&self, runner: &mut dyn Runner, past: usize, steps: usize) -> Result<[Phase; 2]> {
        let mut seconds = Vec::with_capacity(steps);
        for position in past..past + steps {
            let start = Instant::now();
            self.step(runner, position)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let part = ENDS.min(steps.div_ceil(2));
        let mut ends = [seconds[..part].to_vec(), seconds[steps - part..].to_vec()];
        let [first, last] = ends.each_mut().map(|seconds| middle(seconds));
        let at_last = past + steps - part / 2;
        Ok([
            self.decoded("first", runner, past + part / 2, first),
            self.decoded("last", runner, at_last, last),
        ])
    }

    /// One token at this position in every slot, and the choice of those that follow.
    ///
    /// # Errors
    /// What the runner reports.
    pub fn step(&self, runner: &mut dyn Runner, position: usize) -> Result<()> {
        let slots = runner.limits().slots;
        let mut batch = Batch::new();
        for slot in 0..slots {
            batch.push(slot, position, &[self.id(slot, position)], Outputs::Last);
        }
        runner.step(&batch)?;
        self.choose(runner, slots)
    }

    fn decoded(&self, name: &'static str, runner: &dyn Runner, past: usize, seconds: f64) -> Phase {
        let batch = runner.limits().slots;
        let spans = vec![Span { past, tokens: 1, outputs: 1 }; batch];
        let cost = self.kept.cost(state_bytes(runner), &spans);
        let limit = self.machine.limit([cost]);
        Phase { name, batch, past, tokens: batch, seconds, cost, limit }
    }

    /// Takes from a step what a generator does: a token of each sequence.
    fn choose(&self, runner: &dyn Runner, outputs: usize) -> Result<()> {
        let choices = vec![Some(self.sampler.choice()); outputs];
        if runner.choose(&choices)?.iter().all(Option::is_some) {
            return Ok(());
        }
        let logits = runner.logits()?;
        let rows = logits.chunks_exact(runner.config().vocab_size).zip(choices.iter().flatten());
        rows.map(|(row, choice)| choice.sample(row)).try_for_each(|chosen| chosen.map(drop))
    }

    /// A token of the random text of a sequence: Weyl's sequence, ids all over the vocabulary.
    fn id(&self, slot: usize, position: usize) -> u32 {
        let n = self.seed.wrapping_add(((slot as u64) << 32) + position as u64 + 1);
        let hash = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash ^ (hash >> 29)) % self.model.config().vocab_size as u64) as u32
    }
}

/// Steps at either end of many whose times are told.
const ENDS: usize = 1_000;

fn state_bytes(runner: &dyn Runner) -> StateBytes {
    let empty = runner.sequence_bytes(0);
    StateBytes { empty, per_token: runner.sequence_bytes(1) - empty }
}

fn median(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(middle(&mut seconds))
}

/// The median; 0 of nothing.
fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Whether an error says that a model or a runner of it is too large for the machine.
pub fn is_too_large(error: &Error) -> bool {
    match error {
        Error::Memory { .. } => true,
        #[cfg(feature = "cuda")]
        Error::Device { source, .. } => matches!(
            source.downcast_ref(),
            Some(jamba_cuda::Error::DoesNotFit(_) | jamba_cuda::Error::OutOfMemory { .. })
        ),
        _ => false,
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Phase {
    /// `prefill` or `decode`; `first` and `last` of many steps.
    pub name: &'static str,
    /// Sequences.
    pub batch: usize,
    /// Tokens that each has before.
    pub past: usize,
    /// Tokens in `seconds`, of all sequences.
    pub tokens: usize,
    /// A prompt's time, or a step's.
    pub seconds: f64,
    /// What it must do.
    pub cost: Cost,
    /// The least time of that.
    pub limit: Limit,
}

impl Phase {
    /// The heads of the columns that a phase is shown in.
    pub const TITLE: &str =
        "phase    batch    past      ms  tokens/s    GB/s  TFLOP/s     limit ms\n";

    /// Of all sequences together.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn share(&self) -> f64 {
        self.limit.seconds / self.seconds
    }

    /// All of it.
    pub fn json(&self) -> Value {
        json!({
            "phase": self.name,
            "batch": self.batch,
            "past": self.past,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second(),
            "bytes": self.cost.bytes,
            "operations": self.cost.operations,
            "gb_per_second": self.cost.bytes / self.seconds / 1e9,
            "tflop_per_second": self.cost.operations / self.seconds / 1e12,
            "limit_seconds": self.limit.seconds,
            "limited_by": self.limit.by,
            "share_of_limit": self.share(),
        })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self { name, batch, past, seconds, cost, ref limit, .. } = self;
        writeln!(
            f,
            "{name:<8} {batch:>5} {past:>7} {:>7.2} {:>9.1} {:>7.1} {:>8.3} {:>8.2} {:<8} {:>3.0} %",
            1e3 * seconds,
            self.tokens_per_second(),
            cost.bytes / seconds / 1e9,
            cost.operations / seconds / 1e12,
            1e3 * limit.seconds,
            limit.by,
            100.0 * self.share()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backend_keeps_otherwise_counts_so() {
        let config = Config::preset("jamba-tales-11m").unwrap();
        let state = StateBytes { empty: 0, per_token: 0 };
        let step = [Span { past: 0, tokens: 1, outputs: 1 }];
        let bytes = |backend, format| Kept::new(backend, &config, format).cost(state, &step).bytes;
        use BackendName::{Cpu, Reference};
        use WeightFormat::{Int4, Int8, Stored};
        assert_eq!(bytes(Reference, Int4), bytes(Reference, Stored));
        assert!(bytes(Cpu, Int4) < bytes(Cpu, Int8) && bytes(Cpu, Int8) < bytes(Cpu, Stored));
        #[cfg(feature = "cuda")]
        {
            use BackendName::{Cuda, CudaF32};
            assert_eq!(bytes(CudaF32, Int4), bytes(Reference, Stored));
            // Of seven layers x_proj and dt_proj, the rows of which are half a block.
            let (x_proj, dt_proj) = (48 * 512, 512 * 16);
            let (wide, packed) = (2 * (x_proj + dt_proj), x_proj / 32 * 34 + dt_proj / 16 * 34);
            let more = f64::from(7 * (wide - packed));
            assert_eq!(bytes(Cuda, Int8) - bytes(Cpu, Int8), more);
            assert_eq!(
                bytes(Cuda, WeightFormat::ExpertsInt8),
                bytes(Cpu, WeightFormat::ExpertsInt8)
            );
        }
    }

    #[test]
    fn medians() {
        assert_eq!(middle(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(middle(&mut []), 0.0);
    }
}
