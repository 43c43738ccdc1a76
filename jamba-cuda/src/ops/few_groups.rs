//! Launches `kernels/few_groups.cu`, on cards of sm_90a.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::quant::Packing;
use jamba_core::shape::Shaped;
use jamba_core::{Result, WeightFormat};

use super::few::{self, FEW_ROWS, Product};
use super::grouped;
use super::tensor_map::{Element, TensorMap};
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::weight::{Matrix, Weight};

/// Rows of W that a block takes at a time, and of them in a box.
const ROWS: usize = 128;
const BOX_ROWS: usize = 64;

/// Bytes of the stages of a block and of what its pairs exchange, and what aligns them.
const STAGES: usize = 224 << 10;
const ALIGNMENT: usize = 1024;

/// Blocks of a cluster at most.
const MOST_SPLITS: usize = 8;

/// The sources for weights in this format.
pub(super) fn units(precision: Precision, format: WeightFormat, arch: &str) -> Vec<Unit> {
    let packings = packings(precision, format).into_iter();
    packings.filter(|_| grouped::is_for(arch, precision)).map(unit).collect()
}

/// Everything that a matrix may be in this format: some are always bf16, dt_proj for one.
fn packings(precision: Precision, format: WeightFormat) -> Vec<Option<Packing>> {
    let mut packings = few::packings(precision, format);
    if !packings.contains(&None) {
        packings.push(None);
    }
    packings
}

