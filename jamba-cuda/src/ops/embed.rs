//! Launches `kernels/embed.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::quant::Packing;
use jamba_core::shape::Shaped;

use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::state::Staged;
use crate::tensor::Tensor;
use crate::weight::Weight;

pub(super) fn unit() -> Unit {
    super::plain("embed", include_str!("../../kernels/embed.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedArgs {
    table: u64,
    scales: u64,
    tokens: u64,
    out: u64,
    cols: u32,
    ld: u32,
    scale_stride: u32,
}

/// Kernels of `embed.cu`.
pub(crate) struct Embed {
    embed: Kernel,
    embed_int8: Kernel,
}

impl Embed {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let module = loader.module(&unit())?;
        let [embed, embed_int8] = ["embed", "embed_int8"].map(|name| module.overlapping(name));
        Ok(Self { embed: embed?, embed_int8: embed_int8? })
    }

    /// Rows of the table for the staged tokens.
    pub(crate) fn run(
        &self,
        device: &Device,
        table: &Weight,
        batch: &Staged,
        out: &mut Tensor,
    ) -> Result<()> {
        let [_, cols] = table.shape();
        let matrix = table.matrix()?;
        let (kernel, ld) = match matrix.packing {
            None => (&self.embed, table.ld()),
            Some(Packing::Int8Block) => (&self.embed_int8, matrix.stride as u32),
            Some(packing) => {
                let what = format!("an embedding table in {packing:?}");
                return Err(jamba_core::Error::Unsupported { backend: "cuda", what });
            }
        };
        let grid = Grid::new("embed", [batch.tokens, 1, 1], 256, 0)?
            .doing(batch.tokens * (matrix.stride + 4 * cols), 0);
        let args = EmbedArgs {
            table: matrix.ptr,
            scales: matrix.scales,
            tokens: batch.tokens_ptr(),
            out: out.ptr(),
            cols: cols as u32,
            ld,
            scale_stride: matrix.scale_stride as u32,
        };
        // SAFETY: every staged id is a row of the table, as the caller has checked; `out` has a row of
        // `cols` for each of the tokens.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}
