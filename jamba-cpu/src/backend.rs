//! [`CpuBackend`]: the operators on the instruction set of the machine.

use std::ops::Range;
use std::sync::Arc;

use jamba_core::backend::{
    Backend, CausalConv1d, Cols, Limits, Need, Scratch, SelectiveScan, StatePart,
};
use jamba_core::shape::{self, Shaped};
use jamba_core::weights::{Mlp, Moe, Weights};
use jamba_core::{
    Batch, Choice, Config, Dtype, Error, Layout, Param, Precision, Result, Sampled, WeightFormat,
    compose,
};
use rayon::ThreadPool;

use crate::columns::for_each_rows;
use crate::linear::Products;
use crate::simd::Isa;
use crate::state::State;
use crate::tensor::{Tensor, View};
use crate::weight::Weight;
use crate::{attention, conv1d, elementwise, moe, norm, scan, team};

/// The environment variable that forces an instruction set.
const ISA: &str = "JAMBA_CPU_ISA";

/// The fast CPU path: SIMD on all cores, weights in their stored dtype and mapped where they are, or
/// quantised ([`with_format`](Self::with_format)).
///
/// A result does not depend on the number of threads, on how a prompt is cut into chunks, or on
/// what else is in the batch: not by one bit.
///
/// ```
/// use jamba_core::{Backend, LanguageModel, Model, Precision, SessionOptions, WeightFormat};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let exact = CpuBackend::new().with_precision(Precision::F32);
/// let small = CpuBackend::new().with_format(WeightFormat::Int8);
/// for backend in [exact, small] {
///     let model = Model::load(folder, backend)?;
///     let mut session = model.session(SessionOptions { context: 16, ..Default::default() })?;
///     assert_eq!(session.append(&[1, 2, 3])?.len(), 4096);
///     assert!(model.backend().is_chunk_invariant());
/// }
/// # Ok::<(), jamba_core::Error>(())
/// ```
///
/// # Threads
///
/// A step is spread over a pool of threads that all backends of the process share and nobody else
/// uses, as many as `RAYON_NUM_THREADS` says, up to four for a core, or the machine has cores: so a program whose own rayon
/// tasks wait for an [`Engine`](jamba_core::Engine) does not wait for ever. Within a rayon pool it
/// is spread over that one: `pool.install(|| session.append(..))` chooses the threads. Those of an
/// engine, which has a thread of its own, are chosen by [`with_pool`](Self::with_pool). They look out for
/// the next step for a millisecond, and within a pool for a tenth of one.
///
/// A rayon task that waits for a step runs other tasks of its pool in the meantime. It must not hold
/// a lock that those take too, or it waits for itself: give each task a session of its own, or put
/// the requests to an engine, rather than a `Mutex<Session>`.
#[derive(Clone)]
pub struct CpuBackend {
    products: Products,
    format: WeightFormat,
    pool: Option<Arc<ThreadPool>>,
    /// Whether `JAMBA_CPU_ISA` asks for what this machine does not have.
    impossible: bool,
}

/// The instruction set that `JAMBA_CPU_ISA` names, if the machine has it, or the best.
pub(crate) fn wanted() -> Option<Isa> {
    let wanted = std::env::var_os(ISA).filter(|name| !name.is_empty());
    Isa::available().into_iter().find(|isa| match &wanted {
        Some(name) => name == isa.name(),
        None => true,
    })
}

impl CpuBackend {
    /// A backend on the best instruction set that this machine has, or the one that the environment
    /// variable `JAMBA_CPU_ISA` names: `amx` (Linux only), `avx512bf16`, `avx512`, `avx2` or `portable`.
    /// If that is not to be had, loading a model fails.
    pub fn new() -> Self {
        let found = wanted();
        let isa = found.unwrap_or_else(Isa::portable);
        Self { impossible: found.is_none(), ..Self::on(isa) }
    }

    fn on(isa: Isa) -> Self {
        let products = Products { isa, precision: Precision::Bf16 };
        Self { products, format: WeightFormat::Stored, pool: None, impossible: false }
    }

    /// One backend for each instruction set that this machine has, best first.
    pub fn all() -> Vec<Self> {
        Isa::available().into_iter().map(Self::on).collect()
    }

    /// The same with weights kept in this format: quantised as they are loaded, by the threads of
    /// the rayon pool.
    #[must_use]
    pub fn with_format(self, format: WeightFormat) -> Self {
        Self { format, ..self }
    }

    /// The same on the threads of this pool, from wherever a step is run. Tasks of the pool must not
    /// wait for an [`Engine`](jamba_core::Engine) of such a backend: nobody might be left to help it,
    /// and it would do everything itself.
    #[must_use]
    pub fn with_pool(self, pool: Arc<ThreadPool>) -> Self {
        Self { pool: Some(pool), ..self }
    }

