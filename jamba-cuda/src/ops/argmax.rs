//! Launches `kernels/argmax.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use crate::device::{Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::tensor::Tensor;

pub(super) fn unit() -> Unit {
    super::plain("argmax", include_str!("../../kernels/argmax.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ArgmaxArgs {
    x: u64,
    index: u64,
    cols: u32,
}

/// Kernels of `argmax.cu`.
pub(crate) struct Argmax {
    argmax: Kernel,
}

impl Argmax {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        Ok(Self { argmax: loader.module(&unit())?.kernel("argmax")? })
    }

    /// Per row the column of the largest value.
    pub(crate) fn run(&self, device: &Device, x: &Tensor) -> Result<Vec<u32>> {
        let rows = x.rows();
        let index = device.alloc(4 * rows)?;
        let grid = Grid::new("argmax", [rows, 1, 1], 512, 0)?;
        let args = ArgmaxArgs { x: x.ptr(), index: index.ptr(), cols: x.cols() as u32 };
        // SAFETY: `index` has a word for every row of `x`.
        unsafe { device.launch(&self.argmax, &grid, &args) }?;
        let mut columns = vec![0u32; rows];
        device.download(&index, 0, bytemuck::cast_slice_mut(&mut columns))?;
        Ok(columns)
    }
}
