//! Launches `kernels/scan_step.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::weights::Mamba;

use super::scan::{Operands, check_d_state};
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::state::{Channels, Staged};
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

/// Threads of a block: `THREADS` of scan_step.cu.
const THREADS: usize = 128;
/// Tokens of a block where there are many: on tensor cores, and else.
const TENSOR_GROUP: usize = 8;
const GROUP: usize = 4;
/// Up to so many tokens each has blocks of its own.
const FEW_TOKENS: usize = 4;
/// Registers for a row of dt_proj at most, and bytes of shared memory for the vectors of a group.
const ROW_REGISTERS: usize = 64;
const SHARED: usize = 40 << 10;

/// How the threads of a block share the work.
#[derive(Clone, Copy)]
struct Shape {
    d_state: usize,
    lanes: usize,
    /// Elements of the state that a thread has.
    states: usize,
    /// 0 where dt_proj is left to a product.
    dt_rank: usize,
}

impl Shape {
    fn new(d_state: usize, dt_rank: usize, precision: Precision) -> crate::Result<Self> {
        check_d_state(d_state)?;
        let lanes = d_state.div_ceil(4).next_power_of_two().min(32);
        let states = d_state.div_ceil(lanes);
        let vector = vector_len(precision);
        let chunks = dt_rank.div_ceil(lanes * vector);
        let shared = 4 * GROUP * (chunks * lanes * vector + 2 * lanes * states);
        let fits = 4 * chunks <= ROW_REGISTERS && shared <= SHARED;
        Ok(Self { d_state, lanes, states, dt_rank: if fits { dt_rank } else { 0 } })
    }
}

/// Elements of a weight in 16 bytes.
fn vector_len(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 => 8,
        Precision::F32 => 4,
    }
}

