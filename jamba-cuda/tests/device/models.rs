//! Whole models: transformers' activations for the golden configurations and the laws that need
//! no reference.

use std::collections::BTreeMap;
use std::fs;

use jamba_core::backend::Backend;
use jamba_core::recording::Recording;
use jamba_core::trace::Detail;
use jamba_core::{
    Batch, Config, LanguageModel, Limits, Model, ModelRunner, Outputs, Runner, SessionOptions,
    StatePart,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};
use safetensors::{Dtype, SafeTensors};

use crate::support::{Random, Rng, Tolerance, close, difference, open, root};

const GOLDENS: [&str; 7] = [
    "odd-shapes",
    "paper-block",
    "pure-attention",
    "pure-mamba",
    "reasoning-dense",
    "sharded-bf16",
    "top1-every-layer",
];

pub(crate) fn trials(backend: Option<&'static CudaBackend>) -> Vec<Trial> {
    let name = backend.map_or("any".into(), |b| format!("{:?}", b.precision()));
    let precision = backend.map(CudaBackend::precision);
    let trial = |what: String, run: fn(Precision, &str) -> Result<(), Failed>, golden| {
        Trial::test(format!("{name}::{what}"), move || run(precision.ok_or("no backend")?, golden))
    };
    let goldens = GOLDENS.map(|golden| trial(format!("golden::{golden}"), golden_model, golden));
    let mut trials = Vec::from(goldens);
    trials.push(trial("chunked_is_whole".into(), chunked, ""));
    trials.push(trial("batch_is_alone".into(), batched, ""));
    trials.push(trial("long_context".into(), long, ""));
    trials.push(trial("slots_are_copied".into(), copied, ""));
    trials.push(trial("demo_goes_on_as_on_the_cpu".into(), demo, ""));
    trials
}

