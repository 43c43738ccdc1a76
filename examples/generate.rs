//! Text from a Hugging Face folder.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Parser;
#[cfg(feature = "structured")]
use jamba_core::grammar::Grammar;
use jamba_core::{
    Error, FinishReason, GenerateOptions, Generator, Result, Sampling, SessionOptions, Tokenizer,
    Usage, WeightFormat,
};
use jamba_examples::{BackendName, model_folder, note, print, read_text, run};
use serde_json::json;

/// Continues a text with a Jamba model. Without arguments, the demo model tells a story.
///
/// The text goes to stdout, everything else to stderr. Sampling options that are not given are
/// those of the model's generation_config.json. Without that file it is greedy, unless a sampling
/// option or a seed is given: then the temperature is 1. The same seed gives the same text,
/// whatever the number of threads (RAYON_NUM_THREADS sets it). What is piped in is continued as
/// it is, a newline at its end included.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text to continue [default: what is piped in, else "Once upon a time"].
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue, UTF-8; `-` waits for stdin.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Divides the logits: 0 always takes the most probable token.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep only the K most probable tokens (0: all).
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most probable tokens that together have probability P (1: all).
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least P times as probable as the most probable one (0: all).
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Makes tokens that occurred before less likely (1: off).
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Taken from the logit of tokens that were generated before (0: off).
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    presence_penalty: f32,
    /// Taken from the logit of a token for each time it was generated before (0: off).
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Added to the logit of a token; may be given several times.
    #[arg(long, value_name = "ID=X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers [default: 0].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End the text before this string; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Hold the text to the JSON schema in this file.
    #[cfg(feature = "structured")]
    #[arg(long, value_name = "FILE", group = "form")]
    json_schema: Option<PathBuf>,
    /// Hold the text to this regular expression.
    #[cfg(feature = "structured")]
    #[arg(long, value_name = "REGEX", group = "form")]
    regex: Option<String>,
    /// Hold the text to the Lark grammar in this file.
    #[cfg(feature = "structured")]
    #[arg(long, value_name = "FILE", group = "form")]
    grammar: Option<PathBuf>,
    /// Go on after an end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// Tokens of the prompt per step.
    #[arg(long, value_name = "N", default_value = "512")]
    chunk: std::num::NonZeroUsize,
    /// Print the text as it is generated [default].
    #[arg(long, conflicts_with_all = ["no_stream", "json"])]
    stream: bool,
    /// Print the text when it is complete.
    #[arg(long)]
    no_stream: bool,
    /// Print only what is generated, not the prompt before it.
    #[arg(long)]
    no_echo: bool,
    /// Print one JSON object: prompt_ids, ids, text (what was generated), finish_reason, logprobs
    /// of the chosen ids, timings.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    run(|| generate(&Args::parse()))
}

fn generate(args: &Args) -> Result<()> {
    let prompt = prompt(args)?;
    let folder = model_folder(args.model.as_deref())?;
    #[cfg_attr(not(feature = "structured"), expect(unused_mut, reason = "nothing to add"))]
    let mut options = GenerateOptions {
        sampling: sampling(args, &folder)?,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..GenerateOptions::default()
    };

    let start = Instant::now();
    let model = args.backend.load(&folder, args.quant)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    #[cfg(feature = "structured")]
    {
        options.grammar = form(args, &tokenizer)?;
    }
    let load = start.elapsed();

    let ids = tokenizer.encode(&prompt)?;
    let context = ids.len().max(1).saturating_add(args.max_tokens);
    let chunk = args.chunk.get().min(ids.len().max(1));
    let mut session = model.session(SessionOptions { context, chunk, outputs: 1 })?;
    let mut generator = Generator::new(&mut session, &tokenizer, options)?;
    if ids.len() > 2 * chunk {
        note!("reading {} tokens of prompt ...", ids.len());
    }
    generator.prompt(&ids)?;

    let stream = !args.json && !args.no_stream;
    let mut output = Output::default();
    if stream && !args.no_echo {
        print(&prompt)?;
    }
    for piece in &mut generator {
        let piece = piece?;
        if let Some(id) = piece.id {
            output.ids.push(id);
            output.logprobs.push(piece.logprob);
        }
        output.text.push_str(&piece.text);
        if stream {
            print(&piece.text)?;
        }
    }

    // The iterator ended without an error, so there is a reason.
    let reason = generator.finish_reason().unwrap_or(FinishReason::Length);
    let usage = generator.usage();
    if args.json {
        // A model with a beginning-of-text token starts an empty prompt from it.
        let bos = model.config().bos_token_id;
        let prompt_ids = if ids.is_empty() { bos.into_iter().collect() } else { ids };
        return print(&format!("{}\n", output.json(&prompt_ids, reason, load, usage)));
    }
    if !stream {
        let echo = if args.no_echo { "" } else { &prompt };
        print(&format!("{echo}{}", output.text))?;
    }
    print("\n")?;
    note!(
        "[{} on {}: loaded in {:.0} ms; prompt {} tokens at {:.0}/s; generated {} at {:.0}/s; end: {reason}]",
        folder.display(),
        model.backend_name(),
        load.as_secs_f64() * 1e3,
        usage.prompt_tokens,
        rate(usage.prompt_tokens, usage.prompt_time),
        usage.generated_tokens,
        rate(usage.generated_tokens, usage.generation_time),
    );
    Ok(())
}

