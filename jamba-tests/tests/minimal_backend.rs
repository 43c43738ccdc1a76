//! The backend that `docs/adding-a-backend.md` writes, held to the kit.

// part: types
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::shape::{self, Shaped};
use jamba_core::{Backend, Batch, CausalConv1d as Conv, Cols, Config, Limits, Param, Result, Run};
use jamba_core::{SelectiveScan as Scan, StatePart, weights::Moe};

/// A tensor or a parameter: row-major, all dimensions but the last are rows.
struct M {
    values: Vec<f32>,
    shape: [usize; 2],
    capacity: usize,
}

/// The state: of each layer and slot `[conv, ssm]` or `[keys, values]`, laid out as `StatePart`
/// says, with room for `context` positions.
struct S {
    batch: Batch,
    layers: Vec<Vec<[Vec<f32>; 2]>>,
    config: Config,
    context: usize,
}

struct Minimal;

impl Shaped for M {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }
}
// part: end

// part: helpers
impl M {
    fn row(&self, r: usize) -> &[f32] {
        &self.values[r * self.shape[1]..(r + 1) * self.shape[1]]
    }

    /// Replaces the rows in use; refuses more than there is room for.
    fn set(&mut self, values: Vec<f32>) -> Result<()> {
        self.shape[0] = shape::write(values.len(), self.shape[1], self.capacity)?;
        self.values = values;
        Ok(())
    }
}

impl S {
    /// What a slot holds is in pieces of some length, of which the first so many values count.
    fn pieces(&self, part: StatePart, positions: usize) -> (usize, usize) {
        match part {
            StatePart::Conv | StatePart::Ssm => (1, 1),
            _ => (self.context * self.config.head_dim, positions * self.config.head_dim),
        }
    }

