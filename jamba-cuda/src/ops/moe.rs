//! Launches `kernels/moe.cu`, `kernels/moe_tiles.cu`, and `kernels/grouped.cu`, `kernels/few.cu` and
//! `kernels/packed.cu` for experts.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::shape::Shaped;
use jamba_core::weights::Moe;

use super::few::Entries;
use super::grouped::{Grouped, Groups, Matrices};
use super::linear::{Linear, Operand};
use super::packed::Chosen;
use super::workspace::{Workspace, Workspaces};
use crate::device::{Device, Grid, Kernel};
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::options::{Precision, element_bytes};
use crate::tensor::{Tensor, View};
use crate::weight::{Weight, padded};

/// Tokens up to which the weights of an expert are read for each of its tokens.
const FEW_TOKENS: usize = 2;
/// Entries of the average expert from which on its products are those of `grouped.cu`.
const GROUPED_ENTRIES: usize = 16;

pub(super) fn units() -> [Unit; 2] {
    [
        super::plain("moe", include_str!("../../kernels/moe.cu")),
        super::plain("moe_tiles", include_str!("../../kernels/moe_tiles.cu")),
    ]
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RouteArgs {
    logits: u64,
    expert: u64,
    p: u64,
    tokens: u32,
    experts: u32,
    top_k: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SortArgs {
    expert: u64,
    start: u64,
    sorted: u64,
    place: u64,
    entries: u32,
    experts: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArgs {
    x: u64,
    w: u64,
    expert: u64,
    p: u64,
    out: u64,
    hidden: u32,
    inter: u32,
    top_k: u32,
    ldw: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TilesArgs {
    x: u64,
    w: u64,
    start: u64,
    sorted: u64,
    act: u64,
    y: u64,
    experts: u32,
    top_k: u32,
    n: u32,
    k: u32,
    ldx: u32,
    ldw: u32,
    ldact: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CombineArgs {
    y: u64,
    place: u64,
    p: u64,
    out: u64,
    hidden: u32,
    top_k: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    x: u64,
    sorted: u64,
    out: u64,
    hidden: u32,
    ldx: u32,
    top_k: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CombineBf16Args {
    y: u64,
    place: u64,
    out: u64,
    hidden: u32,
    top_k: u32,
}

/// What many tokens of bf16 need around the products of `grouped.cu`.
struct Many {
    gather_f32: Kernel,
    gather_bf16: Kernel,
    combine: Kernel,
}

/// The tokens that are routed: as they are, or rounded for products already.
#[derive(Clone, Copy)]
pub(crate) enum Tokens {
    Wide(View),
    Rounded(Operand),
}

/// The products of the experts in tiles of one height.
struct Tiles {
    gate_up: Kernel,
    down: Kernel,
    /// Entries of a tile, and rows of W.
    tile: usize,
    cols: usize,
    shared: usize,
}

/// Kernels of `moe.cu` and `moe_tiles.cu`.
pub(crate) struct Experts {
    route: Kernel,
    sort: Kernel,
    /// gate_up and down of few tokens.
    rows: [Kernel; 2],
    combine: Kernel,
    /// By height, the highest first.
    tiles: Vec<Tiles>,
    many: Option<Many>,
    precision: Precision,
}

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    experts: usize,
    top_k: usize,
    entries: usize,
    hidden: usize,
    inter: usize,
}

impl Sizes {
    /// Bytes of one of the three matrices of the experts that are chosen, if no two entries choose
    /// the same while there are others, and operations of its product.
    fn work(self, element: usize) -> (usize, usize) {
        let matrix = self.inter * self.hidden;
        (element * self.experts.min(self.entries) * matrix, 2 * self.entries * matrix)
    }
}

/// Addresses within the workspace of routes.
#[derive(Clone, Copy)]
struct Routes {
    expert: u64,
    p: u64,
    sorted: u64,
    place: u64,
    start: u64,
}

/// Bytes of the workspaces for so many tokens: routes, activations, results of the experts.
pub(crate) fn workspace_bytes(
    tokens: usize,
    (experts, top_k): (usize, usize),
    (hidden, inter): (usize, usize),
    precision: Precision,
) -> [usize; 3] {
    let entries = tokens.saturating_mul(top_k);
    let act = match precision {
        Precision::Bf16 => entries.saturating_mul(2 * inter.next_multiple_of(8)),
        Precision::F32 => entries.saturating_mul(4 * inter.next_multiple_of(4)),
    };
    // Few tokens have their activations in f32.
    let few = 4 * entries.min(FEW_TOKENS * top_k) * inter.next_multiple_of(8);
    let routes = entries.saturating_mul(16).saturating_add(4 * (experts + 1));
    [routes, act.max(few), entries.saturating_mul(4 * hidden)]
}

/// Bytes of the operand of the experts' first product, sorted.
pub(crate) fn sorted_bytes(tokens: usize, top_k: usize, hidden: usize) -> usize {
    tokens.saturating_mul(top_k).saturating_mul(2 * hidden)
}

impl Experts {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let [moe, tiles] = units().map(|unit| loader.module(&unit));
        let (moe, products) = (moe?, tiles?);
        let load = |gate_up, down, tile: usize, cols, shared| {
            let gate_up = products.kernel_with_shared(gate_up, shared)?;
            let down = products.kernel_with_shared(down, shared)?;
            Ok::<_, Error>(Tiles { gate_up, down, tile, cols, shared })
        };
        // STAGES (TILE + COLS) PITCH bf16 of moe_tiles.cu.
        let shared = |tile: usize| 3 * (tile + 128) * 40 * 2;
        let tiles = match loader.precision {
            Precision::Bf16 => vec![
                load("moe_gate_up_128", "moe_down_128", 128, 128, shared(128))?,
                load("moe_gate_up_32", "moe_down_32", 32, 128, shared(32))?,
            ],
            Precision::F32 => vec![load("moe_gate_up_64", "moe_down_64", 64, 64, 0)?],
        };
        let many = || {
            let (gather_f32, gather_bf16) =
                (moe.kernel("moe_gather_f32")?, moe.kernel("moe_gather_bf16")?);
            let combine = moe.kernel("moe_combine_bf16")?;
            Ok::<_, Error>(Many { gather_f32, gather_bf16, combine })
        };
        Ok(Self {
            route: moe.overlapping("moe_route")?,
            sort: moe.overlapping("moe_sort")?,
            rows: [moe.overlapping("moe_gate_up_rows")?, moe.overlapping("moe_down_rows")?],
            combine: moe.overlapping("moe_combine")?,
            many: (loader.precision == Precision::Bf16).then(many).transpose()?,
            tiles,
            precision: loader.precision,
        })
    }

    /// `out` from `x` through the experts that the logits choose.
    pub(crate) fn run(
        &self,
        device: &Device,
        (x, router_logits): (Tokens, &Tensor),
        weights: &Moe<Weight>,
        (top_k, inter): (usize, usize),
        (linear, grouped, workspaces): (&Linear, Option<&Grouped>, &mut Workspaces),
        out: &mut Tensor,
    ) -> Result<()> {
        let (hidden, experts) = (out.cols(), router_logits.cols());
        let tokens = router_logits.rows();
        let entries = tokens * top_k;
        let s = Sizes { tokens, experts, top_k, entries, hidden, inter };
        if tokens == 0 {
            return Ok(());
        }
        if experts > 1024 {
            let allowed = "the kernel is made for up to 1024";
            let (op, what) = ("moe_experts", "number of experts");
            return Err(Error::Size { op, what, got: experts, allowed }.into());
        }
        let bytes = workspace_bytes(tokens, (experts, top_k), (hidden, inter), self.precision);
        let base = workspaces.routes.reserve(device, bytes[0])?;
        let list = |i: usize| base + 4 * (i * entries) as u64;
        let routes =
            Routes { expert: list(0), p: list(1), sorted: list(2), place: list(3), start: list(4) };
        let act = workspaces.act.reserve(device, bytes[1])?;
        self.route(device, s, router_logits, routes)?;
        let is_packed = weights.gate_up_proj.packing().is_some();
        if let Tokens::Wide(x) = x
            && tokens <= FEW_TOKENS
        {
            if !is_packed {
                let device = (device, element_bytes(self.precision));
                return rows(&self.rows, device, s, routes, x, weights, act, out);
            }
            let act = View { ptr: act, rows: entries, cols: inter, ld: inter as u32 };
            if linear.packed.takes(x, &weights.gate_up_proj)
                && linear.packed.takes(View { rows: 1, ..act }, &weights.down_proj)
                && inter >= 4
                && hidden >= 4
            {
                let Routes { expert, p, .. } = routes;
                let chosen = Chosen { experts, top_k, tokens, expert, p };
                linear.packed.expert_gated(device, x, &weights.gate_up_proj, chosen, act)?;
                return linear.packed.expert_down(
                    device,
                    act,
                    &weights.down_proj,
                    chosen,
                    out.ptr(),
                );
            }
        }
        self.sort(device, s, routes)?;
        let y = workspaces.expert_out.reserve(device, bytes[2])?;
        let is_few = match is_packed {
            true => Entries::are_few(entries, experts),
            false => self.precision == Precision::Bf16 && entries < GROUPED_ENTRIES * experts,
        };
        if is_few {
            let x = match x {
                Tokens::Wide(x) => linear.cast(device, x, &mut workspaces.cast)?,
                Tokens::Rounded(x) => x,
            };
            self.few(device, linear, s, routes, x, weights, (act, y))?;
            return self.combine(device, s, routes, y, out);
        }
        let dense = &mut workspaces.dense;
        if let (Some(many), Some(grouped)) = (&self.many, grouped)
            && entries >= GROUPED_ENTRIES * experts
            && Grouped::fits(hidden)
            && Grouped::fits(inter)
        {
            let bytes = sorted_bytes(tokens, top_k, hidden);
            let sorted = workspaces.cast.reserve(device, bytes)?;
            many.gather(device, s, routes, x, sorted)?;
            let (device, operands) = ((device, linear), (sorted, act, y));
            return many.products(device, s, routes, operands, (grouped, weights), dense, out);
        }
        let x = match (x, self.precision) {
            (Tokens::Rounded(x), _) => x,
            (Tokens::Wide(x), Precision::F32) => Operand { ptr: x.ptr, rows: x.rows, ld: x.ld },
            (Tokens::Wide(x), Precision::Bf16) => linear.cast(device, x, &mut workspaces.cast)?,
        };
        self.tiles((device, linear), s, routes, x, weights, (act, y), dense)?;
        self.combine(device, s, routes, y, out)
    }

    /// The entries of every token: experts and their weights.
    fn route(&self, device: &Device, s: Sizes, logits: &Tensor, routes: Routes) -> Result<()> {
        let grid = Grid::new("moe_route", [s.tokens.div_ceil(4), 1, 1], 128, 0)?
            .doing(4 * (s.tokens * s.experts + 2 * s.entries), 0);
        let args = RouteArgs {
            logits: logits.ptr(),
            expert: routes.expert,
            p: routes.p,
            tokens: s.tokens as u32,
            experts: s.experts as u32,
            top_k: s.top_k as u32,
        };
        // SAFETY: the logits are (tokens, experts), the lists of the workspace have an element
        // for every entry, and top_k is at most the number of experts.
        unsafe { device.launch(&self.route, &grid, &args) }?;
        Ok(())
    }

    fn sort(&self, device: &Device, s: Sizes, routes: Routes) -> Result<()> {
        let grid = Grid::new("moe_sort", [s.experts, 1, 1], 256, 0)?
            .doing(4 * (3 * s.entries + s.experts + 1), 0);
        let args = SortArgs {
            expert: routes.expert,
            start: routes.start,
            sorted: routes.sorted,
            place: routes.place,
            entries: s.entries as u32,
            experts: s.experts as u32,
        };
        // SAFETY: the lists have an element for every entry, `start` one more than experts.
        unsafe { device.launch(&self.sort, &grid, &args) }?;
        Ok(())
    }

    fn combine(
        &self,
        device: &Device,
        s: Sizes,
        routes: Routes,
        y: u64,
        out: &mut Tensor,
    ) -> Result<()> {
        let grid = Grid::new("moe_combine", [s.tokens, 1, 1], 256, 0)?
            .doing(4 * (s.entries + s.tokens) * s.hidden, 0);
        let (place, p, out) = (routes.place, routes.p, out.ptr());
        let (hidden, top_k) = (s.hidden as u32, s.top_k as u32);
        let args = CombineArgs { y, place, p, out, hidden, top_k };
        // SAFETY: every entry has its place among the rows of y; out has a row for every token.
        unsafe { device.launch(&self.combine, &grid, &args) }?;
        Ok(())
    }

    /// `y` of every sorted entry, each weight being read about once.
    fn few(
        &self,
        device: &Device,
        linear: &Linear,
        s: Sizes,
        routes: Routes,
        x: Operand,
        weights: &Moe<Weight>,
        (act, y): (u64, u64),
    ) -> Result<()> {
        let &Sizes { experts, top_k, entries: count, inter, .. } = &s;
        let entries = Entries { experts, top_k, count, start: routes.start, sorted: routes.sorted };
        let act = Operand { ptr: act, rows: count, ld: inter.next_multiple_of(8) as u32 };
        linear.few.expert_gated(device, x, &weights.gate_up_proj, entries, act)?;
        let entries = Entries { sorted: 0, ..entries };
        linear.few.expert_linear(device, act, &weights.down_proj, entries, y)
    }

    /// `y` of every sorted entry, in tiles of the entries of an expert.
    fn tiles(
        &self,
        (device, linear): (&Device, &Linear),
        s: Sizes,
        routes: Routes,
        x: Operand,
        weights: &Moe<Weight>,
        (act, y): (u64, u64),
        dense: &mut Workspace,
    ) -> Result<()> {
        // The highest tiles that the average expert fills to a third.
        let filled = |t: &&Tiles| s.entries >= s.experts * t.tile / 3;
        let Some(kernels) = self.tiles.iter().find(filled).or(self.tiles.last()) else {
            return Ok(());
        };
        let ldact = padded(s.inter, self.precision) as u32;
        let gate_up = TilesArgs {
            x: x.ptr,
            w: 0,
            start: routes.start,
            sorted: routes.sorted,
            act,
            y,
            experts: s.experts as u32,
            top_k: s.top_k as u32,
            n: s.inter as u32,
            k: s.hidden as u32,
            ldx: x.ld,
            ldw: padded(s.hidden, self.precision) as u32,
            ldact,
        };
        let down = TilesArgs {
            x: act,
            n: s.hidden as u32,
            k: s.inter as u32,
            ldx: ldact,
            ldw: ldact,
            ..gate_up
        };
        let products = [
            (&kernels.gate_up, gate_up, &weights.gate_up_proj, s.inter.div_ceil(kernels.cols / 2)),
            (&kernels.down, down, &weights.down_proj, s.hidden.div_ceil(kernels.cols)),
        ];
        let element = element_bytes(self.precision);
        for (kernel, args, weight, across) in products {
            linear.per_expert(device, (weight, s.experts), dense, |first, experts, w| {
                let count = (s.entries.div_ceil(kernels.tile) + experts).min(s.entries);
                // Of the experts that are multiplied now.
                let entries = s.entries * experts / s.experts;
                let [rows, cols] = weight.shape();
                let bytes = rows / s.experts * cols * experts.min(entries)
                    + entries * (args.k + args.n) as usize;
                let operations = 2 * entries * rows / s.experts * cols;
                let grid = Grid::new("moe_tiles", [count, across, 1], 256, kernels.shared)?
                    .doing(element * bytes, operations);
                let start = args.start + 4 * first as u64;
                let args = TilesArgs { w, start, experts: experts as u32, ..args };
                // SAFETY: the sorted entries are those of the tokens of x; w has the rows of so
                // many experts, of a stride that is padded with zeros as that of x is; the
                // workspaces have rows of ldact and of `hidden` for every entry.
                unsafe { device.launch(kernel, &grid, &args) }?;
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Many {
    /// The rows of the sorted entries.
    fn gather(
        &self,
        device: &Device,
        s: Sizes,
        routes: Routes,
        x: Tokens,
        out: u64,
    ) -> crate::Result<()> {
        let (kernel, element, x, ldx) = match x {
            Tokens::Wide(x) => (&self.gather_f32, 4, x.ptr, x.ld),
            Tokens::Rounded(x) => (&self.gather_bf16, 2, x.ptr, x.ld),
        };
        let (hidden, top_k) = (s.hidden as u32, s.top_k as u32);
        let grid = Grid::new("moe_gather", [s.entries, 1, 1], 256, 0)?
            .doing((element * s.tokens + 2 * s.entries) * s.hidden, 0);
        let args = GatherArgs { x, sorted: routes.sorted, out, hidden, ldx, top_k };
        // SAFETY: every entry is one of a row of x, which has `hidden` columns, a multiple of 8,
        // and whole rows of a tensor or a workspace as its own; `out` has a row for every entry.
        unsafe { device.launch(kernel, &grid, &args) }
    }

    fn products(
        &self,
        (device, linear): (&Device, &Linear),
        s: Sizes,
        routes: Routes,
        (x, act, y): (u64, u64, u64),
        (grouped, weights): (&Grouped, &Moe<Weight>),
        dense: &mut Workspace,
        out: &mut Tensor,
    ) -> Result<()> {
        let groups = |first: usize, experts| {
            let Routes { start, sorted, p, .. } = routes;
            Groups::Experts { experts, start: start + 4 * first as u64, sorted, p }
        };
        let gate_up = (&weights.gate_up_proj, s.experts);
        linear.per_expert(device, gate_up, dense, |first, experts, w| {
            let x = Operand { ptr: x, rows: s.entries, ld: s.hidden as u32 };
            let w = Matrices { ptr: w, ld: s.hidden as u32 };
            // SAFETY: x has `hidden` columns, a multiple of 8, w 2 inter rows of as many for these
            // experts, and the workspace a row of inter for every entry; weights and workspaces
            // are aligned.
            unsafe {
                grouped.swiglu(device, (x, s.hidden), w, groups(first, experts), (act, s.inter))
            }?;
            Ok(())
        })?;
        linear.per_expert(
            device,
            (&weights.down_proj, s.experts),
            dense,
            |first, experts, w| {
                let act = Operand { ptr: act, rows: s.entries, ld: s.inter as u32 };
                let w = Matrices { ptr: w, ld: s.inter as u32 };
                // SAFETY: as above, of `hidden` rows for every expert; y has a row for every entry.
                unsafe {
                    grouped.plain(device, (act, s.inter), w, groups(first, experts), (y, s.hidden))
                }?;
                Ok(())
            },
        )?;

        let grid = Grid::new("moe_combine", [s.tokens, 1, 1], 256, 0)?
            .doing((2 * s.entries + 4 * s.tokens) * s.hidden, 0);
        let (place, out) = (routes.place, out.ptr());
        let (hidden, top_k) = (s.hidden as u32, s.top_k as u32);
        let args = CombineBf16Args { y, place, out, hidden, top_k };
        // SAFETY: every entry has its place among the rows of y; out has a row for every token.
        unsafe { device.launch(&self.combine, &grid, &args) }?;
        Ok(())
    }
}

/// Few tokens: the weights of an expert are read for every entry.
fn rows(
    [gate_up, down]: &[Kernel; 2],
    (device, element): (&Device, usize),
    s: Sizes,
    routes: Routes,
    x: View,
    weights: &Moe<Weight>,
    act: u64,
    out: &mut Tensor,
) -> Result<()> {
    let args = RowsArgs {
        x: x.ptr,
        w: weights.gate_up_proj.dense()?,
        expert: routes.expert,
        p: routes.p,
        out: act,
        hidden: s.hidden as u32,
        inter: s.inter as u32,
        top_k: s.top_k as u32,
        ldw: weights.gate_up_proj.ld(),
    };
    let (matrices, operations) = s.work(element);
    let grid = Grid::new("moe_gate_up_rows", [s.inter.div_ceil(4), s.entries, 1], 128, 0)?
        .doing(2 * matrices, 2 * operations);
    // SAFETY: every entry's expert is one of the weights', x has a row for every token, and
    // the workspace one of `inter` for every entry.
    unsafe { device.launch(gate_up, &grid, &args) }?;
    let args = RowsArgs {
        x: act,
        w: weights.down_proj.dense()?,
        out: out.ptr(),
        ldw: weights.down_proj.ld(),
        ..args
    };
    let grid = Grid::new("moe_down_rows", [s.hidden.div_ceil(4), s.tokens, 1], 128, 0)?
        .doing(matrices, operations);
    // SAFETY: as above; the activations were written by the launch before, and out has a row
    // for every token.
    unsafe { device.launch(down, &grid, &args) }?;
    Ok(())
}
