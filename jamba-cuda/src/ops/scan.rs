//! Launches `kernels/scan.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::{Result, SelectiveScan};

use crate::device::{Device, Grid, Kernel};
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::state::{Channels, Staged};
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

/// Tokens in shared memory at a time: `CHUNK` of scan.cu.
const CHUNK: usize = 32;

/// How the threads of a block share the work, from the size of the state.
#[derive(Clone, Copy)]
struct Shape {
    log_lanes: u32,
    /// Elements of the state that a thread has.
    states: usize,
}

impl Shape {
    fn new(d_state: usize) -> crate::Result<Self> {
        check_d_state(d_state)?;
        let log_lanes = d_state.div_ceil(2).next_power_of_two().ilog2().min(5);
        Ok(Self { log_lanes, states: d_state.div_ceil(1 << log_lanes) })
    }

    fn lanes(self) -> usize {
        1 << self.log_lanes
    }

    fn channels(self) -> usize {
        (128 / self.lanes()).clamp(8, 32)
    }

    /// Bytes of `Shared` of scan.cu, of elements of so many bytes.
    fn shared(self, element: usize) -> usize {
        let (channels, padded) = (self.channels(), self.lanes() * self.states);
        let inputs = 4 * 3 * channels * element;
        CHUNK * (inputs + 2 * (2 * 4 * padded + 8 * channels + 4 * (channels + 1)))
    }
}

pub(super) fn check_d_state(d_state: usize) -> crate::Result<()> {
    if (1..=256).contains(&d_state) {
        return Ok(());
    }
    let allowed = "the kernel is made for 1 to 256";
    Err(Error::Size { op: "selective_scan", what: "d_state", got: d_state, allowed })
}

/// The source for a state of this size.
pub(crate) fn unit(d_state: usize) -> crate::Result<Unit> {
    let shape = Shape::new(d_state)?;
    let log_lanes = shape.log_lanes as usize;
    let defines = vec![("D_STATE", d_state), ("LOG_LANES", log_lanes), ("STATES", shape.states)];
    let source =
        concat!(include_str!("../../kernels/scan.cuh"), include_str!("../../kernels/scan.cu"));
    Ok(Unit { stem: "scan", source, defines })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScanArgs {
    x: u64,
    dt: u64,
    z: u64,
    b: u64,
    c: u64,
    a: u64,
    d: u64,
    dt_bias: u64,
    state: u64,
    y: u64,
    runs: u64,
    d_inner: u32,
    blocks: u32,
    ldx: u32,
    lddt: u32,
    ldz: u32,
    ldb: u32,
    ldc: u32,
}

/// The operands of the scan.
pub(crate) struct Operands<'a> {
    pub(crate) x: View,
    pub(crate) dt: View,
    pub(crate) a: &'a Weight,
    pub(crate) b: View,
    pub(crate) c: View,
    pub(crate) d: &'a Weight,
    pub(crate) z: View,
    pub(crate) dt_bias: &'a Weight,
}

impl<'a> From<&SelectiveScan<'a, Tensor, Weight>> for Operands<'a> {
    fn from(args: &SelectiveScan<'a, Tensor, Weight>) -> Self {
        Self {
            x: View::from(&args.x),
            dt: View::from(&args.dt),
            a: args.a,
            b: View::from(&args.b),
            c: View::from(&args.c),
            d: args.d,
            z: View::from(&args.z),
            dt_bias: args.dt_bias,
        }
    }
}

/// Kernels of `scan.cu` for one size of the state.
#[derive(Clone)]
pub(crate) struct Scan {
    any: Kernel,
    aligned: Kernel,
    /// For x, dt, z and y in bf16.
    rounded: Option<Kernel>,
    shape: Shape,
}

impl Scan {
    pub(crate) fn load(loader: &Loader, d_state: usize) -> crate::Result<Self> {
        let (shape, module) = (Shape::new(d_state)?, loader.module(&unit(d_state)?)?);
        let kernel = |name| module.overlapping_with_shared(name, shape.shared(4));
        let rounded = || module.overlapping_with_shared("selective_scan_bf16", shape.shared(2));
        Ok(Self {
            rounded: (loader.precision == Precision::Bf16).then(rounded).transpose()?,
            any: kernel("selective_scan")?,
            aligned: kernel("selective_scan_aligned")?,
            shape,
        })
    }

    /// The scan of the staged tokens, continuing from and updating `state`.
    pub(crate) fn run(
        &self,
        device: &Device,
        o: &Operands<'_>,
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<()> {
        let sizes = state.channels.is_multiple_of(4) && state.per_channel.is_multiple_of(4);
        let aligned = sizes && [o.x, o.dt, o.z, o.b, o.c].iter().all(View::aligned);
        let kernel = if aligned { &self.aligned } else { &self.any };
        self.launch(device, (kernel, 4), o, batch, state, y.ptr())
    }

    /// The same with x, dt, z and y in bf16, in bf16 mode: channels, and strides in elements,
    /// multiples of 8, `d_state` and the strides of B and C of 4.
    pub(crate) fn rounded(
        &self,
        device: &Device,
        o: &Operands<'_>,
        batch: &Staged,
        state: &Channels,
        y: u64,
    ) -> Result<()> {
        let Some(kernel) = &self.rounded else { return Ok(()) };
        self.launch(device, (kernel, 2), o, batch, state, y)
    }

    fn launch(
        &self,
        device: &Device,
        (kernel, element): (&Kernel, usize),
        o: &Operands<'_>,
        batch: &Staged,
        state: &Channels,
        y: u64,
    ) -> Result<()> {
        let blocks = state.channels.div_ceil(self.shape.channels());
        let threads = self.shape.channels() * self.shape.lanes();
        // x, dt, z and y; B and C; states, read and written, and A.
        let (channels, d_state) = (state.channels, state.per_channel);
        let bytes = 4 * element * batch.tokens * channels
            + 4 * (2 * batch.tokens * d_state + (2 * batch.runs + 1) * channels * d_state);
        let grid = [batch.runs * blocks, 1, 1];
        let grid = Grid::new("selective_scan", grid, threads, self.shape.shared(element))?
            .doing(bytes, 7 * batch.tokens * channels * d_state);
        let args = ScanArgs {
            x: o.x.ptr,
            dt: o.dt.ptr,
            z: o.z.ptr,
            b: o.b.ptr,
            c: o.c.ptr,
            a: o.a.vector()?,
            d: o.d.vector()?,
            dt_bias: o.dt_bias.vector()?,
            state: state.values.ptr(),
            y,
            runs: batch.runs_ptr(),
            d_inner: state.channels as u32,
            blocks: blocks as u32,
            ldx: o.x.ld,
            lddt: o.dt.ld,
            ldz: o.z.ld,
            ldb: o.b.ld,
            ldc: o.c.ld,
        };
        // SAFETY: all operands have a row for every staged token and the columns that the state's
        // shape says, which are those that the kernel was compiled for; staging saw to it that
        // every slot is one of the state. The kernel for aligned operands gets such.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_a_thread() {
        for d_state in 1..=256 {
            let shape = Shape::new(d_state).unwrap();
            assert!(shape.lanes() * shape.states >= d_state, "{d_state}");
            assert!(shape.lanes() * (shape.states - 1) < d_state, "{d_state}");
            assert!((32..=256).contains(&(shape.channels() * shape.lanes())), "{d_state}");
        }
        assert_eq!((Shape::new(16).unwrap().lanes(), Shape::new(16).unwrap().states), (8, 2));
        assert!(Shape::new(0).is_err() && Shape::new(257).is_err());
    }
}
