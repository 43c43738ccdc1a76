//! Every operator on random ragged batches, against the reference. Results are poisoned with NaN
//! before, and rows beyond those in use must still be NaN after.

use jamba_core::backend::{Backend, CausalConv1d, Cols, Limits, Scratch, SelectiveScan, StatePart};
use jamba_core::compose;
use jamba_core::weights::{FeedForward, Mixer, Moe, Weights};
use jamba_core::{Batch, Config, HostTensor, Outputs, Param, ParamSource, Result, Role};
use jamba_cpu::ReferenceBackend;
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::Trial;

use crate::support::{Fenced, Random, Rng, close, tolerance};

/// Named results of an operator.
type Results = Vec<(String, Vec<f32>)>;

/// Sizes of a case: of the golden models, odd, and of published ones.
#[derive(Clone, Copy)]
struct Sizes {
    name: &'static str,
    hidden: usize,
    inter: usize,
    heads: [usize; 3],
    experts: [usize; 2],
    /// d_state, d_conv, dt_rank, expand
    mamba: [usize; 4],
    /// Lengths of the runs of each step; slots are taken in turn.
    steps: &'static [&'static [usize]],
}

const CASES: [Sizes; 5] = [
    Sizes {
        name: "small",
        hidden: 64,
        inter: 32,
        heads: [4, 2, 16],
        experts: [16, 2],
        mamba: [16, 4, 8, 2],
        steps: &[&[5, 1, 0, 3], &[1, 1, 1, 1], &[2, 0, 70, 1]],
    },
    Sizes {
        name: "odd",
        hidden: 72,
        inter: 100,
        heads: [6, 3, 12],
        experts: [5, 3],
        mamba: [6, 3, 5, 2],
        steps: &[&[1], &[0, 33, 2], &[7, 64, 65], &[]],
    },
    Sizes {
        name: "long",
        hidden: 128,
        inter: 256,
        heads: [5, 1, 64],
        experts: [8, 2],
        mamba: [16, 4, 16, 2],
        steps: &[&[300, 3], &[1, 129], &[1, 1]],
    },
    Sizes {
        name: "wide",
        hidden: 2560,
        inter: 512,
        heads: [20, 1, 128],
        experts: [16, 2],
        mamba: [16, 4, 160, 2],
        steps: &[&[40, 2], &[1, 1], &[17, 1]],
    },
    Sizes {
        name: "edges",
        hidden: 48,
        inter: 24,
        heads: [2, 2, 256],
        experts: [33, 1],
        mamba: [130, 1, 3, 1],
        steps: &[&[4, 9], &[1, 12]],
    },
];

impl Sizes {
    fn config(&self) -> Config {
        let mut c = Config::preset("jamba-tales-11m").expect("a preset");
        [c.num_attention_heads, c.num_key_value_heads, c.head_dim] = self.heads;
        [c.num_experts, c.num_experts_per_tok] = self.experts;
        [c.mamba_d_state, c.mamba_d_conv, c.mamba_dt_rank, c.mamba_expand] = self.mamba;
        (c.hidden_size, c.intermediate_size, c.vocab_size) = (self.hidden, self.inter, 101);
        (c.num_hidden_layers, c.attn_layer_period, c.attn_layer_offset) = (2, 2, 1);
        (c.expert_layer_period, c.expert_layer_offset) = (2, 1);
        c.mamba_proj_bias = true;
        c
    }

    /// The batches, and limits that they fit into.
    fn batches(&self, rng: &mut Rng) -> (Vec<Batch>, Limits) {
        let slots = self.steps.iter().map(|s| s.len()).max().unwrap_or(1).max(1);
        let mut positions = vec![0; slots];
        let mut batches = Vec::new();
        for (i, lens) in self.steps.iter().enumerate() {
            let mut batch = Batch::new();
            for (j, &len) in lens.iter().enumerate() {
                let slot = (j + i) % slots;
                let ids: Vec<u32> = (0..len).map(|_| rng.below(101) as u32).collect();
                let outputs = if j % 2 == 0 { Outputs::Last } else { Outputs::All };
                batch.push(slot, positions[slot], &ids, outputs);
                positions[slot] += len;
            }
            batches.push(batch);
        }
        let tokens = batches.iter().map(|b| b.tokens().len()).max().unwrap_or(0);
        let context = positions.iter().copied().max().unwrap_or(0) + 1;
        (batches, Limits { slots, context, tokens: tokens + 3, outputs: tokens + 3 })
    }
}

