//! [`CpuBackend`]: the operators on the instruction set of the machine.

use std::ops::Range;
use std::sync::OnceLock;

use jamba_core::backend::{Backend, CausalConv1d, Cols, Limits, Scratch, SelectiveScan, StatePart};
use jamba_core::shape::{self, Shaped};
use jamba_core::weights::{Moe, Weights};
use jamba_core::{Batch, Config, Param, Result, WeightFormat, compose};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::simd::Isa;
use crate::state::State;
use crate::tensor::{Tensor, View};
use crate::weight::Weight;
use crate::{attention, conv1d, elementwise, linear, moe, norm, scan};

/// The fast CPU path: rayon and SIMD, weights in their stored dtype and mapped where they are, or
/// quantised ([`with_format`](Self::with_format)).
///
/// A result does not depend on the number of threads, on how a prompt is cut into chunks, or on
/// what else is in the batch: not by one bit.
///
/// # Threads
///
/// A step is spread over a pool of threads that all backends of the process share and nobody else
/// uses, as many as `RAYON_NUM_THREADS` says or the machine has cores: so a program whose own rayon
/// tasks wait for an [`Engine`](jamba_core::Engine) does not wait for ever. Within a rayon pool it
/// is spread over that one: `pool.install(|| session.append(..))` chooses the threads.
///
/// A rayon task that waits for a step runs other tasks of its pool in the meantime. It must not hold
/// a lock that those take too, or it waits for itself: give each task a session of its own, or put
/// the requests to an engine, rather than a `Mutex<Session>`.
#[derive(Clone, Copy)]
pub struct CpuBackend {
    isa: Isa,
    format: WeightFormat,
}

impl CpuBackend {
    /// A backend on the best instruction set that this machine has.
    pub fn new() -> Self {
        Self { isa: Isa::detect(), format: WeightFormat::Stored }
    }

    /// The same with weights kept in this format: quantised as they are loaded, by the threads of
    /// the rayon pool.
    #[must_use]
    pub fn with_format(self, format: WeightFormat) -> Self {
        Self { format, ..self }
    }

    /// One backend for each instruction set that this machine has, best first.
    pub fn all() -> Vec<Self> {
        let of = |isa| Self { isa, format: WeightFormat::Stored };
        Isa::available().into_iter().map(of).collect()
    }

    /// The instruction set: `avx512`, `avx2` or `portable`.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }
}

