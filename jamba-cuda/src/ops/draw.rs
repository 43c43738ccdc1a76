//! Launches `kernels/draw.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Dtype;
use jamba_core::random::Draw;

use crate::device::{Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};

pub(super) fn unit() -> Unit {
    super::plain("draw", include_str!("../../kernels/draw.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DrawArgs {
    out: u64,
    state: u64,
    scale: f32,
    cols: u32,
    ld: u32,
    is_bf16: u32,
}

/// Where values that are drawn go.
#[derive(Clone, Copy)]
pub(crate) struct Drawn {
    pub(crate) ptr: u64,
    /// f32 or bf16.
    pub(crate) element: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Elements from one row to the next.
    pub(crate) ld: usize,
}

/// Kernels of `draw.cu`.
pub(crate) struct Drawing {
    bf16: Kernel,
    f32: Kernel,
}

impl Drawing {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        let module = loader.module(&unit())?;
        Ok(Self { bf16: module.kernel("draw_bf16")?, f32: module.kernel("draw_f32")? })
    }

    /// Whether values of a tensor of `dtype` can be drawn into these elements.
    pub(crate) fn fits(dtype: Dtype, element: Dtype) -> bool {
        [dtype, element].iter().all(|d| matches!(d, Dtype::F32 | Dtype::Bf16))
    }

    /// Draws a matrix whose values are those of a tensor of `dtype`.
    pub(crate) fn run(&self, device: &Device, draw: Draw, dtype: Dtype, to: Drawn) -> Result<()> {
        let kernel = if to.element == Dtype::F32 { &self.f32 } else { &self.bf16 };
        let Drawn { ptr, rows, cols, ld, element } = to;
        let grid = Grid::new("draw", [rows, 1, 1], 256, 0)?.doing(rows * cols * element.size(), 0);
        let args = DrawArgs {
            out: ptr,
            state: draw.state,
            scale: draw.scale,
            cols: cols as u32,
            ld: ld as u32,
            is_bf16: u32::from(dtype == Dtype::Bf16),
        };
        // SAFETY: the caller has memory for rows of `ld` of these elements, no fewer than `cols`.
        unsafe { device.launch(kernel, &grid, &args) }
    }
}