#[derive(Default)]
struct Output {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    text: String,
}

impl Output {
    fn json(
        &self,
        prompt_ids: &[u32],
        reason: FinishReason,
        load: Duration,
        usage: Usage,
    ) -> serde_json::Value {
        json!({
            "prompt_ids": prompt_ids,
            "ids": self.ids,
            "text": self.text,
            "finish_reason": reason.as_str(),
            "logprobs": self.logprobs,
            "timings": {
                "load_seconds": load.as_secs_f64(),
                "prompt_tokens_per_second": rate(usage.prompt_tokens, usage.prompt_time),
                "generated_tokens_per_second":
                    rate(usage.generated_tokens, usage.generation_time),
            },
        })
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

fn sampling(args: &Args, folder: &Path) -> Result<Sampling> {
    let model = Sampling::from_folder(folder)?;
    let filters = [args.top_p, args.min_p].iter().any(Option::is_some);
    let wants_chance = filters || args.top_k.is_some() || args.seed.is_some();
    let greedy = model.temperature == 0.0;
    let temperature = if greedy && wants_chance { 1.0 } else { model.temperature };
    Ok(Sampling {
        temperature: args.temperature.unwrap_or(temperature),
        top_k: args.top_k.unwrap_or(model.top_k),
        top_p: args.top_p.unwrap_or(model.top_p),
        min_p: args.min_p.unwrap_or(model.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(model.repetition_penalty),
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        logit_bias: args.logit_bias.clone(),
        seed: args.seed.unwrap_or(0),
    })
}

/// What the text is held to.
#[cfg(feature = "structured")]
fn form(args: &Args, tokenizer: &Tokenizer) -> Result<Option<Grammar>> {
    Ok(Some(match (&args.json_schema, &args.regex, &args.grammar) {
        (Some(path), _, _) => {
            let schema = serde_json::from_str(&read_text(path)?);
            let schema = schema.map_err(|source| Error::Json { path: path.clone(), source })?;
            Grammar::json_schema(tokenizer, &schema)?
        }
        (_, Some(regex), _) => Grammar::regex(tokenizer, regex)?,
        (_, _, Some(path)) => Grammar::lark(tokenizer, &read_text(path)?)?,
        (None, None, None) => return Ok(None),
    }))
}

fn parse_bias(text: &str) -> std::result::Result<(u32, f32), String> {
    let parse = || {
        let (id, bias) = text.split_once('=')?;
        Some((id.trim().parse().ok()?, bias.trim().parse().ok()?))
    };
    parse().ok_or_else(|| "a token id and a number are expected, as in 42=-1.5".into())
}

fn prompt(args: &Args) -> Result<String> {
    const STORY: &str = "Once upon a time";
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) => read_text(path),
        (None, None) if std::io::stdin().is_terminal() => Ok(STORY.into()),
        (None, None) => Ok(piped()?.filter(|text| !text.is_empty()).unwrap_or(STORY.into())),
    }
}

/// What is piped in; `None` if nothing has come yet, as from a pipe that was merely inherited.
fn piped() -> Result<Option<String>> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut first = [0; 1];
        let mut bytes = Vec::new();
        let result = match stdin.read(&mut first) {
            Ok(0) => Ok(0),
            Ok(_) => {
                // Something is there: the rest is worth waiting for.
                let _ = send.send(None);
                bytes.push(first[0]);
                stdin.read_to_end(&mut bytes)
            }
            Err(e) => Err(e),
        };
        let _ = send.send(Some(result.map(|_| bytes)));
    });
    let whole = match receive.recv_timeout(Duration::from_millis(200)) {
        Ok(Some(whole)) => whole,
        Ok(None) => match receive.recv() {
            Ok(Some(whole)) => whole,
            _ => return Ok(None),
        },
        Err(_) => {
            note!("nothing on stdin yet, so not waiting for it (--prompt-file - does)");
            return Ok(None);
        }
    };
    let text = whole.and_then(|bytes| {
        String::from_utf8(bytes)
            .map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e))
    });
    Ok(Some(text.map_err(unreadable("stdin"))?))
}

fn unreadable(what: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { path: what.as_ref().to_owned(), source }
}
