//! Launches `kernels/attention.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use super::attention_groups::AttentionGroups;
use super::attention_step::{self, AttentionStep, PARTS_BYTES};
use super::workspace::Workspace;
use crate::device::{Device, Grid, Kernel};
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::state::{Cache, SEGMENT, Staged, kv_element_bytes};
use crate::tensor::Tensor;

/// Rows and keys in shared memory at a time: `ROWS` and `KEYS` of attention.cu.
const ROWS: usize = 32;
const KEYS: usize = 32;
/// Runs of at least so many tokens go to the tensor cores: a tile of 64 with fewer is mostly empty.
const TILE_MIN: usize = 16;
/// Parts that the keys are cut into at most: threads of attention_merge. And keys of each at least.
const SPLITS: usize = 128;
const SPLIT_KEYS: usize = 64;

/// The source for heads of this size.
pub(crate) fn unit(head_dim: usize) -> crate::Result<Unit> {
    if !(1..=256).contains(&head_dim) {
        let allowed = "the kernel is made for 1 to 256";
        return Err(Error::Size { op: "attention", what: "head_dim", got: head_dim, allowed });
    }
    let source = include_str!("../../kernels/attention.cu");
    Ok(Unit { stem: "attention", source, defines: vec![("HEAD_DIM", head_dim)] })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionArgs {
    qkv: u64,
    keys: u64,
    values: u64,
    out: u64,
    parts: u64,
    tokens: u64,
    runs: u64,
    run_count: u32,
    heads: u32,
    kv_heads: u32,
    context: u32,
    tiles: u32,
    splits: u32,
    tile_min: u32,
    scale: f32,
}

/// Kernels of `attention.cu` for one size of heads.
#[derive(Clone)]
pub(crate) struct Attention {
    append_kv: Kernel,
    rows: Kernel,
    merge: Kernel,
    /// For bf16 and the sizes that fit `mma`.
    tiles: Option<Kernel>,
    /// Instead of those, where the card has them.
    groups: Option<AttentionGroups>,
    /// For single tokens, where it has kernels.
    step: Option<AttentionStep>,
    head_dim: usize,
    precision: Precision,
    shared: usize,
}

/// Bytes that attention to the whole batch moves at least, and its operations: queries and results in
/// f32, keys and values once for each run.
pub(super) fn work(batch: &Staged, cache: &Cache, precision: Precision) -> (usize, usize) {
    let [heads, kv_heads, head_dim] = cache.heads;
    let element = kv_element_bytes(precision);
    let rows = 2 * 4 * batch.tokens * heads + 2 * element * batch.cached * kv_heads;
    (rows * head_dim, 4 * batch.seen * heads * head_dim)
}

impl Attention {
    pub(crate) fn load(loader: &Loader, head_dim: usize) -> crate::Result<Self> {
        let module = loader.module(&unit(head_dim)?)?;
        let width = head_dim.next_multiple_of(4);
        let shared = 4 * (ROWS * width + KEYS * (width + 4) + KEYS * width);
        let tiles =
            loader.precision == Precision::Bf16 && head_dim.is_multiple_of(16) && head_dim <= 128;
        let step = attention_step::fits(head_dim, loader.precision)
            .then(|| AttentionStep::load(loader, head_dim));
        Ok(Self {
            append_kv: module.overlapping("append_kv")?,
            rows: module.overlapping_with_shared("attention_rows", shared)?,
            merge: module.overlapping("attention_merge")?,
            tiles: tiles.then(|| module.kernel("attention_tiles")).transpose()?,
            step: step.transpose()?,
            groups: AttentionGroups::load(loader, head_dim)?,
            head_dim,
            precision: loader.precision,
            shared,
        })
    }

    /// Appends the staged tokens to the cache and lets them attend to it.
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
        if head_dim != self.head_dim {
            let (op, what) = ("attention", "head_dim");
            let allowed = "the kernels of this state are made for another";
            return Err(Error::Size { op, what, got: head_dim, allowed }.into());
        }
        let tile_min = if self.tiles.is_some() { TILE_MIN } else { usize::MAX };
        // Of a segment of the longest run that is left to the rows kernel.
        let queries = batch.longest.min(SEGMENT).min(tile_min - 1);
        let tiles = (queries * (heads / kv_heads)).div_ceil(ROWS);
        let blocks = batch.segments * tiles * kv_heads;
        // A decode step may be a graph, which is used again for longer sequences.
        let keys = if batch.is_decode() { cache.context } else { batch.positions };
        let part_bytes = 4 * batch.tokens * heads * (head_dim + 2);
        let splits = (2 * device.multiprocessors())
            .div_ceil(blocks.max(1))
            .min(keys.div_ceil(SPLIT_KEYS))
            .min(PARTS_BYTES / part_bytes.max(1))
            .clamp(1, SPLITS);
        let args = AttentionArgs {
            qkv: qkv.ptr(),
            keys: cache.keys.ptr(),
            values: cache.values.ptr(),
            out: out.ptr(),
            parts: if splits > 1 { parts.reserve(device, splits * part_bytes)? } else { 0 },
            tokens: batch.tokens_ptr(),
            runs: batch.runs_ptr(),
            run_count: batch.runs as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            context: cache.context as u32,
            tiles: tiles as u32,
            splits: splits as u32,
            tile_min: tile_min.min(u32::MAX as usize) as u32,
            scale: (head_dim as f32).sqrt().recip(),
        };
        let (bytes, operations) = work(batch, cache, self.precision);
        let kept = 2 * batch.tokens * kv_heads * head_dim;
        let per_token = Grid::new("append_kv", [batch.tokens, 1, 1], 256, 0)?
            .doing(kept * (4 + kv_element_bytes(self.precision)), 0);
        // SAFETY: qkv has a row for every staged token and the columns of all heads; staging saw
        // to it that every slot and position is within the cache.
        unsafe { device.launch(&self.append_kv, &per_token, &args) }?;
        if let Some(step) = &self.step
            && batch.is_decode()
        {
            return step.run(device, qkv, batch, cache, parts, out);
        }
        if batch.shortest < tile_min {
            let blocks = [batch.segments * tiles, kv_heads, splits];
            let grid =
                Grid::new("attention_rows", blocks, 128, self.shared)?.doing(bytes, operations);
            // SAFETY: as above; out has a row for every staged token and the columns of the query
            // heads, and the workspace the parts of all of them.
            unsafe { device.launch(&self.rows, &grid, &args) }?;
            if splits > 1 {
                let grid = Grid::new("attention_merge", [batch.tokens, heads, 1], 128, 0)?
                    .doing((splits + 1) * part_bytes, 0);
                // SAFETY: as above; the parts were written by the launch before.
                unsafe { device.launch(&self.merge, &grid, &args) }?;
            }
        }
        if batch.longest < tile_min {
            return Ok(());
        }
        if let Some(groups) = &self.groups {
            // SAFETY: as for the rows; head_dim is one that the kernel was compiled for.
            unsafe { groups.run(device, (qkv.ptr(), out.ptr()), batch, cache, tile_min) }?;
        } else if let Some(kernel) = &self.tiles {
            let grid = Grid::new("attention_tiles", [batch.segments, heads, 1], 128, 0)?
                .doing(bytes, operations);
            // SAFETY: as for the rows; head_dim is one that the kernel was compiled for.
            unsafe { device.launch(kernel, &grid, &args) }?;
        }
        Ok(())
    }
}
