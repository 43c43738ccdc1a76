//! Decode steps as graphs: to the bit those launched kernel by kernel.

use jamba_core::backend::{Backend, Scratch};
use jamba_core::trace::{Activation, Detail};
use jamba_core::{
    Batch, Cols, Config, Limits, Model, ModelRunner, Outputs, Runner, WeightFormat, compose,
};
use jamba_cuda::{CudaBackend, Precision, State, Tensor};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, close, guarded, guarded_with, law, random, small, text};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::step::{name}"), move || guarded(precision, run))
    };
    let mut trials = vec![
        trial("graph_equals_eager", graph_equals_eager),
        trial("many_graphs", many_graphs),
        trial("other_memory", other_memory),
        trial("decode_as_prompt", decode_as_prompt),
    ];
    // In f32 what is quantised is kept, and so launched, as what is not.
    let formats = WeightFormat::ALL.into_iter().filter(|f| *f != WeightFormat::Stored);
    for format in formats.filter(|_| precision == Precision::Bf16) {
        let mut trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
            let name = format!("{precision:?}::{format}::step::{name}");
            trials.push(Trial::test(name, move || guarded_with(precision, format, run)));
        };
        trial("graph_equals_eager", graph_equals_eager);
        trial("decode_as_prompt", decode_as_prompt);
        trial("many_graphs", many_graphs);
    }
    trials
}

/// A state and its scratch, run by hand.
struct By {
    scratch: Scratch<Tensor>,
    state: State,
}

impl By {
    fn new(model: &Model<CudaBackend>, limits: &Limits) -> jamba_core::Result<Self> {
        let (backend, config) = (model.backend(), model.config());
        let scratch = Scratch::new(backend, config, limits)?;
        Ok(Self { scratch, state: backend.new_state(config, limits)? })
    }

    /// Logits of a step, in the step of the backend or in that of the composition, which runs the
    /// backend's own blocks but knows no graph.
    fn step(
        &mut self,
        model: &Model<CudaBackend>,
        batch: &Batch,
        is_composed: bool,
    ) -> jamba_core::Result<Vec<f32>> {
        let (b, config, weights) = (model.backend(), model.config(), model.weights());
        b.stage(&mut self.state, batch)?;
        let Self { scratch, state } = self;
        match is_composed {
            true => compose::forward(b, config, weights, scratch, state)?,
            false => b.forward(config, weights, scratch, state)?,
        }
        b.read(Cols { tensor: &scratch.logits, cols: 0..config.vocab_size })
    }
}

const SLOTS: usize = 11;
const LIMITS: Limits = Limits { slots: SLOTS, context: 300, tokens: 200, outputs: SLOTS };

/// A step of the sequences in `slots`, whose lengths go on.
fn decode(lengths: &mut [usize], slots: &[usize], seed: usize, vocab_size: usize) -> Batch {
    let mut batch = Batch::new();
    for &slot in slots {
        let id = text((seed * 31 + slot + 1) as u64, 1, vocab_size);
        batch.push(slot, lengths[slot], &id, Outputs::Last);
        lengths[slot] += 1;
    }
    batch
}

/// A model with layers of every kind.
fn every_kind() -> Config {
    let mut config = small();
    (config.num_experts, config.num_experts_per_tok) = (4, 2);
    config
}

fn graph_equals_eager(backend: CudaBackend) -> Result<(), Failed> {
    let model = random(every_kind(), 5, backend)?;
    let vocab_size = model.config().vocab_size;
    let (mut graph, mut eager) = (By::new(&model, &LIMITS)?, By::new(&model, &LIMITS)?);
    let mut lengths = [0; SLOTS];
    // Prompts of different lengths, one after the other, which are too short for `prompt.rs`: the
    // composition does not round what goes from block to block.
    for (slot, length) in lengths.iter_mut().enumerate() {
        let prompt = text(slot as u64 + 1, 1 + slot * 12, vocab_size);
        let batch = Batch::single(slot, 0, &prompt, Outputs::Last);
        *length = prompt.len();
        let (got, expected) =
            (graph.step(&model, &batch, false)?, eager.step(&model, &batch, true)?);
        check(got == expected, format!("the prompt of slot {slot} differs"))?;
    }
    // Each several times, in turn, in other orders and slots.
    let all: Vec<usize> = (0..SLOTS).collect();
    let sets = [&all[..], &all[..1], &[3, 2], &all[2..10], &[10, 0], &all[..9], &all[7..8]];
    for round in 0..6 {
        for (at, slots) in sets.iter().enumerate() {
            let batch = decode(&mut lengths, slots, round * 8 + at, vocab_size);
            let got = graph.step(&model, &batch, false)?;
            let expected = eager.step(&model, &batch, true)?;
            check(got.len() == slots.len() * vocab_size, "other rows of logits")?;
            check(got == expected, format!("round {round}, step {at} differs"))?;
        }
    }
    Ok(())
}

