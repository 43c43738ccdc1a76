//! Launches `kernels/rows.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::state::Staged;
use crate::tensor::Tensor;

pub(super) fn unit() -> Unit {
    super::plain("rows", include_str!("../../kernels/rows.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArgs {
    x: u64,
    index: u64,
    out: u64,
    cols: u32,
}

/// Kernels of `rows.cu`.
pub(crate) struct Rows {
    output_rows: Kernel,
}

impl Rows {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        Ok(Self { output_rows: loader.module(&unit())?.overlapping("output_rows")? })
    }

    /// The rows of `x` whose logits the staged batch asks for.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: &Tensor,
        batch: &Staged,
        out: &mut Tensor,
    ) -> Result<()> {
        let grid = Grid::new("output_rows", [batch.outputs, 1, 1], 256, 0)?
            .doing(2 * 4 * batch.outputs * x.cols(), 0);
        let cols = x.cols() as u32;
        let args = RowsArgs { x: x.ptr(), index: batch.outputs_ptr(), out: out.ptr(), cols };
        // SAFETY: a batch asks for rows among its tokens, of which `x` has as many; `out` has as
        // many rows as the batch has outputs, of the same columns.
        unsafe { device.launch(&self.output_rows, &grid, &args) }?;
        Ok(())
    }
}
