//! The experts: routing, then products by whichever kernels are for so many tokens and weights kept
//! so ([`Way`]), of `kernels/moe.cu`, `moe_tiles.cu`, `grouped.cu`, `few.cu`, `few_groups.cu` or
//! `packed.cu`.

mod many;
mod route;
mod rows;
mod tiles;

use jamba_core::Result;
use jamba_core::weights::Moe;

use self::many::Many;
use self::route::{Routes, Routing};
use self::rows::Rows;
use self::tiles::Tiles;
use super::few::Entries;
use super::grouped::Grouped;
use super::linear::{Linear, Operand};
use super::packed::Chosen;
use super::workspace::Workspaces;
use crate::device::Device;
use crate::error::Error;
use crate::kernels::{Loader, Unit};
use crate::options::Precision;
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

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

/// The tokens that are routed: as they are, or rounded for products already.
#[derive(Clone, Copy)]
pub(crate) enum Tokens {
    Wide(View),
    Rounded(Operand),
}

/// Kernels of `moe.cu` and `moe_tiles.cu`.
pub(crate) struct Experts {
    routing: Routing,
    rows: Rows,
    tiles: Tiles,
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

/// Refuses more experts than the routing kernel sorts.
pub(crate) fn check_experts(experts: usize) -> Result<(), Error> {
    const MOST: usize = 1024;
    if experts <= MOST {
        return Ok(());
    }
    let (op, what) = ("moe_experts", "number of experts");
    Err(Error::Size { op, what, got: experts, allowed: "the kernel is made for up to 1024" })
}

impl Experts {
    pub(crate) fn load(loader: &Loader) -> crate::Result<Self> {
        let [moe, tiles] = units().map(|unit| loader.module(&unit));
        let (moe, precision) = (moe?, loader.precision);
        let is_bf16 = precision == Precision::Bf16;
        Ok(Self {
            routing: Routing::load(&moe)?,
            rows: Rows::load(&moe, precision)?,
            tiles: Tiles::load(&tiles?, precision)?,
            many: is_bf16.then(|| Many::load(&moe)).transpose()?,
            precision,
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
        check_experts(experts)?;
        let bytes = workspace_bytes(tokens, (experts, top_k), (hidden, inter), self.precision);
        let base = workspaces.routes.reserve(device, bytes[0])?;
        let list = |i: usize| base + 4 * (i * entries) as u64;
        let routes =
            Routes { expert: list(0), p: list(1), sorted: list(2), place: list(3), start: list(4) };
        let act = workspaces.act.reserve(device, bytes[1])?;
        self.routing.route(device, s, router_logits, routes)?;
        let way = self.way(s, x, weights, linear, grouped.is_some());
        match (way, x) {
            (Way::Rows, Tokens::Wide(x)) => {
                return self.rows.run(device, s, routes, x, weights, act, out);
            }
            (Way::Packed, Tokens::Wide(x)) => {
                let act = View { ptr: act, rows: entries, cols: inter, ld: inter as u32 };
                return packed(device, linear, s, routes, x, weights, act, out);
            }
            _ => {}
        }
        self.routing.sort(device, s, routes)?;
        let y = workspaces.expert_out.reserve(device, bytes[2])?;
        if let (Way::Grouped, Some(many), Some(grouped)) = (way, &self.many, grouped) {
            let bytes = sorted_bytes(tokens, top_k, hidden);
            let sorted = workspaces.cast.reserve(device, bytes)?;
            many.gather(device, s, routes, x, sorted)?;
            let (device, operands) = ((device, linear), (sorted, act, y));
            let dense = &mut workspaces.dense;
            return many.products(device, s, routes, operands, (grouped, weights), dense, out);
        }
        if let (Way::Few, true, Some(many)) = (way, linear.few.takes_sorted(hidden), &self.many) {
            let ptr = workspaces.cast.reserve(device, sorted_bytes(tokens, top_k, hidden))?;
            many.gather(device, s, routes, x, ptr)?;
            let x = Operand { ptr, rows: entries, ld: hidden as u32 };
            few(device, linear, s, Routes { sorted: 0, ..routes }, x, weights, (act, y))?;
            return self.routing.combine(device, s, routes, y, out);
        }
        let x = match (x, self.precision) {
            (Tokens::Rounded(x), _) => x,
            (Tokens::Wide(x), Precision::F32) => Operand { ptr: x.ptr, rows: x.rows, ld: x.ld },
            (Tokens::Wide(x), Precision::Bf16) => linear.cast(device, x, &mut workspaces.cast)?,
        };
        if way == Way::Few {
            few(device, linear, s, routes, x, weights, (act, y))?;
        } else {
            let dense = &mut workspaces.dense;
            self.tiles.run((device, linear), s, routes, x, weights, (act, y), dense)?;
        }
        self.routing.combine(device, s, routes, y, out)
    }

    /// Which kernels are for these tokens.
    fn way(
        &self,
        s: Sizes,
        x: Tokens,
        weights: &Moe<Weight>,
        linear: &Linear,
        has_grouped: bool,
    ) -> Way {
        let (is_packed, is_bf16) =
            (weights.gate_up_proj.packing().is_some(), self.precision == Precision::Bf16);
        if let Tokens::Wide(x) = x
            && s.tokens <= FEW_TOKENS
        {
            let down = View { rows: 1, cols: s.inter, ld: s.inter as u32, ..x };
            if !is_packed {
                return Way::Rows;
            }
            if linear.packed.takes(x, &weights.gate_up_proj)
                && linear.packed.takes(down, &weights.down_proj)
                && linear.packed.has_room(s.top_k, &weights.down_proj)
                && s.inter.min(s.hidden) >= 4
            {
                return Way::Packed;
            }
        }
        let is_many = s.entries >= GROUPED_ENTRIES * s.experts;
        let is_few = if is_packed {
            linear.few.takes_entries(s.entries, s.experts, s.hidden)
        } else {
            !is_many
        };
        if is_few && is_bf16 {
            Way::Few
        } else if is_many && has_grouped && Grouped::fits(s.hidden) && Grouped::fits(s.inter) {
            Way::Grouped
        } else {
            Way::Tiles
        }
    }
}

/// The kernels that multiply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A token or two: the weights of an expert are read for every entry.
    Rows,
    /// The same of quantised weights.
    Packed,
    /// Each weight is read about once, straight into the tensor cores.
    Few,
    /// Many entries of an expert, on Hopper.
    Grouped,
    /// Entries of an expert in tiles, on any card.
    Tiles,
}

/// `out` of a token or two, with quantised weights.
fn packed(
    device: &Device,
    linear: &Linear,
    s: Sizes,
    routes: Routes,
    x: View,
    weights: &Moe<Weight>,
    act: View,
    out: &mut Tensor,
) -> Result<()> {
    let Sizes { tokens, experts, top_k, .. } = s;
    let chosen = Chosen { experts, top_k, tokens, expert: routes.expert, p: routes.p };
    linear.packed.expert_gated(device, x, &weights.gate_up_proj, chosen, act)?;
    linear.packed.expert_down(device, act, &weights.down_proj, chosen, out.ptr())
}

/// `y` of every sorted entry, each weight being read about once.
fn few(
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
