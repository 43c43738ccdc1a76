//! Launches `kernels/norm.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use jamba_core::Result;
use jamba_core::shape::Shaped;

use super::linear::Operand;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::tensor::Tensor;
use crate::weight::Weight;

pub(super) fn unit() -> Unit {
    super::plain("norm", include_str!("../../kernels/norm.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    x: u64,
    r: u64,
    weight: u64,
    y: u64,
    cols: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormColsArgs {
    x: u64,
    weight: [u64; 3],
    rows: u32,
    cols: u32,
    first: u32,
    n: [u32; 3],
    eps: f32,
}

/// Threads for a row, which a block does: one for 4 elements, where CUDA allows as many.
fn row_threads(cols: usize) -> usize {
    cols.div_ceil(4).next_multiple_of(32).clamp(32, 1024)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormBf16Args {
    x: u64,
    r: u64,
    weight: u64,
    y: u64,
    cols: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormColsBf16Args {
    cols: NormColsArgs,
    dt: u64,
    ldt: u32,
}

/// Columns of a row that the norms of prompts keep in registers: `KEPT` of norm.cu.
pub(crate) const PROMPT_COLS: usize = 8192;

/// The norms whose results are rounded to bf16.
struct Rounding {
    rms_norm: Kernel,
    add: Kernel,
    add_f32: Kernel,
    dt_b_c: Kernel,
}

/// What is added to the residual stream before it is normed.
#[derive(Clone, Copy)]
pub(crate) enum Addend {
    None,
    /// Addresses of as many rows and columns as the stream has.
    Bf16(u64),
    F32(u64),
}

/// Kernels of `norm.cu`.
pub(crate) struct Norm {
    rms_norm: Kernel,
    add_rms_norm: Kernel,
    rms_norm_cols: Kernel,
    dt_b_c_norm: Kernel,
    rounding: Option<Rounding>,
}

impl Norm {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        let rounding = || {
            Ok::<_, crate::Error>(Rounding {
                rms_norm: module.kernel("rms_norm_bf16")?,
                add: module.kernel("add_rms_norm_bf16")?,
                add_f32: module.kernel("add_f32_rms_norm_bf16")?,
                dt_b_c: module.kernel("dt_b_c_norm_bf16")?,
            })
        };
        Ok(Self {
            rms_norm: module.overlapping("rms_norm")?,
            add_rms_norm: module.overlapping("add_rms_norm")?,
            rms_norm_cols: module.overlapping("rms_norm_cols")?,
            dt_b_c_norm: module.overlapping("dt_b_c_norm")?,
            rounding: (loader.precision == Precision::Bf16).then(rounding).transpose()?,
        })
    }

    /// `out = norm(x)`, rows as in `x`.
    pub(crate) fn rms_norm(
        &self,
        device: &Device,
        x: &Tensor,
        weight: &Weight,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let grid = Grid::new("rms_norm", [x.rows(), 1, 1], row_threads(x.cols()), 0)?
            .doing(2 * 4 * x.rows() * x.cols(), 0);
        let (cols, weight) = (x.cols() as u32, weight.vector()?);
        let args = NormArgs { x: x.ptr(), r: 0, weight, y: out.ptr(), cols, eps };
        // SAFETY: x and out have the same shape, the weight as many elements as they columns; the
        // kernel only reads x, and no residual.
        unsafe { device.launch(&self.rms_norm, &grid, &args) }?;
        Ok(())
    }

    /// `x += r; out = norm(x)`, all of one shape.
    pub(crate) fn add_rms_norm(
        &self,
        device: &Device,
        x: &mut Tensor,
        r: &Tensor,
        weight: &Weight,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let grid = Grid::new("add_rms_norm", [x.rows(), 1, 1], row_threads(x.cols()), 0)?
            .doing(4 * 4 * x.rows() * x.cols(), 0);
        let (cols, weight) = (x.cols() as u32, weight.vector()?);
        let args = NormArgs { x: x.ptr(), r: r.ptr(), weight, y: out.ptr(), cols, eps };
        // SAFETY: x, r and out have the same shape, the weight as many elements as they columns.
        unsafe { device.launch(&self.add_rms_norm, &grid, &args) }?;
        Ok(())
    }

    /// The norm of some columns, in place.
    pub(crate) fn rms_norm_cols(
        &self,
        device: &Device,
        x: &mut Tensor,
        cols: Range<usize>,
        weight: &Weight,
        eps: f32,
    ) -> Result<()> {
        let grid = Grid::new("rms_norm_cols", [x.rows().div_ceil(4), 1, 1], 128, 0)?;
        let args = NormColsArgs {
            x: x.ptr(),
            weight: [weight.vector()?, 0, 0],
            rows: x.rows() as u32,
            cols: x.cols() as u32,
            first: cols.start as u32,
            n: [cols.len() as u32, 0, 0],
            eps,
        };
        // SAFETY: the columns lie within x, and the weight has as many elements.
        unsafe { device.launch(&self.rms_norm_cols, &grid, &args) }?;
        Ok(())
    }

    /// The norms of dt, B and C, which are all columns of `x` in this order, in place.
    pub(crate) fn dt_b_c_norm(
        &self,
        device: &Device,
        x: &mut Tensor,
        weights: [&Weight; 3],
        eps: f32,
    ) -> Result<()> {
        let n = weights.map(|w| w.shape()[1]);
        if n.iter().sum::<usize>() != x.cols() {
            let (expected, got) = ([x.rows(), n.iter().sum()], x.shape());
            let (op, what) = ("dt_b_c_norm", "x");
            return Err(jamba_core::Error::Shape { op, what, expected, got });
        }
        let grid = Grid::new("dt_b_c_norm", [x.rows().div_ceil(4), 1, 1], 384, 0)?
            .doing(2 * 4 * x.rows() * x.cols(), 0);
        let args = NormColsArgs {
            x: x.ptr(),
            weight: [weights[0].vector()?, weights[1].vector()?, weights[2].vector()?],
            rows: x.rows() as u32,
            cols: x.cols() as u32,
            first: 0,
            n: n.map(|n| n as u32),
            eps,
        };
        // SAFETY: the three groups make up the columns of x, as checked above, and each weight
        // has as many elements as its group.
        unsafe { device.launch(&self.dt_b_c_norm, &grid, &args) }?;
        Ok(())
    }

    /// `x += addend; out = norm(x)`, rounded to bf16, in the memory of `out`. In bf16 mode, of up
    /// to [`PROMPT_COLS`] columns, a multiple of 4.
    pub(crate) fn rounded(
        &self,
        device: &Device,
        x: &mut Tensor,
        addend: Addend,
        (weight, eps): (&Weight, f32),
        out: &Tensor,
    ) -> Result<Operand> {
        let Some(kernels) = &self.rounding else { return Err(no_rounding()) };
        let y = out.rounded("rms_norm", x.rows())?;
        // Bytes of an element that are read and written: of x, what is added, and out.
        let (kernel, r, bytes) = match addend {
            Addend::None => (&kernels.rms_norm, 0, 4 + 2),
            Addend::Bf16(r) => (&kernels.add, r, 2 * 4 + 2 + 2),
            Addend::F32(r) => (&kernels.add_f32, r, 2 * 4 + 4 + 2),
        };
        let grid = Grid::new("rms_norm_bf16", [x.rows(), 1, 1], 256, 0)?
            .doing(bytes * x.rows() * x.cols(), 0);
        let (cols, weight) = (x.cols() as u32, weight.vector()?);
        let args = NormBf16Args { x: x.ptr(), r, weight, y: y.ptr, cols, eps };
        // SAFETY: x, what is added and out have the same rows and columns, the weight as many
        // elements; the caller keeps to the columns that the kernel is made for.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(y)
    }

    /// The norms of dt, B and C as [`dt_b_c_norm`](Self::dt_b_c_norm), dt rounded to bf16 at `dt`,
    /// its rows padded with zeros to `ldt` columns.
    pub(crate) fn dt_b_c_rounded(
        &self,
        device: &Device,
        x: &mut Tensor,
        weights: [&Weight; 3],
        eps: f32,
        (dt, ldt): (u64, u32),
    ) -> Result<Operand> {
        let Some(kernels) = &self.rounding else { return Err(no_rounding()) };
        let n = weights.map(|w| w.shape()[1] as u32);
        let grid = Grid::new("dt_b_c_norm_bf16", [x.rows().div_ceil(4), 1, 1], 384, 0)?
            .doing(x.rows() * (4 * (2 * x.cols() - n[0] as usize) + 2 * ldt as usize), 0);
        let (rows, cols) = (x.rows() as u32, x.cols() as u32);
        let weight = [weights[0].vector()?, weights[1].vector()?, weights[2].vector()?];
        let cols = NormColsArgs { x: x.ptr(), weight, rows, cols, first: 0, n, eps };
        // SAFETY: the three groups make up the columns of x, as its rows were made for them; `dt`
        // has ldt elements for every row.
        unsafe { device.launch(&kernels.dt_b_c, &grid, &NormColsBf16Args { cols, dt, ldt }) }?;
        Ok(Operand { ptr: dt, rows: x.rows(), ld: ldt })
    }
}

fn no_rounding() -> jamba_core::Error {
    let what = "rounding norms in f32".into();
    jamba_core::Error::Unsupported { backend: "cuda", what }
}
