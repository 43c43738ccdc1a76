//! The operators, each passed on with or without its bug.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

use half::bf16;
use jamba_core::weights::Moe;
use jamba_core::{
    Backend, Batch, CausalConv1d, Cols, Config, HostTensor, Limits, Param, Result, Role,
    SelectiveScan, StatePart,
};

use super::{Bug, Mutant, MutantState};

fn to_bf16(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
}

impl<B: Backend> Mutant<B> {
    fn all(&self, tensor: &B::Tensor) -> Result<Vec<f32>> {
        self.inner.read(Cols { tensor, cols: 0..self.inner.shape(tensor)[1] })
    }

    /// Changes the values of a tensor: row-major, and the columns.
    fn edit(&self, tensor: &mut B::Tensor, f: impl FnOnce(&mut [f32], usize)) -> Result<()> {
        let mut values = self.all(tensor)?;
        f(&mut values, self.inner.shape(tensor)[1]);
        self.inner.write(tensor, &values)
    }

    /// A copy of a tensor, changed.
    fn edited(&self, tensor: &B::Tensor, f: impl FnOnce(&mut [f32], usize)) -> Result<B::Tensor> {
        let [rows, cols] = self.inner.shape(tensor);
        let mut copy = self.inner.alloc(rows, cols)?;
        self.inner.write(&mut copy, &self.all(tensor)?)?;
        self.edit(&mut copy, f)?;
        Ok(copy)
    }

    /// What every operator's output goes through.
    fn finish(&self, out: &mut B::Tensor) -> Result<()> {
        match self.bug {
            Some(Bug::Bf16Activations) => self.edit(out, |values, _| to_bf16(values)),
            _ => Ok(()),
        }
    }

    /// Changes a state of every sequence of the staged batch that has tokens.
    fn edit_states(
        &self,
        state: &mut MutantState<B::State>,
        layer: usize,
        part: StatePart,
        mut f: impl FnMut(&mut [f32]),
    ) -> Result<()> {
        for run in state.batch.runs().iter().filter(|run| run.len > 0) {
            let mut values = self.inner.read_state(&state.inner, layer, part, run.slot, 0..0)?;
            f(&mut values);
            self.inner.write_state(&mut state.inner, layer, part, run.slot, 0..0, &values)?;
        }
        Ok(())
    }

    fn zeros(&self, role: Role, shape: Vec<usize>) -> Result<B::Weight> {
        let values = vec![0.0; shape.iter().product()];
        self.inner.upload(Param::new("zeros", role, HostTensor::from_f32(shape, values)))
    }

    /// The values of a vector: what a product of zeros with it as bias gives.
    fn vector(&self, vector: &B::Weight, n: usize) -> Result<Vec<f32>> {
        let zeros = self.zeros(Role::Linear, vec![n, 1])?;
        let (mut x, mut out) = (self.inner.alloc(1, 1)?, self.inner.alloc(1, n)?);
        self.inner.write(&mut x, &[0.0])?;
        self.inner.linear(Cols { tensor: &x, cols: 0..1 }, &zeros, Some(vector), &mut out)?;
        self.all(&out)
    }

    /// The scan with `softplus(dt) + dt_bias`.
    fn scan_with_bias_outside(
        &self,
        args: SelectiveScan<'_, B::Tensor, B::Weight>,
        layer: usize,
        state: &mut B::State,
        y: &mut B::Tensor,
    ) -> Result<()> {
        let n = args.dt.cols.len();
        let bias = self.vector(args.dt_bias, n)?;
        let dt = self.edited(args.dt.tensor, |values, cols| {
            for (i, v) in values.iter_mut().enumerate() {
                let softplus = if *v > 20.0 { *v } else { v.exp().ln_1p() };
                let wanted = (softplus + bias[i % cols]).max(1e-6);
                // The inverse of softplus, so that the true operator computes the wrong value.
                *v = if wanted > 20.0 { wanted } else { wanted.exp_m1().ln() };
            }
        })?;
        let zero = self.zeros(Role::Vector, vec![n])?;
        let args =
            SelectiveScan { dt: Cols { tensor: &dt, cols: args.dt.cols }, dt_bias: &zero, ..args };
        self.inner.selective_scan(args, layer, state, y)
    }
}

