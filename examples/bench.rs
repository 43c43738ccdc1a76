//! How fast a model is, beside what the machine can do.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::{
    Checkpoint, Config, LanguageModel, Limits, Result, Runner, Sampling, WeightFormat,
};
use jamba_examples::machine::{Machine, Planned, device_used, host_peak, plan, profile};
use jamba_examples::measure::{Phase, Subject, preset, random_model};
use jamba_examples::{BackendName, Output, model_folder, print, run};
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
#[command(allow_negative_numbers = true)]
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
    layers: Option<NonZeroUsize>,
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
    chunk: NonZeroUsize,
    /// Tokens to generate in each sequence; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 32)]
    generate: usize,
    /// Sequences that generate at the same time; several numbers are measured one after another.
    #[arg(long, value_name = "N[,N..]", value_delimiter = ',', default_value = "1")]
    batch: Vec<NonZeroUsize>,
    /// Tokens that every sequence has before it generates [default: the prompt]. They are read first,
    /// --chunk at a time: a million of them takes a large model minutes.
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
    /// Then so many steps, one after the other, of each number of sequences: shows the median times of
    /// the first and of the last 1,000, and the device's memory before and after.
    #[arg(long, value_name = "N")]
    endure: Option<NonZeroUsize>,
    /// How many times each is measured, after once that does not count (of a prompt, its first step).
    #[arg(long, value_name = "N", default_value = "3")]
    runs: NonZeroUsize,
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
    let output = args.json.as_deref().map(Output::open).transpose()?;
    let machine = Machine::measure(args.backend, args.quant)?;
    let before = device_used(args.backend)?;
    let start = Instant::now();
    let (name, model) = load(args)?;
    let load_seconds = start.elapsed().as_secs_f64();
    print(&format!(
        "{name}, weights {}, on {}\n{machine}\nready in {load_seconds:.1} s\n\n{}",
        args.quant,
        args.backend,
        Phase::TITLE
    ))?;

    let Args { temperature, top_k, top_p, .. } = *args;
    let sampling = Sampling { temperature, top_k, top_p, seed: args.seed, ..Sampling::default() };
    let subject = Subject::new(&*model, (&machine, args.backend), sampling)?;
    let mut bench = Bench { args, subject, phases: Vec::new(), used: None, endured: Vec::new() };
    if args.prompt > 0 {
        bench.prefill()?;
    }
    for batch in args.batch.iter().map(|batch| batch.get()) {
        if args.generate > 0 {
            bench.decode(batch)?;
        }
        if let Some(steps) = args.endure {
            bench.endure(batch, steps.get())?;
        }
    }

    let host = host_peak();
    let device = bench.used.as_ref().map(|(device, _)| *device).max(before);
    let part = |bytes: Option<u64>, of: &str| {
        bytes.map_or(String::new(), |bytes| format!("  {of} {:.2} GiB", gib(bytes)))
    };
    print(&format!("\nmemory at most:{}{}\n", part(host, "host"), part(device, "device")))?;
    // What a context of the driver takes was taken before, too.
    let taken = device.zip(before).map(|(device, before)| device.saturating_sub(before));
    let planned = bench.used.and_then(|(_, planned)| planned);
    if let Some((taken, planned)) = taken.zip(planned.as_ref()) {
        let more = 100.0 * (taken as f64 / planned.bytes as f64 - 1.0);
        print(&format!(
            "  of the device's by this model {:.2} GiB, {more:+.1} % of the plan: {}\n",
            gib(taken),
            planned.about
        ))?;
    }
    let Some(output) = output else { return Ok(()) };
    let all = json!({
        "model": name,
        "backend": args.backend.to_string(),
        "weights": args.quant.name(),
        "machine": machine.json(),
        "load_seconds": load_seconds,
        "phases": bench.phases,
        "endured": bench.endured,
        "host_bytes": host,
        "device_bytes": device,
        "model_bytes": taken,
        "planned_bytes": planned.map(|planned| planned.bytes),
    });
    output.write(&format!("{all:#}\n"))
}

