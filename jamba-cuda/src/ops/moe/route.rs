//! Which entries go to which expert, and back: `moe_route`, `moe_sort` and `moe_combine` of
//! `kernels/moe.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;

use super::Sizes;
use crate::device::{Device, Grid, Kernel};
use crate::kernels::Module;
use crate::tensor::Tensor;

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
struct CombineArgs {
    y: u64,
    place: u64,
    p: u64,
    out: u64,
    hidden: u32,
    top_k: u32,
}

/// Addresses within the workspace of routes.
#[derive(Clone, Copy)]
pub(super) struct Routes {
    pub(super) expert: u64,
    pub(super) p: u64,
    pub(super) sorted: u64,
    pub(super) place: u64,
    pub(super) start: u64,
}

/// Kernels of `moe.cu` around the products.
pub(super) struct Routing {
    route: Kernel,
    sort: Kernel,
    combine: Kernel,
}

impl Routing {
    pub(super) fn load(moe: &Module) -> crate::Result<Self> {
        Ok(Self {
            route: moe.overlapping("moe_route")?,
            sort: moe.overlapping("moe_sort")?,
            combine: moe.overlapping("moe_combine")?,
        })
    }

    /// The entries of every token: experts and their weights.
    pub(super) fn route(
        &self,
        device: &Device,
        s: Sizes,
        logits: &Tensor,
        routes: Routes,
    ) -> Result<()> {
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

    pub(super) fn sort(&self, device: &Device, s: Sizes, routes: Routes) -> Result<()> {
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

    pub(super) fn combine(
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
}
