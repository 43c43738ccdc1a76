//! How fast a model is, beside what the machine can do.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::cost::{Cost, Span, StateBytes};
use jamba_core::random::RandomParams;
use jamba_core::{
    Batch, Checkpoint, Config, Dtype, Error, LanguageModel, Limits, Outputs, Result, Runner,
    Sampler, Sampling, WeightFormat,
};
use jamba_examples::machine::{Limit, Machine, device_used, host_peak, profile};
use jamba_examples::{BackendName, model_folder, print, run};
use serde_json::{Value, json};

/// Measures the reading of a prompt and the generation of tokens, and says which share of the
/// machine's limits they reach.
///
/// GB/s and TFLOP/s count what the model must move and compute at least: weights that are used,
/// states, matrix products, attention, scan. The limit is the time that this takes at the bandwidth
/// and the rate of products that are measured in the same run.
///
/// Times are medians. The tokens are random: experts are used as evenly as the router allows.
#[derive(Parser)]
struct Args {
    /// Folder with config.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR", conflicts_with = "preset")]
    model: Option<PathBuf>,
    /// The shape of a published model, with random weights in bf16.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Seed of the random weights and tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Layers of the preset to keep.
    #[arg(long, value_name = "N", requires = "preset")]
    layers: Option<std::num::NonZeroUsize>,
    /// Where to run. The CPU backends use as many threads as RAYON_NUM_THREADS says.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// Tokens of the prompt; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens of a step of the prompt.
    #[arg(long, value_name = "N", default_value = "8192")]
    chunk: std::num::NonZeroUsize,
    /// Tokens to generate in each sequence; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 32)]
    generate: usize,
    /// Sequences that generate at the same time; several numbers are measured one after another.
    #[arg(long, value_name = "N[,N..]", value_delimiter = ',', default_value = "1")]
    batch: Vec<std::num::NonZeroUsize>,
    /// Tokens that every sequence has before it generates [default: the prompt].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// How the tokens that a step gives are chosen; 0 takes the most probable ones. (They are not the
    /// next to be run.)
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Choose among so many most probable tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Choose among the most probable tokens that have this share together.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// How many times each is measured, after once that does not count.
    #[arg(long, value_name = "N", default_value = "3")]
    runs: std::num::NonZeroUsize,
    /// Shows after each phase what every kernel of one more of its steps takes (GPUs only).
    #[arg(long)]
    profile: bool,
    /// Writes all numbers to a file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    run(|| bench(&Args::parse()))
}

fn bench(args: &Args) -> Result<()> {
    let machine = Machine::measure(args.backend)?;
    let start = Instant::now();
    let (name, model) = load(args)?;
    let load_seconds = start.elapsed().as_secs_f64();
    print(&format!(
        "{name}, weights {}, on {}\n{machine}\nready in {load_seconds:.1} s\n\n{}",
        args.quant,
        args.backend,
        Phase::TITLE
    ))?;

    let (kept, format) = kept(args.backend, model.config(), args.quant);
    let Args { temperature, top_k, top_p, .. } = *args;
    let sampling = Sampling { temperature, top_k, top_p, seed: args.seed, ..Sampling::default() };
    let sampler = Sampler::new(sampling, model.config().vocab_size)?;
    let bench = Bench { args, model: &*model, machine: &machine, kept: &kept, format, sampler };
    let (mut phases, mut device) = (Vec::new(), device_used(args.backend)?);
    let mut show = |(phase, used): (Phase, Option<u64>)| {
        phases.push(phase.json());
        device = device.max(used);
        print(&phase.to_string())
    };
    if args.prompt > 0 {
        show(bench.prefill()?)?;
    }
    if args.generate > 0 {
        args.batch.iter().try_for_each(|batch| show(bench.decode(batch.get())?))?;
    }

    let host = host_peak();
    let gib = |bytes: Option<u64>, of: &str| {
        bytes.map_or(String::new(), |n| format!("  {of} {:.2} GiB", n as f64 / f64::from(1 << 30)))
    };
    print(&format!("\nmemory at most:{}{}\n", gib(host, "host"), gib(device, "device")))?;
    let Some(path) = &args.json else { return Ok(()) };
    let all = json!({
        "model": name,
        "backend": args.backend.to_string(),
        "weights": args.quant.name(),
        "machine": machine.json(),
        "load_seconds": load_seconds,
        "phases": phases,
        "host_bytes": host,
        "device_bytes": device,
    });
    std::fs::write(path, format!("{all:#}\n"))
        .map_err(|source| Error::Io { path: path.clone(), source })
}

fn load(args: &Args) -> Result<(String, Box<dyn LanguageModel>)> {
    let Some(name) = &args.preset else {
        let folder = model_folder(args.model.as_deref())?;
        let (config, checkpoint) = (Config::from_folder(&folder)?, Checkpoint::open(&folder)?);
        let model = args.backend.model(config, &checkpoint, args.quant)?;
        return Ok((folder.display().to_string(), model));
    };
    let mut config = Config::preset(name)?;
    let all = config.num_hidden_layers;
    config.num_hidden_layers = args.layers.map_or(all, std::num::NonZeroUsize::get);
    let title = match config.num_hidden_layers {
        kept if kept == all => format!("{name}, random weights"),
        kept => format!("{kept} of {all} layers of {name}, random weights"),
    };
    let source = RandomParams { seed: args.seed, dtype: Dtype::Bf16 };
    Ok((title, args.backend.model(config, &source, args.quant)?))
}

