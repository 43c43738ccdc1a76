//! How well a model knows a text.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::{Error, Result, SessionOptions, Tokenizer, WeightFormat};
use jamba_examples::{BackendName, model_folder, note, print, read_text, run};
use serde_json::json;

/// The mean negative log-probability of the tokens of a file, and its exponential.
///
/// The text is cut into windows. Each starts anew from the last tokens of the one before it, which
/// are not scored again; the first token of the text is not scored.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// File to score, UTF-8.
    #[arg(value_name = "FILE")]
    text: PathBuf,
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    window: usize,
    /// Tokens at the start of a window that are context only; at least 1.
    #[arg(long, value_name = "N", default_value_t = 512)]
    overlap: usize,
    /// Tokens scored in one step: each takes a row of logits.
    #[arg(long, value_name = "N", default_value_t = 256)]
    chunk: usize,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// Print one JSON object: tokens, scored, mean_nll, perplexity.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    run(|| perplexity(&Args::parse()))
}

fn perplexity(args: &Args) -> Result<()> {
    let &Args { window, overlap, chunk, .. } = args;
    if overlap == 0 || overlap >= window {
        let allowed = "it must be at least 1 and less than the window";
        return Err(Error::Option { option: "overlap", value: overlap.to_string(), allowed });
    }
    let text = read_text(&args.text)?;
    let folder = model_folder(args.model.as_deref())?;
    let model = args.backend.load(&folder, args.quant)?;
    let ids = Tokenizer::from_folder(&folder)?.encode(&text)?;
    if ids.len() < 2 {
        return Err(Error::EmptyPrompt);
    }

    let context = window.min(ids.len());
    let mut session = model.session(SessionOptions { context, chunk, outputs: chunk })?;
    let start = Instant::now();
    let (mut scored, mut nll) = (1, 0.0);
    while scored < ids.len() {
        let first = if scored == 1 { 0 } else { scored - overlap };
        let end = ids.len().min(first + window);
        session.reset()?;
        let scores = session.score(&ids[first..scored], &ids[scored..end], 0)?;
        nll -= scores.iter().map(|token| f64::from(token.logprob)).sum::<f64>();
        scored = end;
        note!(
            "{scored} of {} tokens: perplexity {:.3}",
            ids.len(),
            (nll / (scored - 1) as f64).exp()
        );
    }
    let count = ids.len() - 1;
    let mean = nll / count as f64;
    if args.json {
        let all = json!({
            "tokens": ids.len(),
            "scored": count,
            "mean_nll": mean,
            "perplexity": mean.exp(),
        });
        print(&format!("{all}\n"))?;
    } else {
        print(&format!("mean nll {mean:.4}, perplexity {:.3}, {count} tokens\n", mean.exp()))?;
    }
    note!("[{:.0} tokens/s]", count as f64 / start.elapsed().as_secs_f64());
    Ok(())
}
