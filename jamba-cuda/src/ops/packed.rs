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

/// Rows of x up to which weights are multiplied on CUDA cores: as long as that is faster.
pub(crate) const MOST_ROWS: usize = 4;
fn most_rows(packing: Packing) -> usize {
    match packing {
        Packing::Int8Row | Packing::Int8Block => MOST_ROWS,
        Packing::Int4Block => 2,
    }
}

/// Rows of W that are multiplied together, of the gate and of what goes with it.
const OUTPUTS: usize = 4;

/// Warps of a block: `WARPS` of packed.cu.
const WARPS: usize = 16;

/// Bytes of each row of W in a chunk: `CHUNK` of packed.cu.
const CHUNK: usize = 512;

/// Columns of x that are normed on the way, at most: `MOST_NORMED` of packed.cu.
const MOST_NORMED: usize = 32 * WARPS * 8;

/// Bytes of shared memory that the kernels have beside what they are launched with, at most.
const STATIC_SHARED: usize = 4 << 10;

/// The sources for weights in this format.
pub(super) fn units(precision: Precision, format: WeightFormat, arch: &str) -> Vec<Unit> {
    let packings = few::packings(precision, format).into_iter().flatten();
    packings.map(|packing| unit(packing, arch)).collect()
}

fn unit(packing: Packing, arch: &str) -> Unit {
    let defines = vec![("PACKING", few::number(Some(packing))), ("STAGES", stages(arch))];
    Unit { stem: "packed", source: include_str!("../../kernels/packed.cu"), defines }
}

/// Chunks that a warp has asked for: those that leave room for x.
fn stages(arch: &str) -> usize {
    // A block has 99 KiB of shared memory there, 163 and more elsewhere.
    if ["sm_86", "sm_89", "sm_120", "sm_121"].contains(&arch) { 2 } else { 3 }
}

/// Bytes of shared memory that a block needs for so many rows of x of k columns.
fn shared(packing: Packing, stages: usize, rows: usize, k: usize) -> usize {
    // Of a row of W in a chunk: weights, and bytes of scales. Of 32 values of x what is not planes.
    let (weights, scales, unit) = match packing {
        Packing::Int8Row => (CHUNK, 4, 4),
        Packing::Int8Block => (CHUNK, CHUNK / 32 * 2, 4),
        Packing::Int4Block => (2 * CHUNK, 2 * CHUNK / 32 * 2, 8),
    };
    let width = k.next_multiple_of(weights);
    WARPS * stages * OUTPUTS * (CHUNK + scales) + rows * (2 * width + width / 32 * unit)
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
    x_first: u32,
    eps: f32,
    norm: u64,
    r: u64,
    sum: u64,
}

/// What a product multiplies.
#[derive(Clone, Copy)]
pub(crate) struct Input {
    pub(crate) x: View,
    /// Whether x is what the kernel just before writes, and is there when this one begins.
    pub(crate) is_next: bool,
    /// The norm of it, if it is that.
    pub(crate) norm: Option<Norm>,
}

/// `norm(x)`, or `norm(x + r)`.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    /// As many elements as x has columns.
    pub(crate) weight: u64,
    pub(crate) eps: f32,
    /// As x: `r`, and where `x + r` goes, which is not x.
    pub(crate) addend: Option<[u64; 2]>,
}

impl From<View> for Input {
    fn from(x: View) -> Self {
        Self { x, is_next: false, norm: None }
    }
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

/// Up to 1, 2 and 4 rows of x.
type ByRows = [Kernel; 3];

struct Kernels {
    packing: Packing,
    linear: ByRows,
    gated: ByRows,
    expert_gated: Kernel,
    expert_down: Kernel,
}

/// Kernels of `packed.cu`.
pub(crate) struct Packed {
    kernels: Vec<Kernels>,
    stages: usize,
    /// Bytes of shared memory that a block may have.
    limit: usize,
}

impl Packed {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let limit = loader.device.shared_limit().saturating_sub(STATIC_SHARED);
        let load = |packing| {
            let module = loader.module(&unit(packing, loader.arch()))?;
            let kernel = |name| module.overlapping_with_shared(name, limit);
            let by_rows = |names: [&'static str; 3]| -> crate::Result<ByRows> {
                let [a, b, c] = names.map(kernel);
                Ok([a?, b?, c?])
            };
            Ok(Kernels {
                packing,
                linear: by_rows(["linear_1", "linear_2", "linear_4"])?,
                gated: by_rows(["gated_1", "gated_2", "gated_4"])?,
                expert_gated: kernel("expert_gated")?,
                expert_down: kernel("expert_down")?,
            })
        };
        let packings = few::packings(loader.precision, loader.format).into_iter().flatten();
        let kernels = packings.map(load).collect::<crate::Result<_>>()?;
        Ok(Self { kernels, stages: stages(loader.arch()), limit })
    }

    /// Whether these rows are multiplied with `weight` here.
    pub(crate) fn takes(&self, x: View, weight: &Weight) -> bool {
        let [n, _] = weight.shape();
        weight.packing().is_some_and(|packing| (1..=most_rows(packing)).contains(&x.rows))
            && x.aligned()
            && x.cols.is_multiple_of(4)
            && n >= 2 * OUTPUTS
            && self.has_room(x.rows, weight)
    }

    /// Whether a block has room for so many rows of x.
    pub(crate) fn has_room(&self, rows: usize, weight: &Weight) -> bool {
        let [_, k] = weight.shape();
        let needed = |packing| shared(packing, self.stages, kernel_rows(rows), k);
        weight.packing().is_some_and(|packing| needed(packing) <= self.limit)
    }