fn load(args: &Args) -> Result<(String, Box<dyn LanguageModel>)> {
    let Some(name) = &args.preset else {
        let folder = model_folder(args.model.as_deref())?;
        let (config, checkpoint) = (Config::from_folder(&folder)?, Checkpoint::open(&folder)?);
        let model = args.backend.model(config, &checkpoint, args.quant)?;
        return Ok((folder.display().to_string(), model));
    };
    let (title, config) = preset(name, args.layers)?;
    let model = random_model(args.backend, config, args.quant, args.seed)?;
    Ok((format!("{title}, random weights"), model))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Steps after which no step allocates: the second of a kind is captured as a graph.
const SETTLED: usize = 3;

struct Bench<'a> {
    args: &'a Args,
    subject: Subject<'a>,
    phases: Vec<Value>,
    /// Bytes of the device after the phase that left the most taken, and what was planned for it.
    used: Option<(u64, Option<Planned>)>,
    endured: Vec<Value>,
}

impl Bench<'_> {
    /// One sequence from the start.
    fn prefill(&mut self) -> Result<()> {
        let &Args { prompt, .. } = self.args;
        let tokens = self.args.chunk.get().min(prompt);
        let limits = Limits { slots: 1, context: prompt, tokens, outputs: 1 };
        let mut runner = self.subject.model().runner(limits)?;
        let phase = self.subject.prefill(&mut *runner, prompt, self.args.runs.get())?;
        self.profile(|| {
            runner.reset(0)?;
            self.subject.read(&mut *runner, prompt)
        })?;
        self.show(&phase, &limits)
    }

    /// Sequences with the same past and tokens of their own after it.
    fn decode(&mut self, batch: usize) -> Result<()> {
        let (steps, runs) = (self.args.generate, self.args.runs.get());
        let (mut runner, past) =
            self.filled(batch, steps.saturating_mul(runs).saturating_add(steps).saturating_add(1))?;
        let phase = self.subject.decode(&mut *runner, past, steps, runs)?;
        let next = past + steps * (runs + 1);
        self.profile(|| self.subject.step(&mut *runner, next))?;
        self.show(&phase, &runner.limits())
    }

    fn endure(&mut self, batch: usize, steps: usize) -> Result<()> {
        let (mut runner, past) = self.filled(batch, steps.saturating_add(SETTLED))?;
        for position in past..past + SETTLED {
            self.subject.step(&mut *runner, position)?;
        }
        let before = device_used(self.args.backend)?;
        let ends = self.subject.endure(&mut *runner, past + SETTLED, steps)?;
        let after = device_used(self.args.backend)?;
        ends.iter().try_for_each(|phase| self.show(phase, &runner.limits()))?;
        if let Some((before, after)) = before.zip(after) {
            let (from, to) = (gib(before), gib(after));
            print(&format!("  {steps} steps: device from {from:.3} to {to:.3} GiB\n"))?;
        }
        self.endured.push(json!({
            "batch": batch,
            "past": past + SETTLED,
            "steps": steps,
            "first_seconds": ends[0].seconds,
            "last_seconds": ends[1].seconds,
            "device_bytes_before": before,
            "device_bytes_after": after,
        }));
        Ok(())
    }

    /// A runner whose slots hold the context, with room for so many tokens more in each.
    fn filled(&self, batch: usize, more: usize) -> Result<(Box<dyn Runner>, usize)> {
        let past = self.args.context.unwrap_or(self.args.prompt);
        let tokens = self.args.chunk.get().min(past).max(batch);
        let limits =
            Limits { slots: batch, context: past.saturating_add(more), tokens, outputs: batch };
        let mut runner = self.subject.model().runner(limits)?;
        self.subject.read(&mut *runner, past)?;
        self.subject.share(&mut *runner, past)?;
        Ok((runner, past))
    }

    /// Prints a phase, and notes the memory that is taken while its runner is there.
    fn show(&mut self, phase: &Phase, limits: &Limits) -> Result<()> {
        self.phases.push(phase.json());
        let &Args { backend, quant, .. } = self.args;
        if let Some(device) = device_used(backend)?
            && self.used.as_ref().is_none_or(|(most, _)| device > *most)
        {
            let planned = plan(backend, self.subject.model().config(), limits, quant);
            self.used = Some((device, planned));
        }
        print(&phase.to_string())
    }

    /// Shows the kernels of `work`, if that is asked for.
    fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.args.profile {
            return Ok(());
        }
        profile(self.args.backend, work)?.map_or(Ok(()), |table| print(&table))
    }
}
