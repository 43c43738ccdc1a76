//! The figures of the Jamba paper (arXiv 2403.19887): memory, and throughput by batch and by context.

mod draw;

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use jamba_core::memory::{kv_bytes, kv_bytes_per_token, mamba_state_bytes, weight_bytes};
use jamba_core::{Config, Dtype, Error, Limits, Result, Sampling, WeightFormat};
use jamba_examples::machine::{Machine, plan};
use jamba_examples::measure::{Phase, Subject, is_too_large, preset, random_model};
use jamba_examples::{BackendName, Output, note, print, run};
use serde_json::{Value, json};

use crate::draw::{Chart, Scale, short};

/// Tokens that every sequence generates, as in the paper.
const GENERATED: usize = 512;
/// The models of the memory figure, and the format that each is drawn in.
const SHAPES: [(&str, WeightFormat); 4] = [
    ("jamba-v0.1", WeightFormat::ExpertsInt8),
    ("jamba-1.5-large", WeightFormat::ExpertsInt8),
    ("mixtral-8x7b", WeightFormat::Int8),
    ("llama-2-70b", WeightFormat::Int8),
];
/// Formats of eight bits, which its table has.
const FORMATS: [WeightFormat; 2] = [WeightFormat::ExpertsInt8, WeightFormat::Int8];

/// Reproduces the figures of the Jamba paper: prints a table of each and draws it as SVG.
///
/// Throughput is what the paper calls so, end to end: generated tokens by the time of the prompts and
/// of 512 steps. Measured are the reading of one prompt, which counts once for every sequence, and some
/// of the steps, which count for all. Models have random weights; each is loaded once. A batch or
/// context that does not fit ends its series.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Shapes to measure, the first beside each of the others.
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        default_value = "jamba-v0.1,mixtral-8x7b"
    )]
    presets: Vec<String>,
    /// Layers to keep of each.
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,
    /// Figures to make [default: all on a GPU, elsewhere memory].
    #[arg(long, value_enum, value_name = "FIGURE,..", value_delimiter = ',')]
    only: Option<Vec<Figure>>,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights of all: stored (bf16), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t = WeightFormat::ExpertsInt8)]
    quant: WeightFormat,
    /// Memory of the card: a line in the first figure, and what a larger one measures no more than.
    #[arg(long, value_name = "GIB", default_value = "80")]
    memory: NonZeroU32,
    /// Tokens of the prompts of the figure by batch.
    #[arg(long, value_name = "N", default_value = "8192")]
    prompt: NonZeroUsize,
    /// Numbers of sequences.
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64,128"
    )]
    batches: Vec<NonZeroUsize>,
    /// Contexts of one sequence.
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "1024,2048,4096,8192,16384,32768,65536,131072,262144"
    )]
    contexts: Vec<NonZeroUsize>,
    /// Steps that are measured, after as many that do not count, and scaled to 512.
    #[arg(long, value_name = "N", default_value = "32")]
    generate: NonZeroUsize,
    /// Tokens of a step of a prompt.
    #[arg(long, value_name = "N", default_value = "8192")]
    chunk: NonZeroUsize,
    /// Seed of the random weights and tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Folder for memory.svg, batch.svg and context.svg.
    #[arg(long, value_name = "DIR", default_value = "figures")]
    output: PathBuf,
    /// Writes all numbers to a file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// What four models need by context (table 1), and the longest that fits a card. Needs no GPU.
    Memory,
    /// Throughput by the number of sequences (figure 3a).
    Batch,
    /// Throughput of one sequence by its context (figure 3b).
    Context,
}

impl Args {
    fn wants(&self, figure: Figure) -> bool {
        let is_gpu = matches!(self.backend, BackendName::Cuda | BackendName::CudaF32);
        let default = is_gpu || figure == Figure::Memory;
        self.only.as_ref().map_or(default, |only| only.contains(&figure))
    }

    /// Bytes of the card.
    fn budget(&self) -> u64 {
        u64::from(self.memory.get()) << 30
    }
}

fn main() -> ExitCode {
    run(|| figures(Args::parse()))
}

