//! Whole models, where the conformance kit has no case: sizes at the edge of what kernels are made
//! for, long contexts, copies of slots, and the demo model's text.

use std::sync::Arc;

use half::{bf16, f16};
use jamba_core::random::RandomParams;
use jamba_core::weights::ParamSpec;
use jamba_core::{
    Batch, Config, Dtype, GenerateOptions, HostTensor, LanguageModel, Limits, Model, ModelRunner,
    Outputs, Param, ParamSource, Runner, Sampling, SessionOptions, StatePart, Tokenizer,
    WeightFormat, generate,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use jamba_cuda::{CudaBackend, Precision};
use jamba_tests::lockstep::{Layers, lockstep};
use jamba_tests::tolerance::tolerance;
use libtest_mimic::{Failed, Trial};

use crate::support::{
    Unambiguous, check, close, guarded, guarded_with, law, of_table, random, root, small, text,
};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::models::{name}"), move || guarded(precision, run))
    };
    let mut trials = vec![
        trial("edges", edges),
        trial("beyond", beyond),
        trial("stored", stored),
        trial("prompts", prompts),
        trial("long", long),
        trial("copied", copied),
        trial("demo", demo),
        trial("text", demo_text),
    ];
    if precision == Precision::Bf16 {
        let format = WeightFormat::ExpertsInt8;
        let name = format!("{precision:?}::{format}::models::longest");
        trials.push(Trial::test(name, move || guarded_with(precision, format, longest)));
    }
    trials
}

/// The largest sizes that kernels are made for, layer by layer against the reference.
fn edges(backend: CudaBackend) -> Result<(), Failed> {
    let (precision, format) = of_table(backend.precision());
    let mut config = Config::preset("jamba-tales-11m")?;
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (48, 24, 101);
    [config.num_attention_heads, config.num_key_value_heads, config.head_dim] = [2, 2, 256];
    (config.num_experts, config.num_experts_per_tok) = (33, 3);
    (config.mamba_d_state, config.mamba_d_conv, config.mamba_dt_rank) = (256, 65, 3);
    (config.num_hidden_layers, config.attn_layer_period, config.attn_layer_offset) = (4, 2, 1);
    let source = RandomParams { seed: 3, dtype: Dtype::Bf16 };
    let limits = Limits { slots: 1, context: 200, tokens: 130, outputs: 130 };
    let mut reference =
        Layers::new(Model::new(config.clone(), &source, ReferenceBackend::new())?, limits)?;
    let mut cuda = Layers::new(Model::new(config, &source, backend)?, limits)?;
    let ids = text(1, 134, 101);
    let parts = [0..130, 130..131, 131..134];
    let batches = parts.map(|part| Batch::single(0, part.start, &ids[part], Outputs::All));
    let report = lockstep(&mut reference, &mut cuda, &batches)?;
    let beyond = report.beyond(tolerance("lockstep", precision, format));
    check(beyond.is_empty(), format!("{report}"))
}

/// Sizes that no kernel is made for are refused with the first runner, before any token.
fn beyond(backend: CudaBackend) -> Result<(), Failed> {
    type Enlarge = fn(&mut Config);
    let backend = Arc::new(backend);
    let sizes: [(&str, Enlarge); 4] = [
        ("d_state", |c| c.mamba_d_state = 257),
        ("d_conv", |c| c.mamba_d_conv = 66),
        ("head_dim", |c| c.head_dim = 257),
        ("number of experts", |c| c.num_experts = 1025),
    ];
    for (what, enlarge) in sizes {
        let mut config = small();
        enlarge(&mut config);
        let source = RandomParams { seed: 3, dtype: Dtype::Bf16 };
        let model = Model::new(config, &source, backend.clone())?;
        let limits = Limits { slots: 1, context: 8, tokens: 1, outputs: 1 };
        match model.runner(limits) {
            Ok(_) => return Err(format!("a runner of too large a {what}").into()),
            Err(error) => check(error.to_string().contains(what), format!("{what}: {error}"))?,
        }
    }
    Ok(())
}