    /// Sets the precision of the activations that matrices are multiplied with; sums are f32. With
    /// [`Precision::Bf16`], the default, they are rounded as the weights are: for a matrix in bf16 to
    /// bf16, where the instruction set multiplies it (`amx`, `avx512bf16`), and for a quantised one to 8 bits
    /// with a scale for 32, on every instruction set. For matrices in f16 or f32 they stay f32, as all
    /// do with [`Precision::F32`].
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.products.precision = precision;
        self
    }

    /// The precision of products with matrices in bf16: [`Precision::F32`] where the instruction set
    /// has no other.
    pub fn precision(&self) -> Precision {
        if self.products.isa.has_bf16() { self.products.precision } else { Precision::F32 }
    }

    /// The instruction set: `amx`, `avx512bf16`, `avx512`, `avx2` or `portable`.
    pub fn isa(&self) -> &'static str {
        self.products.isa.name()
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (isa, precision) = (self.isa(), self.precision());
        write!(f, "CpuBackend({isa}, {precision}, weights {})", self.format)
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

    fn check_memory(&self, config: &Config, need: Need<'_>) -> Result<()> {
        let stored = config.dtype.unwrap_or(Dtype::Bf16);
        crate::memory::check(self, config, need, |spec, mapped| {
            match self.format.layout(spec.role) {
                // The pages of a mapped file are the system's to drop.
                Layout::Stored if mapped => 0,
                layout => layout.bytes(spec.matrix_shape(), stored),
            }
        })
    }

    fn upload(&self, param: Param) -> Result<Weight> {
        if self.impossible {
            let names = Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ");
            let wanted = std::env::var_os(ISA).unwrap_or_default();
            let what = format!("{ISA}={}: this machine has {names}", wanted.display());
            return Err(Error::Unsupported { backend: "cpu", what });
        }
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
        let mut values = Vec::with_capacity(view.rows * view.cols);
        (0..view.rows).for_each(|r| values.extend_from_slice(view.row(r)));
        Ok(values)
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
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        state.read(layer, part, slot, positions)
    }

    fn write_state(
        &self,
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

    fn choose(
        &self,
        logits: &Tensor,
        choices: &[Option<Choice<'_>>],
    ) -> Result<Vec<Option<Sampled>>> {
        let cols = logits.shape()[1];
        let mut chosen = vec![None; choices.len()];
        let choose = |row: usize, to: &mut [Option<Sampled>]| {
            let logits = logits.values().get(row * cols..(row + 1) * cols);
            // Where one is not finite, the host says so.
            let logits = logits.filter(|logits| logits.iter().all(|v| v.is_finite()));
            if let (Some(choice), Some(logits)) = (&choices[row], logits) {
                to[0] = choice.sample(logits).ok();
            }
        };
        match choices.len() {
            0 | 1 => for_each_rows(&mut chosen, 1, 1, false, choose),
            _ => team::lead_on(self.pool.as_deref(), || {
                for_each_rows(&mut chosen, 1, 1, true, choose);
            }),
        }
        Ok(chosen)
    }

    fn for_each(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        team::lead_on(self.pool.as_deref(), || team::run(tasks, f));
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
        self.products.linear(x, weight, bias, out)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight, eps: f32, out: &mut Tensor) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        let weight = weight.vector()?;
        let out = out.resize("rms_norm", x.shape()[0])?;
        norm::rms_norm(self.products.isa, x.values(), weight, eps, out);
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
        norm::rms_norm_cols(self.products.isa, x.values_mut(), stride, cols, weight, eps);
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
        elementwise::silu_mul_halves(self.products.isa, gate_up.values(), n, out);
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
        conv1d::causal_conv1d(self.products.isa, &operands, batch, &mut conv.values, out);
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
        scan::selective_scan(self.products.isa, &operands, batch, &mut ssm.values, y);
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
        attention::attention(self.products.isa, qkv, batch, cache, out);
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
        moe::moe_experts(self.products, x, logits, weights, (top_k, inter), out)
    }

    fn output_rows(&self, x: &Tensor, state: &State, out: &mut Tensor) -> Result<()> {
        let rows = state.batch.outputs();
        shape::output_rows(x, state.batch.tokens().len(), rows.len(), out)?;
        let cols = x.shape()[1];
        let out = out.resize("output_rows", rows.len())?.chunks_exact_mut(cols);
        for (out, row) in out.zip(rows) {
            out.copy_from_slice(&x.values()[row * cols..(row + 1) * cols]);
        }
        Ok(())
    }

    fn mlp(&self, weights: &Mlp<Weight>, scratch: &mut Scratch<Tensor>) -> Result<()> {
        let Scratch { normed, gate_up, act, block_out, .. } = scratch;
        shape::linear(&compose::all(self, normed), &weights.gate_up_proj, None, gate_up)?;
        shape::silu_mul(gate_up, act)?;
        shape::linear(&compose::all(self, act), &weights.down_proj, None, block_out)?;
        let rows = normed.shape()[0];
        let act = act.resize("silu_mul", rows)?;
        let out = block_out.resize("linear", rows)?;
        moe::mlp(self.products, View::from(&compose::all(self, normed)), weights, act, out)
    }

    fn forward(
        &self,
        config: &Config,
        weights: &Weights<Weight>,
        scratch: &mut Scratch<Tensor>,
        state: &mut State,
    ) -> Result<()> {
        let pool = self.pool.as_deref();
        team::lead_on(pool, || compose::forward(self, config, weights, scratch, state))
    }
}
