//! Launches `kernels/few.cu`, or what there is in its place on cards of sm_90a.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::quant::Packing;
use jamba_core::shape::Shaped;
use jamba_core::{Result, Role, WeightFormat};

use super::few_groups::FewGroups;
use super::linear::{DENSE_ROWS, Operand};
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::weight::{self, Matrix, Weight};

/// Rows of x up to which each weight is read once.
pub(crate) const FEW_ROWS: usize = 64;

/// Rows of x up to which `few_groups.cu` takes less time, dequantising the weights for each tile of them,
/// than dequantising all beforehand; and entries of the average expert.
pub(crate) const MOST_GROUPS_ROWS: usize = 192;
const MOST_GROUPS_ENTRIES: usize = 128;

/// Bytes of a matrix that are brought to the L2 cache, more of which gains nothing, while
/// kernels before the product still run.
const AHEAD_BYTES: usize = 4 << 20;

/// Entries of a tile of an expert, at most; `few_groups.cu` has tiles of twice as many.
const MOST_ENTRIES: usize = 32;

/// The sources for weights in this format.
pub(super) fn units(precision: Precision, format: WeightFormat) -> Vec<Unit> {
    packings(precision, format).into_iter().map(unit).collect()
}

/// PACKING of the sources.
pub(super) fn number(packing: Option<Packing>) -> usize {
    match packing {
        None => 0,
        Some(Packing::Int8Row) => 1,
        Some(Packing::Int8Block) => 2,
        Some(Packing::Int4Block) => 3,
    }
}

/// There are no kernels for such a matrix.
pub(super) fn unknown(packing: Option<Packing>) -> jamba_core::Error {
    let what = format!("products with weights kept as {packing:?}, which its format has not");
    jamba_core::Error::Unsupported { backend: "cuda", what }
}

fn unit(packing: Option<Packing>) -> Unit {
    let defines = vec![("PACKING", number(packing))];
    Unit { stem: "few", source: include_str!("../../kernels/few.cu"), defines }
}

/// Everything that a matrix may be in this format; `None` is bf16.
pub(super) fn packings(precision: Precision, format: WeightFormat) -> Vec<Option<Packing>> {
    let mut packings = Vec::new();
    for role in [Role::Head, Role::Linear, Role::Experts, Role::Mlp] {
        let packing = weight::packing(role, precision, format);
        if precision == Precision::Bf16 && !packings.contains(&packing) {
            packings.push(packing);
        }
    }
    packings
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FewArgs {
    x: u64,
    w: u64,
    scales: u64,
    bias: u64,
    out: u64,
    start: u64,
    sorted: u64,
    rows: u32,
    n: u32,
    k: u32,
    ldx: u32,
    ldo: u32,
    stride: u32,
    scale_stride: u32,
    experts: u32,
    top_k: u32,
    ahead: u32,
}

/// The entries of the experts.
#[derive(Clone, Copy)]
pub(crate) struct Entries {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) count: usize,
    /// Of the sorted entries of each expert.
    pub(crate) start: u64,
    /// Their numbers, 0 where x is sorted already.
    pub(crate) sorted: u64,
}

impl Entries {
    /// Whether so many are few for each expert.
    pub(crate) fn are_few(count: usize, experts: usize) -> bool {
        count <= experts.saturating_mul(MOST_ENTRIES * 3 / 4)
    }

    /// Experts that are chosen, if each token chooses at random.
    pub(super) fn chosen(&self) -> f64 {
        let (all, tokens) = (self.experts as f64, (self.count / self.top_k.max(1)) as i32);
        all - all * (1.0 - self.top_k as f64 / all).powi(tokens)
    }

    /// Entries of a tile: what most experts have.
    pub(super) fn tile(&self) -> usize {
        match self.count / self.experts.max(1) {
            0..=4 => 8,
            5..=10 => 16,
            11..=24 => MOST_ENTRIES,
            _ => 2 * MOST_ENTRIES,
        }
    }
}

/// What is multiplied with what: all rows of x with one matrix, or those of each expert with its own.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) x: Operand,
    pub(super) weight: &'a Weight,
    pub(super) bias: Option<&'a Weight>,
    pub(super) entries: Option<Entries>,
    /// The result: f32, or, gated, bf16 with zeros up to the next row.
    pub(super) out: u64,
    pub(super) ldo: usize,
    /// Whether the weight is [gate | up], and the result `silu(gate) * up`.
    pub(super) is_gated: bool,
}