/// Random parameters in any dtype, of values that all of them hold.
struct Stored(Dtype);

impl ParamSource for Stored {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let param = RandomParams { seed: 5, dtype: Dtype::Bf16 }.param(spec)?;
        // f16 has no small exponents, bf16 fewer digits, and vectors are drawn in f32.
        let hold = |v: &f32| if v.abs() < 1e-4 { 0.0 } else { bf16::from_f32(*v).to_f32() };
        let values: Vec<f32> = param.to_f32().iter().map(hold).collect();
        let halves = |bits: fn(f32) -> u16| {
            let bits = values.iter().map(|&v| bits(v)).collect();
            HostTensor::from_halves(self.0, param.shape.clone(), bits)
        };
        let tensor = match self.0 {
            Dtype::F32 => HostTensor::from_f32(param.shape.clone(), values),
            Dtype::F16 => halves(|v| f16::from_f32(v).to_bits()),
            Dtype::Bf16 => halves(|v| bf16::from_f32(v).to_bits()),
        };
        Ok(Param::new(param.name, param.role, tensor))
    }
}

/// The same values give the same bits whatever the dtype in which a checkpoint stores them.
fn stored(backend: CudaBackend) -> Result<(), Failed> {
    let backend = Arc::new(backend);
    let tokens = text(15, 40, 256);
    let logits = [Dtype::Bf16, Dtype::F16, Dtype::F32].map(|dtype| {
        let mut config = small();
        (config.num_experts, config.vocab_size) = (4, 256);
        let model = Model::new(config, &Stored(dtype), backend.clone())?;
        let mut session = model.session(SessionOptions { context: 40, ..Default::default() })?;
        Ok::<_, jamba_core::Error>(session.append(&tokens)?.to_vec())
    });
    let [bf16, f16, f32] = logits;
    let (bf16, f16, f32) = (bf16?, f16?, f32?);
    check(bf16.iter().any(|v| *v != 0.0), "logits of zero")?;
    check(bf16 == f16, "f16 gives other logits than bf16")?;
    check(bf16 == f32, "f32 gives other logits than bf16")
}

/// Prompts of two sequences, of more tokens than random problems have, and more after them: layer
/// by layer against the reference, then whole steps.
fn prompts(backend: CudaBackend) -> Result<(), Failed> {
    let backend = Arc::new(backend);
    let mut all = small();
    (all.num_experts, all.num_experts_per_tok) = (2, 2);
    // Few entries of an expert, and heads that the kernels of Hopper are not for.
    let mut few = small();
    (few.num_experts, few.num_experts_per_tok) = (32, 1);
    [few.num_attention_heads, few.num_key_value_heads, few.head_dim] = [4, 2, 32];
    (few.hidden_size, few.intermediate_size, few.mamba_dt_rank) = (136, 200, 20);
    let mut dense = small();
    [dense.num_attention_heads, dense.num_key_value_heads, dense.head_dim] = [20, 1, 128];
    (dense.hidden_size, dense.intermediate_size) = (200, 328);
    (dense.mamba_d_state, dense.mamba_d_conv, dense.mamba_dt_rank) = (12, 2, 12);
    [("all experts", all), ("few entries", few), ("dense", dense)]
        .into_iter()
        .try_for_each(|(name, config)| prompts_of(name, &config, backend.clone()))
}