/// A backend with the state of a case.
struct Bench<'a, B: Fenced> {
    b: &'a B,
    config: Config,
    state: B::State,
    rng: Rng,
    results: Results,
}

impl<B: Fenced> Bench<'_, B> {
    /// Random activations of `rows`, in a tensor with room for more.
    fn input(&mut self, rows: usize, cols: usize, size: f32) -> Result<B::Tensor> {
        let mut x = self.b.alloc(rows + 3, cols)?;
        self.b.write(&mut x, &self.rng.values(rows * cols, -size, size))?;
        Ok(x)
    }

    /// A result of up to `rows`, poisoned.
    fn output(&self, rows: usize, cols: usize) -> Result<B::Tensor> {
        let mut x = self.b.alloc(rows + 3, cols)?;
        self.b.write(&mut x, &vec![f32::NAN; (rows + 3) * cols])?;
        Ok(x)
    }

    fn weight(&mut self, role: Role, shape: &[usize], low: f32, high: f32) -> Result<B::Weight> {
        let values = self.rng.weights(shape.iter().product(), low, high);
        let tensor = HostTensor::from_f32(shape.to_vec(), values);
        self.b.upload(Param::new("weight", role, tensor))
    }

    fn matrix(&mut self, n: usize, k: usize) -> Result<B::Weight> {
        let size = (3.0 / k as f32).sqrt();
        self.weight(Role::Linear, &[n, k], -size, size)
    }

    /// Keeps a result, and checks the fence behind it.
    fn keep(&mut self, name: &str, x: &B::Tensor) -> Result<()> {
        let [rows, cols] = self.b.shape(x);
        self.results.push((name.into(), self.b.read(Cols { tensor: x, cols: 0..cols })?));
        if let Some(all) = self.b.allocated(x) {
            let beyond = all[rows * cols..].iter().position(|v| !v.is_nan());
            assert!(beyond.is_none(), "{name}: element {beyond:?} beyond the rows was written");
        }
        Ok(())
    }
}

/// Runs one operator on every step of a case.
fn run<B: Fenced>(b: &B, sizes: Sizes, operator: &str) -> Result<Results> {
    let mut rng = Rng::new(operator.len() as u64 + sizes.hidden as u64);
    let config = sizes.config();
    let (batches, limits) = sizes.batches(&mut rng);
    let state = b.new_state(&config, &limits)?;
    let mut bench = Bench { b, config, state, rng, results: Vec::new() };
    let mut seen = vec![0; limits.slots];
    for batch in &batches {
        b.stage(&mut bench.state, batch)?;
        step(&mut bench, batch, operator)?;
        batch.runs().iter().for_each(|run| seen[run.slot] = run.position + run.len);
    }
    use StatePart::{Conv, Keys, Ssm, Values};
    let parts: &[(usize, StatePart)] = match operator {
        "causal_conv1d" => &[(0, Conv)],
        "selective_scan" => &[(0, Ssm)],
        "attention" => &[(1, Keys), (1, Values)],
        _ => &[],
    };
    for &(layer, part) in parts {
        for (slot, &positions) in seen.iter().enumerate() {
            let values = b.read_state(&bench.state, layer, part, slot, positions)?;
            bench.results.push((format!("{part:?} of slot {slot}"), values));
        }
    }
    Ok(bench.results)
}

