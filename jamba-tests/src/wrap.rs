//! Backends around a backend.

use jamba_core::{Backend, delegate_backend};

/// The operators of a backend without its blocks and its step: what fused ones are compared with.
pub(crate) struct Composed<'a, B>(pub(crate) &'a B);

impl<B: Backend> Backend for Composed<'_, B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type State = B::State;

    delegate_backend!(|this| *this.0; operators);
}
