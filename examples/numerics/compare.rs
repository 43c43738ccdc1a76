//! Two backends layer by layer, or two traces by name: where one departs from the other.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use jamba_core::memory;
use jamba_core::random::RandomParams;
use jamba_core::schedule::ParamCount;
use jamba_core::{
    Backend, Batch, Checkpoint, Config, Dtype, Error, Limits, Model, Outputs, ParamSource,
    Precision, Result, WeightFormat,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
#[cfg(feature = "cuda")]
use jamba_examples::cuda;
use jamba_examples::{model_folder, parse_ids, print, run};
use jamba_tests::compare::{Difference, all_differences};
use jamba_tests::golden::read_trace;
use jamba_tests::lockstep::{LayerRunner, Layers, lockstep};
use jamba_tests::oracle::OracleBackend;

/// Runs a model on two backends in lockstep: every layer of B gets the input and the state that
/// A's gets, and the largest and the mean error of its output and states are shown. With --trace,
/// compares the tensors of two files by name instead, such as those that the trace example or
/// another engine wrote.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// The backend that gives the inputs and the expected values.
    #[arg(long, value_enum, default_value = "reference")]
    a: On,
    /// The backend that is compared with it.
    #[arg(long, value_enum, default_value = "cpu")]
    b: On,
    /// How both keep the weights: stored (as they are), experts-int8, int8 or int4.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    quant: WeightFormat,
    /// How A keeps them, if otherwise: what a format does to each layer.
    #[arg(long, value_name = "FORMAT")]
    quant_a: Option<WeightFormat>,
    /// Folder with config.json and safetensors [default: the demo model].
    #[arg(long, value_name = "DIR", conflicts_with = "preset")]
    model: Option<PathBuf>,
    /// The shape of a published model, with random weights in bf16. Each backend holds them all:
    /// cut large ones with --layers.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Seed of the random weights and tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Layers of the preset to keep.
    #[arg(long, value_name = "N", requires = "preset")]
    layers: Option<std::num::NonZeroUsize>,
    /// Token ids to run, separated by commas.
    #[arg(long, value_name = "1,2,3", value_parser = parse_ids)]
    ids: Option<std::vec::Vec<u32>>,
    /// Random tokens to run where no ids are given.
    #[arg(long, value_name = "N", default_value = "16", conflicts_with = "ids")]
    tokens: std::num::NonZeroUsize,
    /// Tokens per step.
    #[arg(long, value_name = "N", default_value = "8")]
    chunk: std::num::NonZeroUsize,
    /// Ends with exit code 1 if an error is larger than this share of its tensor's largest value, as it
    /// does where tensors of two files have other shapes or are missing.
    #[arg(long, value_name = "SHARE", value_parser = parse_bound)]
    at_most: Option<f64>,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Compares two safetensors files: the expected values, then those compared with them.
    #[arg(long, num_args = 2, value_names = ["A.safetensors", "B.safetensors"])]
    trace: Option<Vec<PathBuf>>,
}

/// The backends that can be compared: those of the other examples, and the oracle.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum On {
    /// In f64, of the conformance kit.
    Oracle,
    /// One obvious loop per equation, in f64.
    Reference,
    /// Multi-threaded, vectorised; products of bf16 or int8 where the weights are so.
    Cpu,
    /// The same with products of f32.
    CpuF32,
    /// The first NVIDIA GPU, bf16 weights and products (built with `--features cuda`).
    Cuda,
    /// The first NVIDIA GPU, everything in f32 (built with `--features cuda`).
    CudaF32,
}

impl On {
    /// As it is asked for.
    fn name(self) -> &'static str {
        match self {
            Self::Oracle => "oracle",
            Self::Reference => "reference",
            Self::Cpu => "cpu",
            Self::CpuF32 => "cpu-f32",
            Self::Cuda => "cuda",
            Self::CudaF32 => "cuda-f32",
        }
    }

    /// Bytes of the parameters in the host's memory, and of an element of activations and states.
    fn bytes(self, config: &Config, format: WeightFormat) -> [u64; 2] {
        let elements = ParamCount::new(config).total;
        match self {
            Self::Oracle => [elements.saturating_mul(8), 8],
            Self::Reference => [elements.saturating_mul(4), 4],
            Self::Cpu | Self::CpuF32 => [memory::weight_bytes(config, format), 4],
            // Parameters pass through one at a time.
            Self::Cuda | Self::CudaF32 => [0, 0],
        }
    }

    fn load(
        self,
        config: &Config,
        source: &impl ParamSource,
        limits: Limits,
        format: WeightFormat,
    ) -> Result<Box<dyn LayerRunner>> {
        match self {
            Self::Oracle if format != WeightFormat::Stored => {
                let what = format!("weights in {format}: the reference does");
                Err(Error::Unsupported { backend: "oracle", what })
            }
            Self::Oracle => layers(OracleBackend, config, source, limits),
            Self::Reference => {
                layers(ReferenceBackend::new().with_format(format), config, source, limits)
            }
            Self::Cpu => layers(CpuBackend::new().with_format(format), config, source, limits),
            Self::CpuF32 => {
                let backend = CpuBackend::new().with_format(format).with_precision(Precision::F32);
                layers(backend, config, source, limits)
            }
            #[cfg(feature = "cuda")]
            Self::Cuda => layers(cuda(Precision::Bf16, format)?, config, source, limits),
            #[cfg(feature = "cuda")]
            Self::CudaF32 => layers(cuda(Precision::F32, format)?, config, source, limits),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda | Self::CudaF32 => Err(jamba_examples::without_cuda()),
        }
    }
}