fn figures(mut args: Args) -> Result<()> {
    for positions in [&mut args.batches, &mut args.contexts] {
        positions.sort_unstable();
        positions.dedup();
    }
    let shapes = args.presets.iter().map(|name| preset(name, args.layers));
    let shapes = shapes.collect::<Result<Vec<_>>>()?;
    shapes.iter().try_for_each(|(_, config)| config.validate())?;
    std::fs::create_dir_all(&args.output)
        .map_err(|source| Error::Io { path: args.output.clone(), source })?;
    let output = args.json.as_deref().map(Output::open).transpose()?;
    let mut all = json!({ "memory_gib": args.memory.get() });
    if args.wants(Figure::Memory) {
        all["memory"] = memory(&args)?;
    }
    if args.wants(Figure::Batch) || args.wants(Figure::Context) {
        let machine = Machine::measure(args.backend, args.quant)?;
        print(&format!("weights {}, on {}\n{machine}\n\n", args.quant, args.backend))?;
        let mut measured = Vec::new();
        for (title, config) in shapes {
            measured.push(measure(&args, &machine, title, config)?);
        }
        all["backend"] = args.backend.to_string().into();
        all["weights"] = args.quant.name().into();
        all["machine"] = machine.json();
        all["generated"] = GENERATED.into();
        all["steps_measured"] = args.generate.get().into();
        if args.wants(Figure::Batch) {
            all["batch"] = by_batch(&args, &measured)?;
        }
        if args.wants(Figure::Context) {
            all["context"] = by_context(&args, &measured)?;
        }
    }
    output.map_or(Ok(()), |output| output.write(&format!("{all:#}\n")))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Adds a line to a text.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {{
        $out.push_str(&format!($($arg)*));
        $out.push('\n');
    }};
}

/// What models need by context, and what of it one card holds.
fn memory(args: &Args) -> Result<Value> {
    let size = Dtype::Bf16.size();
    let (shown, kv_at) = ([4 << 10, 32 << 10, 256 << 10, 1 << 20], 256 << 10);
    let card = args.memory;
    let mut out = String::new();
    line!(out, "Memory: weights, KV cache in 16 bits and Mamba state, in GiB, by context");
    line!(
        out,
        "  longest: the tokens that fit {card} GiB; with activations too, as the CUDA backend"
    );
    line!(
        out,
        "  plans them for steps of {} tokens (built with the feature cuda); -: none",
        args.chunk
    );
    let columns = shown.map(|context| format!("{:>8}", short(context))).concat();
    line!(
        out,
        "\n{:<16} {:<12} {:>8} {:>9}{columns} {:>9} {:>9}",
        "model",
        "weights",
        "",
        format!("KV {}", short(kv_at)),
        "longest",
        "planned"
    );
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for (name, drawn) in SHAPES {
        let config = Config::preset(name)?;
        let state = mamba_state_bytes(&config, 4);
        for format in FORMATS {
            let weights = weight_bytes(&config, format);
            let at = |context| weights + state + kv_bytes(&config, context, size);
            let token = kv_bytes_per_token(&config, size).max(1);
            let longest = args.budget().checked_sub(weights + state).map(|left| left / token);
            let planned = planned_longest(args, &config, format);
            let columns = shown.map(|context| format!("{:>8.1}", gib(at(context)))).concat();
            line!(
                out,
                "{name:<16} {format:<12} {:>8.1} {:>9.1}{columns} {:>9} {:>9}",
                gib(weights),
                gib(kv_bytes(&config, kv_at, size)),
                tokens(longest),
                tokens(planned)
            );
            rows.push(json!({
                "model": name,
                "weights": format.name(),
                "weight_bytes": weights,
                "state_bytes": state,
                "kv_bytes_per_token": token,
                "kv_bytes_at_256k": kv_bytes(&config, kv_at, size),
                "longest_context": longest,
                "longest_context_planned": planned,
            }));
            if format == drawn {
                let points = (12..=20).map(|power| (1 << power, gib(at(1 << power)))).collect();
                lines.push((format!("{name}, {format}"), points));
            }
        }
    }
    line!(out, "");
    print(&out)?;
    let cards = [1, 8].map(|n| f64::from(n * card.get()));
    let chart = Chart {
        title: "Memory by context: weights, KV cache in 16 bits, state".into(),
        x_title: "tokens of context",
        y_title: "GiB",
        ticks: (12..=20).map(|power| 1 << power).collect(),
        scale: Scale::Log,
        lines,
        levels: vec![(format!("{card} GiB"), cards[0]), (format!("8 x {card} GiB"), cards[1])],
    };
    save(args, "memory.svg", &chart)?;
    Ok(rows.into())
}