/// The source for these sizes.
pub(crate) fn unit(d_state: usize, dt_rank: usize, precision: Precision) -> crate::Result<Unit> {
    let shape = Shape::new(d_state, dt_rank, precision)?;
    let defines = vec![
        ("D_STATE", d_state),
        ("DT_RANK", shape.dt_rank),
        ("LANES", shape.lanes),
        ("STATES", shape.states),
    ];
    let source =
        concat!(include_str!("../../kernels/scan.cuh"), include_str!("../../kernels/scan_step.cu"));
    Ok(Unit { stem: "scan_step", source, defines })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StepArgs {
    x: u64,
    z: u64,
    dt: u64,
    b: u64,
    c: u64,
    a: u64,
    d: u64,
    dt_bias: u64,
    state: u64,
    y: u64,
    runs: u64,
    norms: [u64; 3],
    dt_proj: u64,
    count: u32,
    d_inner: u32,
    ldx: u32,
    ldz: u32,
    lddt: u32,
    ldb: u32,
    ldc: u32,
    ldw: u32,
    eps: f32,
}

/// A kernel for few tokens, and one for more, of which a block does a group.
#[derive(Clone)]
struct Both {
    few: Kernel,
    many: Kernel,
    group: usize,
}

/// Kernels of `scan_step.cu` for one size of the state and one rank of dt.
#[derive(Clone)]
pub(crate) struct ScanStep {
    scan: Both,
    dt_scan: Option<Both>,
    shape: Shape,
    /// Of an element of dt_proj.
    weight_bytes: usize,
}

impl ScanStep {
    pub(crate) fn load(loader: &Loader, d_state: usize, dt_rank: usize) -> crate::Result<Self> {
        let shape = Shape::new(d_state, dt_rank, loader.precision)?;
        let module = loader.module(&unit(d_state, dt_rank, loader.precision)?)?;
        let both = |few, many, group| -> crate::Result<Both> {
            Ok(Both { few: module.overlapping(few)?, many: module.overlapping(many)?, group })
        };
        // `HAS_TENSOR` of scan_step.cu.
        let (many, group) = match (loader.precision, shape.lanes) {
            (Precision::Bf16, 4) => ("dt_scan_step_8", TENSOR_GROUP),
            _ => ("dt_scan_step_4", GROUP),
        };
        let dt_scan = (shape.dt_rank > 0).then(|| both("dt_scan_step_1", many, group));
        Ok(Self {
            scan: both("selective_scan_step_1", "selective_scan_step_4", GROUP)?,
            dt_scan: dt_scan.transpose()?,
            shape,
            weight_bytes: 16 / vector_len(loader.precision),
        })
    }

    /// Whether [`dt_scan`](Self::dt_scan) can be used.
    pub(crate) fn has_dt_proj(&self) -> bool {
        self.dt_scan.is_some()
    }

    /// The scan of the staged tokens, one in each run, continuing from and updating `state`.
    pub(crate) fn scan(
        &self,
        device: &Device,
        o: &Operands<'_>,
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<()> {
        let args = self.args(o, batch, state, y)?;
        self.launch(device, &self.scan, &args)
    }

    /// The same with the norms of dt, B and C and dt_proj: `dt`, `b` and `c` are columns of what
    /// x_proj gives, of which dt has those of its rank.
    pub(crate) fn dt_scan(
        &self,
        device: &Device,
        o: &Operands<'_>,
        (w, eps): (&Mamba<Weight>, f32),
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<()> {
        let Some(kernels) = &self.dt_scan else { return Ok(()) };
        if o.dt.cols != self.shape.dt_rank {
            let (expected, got) = ([1, self.shape.dt_rank], [1, o.dt.cols]);
            let (op, what) = ("dt_scan", "dt");
            return Err(jamba_core::Error::Shape { op, what, expected, got });
        }
        let norms = [w.dt_layernorm.vector()?, w.b_layernorm.vector()?, w.c_layernorm.vector()?];
        let (dt_proj, ldw) = (w.dt_proj.dense()?, w.dt_proj.ld());
        let args = StepArgs { norms, dt_proj, ldw, eps, ..self.args(o, batch, state, y)? };
        self.launch(device, kernels, &args)
    }

    fn args(
        &self,
        o: &Operands<'_>,
        batch: &Staged,
        state: &Channels,
        y: &mut Tensor,
    ) -> Result<StepArgs> {
        let View { ptr: x, ld: ldx, .. } = o.x;
        Ok(StepArgs {
            x,
            z: o.z.ptr,
            dt: o.dt.ptr,
            b: o.b.ptr,
            c: o.c.ptr,
            a: o.a.vector()?,
            d: o.d.vector()?,
            dt_bias: o.dt_bias.vector()?,
            state: state.values.ptr(),
            y: y.ptr(),
            runs: batch.runs_ptr(),
            norms: [0; 3],
            dt_proj: 0,
            count: batch.tokens as u32,
            d_inner: state.channels as u32,
            ldx,
            ldz: o.z.ld,
            lddt: o.dt.ld,
            ldb: o.b.ld,
            ldc: o.c.ld,
            ldw: 0,
            eps: 0.0,
        })
    }

    fn launch(&self, device: &Device, kernels: &Both, args: &StepArgs) -> Result<()> {
        let tokens = args.count as usize;
        let Both { few, many, group } = kernels;
        let (kernel, group) = if tokens <= FEW_TOKENS { (few, 1) } else { (many, *group) };
        let channels = (args.d_inner as usize).div_ceil(THREADS / self.shape.lanes);
        let (d_inner, d_state) = (args.d_inner as usize, self.shape.d_state);
        // States read and written, A, dt_proj, x, z and y.
        let bytes = 4 * d_inner * (2 * tokens * d_state + d_state + 3 * tokens)
            + self.weight_bytes * d_inner * args.ldw as usize;
        let rank = if args.ldw > 0 { self.shape.dt_rank } else { 0 };
        let grid = Grid::new("scan_step", [channels, tokens.div_ceil(group), 1], THREADS, 0)?
            .doing(bytes, d_inner * tokens * (7 * d_state + 2 * rank));
        // SAFETY: all operands have a row for every staged token and the columns that the state's
        // shape says, which are those that the kernel was compiled for; the norms and dt_proj those
        // of the rank of dt, where they are used; staging saw to it that every slot is one of the
        // state, and the caller that no two tokens are of one run.
        unsafe { device.launch(kernel, &grid, args) }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_a_thread() {
        for d_state in 1..=256 {
            let shape = Shape::new(d_state, 1, Precision::Bf16).unwrap();
            assert!(shape.lanes * shape.states >= d_state, "{d_state}");
            assert!(shape.lanes <= 32 && THREADS.is_multiple_of(shape.lanes), "{d_state}");
        }
        assert!(Shape::new(0, 1, Precision::F32).is_err());
    }

    #[test]
    fn published_ranks_fit() {
        for (dt_rank, precision, fits) in [
            (160, Precision::Bf16, true),
            (256, Precision::Bf16, true),
            (512, Precision::Bf16, true),
            (256, Precision::F32, true),
            (512, Precision::F32, false),
        ] {
            let shape = Shape::new(16, dt_rank, precision).unwrap();
            assert_eq!((shape.lanes, shape.states), (4, 4));
            assert_eq!(shape.dt_rank > 0, fits, "{dt_rank} {precision:?}");
        }
    }
}
