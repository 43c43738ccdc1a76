//! [`CudaBackend`]: the operators on one card.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jamba_core::backend::{
    Backend, CausalConv1d, Cols, Limits, Need, Scratch, SelectiveScan, StatePart,
};
use jamba_core::schedule::Schedule;
use jamba_core::shape::{self, Shaped};
use jamba_core::weights::{Mamba, Mlp, Moe, Weights};
use jamba_core::{Batch, Choice, Config, Param, Result, Sampled, WeightFormat};

use crate::blocks::{self, Begin};
use crate::cache::Cache;
use crate::device::{Device, may_load};
use crate::error::Error;
use crate::kernels::Loader;
use crate::libraries;
use crate::ops::attention::Attention;
use crate::ops::conv1d::Conv1d;
use crate::ops::cublas;
use crate::ops::draw::Drawing;
use crate::ops::elementwise::Elementwise;
use crate::ops::embed::Embed;
use crate::ops::grouped::Grouped;
use crate::ops::linear::Linear;
use crate::ops::moe::{self, Experts, Tokens};
use crate::ops::norm::Norm;
use crate::ops::rows::Rows;
use crate::ops::sample::Sample;
use crate::ops::scan::{self, Scan};
use crate::ops::scan_step::ScanStep;
use crate::ops::workspace::{Workspace, Workspaces};
use crate::options::{CudaOptions, Precision};
use crate::plan::{self, Plan};
use crate::state::{Kernels, State};
use crate::step;
use crate::tensor::{Tensor, View};
use crate::weight::{Loading, Weight};

/// One NVIDIA card, everything on one stream of it. Operators return as soon as their kernels are
/// on the stream; reading waits for them.
///
/// Tensors, weights and states belong to the backend that made them.
pub struct CudaBackend {
    pub(crate) device: Arc<Device>,
    pub(crate) norm: Norm,
    pub(crate) linear: Linear,
    pub(crate) elementwise: Elementwise,
    pub(crate) loader: Loader,
    pub(crate) grouped: Option<Grouped>,
    pub(crate) experts: Experts,
    embed: Embed,
    rows: Rows,
    drawing: Drawing,
    sample: Sample,
    /// Kernels for sizes met so far, `[d_conv, d_state, dt_rank, head_dim]`, 0 where there is no
    /// such layer.
    sized: Mutex<Vec<([usize; 4], Kernels)>>,
    workspaces: Mutex<Workspaces>,
}