    /// Every token's index in the batch, with its run, whose position becomes the token's own.
    fn tokens(&self) -> Vec<(usize, Run)> {
        let of =
            |run: &Run| (0..run.len).map(|i| Run { position: run.position + i, ..*run }).collect();
        self.batch.runs().iter().flat_map::<Vec<_>, _>(of).enumerate().collect()
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn softmax(x: Vec<f32>) -> Vec<f32> {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = x.iter().map(|v| (v - largest).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

fn normed(x: &[f32], weight: &M, eps: f32) -> Vec<f32> {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    x.iter().zip(&weight.values).map(|(x, w)| x * scale * w).collect()
}
// part: end

impl Backend for Minimal {
    // part: memory
    type Tensor = M;
    type Weight = M;
    type State = S;

    fn name(&self) -> &'static str {
        "minimal"
    }

    fn upload(&self, param: Param) -> Result<M> {
        Ok(M { shape: param.matrix_shape(), capacity: 0, values: param.to_f32() })
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<M> {
        Ok(M { values: Vec::new(), shape: [0, cols], capacity: rows })
    }

    fn write(&self, dst: &mut M, src: &[f32]) -> Result<()> {
        dst.set(src.to_vec())
    }

    fn read(&self, src: Cols<'_, M>) -> Result<Vec<f32>> {
        let rows = (0..src.tensor.shape[0]).map(|r| &src.tensor.row(r)[src.cols.clone()]);
        Ok(rows.flatten().copied().collect())
    }

    fn shape(&self, tensor: &M) -> [usize; 2] {
        tensor.shape
    }
    // part: end

    // part: state
    fn new_state(&self, c: &Config, limits: &Limits) -> Result<S> {
        let kv = limits.context * c.kv_width();
        let slot = |mixer| match mixer {
            MixerKind::Mamba => [c.mamba_d_conv - 1, c.mamba_d_state].map(|n| n * c.d_inner()),
            MixerKind::Attention => [kv, kv],
        };
        let layer = |mixer| vec![slot(mixer).map(|n| vec![0.0; n]); limits.slots];
        let layers = Schedule::new(c).iter().map(|kind| layer(kind.mixer)).collect();
        Ok(S { batch: Batch::new(), layers, config: c.clone(), context: limits.context })
    }

    fn reset_slot(&self, s: &mut S, slot: usize) -> Result<()> {
        let parts = s.layers.iter_mut().flat_map(|layer| &mut layer[slot]);
        parts.for_each(|values| values.fill(0.0));
        Ok(())
    }

    #[rustfmt::skip]
    fn read_state(&self, s: &S, layer: usize, part: StatePart, slot: usize, n: usize) -> Result<Vec<f32>> {
        let (len, used) = s.pieces(part, n);
        let second = matches!(part, StatePart::Ssm | StatePart::Values);
        let pieces = s.layers[layer][slot][usize::from(second)].chunks(len);
        Ok(pieces.flat_map(|piece| &piece[..used]).copied().collect())
    }

    #[rustfmt::skip]
    fn write_state(&self, s: &mut S, layer: usize, part: StatePart, slot: usize, n: usize, from: &[f32]) -> Result<()> {
        let (len, used) = s.pieces(part, n);
        let second = matches!(part, StatePart::Ssm | StatePart::Values);
        let pieces = s.layers[layer][slot][usize::from(second)].chunks_mut(len);
        pieces.flat_map(|piece| &mut piece[..used]).zip(from).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn stage(&self, s: &mut S, batch: &Batch) -> Result<()> {
        s.batch = batch.clone();
        Ok(())
    }
    // part: end

    // part: products
    fn embed(&self, table: &M, s: &S, out: &mut M) -> Result<()> {
        shape::embed(table, out)?;
        out.set(s.batch.tokens().iter().flat_map(|&id| table.row(id as usize)).copied().collect())
    }

    fn linear(&self, x: Cols<'_, M>, weight: &M, bias: Option<&M>, out: &mut M) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        let mut y = Vec::new();
        for t in 0..x.tensor.shape[0] {
            let x = &x.tensor.row(t)[x.cols.clone()];
            let bias = |n: usize| bias.map_or(0.0, |b| b.values[n]);
            y.extend((0..weight.shape[0]).map(|n| dot(x, weight.row(n)) + bias(n)));
        }
        out.set(y)
    }

    fn rms_norm(&self, x: &M, weight: &M, eps: f32, out: &mut M) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        out.set((0..x.shape[0]).flat_map(|r| normed(x.row(r), weight, eps)).collect())
    }

    #[rustfmt::skip]
    fn rms_norm_cols(&self, x: &mut M, cols: std::ops::Range<usize>, weight: &M, eps: f32) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        for row in x.values.chunks_exact_mut(x.shape[1]) {
            let normed = normed(&row[cols.clone()], weight, eps);
            row[cols.clone()].copy_from_slice(&normed);
        }
        Ok(())
    }

    fn add_assign(&self, x: &mut M, y: &M) -> Result<()> {
        shape::add_assign(x, y)?;
        x.values.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn silu_mul(&self, gate_up: &M, out: &mut M) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        let n = out.shape[1];
        let rows = (0..gate_up.shape[0]).map(|r| gate_up.row(r));
        out.set(rows.flat_map(|row| (0..n).map(|i| silu(row[i]) * row[n + i])).collect())
    }
    // part: end

    // part: mamba
    #[rustfmt::skip]
    fn causal_conv1d(&self, a: Conv<'_, M, M>, layer: usize, s: &mut S, out: &mut M) -> Result<()> {
        let [d_inner, taps] = [s.config.d_inner(), s.config.mamba_d_conv];
        shape::causal_conv1d(&a, s.batch.tokens().len(), [d_inner, taps], out)?;
        let mut y = Vec::new();
        for (t, run) in s.tokens() {
            let [conv, _] = &mut s.layers[layer][run.slot];
            for i in 0..d_inner {
                let kept = &mut conv[i * (taps - 1)..(i + 1) * (taps - 1)];
                let mut window = kept.to_vec();
                window.push(a.x.tensor.row(t)[a.x.cols.start + i]);
                let bias = a.bias.map_or(0.0, |bias| bias.values[i]);
                y.push(silu(dot(&window, a.weight.row(i)) + bias));
                kept.copy_from_slice(&window[1..]);
            }
        }
        out.set(y)
    }

    #[rustfmt::skip]
    fn selective_scan(&self, a: Scan<'_, M, M>, layer: usize, s: &mut S, y: &mut M) -> Result<()> {
        let [d_inner, d_state] = [s.config.d_inner(), s.config.mamba_d_state];
        shape::selective_scan(&a, s.batch.tokens().len(), [d_inner, d_state], y)?;
        let mut out = Vec::new();
        for (t, run) in s.tokens() {
            let of = |view: &Cols<'_, M>, i: usize| view.tensor.row(t)[view.cols.start + i];
            let [_, ssm] = &mut s.layers[layer][run.slot];
            for i in 0..d_inner {
                let (x, dt) = (of(&a.x, i), of(&a.dt, i) + a.dt_bias.values[i]);
                let dt = if dt > 20.0 { dt } else { dt.exp().ln_1p() };
                let mut sum = a.d.values[i] * x;
                for n in 0..d_state {
                    let h = &mut ssm[i * d_state + n];
                    *h = (dt * a.a.row(i)[n]).exp() * *h + dt * of(&a.b, n) * x;
                    sum += of(&a.c, n) * *h;
                }
                out.push(sum * silu(of(&a.z, i)));
            }
        }
        y.set(out)
    }
    // part: end

    // part: attention
    fn attention(&self, qkv: &M, layer: usize, s: &mut S, out: &mut M) -> Result<()> {
        let (q, kv, width) = (s.config.q_width(), s.config.kv_width(), s.config.head_dim);
        shape::attention(qkv, s.batch.tokens().len(), q, kv, out)?;
        let mut y = vec![0.0; s.batch.tokens().len() * q];
        for (t, run) in s.tokens() {
            let at = |head: usize, p: usize| {
                let start = (head * s.context + p) * width;
                start..start + width
            };
            let [keys, values] = &mut s.layers[layer][run.slot];
            for g in 0..kv / width {
                let (k, v) = (q + g * width, q + kv + g * width);
                keys[at(g, run.position)].copy_from_slice(&qkv.row(t)[k..k + width]);
                values[at(g, run.position)].copy_from_slice(&qkv.row(t)[v..v + width]);
            }
            for h in 0..q / width {
                let (g, head) = (h / (q / kv), h * width..(h + 1) * width);
                let score = |p| dot(&qkv.row(t)[head.clone()], &keys[at(g, p)]);
                let scores = (0..=run.position).map(|p| score(p) / (width as f32).sqrt());
                for (p, weight) in softmax(scores.collect()).into_iter().enumerate() {
                    let y = &mut y[t * q..][head.clone()];
                    y.iter_mut().zip(&values[at(g, p)]).for_each(|(y, v)| *y += weight * v);
                }
            }
        }
        out.set(y)
    }
    // part: end

    // part: experts
    #[rustfmt::skip]
    fn moe_experts(&self, x: &M, logits: &M, w: &Moe<M>, top_k: usize, out: &mut M) -> Result<()> {
        let (inter, hidden) = (shape::moe_experts(x, logits, w, top_k, out)?, x.shape[1]);
        let mut y = vec![0.0; x.values.len()];
        for (t, y) in y.chunks_exact_mut(hidden).enumerate() {
            let p = softmax(logits.row(t).to_vec());
            let mut order: Vec<usize> = (0..p.len()).collect();
            // A stable sort: of equal ones the lower index comes first.
            order.sort_by(|&a, &b| logits.row(t)[b].total_cmp(&logits.row(t)[a]));
            for &e in &order[..top_k] {
                let up = |i| dot(x.row(t), w.gate_up_proj.row(2 * e * inter + i));
                let act: Vec<f32> = (0..inter).map(|i| silu(up(i)) * up(inter + i)).collect();
                let down = |i| dot(&act, w.down_proj.row(e * hidden + i));
                y.iter_mut().enumerate().for_each(|(i, y)| *y += p[e] * down(i));
            }
        }
        out.set(y)
    }

    fn output_rows(&self, x: &M, s: &S, out: &mut M) -> Result<()> {
        shape::output_rows(x, s.batch.tokens().len(), out)?;
        out.set(s.batch.outputs().iter().flat_map(|&r| x.row(r)).copied().collect())
    }
    // part: end
}

// part: kit
jamba_tests::conformance!(Minimal);
// part: end
