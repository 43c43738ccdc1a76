//! Launches `kernels/packed.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::quant::Packing;
use jamba_core::shape::Shaped;
use jamba_core::{Result, WeightFormat};

use super::few;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::tensor::View;
use crate::weight::{Matrix, Weight};

/// Rows of x up to which quantised weights are multiplied on CUDA cores.
const MOST_ROWS: usize = 2;

/// Rows of W that some warps multiply at a time, of the gate and of what goes with it together.
const OUTPUTS: usize = 4;

/// The sources for weights in this format.
pub(super) fn units(precision: Precision, format: WeightFormat) -> Vec<Unit> {
    few::packings(precision, format).into_iter().flatten().map(unit).collect()
}

fn unit(packing: Packing) -> Unit {
    let defines = vec![("PACKING", few::number(Some(packing)))];
    Unit { stem: "packed", source: include_str!("../../kernels/packed.cu"), defines }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PackedArgs {
    x: u64,
    w: u64,
    scales: u64,
    bias: u64,
    out: u64,
    expert: u64,
    p: u64,
    rows: u32,
    n: u32,
    k: u32,
    ldx: u32,
    ldo: u32,
    stride: u32,
    scale_stride: u32,
    top_k: u32,
}

/// What every entry, a token and one of its experts, is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) tokens: usize,
    /// The expert of every entry, and its weight.
    pub(crate) expert: u64,
    pub(crate) p: u64,
}

/// Of 1, 2 or 4 warps together for some rows of W.
type ByWarps = [Kernel; 3];

struct Kernels {
    packing: Packing,
    /// Of 1 and of 2 rows of x.
    linear: [ByWarps; MOST_ROWS],
    gated: [ByWarps; MOST_ROWS],
    expert_gated: ByWarps,
    expert_down: ByWarps,
}

/// Kernels of `packed.cu`.
pub(crate) struct Packed {
    kernels: Vec<Kernels>,
}