impl CudaBackend {
    /// The card of this number, in bf16, with the kernel cache in its default place.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options).
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        Self::with_options(CudaOptions { ordinal, ..CudaOptions::default() })
    }

    /// Opens a card and makes the kernels ready that do not depend on a model's sizes.
    ///
    /// # Errors
    /// [`Error::Missing`] without driver, NVRTC or cuBLASLt; [`Error::NoDevice`];
    /// [`Error::Architecture`] for a card before sm_80; [`Error::Compile`]; [`Error::Driver`].
    pub fn with_options(options: CudaOptions) -> Result<Self, Error> {
        libraries::driver()?;
        libraries::nvrtc()?;
        libraries::cublaslt()?;
        let device =
            Arc::new(Device::open(options.ordinal, options.is_guarded.then(Arc::default))?);
        let cache = Cache::new(options.cache.folder());
        let loader = Loader::new(device.clone(), options.precision, options.format, cache)?;
        Ok(Self {
            norm: Norm::load(&loader)?,
            embed: Embed::load(&loader)?,
            linear: Linear::load(&loader)?,
            elementwise: Elementwise::load(&loader)?,
            grouped: Grouped::load(&loader)?,
            experts: Experts::load(&loader)?,
            rows: Rows::load(&loader)?,
            drawing: Drawing::load(&loader)?,
            sample: Sample::load(&loader)?,
            sized: Mutex::default(),
            workspaces: Mutex::default(),
            device,
            loader,
        })
    }

    /// Name of the card, as its driver tells it.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Architecture that kernels are compiled for, `sm_90a` for example.
    pub fn arch(&self) -> &str {
        self.loader.arch()
    }

    /// Precision of weights and matrix products.
    pub fn precision(&self) -> Precision {
        self.loader.precision
    }

    /// What a model and one runner of it would take, and what is free now.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn plan(&self, config: &Config, limits: &Limits) -> Result<Plan, Error> {
        // Memory that was freed goes back when the stream is waited for.
        self.synchronize()?;
        let (free, _) = self.device.memory()?;
        Ok(Plan {
            free: Some(free as u64),
            ..Plan::new(config, limits, self.precision(), self.loader.format)
        })
    }

    /// Waits for everything on the stream.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel that failed since the last wait.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.device.synchronize()
    }

    /// How many allocations were written beyond, of those that were freed so far: 0, if the
    /// backend was made with [`is_guarded`](CudaOptions::is_guarded) and is right. It can be asked
    /// after the backend is gone, and so all its memory.
    pub fn overruns(&self) -> impl Fn() -> usize + Send + use<> {
        let overruns = self.device.overruns();
        move || overruns.load(Ordering::Relaxed)
    }

    /// The kernels that are specialised to the sizes of a model.
    fn kernels(&self, config: &Config) -> Result<Kernels, Error> {
        moe::check_experts(config.num_experts)?;
        let schedule = Schedule::new(config);
        let (mamba, attention) = (schedule.mamba_layers() > 0, schedule.attention_layers() > 0);
        let sizes = [
            if mamba { config.mamba_d_conv } else { 0 },
            if mamba { config.mamba_d_state } else { 0 },
            if mamba { config.mamba_dt_rank } else { 0 },
            if attention { config.head_dim } else { 0 },
        ];
        let mut sized = self.sized.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = sized.iter().find(|(s, _)| *s == sizes) {
            return Ok(kernels.clone());
        }
        let [d_conv, d_state, dt_rank, head_dim] = sizes;
        let scan_step = || ScanStep::load(&self.loader, d_state, dt_rank);
        let kernels = Kernels {
            conv1d: mamba.then(|| Conv1d::load(&self.loader, d_conv)).transpose()?,
            scan: mamba.then(|| Scan::load(&self.loader, d_state)).transpose()?,
            scan_step: mamba.then(scan_step).transpose()?,
            attention: attention.then(|| Attention::load(&self.loader, head_dim)).transpose()?,
        };
        sized.push((sizes, kernels.clone()));
        Ok(kernels)
    }

    pub(crate) fn workspaces(&self) -> MutexGuard<'_, Workspaces> {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attention, in a workspace that the caller has.
    pub(crate) fn attend(
        &self,
        qkv: &Tensor,
        layer: usize,
        state: &State,
        parts: &mut Workspace,
        out: &mut Tensor,
    ) -> Result<()> {
        let (batch, cache) = (&state.batch, state.cache(layer)?);
        let [heads, kv_heads, head_dim] = cache.heads;
        shape::attention(qkv, batch.tokens, heads * head_dim, kv_heads * head_dim, out)?;
        out.resize("attention", batch.tokens)?;
        let Some(kernels) = &state.kernels.attention else { return Ok(()) };
        kernels.run(&self.device, qkv, batch, cache, parts, out)
    }

    /// Allocates the workspaces for steps within limits, so that no step has to.
    fn reserve(&self, config: &Config, limits: &Limits) -> Result<(), Error> {
        let [cast, parts, routes, act, expert_out, _, dense, _] =
            plan::workspaces(config, limits, self.precision(), self.loader.format);
        let rows = limits.slots.min(limits.outputs);
        self.sample.reserve(&self.device, rows, config.vocab_size)?;
        let w = &mut *self.workspaces();
        let all = [
            (&mut w.cast, cast),
            (&mut w.parts, parts),
            (&mut w.routes, routes),
            (&mut w.act, act),
            (&mut w.expert_out, expert_out),
            (&mut w.dense, dense),
        ];
        all.into_iter().try_for_each(|(w, bytes)| w.reserve(&self.device, bytes).map(drop))
    }
}

