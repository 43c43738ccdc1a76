//! Sorted tokens of bf16 on Hopper: what the products of `kernels/grouped.cu`, and of
//! `kernels/few_groups.cu` before them, need around them, of `kernels/moe.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use jamba_core::Result;
use jamba_core::weights::Moe;

use super::route::Routes;
use super::{Sizes, Tokens};
use crate::device::{Device, Grid, Kernel};
use crate::kernels::Module;
use crate::ops::grouped::{Grouped, Groups, Matrices};
use crate::ops::linear::{Linear, Operand};
use crate::ops::workspace::Workspace;
use crate::tensor::Tensor;
use crate::weight::Weight;

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

/// Kernels around the products.
pub(super) struct Many {
    gather_f32: Kernel,
    gather_bf16: Kernel,
    combine: Kernel,
}

impl Many {
    pub(super) fn load(moe: &Module) -> crate::Result<Self> {
        Ok(Self {
            gather_f32: moe.overlapping("moe_gather_f32")?,
            gather_bf16: moe.overlapping("moe_gather_bf16")?,
            combine: moe.kernel("moe_combine_bf16")?,
        })
    }

    /// The rows of the sorted entries.
    pub(super) fn gather(
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

    pub(super) fn products(
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
