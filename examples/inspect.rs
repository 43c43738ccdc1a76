//! What a model is made of and what it needs: schedule, parameters, memory by context.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use jamba_core::error::escaped;
use jamba_core::memory::{kv_bytes, mamba_state_bytes, sequences_that_fit, weight_bytes};
use jamba_core::preset;
use jamba_core::schedule::{FeedForwardKind, MixerKind, ParamCount, Schedule};
use jamba_core::weights::{ParamSpec, Weights};
use jamba_core::{Checkpoint, Config, Dtype, ParamSource, Result, Role, WeightFormat};
use jamba_examples::{model_folder, print, run};

/// Shows the schedule of a model's layers, its parameters in total and active, and the memory it
/// needs by context.
#[derive(Parser)]
#[command(after_help = presets(), allow_negative_numbers = true)]
struct Args {
    /// Folder with config.json; weights beside it are checked too [default: the demo model].
    #[arg(long, value_name = "DIR", conflicts_with = "preset")]
    model: Option<PathBuf>,
    /// A published model, without its files.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Show this context too, in tokens.
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Show how many sequences fit so much memory, beside the weights.
    #[arg(long, value_name = "GIB")]
    memory: Option<NonZeroU32>,
}

/// Adds a line to a text.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {{
        $out.push_str(&format!($($arg)*));
        $out.push('\n');
    }};
}

fn presets() -> String {
    let lines = preset::presets().iter().map(|p| {
        let names: Vec<_> = p.names().collect();
        format!("  {}\n      {}\n", names.join(", "), p.about)
    });
    format!("Presets:\n{}", lines.collect::<String>())
}

fn main() -> ExitCode {
    run(|| inspect(&Args::parse()))
}

fn inspect(args: &Args) -> Result<()> {
    let (title, config, folder) = match (&args.preset, &args.model) {
        (Some(name), _) => (name.to_lowercase(), Config::preset(name)?, None),
        (None, model) => {
            let folder = model_folder(model.as_deref())?;
            (folder.display().to_string(), Config::from_folder(&folder)?, Some(folder))
        }
    };
    let mut out = format!("{title}\n\n");
    sizes(&mut out, &config);
    schedule(&mut out, &config);
    parameters(&mut out, &config);
    let contexts = contexts(args.context);
    memory(&mut out, &config, &contexts);
    if let Some(memory) = args.memory {
        sequences(&mut out, &config, &contexts, memory.get());
    }
    table_1(&mut out, &config)?;
    if let Some(folder) = folder {
        check_weights(&mut out, &config, &folder)?;
    }
    print(&out)
}

fn sizes(out: &mut String, c: &Config) {
    line!(
        out,
        "hidden {}, vocabulary {}{}, {} query heads and {} key/value heads of {}",
        c.hidden_size,
        c.vocab_size,
        if c.tie_word_embeddings { " (head tied to the embedding)" } else { "" },
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
    );
    line!(
        out,
        "Mamba: d_inner {}, d_state {}, d_conv {}, dt_rank {}; MLP and experts: {} wide",
        c.d_inner(),
        c.mamba_d_state,
        c.mamba_d_conv,
        c.mamba_dt_rank,
        c.intermediate_size,
    );
}

fn schedule(out: &mut String, config: &Config) {
    line!(out, "\nSchedule: M Mamba, A attention; . MLP, E experts ({})", experts(config));
    let layers: Vec<_> = Schedule::new(config).iter().collect();
    let per_row = if config.attn_layer_period <= 16 { config.attn_layer_period.max(8) } else { 16 };
    for (row, kinds) in layers.chunks(per_row).enumerate() {
        let mixers: String =
            kinds.iter().map(|k| if k.mixer == MixerKind::Attention { 'A' } else { 'M' }).collect();
        let feed_forwards: String = kinds
            .iter()
            .map(|k| if k.feed_forward == FeedForwardKind::Moe { 'E' } else { '.' })
            .collect();
        let first = row * per_row;
        let last = first + kinds.len() - 1;
        line!(out, "  layers {first:3} to {last:3}   {mixers}   {feed_forwards}");
    }
}

fn experts(config: &Config) -> String {
    match config.num_experts {
        0 | 1 => "none".into(),
        n => format!("{n}, of which a token uses {}", config.num_experts_per_tok),
    }
}

fn parameters(out: &mut String, config: &Config) {
    let count = ParamCount::new(config);
    line!(out, "\nParameters: {} total, {} active", millions(count.total), millions(count.active));
    let parts: [(&str, &[Role]); 5] = [
        ("embedding and head", &[Role::Embedding, Role::Head]),
        ("mixers", &[Role::Linear, Role::Selection, Role::Conv, Role::A]),
        ("MLPs", &[Role::Mlp]),
        ("experts and routers", &[Role::Experts, Role::Router]),
        ("norms, biases, D", &[Role::Vector]),
    ];
    for (name, roles) in parts {
        let mut sum = 0;
        Weights::layout(config).for_each(|spec: &ParamSpec| {
            sum += if roles.contains(&spec.role) { spec.elements() } else { 0 };
        });
        let share = 100.0 * sum as f64 / count.total as f64;
        line!(out, "  {name:20} {:>12}  {share:5.1} %", millions(sum));
    }
}