fn prompts_of(name: &str, config: &Config, backend: Arc<CudaBackend>) -> Result<(), Failed> {
    let (precision, format) = of_table(backend.precision());
    let limits = Limits { slots: 2, context: 400, tokens: 330, outputs: 330 };
    let ids = text(3, 530, 1000);
    let mut first = Batch::new();
    first.push(1, 0, &ids[..201], Outputs::All);
    first.push(0, 0, &ids[201..330], Outputs::All);
    let mut second = Batch::new();
    second.push(0, 129, &ids[330..331], Outputs::All);
    second.push(1, 201, &ids[331..530], Outputs::All);
    let batches = [first, second];

    let source = Unambiguous { seed: 5, chooses: config.num_experts_per_tok < config.num_experts };
    let cuda = Model::new(config.clone(), &source, backend)?;
    let reference = Model::new(config.clone(), &source, ReferenceBackend::new())?;
    let layers = &mut Layers::new(cuda.clone(), limits)?;
    let report = lockstep(&mut Layers::new(reference.clone(), limits)?, layers, &batches)?;
    let beyond = report.beyond(tolerance("lockstep", precision, format));
    check(beyond.is_empty(), format!("{name}: {report}"))?;

    let (mut cuda, mut reference) =
        (ModelRunner::new(cuda, limits)?, ModelRunner::new(reference, limits)?);
    for batch in &batches {
        cuda.step(batch)?;
        reference.step(batch)?;
        let bound = tolerance("forward", precision, format);
        let (element, rms) = close(name, &cuda.logits()?, &reference.logits()?, bound)?;
        println!("{precision:?} prompts, {name}: element {element:.1e}, rms {rms:.1e}");
    }
    Ok(())
}

fn last_logits(
    model: &Model<CudaBackend>,
    tokens: &[u32],
    chunk: usize,
) -> jamba_core::Result<Vec<f32>> {
    let options = SessionOptions { context: tokens.len(), chunk, outputs: 1 };
    Ok(model.session(options)?.append(tokens)?.to_vec())
}

/// A context of 65,536 tokens gives the same last logits in chunks of different lengths.
fn long(backend: CudaBackend) -> Result<(), Failed> {
    let precision = backend.precision();
    let model = random(small(), 8, backend)?;
    let tokens = text(13, 1 << 16, 1000);
    let whole = last_logits(&model, &tokens, 8192)?;
    for chunk in [1000, 2048, 65_536] {
        let name = format!("{precision:?}: 65536 tokens in chunks of {chunk}, not 8192");
        let (element, rms) =
            close(&name, &last_logits(&model, &tokens, chunk)?, &whole, &law(precision))?;
        println!("{name}: element {element:.1e}, rms {rms:.1e}");
    }
    Ok(())
}

/// The longest context of the published models, with experts that are quantised.
fn longest(backend: CudaBackend) -> Result<(), Failed> {
    let precision = backend.precision();
    let mut config = small();
    (config.num_experts, config.num_experts_per_tok) = (4, 2);
    // All experts are chosen by the same right, so that what is rounded does not choose others.
    let model = Model::new(config, &Unambiguous { seed: 5, chooses: true }, backend)?;
    let tokens = text(17, 1 << 18, 1000);
    let whole = last_logits(&model, &tokens, 8192)?;
    let name = format!("{precision:?}: 262144 tokens in chunks of 5000, not 8192");
    let (element, rms) =
        close(&name, &last_logits(&model, &tokens, 5000)?, &whole, &law(precision))?;
    println!("{name}: element {element:.1e}, rms {rms:.1e}");
    Ok(())
}

/// A copy of a slot goes on as the slot itself, and its state reads the same, whole or in parts.
fn copied(backend: CudaBackend) -> Result<(), Failed> {
    let config = small();
    let model = random(config.clone(), 9, backend)?;
    let limits = Limits { slots: 3, context: 64, tokens: 40, outputs: 2 };
    let mut runner = ModelRunner::new(model, limits)?;
    let tokens = text(14, 33, 1000);
    runner.step(&Batch::single(2, 0, &tokens, Outputs::None))?;
    runner.copy_slot(2, 0, tokens.len())?;
    let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    for part in [StatePart::Keys, StatePart::Values] {
        let all = runner.read_state(2, part, 2, 0..tokens.len())?;
        let some = runner.read_state(2, part, 0, 5..17)?;
        let heads = all.chunks_exact(tokens.len() * head_dim);
        let expected: Vec<f32> =
            heads.flat_map(|head| &head[5 * head_dim..17 * head_dim]).copied().collect();
        let is_same = some.len() == 12 * kv_heads * head_dim && some == expected;
        check(is_same, format!("positions 5 to 17 of {part:?} differ"))?;
        runner.write_state(2, part, 0, 5..17, &some)?;
    }
    let mut batch = Batch::new();
    [2, 0].into_iter().for_each(|slot| batch.push(slot, tokens.len(), &[7], Outputs::Last));
    runner.step(&batch)?;
    let logits = runner.logits()?;
    let (of_slot, of_copy) = logits.split_at(logits.len() / 2);
    check(of_slot == of_copy, "the copy goes on differently")
}