impl<B: Backend> Backend for Mutant<B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type State = MutantState<B::State>;

    fn name(&self) -> &'static str {
        "mutant"
    }

    fn upload(&self, mut param: Param) -> Result<Self::Weight> {
        if self.has(Bug::XzSwapped) && param.name.contains("mamba.in_proj") {
            let mut values = param.to_f32();
            let half = values.len() / 2;
            values.rotate_left(half);
            let tensor = HostTensor::from_f32(param.shape.clone(), values);
            param = Param::new(param.name, param.role, tensor);
        }
        self.inner.upload(param)
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<B::Tensor> {
        self.inner.alloc(rows, cols)
    }

    fn write(&self, dst: &mut B::Tensor, src: &[f32]) -> Result<()> {
        self.inner.write(dst, src)?;
        self.finish(dst)
    }

    fn read(&self, src: Cols<'_, B::Tensor>) -> Result<Vec<f32>> {
        self.inner.read(src)
    }

    fn shape(&self, tensor: &B::Tensor) -> [usize; 2] {
        self.inner.shape(tensor)
    }

    fn new_state(&self, config: &Config, limits: &Limits) -> Result<Self::State> {
        self.dt_rank.store(config.mamba_dt_rank, Ordering::Relaxed);
        let inner = self.inner.new_state(config, limits)?;
        let kept = config.mamba_d_conv - 1;
        Ok(MutantState { inner, batch: Batch::new(), kept, used: HashSet::new() })
    }

    fn reset_slot(&self, state: &mut Self::State, slot: usize) -> Result<()> {
        if self.has(Bug::StaleSlot) {
            return Ok(());
        }
        state.used.remove(&slot);
        self.inner.reset_slot(&mut state.inner, slot)
    }

    fn read_state(
        &self,
        state: &Self::State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        self.inner.read_state(&state.inner, layer, part, slot, positions)
    }

    fn write_state(
        &self,
        state: &mut Self::State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        let mut values = values.to_vec();
        if self.has(Bug::Bf16Activations) && part != StatePart::Ssm {
            to_bf16(&mut values);
        }
        let turned = self.has(Bug::RingNotTurned) && state.used.contains(&slot);
        if turned && part == StatePart::Conv && state.kept > 1 {
            values.chunks_exact_mut(state.kept).for_each(|channel| channel.rotate_left(1));
        }
        self.inner.write_state(&mut state.inner, layer, part, slot, positions, &values)
    }

    fn is_chunk_invariant(&self) -> bool {
        self.inner.is_chunk_invariant()
    }

    fn stage(&self, state: &mut Self::State, batch: &Batch) -> Result<()> {
        state.batch = batch.clone();
        let ran = batch.runs().iter().filter(|run| run.len > 0);
        state.used.extend(ran.map(|run| run.slot));
        self.inner.stage(&mut state.inner, batch)
    }

    fn embed(&self, table: &Self::Weight, state: &Self::State, out: &mut B::Tensor) -> Result<()> {
        self.inner.embed(table, &state.inner, out)?;
        self.finish(out)
    }

    fn linear(
        &self,
        x: Cols<'_, B::Tensor>,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut B::Tensor,
    ) -> Result<()> {
        self.inner.linear(x, weight, bias, out)?;
        match self.bug {
            Some(Bug::OneInAThousand) => self.edit(out, |values, _| {
                values.iter_mut().skip(999).step_by(1000).for_each(|v| *v *= 1.01);
            })?,
            Some(Bug::ColumnUnwritten) => self.edit(out, |values, cols| {
                values.iter_mut().skip(cols - 1).step_by(cols).for_each(|v| *v = f32::NAN);
            })?,
            _ => {}
        }
        self.finish(out)
    }

    fn rms_norm(
        &self,
        x: &B::Tensor,
        weight: &Self::Weight,
        eps: f32,
        out: &mut B::Tensor,
    ) -> Result<()> {
        self.inner.rms_norm(x, weight, eps, out)?;
        self.finish(out)
    }

    fn rms_norm_cols(
        &self,
        x: &mut B::Tensor,
        cols: Range<usize>,
        weight: &Self::Weight,
        eps: f32,
    ) -> Result<()> {
        let of_b = cols.start == self.dt_rank.load(Ordering::Relaxed);
        if self.has(Bug::BLayernormSkipped) && of_b {
            return Ok(());
        }
        self.inner.rms_norm_cols(x, cols, weight, eps)?;
        self.finish(x)
    }

    fn add_assign(&self, x: &mut B::Tensor, y: &B::Tensor) -> Result<()> {
        self.inner.add_assign(x, y)?;
        self.finish(x)
    }

    fn silu_mul(&self, gate_up: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        self.inner.silu_mul(gate_up, out)?;
        self.finish(out)
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, B::Tensor, Self::Weight>,
        layer: usize,
        state: &mut Self::State,
        out: &mut B::Tensor,
    ) -> Result<()> {
        if self.has(Bug::ConvContextDropped) {
            self.edit_states(state, layer, StatePart::Conv, |values| values.fill(0.0))?;
        }
        self.inner.causal_conv1d(args, layer, &mut state.inner, out)?;
        self.finish(out)
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, B::Tensor, Self::Weight>,
        layer: usize,
        state: &mut Self::State,
        y: &mut B::Tensor,
    ) -> Result<()> {
        if self.has(Bug::ScanRestarted) {
            self.edit_states(state, layer, StatePart::Ssm, |values| values.fill(0.0))?;
        }
        if self.has(Bug::SlotsShared) {
            let mut before: Option<Vec<f32>> = None;
            self.edit_states(state, layer, StatePart::Ssm, |values| {
                let own = values.to_vec();
                if let Some(before) = before.replace(own) {
                    values.copy_from_slice(&before);
                }
            })?;
        }
        if self.has(Bug::DtBiasOutside) {
            self.scan_with_bias_outside(args, layer, &mut state.inner, y)?;
            return self.finish(y);
        }
        self.inner.selective_scan(args, layer, &mut state.inner, y)?;
        if self.has(Bug::Bf16State) {
            self.edit_states(state, layer, StatePart::Ssm, to_bf16)?;
        }
        self.finish(y)
    }

    fn attention(
        &self,
        qkv: &B::Tensor,
        layer: usize,
        state: &mut Self::State,
        out: &mut B::Tensor,
    ) -> Result<()> {
        if self.has(Bug::KvOffByOne) {
            let mut early = Batch::new();
            let mut first = 0;
            for run in state.batch.runs() {
                let tokens = &state.batch.tokens()[first..first + run.len];
                let position = run.position.saturating_sub(1);
                early.push(run.slot, position, tokens, jamba_core::Outputs::All);
                first += run.len;
            }
            self.inner.stage(&mut state.inner, &early)?;
        }
        self.inner.attention(qkv, layer, &mut state.inner, out)?;
        if self.has(Bug::KvOffByOne) {
            self.inner.stage(&mut state.inner, &state.batch)?;
        }
        self.finish(out)
    }

    fn moe_experts(
        &self,
        x: &B::Tensor,
        router_logits: &B::Tensor,
        weights: &Moe<Self::Weight>,
        top_k: usize,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let bug = self.bug;
        let logits = self.edited(router_logits, |values, experts| {
            for row in values.chunks_exact_mut(experts) {
                match bug {
                    Some(Bug::ExpertIdsSwapped) => row.swap(0, 1),
                    Some(Bug::TopKRenormalised) => {
                        let mut order: Vec<usize> = (0..experts).collect();
                        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
                        // No probability is left for those that are not chosen.
                        order[top_k..].iter().for_each(|&e| row[e] = -1e4);
                    }
                    _ => {}
                }
            }
        })?;
        self.inner.moe_experts(x, &logits, weights, top_k, out)?;
        self.finish(out)
    }

    fn output_rows(&self, x: &B::Tensor, state: &Self::State, out: &mut B::Tensor) -> Result<()> {
        self.inner.output_rows(x, &state.inner, out)?;
        if self.has(Bug::WrongOutputRow) {
            let first = self.all(x)?;
            self.edit(out, |values, cols| {
                if let (Some(last), Some(first)) =
                    (values.chunks_exact_mut(cols).last(), first.get(..cols))
                {
                    last.copy_from_slice(first);
                }
            })?;
        }
        self.finish(out)
    }
}