/// What a sequence's next token gives in a decode step, beside others of all lengths, is what it
/// gives as the last of a prompt, whose kernels are other ones.
fn decode_as_prompt(backend: CudaBackend) -> Result<(), Failed> {
    let backend = std::sync::Arc::new(backend);
    let precision = backend.precision();
    let small = every_kind();
    // 20 query heads to a key head, as in the 3B; and a state that fits no vector.
    let mut wide = every_kind();
    [wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim] = [20, 1, 128];
    let mut odd = every_kind();
    [odd.num_attention_heads, odd.num_key_value_heads, odd.head_dim] = [6, 2, 24];
    (odd.mamba_d_state, odd.mamba_dt_rank, odd.mamba_d_conv) = (6, 5, 3);
    let lengths = [1, 2, 63, 64, 65, 700, 5, 17, 130, 3000, 31, 9, 257];
    let limits = Limits { slots: lengths.len() + 1, context: 3072, tokens: 3072, outputs: 13 };
    for (name, config) in [("small", small), ("wide", wide), ("odd", odd)] {
        let source = jamba_core::random::RandomParams { seed: 8, dtype: jamba_core::Dtype::Bf16 };
        let model = Model::new(config, &source, backend.clone())?;
        let vocab_size = model.config().vocab_size;
        let mut runner = ModelRunner::new(model, limits)?;
        let mut texts: Vec<_> =
            (0..).zip(lengths).map(|(seed, n)| text(seed + 40, n + 1, vocab_size)).collect();
        let (spare, mut expected) = (lengths.len(), Vec::new());
        for (slot, tokens) in texts.iter_mut().enumerate() {
            let n = lengths[slot];
            runner.step(&Batch::single(slot, 0, &tokens[..n], Outputs::None))?;
            tokens[n] = unambiguous(&mut runner, [slot, spare], n, tokens[n])?;
            runner.reset(spare)?;
            runner.step(&Batch::single(spare, 0, tokens, Outputs::Last))?;
            expected.push(runner.logits()?);
        }
        // Of one, few and more sequences: each of them once.
        for slots in [&[5][..], &[0, 3], &[9, 1, 2, 4, 6, 7, 8, 10, 11, 12]] {
            let mut batch = Batch::new();
            for &slot in slots {
                batch.push(slot, lengths[slot], &texts[slot][lengths[slot]..], Outputs::Last);
            }
            runner.step(&batch)?;
            for (&slot, got) in slots.iter().zip(runner.logits()?.chunks_exact(vocab_size)) {
                let name = format!("{precision:?}, {name}, {} tokens", lengths[slot]);
                let (element, rms) = close(&name, got, &expected[slot], &law(precision))?;
                println!("{name}: element {element:.1e}, rms {rms:.1e}");
            }
        }
    }
    Ok(())
}

/// A token, the given one if it is, that leaves no doubt about its experts after the `n` tokens of
/// the first slot: where some are nearly as good as others, a rounding chooses. The second slot is
/// overwritten.
fn unambiguous(
    runner: &mut ModelRunner<std::sync::Arc<CudaBackend>>,
    [slot, spare]: [usize; 2],
    n: usize,
    token: u32,
) -> Result<u32, Failed> {
    let [top_k, vocab_size] = [runner.config().num_experts_per_tok, runner.config().vocab_size];
    for token in (token..).take(50).map(|token| token % vocab_size as u32) {
        runner.copy_slot(slot, spare, n)?;
        let mut least = f32::INFINITY;
        let mut listener = |at: Activation, _: [usize; 2], logits: &[f32]| {
            if at.name == "moe.router_logits" {
                let mut sorted = logits.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let largest = logits.iter().fold(0f32, |largest, v| largest.max(v.abs()));
                least = least.min((sorted[top_k - 1] - sorted[top_k]) / largest);
            }
        };
        let batch = Batch::single(spare, n, &[token], Outputs::Last);
        runner.step_traced(&batch, Detail::Operators, &mut listener)?;
        if least >= DECISIVE {
            return Ok(token);
        }
    }
    Err(format!("no token after {n} leaves no doubt about its experts").into())
}