/// A difference of logits above which a precision finds the same best token.
pub(crate) fn gap(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 1e-3,
        Precision::Bf16 => 0.25,
    }
}

/// Along the greedy continuation that the CPU backend finds for the demo model with products of f32, the
/// same token is the best wherever the gap to the second is above what the precision can move.
fn demo(backend: CudaBackend) -> Result<(), Failed> {
    let folder = root().join("models/jamba-tales-11m");
    let precision = backend.precision();
    let options = |chunk| SessionOptions { context: 320, chunk, outputs: chunk };
    let cpu = CpuBackend::new().with_precision(Precision::F32);
    let mut session = Model::load(&folder, cpu)?.session(options(64))?;
    let mut tokens = vec![1u32];
    let mut gaps = Vec::new();
    for at in 0..300 {
        let (best, gap) = best_and_gap(session.append(&tokens[at..])?);
        tokens.push(best);
        gaps.push(gap);
    }
    let model = Model::load(&folder, backend)?;
    // Steps that keep f32 within blocks, those of prompts, and both.
    for chunk in [64, 300, 170] {
        let (mut held, mut other) = (0, Vec::new());
        model.session(options(chunk))?.append_each(&tokens[..300], |i, logits| {
            if gaps[i] > gap(precision) {
                held += 1;
                if best_and_gap(logits).0 != tokens[i + 1] {
                    other.push(i);
                }
            }
        })?;
        println!("{precision:?} demo: {held} of 300 tokens have a gap above {}", gap(precision));
        check(held >= 150, format!("only {held} tokens could be held to it"))?;
        check(other.is_empty(), format!("chunks of {chunk}: other tokens at {other:?}"))?;
    }
    Ok(())
}

/// The best token, and how far its logit is above the second.
pub(crate) fn best_and_gap(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}

/// The greedy texts of the demo model, chosen on the device, are the CPU's up to the first token
/// whose gap is too small to say.
fn demo_text(backend: CudaBackend) -> Result<(), Failed> {
    let folder = root().join("models/jamba-tales-11m");
    let precision = backend.precision();
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let (cpu, cuda) = (Model::load(&folder, CpuBackend::new())?, Model::load(&folder, backend)?);
    let options = GenerateOptions {
        sampling: Sampling::greedy(),
        max_tokens: 200,
        ..GenerateOptions::default()
    };
    for prompt in ["Once upon a time", "The little dog", "Tom and Sue"] {
        let told = |model: &dyn LanguageModel| {
            let session = SessionOptions { context: 256, ..SessionOptions::default() };
            generate(&mut model.session(session)?, &tokenizer, prompt, options.clone())
        };
        let (expected, got) = (told(&cpu)?, told(&cuda)?);
        let same = expected.ids.iter().zip(&got.ids).take_while(|(a, b)| a == b).count();
        println!("{precision:?} {prompt:?}: {same} of {} tokens are the CPU's", expected.ids.len());
        if expected.ids == got.ids {
            check(expected.text == got.text, "the same tokens, but another text")?;
            continue;
        }
        // They part: the two best must have been close.
        let held = [&expected.prompt_ids[..], &expected.ids[..same]].concat();
        let mut session = cpu.session(SessionOptions { context: 256, ..Default::default() })?;
        let (_, found) = best_and_gap(session.append(&held)?);
        check(found <= gap(precision), format!("{prompt:?} parts at {same}, gap {found}"))?;
    }
    Ok(())
}
