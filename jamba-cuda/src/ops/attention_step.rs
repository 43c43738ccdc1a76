//! Launches `kernels/attention_step.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use super::workspace::Workspace;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::state::{Cache, Staged};
use crate::tensor::Tensor;

/// Keys in shared memory at a time: `TILE` of attention_step.cu.
const TILE: usize = 64;
/// Parts of the keys at most: threads of attention_step_merge.
const SPLITS: usize = 128;
/// Blocks that the card is to have at a time, for each of its multiprocessors.
const BLOCKS: usize = 2;
/// Bytes of the results for parts at most: beyond it there are queries enough to fill the card.
pub(crate) const PARTS_BYTES: usize = 64 << 20;

/// The source for heads of a size that [fits].
pub(crate) fn unit(head_dim: usize) -> Unit {
    let source = include_str!("../../kernels/attention_step.cu");
    Unit { stem: "attention_step", source, defines: vec![("HEAD_DIM", head_dim)] }
}

/// Whether there are kernels for heads of this size.
pub(crate) fn fits(head_dim: usize, precision: Precision) -> bool {
    precision == Precision::Bf16 && head_dim.is_multiple_of(16) && head_dim <= 128
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StepArgs {
    qkv: u64,
    keys: u64,
    values: u64,
    out: u64,
    parts: u64,
    runs: u64,
    heads: u32,
    kv_heads: u32,
    context: u32,
    splits: u32,
    scale: f32,
}

/// Kernels of `attention_step.cu` for one size of heads.
#[derive(Clone)]
pub(crate) struct AttentionStep {
    /// For up to 16 query heads that share a key head, and for more.
    few: Kernel,
    many: Kernel,
    merge: Kernel,
    shared: usize,
}

impl AttentionStep {
    pub(crate) fn load(loader: &Loader, head_dim: usize) -> crate::Result<Self> {
        let module = loader.module(&unit(head_dim))?;
        // Two stages of keys and values, in rows of PITCH.
        let shared = 2 * 2 * TILE * (head_dim + 8) * 2;
        Ok(Self {
            few: module.overlapping_with_shared("attention_step_16", shared)?,
            many: module.overlapping_with_shared("attention_step_32", shared)?,
            merge: module.overlapping("attention_step_merge")?,
            shared,
        })
    }

    /// The staged tokens, one in each run, attend to the cache, which has their own keys and values
    /// already.
    pub(crate) fn run(
        &self,
        device: &Device,
        qkv: &Tensor,
        batch: &Staged,
        cache: &Cache,
        parts: &mut Workspace,
        out: &mut Tensor,
    ) -> Result<()> {
        let [heads, kv_heads, head_dim] = cache.heads;
        let group = heads / kv_heads;
        let (kernel, rows) = if group <= 16 { (&self.few, 16) } else { (&self.many, 32) };
        let blocks = kv_heads * group.div_ceil(rows);
        let part_bytes = 4 * batch.tokens * heads * (head_dim + 2);
        // Nothing here depends on the lengths: a graph of the step is used again for longer ones.
        let splits = (BLOCKS * device.multiprocessors() / (batch.tokens * blocks).max(1))
            .min(cache.context.div_ceil(TILE))
            .min(PARTS_BYTES / part_bytes.max(1))
            .clamp(1, SPLITS);
        let args = StepArgs {
            qkv: qkv.ptr(),
            keys: cache.keys.ptr(),
            values: cache.values.ptr(),
            out: out.ptr(),
            parts: if splits > 1 { parts.reserve(device, splits * part_bytes)? } else { 0 },
            runs: batch.runs_ptr(),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            context: cache.context as u32,
            splits: splits as u32,
            scale: (head_dim as f32).sqrt().recip(),
        };
        let pairs = batch.seen * head_dim;
        let grid = Grid::new("attention_step", [batch.tokens, blocks, splits], 128, self.shared)?
            .doing(2 * 2 * pairs * kv_heads, 4 * pairs * heads);
        // SAFETY: qkv has a row for every staged token and the columns of all heads, out those of
        // the query heads, and the workspace the parts of all of them; staging saw to it that every
        // slot and position is within the cache, and the caller that each run has one token.
        unsafe { device.launch(kernel, &grid, &args) }?;
        if splits > 1 {
            let grid = Grid::new("attention_step_merge", [batch.tokens, heads, 1], 128, 0)?
                .doing((splits + 1) * part_bytes, 0);
            // SAFETY: as above; the parts were written by the launch before.
            unsafe { device.launch(&self.merge, &grid, &args) }?;
        }
        Ok(())
    }
}
