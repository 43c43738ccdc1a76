//! Products by whichever kernels are for so many rows and weights kept so: `kernels/linear.cu`, which it
//! launches itself, `packed.cu`, `few.cu`, `few_groups.cu`, or cuBLASLt for more than a few rows.
#![allow(unsafe_code, reason = "launches kernels")]

use std::sync::{Mutex, PoisonError};

use jamba_core::Result;
use jamba_core::shape::Shaped;

use super::cublas::{CublasLt, Product};
use super::few::Few;
use super::packed::Packed;
use super::quant::Quant;
use super::workspace::{Workspace, Workspaces};
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::tensor::{Tensor, View};
use crate::weight::{Weight, element, padded};

/// Rows of x up to which the weights are read by our own kernel where they are not quantised.
pub(super) const DENSE_ROWS: usize = 8;

/// Bytes of the workspace for dequantised weights, unless a single expert takes more.
pub(crate) const DENSE_BYTES: usize = 512 << 20;

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
type Kernels = [Kernel; 4];

/// Kernels of `linear.cu`, and the library.
pub(crate) struct Linear {
    /// Of weights that are not quantised.
    dense: Dense,
    /// Of those that are.
    pub(crate) packed: Packed,
    pub(crate) few: Few,
    pub(crate) quant: Quant,
    cast_bf16: Kernel,
    add_bias: Kernel,
    cublas: Mutex<CublasLt>,
    precision: Precision,
}

struct Dense {
    /// A block of 4 warps for 4 rows of W.
    wide: Kernels,
    /// A block of 4 warps for 1 row of W, where there are too few to fill the card otherwise.
    narrow: Kernels,
    /// A warp for 4 rows of W, where they are short.
    short: Kernels,
    any: Kernel,
}

