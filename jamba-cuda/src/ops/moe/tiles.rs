//! Many tokens, in tiles of the entries of an expert: `kernels/moe_tiles.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::shape::Shaped;
use jamba_core::weights::Moe;

use super::Sizes;
use super::route::Routes;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::Module;
use crate::ops::linear::{Linear, Operand};
use crate::ops::workspace::Workspace;
use crate::options::{Precision, element_bytes};
use crate::weight::{Weight, padded};

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

/// The products of the experts in tiles of one height.
struct Height {
    gate_up: Kernel,
    down: Kernel,
    /// Entries of a tile, and rows of W.
    tile: usize,
    cols: usize,
    shared: usize,
}

/// Kernels of `moe_tiles.cu`.
pub(super) struct Tiles {
    /// The highest first.
    heights: Vec<Height>,
    precision: Precision,
}

impl Tiles {
    pub(super) fn load(products: &Module, precision: Precision) -> crate::Result<Self> {
        let load = |gate_up, down, tile: usize, cols, shared| {
            let gate_up = products.kernel_with_shared(gate_up, shared)?;
            let down = products.kernel_with_shared(down, shared)?;
            crate::Result::Ok(Height { gate_up, down, tile, cols, shared })
        };
        // STAGES (TILE + COLS) PITCH bf16 of moe_tiles.cu.
        let shared = |tile: usize| 3 * (tile + 128) * 40 * 2;
        let heights = match precision {
            Precision::Bf16 => vec![
                load("moe_gate_up_128", "moe_down_128", 128, 128, shared(128))?,
                load("moe_gate_up_32", "moe_down_32", 32, 128, shared(32))?,
            ],
            Precision::F32 => vec![load("moe_gate_up_64", "moe_down_64", 64, 64, 0)?],
        };
        Ok(Self { heights, precision })
    }

    /// `y` of every sorted entry, in tiles of the entries of an expert.
    pub(super) fn run(
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
        let filled = |t: &&Height| s.entries >= s.experts * t.tile / 3;
        let Some(kernels) = self.heights.iter().find(filled).or(self.heights.last()) else {
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