impl Product<'_> {
    fn experts(&self) -> usize {
        self.entries.map_or(1, |e| e.experts.max(1))
    }

    /// Rows of the matrix, or of that of each expert.
    pub(super) fn rows_of_w(&self) -> usize {
        self.weight.shape()[0] / self.experts()
    }

    /// Columns of the result.
    pub(super) fn n(&self) -> usize {
        self.rows_of_w() / if self.is_gated { 2 } else { 1 }
    }

    /// What a launch of it does, in bytes of weights and operations.
    pub(super) fn work(&self, matrix: Matrix) -> [usize; 2] {
        let (matrices, rows) = self.entries.map_or((1.0, self.x.rows), |e| (e.chosen(), e.count));
        let of_matrix = self.rows_of_w() * (matrix.stride + matrix.scale_stride);
        let [_, k] = self.weight.shape();
        [(matrices * of_matrix as f64) as usize, 2 * rows * self.rows_of_w() * k]
    }
}

struct Variant {
    kernel: Kernel,
    /// Columns of the result of a block.
    rows: usize,
    /// Warps of a block at most.
    warps: usize,
}

struct Kernels {
    packing: Option<Packing>,
    linear: Vec<Variant>,
    gated: Vec<Variant>,
    expert_linear: Vec<Variant>,
    expert_gated: Vec<Variant>,
}

/// Kernels of `few.cu`.
pub(crate) struct Few {
    kernels: Vec<Kernels>,
    /// Warps that keep the memory busy.
    enough: usize,
    groups: Option<FewGroups>,
}

