//! What each format of the weights costs in quality.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use jamba_core::memory::weight_bytes;
use jamba_core::{Error, Result, Tokenizer, WeightFormat};
use jamba_examples::quality::{Quality, held_out};
use jamba_examples::{BackendName, model_folder, print, read_text, run};
use serde_json::json;

/// Runs a text through a model with its weights as they are stored and in other formats, and shows
/// for each: the mean loss and how much larger it is (nats a token), the mean Kullback-Leibler
/// divergence of the next token's distribution (nats), how often the most probable token is the
/// same, and the bytes of the weights.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Text, UTF-8 [default: the held-out passages of the demo model].
    #[arg(value_name = "FILE")]
    text: Option<PathBuf>,
    /// Folder with config.json, tokenizer.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR", requires = "text")]
    model: Option<PathBuf>,
    /// Formats to measure [default: all but stored]; may be given several times.
    #[arg(long, value_name = "FORMAT")]
    quant: Vec<WeightFormat>,
    /// Tokens of a window; each starts anew.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    window: usize,
    /// Tokens of the text at most.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens of a step.
    #[arg(long, value_name = "N", default_value = "128")]
    chunk: std::num::NonZeroUsize,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// Where to run the stored weights that others are compared with [default: there too]. With
    /// --quant stored it shows what the other backend's precision costs.
    #[arg(long, value_enum)]
    base: Option<BackendName>,
    /// Print one JSON object: tokens, formats [format, bytes, loss, delta, kl, agreement].
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    run(|| quality(&Args::parse()))
}

fn quality(args: &Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let windows = windows(args, &folder)?;
    let stored = args.base.unwrap_or(args.backend).load(&folder, WeightFormat::Stored)?;
    let formats = match args.quant.as_slice() {
        [] => WeightFormat::ALL[1..].to_vec(),
        some => some.to_vec(),
    };
    let mut rows: Vec<(WeightFormat, Quality)> = Vec::new();
    for format in formats {
        let start = Instant::now();
        let model = args.backend.load(&folder, format)?;
        let load = start.elapsed();
        let quality = Quality::measure(&*stored, &*model, &windows, args.chunk.get())?;
        eprintln!(
            "[{format}: loaded in {:.2} s, {} tokens in {:.1} s]",
            load.as_secs_f64(),
            quality.tokens,
            (start.elapsed() - load).as_secs_f64()
        );
        if rows.is_empty() {
            let loss = quality.base_loss;
            let itself = Quality { loss, kl: 0.0, agreement: 1.0, ..quality };
            rows.push((WeightFormat::Stored, itself));
        }
        rows.push((format, quality));
    }

    let bytes = |format| weight_bytes(stored.config(), format);
    let tokens = rows.first().map_or(0, |(_, quality)| quality.tokens);
    if args.json {
        let of = |(format, q): &(WeightFormat, Quality)| {
            json!({
                "format": format.name(),
                "bytes": bytes(*format),
                "loss": q.loss,
                "delta": q.delta(),
                "kl": q.kl,
                "agreement": q.agreement,
            })
        };
        let formats: Vec<_> = rows.iter().map(of).collect();
        return print(&format!("{}\n", json!({ "tokens": tokens, "formats": formats })));
    }
    let mut out = format!(
        "{tokens} tokens\n{:14} {:>14} {:>8} {:>9} {:>9} {:>9}\n",
        "weights", "bytes", "loss", "delta", "KL", "same top"
    );
    for (format, q) in &rows {
        out += &format!(
            "{format:14} {:>14} {:>8.4} {:>+9.5} {:>9.6} {:>7.2} %\n",
            bytes(*format),
            q.loss,
            q.delta(),
            q.kl,
            100.0 * q.agreement
        );
    }
    print(&out)
}

fn windows(args: &Args, folder: &std::path::Path) -> Result<Vec<Vec<u32>>> {
    if args.window < 2 {
        let (value, allowed) = (args.window.to_string(), "it must be at least 2");
        return Err(Error::Option { option: "window", value, allowed });
    }
    let limit = args.tokens.unwrap_or(usize::MAX);
    let Some(text) = &args.text else {
        let mut left = limit;
        let mut cut = |mut passage: Vec<u32>| {
            passage.truncate(left.min(args.window));
            left -= passage.len();
            passage
        };
        return Ok(held_out(folder)?.into_iter().map(&mut cut).collect());
    };
    let text = read_text(text)?;
    let mut ids = Tokenizer::from_folder(folder)?.encode(&text)?;
    ids.truncate(limit);
    Ok(ids.chunks(args.window).map(<[u32]>::to_vec).collect())
}
