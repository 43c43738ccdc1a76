//! Backends around a backend.

use std::ops::Range;

use jamba_core::weights::Moe;
use jamba_core::{
    Backend, Batch, CausalConv1d, Cols, Config, Limits, Param, Result, SelectiveScan, StatePart,
};

/// The operators of a backend without its blocks and its step: what fused ones are compared with.
pub(crate) struct Composed<'a, B>(pub(crate) &'a B);

/// Methods that pass on to `self.0`.
macro_rules! delegate {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $out:ty;)*) => {
        $(fn $name(&self, $($arg: $ty),*) -> $out {
            self.0.$name($($arg),*)
        })*
    };
}

impl<B: Backend> Backend for Composed<'_, B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type State = B::State;

    delegate! {
        fn name() -> &'static str;
        fn upload(param: Param) -> Result<B::Weight>;
        fn alloc(rows: usize, cols: usize) -> Result<B::Tensor>;
        fn write(dst: &mut B::Tensor, src: &[f32]) -> Result<()>;
        fn read(src: Cols<'_, B::Tensor>) -> Result<Vec<f32>>;
        fn shape(tensor: &B::Tensor) -> [usize; 2];
        fn new_state(config: &Config, limits: &Limits) -> Result<B::State>;
        fn reset_slot(state: &mut B::State, slot: usize) -> Result<()>;
        fn read_state(
            state: &B::State,
            layer: usize,
            part: StatePart,
            slot: usize,
            positions: usize,
        ) -> Result<Vec<f32>>;
        fn write_state(
            state: &mut B::State,
            layer: usize,
            part: StatePart,
            slot: usize,
            positions: usize,
            values: &[f32],
        ) -> Result<()>;
        fn stage(state: &mut B::State, batch: &Batch) -> Result<()>;
        fn embed(table: &B::Weight, state: &B::State, out: &mut B::Tensor) -> Result<()>;
        fn linear(
            x: Cols<'_, B::Tensor>,
            weight: &B::Weight,
            bias: Option<&B::Weight>,
            out: &mut B::Tensor,
        ) -> Result<()>;
        fn rms_norm(x: &B::Tensor, weight: &B::Weight, eps: f32, out: &mut B::Tensor) -> Result<()>;
        fn rms_norm_cols(
            x: &mut B::Tensor,
            cols: Range<usize>,
            weight: &B::Weight,
            eps: f32,
        ) -> Result<()>;
        fn add_assign(x: &mut B::Tensor, y: &B::Tensor) -> Result<()>;
        fn silu_mul(gate_up: &B::Tensor, out: &mut B::Tensor) -> Result<()>;
        fn causal_conv1d(
            args: CausalConv1d<'_, B::Tensor, B::Weight>,
            layer: usize,
            state: &mut B::State,
            out: &mut B::Tensor,
        ) -> Result<()>;
        fn selective_scan(
            args: SelectiveScan<'_, B::Tensor, B::Weight>,
            layer: usize,
            state: &mut B::State,
            y: &mut B::Tensor,
        ) -> Result<()>;
        fn attention(
            qkv: &B::Tensor,
            layer: usize,
            state: &mut B::State,
            out: &mut B::Tensor,
        ) -> Result<()>;
        fn moe_experts(
            x: &B::Tensor,
            router_logits: &B::Tensor,
            weights: &Moe<B::Weight>,
            top_k: usize,
            out: &mut B::Tensor,
        ) -> Result<()>;
        fn output_rows(x: &B::Tensor, state: &B::State, out: &mut B::Tensor) -> Result<()>;
    }
}