impl Few {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let load = |packing| {
            let module = loader.module(&unit(packing))?;
            // TILES and COLUMNS of few.cu.
            let variants = |names: &[&'static str], tiles: [usize; 4], is_gated: bool| {
                let columns = [1, 2, 4, 8];
                let variant = |(name, (tiles, columns)): (&&'static str, (usize, usize))| {
                    let kernel = module.overlapping(name)?;
                    let rows = if is_gated { 16 } else { 16 * tiles };
                    // MOST_WARPS of few.cu.
                    let warps = match columns {
                        1 => 16 / tiles,
                        _ => (64 / (tiles * columns)).min(8),
                    };
                    Ok(Variant { kernel, rows, warps })
                };
                let sizes = tiles.into_iter().zip(columns);
                names.iter().zip(sizes).map(variant).collect::<crate::Result<Vec<_>>>()
            };
            let linear = ["linear_8", "linear_16", "linear_32", "linear_64"];
            let gated = ["gated_8", "gated_16", "gated_32", "gated_64"];
            let expert_linear = ["expert_linear_8", "expert_linear_16", "expert_linear_32"];
            let expert_gated = ["expert_gated_8", "expert_gated_16", "expert_gated_32"];
            Ok(Kernels {
                packing,
                linear: variants(&linear, [1, 1, 1, 2], false)?,
                gated: variants(&gated, [2; 4], true)?,
                expert_linear: variants(&expert_linear, [1; 4], false)?,
                expert_gated: variants(&expert_gated, [2; 4], true)?,
            })
        };
        let packings = packings(loader.precision, loader.format).into_iter();
        let kernels = packings.map(load).collect::<crate::Result<_>>()?;
        let enough = 16 * loader.device.multiprocessors();
        Ok(Self { kernels, enough, groups: FewGroups::load(loader)? })
    }

    /// Whether products of so many entries of `hidden` columns with quantised weights are for these
    /// kernels.
    pub(crate) fn takes_entries(&self, count: usize, experts: usize, hidden: usize) -> bool {
        let are_few = count <= experts.saturating_mul(MOST_GROUPS_ENTRIES);
        Entries::are_few(count, experts) || (self.takes_sorted(hidden) && are_few)
    }

    /// Whether products of so many rows, of an operand in bf16, are for these kernels: where they are faster
    /// than cuBLASLt, which takes weights that are dequantised beforehand.
    pub(crate) fn takes_rows(&self, rows: usize, weight: &Weight) -> bool {
        let (least, most) = match (weight.packing(), &self.groups) {
            (Some(_), None) => (1, FEW_ROWS),
            (Some(_), Some(_)) => (1, MOST_GROUPS_ROWS),
            (None, None) => return false,
            (None, Some(_)) => (DENSE_ROWS + 1, FEW_ROWS),
        };
        (least..=most).contains(&rows)
    }

    /// Whether x is to have a row for every sorted entry of an expert, if it has so many columns.
    pub(crate) fn takes_sorted(&self, hidden: usize) -> bool {
        self.groups.is_some() && hidden.is_multiple_of(8)
    }

    /// `out (rows, n) = x weight^T + bias`, in f32.
    pub(crate) fn linear(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        bias: Option<&Weight>,
        out: u64,
    ) -> Result<()> {
        let [ldo, _] = weight.shape();
        let product = Product { x, weight, bias, entries: None, out, ldo, is_gated: false };
        self.launch(device, product)
    }

    /// `out = silu(gate) * up` of `x weight^T = [gate | up]`, with zeros up to the next row.
    pub(crate) fn gated(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        out: Operand,
    ) -> Result<()> {
        let (ldo, out) = (out.ld as usize, out.ptr);
        let product = Product { x, weight, bias: None, entries: None, out, ldo, is_gated: true };
        self.launch(device, product)
    }

    /// [`gated`](Self::gated) for the entries of experts: x has a row for every token, or every sorted
    /// entry ([`takes_sorted`](Self::takes_sorted)), out one for every sorted entry.
    pub(crate) fn expert_gated(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        entries: Entries,
        out: Operand,
    ) -> Result<()> {
        let (entries, ldo, out) = (Some(entries), out.ld as usize, out.ptr);
        let product = Product { x, weight, bias: None, entries, out, ldo, is_gated: true };
        self.launch(device, product)
    }

    /// `out (entries, n)` = the product of each sorted entry, a row of x, with its expert's matrix.
    pub(crate) fn expert_linear(
        &self,
        device: &Device,
        x: Operand,
        weight: &Weight,
        entries: Entries,
        out: u64,
    ) -> Result<()> {
        let ldo = weight.shape()[0] / entries.experts.max(1);
        let entries = Some(entries);
        let product = Product { x, weight, bias: None, entries, out, ldo, is_gated: false };
        self.launch(device, product)
    }

    fn launch(&self, device: &Device, p: Product<'_>) -> Result<()> {
        if let Some(groups) = &self.groups
            && p.entries.is_none_or(|e| e.sorted == 0)
        {
            return groups.launch(device, p);
        }
        let ([_, k], matrix, n) = (p.weight.shape(), p.weight.matrix()?, p.n());
        let found = self.kernels.iter().find(|k| k.packing == matrix.packing);
        let kernels = found.ok_or_else(|| unknown(matrix.packing))?;
        let tile = p.entries.map_or(p.x.rows, |e| e.tile().min(MOST_ENTRIES));
        let by_size = match (p.entries.is_some(), p.is_gated) {
            (false, false) => &kernels.linear,
            (false, true) => &kernels.gated,
            (true, false) => &kernels.expert_linear,
            (true, true) => &kernels.expert_gated,
        };
        let variant = &by_size[variant(tile)];
        let across = n.max(p.ldo).div_ceil(variant.rows);
        let args = FewArgs {
            x: p.x.ptr,
            w: matrix.ptr,
            scales: matrix.scales,
            bias: p.bias.map_or(Ok(0), Weight::vector)?,
            out: p.out,
            rows: p.x.rows as u32,
            n: n as u32,
            k: k as u32,
            ldx: p.x.ld,
            ldo: p.ldo as u32,
            stride: matrix.stride as u32,
            scale_stride: matrix.scale_stride as u32,
            ..FewArgs::default()
        };
        let (blocks, args) = match p.entries {
            None => {
                let ahead = (AHEAD_BYTES / p.rows_of_w().max(1)).min(matrix.stride) & !127;
                ([across, 1, 1], FewArgs { ahead: ahead as u32, ..args })
            }
            Some(e) => {
                // As many tiles as there may be.
                let tiles = (e.count / tile + e.experts).min(e.count);
                let (experts, top_k) = (e.experts as u32, e.top_k as u32);
                let (start, sorted) = (e.start, e.sorted);
                ([tiles, across, 1], FewArgs { start, sorted, experts, top_k, ..args })
            }
        };
        let total = (blocks[0] * blocks[1]).max(1);
        let warps = (self.enough / total).next_power_of_two().clamp(2, variant.warps);
        let [bytes, operations] = p.work(matrix);
        let grid = Grid::new("few", blocks, 32 * warps, 0)?.doing(bytes, operations);
        // SAFETY: x has `rows` rows, or one for every token or entry, of k columns, the matrix n
        // rows (gated: 2 n) for each expert, the bias n elements, out a row of ldo for every row or
        // entry, as the callers say; there is a tile for every row of x.
        unsafe { device.launch(&variant.kernel, &grid, &args) }?;
        Ok(())
    }
}

/// Which of the kernels takes so many rows at a time.
pub(super) fn variant(rows: usize) -> usize {
    rows.div_ceil(8).next_power_of_two().ilog2() as usize
}
