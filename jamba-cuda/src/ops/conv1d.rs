//! Launches `kernels/conv1d.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use super::linear::Operand;
use crate::device::{Device, Grid, Kernel};
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
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
    /// For x and y in bf16.
    rounded: Option<Kernel>,
}

/// Taps that the kernel for bf16 is made for.
const ROUNDED_TAPS: usize = 8;

impl Conv1d {
    pub(crate) fn load(loader: &Loader, d_conv: usize) -> crate::Result<Self> {
        let module = loader.module(&unit(d_conv)?)?;
        let rounded = loader.precision == Precision::Bf16 && d_conv <= ROUNDED_TAPS;
        Ok(Self {
            any: module.overlapping("causal_conv1d")?,
            step: module.overlapping("causal_conv1d_step")?,
            rounded: rounded.then(|| module.kernel("causal_conv1d_bf16")).transpose()?,
        })
    }

    /// Whether there is a kernel for x and y in bf16.
    pub(crate) fn rounds(&self) -> bool {
        self.rounded.is_some()
    }

    /// Convolution and SiLU of the staged tokens, continuing from and updating `state`.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: View,
        parameters: (&Weight, Option<&Weight>),
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<()> {
        let channels = state.channels.div_ceil(128);
        let (kernel, blocks) = match batch.is_decode() {
            true => (&self.step, [batch.tokens, channels, 1]),
            false => (&self.any, [batch.segments, channels, 1]),
        };
        let (x, y) = ((x.ptr, x.ld), y.ptr());
        self.launch(device, (kernel, blocks, 4), x, parameters, batch, state, y)
    }

    /// The same of x in bf16 to `y` in bf16, if [`rounds`](Self::rounds) and the channels are a
    /// multiple of 8.
    pub(crate) fn rounded(
        &self,
        device: &Device,
        x: Operand,
        parameters: (&Weight, Option<&Weight>),
        batch: &Staged,
        state: &Channels,
        y: Operand,
    ) -> Result<()> {
        let Some(kernel) = &self.rounded else { return Ok(()) };
        let blocks = [batch.segments, state.channels.div_ceil(4 * 128), 1];
        self.launch(device, (kernel, blocks, 2), (x.ptr, x.ld), parameters, batch, state, y.ptr)
    }

    fn launch(
        &self,
        device: &Device,
        (kernel, blocks, element): (&Kernel, [usize; 3], usize),
        (x, ldx): (u64, u32),
        (weight, bias): (&Weight, Option<&Weight>),
        batch: &Staged,
        state: &Channels,
        y: u64,
    ) -> Result<()> {
        let kept = 2 * batch.runs * state.per_channel + state.per_channel + 2;
        let bytes = state.channels * (2 * element * batch.tokens + 4 * kept);
        let grid = Grid::new("causal_conv1d", blocks, 128, 0)?.doing(bytes, 0);
        let args = ConvArgs {
            x,
            weight: weight.vector()?,
            bias: bias.map_or(Ok(0), Weight::vector)?,
            state: state.values.ptr(),
            y,
            runs: batch.runs_ptr(),
            run_count: batch.runs as u32,
            d_inner: state.channels as u32,
            ldx,
        };
        // SAFETY: x and y have a row for every staged token and d_inner columns, weight and bias
        // as many rows; staging saw to it that every slot is one of the state. No two blocks of
        // the launch use the state of one channel and slot.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}
