//! Launches `kernels/quant.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Dtype;
use jamba_core::quant::Packing;
use jamba_core::shape::Shaped;

use super::workspace::Workspace;
use crate::device::{Buffer, Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::weight::{Matrix, Weight, padded};

pub(super) fn unit() -> Unit {
    super::plain("quant", include_str!("../../kernels/quant.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QuantizeArgs {
    from: u64,
    quants: u64,
    scales: u64,
    bad: u64,
    first: u64,
    cols: u32,
    stride: u32,
    scale_stride: u32,
    dtype: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DequantizeArgs {
    quants: u64,
    scales: u64,
    out: u64,
    cols: u32,
    stride: u32,
    scale_stride: u32,
    ldo: u32,
}

/// Some rows on the device, as they are stored in a checkpoint.
#[derive(Clone, Copy)]
pub(crate) struct Stored {
    pub(crate) ptr: u64,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Number of their first row in the parameter.
    pub(crate) first: usize,
}

/// Kernels of `quant.cu`.
pub(crate) struct Quant {
    quantize: [Kernel; 3],
    dequantize: [Kernel; 3],
}

impl Quant {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        let module = loader.module(&unit())?;
        let all = |names: [&'static str; 3]| -> Result<[Kernel; 3]> {
            let [a, b, c] = names.map(|name| module.kernel(name));
            Ok([a?, b?, c?])
        };
        Ok(Self {
            quantize: all(["quantize_rows", "quantize_int8", "quantize_int4"])?,
            dequantize: all(["dequantize_rows", "dequantize_int8", "dequantize_int4"])?,
        })
    }

    /// Hands the rows of a matrix to `product` in the precision of the backend: all at once where
    /// they are kept so, else dequantised, some at a time. It gets the first row, how many, and
    /// where they are.
    pub(crate) fn dense(
        &self,
        device: &Device,
        weight: &Weight,
        rows_at_once: usize,
        workspace: &mut Workspace,
        mut product: impl FnMut(usize, usize, u64) -> jamba_core::Result<()>,
    ) -> jamba_core::Result<()> {
        let [rows, cols] = weight.shape();
        let Some(packing) = weight.packing() else { return product(0, rows, weight.dense()?) };
        let (matrix, ld) = (weight.matrix()?, padded(cols, Precision::Bf16));
        let rows_at_once = rows_at_once.min(rows).max(1);
        let to = workspace.reserve(device, 2 * ld * rows_at_once)?;
        for first in (0..rows).step_by(rows_at_once) {
            let part = rows_at_once.min(rows - first);
            self.dequantize(device, (packing, matrix.rows_from(first)), [part, cols], (to, ld))?;
            product(first, part, to)?;
        }
        Ok(())
    }

    /// Quantises rows. The number of the lowest element that cannot be is left in `bad`.
    pub(crate) fn quantize(
        &self,
        device: &Device,
        from: Stored,
        (packing, to): (Packing, Matrix),
        bad: &Buffer,
    ) -> Result<()> {
        let blocks = match packing {
            Packing::Int8Row => 1,
            Packing::Int8Block | Packing::Int4Block => packing.scales(from.cols).div_ceil(8),
        };
        let grid = Grid::new("quantize", [from.rows, blocks, 1], 256, 0)?;
        let args = QuantizeArgs {
            from: from.ptr,
            quants: to.ptr,
            scales: to.scales,
            bad: bad.ptr(),
            first: (from.first * from.cols) as u64,
            cols: from.cols as u32,
            stride: to.stride as u32,
            scale_stride: to.scale_stride as u32,
            dtype: match from.dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::Bf16 => 2,
            },
        };
        // SAFETY: `from` has so many rows and columns of its dtype, `to` as many rows of as many
        // quants and scales as its packing has for them, and `bad` eight bytes.
        unsafe { device.launch(&self.quantize[index(packing)], &grid, &args) }
    }

    /// Writes rows of weights to `out`, `ldo` elements in the precision of the backend each.
    pub(crate) fn dequantize(
        &self,
        device: &Device,
        (packing, from): (Packing, Matrix),
        [rows, cols]: [usize; 2],
        (out, ldo): (u64, usize),
    ) -> Result<()> {
        let grid = Grid::new("dequantize", [rows, ldo.div_ceil(2048), 1], 256, 0)?
            .doing(rows * (from.stride + from.scale_stride + 2 * ldo), 0);
        let args = DequantizeArgs {
            quants: from.ptr,
            scales: from.scales,
            out,
            cols: cols as u32,
            stride: from.stride as u32,
            scale_stride: from.scale_stride as u32,
            ldo: ldo as u32,
        };
        // SAFETY: the matrix has so many rows, `out` room for as many, and ldo is at least cols.
        unsafe { device.launch(&self.dequantize[index(packing)], &grid, &args) }
    }
}

fn index(packing: Packing) -> usize {
    match packing {
        Packing::Int8Row => 0,
        Packing::Int8Block => 1,
        Packing::Int4Block => 2,
    }
}
