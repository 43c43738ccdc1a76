//! The times of the kernels of a step: every launch once, none lost, and nothing left behind.

use std::time::Instant;

use jamba_core::weights::Weights;
use jamba_core::{Batch, Config, Error, Limits, Outputs, Role, Runner, Sampler, Sampling};
use jamba_cuda::{CudaBackend, KernelTime, Precision, profile};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, guarded, random, small};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::profile::{name}"), move || guarded(precision, run))
    };
    vec![
        trial("of_a_step", of_a_step),
        trial("of_experts", of_experts),
        trial("of_a_failure", of_a_failure),
    ]
}

const LIMITS: Limits = Limits { slots: 1, context: 64, tokens: 16, outputs: 1 };

/// Launches and bytes of the kernels whose names begin so.
fn of(kernels: &[KernelTime], names: &[&str]) -> (usize, f64) {
    let named = |kernel: &&KernelTime| names.iter().any(|name| kernel.name.starts_with(name));
    let named = kernels.iter().filter(named);
    named.fold((0, 0.0), |(n, bytes), kernel| (n + kernel.launches, bytes + kernel.bytes))
}

/// Bytes of the matrices that a step of one token multiplies with.
fn matrices(config: &Config, element: u64) -> f64 {
    let mut elements = 0;
    Weights::layout(config).for_each(|spec| {
        // dt_proj is part of the scan; the head may be the embedding.
        let is_product = match spec.role {
            Role::Selection => !spec.name.ends_with("dt_proj.weight"),
            Role::Embedding => config.tie_word_embeddings,
            role => matches!(role, Role::Head | Role::Linear | Role::Mlp),
        };
        elements += if is_product { spec.matrix_shape().iter().product() } else { 0 };
    });
    (elements * element) as f64
}

fn of_a_step(backend: CudaBackend) -> Result<(), Failed> {
    let element = match backend.precision() {
        Precision::Bf16 => 2,
        Precision::F32 => 4,
    };
    let config = small();
    let model = random(config.clone(), 1, backend)?;
    let mut runner = jamba_core::ModelRunner::new(model, LIMITS)?;
    runner.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
    let greedy = Sampler::new(Sampling::greedy(), config.vocab_size)?;
    let mut position = 3;
    let mut step = |runner: &mut dyn Runner| {
        runner.step(&Batch::single(0, position, &[5], Outputs::Last))?;
        position += 1;
        runner.choose(&[Some(greedy.choice())])
    };
    let mut profiled = Vec::new();
    for _ in 0..2 {
        // Between them as a graph, which has no launches of its own.
        step(&mut runner)?;
        step(&mut runner)?;
        let start = Instant::now();
        let kernels = profile(|| step(&mut runner).map(drop))?;
        let wall = start.elapsed().as_secs_f64();
        let sum: f64 = kernels.iter().map(|kernel| kernel.seconds).sum();
        check(0.0 < sum && sum < wall, format!("{sum} s of kernels in {wall} s"))?;
        let falls = kernels.windows(2).all(|k| k[0].seconds >= k[1].seconds);
        check(falls && kernels.iter().all(|k| k.seconds > 0.0), format!("{kernels:?}"))?;
        profiled.push(kernels);
    }
    let launches = |kernels: &[KernelTime]| {
        let mut all: Vec<_> = kernels.iter().map(|k| (k.name, k.launches)).collect();
        all.sort_unstable();
        all
    };
    let kernels = &profiled[0];
    check(launches(kernels) == launches(&profiled[1]), format!("{profiled:?}"))?;
    check(profile(|| Ok(()))?.is_empty(), "launches of nothing")?;

    // Three layers of Mamba with three products each and one of attention with two, each with an
    // MLP of two; and the head.
    let (products, bytes) = of(kernels, &["linear_"]);
    check(products == 3 * 3 + 2 + 4 * 2 + 1, format!("{products} products: {kernels:?}"))?;
    let least = matrices(&config, element);
    let is_near = (least..1.1 * least).contains(&bytes);
    check(is_near, format!("{bytes} bytes of products, {least} of matrices"))?;
    for (names, expected) in [
        (&["embed"][..], 1),
        (&["causal_conv1d"], 3),
        (&["dt_scan"], 3),
        (&["rms_norm", "add_rms_norm"], 9),
        (&["output_rows"], 1),
        (&["sample_parts", "sample"], 3),
    ] {
        let (count, _) = of(kernels, names);
        check(count == expected || names[0] == "sample_parts", format!("{count} of {names:?}"))?;
    }
    let told = kernels.iter().all(|kernel| kernel.bytes > 0.0);
    check(told, format!("bytes that are not told: {kernels:?}"))
}

/// Every kernel of a step with experts tells its bytes: of one token, of few and of a prompt.
fn of_experts(backend: CudaBackend) -> Result<(), Failed> {
    let mut config = small();
    (config.num_experts, config.num_experts_per_tok) = (4, 2);
    let model = random(config, 2, backend)?;
    let limits = Limits { slots: 1, context: 512, tokens: 300, outputs: 1 };
    let mut runner = jamba_core::ModelRunner::new(model, limits)?;
    let mut position = 0;
    for tokens in [1, 5, 300] {
        let ids: Vec<u32> = (0..tokens).collect();
        let kernels = profile(|| runner.step(&Batch::single(0, position, &ids, Outputs::Last)))?;
        position += ids.len();
        let (routes, _) = of(&kernels, &["moe_route"]);
        check(routes == 2, format!("{routes} routes of two layers: {kernels:?}"))?;
        let untold: Vec<_> = kernels.iter().filter(|kernel| kernel.bytes == 0.0).collect();
        check(untold.is_empty(), format!("{tokens} tokens, bytes that are not told: {untold:?}"))?;
    }
    Ok(())
}

/// What fails tells its error, and the next profile begins anew.
fn of_a_failure(backend: CudaBackend) -> Result<(), Failed> {
    let model = random(small(), 1, backend)?;
    let mut runner = jamba_core::ModelRunner::new(model, LIMITS)?;
    let failed = profile(|| {
        runner.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
        runner.step(&Batch::single(0, 1, &[1], Outputs::Last))
    });
    check(matches!(failed, Err(Error::Batch { .. })), format!("{failed:?}"))?;
    check(profile(|| Ok(()))?.is_empty(), "launches of the step that failed")
}
