//! What the trials have in common: the backend, the guards around its memory, random texts.

use std::path::PathBuf;
use std::sync::OnceLock;

use jamba_core::random::RandomParams;
use jamba_core::weights::ParamSpec;
use jamba_core::{Config, Dtype, HostTensor, Model, Param, ParamSource, Role, WeightFormat};
use jamba_cuda::{CudaBackend, CudaOptions, KernelCache, Precision};
use jamba_tests::conformance::Instance;
use jamba_tests::problem::AnyProblem;
use jamba_tests::problem::block::{Block, Sizes};
use jamba_tests::problem::linear::Linear;
use jamba_tests::problem::mlp::Mlp;
use jamba_tests::problem::moe_experts::MoeExperts;
use jamba_tests::problem::ragged::{Ragged, Rows, Sequence};
use jamba_tests::tolerance::Tolerance;
use jamba_tests::{Format, Support};
use libtest_mimic::Failed;

use crate::prompts;

pub(crate) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Names a folder for compiled kernels that stays: for several runs one after another.
pub(crate) const KERNELS: &str = "JAMBA_KERNELS";

/// Where the trials keep compiled kernels.
pub(crate) fn cache() -> KernelCache {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let own = || std::env::temp_dir().join(format!("jamba-cuda-{}", std::process::id()));
    let folder = || std::env::var_os(KERNELS).map_or_else(own, PathBuf::from);
    KernelCache::Folder(FOLDER.get_or_init(folder).clone())
}

/// The first card. Its memory lies between guards, unless `JAMBA_UNGUARDED` is set: a sanitizer
/// sees itself what is written beyond an allocation, but not within a guard.
pub(crate) fn open(precision: Precision) -> jamba_cuda::Result<CudaBackend> {
    open_with(precision, WeightFormat::Stored)
}

/// The same with weights in a format.
pub(crate) fn open_with(
    precision: Precision,
    format: WeightFormat,
) -> jamba_cuda::Result<CudaBackend> {
    let is_guarded = std::env::var_os("JAMBA_UNGUARDED").is_none();
    CudaBackend::with_options(CudaOptions {
        precision,
        format,
        cache: cache(),
        is_guarded,
        ..CudaOptions::default()
    })
}

/// Runs a trial on a backend of its own, and then looks at the guards around all memory that it
/// took, which is free by then.
pub(crate) fn guarded<T>(
    precision: Precision,
    trial: impl FnOnce(CudaBackend) -> Result<T, Failed>,
) -> Result<T, Failed> {
    guarded_with(precision, WeightFormat::Stored, trial)
}

/// The same with weights in a format.
pub(crate) fn guarded_with<T>(
    precision: Precision,
    format: WeightFormat,
    trial: impl FnOnce(CudaBackend) -> Result<T, Failed>,
) -> Result<T, Failed> {
    let backend = open_with(precision, format)?;
    let overruns = backend.overruns();
    let passed = trial(backend)?;
    match overruns() {
        0 => Ok(passed),
        n => Err(format!("{n} allocations were written beyond").into()),
    }
}

/// Problems of a case in a format that quantises: what does not touch weights is the same code as
/// in all problems of the stored ones.
const CASES_QUANTISED: u32 = 16;

/// What the conformance kit is to ask of a precision, of weights as they are stored or in a format:
/// prompts and products first, then random problems.
pub(crate) fn support(precision: Precision, format: Option<Format>) -> Support {
    let (kit, stored) = of_table(precision);
    let support = Support::default().precision(kit);
    let all = [stored];
    let (support, weights) = match (format, precision) {
        (Some(format), _) => (support.weights(&[format]).cases(CASES_QUANTISED), format),
        (None, Precision::F32) => (support.weights(&Format::STORED), stored),
        (None, Precision::Bf16) => (support.weights(&all), stored),
    };
    let lines = products(kit, weights).into_iter().map(|problem| format!("{problem}\n"));
    let lines = lines.collect::<String>() + &prompts::regressions(kit, weights);
    support.regressions(lines.trim_end())
}

/// The rows of the table of tolerances that a precision is held to.
pub(crate) fn of_table(precision: Precision) -> (jamba_tests::Precision, Format) {
    match precision {
        Precision::F32 => (jamba_tests::Precision::F32, Format::F32),
        Precision::Bf16 => (jamba_tests::Precision::Bf16, Format::Bf16),
    }
}

