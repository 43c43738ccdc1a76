//! Launches `kernels/linear.cu`, and cuBLASLt for more than a few rows.
#![allow(unsafe_code, reason = "launches kernels")]

use std::sync::{Mutex, PoisonError};

use jamba_core::Result;
use jamba_core::shape::Shaped;

use super::cublas::{CublasLt, Product};
use super::workspace::Workspace;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

/// Rows of x up to which the weights are read by our own kernel: more are a matrix product.
const FEW_ROWS: usize = 8;

pub(super) fn unit() -> Unit {
    super::plain("linear", include_str!("../../kernels/linear.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearArgs {
    x: u64,
    w: u64,
    bias: u64,
    out: u64,
    rows: u32,
    n: u32,
    k: u32,
    ldx: u32,
    ldw: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CastArgs {
    x: u64,
    out: u64,
    k: u32,
    ldx: u32,
    ldo: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BiasArgs {
    out: u64,
    bias: u64,
    n: u32,
}

/// The left operand of a matrix product, in the precision of the backend.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) ptr: u64,
    pub(crate) rows: usize,
    /// Elements from one row to the next.
    pub(crate) ld: u32,
}

/// Up to 1, 2, 4, 8 rows of x: rows of W per block and warps of each, as linear.cu says.
type Few = [Kernel; 4];

/// Kernels of `linear.cu`, and the library.
pub(crate) struct Linear {
    /// A block of 4 warps for 4 rows of W.
    wide: Few,
    /// A block of 4 warps for 1 row of W, where there are too few to fill the card otherwise.
    narrow: Few,
    /// A warp for 4 rows of W, where they are short.
    short: Few,
    any: Kernel,
    cast_bf16: Kernel,
    add_bias: Kernel,
    cublas: Mutex<CublasLt>,
    precision: Precision,
}

impl Linear {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        let few = |names: [&'static str; 4]| -> crate::Result<Few> {
            let [a, b, c, d] = names.map(|name| module.overlapping(name));
            Ok([a?, b?, c?, d?])
        };
        Ok(Self {
            wide: few(["linear_1_4_4", "linear_2_4_4", "linear_4_4_4", "linear_8_4_4"])?,
            narrow: few(["linear_1_1_4", "linear_2_1_4", "linear_4_1_4", "linear_8_1_4"])?,
            short: few(["linear_1_4_1", "linear_2_4_1", "linear_4_4_1", "linear_8_4_1"])?,
            any: module.overlapping("linear_any")?,
            cast_bf16: module.overlapping("cast_bf16")?,
            add_bias: module.overlapping("add_bias")?,
            cublas: Mutex::new(CublasLt::new(&loader.device, loader.precision)?),
            precision: loader.precision,
        })
    }

    /// `out = x weight^T + bias`, rows as in `x`.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: View,
        weight: &Weight,
        bias: Option<&Weight>,
        cast: &mut Workspace,
        out: &mut Tensor,
    ) -> Result<()> {
        if x.rows <= FEW_ROWS {
            return self.few(device, x, weight, bias, out);
        }
        let x = match self.precision {
            Precision::F32 => Operand { ptr: x.ptr, rows: x.rows, ld: x.ld },
            Precision::Bf16 => self.cast(device, x, cast)?,
        };
        self.product(device, x, weight, bias, out)
    }

    /// Whether so many rows are a matrix product, of operands in the precision of the backend.
    pub(crate) fn rounds(&self, rows: usize) -> bool {
        self.precision == Precision::Bf16 && rows > FEW_ROWS
    }

    /// `out = x weight^T + bias` through cuBLASLt.
    pub(crate) fn product(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<()> {
        let ([n, k], rows) = (weight.shape(), x.rows);
        let product = Product { rows, n, k, ldx: x.ld, ldw: weight.ld(), rounded: false };
        let w = weight.matrix()?;
        let mut cublas = self.cublas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: x has the rows of out and k columns, the weight is (n, k) and out (rows, n).
        unsafe { cublas.matmul(device, product, x.ptr, w, out.ptr()) }?;
        drop(cublas);
        let Some(bias) = bias else { return Ok(()) };
        let grid = Grid::new("add_bias", [rows, 1, 1], 256, 0)?;
        let args = BiasArgs { out: out.ptr(), bias: bias.vector()?, n: n as u32 };
        // SAFETY: out is (rows, n) and the bias has n elements.
        unsafe { device.launch(&self.add_bias, &grid, &args) }?;
        Ok(())
    }

    /// `out = x weight^T` rounded to bf16, in the memory of `out`.
    pub(crate) fn rounded(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        out: &Tensor,
    ) -> Result<Operand> {
        let ([n, k], rows) = (weight.shape(), x.rows);
        let out = out.rounded("linear", rows)?;
        let product = Product { rows, n, k, ldx: x.ld, ldw: weight.ld(), rounded: true };
        let w = weight.matrix()?;
        let mut cublas = self.cublas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: x has k columns, the weight is (n, k), and out has room for more than so many
        // rows of n bf16.
        unsafe { cublas.matmul(device, product, x.ptr, w, out.ptr) }?;
        Ok(Operand { ld: n as u32, ..out })
    }

    /// `x` rounded to bf16 in the workspace.
    pub(crate) fn cast(
        &self,
        device: &Device,
        x: View,
        workspace: &mut Workspace,
    ) -> Result<Operand> {
        let ldo = x.cols.next_multiple_of(8);
        let out = workspace.reserve(device, 2 * x.rows * ldo)?;
        let grid = Grid::new("cast_bf16", [x.rows, ldo.div_ceil(2048), 1], 256, 0)?;
        let args = CastArgs { x: x.ptr, out, k: x.cols as u32, ldx: x.ld, ldo: ldo as u32 };
        // SAFETY: x is as its view says, and the workspace has (rows, ldo) elements.
        unsafe { device.launch(&self.cast_bf16, &grid, &args) }?;
        Ok(Operand { ptr: out, rows: x.rows, ld: ldo as u32 })
    }

    fn few(
        &self,
        device: &Device,
        x: View,
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<()> {
        if x.rows == 0 {
            return Ok(());
        }
        let [n, k] = weight.shape();
        let vector = match self.precision {
            Precision::Bf16 => 8,
            Precision::F32 => 4,
        };
        let variant = x.rows.next_power_of_two().ilog2() as usize;
        let (kernel, rows_per_block) = if !x.aligned() || !k.is_multiple_of(vector) {
            (&self.any, 4)
        } else if k <= 512 {
            (&self.short[variant], 16)
        } else if n < 1024 {
            (&self.narrow[variant], 1)
        } else {
            (&self.wide[variant], 4)
        };
        let bytes = 16 / vector * n * weight.ld() as usize + 4 * x.rows * (k + n);
        let grid = Grid::new("linear", [n.div_ceil(rows_per_block), 1, 1], 128, 0)?
            .doing(bytes, 2 * x.rows * n * k);
        let args = LinearArgs {
            x: x.ptr,
            w: weight.matrix()?,
            bias: bias.map_or(Ok(0), Weight::vector)?,
            out: out.ptr(),
            rows: x.rows as u32,
            n: n as u32,
            k: k as u32,
            ldx: x.ld,
            ldw: weight.ld(),
        };
        // SAFETY: x has k columns, the weight is (n, k), the bias has n elements, out is
        // (rows, n), with at most as many rows as the kernel does; the kernels for aligned
        // operands get such, and weights are always aligned.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}
