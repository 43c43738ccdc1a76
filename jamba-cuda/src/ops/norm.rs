//! Launches `kernels/norm.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use jamba_core::Result;
use jamba_core::shape::Shaped;

use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
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

/// Kernels of `norm.cu`.
pub(crate) struct Norm {
    rms_norm: Kernel,
    add_rms_norm: Kernel,
    rms_norm_cols: Kernel,
    dt_b_c_norm: Kernel,
}

impl Norm {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        Ok(Self {
            rms_norm: module.overlapping("rms_norm")?,
            add_rms_norm: module.overlapping("add_rms_norm")?,
            rms_norm_cols: module.overlapping("rms_norm_cols")?,
            dt_b_c_norm: module.overlapping("dt_b_c_norm")?,
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
        let grid = Grid::new("dt_b_c_norm", [x.rows().div_ceil(4), 1, 1], 384, 0)?;
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
}
