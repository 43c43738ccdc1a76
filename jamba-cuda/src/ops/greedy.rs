//! Launches `kernels/greedy.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Sampled;

use super::workspace::Workspace;
use crate::device::{Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::tensor::Tensor;

pub(super) fn unit() -> Unit {
    super::plain("greedy", include_str!("../../kernels/greedy.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GreedyArgs {
    x: u64,
    chosen: u64,
    cols: u32,
}

/// `Chosen` of `greedy.cu`: column, and the bits of the logarithm.
type Chosen = [u32; 2];

/// Column of a row with a value that is not finite.
const UNUSABLE: u32 = u32::MAX;

/// Bytes between the kernel and the host, for so many rows.
pub(crate) fn workspace_bytes(rows: usize) -> usize {
    rows.saturating_mul(size_of::<Chosen>())
}

/// Kernels of `greedy.cu`.
pub(crate) struct Greedy {
    greedy: Kernel,
}

impl Greedy {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        Ok(Self { greedy: loader.module(&unit())?.overlapping("greedy")? })
    }

    /// Per row the column of the largest value, and the logarithm of its softmax.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: &Tensor,
        workspace: &mut Workspace,
    ) -> Result<Vec<Option<Sampled>>> {
        let mut chosen = vec![Chosen::default(); x.rows()];
        let results = workspace.reserve(device, workspace_bytes(x.rows()))?;
        let grid = Grid::new("greedy", [x.rows(), 1, 1], 1024, 0)?;
        let args = GreedyArgs { x: x.ptr(), chosen: results, cols: x.cols() as u32 };
        // SAFETY: there is a `Chosen` for every row of `x`.
        unsafe { device.launch(&self.greedy, &grid, &args) }?;
        workspace.read(device, bytemuck::cast_slice_mut(&mut chosen))?;
        let sampled = |[id, logprob]: Chosen| {
            (id != UNUSABLE).then_some(Sampled { id, logprob: f32::from_bits(logprob) })
        };
        Ok(chosen.into_iter().map(sampled).collect())
    }
}
