//! Launches `kernels/elementwise.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use super::linear::Operand;
use super::workspace::Workspace;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::tensor::Tensor;

pub(super) fn unit() -> Unit {
    super::plain("elementwise", include_str!("../../kernels/elementwise.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AddArgs {
    x: u64,
    y: u64,
    out: u64,
    n: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SiluMulArgs {
    gate_up: u64,
    out: u64,
    cols: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SiluMulBf16Args {
    gate_up: u64,
    out: u64,
    cols: u32,
    ldo: u32,
}

/// Kernels of `elementwise.cu`.
pub(crate) struct Elementwise {
    add: Kernel,
    silu_mul: Kernel,
    silu_mul_bf16: Kernel,
}

impl Elementwise {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        Ok(Self {
            add: module.overlapping("add")?,
            silu_mul: module.overlapping("silu_mul")?,
            silu_mul_bf16: module.overlapping("silu_mul_bf16")?,
        })
    }

    /// `x += y`, of the same shape.
    pub(crate) fn add_assign(&self, device: &Device, x: &mut Tensor, y: &Tensor) -> Result<()> {
        let out = x.ptr();
        self.run_add(device, x, y, out)
    }

    /// `out = x + y`, of the same shape.
    pub(crate) fn add(
        &self,
        device: &Device,
        x: &Tensor,
        y: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        out.resize("add", x.rows())?;
        self.run_add(device, x, y, out.ptr())
    }

    fn run_add(&self, device: &Device, x: &Tensor, y: &Tensor, out: u64) -> Result<()> {
        let n = x.rows() * x.cols();
        // Enough blocks to fill the card; each walks on in strides of all of them.
        let blocks = n.div_ceil(1024).min(16 * device.multiprocessors());
        let grid = Grid::new("add", [blocks, 1, 1], 256, 0)?.doing(3 * 4 * n, 0);
        let args = AddArgs { x: x.ptr(), y: y.ptr(), out, n: n as u64 };
        // SAFETY: x, y and out have n elements in use.
        unsafe { device.launch(&self.add, &grid, &args) }?;
        Ok(())
    }

    /// `out = silu(gate) * up`, rows as in `gate_up`.
    pub(crate) fn silu_mul(
        &self,
        device: &Device,
        gate_up: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let cols = out.cols();
        let blocks = [gate_up.rows(), cols.div_ceil(1024), 1];
        let grid = Grid::new("silu_mul", blocks, 256, 0)?.doing(3 * 4 * gate_up.rows() * cols, 0);
        let args = SiluMulArgs { gate_up: gate_up.ptr(), out: out.ptr(), cols: cols as u32 };
        // SAFETY: both have the same rows in use, `gate_up` of twice the columns.
        unsafe { device.launch(&self.silu_mul, &grid, &args) }?;
        Ok(())
    }

    /// `silu(gate) * up` rounded to bf16 in the workspace, as an operand of a product.
    pub(crate) fn silu_mul_bf16(
        &self,
        device: &Device,
        gate_up: &Tensor,
        workspace: &mut Workspace,
    ) -> Result<Operand> {
        let (rows, cols) = (gate_up.rows(), gate_up.cols() / 2);
        let ldo = cols.next_multiple_of(8);
        let out = workspace.reserve(device, 2 * rows * ldo)?;
        let grid = Grid::new("silu_mul_bf16", [rows, ldo.div_ceil(1024), 1], 256, 0)?
            .doing(rows * (8 * cols + 2 * ldo), 0);
        let (cols, ldo) = (cols as u32, ldo as u32);
        let args = SiluMulBf16Args { gate_up: gate_up.ptr(), out, cols, ldo };
        // SAFETY: gate_up has 2 cols columns, and the workspace (rows, ldo) elements.
        unsafe { device.launch(&self.silu_mul_bf16, &grid, &args) }?;
        Ok(Operand { ptr: out, rows, ld: ldo })
    }
}
