//! The reference: one obvious loop per equation, in f64, written to be read beside the paper.
//!
//! Every operator computes from its f32 operands in f64 and rounds its result to f32 once; the
//! states are rounded to f32 after every token. Cutting a prompt into chunks, or sharing a batch
//! with other sequences, therefore does not change a single bit.

mod attention;
mod conv1d;
mod linear;
mod moe;
mod norm;
mod scan;
mod state;

use std::ops::Range;

use jamba_core::backend::{Backend, CausalConv1d, Cols, Limits, Need, SelectiveScan, StatePart};
use jamba_core::shape::{self, Shaped};
use jamba_core::weights::Moe;
use jamba_core::{Batch, Config, Error, Layout, Param, Quantized, Result, Role, WeightFormat};
use ndarray::{Array2, ArrayView1, ArrayView2, s};

pub use state::ReferenceState;

/// The readable backend, and the one that others are held to.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceBackend {
    format: WeightFormat,
}

impl ReferenceBackend {
    /// With weights as they are stored.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the values that weights have in this format. They are quantised as they are loaded,
    /// and kept dequantised in f32, which holds them exactly.
    #[must_use]
    pub fn with_format(self, format: WeightFormat) -> Self {
        Self { format }
    }
}

/// Row-major f32 values with a maximum of rows.
#[derive(Clone, Debug)]
pub struct Matrix {
    values: Array2<f32>,
    capacity: usize,
}

impl Matrix {
    fn cols(&self, cols: Range<usize>) -> ArrayView2<'_, f32> {
        self.values.slice(s![.., cols])
    }

    /// Replaces the rows in use.
    fn set(&mut self, values: Array2<f32>) -> Result<()> {
        let (got, expected) = (values.dim().into(), [self.capacity, self.values.ncols()]);
        if values.nrows() > self.capacity || values.ncols() != self.values.ncols() {
            return Err(Error::Shape { op: "set", what: "rows in use", expected, got });
        }
        self.values = values;
        Ok(())
    }
}

impl Shaped for Matrix {
    fn shape(&self) -> [usize; 2] {
        self.values.dim().into()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

/// A parameter as f32; all dimensions but the last are rows, a vector is one row.
#[derive(Clone, Debug)]
pub struct Parameter {
    values: Array2<f32>,
    role: Role,
}

impl Parameter {
    fn vector(&self) -> ArrayView1<'_, f32> {
        self.values.row(0)
    }
}

impl Shaped for Parameter {
    fn shape(&self) -> [usize; 2] {
        self.values.dim().into()
    }

    fn role(&self) -> Option<Role> {
        Some(self.role)
    }
}

fn view<'a>(x: &Cols<'a, Matrix>) -> ArrayView2<'a, f32> {
    x.tensor.cols(x.cols.clone())
}

impl Backend for ReferenceBackend {
    type Tensor = Matrix;
    type Weight = Parameter;
    type State = ReferenceState;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn weight_format(&self) -> WeightFormat {
        self.format
    }

    fn check_memory(&self, config: &Config, need: Need<'_>) -> Result<()> {
        crate::memory::check(self, config, need, |spec, _| 4 * spec.elements())
    }

