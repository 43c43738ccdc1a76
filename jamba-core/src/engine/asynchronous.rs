//! Streams of the engine as those of asynchronous Rust, for any executor.

use std::pin::Pin;
use std::task::{Context, Poll};

use super::stream::Stream;
use crate::error::Result;
use crate::generate::Piece;

/// [`Stream::poll_next`]: the engine's thread wakes the task; no runtime is needed for it.
impl futures_core::Stream for Stream {
    type Item = Result<Piece>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Stream::poll_next(self.get_mut(), context)
    }
}