/// Within 1e-4 of each tensor's largest value in f32. In bf16 every layer adds the roundings of
/// its products, and the tiny models average over few of them: 1 % in eight layers without
/// experts. A router that tips over between two nearly equal experts moves the rest of its token
/// by more, which some of 16 experts of random weights always do: what is held there is the mean,
/// over all tensors, of the root mean square.
fn golden_model(precision: Precision, name: &str) -> Result<(), Failed> {
    let folder = root().join("jamba-tests/golden").join(name);
    let bytes = fs::read(folder.join("golden.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let (mut ids, mut expected) = (BTreeMap::new(), BTreeMap::new());
    for (name, view) in file.iter() {
        match view.dtype() {
            Dtype::I64 => {
                let values = view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
                ids.insert(name.to_string(), values.map(|id| id as u32).collect::<Vec<_>>());
            }
            _ => {
                let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                expected.insert(name.to_string(), values.collect::<Vec<_>>());
            }
        }
    }
    let model = Model::load(&folder, open(precision)?)?;
    let (prompt, decode) = (&ids["input_ids"], &ids["decode_ids"]);
    let n = prompt.len() + decode.len();
    let options = SessionOptions { context: n, chunk: n, outputs: n };
    let mut session = model.session(options)?;
    let mut worst = 0f64;
    for chunk in [1, 3, 7, 16, usize::MAX] {
        let got = Recording::new(&mut session, prompt, chunk, decode, Detail::Operators)?;
        let mut failures = String::new();
        let mut shares = Vec::new();
        for (tensor, expected) in &expected {
            let got = got.tensors.get(tensor).ok_or(format!("{tensor} is missing"))?;
            let (element, rms) =
                difference(&got.values, expected).map_err(|e| format!("{tensor}: {e}"))?;
            shares.push(rms);
            worst = worst.max(if precision == Precision::F32 { element } else { rms });
            if precision == Precision::F32 && element > 1e-4 {
                failures += &format!("chunk {chunk}: {tensor}: element {element:.2e}\n");
            }
        }
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        if precision == Precision::Bf16 && mean > 6e-2 {
            failures += &format!("chunk {chunk}: mean of rms {mean:.2e}\n");
        }
        if !failures.is_empty() {
            return Err(failures.into());
        }
        if chunk == usize::MAX {
            println!(
                "{precision:?} {name}: {} tensors, worst {worst:.1e}, mean {mean:.1e}",
                shares.len()
            );
        }
    }
    Ok(())
}

/// A model with attention on tensor cores and long runs; without experts, so that no router can
/// tip over between roundings.
fn config() -> Config {
    let mut config = Config::preset("jamba-tales-11m").expect("a preset");
    (config.hidden_size, config.vocab_size) = (256, 1000);
    [config.num_attention_heads, config.num_key_value_heads, config.head_dim] = [4, 1, 64];
    config.num_experts = 1;
    (config.num_hidden_layers, config.attn_layer_period, config.attn_layer_offset) = (4, 4, 2);
    config
}

fn bounds(precision: Precision) -> Tolerance {
    match precision {
        Precision::F32 => Tolerance { element: 3e-5, rms: 1e-5 },
        Precision::Bf16 => Tolerance { element: 5e-2, rms: 2e-2 },
    }
}

fn last_logits(
    model: &Model<impl Backend + Send + Sync + 'static>,
    tokens: &[u32],
    chunk: usize,
) -> Result<Vec<f32>, Failed> {
    let options = SessionOptions { context: tokens.len(), chunk, outputs: 1 };
    Ok(model.session(options)?.append(tokens)?.to_vec())
}

/// The last logits of a prompt do not depend on how it is cut; they are the reference's.
fn chunked(precision: Precision, _: &str) -> Result<(), Failed> {
    let config = config();
    let model = Model::new(config.clone(), &Random(5), open(precision)?)?;
    let mut rng = Rng::new(11);
    let tokens: Vec<u32> = (0..700).map(|_| rng.below(1000) as u32).collect();
    let whole = last_logits(&model, &tokens, tokens.len())?;
    let again = last_logits(&model, &tokens, tokens.len())?;
    if whole.iter().zip(&again).any(|(a, b)| a.to_bits() != b.to_bits()) {
        return Err("a second run has other bits".into());
    }
    let reference = Model::new(config, &Random(5), ReferenceBackend::new())?;
    let expected = last_logits(&reference, &tokens, tokens.len())?;
    let (element, rms) = close("reference", &whole, &expected, &bounds(precision))?;
    println!("{precision:?} whole model: element {element:.1e}, rms {rms:.1e}");
    for chunk in [1, 13, 64, 65, 512] {
        let got = last_logits(&model, &tokens, chunk)?;
        let name = format!("chunks of {chunk}");
        let (element, rms) = close(&name, &got, &whole, &bounds(precision))?;
        println!("{precision:?} {name}: element {element:.1e}, rms {rms:.1e}");
    }
    Ok(())
}

/// Sequences that share steps get the logits that each gets alone.
fn batched(precision: Precision, _: &str) -> Result<(), Failed> {
    let config = config();
    let model = Model::new(config, &Random(6), open(precision)?)?;
    let mut rng = Rng::new(12);
    let lens = [90, 1, 17, 200];
    let texts = lens.map(|n| (0..n).map(|_| rng.below(1000) as u32).collect::<Vec<_>>());
    let limits = Limits { slots: 4, context: 256, tokens: 512, outputs: 4 };
    let mut runner = ModelRunner::new(model.clone(), limits)?;
    let mut batch = Batch::new();
    for (slot, text) in texts.iter().enumerate() {
        batch.push(slot, 0, text, Outputs::Last);
    }
    runner.step(&batch)?;
    let together = runner.logits()?;
    for (text, got) in texts.iter().zip(together.chunks_exact(1000)) {
        let alone = last_logits(&model, text, text.len())?;
        close(&format!("{} tokens", text.len()), got, &alone, &bounds(precision))?;
    }
    Ok(())
}

/// A context of 65,536 tokens gives the same last logits in chunks of different lengths.
fn long(precision: Precision, _: &str) -> Result<(), Failed> {
    let model = Model::new(config(), &Random(8), open(precision)?)?;
    let mut rng = Rng::new(13);
    let tokens: Vec<u32> = (0..1 << 16).map(|_| rng.below(1000) as u32).collect();
    let whole = last_logits(&model, &tokens, 1 << 14)?;
    for chunk in [1000, 1 << 12] {
        let name = format!("chunks of {chunk}");
        let got = last_logits(&model, &tokens, chunk)?;
        let (element, rms) = close(&name, &got, &whole, &bounds(precision))?;
        println!("{precision:?} 65536 tokens, {name}: element {element:.1e}, rms {rms:.1e}");
    }
    Ok(())
}

/// A copy of a slot goes on as the slot itself, and its state reads the same, whole or in parts.
fn copied(precision: Precision, _: &str) -> Result<(), Failed> {
    let config = config();
    let model = Model::new(config.clone(), &Random(9), open(precision)?)?;
    let limits = Limits { slots: 3, context: 64, tokens: 40, outputs: 2 };
    let mut runner = ModelRunner::new(model, limits)?;
    let mut rng = Rng::new(14);
    let tokens: Vec<u32> = (0..33).map(|_| rng.below(1000) as u32).collect();
    runner.step(&Batch::single(2, 0, &tokens, Outputs::None))?;
    runner.copy_slot(2, 0, tokens.len())?;
    let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    for part in [StatePart::Keys, StatePart::Values] {
        let all = runner.read_state(2, part, 2, tokens.len())?;
        let some = runner.read_positions(2, part, 0, 5..17)?;
        let heads = all.chunks_exact(tokens.len() * head_dim);
        let expected: Vec<f32> =
            heads.flat_map(|head| &head[5 * head_dim..17 * head_dim]).copied().collect();
        if some.len() != 12 * kv_heads * head_dim || some != expected {
            return Err(format!("positions 5 to 17 of {part:?} differ").into());
        }
        runner.write_positions(2, part, 0, 5..17, &some)?;
    }
    let mut batch = Batch::new();
    [2, 0].into_iter().for_each(|slot| batch.push(slot, tokens.len(), &[7], Outputs::Last));
    runner.step(&batch)?;
    let logits = runner.logits()?;
    let (of_slot, of_copy) = logits.split_at(logits.len() / 2);
    if of_slot == of_copy { Ok(()) } else { Err("the copy goes on differently".into()) }
}

/// Along the greedy continuation that the CPU backend finds for the demo model, the same token is
/// the best wherever the gap to the second is above what the precision can move.
fn demo(precision: Precision, _: &str) -> Result<(), Failed> {
    let folder = root().join("models/jamba-tales-11m");
    let options = SessionOptions { context: 320, chunk: 64, outputs: 64 };
    let cpu = Model::load(&folder, CpuBackend::new())?;
    let mut session = cpu.session(options)?;
    let mut tokens = vec![1u32];
    let mut gaps = Vec::new();
    for _ in 0..300 {
        let at = tokens.len() - 1;
        let logits = session.append(&tokens[at..])?;
        let (best, gap) = best_and_gap(logits);
        tokens.push(best);
        gaps.push(gap);
    }
    let cuda = Model::load(&folder, open(precision)?)?;
    let mut session = cuda.session(options)?;
    let bound = if precision == Precision::F32 { 1e-3 } else { 0.25 };
    let (mut held, mut other) = (0, Vec::new());
    session.append_each(&tokens[..300], |i, logits| {
        if gaps[i] > bound {
            held += 1;
            if best_and_gap(logits).0 != tokens[i + 1] {
                other.push(i);
            }
        }
    })?;
    println!("{precision:?} demo: {held} of 300 tokens have a gap above {bound}");
    if held < 150 {
        return Err(format!("only {held} tokens could be held to it").into());
    }
    if other.is_empty() { Ok(()) } else { Err(format!("other tokens at {other:?}").into()) }
}

/// The best token, and how far its logit is above the second.
fn best_and_gap(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}
