//! Launches `kernels/conv1d.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use crate::device::{Device, Grid, Kernel};
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::state::{Channels, SEGMENT, Staged};
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

/// The source for this number of taps.
pub(crate) fn unit(d_conv: usize) -> crate::Result<Unit> {
    if !(1..=SEGMENT + 1).contains(&d_conv) {
        let allowed = "the kernel is made for 1 to 65";
        return Err(Error::Size { op: "causal_conv1d", what: "d_conv", got: d_conv, allowed });
    }
    let source = include_str!("../../kernels/conv1d.cu");
    Ok(Unit { stem: "conv1d", source, defines: vec![("D_CONV", d_conv)] })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvArgs {
    x: u64,
    weight: u64,
    bias: u64,
    state: u64,
    y: u64,
    runs: u64,
    run_count: u32,
    d_inner: u32,
    ldx: u32,
}

/// Kernels of `conv1d.cu` for one number of taps.
#[derive(Clone)]
pub(crate) struct Conv1d {
    any: Kernel,
    step: Kernel,
}

impl Conv1d {
    pub(crate) fn load(loader: &Loader, d_conv: usize) -> crate::Result<Self> {
        let module = loader.module(&unit(d_conv)?)?;
        Ok(Self {
            any: module.overlapping("causal_conv1d")?,
            step: module.overlapping("causal_conv1d_step")?,
        })
    }

    /// Convolution and SiLU of the staged tokens, continuing from and updating `state`.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: View,
        (weight, bias): (&Weight, Option<&Weight>),
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<()> {
        let channels = state.channels.div_ceil(128);
        let (kernel, blocks) = match batch.is_decode() {
            true => (&self.step, [batch.tokens, channels, 1]),
            false => (&self.any, [batch.segments, channels, 1]),
        };
        let kept = 2 * batch.runs * state.per_channel;
        let bytes = 4 * state.channels * (2 * batch.tokens + kept + state.per_channel + 2);
        let grid = Grid::new("causal_conv1d", blocks, 128, 0)?.doing(bytes, 0);
        let args = ConvArgs {
            x: x.ptr,
            weight: weight.vector()?,
            bias: bias.map_or(Ok(0), Weight::vector)?,
            state: state.values.ptr(),
            y: y.ptr(),
            runs: batch.runs_ptr(),
            run_count: batch.runs as u32,
            d_inner: state.channels as u32,
            ldx: x.ld,
        };
        // SAFETY: x and y have a row for every staged token and d_inner columns, weight and bias
        // as many rows; staging saw to it that every slot is one of the state. No two blocks of
        // the launch use the state of one channel and slot.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}
