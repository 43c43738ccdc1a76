//! Few tokens, weights that are not quantised: `moe_gate_up_rows` and `moe_down_rows` of
//! `kernels/moe.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::weights::Moe;

use super::Sizes;
use super::route::Routes;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::Module;
use crate::options::{Precision, element_bytes};
use crate::tensor::{Tensor, View};
use crate::weight::Weight;

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

/// Kernels that read the weights of an expert for every entry.
pub(super) struct Rows {
    gate_up: Kernel,
    down: Kernel,
    /// Bytes of a weight.
    element: usize,
}

impl Rows {
    pub(super) fn load(moe: &Module, precision: Precision) -> crate::Result<Self> {
        let gate_up = moe.overlapping("moe_gate_up_rows")?;
        let down = moe.overlapping("moe_down_rows")?;
        Ok(Self { gate_up, down, element: element_bytes(precision) })
    }

    /// `out` from `x`, through the workspace of activations.
    pub(super) fn run(
        &self,
        device: &Device,
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
        let (matrices, operations) = s.work(self.element);
        let grid = Grid::new("moe_gate_up_rows", [s.inter.div_ceil(4), s.entries, 1], 128, 0)?
            .doing(2 * matrices, 2 * operations);
        // SAFETY: every entry's expert is one of the weights', x has a row for every token, and
        // the workspace one of `inter` for every entry.
        unsafe { device.launch(&self.gate_up, &grid, &args) }?;
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
        unsafe { device.launch(&self.down, &grid, &args) }?;
        Ok(())
    }
}
