//! The backend that `docs/adding-a-backend.md` writes, held to the kit.

use std::ops::Range;

use jamba_core::host::{Matrix, State, dot, rms_norm, route, silu, softmax, softplus};
use jamba_core::schedule::MixerKind;
use jamba_core::shape::{self, Shaped};
use jamba_core::{Backend, CausalConv1d, Cols, Result, SelectiveScan, weights::Moe};

struct Minimal;

impl Backend for Minimal {
    fn name(&self) -> &'static str {
        "minimal"
    }

    jamba_core::host_memory!();

    fn embed(&self, table: &Matrix, state: &State, out: &mut Matrix) -> Result<()> {
        shape::embed(table, out)?;
        let tokens = state.batch().tokens();
        shape::ids(table, tokens, out)?;
        out.set(tokens.iter().flat_map(|&id| table.row(id as usize)).copied().collect())
    }

    fn linear(
        &self,
        x: Cols<'_, Matrix>,
        weight: &Matrix,
        bias: Option<&Matrix>,
        out: &mut Matrix,
    ) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        let mut y = Vec::new();
        for x in x.rows() {
            for (i, w) in weight.rows().enumerate() {
                y.push(dot(x, w) + bias.map_or(0.0, |bias| bias[i]));
            }
        }
        out.set(y)
    }

    fn rms_norm(&self, x: &Matrix, weight: &Matrix, eps: f32, out: &mut Matrix) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        out.set(x.to_vec())?;
        out.rows_mut().for_each(|row| rms_norm(row, weight, eps));
        Ok(())
    }

    fn rms_norm_cols(
        &self,
        x: &mut Matrix,
        cols: Range<usize>,
        weight: &Matrix,
        eps: f32,
    ) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        x.rows_mut().for_each(|row| rms_norm(&mut row[cols.clone()], weight, eps));
        Ok(())
    }

    fn add_assign(&self, x: &mut Matrix, y: &Matrix) -> Result<()> {
        shape::add_assign(x, y)?;
        x.iter_mut().zip(y.iter()).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn silu_mul(&self, gate_up: &Matrix, out: &mut Matrix) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        let mut y = Vec::new();
        for row in gate_up.rows() {
            let (gate, up) = row.split_at(row.len() / 2);
            y.extend(gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up));
        }
        out.set(y)
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, Matrix, Matrix>,
        layer: usize,
        state: &mut State,
        out: &mut Matrix,
    ) -> Result<()> {
        let (_, batch, [conv, _]) = state.layer(layer, MixerKind::Mamba)?;
        let [d_inner, kept] = conv.shape();
        shape::causal_conv1d(&args, batch.tokens().len(), [d_inner, kept + 1], out)?;
        let mut y = Vec::new();
        for (t, place) in batch.places().enumerate() {
            for i in 0..d_inner {
                let latest = conv.row_mut(place.slot, i);
                let window = [&*latest, &[args.x.row(t)[i]]].concat();
                let bias = args.bias.map_or(0.0, |bias| bias[i]);
                y.push(silu(dot(&window, args.weight.row(i)) + bias));
                latest.copy_from_slice(&window[1..]);
            }
        }
        out.set(y)
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, Matrix, Matrix>,
        layer: usize,
        state: &mut State,
        y: &mut Matrix,
    ) -> Result<()> {
        let (_, batch, [_, ssm]) = state.layer(layer, MixerKind::Mamba)?;
        let [d_inner, d_state] = ssm.shape();
        shape::selective_scan(&args, batch.tokens().len(), [d_inner, d_state], y)?;
        let mut out = Vec::new();
        for (t, place) in batch.places().enumerate() {
            let (b, c) = (args.b.row(t), args.c.row(t));
            for i in 0..d_inner {
                let (x, z, a) = (args.x.row(t)[i], args.z.row(t)[i], args.a.row(i));
                let dt = softplus(args.dt.row(t)[i] + args.dt_bias[i]);
                let h = ssm.row_mut(place.slot, i);
                for n in 0..d_state {
                    h[n] = (dt * a[n]).exp() * h[n] + dt * b[n] * x;
                }
                out.push((dot(c, h) + args.d[i] * x) * silu(z));
            }
        }
        y.set(out)
    }

    fn attention(
        &self,
        qkv: &Matrix,
        layer: usize,
        state: &mut State,
        out: &mut Matrix,
    ) -> Result<()> {
        let (config, batch, [keys, values]) = state.layer(layer, MixerKind::Attention)?;
        let (q, kv, width) = (config.q_width(), config.kv_width(), config.head_dim);
        shape::attention(qkv, batch.tokens().len(), q, kv, out)?;
        let mut y = Vec::new();
        for (row, place) in qkv.rows().zip(batch.places()) {
            let at = place.position * width..(place.position + 1) * width;
            for (g, key) in row[q..q + kv].chunks(width).enumerate() {
                keys.row_mut(place.slot, g)[at.clone()].copy_from_slice(key);
            }
            for (g, value) in row[q + kv..].chunks(width).enumerate() {
                values.row_mut(place.slot, g)[at.clone()].copy_from_slice(value);
            }
            for (h, query) in row[..q].chunks(width).enumerate() {
                // Some query heads share a head of keys and values.
                let g = h / (q / kv);
                let keys = keys.row(place.slot, g)[..at.end].chunks(width);
                let score = |key: &[f32]| dot(query, key) / (width as f32).sqrt();
                let mut p: Vec<f32> = keys.map(score).collect();
                softmax(&mut p);
                let mut sum = vec![0.0; width];
                for (p, value) in p.iter().zip(values.row(place.slot, g).chunks(width)) {
                    sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += p * v);
                }
                y.extend(sum);
            }
        }
        out.set(y)
    }

    fn moe_experts(
        &self,
        x: &Matrix,
        router_logits: &Matrix,
        weights: &Moe<Matrix>,
        top_k: usize,
        out: &mut Matrix,
    ) -> Result<()> {
        let inter = shape::moe_experts(x, router_logits, weights, top_k, out)?;
        let (gate_up, down, hidden) = (&weights.gate_up_proj, &weights.down_proj, x.shape()[1]);
        let mut y = vec![0.0; x.len()];
        for ((x, logits), y) in x.rows().zip(router_logits.rows()).zip(y.chunks_mut(hidden)) {
            for (e, p) in route(logits, top_k) {
                let product = |i: usize| dot(x, gate_up.row(2 * e * inter + i));
                let act: Vec<f32> =
                    (0..inter).map(|i| silu(product(i)) * product(inter + i)).collect();
                for (i, y) in y.iter_mut().enumerate() {
                    *y += p * dot(&act, down.row(e * hidden + i));
                }
            }
        }
        out.set(y)
    }

    fn output_rows(&self, x: &Matrix, state: &State, out: &mut Matrix) -> Result<()> {
        let rows = state.batch().outputs();
        shape::output_rows(x, state.batch().tokens().len(), rows.len(), out)?;
        out.set(rows.iter().flat_map(|&r| x.row(r)).copied().collect())
    }
}

jamba_tests::conformance!(Minimal);