    fn upload(&self, param: Param) -> Result<Parameter> {
        let shape @ [_, cols] = shape::upload(&param)?;
        let flat = match self.format.layout(param.role) {
            Layout::Packed(packing) => Quantized::new(&param, packing)?.dequantize(),
            Layout::F32 | Layout::Stored => param.to_f32(),
        };
        let values = Array2::from_shape_fn(shape, |(r, c)| flat[r * cols + c]);
        Ok(Parameter { values, role: param.role })
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { values: Array2::zeros((0, cols)), capacity: rows })
    }

    fn write(&self, dst: &mut Matrix, src: &[f32]) -> Result<()> {
        let cols = dst.values.ncols();
        let rows = shape::write(src.len(), cols, dst.capacity)?;
        dst.set(Array2::from_shape_fn((rows, cols), |(r, c)| src[r * cols + c]))
    }

    fn read(&self, src: Cols<'_, Matrix>) -> Result<Vec<f32>> {
        shape::read(&src)?;
        Ok(view(&src).iter().copied().collect())
    }

    fn shape(&self, tensor: &Matrix) -> [usize; 2] {
        Shaped::shape(tensor)
    }

    fn new_state(&self, config: &Config, limits: &Limits) -> Result<ReferenceState> {
        ReferenceState::new(config, limits)
    }

    fn reset_slot(&self, state: &mut ReferenceState, slot: usize) -> Result<()> {
        state.reset(slot)
    }

    fn read_state(
        &self,
        state: &ReferenceState,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        state.read(layer, part, slot, positions)
    }

    fn write_state(
        &self,
        state: &mut ReferenceState,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        state.write(layer, part, slot, positions, values)
    }

    fn is_chunk_invariant(&self) -> bool {
        true
    }

    fn stage(&self, state: &mut ReferenceState, batch: &Batch) -> Result<()> {
        state.batch = batch.clone();
        Ok(())
    }

    fn embed(&self, table: &Parameter, state: &ReferenceState, out: &mut Matrix) -> Result<()> {
        shape::embed(table, out)?;
        let tokens = state.batch.tokens();
        shape::ids(table, tokens, out)?;
        out.set(Array2::from_shape_fn((tokens.len(), table.values.ncols()), |(t, i)| {
            table.values[[tokens[t] as usize, i]]
        }))
    }

    fn linear(
        &self,
        x: Cols<'_, Matrix>,
        weight: &Parameter,
        bias: Option<&Parameter>,
        out: &mut Matrix,
    ) -> Result<()> {
        shape::linear(&x, weight, bias, out)?;
        out.set(linear::linear(view(&x), weight.values.view(), bias.map(Parameter::vector)))
    }

    fn rms_norm(&self, x: &Matrix, weight: &Parameter, eps: f32, out: &mut Matrix) -> Result<()> {
        shape::rms_norm(x, weight, out)?;
        out.set(norm::rms_norm(x.values.view(), weight.vector(), eps))
    }

    fn rms_norm_cols(
        &self,
        x: &mut Matrix,
        cols: Range<usize>,
        weight: &Parameter,
        eps: f32,
    ) -> Result<()> {
        shape::rms_norm_cols(x, &cols, weight)?;
        let normed = norm::rms_norm(x.cols(cols.clone()), weight.vector(), eps);
        x.values.slice_mut(s![.., cols]).assign(&normed);
        Ok(())
    }

    fn add_assign(&self, x: &mut Matrix, y: &Matrix) -> Result<()> {
        shape::add_assign(x, y)?;
        x.values += &y.values;
        Ok(())
    }

    fn silu_mul(&self, gate_up: &Matrix, out: &mut Matrix) -> Result<()> {
        shape::silu_mul(gate_up, out)?;
        out.set(linear::silu_mul(gate_up.values.view()))
    }

    fn causal_conv1d(
        &self,
        args: CausalConv1d<'_, Matrix, Parameter>,
        layer: usize,
        state: &mut ReferenceState,
        out: &mut Matrix,
    ) -> Result<()> {
        let (batch, conv) = state.conv(layer)?;
        let (_, d_inner, context) = conv.dim();
        shape::causal_conv1d(&args, batch.tokens().len(), [d_inner, context + 1], out)?;
        let bias = args.bias.map(Parameter::vector);
        out.set(conv1d::causal_conv1d(view(&args.x), args.weight.values.view(), bias, batch, conv))
    }

    fn selective_scan(
        &self,
        args: SelectiveScan<'_, Matrix, Parameter>,
        layer: usize,
        state: &mut ReferenceState,
        y: &mut Matrix,
    ) -> Result<()> {
        let (batch, ssm) = state.ssm(layer)?;
        let (_, d_inner, d_state) = ssm.dim();
        shape::selective_scan(&args, batch.tokens().len(), [d_inner, d_state], y)?;
        let operands = scan::Operands {
            x: view(&args.x),
            dt: view(&args.dt),
            a: args.a.values.view(),
            b: view(&args.b),
            c: view(&args.c),
            d: args.d.vector(),
            z: view(&args.z),
            dt_bias: args.dt_bias.vector(),
        };
        y.set(scan::selective_scan(&operands, batch, ssm))
    }

    fn attention(
        &self,
        qkv: &Matrix,
        layer: usize,
        state: &mut ReferenceState,
        out: &mut Matrix,
    ) -> Result<()> {
        let (batch, cache) = state.cache(layer)?;
        let [heads, kv_heads, head_dim] = cache.heads;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        shape::attention(qkv, batch.tokens().len(), q, kv, out)?;
        out.set(attention::attention(qkv.values.view(), batch, cache))
    }

    fn moe_experts(
        &self,
        x: &Matrix,
        router_logits: &Matrix,
        weights: &Moe<Parameter>,
        top_k: usize,
        out: &mut Matrix,
    ) -> Result<()> {
        shape::moe_experts(x, router_logits, weights, top_k, out)?;
        out.set(moe::moe_experts(
            x.values.view(),
            router_logits.values.view(),
            weights.gate_up_proj.values.view(),
            weights.down_proj.values.view(),
            top_k,
        ))
    }

    fn output_rows(&self, x: &Matrix, state: &ReferenceState, out: &mut Matrix) -> Result<()> {
        let rows = state.batch.outputs();
        shape::output_rows(x, state.batch.tokens().len(), rows.len(), out)?;
        out.set(Array2::from_shape_fn((rows.len(), x.values.ncols()), |(r, c)| {
            x.values[[rows[r], c]]
        }))
    }
}