/// The contexts that are shown, ascending.
fn contexts(context: Option<usize>) -> Vec<usize> {
    let mut contexts = vec![4 << 10, 32 << 10, 128 << 10, 256 << 10, 1 << 20];
    contexts.extend(context);
    contexts.sort_unstable();
    contexts.dedup();
    contexts
}

fn memory(out: &mut String, config: &Config, contexts: &[usize]) {
    line!(out, "\nWeights by format (--quant of the other examples)");
    for format in WeightFormat::ALL {
        let size = weight_bytes(config, format);
        let bits = 8.0 * size as f64 / ParamCount::new(config).total as f64;
        line!(out, "  {format:20} {:>12}  {bits:5.2} bits a weight", bytes(size));
    }
    let state = mamba_state_bytes(config, Dtype::F32.size());
    line!(out, "\nMamba state, any context {:>10} a sequence", bytes(state));
    line!(out, "The CPU backends keep keys and values in f32: twice the KV cache below.");
    let names = WeightFormat::ALL.map(|format| format!("{:>14}", format.name()));
    line!(out, "\nAll together, by context and format of the weights");
    line!(out, "   Context  KV cache, 16 bit{}", names.concat());
    for &context in contexts {
        let kv = kv_bytes(config, context, Dtype::Bf16.size());
        let all = WeightFormat::ALL.map(|format| {
            let all = weight_bytes(config, format).saturating_add(kv).saturating_add(state);
            format!("{:>14}", bytes(all))
        });
        line!(out, "{:>10}  {:>16}{}", thousands(context as u64), bytes(kv), all.concat());
    }
}

/// How many sequences fit beside the weights: KV cache in 16 bits, Mamba state in f32.
fn sequences(out: &mut String, config: &Config, contexts: &[usize], gib: u32) {
    line!(out, "\nSequences that fit {gib} GiB, by context and format of the weights");
    let names = WeightFormat::ALL.map(|format| format!("{:>14}", format.name()));
    line!(out, "   Context{}", names.concat());
    for &context in contexts {
        let fit = WeightFormat::ALL.map(|format| {
            let left = (u64::from(gib) << 30).saturating_sub(weight_bytes(config, format));
            let fit = sequences_that_fit(config, context, Dtype::Bf16.size(), left);
            format!("{:>14}", thousands(fit))
        });
        line!(out, "{:>10}{}", thousands(context as u64), fit.concat());
    }
}

/// Table 1 of arXiv 2403.19887: parameters, and the KV cache at 256K tokens, 16 bit.
fn table_1(out: &mut String, config: &Config) -> Result<()> {
    let mixtral = Config::preset("mixtral-8x7b")?;
    let mut mistral = mixtral.clone();
    (mistral.num_experts, mistral.num_experts_per_tok) = (1, 1);
    let mut llama = mistral.clone();
    (llama.num_key_value_heads, llama.intermediate_size) = (32, 11_008);
    let models = [
        ("Llama-2 7B", &llama),
        ("Mistral 7B", &mistral),
        ("Mixtral 8x7B", &mixtral),
        ("Jamba-v0.1", &Config::preset("jamba-v0.1")?),
        ("this model", config),
    ];
    line!(out, "\nKV cache at 256K tokens, 16 bit (Table 1 of arXiv 2403.19887)");
    line!(out, "{:16} {:>12} {:>12} {:>12}", "", "parameters", "active", "KV cache");
    for (name, config) in models {
        let count = ParamCount::new(config);
        let kv = kv_bytes(config, 256 << 10, Dtype::Bf16.size());
        let [total, active] = [count.total, count.active].map(millions);
        line!(out, "  {name:14} {total:>12} {active:>12} {:>12}", bytes(kv));
    }
    Ok(())
}

/// Reads the headers of the weights, if they are there, and checks every tensor's name and shape.
fn check_weights(out: &mut String, config: &Config, folder: &Path) -> Result<()> {
    let checkpoint = match Checkpoint::open(folder) {
        Err(jamba_core::Error::Missing { wanted, .. }) => {
            line!(out, "\nNo weights here ({wanted}).");
            return Ok(());
        }
        opened => opened?,
    };
    let layout = Weights::layout(config);
    let mut dtypes = std::collections::BTreeMap::<String, u64>::new();
    layout.try_map(&mut |spec: &ParamSpec| {
        let param = checkpoint.param(spec)?;
        for part in &param.parts {
            *dtypes.entry(part.dtype().to_string()).or_default() += part.bytes().len() as u64;
        }
        Ok::<_, jamba_core::Error>(())
    })?;
    let sizes: Vec<_> =
        dtypes.iter().map(|(dtype, n)| format!("{} of {dtype}", bytes(*n))).collect();
    let unused = checkpoint.unused(&layout);
    let are = if unused.is_empty() { "complete" } else { "not only this model's" };
    line!(out, "\nWeights in this folder: {are}; {}", sizes.join(", "));
    if !unused.is_empty() {
        let (n, name) = (unused.len(), escaped(&unused[0]));
        line!(
            out,
            "  {n} tensors are not part of this model, which is not loaded with them: {name}"
        );
    }
    Ok(())
}

fn bytes(n: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| n >= *unit) {
        Some((unit, name)) => format!("{:.2} {name}", n as f64 / unit as f64),
        None => format!("{n} B"),
    }
}

fn millions(n: u64) -> String {
    if n >= 1_000_000_000 {
        format!("{:.2} B", n as f64 / 1e9)
    } else {
        format!("{:.2} M", n as f64 / 1e6)
    }
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
