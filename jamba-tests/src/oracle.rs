//! The truth: every operator in f64, in plain loops, sharing no code with any backend.
//!
//! Weights are widened from the parameters as they are stored, activations, states and the KV
//! cache are f64. What [`read`](Backend::read) and [`read_state`](Backend::read_state) return is
//! rounded to f32 once, at the very end.

mod state;

use std::ops::Range;

use jamba_core::shape::{self, Shaped};
use jamba_core::weights::Moe;
use jamba_core::{
    Backend, Batch, CausalConv1d, Cols, Config, Error, Limits, Param, Result, Role, SelectiveScan,
    StatePart,
};

pub use state::OracleState;

/// The f64 backend that others are compared with.
#[derive(Clone, Copy, Debug, Default)]
pub struct OracleBackend;

/// Row-major f64 activations.
#[derive(Clone, Debug)]
pub struct OracleTensor {
    values: Vec<f64>,
    rows: usize,
    cols: usize,
    capacity: usize,
}

/// A parameter, widened.
#[derive(Clone, Debug)]
pub struct OracleWeight {
    shape: [usize; 2],
    role: Role,
    values: Vec<f64>,
}

impl Shaped for OracleTensor {
    fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Shaped for OracleWeight {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn role(&self) -> Option<Role> {
        Some(self.role)
    }
}

impl OracleWeight {
    fn row(&self, r: usize) -> &[f64] {
        &self.values[r * self.shape[1]..(r + 1) * self.shape[1]]
    }
}

impl OracleTensor {
    fn row(&self, r: usize) -> &[f64] {
        &self.values[r * self.cols..(r + 1) * self.cols]
    }