    /// Whether these rows are normed on the way, where [`takes`](Self::takes) says so.
    pub(crate) fn norms(&self, x: View) -> bool {
        x.cols <= MOST_NORMED
    }

    /// `out (rows, n) = x weight^T + bias`.
    pub(crate) fn linear(
        &self,
        device: &Device,
        input: impl Into<Input>,
        weight: &Weight,
        bias: Option<&Weight>,
        out: u64,
    ) -> Result<()> {
        let (input, [n, k], matrix) = (input.into(), weight.shape(), weight.matrix()?);
        let bias = bias.map_or(Ok(0), Weight::vector)?;
        let args = PackedArgs { bias, out, ldo: n as u32, ..args(input, matrix, [n, k]) };
        let kernel = &self.kernels(matrix)?.linear[variant(input.x.rows)];
        self.launch(device, kernel, (matrix, args), OUTPUTS, (1, 1))
    }

    /// `out = silu(gate) * up` of `x weight^T = [gate | up]`, rows as in `x`.
    pub(crate) fn gated(
        &self,
        device: &Device,
        input: impl Into<Input>,
        weight: &Weight,
        out: View,
    ) -> Result<()> {
        let (input, [n, k], matrix) = (input.into(), weight.shape(), weight.matrix()?);
        let args = PackedArgs { out: out.ptr, ldo: out.ld, ..args(input, matrix, [n / 2, k]) };
        let kernel = &self.kernels(matrix)?.gated[variant(input.x.rows)];
        self.launch(device, kernel, (matrix, args), OUTPUTS / 2, (1, 1))
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
        let args = PackedArgs { out: out.ptr, ldo: out.ld, ..args(x.into(), matrix, [n, k]) };
        let kernel = &self.kernels(matrix)?.expert_gated;
        let entries = chosen.tokens * chosen.top_k;
        self.launch(device, kernel, (matrix, args.of(chosen)), OUTPUTS / 2, (entries, 1))
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
        let args = PackedArgs { out, ldo: n as u32, ..args(x.into(), matrix, [n, k]) };
        let kernel = &self.kernels(matrix)?.expert_down;
        let along = (chosen.tokens, chosen.top_k);
        self.launch(device, kernel, (matrix, args.of(chosen)), OUTPUTS, along)
    }

    fn kernels(&self, matrix: Matrix) -> Result<&Kernels> {
        let found = self.kernels.iter().find(|k| Some(k.packing) == matrix.packing);
        found.ok_or_else(|| few::unknown(matrix.packing))
    }

    /// For each of `along` products of so many matrices some blocks, together one for each
    /// multiprocessor, if there are tasks of `columns` for so many.
    fn launch(
        &self,
        device: &Device,
        kernel: &Kernel,
        (matrix, args): (Matrix, PackedArgs),
        columns: usize,
        (along, matrices): (usize, usize),
    ) -> Result<()> {
        let packing = matrix.packing.ok_or_else(|| few::unknown(None))?;
        let (n, k, rows) = (args.n as usize, args.k as usize, args.rows as usize);
        let tasks = n.div_ceil(columns);
        let blocks = (device.multiprocessors() / along.max(1)).clamp(1, tasks);
        // More than half, so that no two blocks share a multiprocessor while another has none.
        let needed = shared(packing, self.stages, kernel_rows(rows.max(matrices)), k);
        let shared = needed.max(self.limit / 2 + (2 << 10)).min(self.limit);
        let of_matrix = along * matrices * n * (OUTPUTS / columns);
        let bytes = of_matrix * (args.stride + args.scale_stride) as usize;
        let grid = Grid::new("packed", [blocks, along, 1], 32 * WARPS, shared)?
            .doing(bytes, 2 * rows * of_matrix * k);
        // SAFETY: x has `rows` rows, or one for every token or entry, of k columns, the matrix n
        // rows (gated: 2 n) for each expert, no fewer than a task has, the bias n elements, out a
        // row of ldo for every row, entry or token, as the callers say; `takes` has seen to alignment
        // and to shared memory, `norms` to what is normed.
        unsafe { device.launch(kernel, &grid, &args) }?;
        Ok(())
    }
}

/// Rows of x of the kernel that takes so many: it reads all of them, though it uses no others.
fn kernel_rows(rows: usize) -> usize {
    rows.next_power_of_two()
}

/// Which of the kernels takes so many rows.
fn variant(rows: usize) -> usize {
    kernel_rows(rows).ilog2() as usize
}

impl PackedArgs {
    /// For entries, whose products are of one row each.
    fn of(self, chosen: Chosen) -> Self {
        let Chosen { top_k, expert, p, .. } = chosen;
        Self { rows: 1, top_k: top_k as u32, expert, p, ..self }
    }
}

fn args(Input { x, is_next, norm }: Input, matrix: Matrix, [n, k]: [usize; 2]) -> PackedArgs {
    let [r, sum] = norm.and_then(|norm| norm.addend).unwrap_or_default();
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
        // Where weights come slower than they are multiplied it is they that come first.
        x_first: u32::from(is_next && matrix.packing == Some(Packing::Int4Block)),
        eps: norm.map_or(0.0, |norm| norm.eps),
        norm: norm.map_or(0, |norm| norm.weight),
        r,
        sum,
        ..PackedArgs::default()
    }
}
