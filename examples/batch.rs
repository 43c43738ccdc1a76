//! Many prompts from a file, through the engine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::{
    Completion, Engine, EngineOptions, Error, GenerateOptions, Request, Result, Sampling,
    Tokenizer, WeightFormat,
};
use jamba_examples::progress::steps;
use jamba_examples::{BackendName, model_folder, note, print, read_text, run};
use serde_json::{Value, json};

/// Continues every prompt of a file, many at a time, and prints the texts in the order of the
/// prompts.
///
/// The file has a prompt in each line: as it is, or, where the first line is a JSON object, in its
/// field `prompt`, with `max_tokens`, `seed` and `priority` if they are to differ. Texts go to
/// stdout, progress and throughput to stderr. A text does not depend on the number of slots
/// (on a GPU but for what rounding does).
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// File of prompts, UTF-8; `-` is stdin.
    #[arg(value_name = "FILE")]
    prompts: PathBuf,
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens to generate at most for each prompt.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// Divides the logits: 0 always takes the most probable token [default: the model's].
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Seed of the first prompt; the next has the next.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on after an end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Prompts that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 8)]
    slots: usize,
    /// Tokens of a prompt and its text at most [default: what the longest may need].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens of one step at most.
    #[arg(long, value_name = "N", default_value_t = 256)]
    step_tokens: usize,
    /// MiB that the states of running prompts may take together: others wait for their turn
    /// [default: as much as all slots take].
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// MiB of states that are kept for prompts that begin alike (0: none).
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    prefix_cache: u64,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// Print a JSON object for each prompt: prompt, ids, text, finish_reason, usage.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    run(|| batch(&Args::parse()))
}

struct Prompt {
    text: String,
    request: Request,
}

fn batch(args: &Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let file = read_text(&args.prompts)?;
    let model = args.backend.load(&folder, args.quant)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let mut sampling = Sampling::from_folder(&folder)?;
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    let prompts = prompts(args, &file, &tokenizer, &sampling)?;
    let longest =
        prompts.iter().map(|p| p.request.prompt.len().saturating_add(p.request.options.max_tokens));
    let options = EngineOptions {
        slots: args.slots,
        context: args.context.unwrap_or(longest.max().unwrap_or(1).max(1)),
        step_tokens: args.step_tokens,
        queue: prompts.len().max(1),
        prefix_cache: args.prefix_cache.saturating_mul(1 << 20),
        memory: args.memory.map(|mib| mib.saturating_mul(1 << 20)),
    };
    let engine = Engine::new(&*model, &tokenizer, options)?;

    let start = Instant::now();
    let mut streams = Vec::new();
    for prompt in &prompts {
        streams.push(engine.submit(prompt.request.clone())?);
    }
    let bar = steps(prompts.len(), "{pos} of {len} prompts, {msg} tokens/s");
    for (prompt, stream) in prompts.iter().zip(streams) {
        let completion = stream.collect_all()?;
        bar.suspend(|| print(&line(args, prompt, &completion)))?;
        let tokens = engine.stats().generated_tokens as f64 / start.elapsed().as_secs_f64();
        bar.set_message(format!("{tokens:.0}"));
        bar.inc(1);
    }
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    engine.shutdown();
    let stats = engine.stats();
    note!(
        "[{} prompts through {} slots in {seconds:.2} s: {} prompt tokens run, {} from stored states; \
         generated {} at {:.0}/s; {} steps]",
        prompts.len(),
        args.slots,
        stats.prompt_tokens,
        stats.prefix.hit_tokens,
        stats.generated_tokens,
        stats.generated_tokens as f64 / seconds,
        stats.steps,
    );
    Ok(())
}

/// A request for each line that is not empty.
fn prompts(
    args: &Args,
    file: &str,
    tokenizer: &Tokenizer,
    sampling: &Sampling,
) -> Result<Vec<Prompt>> {
    let lines = || (1..).zip(file.lines()).filter(|(_, line)| !line.trim().is_empty());
    let object = |line: &str| serde_json::from_str(line).ok().filter(Value::is_object);
    // What the first line is, all are.
    let is_json = lines().next().is_some_and(|(_, line)| object(line).is_some());
    let mut prompts = Vec::new();
    for ((at, line), number) in lines().zip(0..) {
        let wrong = |allowed| Error::Option {
            option: "prompts",
            value: format!("line {at}: {line}"),
            allowed,
        };
        let fields = match is_json {
            true => object(line).ok_or_else(|| wrong("as the first line, all must be objects"))?,
            false => json!({ "prompt": line }),
        };
        let text = fields["prompt"].as_str();
        let text = text.ok_or_else(|| wrong("every object must have a string `prompt`"))?;
        let known = ["prompt", "max_tokens", "seed", "priority"];
        if fields.as_object().is_some_and(|f| f.keys().any(|key| !known.contains(&key.as_str()))) {
            return Err(wrong("an object has `prompt`, `max_tokens`, `seed` and `priority`"));
        }
        let whole = |key: &str| match &fields[key] {
            Value::Null => Ok(None),
            value => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| wrong("`max_tokens` and `seed` are integers from 0 on")),
        };
        let seed = whole("seed")?.unwrap_or(args.seed.wrapping_add(number));
        let max_tokens = whole("max_tokens")?.and_then(|n| usize::try_from(n).ok());
        let options = GenerateOptions {
            sampling: Sampling { seed, ..sampling.clone() },
            max_tokens: max_tokens.unwrap_or(args.max_tokens),
            ignore_eos: args.ignore_eos,
            ..GenerateOptions::default()
        };
        let priority = match &fields["priority"] {
            Value::Null => 0,
            value => value
                .as_i64()
                .and_then(|n| i32::try_from(n).ok())
                .ok_or_else(|| wrong("`priority` is an integer of 32 bits"))?,
        };
        let request = Request { priority, ..Request::new(tokenizer.encode(text)?, options) };
        prompts.push(Prompt { text: text.to_owned(), request });
    }
    Ok(prompts)
}

fn line(args: &Args, prompt: &Prompt, completion: &Completion) -> String {
    let Completion { ids, text, finish_reason, usage, .. } = completion;
    if !args.json {
        return format!("{}{text}\n", prompt.text);
    }
    let json = json!({
        "prompt": prompt.text,
        "ids": ids,
        "text": text,
        "finish_reason": finish_reason.map(|reason| reason.as_str()),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "generated_tokens": usage.generated_tokens,
            "queue_seconds": usage.queue_time.as_secs_f64(),
            "prompt_seconds": usage.prompt_time.as_secs_f64(),
            "first_token_seconds": usage.first_token_time.as_secs_f64(),
            "generation_seconds": usage.generation_time.as_secs_f64(),
        },
    });
    format!("{json}\n")
}