impl Packed {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let load = |packing| {
            let module = loader.module(&unit(packing))?;
            let by_warps = |names: [&'static str; 3]| -> crate::Result<ByWarps> {
                let [a, b, c] = names.map(|name| module.overlapping(name));
                Ok([a?, b?, c?])
            };
            Ok(Kernels {
                packing,
                linear: [
                    by_warps(["linear_1_1", "linear_1_2", "linear_1_4"])?,
                    by_warps(["linear_2_1", "linear_2_2", "linear_2_4"])?,
                ],
                gated: [
                    by_warps(["gated_1_1", "gated_1_2", "gated_1_4"])?,
                    by_warps(["gated_2_1", "gated_2_2", "gated_2_4"])?,
                ],
                expert_gated: by_warps(["expert_gated_1", "expert_gated_2", "expert_gated_4"])?,
                expert_down: by_warps(["expert_down_1", "expert_down_2", "expert_down_4"])?,
            })
        };
        let packings = few::packings(loader.precision, loader.format).into_iter().flatten();
        Ok(Self { kernels: packings.map(load).collect::<crate::Result<_>>()? })
    }

    /// Whether these rows are multiplied with `weight` here.
    pub(crate) fn takes(&self, x: View, weight: &Weight) -> bool {
        let [n, _] = weight.shape();
        weight.packing().is_some()
            && (1..=MOST_ROWS).contains(&x.rows)
            && x.aligned()
            && x.cols.is_multiple_of(4)
            && n >= 2 * OUTPUTS
    }

    /// `out (rows, n) = x weight^T + bias`.
    pub(crate) fn linear(
        &self,
        device: &Device,
        x: View,
        weight: &Weight,
        bias: Option<&Weight>,
        out: u64,
    ) -> Result<()> {
        let ([n, k], matrix) = (weight.shape(), weight.matrix()?);
        let bias = bias.map_or(Ok(0), Weight::vector)?;
        let args = PackedArgs { bias, out, ldo: n as u32, ..args(x, matrix, [n, k]) };
        let kernels = &self.kernels(matrix)?.linear[x.rows - 1];
        self.launch(device, kernels, args, (OUTPUTS, 1), (1, 1))
    }

    /// `out = silu(gate) * up` of `x weight^T = [gate | up]`, rows as in `x`.
    pub(crate) fn gated(&self, device: &Device, x: View, weight: &Weight, out: View) -> Result<()> {
        let ([n, k], matrix) = (weight.shape(), weight.matrix()?);
        let args = PackedArgs { out: out.ptr, ldo: out.ld, ..args(x, matrix, [n / 2, k]) };
        let kernels = &self.kernels(matrix)?.gated[x.rows - 1];
        self.launch(device, kernels, args, (OUTPUTS / 2, 2), (1, 1))
    }

    /// [`gated`](Self::gated) for every entry: x has a row for each token, out one for each entry.
    pub(crate) fn expert_gated(
        &self,
        device: &Device,
        x: View,
        weight: &Weight,
        chosen: Chosen,
        out: View,
    ) -> Result<()> {
        let ([n, k], matrix) = (weight.shape(), weight.matrix()?);
        let n = n / (2 * chosen.experts.max(1));
        let args = PackedArgs { out: out.ptr, ldo: out.ld, ..args(x, matrix, [n, k]) };
        let kernels = &self.kernels(matrix)?.expert_gated;
        let entries = chosen.tokens * chosen.top_k;
        self.launch(device, kernels, args.of(chosen), (OUTPUTS / 2, 2), (entries, 1))
    }

    /// `out (tokens, n)`, for each token the sum over its entries, rows of x, of their weight times
    /// their product with their expert's matrix.
    pub(crate) fn expert_down(
        &self,
        device: &Device,
        x: View,
        weight: &Weight,
        chosen: Chosen,
        out: u64,
    ) -> Result<()> {
        let ([n, k], matrix) = (weight.shape(), weight.matrix()?);
        let n = n / chosen.experts.max(1);
        let args = PackedArgs { out, ldo: n as u32, ..args(x, matrix, [n, k]) };
        let kernels = &self.kernels(matrix)?.expert_down;
        self.launch(device, kernels, args.of(chosen), (OUTPUTS, 1), (chosen.tokens, chosen.top_k))
    }

    fn kernels(&self, matrix: Matrix) -> Result<&Kernels> {
        let found = self.kernels.iter().find(|k| Some(k.packing) == matrix.packing);
        found.ok_or_else(|| few::unknown(matrix.packing))
    }

    /// One block along y for each of `along`, which multiplies so many matrices.
    fn launch(
        &self,
        device: &Device,
        kernels: &ByWarps,
        args: PackedArgs,
        (outputs, rows_of_w): (usize, usize),
        (along, matrices): (usize, usize),
    ) -> Result<()> {
        let warps = warps(args.stride as usize);
        let groups = (args.n as usize).div_ceil(outputs);
        let blocks = [groups.div_ceil(4 / warps), along, 1];
        let of_matrix = along * matrices * rows_of_w * args.n as usize;
        let bytes = of_matrix * (args.stride + args.scale_stride) as usize;
        let operations = 2 * args.rows as usize * of_matrix * args.k as usize;
        let grid = Grid::new("packed", blocks, 128, 0)?.doing(bytes, operations);
        let kernel = &kernels[warps.ilog2() as usize];
        // SAFETY: x has `rows` rows, or one for every token or entry, of k columns, the matrix n
        // rows (gated: 2 n) for each expert, no fewer than a group does, the bias n elements, out a
        // row of ldo for every row, entry or token, as the callers say; `takes` has seen to alignment.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}

impl PackedArgs {
    /// For entries, whose products are of one row each.
    fn of(self, chosen: Chosen) -> Self {
        let Chosen { top_k, expert, p, .. } = chosen;
        Self { rows: 1, top_k: top_k as u32, expert, p, ..self }
    }
}

/// Warps that share rows of so many bytes: as many as still find 512 bytes each at nearly every turn.
fn warps(bytes: usize) -> usize {
    let lanes_used = |warps: usize| {
        let turn = 512 * warps;
        10 * bytes >= 9 * bytes.div_ceil(turn) * turn
    };
    [4, 2].into_iter().find(|&warps| lanes_used(warps)).unwrap_or(1)
}

fn args(x: View, matrix: Matrix, [n, k]: [usize; 2]) -> PackedArgs {
    PackedArgs {
        x: x.ptr,
        w: matrix.ptr,
        scales: matrix.scales,
        rows: x.rows as u32,
        n: n as u32,
        k: k as u32,
        ldx: x.ld,
        stride: matrix.stride as u32,
        scale_stride: matrix.scale_stride as u32,
        ..PackedArgs::default()
    }
}