/// The model and the format as the backend keeps them, which decides what a step reads.
fn kept(backend: BackendName, config: &Config, format: WeightFormat) -> (Config, WeightFormat) {
    let mut kept = config.clone();
    let (dtype, format) = match backend {
        BackendName::Cuda => (Some(Dtype::Bf16), format),
        BackendName::Cpu | BackendName::CpuF32 => (config.dtype, format),
        BackendName::CudaF32 => (Some(Dtype::F32), format),
        // What it quantises it keeps dequantised.
        BackendName::Reference => (Some(Dtype::F32), WeightFormat::Stored),
    };
    kept.dtype = dtype;
    (kept, format)
}

struct Bench<'a> {
    args: &'a Args,
    model: &'a dyn LanguageModel,
    machine: &'a Machine,
    kept: &'a Config,
    format: WeightFormat,
    sampler: Sampler,
}

impl Bench<'_> {
    /// One sequence from the start.
    fn prefill(&self) -> Result<(Phase, Option<u64>)> {
        let &Args { prompt, .. } = self.args;
        let tokens = self.args.chunk.get().min(prompt);
        let mut runner =
            self.model.runner(Limits { slots: 1, context: prompt, tokens, outputs: 1 })?;
        let seconds = median(self.args.runs.get(), || {
            runner.reset(0)?;
            self.read(&mut *runner, prompt, true)
        })?;
        self.profile(|| {
            runner.reset(0)?;
            self.read(&mut *runner, prompt, false)
        })?;
        let state = state_bytes(&*runner);
        let chunks = (0..prompt).step_by(tokens).map(|past| {
            let tokens = tokens.min(prompt - past);
            let outputs = usize::from(past + tokens == prompt);
            Cost::new(self.kept, self.format, state, &[Span { past, tokens, outputs }])
        });
        let limit = self.machine.limit(chunks.clone());
        let cost = chunks.sum();
        let used = device_used(self.args.backend)?;
        Ok((
            Phase { name: "prefill", batch: 1, past: 0, tokens: prompt, seconds, cost, limit },
            used,
        ))
    }

    /// Runs the first tokens of the sequence in slot 0.
    fn read(&self, runner: &mut dyn Runner, tokens: usize, with_logits: bool) -> Result<()> {
        let chunk = runner.limits().tokens;
        for past in (0..tokens).step_by(chunk) {
            let end = tokens.min(past + chunk);
            let ids: Vec<u32> = (past..end).map(|position| self.id(0, position)).collect();
            let wanted = end == tokens && with_logits;
            let outputs = if wanted { Outputs::Last } else { Outputs::None };
            runner.step(&Batch::single(0, past, &ids, outputs))?;
        }
        if with_logits { self.choose(runner, 1) } else { Ok(()) }
    }

    /// Sequences with the same past and tokens of their own after it.
    fn decode(&self, batch: usize) -> Result<(Phase, Option<u64>)> {
        let Args { prompt, generate, .. } = *self.args;
        let past = self.args.context.unwrap_or(prompt);
        let runs = self.args.runs.get();
        let limits = Limits {
            slots: batch,
            context: past + generate * (runs + 1) + 1,
            tokens: self.args.chunk.get().min(past).max(batch),
            outputs: batch,
        };
        let mut runner = self.model.runner(limits)?;
        self.read(&mut *runner, past, false)?;
        (1..batch).try_for_each(|slot| runner.copy_slot(0, slot, past))?;

        let mut position = past;
        let mut step = Batch::new();
        let seconds = median(runs, || {
            for _ in 0..generate {
                step.clear();
                for slot in 0..batch {
                    step.push(slot, position, &[self.id(slot, position)], Outputs::Last);
                }
                runner.step(&step)?;
                self.choose(&*runner, batch)?;
                position += 1;
            }
            Ok(())
        })? / generate as f64;
        step.clear();
        for slot in 0..batch {
            step.push(slot, position, &[self.id(slot, position)], Outputs::Last);
        }
        self.profile(|| {
            runner.step(&step)?;
            self.choose(&*runner, batch)
        })?;
        // In the middle of what was measured.
        let past = past + generate + generate * runs / 2;
        let spans = vec![Span { past, tokens: 1, outputs: 1 }; batch];
        let cost = Cost::new(self.kept, self.format, state_bytes(&*runner), &spans);
        let limit = self.machine.limit([cost]);
        let used = device_used(self.args.backend)?;
        Ok((Phase { name: "decode", batch, past, tokens: batch, seconds, cost, limit }, used))
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

    /// Shows the kernels of `work`, if that is asked for.
    fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.args.profile {
            return Ok(());
        }
        profile(self.args.backend, work)?.map_or(Ok(()), |table| print(&table))
    }

    /// A token of the random text of a sequence: Weyl's sequence, ids all over the vocabulary.
    fn id(&self, slot: usize, position: usize) -> u32 {
        let n = self.args.seed + ((slot as u64) << 32) + position as u64 + 1;
        let hash = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash ^ (hash >> 29)) % self.model.config().vocab_size as u64) as u32
    }
}

fn state_bytes(runner: &dyn Runner) -> StateBytes {
    let empty = runner.sequence_bytes(0);
    StateBytes { empty, per_token: runner.sequence_bytes(1) - empty }
}

/// Median of so many runs, after one that does not count.
fn median(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[runs / 2])
}

/// What was measured.
struct Phase {
    name: &'static str,
    batch: usize,
    past: usize,
    /// Tokens in `seconds`.
    tokens: usize,
    seconds: f64,
    cost: Cost,
    limit: Limit,
}

impl Phase {
    const TITLE: &str = "phase    batch    past      ms  tokens/s    GB/s  TFLOP/s     limit ms\n";

    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn share(&self) -> f64 {
        self.limit.seconds / self.seconds
    }

    fn json(&self) -> Value {
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

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