/// The pool of the backends; none for a thread that is of a pool, or where threads cannot be had.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return None;
    }
    let name = |index| format!("jamba-cpu-{index}");
    POOL.get_or_init(|| ThreadPoolBuilder::new().thread_name(name).build().ok()).as_ref()
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBackend({}, weights {})", self.isa(), self.format)
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Weight = Weight;
    type State = State;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn weight_format(&self) -> WeightFormat {
        self.format
    }

    fn upload(&self, param: Param) -> Result<Weight> {
        Weight::new(param, self.format)
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(rows, cols)
    }

    fn write(&self, dst: &mut Tensor, src: &[f32]) -> Result<()> {
        let rows = shape::write(src.len(), dst.shape()[1], dst.capacity())?;
        dst.resize("write", rows)?.copy_from_slice(src);
        Ok(())
    }

    fn read(&self, src: Cols<'_, Tensor>) -> Result<Vec<f32>> {
        shape::read(&src)?;
        let view = View::from(&src);
        Ok((0..view.rows).flat_map(|r| view.row(r)).copied().collect())
    }

    fn shape(&self, tensor: &Tensor) -> [usize; 2] {
        tensor.shape()
    }

    fn new_state(&self, config: &Config, limits: &Limits) -> Result<State> {
        State::new(config, limits)
    }

    fn reset_slot(&self, state: &mut State, slot: usize) -> Result<()> {
        state.reset(slot)
    }

    fn read_state(
        &self,
        state: &State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
    ) -> Result<Vec<f32>> {
        state.read(layer, part, slot, 0..positions)
    }

    fn write_state(
        &self,
        state: &mut State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
        values: &[f32],
    ) -> Result<()> {
        state.write(layer, part, slot, 0..positions, values)
    }

    fn read_positions(
        &self,
        _config: &Config,
        state: &State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        state.read(layer, part, slot, positions)
    }

    fn write_positions(
        &self,
        _config: &Config,
        state: &mut State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        state.write(layer, part, slot, positions, values)
    }

    fn copy_slot(
        &self,
        _config: &Config,
        state: &mut State,
        from: usize,
        to: usize,
        positions: usize,
    ) -> Result<()> {
        state.copy(from, to, positions)
    }

    fn sequence_bytes(&self, config: &Config, positions: usize) -> u64 {
        crate::state::sequence_bytes(config, positions)
    }

    fn is_chunk_invariant(&self) -> bool {
        true
    }

    fn stage(&self, state: &mut State, batch: &Batch) -> Result<()> {
        state.batch.clone_from(batch);
        Ok(())
    }

    fn embed(&self, table: &Weight, state: &State, out: &mut Tensor) -> Result<()> {
        shape::embed(table, out)?;
        let tokens = state.batch.tokens();
        shape::ids(table, tokens, out)?;
        let rows = out.resize("embed", tokens.len())?.chunks_exact_mut(table.shape()[1]);
        for (row, &id) in rows.zip(tokens) {
            table.pieces(id as usize, 1, |_, values| values.widen(row))?;
        }
        Ok(())
    }

    fn linear(
        &self,
        x: Cols<'_, Tensor>,
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        let bias = bias.map(Weight::vector).transpose()?;
        let x = View::from(&x);
        let out = out.resize("linear", x.rows)?;
        linear::linear(self.isa, x, weight, (0, weight.shape()[0]), bias, out)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight, eps: f32, out: &mut Tensor) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        let [rows, cols] = x.shape();
        let weight = weight.vector()?;
        let out = out.resize("rms_norm", rows)?.chunks_exact_mut(cols);
        for (x, out) in x.values().chunks_exact(cols).zip(out) {
            norm::rms_norm(self.isa, x, weight, eps, out);
        }
        Ok(())
    }

    fn rms_norm_cols(
        &self,
        x: &mut Tensor,
        cols: Range<usize>,
        weight: &Weight,
        eps: f32,
    ) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        let stride = x.shape()[1];
        let weight = weight.vector()?;
        for row in x.values_mut().chunks_exact_mut(stride) {
            norm::rms_norm_in_place(self.isa, &mut row[cols.clone()], weight, eps);
        }
        Ok(())
    }

    fn add_assign(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        shape::add_assign(x, y)?;
        elementwise::add_assign(x.values_mut(), y.values());
        Ok(())
    }

    fn silu_mul(&self, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        let n = out.shape()[1];
        let out = out.resize("silu_mul", gate_up.shape()[0])?;
        elementwise::silu_mul(self.isa, gate_up.values(), n, out);
        Ok(())
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, Tensor, Weight>,
        layer: usize,
        state: &mut State,
        out: &mut Tensor,
    ) -> Result<()> {
        let (batch, conv) = state.conv(layer)?;
        let tokens = batch.tokens().len();
        shape::causal_conv1d(&args, tokens, [conv.channels, conv.per_channel + 1], out)?;
        let operands = conv1d::Operands {
            x: View::from(&args.x),
            weight: args.weight.transposed()?,
            bias: args.bias.map(Weight::vector).transpose()?,
        };
        let out = out.resize("causal_conv1d", tokens)?;
        conv1d::causal_conv1d(self.isa, &operands, batch, &mut conv.values, out);
        Ok(())
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, Tensor, Weight>,
        layer: usize,
        state: &mut State,
        y: &mut Tensor,
    ) -> Result<()> {
        let (batch, ssm) = state.ssm(layer)?;
        let tokens = batch.tokens().len();
        shape::selective_scan(&args, tokens, [ssm.channels, ssm.per_channel], y)?;
        let operands = scan::Operands {
            x: View::from(&args.x),
            dt: View::from(&args.dt),
            a: args.a.transposed()?,
            b: View::from(&args.b),
            c: View::from(&args.c),
            d: args.d.vector()?,
            z: View::from(&args.z),
            dt_bias: args.dt_bias.vector()?,
        };
        let y = y.resize("selective_scan", tokens)?;
        scan::selective_scan(self.isa, &operands, batch, &mut ssm.values, y);
        Ok(())
    }

    fn attention(
        &self,
        qkv: &Tensor,
        layer: usize,
        state: &mut State,
        out: &mut Tensor,
    ) -> Result<()> {
        let (batch, cache) = state.cache(layer)?;
        let tokens = batch.tokens().len();
        let [heads, kv_heads, head_dim] = cache.heads;
        shape::attention(qkv, tokens, heads * head_dim, kv_heads * head_dim, out)?;
        let out = out.resize("attention", tokens)?;
        let qkv = View::new(qkv.values(), qkv.shape()[1]);
        attention::attention(self.isa, qkv, batch, cache, out);
        Ok(())
    }

    fn moe_experts(
        &self,
        x: &Tensor,
        router_logits: &Tensor,
        weights: &Moe<Weight>,
        top_k: usize,
        out: &mut Tensor,
    ) -> Result<()> {
        let inter = shape::moe_experts(x, router_logits, weights, top_k, out)?;
        let out = out.resize("moe_experts", x.shape()[0])?;
        let x = View::new(x.values(), x.shape()[1]);
        let logits = View::new(router_logits.values(), router_logits.shape()[1]);
        moe::moe_experts(self.isa, x, logits, weights, (top_k, inter), out)
    }

    fn output_rows(&self, x: &Tensor, state: &State, out: &mut Tensor) -> Result<()> {
        shape::output_rows(x, state.batch.tokens().len(), out)?;
        let cols = x.shape()[1];
        let rows = state.batch.outputs();
        let out = out.resize("output_rows", rows.len())?.chunks_exact_mut(cols);
        for (out, row) in out.zip(rows) {
            out.copy_from_slice(&x.values()[row * cols..(row + 1) * cols]);
        }
        Ok(())
    }

    fn forward(
        &self,
        config: &Config,
        weights: &Weights<Weight>,
        scratch: &mut Scratch<Tensor>,
        state: &mut State,
    ) -> Result<()> {
        // One entry into the pool for the step, instead of one for each operator.
        match pool() {
            Some(pool) => pool.install(|| compose::forward(self, config, weights, scratch, state)),
            None => rayon::scope(|_| compose::forward(self, config, weights, scratch, state)),
        }
    }
}