fn step<B: Fenced>(t: &mut Bench<'_, B>, batch: &Batch, operator: &str) -> Result<()> {
    let (b, c, tokens) = (t.b, t.config.clone(), batch.tokens().len());
    let (hidden, d_inner, inter) = (c.hidden_size, c.d_inner(), c.intermediate_size);
    let (d_state, dt_rank) = (c.mamba_d_state, c.mamba_dt_rank);
    match operator {
        "embed" => {
            let table = t.weight(Role::Embedding, &[c.vocab_size, hidden], -1.0, 1.0)?;
            let mut out = t.output(tokens, hidden)?;
            b.embed(&table, &t.state, &mut out)?;
            t.keep("out", &out)
        }
        "linear" => {
            // Few rows and many; all columns, and some from an odd one on.
            for (rows, cols) in [(tokens, 0..hidden), (tokens % 8, 3..hidden), (9, 4..hidden - 1)] {
                let x = t.input(rows, hidden, 1.0)?;
                let w = t.matrix(inter, cols.len())?;
                let bias = t.weight(Role::Vector, &[inter], -1.0, 1.0)?;
                for bias in [None, Some(&bias)] {
                    let mut out = t.output(rows, inter)?;
                    b.linear(Cols { tensor: &x, cols: cols.clone() }, &w, bias, &mut out)?;
                    t.keep(&format!("{rows} rows, columns {cols:?}"), &out)?;
                }
            }
            Ok(())
        }
        "rms_norm" => {
            let x = t.input(tokens, hidden, 3.0)?;
            let w = t.weight(Role::Vector, &[hidden], 0.5, 1.5)?;
            let mut out = t.output(tokens, hidden)?;
            b.rms_norm(&x, &w, 1e-6, &mut out)?;
            t.keep("out", &out)
        }
        "rms_norm_cols" => {
            let mut x = t.input(tokens, dt_rank + 2 * d_state, 3.0)?;
            let w = t.weight(Role::Vector, &[d_state], 0.5, 1.5)?;
            b.rms_norm_cols(&mut x, dt_rank..dt_rank + d_state, &w, 1e-6)?;
            let all = 0..dt_rank + 2 * d_state;
            t.results.push(("x".into(), b.read(Cols { tensor: &x, cols: all })?));
            Ok(())
        }
        "elementwise" => {
            let (mut x, y) = (t.input(tokens, inter, 1.0)?, t.input(tokens, inter, 1.0)?);
            b.add_assign(&mut x, &y)?;
            t.results.push(("sum".into(), b.read(Cols { tensor: &x, cols: 0..inter })?));
            let gate_up = t.input(tokens, 2 * inter, 30.0)?;
            let mut out = t.output(tokens, inter)?;
            b.silu_mul(&gate_up, &mut out)?;
            t.keep("silu_mul", &out)
        }
        "causal_conv1d" => {
            let x = t.input(tokens, 2 * d_inner, 1.0)?;
            let w = t.weight(Role::Conv, &[d_inner, c.mamba_d_conv], -0.5, 0.5)?;
            let bias = t.weight(Role::Vector, &[d_inner], -0.5, 0.5)?;
            let mut out = t.output(tokens, d_inner)?;
            let x = Cols { tensor: &x, cols: 0..d_inner };
            let args = CausalConv1d { x, weight: &w, bias: Some(&bias) };
            b.causal_conv1d(args, 0, &mut t.state, &mut out)?;
            t.keep("out", &out)
        }
        "selective_scan" => {
            let (x, dt) = (t.input(tokens, d_inner, 2.0)?, t.input(tokens, d_inner, 3.0)?);
            let bc = t.input(tokens, dt_rank + 2 * d_state, 1.5)?;
            let xz = t.input(tokens, 2 * d_inner, 4.0)?;
            let a = t.weight(Role::A, &[d_inner, d_state], -16.0, -1.0)?;
            let d = t.weight(Role::Vector, &[d_inner], -1.0, 1.0)?;
            // Around the knee of softplus, and beyond the 20 where it is the identity.
            let dt_bias = t.weight(Role::Vector, &[d_inner], -6.0, 22.0)?;
            let mut y = t.output(tokens, d_inner)?;
            let args = SelectiveScan {
                x: Cols { tensor: &x, cols: 0..d_inner },
                dt: Cols { tensor: &dt, cols: 0..d_inner },
                a: &a,
                b: Cols { tensor: &bc, cols: dt_rank..dt_rank + d_state },
                c: Cols { tensor: &bc, cols: dt_rank + d_state..dt_rank + 2 * d_state },
                d: &d,
                z: Cols { tensor: &xz, cols: d_inner..2 * d_inner },
                dt_bias: &dt_bias,
            };
            b.selective_scan(args, 0, &mut t.state, &mut y)?;
            t.keep("y", &y)
        }
        "attention" => {
            let qkv = t.input(tokens, c.q_width() + 2 * c.kv_width(), 2.0)?;
            let mut out = t.output(tokens, c.q_width())?;
            b.attention(&qkv, 1, &mut t.state, &mut out)?;
            t.keep("context", &out)
        }
        "moe_experts" => {
            for rows in [tokens, tokens.min(3)] {
                let x = t.input(rows, hidden, 1.0)?;
                let mut logits = t.input(rows, c.num_experts, 3.0)?;
                if rows > 1 {
                    // Ties, and zeros of both signs.
                    let mut values = vec![0.25; rows * c.num_experts];
                    values[..c.num_experts].fill(-0.0);
                    values[1] = 0.0;
                    let rest = t.rng.values((rows - 1) * c.num_experts, -3.0, 3.0);
                    values[c.num_experts..].copy_from_slice(&rest);
                    b.write(&mut logits, &values)?;
                }
                let experts = c.num_experts;
                let w = Moe {
                    router: t.weight(Role::Router, &[experts, hidden], -0.1, 0.1)?,
                    gate_up_proj: t.weight(
                        Role::Experts,
                        &[experts, 2 * inter, hidden],
                        -0.1,
                        0.1,
                    )?,
                    down_proj: t.weight(Role::Experts, &[experts, hidden, inter], -0.1, 0.1)?,
                };
                let mut out = t.output(rows, hidden)?;
                b.moe_experts(&x, &logits, &w, c.num_experts_per_tok, &mut out)?;
                t.keep(&format!("{rows} rows"), &out)?;
            }
            Ok(())
        }
        "output_rows" => {
            let x = t.input(tokens, hidden, 1.0)?;
            let mut out = t.output(batch.outputs().len(), hidden)?;
            b.output_rows(&x, &t.state, &mut out)?;
            t.keep("out", &out)
        }
        other => panic!("no operator {other}"),
    }
}