/// The longest context of one sequence that the CUDA backend plans within the card.
fn planned_longest(args: &Args, config: &Config, format: WeightFormat) -> Option<u64> {
    let fits = |context: u64| {
        let (context, tokens) = (context as usize, args.chunk.get());
        let limits = Limits { slots: 1, context, tokens, outputs: 1 };
        plan(BackendName::Cuda, config, &limits, format).map(|plan| plan.bytes <= args.budget())
    };
    // Of two contexts the shorter fits.
    let (mut fitting, mut beyond) = (1, 1 << 32);
    if !fits(fitting)? {
        return None;
    }
    while beyond - fitting > 1 {
        let middle = fitting.midpoint(beyond);
        if fits(middle)? { fitting = middle } else { beyond = middle }
    }
    Some(fitting)
}

fn tokens(count: Option<u64>) -> String {
    count.map_or("-".into(), |count| match count {
        0..10_240 => count.to_string(),
        _ => format!("{}K", count >> 10),
    })
}

/// What was measured of a model.
struct Series {
    title: String,
    by_batch: Vec<Point>,
    by_context: Vec<Point>,
}

/// Sequences that each read a prompt and generate.
struct Point {
    prompt: Phase,
    step: Phase,
}

impl Point {
    fn tokens_per_second(&self) -> f64 {
        let batch = self.step.batch as f64;
        let seconds = batch * self.prompt.seconds + GENERATED as f64 * self.step.seconds;
        batch * GENERATED as f64 / seconds
    }

    fn json(&self) -> Value {
        json!({
            "batch": self.step.batch,
            "context": self.prompt.tokens,
            "tokens_per_second": self.tokens_per_second(),
            "prompt": self.prompt.json(),
            "step": self.step.json(),
        })
    }
}

/// Loads a model, measures what the figures need of it, and frees it.
fn measure(args: &Args, machine: &Machine, title: String, config: Config) -> Result<Series> {
    let mut series = Series { title, by_batch: Vec::new(), by_context: Vec::new() };
    let least = Limits { slots: 1, context: 1, tokens: 1, outputs: 1 };
    if !fits(args, &config, &least) {
        note!("{}: the weights do not fit", series.title);
        return Ok(series);
    }
    let model = match random_model(args.backend, config, args.quant, args.seed) {
        Err(error) if is_too_large(&error) => {
            note!("{}: {error}", series.title);
            return Ok(series);
        }
        model => model?,
    };
    let sampling = Sampling { temperature: 0.0, seed: args.seed, ..Sampling::default() };
    let subject = Subject::new(&*model, (machine, args.backend), sampling)?;
    note!("{}\n{}", series.title, Phase::TITLE.trim_end());
    if args.wants(Figure::Batch) {
        for batch in &args.batches {
            let Some(point) = point(args, &subject, batch.get(), args.prompt.get())? else { break };
            series.by_batch.push(point);
        }
    }
    if args.wants(Figure::Context) {
        for context in &args.contexts {
            let Some(point) = point(args, &subject, 1, context.get())? else { break };
            series.by_context.push(point);
        }
    }
    Ok(series)
}

/// `None` where it does not fit.
fn point(args: &Args, subject: &Subject, batch: usize, context: usize) -> Result<Option<Point>> {
    let steps = args.generate.get();
    let limits = Limits {
        slots: batch,
        context: context.saturating_add(GENERATED.max(steps.saturating_mul(2))),
        tokens: args.chunk.get().min(context).max(batch),
        outputs: batch,
    };
    let model = subject.model();
    let too_large = || note!("{batch} x {context}: does not fit");
    if !fits(args, model.config(), &limits) {
        too_large();
        return Ok(None);
    }
    let mut runner = match model.runner(limits) {
        Err(error) if is_too_large(&error) => {
            too_large();
            return Ok(None);
        }
        runner => runner?,
    };
    let prompt = subject.prefill(&mut *runner, context, 1)?;
    note!("{}", prompt.to_string().trim_end());
    subject.share(&mut *runner, context)?;
    let step = subject.decode(&mut *runner, context, steps, 1)?;
    note!("{}", step.to_string().trim_end());
    Ok(Some(Point { prompt, step }))
}

/// Whether the plan, if the backend has one, stays within the card.
fn fits(args: &Args, config: &Config, limits: &Limits) -> bool {
    plan(args.backend, config, limits, args.quant).is_none_or(|plan| plan.bytes <= args.budget())
}