/// Products of every number of rows for which there is another kernel, which random problems are
/// too small for.
fn products(precision: jamba_tests::Precision, weights: Format) -> Vec<Instance> {
    let mut problems = Vec::new();
    for (i, rows) in [1, 7, 9, 16, 17, 31, 40, 64, 65].into_iter().enumerate() {
        let seed = i as u32;
        for (k, n, beside) in [(96, 80, [0, 0]), (1000, 33, [0, 0]), (77, 300, [3, 4])] {
            let (pieces, bias) = (2, i % 2 == 0);
            problems.push(AnyProblem::Linear(Linear {
                rows,
                k,
                n,
                beside,
                pieces,
                bias,
                weights,
                precision,
                seed,
            }));
        }
        let seqs = vec![Sequence { slot: 0, past: 0, len: rows, rows: Rows::None }];
        let sizes = Sizes { hidden: 48 + 8 * i, inter: 100 + i, ..Sizes::small() };
        let batch = Ragged { slots: 1, seqs };
        problems.push(AnyProblem::Mlp(Mlp(Block { sizes, batch, weights, precision, seed })));
        for (rows, experts, top_k) in [(rows, 16, 2), (2 * rows, 40, 2), (rows, 3, 2)] {
            let (hidden, inter) = (64 + 5 * i, 40 + 3 * i);
            problems.push(AnyProblem::MoeExperts(MoeExperts {
                rows,
                hidden,
                inter,
                experts,
                top_k,
                weights,
                precision,
                seed,
                ties: false,
                pieces: 1,
            }));
        }
    }
    problems.into_iter().map(Instance::Problem).collect()
}

/// How far two ways to the same logits may be from each other: less than the kit allows, as the
/// residual stream, sums and states are f32 in both precisions.
pub(crate) fn law(precision: Precision) -> Tolerance {
    let reason = "four layers, products summed in another order";
    match precision {
        Precision::F32 => Tolerance { element: 3e-5, rms: 1e-5, reason },
        Precision::Bf16 => Tolerance { element: 5e-2, rms: 2e-2, reason },
    }
}

/// A model of four layers with the sizes of trained ones, small enough for long texts.
pub(crate) fn small() -> Config {
    let mut config = Config::preset("jamba-tales-11m").expect("a preset");
    (config.hidden_size, config.vocab_size, config.num_experts) = (256, 1000, 1);
    [config.num_attention_heads, config.num_key_value_heads, config.head_dim] = [4, 1, 64];
    (config.num_hidden_layers, config.attn_layer_period, config.attn_layer_offset) = (4, 4, 2);
    config
}

/// A model of random weights.
pub(crate) fn random(
    config: Config,
    seed: u64,
    backend: CudaBackend,
) -> jamba_core::Result<Model<CudaBackend>> {
    Model::new(config, &RandomParams { seed, dtype: Dtype::Bf16 }, backend)
}

/// Random weights; where experts are chosen, with a router that gives all the same, so that the
/// first are, whatever is rounded.
pub(crate) struct Unambiguous {
    pub(crate) seed: u64,
    pub(crate) chooses: bool,
}

impl ParamSource for Unambiguous {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let param = RandomParams { seed: self.seed, dtype: Dtype::Bf16 }.param(spec)?;
        if spec.role != Role::Router || !self.chooses {
            return Ok(param);
        }
        let zeros = vec![0.0; param.to_f32().len()];
        let tensor = HostTensor::from_f32(param.shape.clone(), zeros);
        Ok(Param::new(param.name, param.role, tensor))
    }
}

/// Token ids of a random text.
pub(crate) fn text(seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % vocab_size
    };
    (0..len).map(|_| next() as u32).collect()
}

/// The root of the project.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("JAMBA_ROOT") {
        Some(root) => root.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

/// Largest error as a share of the largest value, and root mean square of the errors as a share
/// of that of the values; an error where one is beyond the tolerance.
pub(crate) fn close(
    name: &str,
    got: &[f32],
    expected: &[f32],
    t: &Tolerance,
) -> Result<(f64, f64), Failed> {
    if got.len() != expected.len() || !got.iter().all(|v| v.is_finite()) {
        return Err(format!("{name}: {} values, or not all finite", got.len()).into());
    }
    let (mut worst, mut largest, mut error, mut square) = (0f64, 0f64, 0f64, 0f64);
    for (&g, &e) in got.iter().zip(expected) {
        let (g, e) = (f64::from(g), f64::from(e));
        worst = worst.max((g - e).abs());
        largest = largest.max(e.abs());
        error += (g - e).powi(2);
        square += e * e;
    }
    let share = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
    let (element, rms) = (share(worst, largest), share(error.sqrt(), square.sqrt()));
    if element <= t.element && rms <= t.rms {
        return Ok((element, rms));
    }
    Err(format!("{name}: element {element:.2e}, rms {rms:.2e}; {t:?}").into())
}

pub(crate) fn check(holds: bool, otherwise: impl Into<Failed>) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