/// Which operators round to bf16 where the backend computes in it.
const OPERATORS: [(&str, bool); 10] = [
    ("embed", false),
    ("linear", true),
    ("rms_norm", false),
    ("rms_norm_cols", false),
    ("elementwise", false),
    ("causal_conv1d", false),
    ("selective_scan", false),
    ("attention", true),
    ("moe_experts", true),
    ("output_rows", false),
];

pub(crate) fn trials(backend: Option<&'static CudaBackend>) -> Vec<Trial> {
    let precision = backend.map_or("any".into(), |b| format!("{:?}", b.precision()));
    let mut trials = Vec::new();
    for (operator, rounds) in OPERATORS {
        for sizes in CASES {
            let run = move || {
                let backend = backend.ok_or("no backend")?;
                // Nothing but the operands of products is ever rounded to bf16.
                let precision = if rounds { backend.precision() } else { Precision::F32 };
                let tolerance = tolerance(precision);
                let got = run(backend, sizes, operator)?;
                let expected = run(&ReferenceBackend::new(), sizes, operator)?;
                let mut worst = (0f64, 0f64);
                for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                    let (element, rms) = close(name, got, expected, &tolerance)?;
                    worst = (worst.0.max(element), worst.1.max(rms));
                }
                println!(
                    "{:?} {operator} {}: element {:.1e}, rms {:.1e}",
                    backend.precision(),
                    sizes.name,
                    worst.0,
                    worst.1
                );
                let again = run(backend, sizes, operator)?;
                let same = got.iter().zip(&again).all(|(a, b)| same_bits(&a.1, &b.1));
                if same { Ok(()) } else { Err("a second run has other bits".into()) }
            };
            trials.push(Trial::test(format!("{precision}::{operator}::{}", sizes.name), run));
        }
    }
    for sizes in CASES {
        let name = format!("{precision}::fused_is_composed::{}", sizes.name);
        trials.push(Trial::test(name, move || Ok(fused(backend.ok_or("no backend")?, sizes)?)));
    }
    trials.push(Trial::test(format!("{precision}::argmax"), move || {
        Ok(argmax(backend.ok_or("no backend")?)?)
    }));
    trials
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// The fused blocks and their compositions, from the same random activations: the same bits.
fn fused(b: &CudaBackend, sizes: Sizes) -> Result<()> {
    let mut rng = Rng::new(7);
    let config = sizes.config();
    let (batches, limits) = sizes.batches(&mut rng);
    let weights = Weights::layout(&config).try_map(&mut |spec| b.upload(Random(3).param(spec)?))?;
    let layer = &weights.layers[0];
    let Mixer::Mamba(mamba) = &layer.mixer else { panic!("layer 0 is a Mamba layer") };
    let FeedForward::Mlp(mlp) = &layer.feed_forward else { panic!("layer 0 is dense") };
    let mut states = [b.new_state(&config, &limits)?, b.new_state(&config, &limits)?];
    let mut scratches = [Scratch::new(b, &config, &limits)?, Scratch::new(b, &config, &limits)?];
    for batch in &batches {
        let n = batch.tokens().len() * config.hidden_size;
        let [hidden, normed] = [rng.values(n, -1.0, 1.0), rng.values(n, -1.0, 1.0)];
        let mut results = Vec::new();
        for (i, (s, state)) in scratches.iter_mut().zip(&mut states).enumerate() {
            b.stage(state, batch)?;
            b.write(&mut s.hidden, &hidden)?;
            b.write(&mut s.normed, &normed)?;
            if i == 0 {
                b.mamba_mixer(&config, mamba, 0, s, state)?;
                b.add_rms_norm(&layer.pre_ff_layernorm, 1e-6, s)?;
                b.mlp(mlp, s)?;
            } else {
                compose::mamba_mixer(b, &config, mamba, 0, s, state)?;
                compose::add_rms_norm(b, &layer.pre_ff_layernorm, 1e-6, s)?;
                compose::mlp(b, mlp, s)?;
            }
            let tensors = [&s.block_out, &s.hidden, &s.normed];
            let read = tensors.map(|x| b.read(compose::all(b, x)));
            results.push(read.into_iter().collect::<Result<Vec<_>>>()?);
        }
        for (a, b) in results[0].iter().zip(&results[1]) {
            assert!(same_bits(a, b), "the fused block has other bits than the composition");
            assert!(a.iter().all(|v| v.is_finite()));
        }
    }
    Ok(())
}

fn argmax(b: &CudaBackend) -> Result<()> {
    for (rows, cols) in [(1, 1), (3, 101), (17, 65536)] {
        let mut values = Rng::new(cols as u64).values(rows * cols, -1.0, 1.0);
        let expected: Vec<u32> = (0..rows).map(|r| (r * 7919 % cols) as u32).collect();
        for (row, at) in values.chunks_exact_mut(cols).zip(&expected) {
            // Twice: the lower one is meant; and NaN is never the largest.
            row[*at as usize..].iter_mut().step_by(97).for_each(|v| *v = 2.0);
            if let Some(last) = row.get_mut(*at as usize + 1) {
                *last = f32::NAN;
            }
        }
        let mut x = b.alloc(rows, cols)?;
        b.write(&mut x, &values)?;
        assert_eq!(b.argmax(&x).map_err(jamba_core::Error::from)?, expected);
    }
    Ok(())
}