impl Linear {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        let few = |names: [&'static str; 4]| -> crate::Result<Kernels> {
            let [a, b, c, d] = names.map(|name| module.overlapping(name));
            Ok([a?, b?, c?, d?])
        };
        let dense = Dense {
            wide: few(["linear_1_4_4", "linear_2_4_4", "linear_4_4_4", "linear_8_4_4"])?,
            narrow: few(["linear_1_1_4", "linear_2_1_4", "linear_4_1_4", "linear_8_1_4"])?,
            short: few(["linear_1_4_1", "linear_2_4_1", "linear_4_4_1", "linear_8_4_1"])?,
            any: module.overlapping("linear_any")?,
        };
        Ok(Self {
            dense,
            packed: Packed::load(loader)?,
            few: Few::load(loader)?,
            quant: Quant::load(loader)?,
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
        w: &mut Workspaces,
        out: &mut Tensor,
    ) -> Result<()> {
        if x.rows == 0 {
            return Ok(());
        }
        if weight.packing().is_none() && x.rows <= DENSE_ROWS {
            return self.dense.few((device, self.precision), x, weight, bias, out);
        }
        if self.packed.takes(x, weight) {
            return self.packed.linear(device, x, weight, bias, out.ptr());
        }
        if self.few.takes_rows(x.rows, weight) {
            let x = self.cast(device, x, &mut w.cast)?;
            return self.few.linear(device, x, weight, bias, out.ptr());
        }
        if self.precision == Precision::F32 {
            let x = Operand { ptr: x.ptr, rows: x.rows, ld: x.ld };
            return self.product(device, x, weight, bias, &mut w.dense, out);
        }
        let x = self.cast(device, x, &mut w.cast)?;
        self.product(device, x, weight, bias, &mut w.dense, out)
    }

    /// Hands the matrices of all experts to `product`: all at once, or dequantised, as many at a
    /// time as the workspace holds. It gets the first expert, how many, and where they are.
    pub(crate) fn per_expert(
        &self,
        device: &Device,
        (weight, experts): (&Weight, usize),
        dense: &mut Workspace,
        mut product: impl FnMut(usize, usize, u64) -> Result<()>,
    ) -> Result<()> {
        let [rows, cols] = weight.shape();
        let of_expert = (rows / experts.max(1)).max(1);
        let bytes = 2 * of_expert * padded(cols, self.precision);
        let at_once = (DENSE_BYTES / bytes.max(1)).max(1) * of_expert;
        self.quant.dense(device, weight, at_once, dense, |first, part, w| {
            product(first / of_expert, part / of_expert, w)
        })
    }

    /// Whether so many rows are a product of cuBLASLt, of operands in bf16.
    pub(crate) fn rounds(&self, rows: usize, weight: &Weight) -> bool {
        self.precision == Precision::Bf16 && rows > DENSE_ROWS && !self.few.takes_rows(rows, weight)
    }

    /// `out = x weight^T + bias` through cuBLASLt.
    pub(crate) fn product(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        bias: Option<&Weight>,
        dense: &mut Workspace,
        out: &mut Tensor,
    ) -> Result<()> {
        let [n, _] = weight.shape();
        self.matmul(device, x, weight, dense, (out.ptr(), false))?;
        let Some(bias) = bias else { return Ok(()) };
        let grid =
            Grid::new("add_bias", [x.rows, 1, 1], 256, 0)?.doing(4 * (2 * x.rows + 1) * n, 0);
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
        dense: &mut Workspace,
        out: &Tensor,
    ) -> Result<Operand> {
        let [n, _] = weight.shape();
        let out = out.rounded("linear", x.rows)?;
        self.matmul(device, x, weight, dense, (out.ptr, true))?;
        Ok(Operand { ld: n as u32, ..out })
    }

    /// x weight^T, in f32 or rounded to bf16; a quantised weight is dequantised before, some rows
    /// at a time.
    fn matmul(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        dense: &mut Workspace,
        (out, rounded): (u64, bool),
    ) -> Result<()> {
        let ([n, k], rows) = (weight.shape(), x.rows);
        let mut cublas = self.cublas.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = Product { rows, n, k, ldx: x.ld, ldw: weight.ld(), ldo: n as u32, rounded };
        let ld = padded(k, self.precision);
        let rows_at_once = (DENSE_BYTES / (2 * ld).max(1)).clamp(1, n.max(1));
        let out_bytes = if rounded { 2 } else { 4 };
        self.quant.dense(device, weight, rows_at_once, dense, |first, part, w| {
            let product = Product { n: part, ldw: ld as u32, ..whole };
            let out = out + (out_bytes * first) as u64;
            // SAFETY: x has so many rows and k columns, w is (part, k), and these are columns of
            // out, which is (rows, n), of which the caller says that it has room for them.
            unsafe { cublas.matmul(device, product, x.ptr, w, out) }?;
            Ok(())
        })
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
        let grid = Grid::new("cast_bf16", [x.rows, ldo.div_ceil(2048), 1], 256, 0)?
            .doing(x.rows * (4 * x.cols + 2 * ldo), 0);
        let args = CastArgs { x: x.ptr, out, k: x.cols as u32, ldx: x.ld, ldo: ldo as u32 };
        // SAFETY: x is as its view says, and the workspace has (rows, ldo) elements.
        unsafe { device.launch(&self.cast_bf16, &grid, &args) }?;
        Ok(Operand { ptr: out, rows: x.rows, ld: ldo as u32 })
    }
}

impl Dense {
    fn few(
        &self,
        (device, precision): (&Device, Precision),
        x: View,
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<()> {
        let [n, k] = weight.shape();
        let variant = x.rows.next_power_of_two().ilog2() as usize;
        let (kernel, rows_per_block) = if !x.aligned() || padded(k, precision) != k {
            (&self.any, 4)
        } else if k <= 512 {
            (&self.short[variant], 16)
        } else if n < 1024 {
            (&self.narrow[variant], 1)
        } else {
            (&self.wide[variant], 4)
        };
        let bytes = element(precision).size() * n * weight.ld() as usize + 4 * x.rows * (k + n);
        let grid = Grid::new("linear", [n.div_ceil(rows_per_block), 1, 1], 128, 0)?
            .doing(bytes, 2 * x.rows * n * k);
        let args = LinearArgs {
            x: x.ptr,
            w: weight.dense()?,
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
