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
    part: u64,
    chosen: u64,
    rows: u32,
    cols: u32,
    parts: u32,
}

/// Columns of a part of a row: `COLS` of greedy.cu. And bytes of its result.
const COLS: usize = 2048;
const PART_BYTES: usize = 16;

/// `Chosen` of `greedy.cu`: column, and the bits of the logarithm.
type Chosen = [u32; 2];

/// Column of a row with a value that is not finite.
const UNUSABLE: u32 = u32::MAX;

/// Bytes between the kernels and the host, for so many rows: chosen tokens, then the parts.
pub(crate) fn workspace_bytes(rows: usize, cols: usize) -> usize {
    parts_at(rows).saturating_add(rows.saturating_mul(cols.div_ceil(COLS) * PART_BYTES))
}

fn parts_at(rows: usize) -> usize {
    rows.saturating_mul(size_of::<Chosen>()).checked_next_multiple_of(16).unwrap_or(usize::MAX)
}

/// Kernels of `greedy.cu`.
pub(crate) struct Greedy {
    parts: Kernel,
    greedy: Kernel,
}

impl Greedy {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        let module = loader.module(&unit())?;
        Ok(Self {
            parts: module.overlapping("greedy_parts")?,
            greedy: module.overlapping("greedy")?,
        })
    }

    /// Per row the column of the largest value, and the logarithm of its softmax.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: &Tensor,
        workspace: &mut Workspace,
    ) -> Result<Vec<Option<Sampled>>> {
        let (rows, cols) = (x.rows(), x.cols());
        let mut chosen = vec![Chosen::default(); rows];
        let results = workspace.reserve(device, workspace_bytes(rows, cols))?;
        let parts = cols.div_ceil(COLS);
        let args = GreedyArgs {
            x: x.ptr(),
            part: results + parts_at(rows) as u64,
            chosen: results,
            rows: rows as u32,
            cols: cols as u32,
            parts: parts as u32,
        };
        let grid = Grid::new("greedy_parts", [rows, parts, 1], 256, 0)?;
        // SAFETY: the workspace has room for the result of every part of every row of `x`.
        unsafe { device.launch(&self.parts, &grid, &args) }?;
        let grid = Grid::new("greedy", [rows.div_ceil(4), 1, 1], 128, 0)?;
        // SAFETY: the parts were written by the launch before; there is a `Chosen` for every row.
        unsafe { device.launch(&self.greedy, &grid, &args) }?;
        workspace.read(device, bytemuck::cast_slice_mut(&mut chosen))?;
        let sampled = |[id, logprob]: Chosen| {
            (id != UNUSABLE).then_some(Sampled { id, logprob: f32::from_bits(logprob) })
        };
        Ok(chosen.into_iter().map(sampled).collect())
    }
}
