//! Launches `kernels/grouped.cu`, on cards of sm_90a.
#![allow(unsafe_code, reason = "launches kernels")]

use super::linear::Operand;
use super::tensor_map::{Element, TensorMap};
use crate::device::{Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;

/// Threads of a block, and bytes of `GroupedShared` of grouped.cu beside what aligns it.
const THREADS: usize = 384;
const SHARED: usize = 4 * (128 + 256) * 64 * 2 + 2 * 64 * 128 * 2 + 2 * 4 * 8 + 1024;

/// Rows that the copy engine takes at a time.
const BOX_ROWS: usize = 128;

/// Whether the kernels are for this architecture and precision.
pub(crate) fn is_for(arch: &str, precision: Precision) -> bool {
    arch == "sm_90a" && precision == Precision::Bf16
}

pub(crate) fn unit() -> Unit {
    let source =
        concat!(include_str!("../../kernels/hopper.cuh"), include_str!("../../kernels/grouped.cu"));
    super::plain("grouped", source)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GroupedArgs {
    x: TensorMap,
    w: TensorMap,
    start: u64,
    sorted: u64,
    p: u64,
    out: u64,
    rows: u32,
    experts: u32,
    n: u32,
    k: u32,
}

/// Rows of x by group: all with the one matrix, or sorted by expert.
#[derive(Clone, Copy)]
pub(crate) enum Groups {
    One,
    /// The addresses of the lists that moe.cu makes: first row of each expert's group, and of
    /// every row the entry whose weight is in `p`.
    Experts {
        experts: usize,
        start: u64,
        sorted: u64,
        p: u64,
    },
}

/// A matrix of bf16, or one per expert below the other: its address, and elements per row.
#[derive(Clone, Copy)]
pub(crate) struct Matrices {
    pub(crate) ptr: u64,
    pub(crate) ld: u32,
}

/// Kernels of `grouped.cu`.
pub(crate) struct Grouped {
    swiglu: Kernel,
    plain: Kernel,
}

impl Grouped {
    /// `None` where the card or the precision has other kernels.
    pub(crate) fn load(loader: &Loader) -> Result<Option<Self>> {
        if !is_for(loader.arch(), loader.precision) {
            return Ok(None);
        }
        let module = loader.module(&unit())?;
        let kernel = |name| module.kernel_with_shared(name, SHARED);
        Ok(Some(Self { swiglu: kernel("grouped_swiglu")?, plain: kernel("grouped")? }))
    }

    /// Whether products of so many columns are for these kernels.
    pub(crate) fn fits(n: usize) -> bool {
        n.is_multiple_of(8)
    }

    /// `out (rows, n) = silu(x W_gate^T) * (x W_up^T)`, W `(2 n, k)` with rows `[gate; up]` per
    /// group, rounded to bf16.
    ///
    /// # Safety
    /// As [`plain`](Self::plain), with twice the rows of W.
    pub(crate) unsafe fn swiglu(
        &self,
        device: &Device,
        (x, k): (Operand, usize),
        w: Matrices,
        groups: Groups,
        (out, n): (u64, usize),
    ) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.launch(device, (&self.swiglu, 2), (x, k), w, groups, (out, n)) }
    }

    /// `out (rows, n) = x W^T`, W `(n, k)` per group, rounded to bf16; of experts times the weight
    /// of the row.
    ///
    /// # Safety
    /// x has k columns, W has n rows for every group, and both have addresses and strides of 16
    /// bytes; `out` has room for the rows of x; the lists of the groups are as moe.cu makes them.
    pub(crate) unsafe fn plain(
        &self,
        device: &Device,
        (x, k): (Operand, usize),
        w: Matrices,
        groups: Groups,
        (out, n): (u64, usize),
    ) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.launch(device, (&self.plain, 1), (x, k), w, groups, (out, n)) }
    }

    unsafe fn launch(
        &self,
        device: &Device,
        (kernel, rows_per_column): (&Kernel, usize),
        (x, k): (Operand, usize),
        w: Matrices,
        groups: Groups,
        (out, n): (u64, usize),
    ) -> Result<()> {
        let (experts, [start, sorted, p]) = match groups {
            Groups::One => (1, [0; 3]),
            Groups::Experts { experts, start, sorted, p } => (experts, [start, sorted, p]),
        };
        device.bind()?;
        let map = |ptr, rows, ld: u32| {
            TensorMap::new((ptr, Element::Bf16), [rows, k], 2 * ld as usize, BOX_ROWS)
        };
        let args = GroupedArgs {
            x: map(x.ptr, x.rows, x.ld)?,
            w: map(w.ptr, experts * n * rows_per_column, w.ld)?,
            start,
            sorted,
            p,
            out,
            rows: x.rows as u32,
            experts: experts as u32,
            n: n as u32,
            k: k as u32,
        };
        // Pairs of blocks, one for each multiprocessor.
        let blocks = (device.multiprocessors() / 2).max(1) * 2;
        let (rows, matrices) = (x.rows, experts.min(x.rows));
        let bytes = 2 * (rows * (k + n) + matrices * n * rows_per_column * k);
        let grid = Grid::new("grouped", [blocks, 1, 1], THREADS, SHARED)?
            .doing(bytes, 2 * rows * k * n * rows_per_column);
        // SAFETY: the maps keep reads of x and W within them; the rest is as the caller says.
        unsafe { device.launch(kernel, &grid, &args) }
    }
}