fn unit(packing: Option<Packing>) -> Unit {
    let source = concat!(
        include_str!("../../kernels/hopper.cuh"),
        include_str!("../../kernels/few_groups.cu")
    );
    let defines = vec![("PACKING", few::number(packing)), ("SHARED", STAGES)];
    Unit { stem: "few_groups", source, defines }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FewGroupsArgs {
    x: TensorMap,
    w: TensorMap,
    scales: u64,
    bias: u64,
    out: u64,
    start: u64,
    rows: u32,
    n: u32,
    k: u32,
    ldo: u32,
    scale_stride: u32,
    experts: u32,
    splits: u32,
}

/// By rows of a tile: 8, 16, 32, 64.
type BySize = [Kernel; 4];

struct Kernels {
    packing: Option<Packing>,
    linear: BySize,
    gated: BySize,
    expert_linear: BySize,
    expert_gated: BySize,
}

/// Kernels of `few_groups.cu`.
pub(super) struct FewGroups {
    kernels: Vec<Kernels>,
    /// How many clusters of 1, 2 and more blocks the card has room for at a time.
    clusters: [usize; MOST_SPLITS],
}

impl FewGroups {
    /// `None` where the card or the precision has other kernels.
    pub(super) fn load(loader: &Loader) -> crate::Result<Option<Self>> {
        if !grouped::is_for(loader.arch(), loader.precision) {
            return Ok(None);
        }
        let load = |packing| {
            let module = loader.module(&unit(packing))?;
            let by_size = |names: [&'static str; 4]| -> crate::Result<BySize> {
                let [a, b, c, d] =
                    names.map(|name| module.overlapping_with_shared(name, STAGES + ALIGNMENT));
                Ok([a?, b?, c?, d?])
            };
            Ok(Kernels {
                packing,
                linear: by_size(["linear_8", "linear_16", "linear_32", "linear_64"])?,
                gated: by_size(["gated_8", "gated_16", "gated_32", "gated_64"])?,
                expert_linear: by_size([
                    "expert_linear_8",
                    "expert_linear_16",
                    "expert_linear_32",
                    "expert_linear_64",
                ])?,
                expert_gated: by_size([
                    "expert_gated_8",
                    "expert_gated_16",
                    "expert_gated_32",
                    "expert_gated_64",
                ])?,
            })
        };
        let packings = packings(loader.precision, loader.format).into_iter();
        let kernels = packings.map(load).collect::<crate::Result<Vec<_>>>()?;
        let device = &loader.device;
        let mut clusters = [device.multiprocessors(); MOST_SPLITS];
        if let Some(first) = kernels.first() {
            for (blocks, room) in (1..).zip(&mut clusters).skip(1) {
                let threads = threads(first.packing, false);
                let grid = Grid::new("few_groups", [blocks, 1, 1], threads, STAGES + ALIGNMENT)?;
                *room = device.clusters(&first.linear[1], &grid.clustered(blocks))?;
            }
        }
        Ok(Some(Self { kernels, clusters }))
    }

    /// A product of all rows of x, or of its rows as sorted entries.
    pub(super) fn launch(&self, device: &Device, p: Product<'_>) -> Result<()> {
        let ([all_rows, k], matrix) = (p.weight.shape(), p.weight.matrix()?);
        let found = self.kernels.iter().find(|k| k.packing == matrix.packing);
        let kernels = found.ok_or_else(|| few::unknown(matrix.packing))?;
        let (by_size, size) = match (p.entries, p.is_gated) {
            (None, false) => (&kernels.linear, p.x.rows.min(FEW_ROWS)),
            (None, true) => (&kernels.gated, p.x.rows.min(FEW_ROWS)),
            (Some(e), false) => (&kernels.expert_linear, e.tile()),
            (Some(e), true) => (&kernels.expert_gated, e.tile()),
        };
        let (variant, n) = (few::variant(size), p.n());
        let across = if p.is_gated { p.ldo.div_ceil(ROWS / 2) } else { n.div_ceil(ROWS) };
        let tiles = across * p.x.rows.div_ceil(8 << variant);
        let multiprocessors = device.multiprocessors();
        let steps = k.div_ceil(depth(matrix.packing));
        let splits = match p.entries {
            None => splits(tiles, steps, self.clusters),
            Some(_) => 1,
        };
        let blocks = match p.entries {
            None if splits > 1 => tiles * splits,
            None => tiles.min(multiprocessors),
            Some(_) => multiprocessors,
        };
        device.bind()?;
        let Matrix { ptr, stride, .. } = matrix;
        let (of_x, of_w) = ((p.x.ptr, Element::Bf16), (ptr, Element::Byte));
        let args = FewGroupsArgs {
            x: TensorMap::new(of_x, [p.x.rows, k], 2 * p.x.ld as usize, 8 << variant)?,
            w: TensorMap::new(of_w, [all_rows, stride], stride, BOX_ROWS)?,
            scales: matrix.scales,
            bias: p.bias.map_or(Ok(0), Weight::vector)?,
            out: p.out,
            start: p.entries.map_or(0, |e| e.start),
            rows: p.x.rows as u32,
            n: n as u32,
            k: k as u32,
            ldo: p.ldo as u32,
            scale_stride: matrix.scale_stride as u32,
            experts: p.entries.map_or(1, |e| e.experts) as u32,
            splits: splits as u32,
        };
        let [bytes, operations] = p.work(matrix);
        let threads = threads(matrix.packing, p.entries.is_some());
        let grid = Grid::new("few_groups", [blocks, 1, 1], threads, STAGES + ALIGNMENT)?
            .clustered(splits)
            .doing(bytes, operations);
        // SAFETY: the maps keep reads of x and W within them; the matrix has scales for n rows
        // (gated: 2 n) of each expert, the bias n elements, out a row of ldo for every row of x, as
        // the callers say; there are tiles for all of them, or blocks that take them in turn.
        unsafe { device.launch(&by_size[variant], &grid, &args) }?;
        Ok(())
    }
}

/// Threads of a block, PAIRS_FOR of few_groups.cu.
fn threads(packing: Option<Packing>, are_experts: bool) -> usize {
    if packing.is_none() && !are_experts { 256 + 32 } else { 2 * 256 + 32 }
}

/// Columns of W in a stage, DEPTH of few_groups.cu.
fn depth(packing: Option<Packing>) -> usize {
    if packing == Some(Packing::Int4Block) { 256 } else { 128 }
}

/// Blocks that share the columns of a tile: as many as there is room for at a time.
fn splits(tiles: usize, steps: usize, clusters: [usize; MOST_SPLITS]) -> usize {
    let fits = |&splits: &usize| splits <= steps && tiles <= clusters[splits - 1];
    (2..=MOST_SPLITS).rev().find(fits).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_those_that_run_at_a_time() {
        let clusters = [132, 66, 40, 32, 24, 16, 16, 15];
        assert_eq!(splits(20, 40, clusters), 5);
        assert_eq!(splits(1, 40, clusters), 8);
        assert_eq!(splits(1, 3, clusters), 3);
        assert_eq!(splits(128, 20, clusters), 1);
        assert_eq!(splits(512, 20, clusters), 1);
    }
}