    /// Replaces the rows in use.
    fn set(&mut self, op: &'static str, rows: usize, values: Vec<f64>) -> Result<()> {
        if rows > self.capacity {
            let (expected, got) = ([self.capacity, self.cols], [rows, self.cols]);
            return Err(Error::Shape { op, what: "rows in use", expected, got });
        }
        self.rows = rows;
        self.values = values;
        Ok(())
    }
}

fn view<'a>(x: &Cols<'a, OracleTensor>, row: usize) -> &'a [f64] {
    &x.tensor.row(row)[x.cols.clone()]
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`, and x itself above 20.
fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|v| (v - largest).exp()).collect();
    let total: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / total).collect()
}

/// `x / sqrt(mean(x^2) + eps) * w`, in place.
fn normalise(x: &mut [f64], weight: &[f64], eps: f32) {
    let mean_square = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
}

impl Backend for OracleBackend {
    type Tensor = OracleTensor;
    type Weight = OracleWeight;
    type State = OracleState;

    fn name(&self) -> &'static str {
        "oracle"
    }

    fn upload(&self, param: Param) -> Result<OracleWeight> {
        let shape = shape::upload(&param)?;
        let values = param.to_f32().into_iter().map(f64::from).collect();
        Ok(OracleWeight { shape, role: param.role, values })
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<OracleTensor> {
        Ok(OracleTensor { values: Vec::new(), rows: 0, cols, capacity: rows })
    }

    fn write(&self, dst: &mut OracleTensor, src: &[f32]) -> Result<()> {
        let rows = shape::write(src.len(), dst.cols, dst.capacity)?;
        dst.set("write", rows, src.iter().map(|&v| f64::from(v)).collect())
    }

    fn read(&self, src: Cols<'_, OracleTensor>) -> Result<Vec<f32>> {
        shape::read(&src)?;
        Ok((0..src.tensor.rows).flat_map(|r| view(&src, r)).map(|&v| v as f32).collect())
    }

    fn shape(&self, tensor: &OracleTensor) -> [usize; 2] {
        tensor.shape()
    }

    fn new_state(&self, config: &Config, limits: &Limits) -> Result<OracleState> {
        Ok(OracleState::new(config, limits))
    }

    fn reset_slot(&self, state: &mut OracleState, slot: usize) -> Result<()> {
        state.reset(slot)
    }

    fn read_state(
        &self,
        state: &OracleState,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        state.read(layer, part, slot, positions)
    }

    fn write_state(
        &self,
        state: &mut OracleState,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        state.write(layer, part, slot, positions, values)
    }

    fn stage(&self, state: &mut OracleState, batch: &Batch) -> Result<()> {
        state.batch = batch.clone();
        Ok(())
    }

    fn embed(
        &self,
        table: &OracleWeight,
        state: &OracleState,
        out: &mut OracleTensor,
    ) -> Result<()> {
        shape::embed(table, out)?;
        let tokens = state.batch.tokens();
        shape::ids(table, tokens, out)?;
        let values = tokens.iter().flat_map(|&id| table.row(id as usize)).copied().collect();
        out.set("embed", tokens.len(), values)
    }

    fn linear(
        &self,
        x: Cols<'_, OracleTensor>,
        weight: &OracleWeight,
        bias: Option<&OracleWeight>,
        out: &mut OracleTensor,
    ) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        let n = weight.shape[0];
        let mut values = Vec::with_capacity(x.tensor.rows * n);
        for t in 0..x.tensor.rows {
            for i in 0..n {
                let bias = bias.map_or(0.0, |b| b.values[i]);
                values.push(dot(view(&x, t), weight.row(i)) + bias);
            }
        }
        out.set("linear", x.tensor.rows, values)
    }

    fn rms_norm(
        &self,
        x: &OracleTensor,
        weight: &OracleWeight,
        eps: f32,
        out: &mut OracleTensor,
    ) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        let mut values = x.values.clone();
        values.chunks_exact_mut(x.cols).for_each(|row| normalise(row, &weight.values, eps));
        out.set("rms_norm", x.rows, values)
    }

    fn rms_norm_cols(
        &self,
        x: &mut OracleTensor,
        cols: Range<usize>,
        weight: &OracleWeight,
        eps: f32,
    ) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        for row in x.values.chunks_exact_mut(x.cols) {
            normalise(&mut row[cols.clone()], &weight.values, eps);
        }
        Ok(())
    }

    fn add_assign(&self, x: &mut OracleTensor, y: &OracleTensor) -> Result<()> {
        shape::add_assign(x, y)?;
        x.values.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn silu_mul(&self, gate_up: &OracleTensor, out: &mut OracleTensor) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        let (rows, n) = (gate_up.rows, out.cols);
        let value = |t: usize, i: usize| silu(gate_up.row(t)[i]) * gate_up.row(t)[n + i];
        let values = (0..rows).flat_map(|t| (0..n).map(move |i| value(t, i))).collect();
        out.set("silu_mul", rows, values)
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, OracleTensor, OracleWeight>,
        layer: usize,
        state: &mut OracleState,
        out: &mut OracleTensor,
    ) -> Result<()> {
        let (batch, conv, [d_inner, context]) = state.conv(layer)?;
        let tokens = batch.tokens().len();
        shape::causal_conv1d(&args, tokens, [d_inner, context + 1], out)?;
        let mut values = vec![0.0; tokens * d_inner];
        let mut first = 0;
        for run in batch.runs() {
            for i in 0..d_inner {
                let kept = &mut conv[(run.slot * d_inner + i) * context..][..context];
                // All inputs that this run can see, oldest first.
                let mut inputs = kept.to_vec();
                inputs.extend((first..first + run.len).map(|t| view(&args.x, t)[i]));
                for t in 0..run.len {
                    let bias = args.bias.map_or(0.0, |b| b.values[i]);
                    let sum = dot(&inputs[t..=t + context], args.weight.row(i));
                    values[(first + t) * d_inner + i] = silu(sum + bias);
                }
                kept.copy_from_slice(&inputs[run.len..]);
            }
            first += run.len;
        }
        out.set("causal_conv1d", tokens, values)
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, OracleTensor, OracleWeight>,
        layer: usize,
        state: &mut OracleState,
        y: &mut OracleTensor,
    ) -> Result<()> {
        let (batch, ssm, [d_inner, d_state]) = state.ssm(layer)?;
        let tokens = batch.tokens().len();
        shape::selective_scan(&args, tokens, [d_inner, d_state], y)?;
        let mut values = vec![0.0; tokens * d_inner];
        let mut first = 0;
        for run in batch.runs() {
            for i in 0..d_inner {
                let h = &mut ssm[(run.slot * d_inner + i) * d_state..][..d_state];
                for t in first..first + run.len {
                    let x = view(&args.x, t)[i];
                    let dt = softplus(view(&args.dt, t)[i] + args.dt_bias.values[i]);
                    let b = view(&args.b, t);
                    for n in 0..d_state {
                        h[n] = (dt * args.a.row(i)[n]).exp() * h[n] + dt * b[n] * x;
                    }
                    let out = dot(view(&args.c, t), h) + args.d.values[i] * x;
                    values[t * d_inner + i] = out * silu(view(&args.z, t)[i]);
                }
            }
            first += run.len;
        }
        y.set("selective_scan", tokens, values)
    }

    fn attention(
        &self,
        qkv: &OracleTensor,
        layer: usize,
        state: &mut OracleState,
        out: &mut OracleTensor,
    ) -> Result<()> {
        let (batch, cache) = state.cache(layer)?;
        let [heads, kv_heads, head_dim] = cache.heads;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let tokens = batch.tokens().len();
        shape::attention(qkv, tokens, q_width, kv_width, out)?;
        let mut values = vec![0.0; tokens * q_width];
        let mut t = 0;
        for run in batch.runs() {
            for position in run.position..run.position + run.len {
                let (q, kv) = qkv.row(t).split_at(q_width);
                for g in 0..kv_heads {
                    let at = cache.at(run.slot, g, position);
                    let head = |kv: &[f64]| kv[g * head_dim..(g + 1) * head_dim].to_vec();
                    cache.keys[at.clone()].copy_from_slice(&head(&kv[..kv_width]));
                    cache.values[at].copy_from_slice(&head(&kv[kv_width..]));
                }
                for h in 0..heads {
                    let g = h / (heads / kv_heads);
                    let seen = || (0..=position).map(|p| cache.at(run.slot, g, p));
                    let q = &q[h * head_dim..(h + 1) * head_dim];
                    let scale = (head_dim as f64).sqrt();
                    let scores: Vec<f64> = seen().map(|k| dot(q, &cache.keys[k]) / scale).collect();
                    let out = &mut values[t * q_width + h * head_dim..][..head_dim];
                    for (p, v) in softmax(&scores).into_iter().zip(seen()) {
                        out.iter_mut().zip(&cache.values[v]).for_each(|(o, v)| *o += p * v);
                    }
                }
                t += 1;
            }
        }
        out.set("attention", tokens, values)
    }

    fn moe_experts(
        &self,
        x: &OracleTensor,
        router_logits: &OracleTensor,
        weights: &Moe<OracleWeight>,
        top_k: usize,
        out: &mut OracleTensor,
    ) -> Result<()> {
        let inter = shape::moe_experts(x, router_logits, weights, top_k, out)?;
        let hidden = x.cols;
        let mut values = vec![0.0; x.rows * hidden];
        for (t, out) in values.chunks_exact_mut(hidden).enumerate() {
            let logits = router_logits.row(t);
            let p = softmax(logits);
            let mut order: Vec<usize> = (0..p.len()).collect();
            // Stable: of equal logits the lower index stays first.
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            for &e in &order[..top_k] {
                let product = |row: usize| dot(x.row(t), weights.gate_up_proj.row(row));
                let first = e * 2 * inter;
                let act: Vec<f64> = (first..first + inter)
                    .map(|gate| silu(product(gate)) * product(gate + inter))
                    .collect();
                for (i, out) in out.iter_mut().enumerate() {
                    *out += p[e] * dot(&act, weights.down_proj.row(e * hidden + i));
                }
            }
        }
        out.set("moe_experts", x.rows, values)
    }

    fn output_rows(
        &self,
        x: &OracleTensor,
        state: &OracleState,
        out: &mut OracleTensor,
    ) -> Result<()> {
        let rows = state.batch.outputs();
        shape::output_rows(x, state.batch.tokens().len(), rows.len(), out)?;
        let values = rows.iter().flat_map(|&r| x.row(r)).copied().collect();
        out.set("output_rows", rows.len(), values)
    }
}
