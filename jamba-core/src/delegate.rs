//! Backends around a backend.

use std::sync::Arc;

use crate::backend::Backend;

/// Methods of [`Backend`] that pass on to another backend with the same tensors, weights and
/// states, for use within an `impl Backend`. The one list of them: a wrapper cannot forget one.
///
/// `|this| expression` is the backend passed on to, and then which methods: `operators` are all
/// up to the rung of blocks, provided ones among them; `blocks` are the blocks, the step and
/// [`observe`](Backend::observe). A wrapper that leaves out `blocks` runs compositions of its own
/// operators.
///
/// ```
/// use jamba_core::{Backend, delegate_backend};
///
/// /// The operators of a backend without its fused blocks.
/// struct Composed<B>(B);
///
/// impl<B: Backend> Backend for Composed<B> {
///     type Tensor = B::Tensor;
///     type Weight = B::Weight;
///     type State = B::State;
///
///     delegate_backend!(|this| this.0; operators);
/// }
/// ```
#[macro_export]
macro_rules! delegate_backend {
    (|$this:ident| $inner:expr; operators blocks) => {
        $crate::delegate_backend!(|$this| $inner; operators);
        $crate::delegate_backend!(|$this| $inner; blocks);
    };
    (|$this:ident| $inner:expr; operators) => {
        $crate::__delegate_methods! { |$this| $inner;
            fn name() -> &'static str;
            fn weight_format() -> $crate::WeightFormat;
            fn upload(param: $crate::Param) -> $crate::Result<Self::Weight>;
            fn alloc(rows: usize, cols: usize) -> $crate::Result<Self::Tensor>;
            fn write(dst: &mut Self::Tensor, src: &[f32]) -> $crate::Result<()>;
            fn read(src: $crate::Cols<'_, Self::Tensor>) -> $crate::Result<Vec<f32>>;
            fn shape(tensor: &Self::Tensor) -> [usize; 2];
            fn new_state(
                config: &$crate::Config,
                limits: &$crate::Limits,
            ) -> $crate::Result<Self::State>;
            fn reset_slot(state: &mut Self::State, slot: usize) -> $crate::Result<()>;
            fn read_state(
                state: &Self::State,
                layer: usize,
                part: $crate::StatePart,
                slot: usize,
                positions: ::std::ops::Range<usize>,
            ) -> $crate::Result<Vec<f32>>;
            fn write_state(
                state: &mut Self::State,
                layer: usize,
                part: $crate::StatePart,
                slot: usize,
                positions: ::std::ops::Range<usize>,
                values: &[f32],
            ) -> $crate::Result<()>;
            fn copy_slot(
                config: &$crate::Config,
                state: &mut Self::State,
                from: usize,
                to: usize,
                positions: usize,
            ) -> $crate::Result<()>;
            fn sequence_bytes(config: &$crate::Config, positions: usize) -> u64;
            fn check_memory(
                config: &$crate::Config,
                need: $crate::backend::Need<'_>,
            ) -> $crate::Result<()>;
            fn choose(
                logits: &Self::Tensor,
                choices: &[Option<$crate::Choice<'_>>],
            ) -> $crate::Result<Vec<Option<$crate::Sampled>>>;
            fn is_chunk_invariant() -> bool;
            fn for_each(tasks: usize, f: &(dyn Fn(usize) + Sync)) -> ();
            fn stage(state: &mut Self::State, batch: &$crate::Batch) -> $crate::Result<()>;
            fn embed(
                table: &Self::Weight,
                state: &Self::State,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn linear(
                x: $crate::Cols<'_, Self::Tensor>,
                weight: &Self::Weight,
                bias: Option<&Self::Weight>,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn rms_norm(
                x: &Self::Tensor,
                weight: &Self::Weight,
                eps: f32,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn rms_norm_cols(
                x: &mut Self::Tensor,
                cols: ::std::ops::Range<usize>,
                weight: &Self::Weight,
                eps: f32,
            ) -> $crate::Result<()>;
            fn add_assign(x: &mut Self::Tensor, y: &Self::Tensor) -> $crate::Result<()>;
            fn silu_mul(gate_up: &Self::Tensor, out: &mut Self::Tensor) -> $crate::Result<()>;
            fn causal_conv1d(
                args: $crate::CausalConv1d<'_, Self::Tensor, Self::Weight>,
                layer: usize,
                state: &mut Self::State,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn selective_scan(
                args: $crate::SelectiveScan<'_, Self::Tensor, Self::Weight>,
                layer: usize,
                state: &mut Self::State,
                y: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn attention(
                qkv: &Self::Tensor,
                layer: usize,
                state: &mut Self::State,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn moe_experts(
                x: &Self::Tensor,
                router_logits: &Self::Tensor,
                weights: &$crate::weights::Moe<Self::Weight>,
                top_k: usize,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
            fn output_rows(
                x: &Self::Tensor,
                state: &Self::State,
                out: &mut Self::Tensor,
            ) -> $crate::Result<()>;
        }
    };
    (|$this:ident| $inner:expr; blocks) => {
        $crate::__delegate_methods! { |$this| $inner;
            fn mamba_mixer(
                config: &$crate::Config,
                weights: &$crate::weights::Mamba<Self::Weight>,
                layer: usize,
                scratch: &mut $crate::Scratch<Self::Tensor>,
                state: &mut Self::State,
            ) -> $crate::Result<()>;
            fn attention_block(
                config: &$crate::Config,
                weights: &$crate::weights::Attention<Self::Weight>,
                layer: usize,
                scratch: &mut $crate::Scratch<Self::Tensor>,
                state: &mut Self::State,
            ) -> $crate::Result<()>;
            fn mlp(
                weights: &$crate::weights::Mlp<Self::Weight>,
                scratch: &mut $crate::Scratch<Self::Tensor>,
            ) -> $crate::Result<()>;
            fn moe_ffn(
                config: &$crate::Config,
                weights: &$crate::weights::Moe<Self::Weight>,
                layer: usize,
                scratch: &mut $crate::Scratch<Self::Tensor>,
            ) -> $crate::Result<()>;
            fn add_rms_norm(
                weight: &Self::Weight,
                eps: f32,
                scratch: &mut $crate::Scratch<Self::Tensor>,
            ) -> $crate::Result<()>;
            fn forward(
                config: &$crate::Config,
                weights: &$crate::weights::Weights<Self::Weight>,
                scratch: &mut $crate::Scratch<Self::Tensor>,
                state: &mut Self::State,
            ) -> $crate::Result<()>;
            fn observe(
                at: $crate::trace::Activation,
                x: $crate::Cols<'_, Self::Tensor>,
            ) -> $crate::Result<()>;
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __delegate_methods {
    ($(|$this:ident| $inner:expr;)?) => {};
    (|$this:ident| $inner:expr;
     fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $out:ty; $($rest:tt)*) => {
        fn $name(&self, $($arg: $ty),*) -> $out {
            let $this = self;
            $crate::Backend::$name(&$inner, $($arg),*)
        }
        $crate::__delegate_methods! { |$this| $inner; $($rest)* }
    };
}

/// A backend that several models share.
impl<B: Backend> Backend for Arc<B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type State = B::State;

    delegate_backend!(|this| **this; operators blocks);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// Names of the methods that some lines declare at this depth.
    fn methods(code: &'static str, indent: usize) -> BTreeSet<&'static str> {
        let start = format!("{}fn ", " ".repeat(indent));
        let name = |line: &'static str| line.split(['(', '<']).next().unwrap_or(line);
        code.lines().filter_map(|line| line.strip_prefix(&*start)).map(name).collect()
    }

    #[test]
    fn every_method_is_passed_on() {
        let (_, declared) = include_str!("backend.rs").split_once("pub trait Backend").unwrap();
        let (delegated, _) = include_str!("delegate.rs").split_once("macro_rules! __").unwrap();
        let (declared, delegated) = (methods(declared, 4), methods(delegated, 12));
        assert!(declared.len() > 30, "{declared:?}");
        assert_eq!(declared, delegated);
    }

    #[test]
    fn a_trace_has_every_block() {
        let code = include_str!("delegate.rs");
        let (_, code) = code.split_once("$inner:expr; blocks) => {").unwrap();
        let (blocks, _) = code.split_once("macro_rules! __").unwrap();
        let (_, traced) = include_str!("trace.rs").split_once("Backend for Traced").unwrap();
        let (mut blocks, traced) = (methods(blocks, 12), methods(traced, 4));
        // The step is composed, so that it is seen block by block.
        assert!(blocks.remove("forward"));
        assert_eq!(blocks, traced);
    }
}