impl std::fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaBackend({}, {}, {:?})", self.device_name(), self.arch(), self.precision())
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Weight = Weight;
    type State = State;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn weight_format(&self) -> WeightFormat {
        self.loader.format
    }

    fn check_memory(&self, config: &Config, need: Need<'_>) -> Result<()> {
        let reserved = self.workspaces().bytes() + self.sample.bytes() + cublas::WORKSPACE_BYTES;
        let reserved = reserved as u64;
        match need {
            Need::Weights { .. } => {
                // The least that any runner takes, so that loading is not in vain.
                let least = Limits { slots: 1, context: 1, tokens: 1, outputs: 1 };
                Ok(self.plan(config, &least)?.check_part(reserved)?)
            }
            Need::Runner(limits) => {
                let plan = self.plan(config, limits)?;
                Ok(plan.check_part(plan.weights.saturating_add(reserved))?)
            }
        }
    }

    fn upload(&self, param: Param) -> Result<Weight> {
        let (precision, format) = (self.precision(), self.loader.format);
        let (quant, drawing) = (&self.linear.quant, &self.drawing);
        Loading { device: &self.device, quant, drawing, precision, format }.weight(&param)
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(Tensor::new(&self.device, rows, cols)?)
    }

    fn write(&self, dst: &mut Tensor, src: &[f32]) -> Result<()> {
        let rows = shape::write(src.len(), dst.cols(), dst.capacity())?;
        dst.resize("write", rows)?;
        Ok(self.device.upload(dst.buffer_mut(), 0, bytemuck::cast_slice(src))?)
    }

    fn read(&self, src: Cols<'_, Tensor>) -> Result<Vec<f32>> {
        shape::read(&src)?;
        let [rows, cols] = src.tensor.shape();
        let mut values = vec![0f32; rows * cols];
        self.device.download(src.tensor.buffer(), 0, bytemuck::cast_slice_mut(&mut values))?;
        if src.cols == (0..cols) {
            return Ok(values);
        }
        let rows = values.chunks_exact(cols.max(1));
        Ok(rows.flat_map(|row| row.get(src.cols.clone()).unwrap_or(&[])).copied().collect())
    }

    fn choose(
        &self,
        logits: &Tensor,
        choices: &[Option<Choice<'_>>],
    ) -> Result<Vec<Option<Sampled>>> {
        Ok(self.sample.run(&self.device, logits, choices)?)
    }

    fn shape(&self, tensor: &Tensor) -> [usize; 2] {
        tensor.shape()
    }

    fn new_state(&self, config: &Config, limits: &Limits) -> Result<State> {
        let kernels = self.kernels(config)?;
        self.reserve(config, limits)?;
        Ok(State::new(&self.device, kernels, config, limits, self.precision())?)
    }

    fn reset_slot(&self, state: &mut State, slot: usize) -> Result<()> {
        state.reset(&self.device, slot)
    }

    fn read_state(
        &self,
        state: &State,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        state.read(&self.device, layer, part, slot, positions)
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
        state.write(&self.device, layer, part, slot, positions, values)
    }

    fn copy_slot(
        &self,
        _: &Config,
        state: &mut State,
        from: usize,
        to: usize,
        positions: usize,
    ) -> Result<()> {
        state.copy_slot(&self.device, from, to, positions)
    }

    fn sequence_bytes(&self, config: &Config, positions: usize) -> u64 {
        plan::sequence_bytes(config, positions, self.precision())
    }

    fn stage(&self, state: &mut State, batch: &Batch) -> Result<()> {
        state.batch.stage(&self.device, batch)
    }

    fn embed(&self, table: &Weight, state: &State, out: &mut Tensor) -> Result<()> {
        shape::embed(table, out)?;
        state.batch.check_ids(table.shape()[0])?;
        out.resize("embed", state.batch.tokens)?;
        self.embed.run(&self.device, table, &state.batch, out)
    }

    fn linear(
        &self,
        x: Cols<'_, Tensor>,
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        out.resize("linear", x.tensor.rows())?;
        let _loading = may_load();
        let workspaces = &mut *self.workspaces();
        self.linear.run(&self.device, View::from(&x), weight, bias, workspaces, out)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight, eps: f32, out: &mut Tensor) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        out.resize("rms_norm", x.rows())?;
        self.norm.rms_norm(&self.device, x, weight, eps, out)
    }

    fn rms_norm_cols(
        &self,
        x: &mut Tensor,
        cols: Range<usize>,
        weight: &Weight,
        eps: f32,
    ) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        self.norm.rms_norm_cols(&self.device, x, cols, weight, eps)
    }

    fn add_assign(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        shape::add_assign(x, y)?;
        self.elementwise.add_assign(&self.device, x, y)
    }

    fn silu_mul(&self, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        out.resize("silu_mul", gate_up.rows())?;
        self.elementwise.silu_mul(&self.device, gate_up, out)
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, Tensor, Weight>,
        layer: usize,
        state: &mut State,
        out: &mut Tensor,
    ) -> Result<()> {
        let (batch, conv) = (&state.batch, state.conv(layer)?);
        let taps = [conv.channels, conv.per_channel + 1];
        shape::causal_conv1d(&args, batch.tokens, taps, out)?;
        out.resize("causal_conv1d", batch.tokens)?;
        let Some(kernels) = &state.kernels.conv1d else { return Ok(()) };
        let parameters = (args.weight, args.bias);
        kernels.run(&self.device, View::from(&args.x), parameters, batch, conv, out)
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, Tensor, Weight>,
        layer: usize,
        state: &mut State,
        y: &mut Tensor,
    ) -> Result<()> {
        let (batch, ssm) = (&state.batch, state.ssm(layer)?);
        shape::selective_scan(&args, batch.tokens, [ssm.channels, ssm.per_channel], y)?;
        y.resize("selective_scan", batch.tokens)?;
        let operands = scan::Operands::from(&args);
        match (&state.kernels.scan, &state.kernels.scan_step) {
            (_, Some(step)) if batch.is_decode() => {
                step.scan(&self.device, &operands, batch, ssm, y)
            }
            (Some(scan), _) => scan.run(&self.device, &operands, batch, ssm, y),
            (None, _) => Ok(()),
        }
    }

    fn attention(
        &self,
        qkv: &Tensor,
        layer: usize,
        state: &mut State,
        out: &mut Tensor,
    ) -> Result<()> {
        self.attend(qkv, layer, state, &mut self.workspaces().parts, out)
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
        out.resize("moe_experts", x.rows())?;
        let view = View::from(&Cols { tensor: x, cols: 0..x.cols() });
        let shared = (&self.linear, self.grouped.as_ref(), &mut *self.workspaces());
        let operands = (Tokens::Wide(view), router_logits);
        self.experts.run(&self.device, operands, weights, (top_k, inter), shared, out)
    }

    fn output_rows(&self, x: &Tensor, state: &State, out: &mut Tensor) -> Result<()> {
        shape::output_rows(x, state.batch.tokens, state.batch.outputs, out)?;
        out.resize("output_rows", state.batch.outputs)?;
        self.rows.run(&self.device, x, &state.batch, out)
    }

    fn mamba_mixer(
        &self,
        config: &Config,
        weights: &Mamba<Weight>,
        layer: usize,
        scratch: &mut Scratch<Tensor>,
        state: &mut State,
    ) -> Result<()> {
        blocks::mamba_mixer(self, config, weights, layer, scratch, state, Begin::Normed)
    }

    fn mlp(&self, weights: &Mlp<Weight>, scratch: &mut Scratch<Tensor>) -> Result<()> {
        blocks::mlp(self, weights, scratch, Begin::Normed)
    }

    fn add_rms_norm(&self, weight: &Weight, eps: f32, scratch: &mut Scratch<Tensor>) -> Result<()> {
        blocks::add_rms_norm(self, weight, eps, scratch)
    }

    fn forward(
        &self,
        config: &Config,
        weights: &Weights<Weight>,
        scratch: &mut Scratch<Tensor>,
        state: &mut State,
    ) -> Result<()> {
        step::forward(self, config, weights, scratch, state)
    }
}