/// A difference of two experts' logits, as a share of the largest, that no rounding makes up for.
const DECISIVE: f32 = 0.06;

/// More numbers of sequences than graphs are kept, in turn.
fn many_graphs(backend: CudaBackend) -> Result<(), Failed> {
    let model = random(small(), 6, backend)?;
    let vocab_size = model.config().vocab_size;
    let slots = 262;
    let limits = Limits { slots, context: 1024, tokens: slots, outputs: slots };
    let (mut graph, mut eager) = (By::new(&model, &limits)?, By::new(&model, &limits)?);
    let mut lengths = vec![0; slots];
    let all: Vec<usize> = (0..slots).collect();
    let counts = (1..=slots).chain(250..=slots).chain(1..=slots).chain([1, 1, 2, 1]);
    for (seed, n) in counts.enumerate() {
        let batch = decode(&mut lengths, &all[..n], seed, vocab_size);
        let got = graph.step(&model, &batch, false)?;
        check(got == eager.step(&model, &batch, true)?, format!("{n} sequences differ"))?;
    }
    Ok(())
}

/// A graph is not used with memory other than that it was made for: another scratch, other
/// weights, and workspaces that another runner has replaced by larger ones.
fn other_memory(backend: CudaBackend) -> Result<(), Failed> {
    let backend = std::sync::Arc::new(backend);
    let source = |seed| jamba_core::random::RandomParams { seed, dtype: jamba_core::Dtype::Bf16 };
    let make = |seed| Model::new(every_kind(), &source(seed), backend.clone());
    let limits = Limits { slots: 1, context: 64, tokens: 4, outputs: 1 };
    let (first, second) = (make(1)?, make(2)?);
    let mut runner = ModelRunner::new(first.clone(), limits)?;
    let mut other = ModelRunner::new(second.clone(), limits)?;
    let mut expected = ModelRunner::new(first.clone(), limits)?;
    let step = |runner: &mut ModelRunner<_>, at: usize| {
        runner.step(&Batch::single(0, at, &[at as u32 + 7], Outputs::Last))?;
        runner.logits()
    };
    let mut texts = Vec::new();
    for at in 0..6 {
        texts.push((step(&mut runner, at)?, step(&mut other, at)?));
    }
    check(texts.iter().all(|(a, b)| a != b), "two models give the same logits")?;
    // Larger workspaces, and steps that fill them.
    let wide = Limits { slots: 64, context: 64, tokens: 512, outputs: 64 };
    let mut wide = ModelRunner::new(first.clone(), wide)?;
    for at in 6..12 {
        wide.reset(0)?;
        wide.step(&Batch::single(0, 0, &text(at as u64, 60, 1000), Outputs::Last))?;
        texts.push((step(&mut runner, at)?, step(&mut other, at)?));
    }
    for (at, (of_first, _)) in texts.iter().enumerate() {
        check(step(&mut expected, at)? == *of_first, format!("step {at} differs"))?;
    }
    // The scratch and the weights of others with one state.
    let (b, config) = (&*backend, first.config());
    let mut state = b.new_state(config, &limits)?;
    let mut scratches = [Scratch::new(b, config, &limits)?, Scratch::new(b, config, &limits)?];
    for at in 0..24 {
        let weights = if at % 3 == 0 { second.weights() } else { first.weights() };
        let scratch = &mut scratches[at % 2];
        b.reset_slot(&mut state, 0)?;
        b.stage(&mut state, &Batch::single(0, 0, &[9], Outputs::Last))?;
        let mut logits = Vec::new();
        for is_composed in [false, true] {
            b.reset_slot(&mut state, 0)?;
            match is_composed {
                true => compose::forward(b, config, weights, scratch, &mut state)?,
                false => b.forward(config, weights, scratch, &mut state)?,
            }
            logits.push(b.read(Cols { tensor: &scratch.logits, cols: 0..config.vocab_size })?);
        }
        check(logits[0] == logits[1], format!("step {at} of others differs"))?;
    }
    Ok(())
}