/// Figure 3a.
fn by_batch(args: &Args, measured: &[Series]) -> Result<Value> {
    let prompt = args.prompt;
    let title = format!("Throughput by batch: prompts of {prompt}, {GENERATED} generated");
    let positions: Vec<_> = args.batches.iter().map(|batch| batch.get()).collect();
    let lines: Vec<_> = measured.iter().map(|s| (s.title.as_str(), &s.by_batch[..])).collect();
    let mut out = table(args, (&title, "batch"), &positions, &lines);
    let best = lines
        .iter()
        .map(|(_, points)| points.iter().map(Point::tokens_per_second).max_by(f64::total_cmp));
    line!(out, "{}\n", row("best", &best.collect::<Vec<_>>()));
    print(&out)?;
    let chart = chart(args, title, "sequences", &positions, &lines);
    save(args, "batch.svg", &chart)?;
    Ok(values(&lines))
}

/// Figure 3b.
fn by_context(args: &Args, measured: &[Series]) -> Result<Value> {
    let title = format!("Throughput by context: one sequence, {GENERATED} generated");
    let positions: Vec<_> = args.contexts.iter().map(|context| context.get()).collect();
    let lines: Vec<_> = measured.iter().map(|s| (s.title.as_str(), &s.by_context[..])).collect();
    let mut out = table(args, (&title, "context"), &positions, &lines);
    line!(out, "");
    print(&out)?;
    let chart = chart(args, title, "tokens of context", &positions, &lines);
    save(args, "context.svg", &chart)?;
    Ok(values(&lines))
}

/// Of a column, which has the name of a preset.
const WIDTH: usize = 18;

type Lines<'a> = [(&'a str, &'a [Point])];

fn table(args: &Args, (title, first): (&str, &str), positions: &[usize], lines: &Lines) -> String {
    let (quant, backend, steps) = (args.quant, args.backend, args.generate);
    let mut out = String::new();
    line!(out, "{title}; weights {quant}, on {backend}");
    line!(out, "  tokens/s of all sequences, end to end; ratio: of the first model to this one");
    line!(out, "  measured: one prompt, counted for each; {steps} steps, scaled to {GENERATED}");
    let heads = lines.iter().enumerate().map(|(i, (name, _))| match i {
        0 => format!("  {name:>WIDTH$}"),
        _ => format!("  {name:>WIDTH$}  ratio"),
    });
    line!(out, "\n{first:>8}{}", heads.collect::<String>());
    for (i, position) in positions.iter().enumerate() {
        let values = lines.iter().map(|(_, points)| points.get(i).map(Point::tokens_per_second));
        let values: Vec<_> = values.collect();
        line!(out, "{}", row(&short(*position), &values));
        if values.iter().all(Option::is_none) {
            break;
        }
    }
    out
}

fn row(first: &str, values: &[Option<f64>]) -> String {
    let cells = values.iter().enumerate().map(|(i, value)| {
        let shown = value.map_or("does not fit".into(), |value| format!("{value:.1}"));
        let ratio = values[0].zip(*value).map(|(first, value)| format!("{:.2}", first / value));
        match i {
            0 => format!("  {shown:>WIDTH$}"),
            _ => format!("  {shown:>WIDTH$}  {:>5}", ratio.unwrap_or_default()),
        }
    });
    format!("{first:>8}{}", cells.collect::<String>())
}

fn chart(
    args: &Args,
    title: String,
    x_title: &'static str,
    positions: &[usize],
    lines: &Lines,
) -> Chart {
    let line = |(name, points): &(&str, &[Point])| {
        let points = positions.iter().zip(*points);
        (name.to_string(), points.map(|(x, p)| (*x, p.tokens_per_second())).collect())
    };
    let longest = lines.iter().map(|(_, points)| points.len()).max().unwrap_or_default();
    Chart {
        title: format!("{title} ({})", args.quant),
        x_title,
        y_title: "tokens/s, end to end",
        ticks: positions[..longest].to_vec(),
        scale: Scale::Linear,
        lines: lines.iter().map(line).collect(),
        levels: Vec::new(),
    }
}

fn values(lines: &Lines) -> Value {
    let line = |(name, points): &(&str, &[Point])| json!({ "model": name, "points": points.iter().map(Point::json).collect::<Vec<_>>() });
    lines.iter().map(line).collect::<Vec<_>>().into()
}

fn save(args: &Args, name: &str, chart: &Chart) -> Result<()> {
    let path = args.output.join(name);
    if chart.write(&path)? {
        note!("{} is drawn", path.display());
    } else {
        note!("{}: nothing to draw", path.display());
    }
    Ok(())
}