fn layers<B: Backend + 'static>(
    backend: B,
    config: &Config,
    source: &impl ParamSource,
    limits: Limits,
) -> Result<Box<dyn LayerRunner>> {
    Ok(Box::new(Layers::new(Model::new(config.clone(), source, backend)?, limits)?))
}

fn parse_bound(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(bound) if bound >= 0.0 => Ok(bound),
        _ => Err("a bound is a number, 0 or more".into()),
    }
}

fn main() -> ExitCode {
    let mut is_within = true;
    let code = run(|| {
        let args = Args::parse();
        match &args.trace {
            Some(files) => {
                is_within = traces(&args, files)?;
                Ok(())
            }
            None => match &args.preset {
                Some(name) => {
                    let mut config = Config::preset(name)?;
                    if let Some(layers) = args.layers {
                        let all = config.num_hidden_layers;
                        if layers.get() > all {
                            let value = format!("{layers}, of the {all} that {name} has");
                            let allowed = "it is how many to keep";
                            return Err(Error::Option { option: "layers", value, allowed });
                        }
                        config.num_hidden_layers = layers.get();
                    }
                    let source = RandomParams { seed: args.seed, dtype: Dtype::Bf16 };
                    is_within = backends(&args, &config, &source)?;
                    Ok(())
                }
                None => {
                    let folder = model_folder(args.model.as_deref())?;
                    let config = Config::from_folder(&folder)?;
                    is_within = backends(&args, &config, &Checkpoint::open(&folder)?)?;
                    Ok(())
                }
            },
        }
    });
    if is_within { code } else { ExitCode::FAILURE }
}

/// Whether all errors are as small as the arguments ask for.
fn backends(args: &Args, config: &Config, source: &impl ParamSource) -> Result<bool> {
    let tokens = args.ids.as_ref().map_or(args.tokens.get(), Vec::len);
    let chunk = args.chunk.get().min(tokens);
    let limits = Limits { slots: 1, context: tokens, tokens: chunk, outputs: chunk };
    fits(args, config, &limits)?;
    let ids = args.ids.clone().unwrap_or_else(|| {
        // Weyl's sequence: ids all over the vocabulary.
        let id = |i: usize| (i as u64 + args.seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (0..args.tokens.get()).map(|i| (id(i) % config.vocab_size as u64) as u32).collect()
    });
    if ids.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let mut a = args.a.load(config, source, limits, args.quant_a.unwrap_or(args.quant))?;
    let mut b = args.b.load(config, source, limits, args.quant)?;
    let chunks = ids.chunks(chunk).enumerate();
    let batches: Vec<Batch> =
        chunks.map(|(i, ids)| Batch::single(0, i * chunk, ids, Outputs::All)).collect();
    let mut report = lockstep(&mut *a, &mut *b, &batches)?;
    // Two precisions of a backend have one name.
    (report.a, report.b) = (args.a.name(), args.b.name());
    print(&if args.json { format!("{:#}\n", report.to_json()) } else { report.to_string() })?;
    Ok(args.at_most.is_none_or(|bound| report.largest()[0] <= bound))
}

/// Refuses what the machine has no memory for, before any of it is made: a system that promises
/// more than it has ends the program instead.
fn fits(args: &Args, config: &Config, limits: &Limits) -> Result<()> {
    config.validate()?;
    let widths = [
        4 * config.hidden_size + 4 * config.d_inner(),
        3 * config.intermediate_size + 2 * config.q_width() + 2 * config.kv_width(),
        config.vocab_size + config.num_experts + config.mamba_dt_rank + 2 * config.mamba_d_state,
    ];
    let columns = widths.iter().sum::<usize>() as u64;
    let bytes = |on: On, format| {
        let [weights, activation] = on.bytes(config, format);
        let step = columns.saturating_mul(limits.tokens as u64).saturating_mul(activation);
        let state = memory::sequence_bytes(config, limits.context, activation as usize);
        weights.saturating_add(step).saturating_add(state)
    };
    let needed =
        bytes(args.a, args.quant_a.unwrap_or(args.quant)).saturating_add(bytes(args.b, args.quant));
    let Some(free) = free_memory() else { return Ok(()) };
    if needed <= free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    Err(Error::Option {
        option: "preset, model or tokens",
        value: format!(
            "one that takes {:.1} GiB on both backends together, where {:.1} GiB are free",
            gib(needed),
            gib(free)
        ),
        allowed: "it must fit the machine: cut it with --layers, or run fewer --tokens",
    })
}

/// Bytes of memory that can still be used, where the system tells (Linux).
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Prints; a reader that has gone, such as `head`, is no error.
/// Whether both files have the same tensors, and all errors are as small as is asked for.
fn traces(args: &Args, files: &[PathBuf]) -> Result<bool> {
    let (expected, got) = (read_trace(&files[0])?, read_trace(&files[1])?);
    let differences = all_differences(&got, &expected);
    let is_within =
        |d: &Difference| d.fault.is_none() && args.at_most.is_none_or(|bound| d.element <= bound);
    let are_within = differences.iter().all(is_within);
    if args.json {
        let row = |d: &Difference| {
            serde_json::json!({
                "name": d.name, "largest": d.element, "rms": d.rms, "worst": d.worst,
                "fault": d.fault,
            })
        };
        let rows = differences.iter().map(row).collect::<serde_json::Value>();
        print(&format!("{rows:#}\n"))?;
        return Ok(are_within);
    }
    let lines: String = differences.iter().map(|d| format!("{d}\n")).collect();
    print(&format!(
        "{} against {}\nerrors as shares of the largest value, and root mean squares (rms)\n\n{lines}",
        files[1].display(),
        files[0].display()
    ))?;
    Ok(are_within)
}
