//! Writes every activation of a model for a given prompt: what kernel developers compare with.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use jamba_core::recording::Recording;
use jamba_core::trace::Detail;
use jamba_core::{Result, SessionOptions, Tokenizer, WeightFormat};
use jamba_examples::{BackendName, model_folder, note, parse_ids, run};

/// Runs a prompt, then more token ids one at a time, and writes to a safetensors file (F32) every
/// activation of the prompt, the logits of the ids after it, and the states at the end.
///
/// Names, of the prompt: embed, layers.I.{input_norm,ff_norm,ff,out}, layers.I.mamba.{in_proj,conv,dt,B,C,scan,out},
/// layers.I.attn.{q,k,v,context,out}, layers.I.moe.router_logits, final_norm, logits, all of shape
/// (tokens, width); of the ids after it: decode_logits (ids, vocabulary); at the end:
/// state.I.{conv (d_inner, d_conv), ssm (d_inner, d_state), k, v (kv_heads, tokens, head_dim)}.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json and safetensors, and tokenizer.json for a text [default: the demo
    /// model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text of the prompt; the ids that it is encoded to are printed.
    #[arg(long, value_name = "TEXT", conflicts_with = "ids", required_unless_present = "ids")]
    prompt: Option<String>,
    /// Token ids of the prompt, separated by commas.
    #[arg(long, value_name = "1,2,3", value_parser = parse_ids)]
    ids: Option<std::vec::Vec<u32>>,
    /// Token ids run one at a time after the prompt.
    #[arg(long, value_name = "4,5,6", value_parser = parse_ids, default_value = "")]
    decode: std::vec::Vec<u32>,
    /// Tokens of the prompt per step [default: all in one].
    #[arg(long, value_name = "N")]
    chunk: Option<std::num::NonZeroUsize>,
    /// Where to run.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// How to keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// Run blocks as the backend fuses them; activations inside a fused block are not written.
    #[arg(long)]
    fused: bool,
    /// File to write.
    #[arg(long, short, value_name = "FILE.safetensors")]
    output: PathBuf,
}

fn main() -> ExitCode {
    run(|| trace(Args::parse()))
}

fn trace(args: Args) -> Result<()> {
    let folder = model_folder(args.model.as_deref())?;
    let model = args.backend.load(&folder, args.quant)?;
    let ids = match &args.prompt {
        Some(text) => {
            let ids = Tokenizer::from_folder(&folder)?.encode(text)?;
            note!("--ids {}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
            ids
        }
        None => args.ids.unwrap_or_default(),
    };
    let prompt = ids.len().max(1);
    let chunk = args.chunk.map_or(prompt, |n| n.get().min(prompt));
    let context = prompt + args.decode.len();
    let mut session = model.session(SessionOptions { context, chunk, outputs: chunk })?;
    let detail = if args.fused { Detail::Blocks } else { Detail::Operators };
    let recording = Recording::new(&mut session, &ids, chunk, &args.decode, detail)?;
    recording.save(&args.output)?;
    note!("wrote {} tensors to {}", recording.tensors.len(), args.output.display());
    Ok(())
}
