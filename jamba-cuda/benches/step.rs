//! Prefill and decode of the 3B shape with random weights, beside what the card does in the same
//! run. `cargo bench -p jamba-cuda [-- PRESET [PROMPT]]`; with a prompt length, it and one token
//! after it are all that is run, twice, to be looked at by a profiler.

use std::time::Instant;

use jamba_core::schedule::ParamCount;
use jamba_core::weights::ParamSpec;
use jamba_core::{
    Batch, Config, HostTensor, Limits, Model, ModelRunner, Outputs, Param, ParamSource, Role,
    Runner,
};
use jamba_cuda::CudaBackend;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Random values of the size that keeps activations near one, tiled from a block.
struct Random;

impl ParamSource for Random {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let n = spec.elements() as usize;
        let width = spec.shape.last().map_or(1.0, |&n| n as f32);
        let (low, high) = match spec.role {
            Role::A => (-16.0, -1.0),
            Role::Vector if spec.name.ends_with("dt_proj.bias") => (-5.0, -1.0),
            Role::Vector if spec.name.ends_with("bias") => (0.0, 0.0),
            Role::Vector => (0.9, 1.1),
            Role::Conv => (-0.5, 0.5),
            _ => (-(3.0 / width).sqrt(), (3.0 / width).sqrt()),
        };
        let mut state = spec.name.bytes().fold(1u64, |h, b| h.wrapping_mul(31) ^ u64::from(b));
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            low + (high - low) * (state >> 40) as f32 / (1 << 24) as f32
        };
        // A prime, so that rows do not repeat.
        let block: Vec<f32> = (0..1_000_003.min(n)).map(|_| next()).collect();
        let mut values = Vec::with_capacity(n);
        while values.len() < n {
            values.extend_from_slice(&block[..block.len().min(n - values.len())]);
        }
        Ok(Param::new(
            spec.name.clone(),
            spec.role,
            HostTensor::from_f32(spec.shape.clone(), values),
        ))
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let backend = match CudaBackend::new(0) {
        Ok(backend) => backend,
        Err(reason) => {
            println!("not run: no CUDA device: {reason}");
            return Ok(());
        }
    };
    let preset = arguments.first().map_or("jamba-reasoning-3b", String::as_str);
    let config = Config::preset(preset)?;
    println!("{backend:?}, {preset}");
    let limits = Limits { slots: 1, context: 40_960, tokens: 8192, outputs: 1 };
    println!("plan: {}", backend.plan(&config, &limits)?);

    let start = Instant::now();
    let model = Model::new(config.clone(), &Random, backend)?;
    model.backend().synchronize()?;
    println!("loaded in {:.1} s", start.elapsed().as_secs_f64());
    if let Some(tokens) = arguments.get(1) {
        let mut runner = ModelRunner::new(model, limits)?;
        let tokens: usize = tokens.parse()?;
        for _ in 0..2 {
            prefill(&mut runner, tokens)?;
            runner.step(&Batch::single(0, tokens, &ids(1), Outputs::Last))?;
        }
        runner.logits()?;
        return Ok(());
    }

    let probe = model.backend().probe()?;
    println!(
        "card: copy {:.0} GB/s, bf16 product {:.0} TFLOP/s",
        probe.copy_gb_per_s, probe.bf16_tflop_per_s
    );
    // Of an MoE model those that one token uses; a batch of several uses more of them.
    let active = ParamCount::new(&config).active;
    let flop = 2.0 * active as f64;

    let mut runner = ModelRunner::new(model.clone(), limits)?;
    for tokens in [512, 2048, 8192] {
        let seconds = median(5, || prefill(&mut runner, tokens))?;
        let rate = tokens as f64 / seconds;
        let tflops = rate * flop / 1e12;
        println!(
            "prefill {tokens}: {:.1} ms, {rate:.0} tokens/s, {tflops:.0} TFLOP/s of products \
             ({:.0} % of the card)",
            1e3 * seconds,
            100.0 * tflops / probe.bf16_tflop_per_s
        );
    }
    drop(runner);
    for (slots, context) in [(1, 512), (4, 512), (16, 512), (64, 512), (1, 16_384)] {
        let limits = Limits { slots, context: context + 64, tokens: 2048, outputs: slots };
        let mut runner = ModelRunner::new(model.clone(), limits)?;
        for slot in 0..slots {
            for position in (0..context).step_by(2048) {
                let n = 2048.min(context - position);
                runner.step(&Batch::single(slot, position, &ids(n), Outputs::None))?;
            }
        }
        let mut position = context;
        let seconds = median(32, || {
            let mut batch = Batch::new();
            (0..slots).for_each(|slot| batch.push(slot, position, &ids(1), Outputs::Last));
            position += 1;
            runner.step(&batch)?;
            runner.logits()?;
            Ok(())
        })?;
        let bytes = 2.0 * active as f64 / seconds / 1e9;
        println!(
            "decode, batch {slots} at {context}: {:.2} ms, {:.0} tokens/s, active weights at \
             {bytes:.0} GB/s ({:.0} % of the card)",
            1e3 * seconds,
            slots as f64 / seconds,
            100.0 * bytes / probe.copy_gb_per_s
        );
    }
    Ok(())
}

/// Runs a prompt and reads its last logits.
fn prefill(runner: &mut ModelRunner<CudaBackend>, tokens: usize) -> Result<()> {
    runner.reset(0)?;
    runner.step(&Batch::single(0, 0, &ids(tokens), Outputs::Last))?;
    let logits = runner.logits()?;
    if logits.iter().all(|v| v.is_finite()) { Ok(()) } else { Err("not finite".into()) }
}

fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7919 % 60_000) as u32).collect()
}

/// Median of so many repeats, after one that does not count.
fn median(repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[repeats / 2])
}
