//! Launches `kernels/attention_groups.cu`, on cards of sm_90a.
#![allow(unsafe_code, reason = "launches kernels")]

use super::tensor_map::{Element, TensorMap};
use super::{attention, grouped};
use crate::device::{Device, Grid, Kernel};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::state::{Cache, Staged};

const THREADS: usize = 384;

/// Keys that the copy engine takes at a time, KEYS of attention_groups.cu.
const BOX_ROWS: usize = 128;

/// Whether the kernel is for this architecture, precision and size of heads.
pub(crate) fn is_for(arch: &str, precision: Precision, head_dim: usize) -> bool {
    grouped::is_for(arch, precision) && matches!(head_dim, 64 | 128)
}

pub(crate) fn unit(head_dim: usize) -> Unit {
    let source = concat!(
        include_str!("../../kernels/hopper.cuh"),
        include_str!("../../kernels/attention_groups.cu")
    );
    Unit { stem: "attention_groups", source, defines: vec![("HEAD_DIM", head_dim)] }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GroupsArgs {
    keys: TensorMap,
    values: TensorMap,
    qkv: u64,
    out: u64,
    runs: u64,
    run_count: u32,
    heads: u32,
    kv_heads: u32,
    context: u32,
    tile_min: u32,
    scale: f32,
}

/// The kernel of `attention_groups.cu` for one size of heads.
#[derive(Clone)]
pub(crate) struct AttentionGroups {
    kernel: Kernel,
    shared: usize,
}

impl AttentionGroups {
    /// `None` where others are for this card, precision or size of heads.
    pub(crate) fn load(loader: &Loader, head_dim: usize) -> Result<Option<Self>> {
        if !is_for(loader.arch(), loader.precision, head_dim) {
            return Ok(None);
        }
        // `GroupsShared` of attention_groups.cu, and what aligns it.
        let shared = (2 * 2 * 128 + 2 * 64) * head_dim * 2 + 2 * 4 * 8 + 1024;
        let kernel =
            loader.module(&unit(head_dim))?.kernel_with_shared("attention_groups", shared)?;
        Ok(Some(Self { kernel, shared }))
    }

    /// Attention of the staged runs of at least `tile_min` tokens, whose keys and values are in the
    /// cache.
    ///
    /// # Safety
    /// `qkv` and `out` have a row for every staged token and the columns of all heads, and of the
    /// query heads; head_dim is that of the kernel.
    pub(crate) unsafe fn run(
        &self,
        device: &Device,
        (qkv, out): (u64, u64),
        batch: &Staged,
        cache: &Cache,
        tile_min: usize,
    ) -> Result<()> {
        let [heads, kv_heads, head_dim] = cache.heads;
        device.bind()?;
        let rows = cache.keys.bytes() / (2 * head_dim);
        let map =
            |ptr| TensorMap::new((ptr, Element::Bf16), [rows, head_dim], 2 * head_dim, BOX_ROWS);
        let args = GroupsArgs {
            keys: map(cache.keys.ptr())?,
            values: map(cache.values.ptr())?,
            qkv,
            out,
            runs: batch.runs_ptr(),
            run_count: batch.runs as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            context: cache.context as u32,
            tile_min: tile_min as u32,
            scale: (head_dim as f32).sqrt().recip(),
        };
        let blocks = [batch.segments, heads, 1];
        let (bytes, operations) = attention::work(batch, cache, Precision::Bf16);
        let grid =
            Grid::new("attention_groups", blocks, THREADS, self.shared)?.doing(bytes, operations);
        // SAFETY: the maps keep reads of keys and values within the cache, and staging saw to it
        // that every slot and position is; the rest is as the caller says.
        unsafe { device.launch(&self.kernel, &grid, &args) }
    }
}
