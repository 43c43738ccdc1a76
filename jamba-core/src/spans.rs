//! What the feature `tracing` tells the subscriber of an application: nothing at all without it.
//!
//! | span | level | from | fields |
//! |---|---|---|---|
//! | `load` | info | [`Model::new`](crate::Model::new) | `backend`, `format`, `layers`, `bytes` |
//! | `prefill` | debug | a step with a part of a prompt | `tokens`, `sequences` |
//! | `decode` | debug | a step with one token of every sequence | `sequences` |
//! | `request` | info | [`Engine::submit`](crate::Engine::submit), to its end | below |
//!
//! A `request` is a child of the span in which it was submitted. Its fields: `prompt_tokens`,
//! `max_tokens` and `priority`; once it has a slot `cached_tokens` and `queue_ms`; at its end
//! `generated_tokens`, `first_token_ms`, and `finish_reason` or `error`. No span has a text or a token
//! in it.

use crate::batch::Batch;
use crate::engine::RequestUsage;
use crate::error::Error;
use crate::generate::{FinishReason, GenerateOptions};

/// A span until it is dropped.
#[cfg(feature = "tracing")]
pub(crate) type Entered = tracing::span::EnteredSpan;
#[cfg(not(feature = "tracing"))]
pub(crate) struct Entered;

/// A load of so many layers and stored bytes.
#[cfg(feature = "tracing")]
pub(crate) fn load<B: crate::Backend>(backend: &B, layers: usize, bytes: u64) -> Entered {
    let (name, format) = (backend.name(), backend.weight_format());
    tracing::info_span!("load", backend = name, %format, layers, bytes).entered()
}
#[cfg(not(feature = "tracing"))]
pub(crate) fn load<B: crate::Backend>(_: &B, _: usize, _: u64) -> Entered {
    Entered
}

/// A step of the model.
#[cfg(feature = "tracing")]
pub(crate) fn step(batch: &Batch) -> Entered {
    let (tokens, sequences) = (batch.tokens().len(), batch.runs().len());
    if tokens > sequences {
        tracing::debug_span!("prefill", tokens, sequences).entered()
    } else {
        tracing::debug_span!("decode", sequences).entered()
    }
}
#[cfg(not(feature = "tracing"))]
pub(crate) fn step(_: &Batch) -> Entered {
    Entered
}

/// A request of the engine, from thread to thread.
pub(crate) struct RequestSpan {
    #[cfg(feature = "tracing")]
    span: tracing::Span,
}

#[cfg(feature = "tracing")]
impl RequestSpan {
    pub(crate) fn new(prompt_tokens: usize, options: &GenerateOptions, priority: i32) -> Self {
        use tracing::field::Empty;
        let span = tracing::info_span!(
            "request",
            prompt_tokens,
            max_tokens = options.max_tokens,
            priority,
            cached_tokens = Empty,
            queue_ms = Empty,
            generated_tokens = Empty,
            first_token_ms = Empty,
            finish_reason = Empty,
            error = Empty,
        );
        Self { span }
    }

    /// It has a slot.
    pub(crate) fn start(&self, usage: &RequestUsage) {
        self.span.record("cached_tokens", usage.cached_tokens);
        self.span.record("queue_ms", usage.queue_time.as_secs_f64() * 1e3);
    }

    /// It has ended.
    pub(crate) fn finish(&self, reason: FinishReason, usage: &RequestUsage) {
        self.span.record("generated_tokens", usage.generated_tokens);
        if usage.generated_tokens > 0 {
            self.span.record("first_token_ms", usage.first_token_time.as_secs_f64() * 1e3);
        }
        self.span.record("finish_reason", tracing::field::debug(reason));
    }

    pub(crate) fn fail(&self, error: &Error) {
        self.span.record("error", tracing::field::display(error));
    }
}

#[cfg(not(feature = "tracing"))]
impl RequestSpan {
    pub(crate) fn new(_: usize, _: &GenerateOptions, _: i32) -> Self {
        Self {}
    }

    pub(crate) fn start(&self, _: &RequestUsage) {}

    pub(crate) fn finish(&self, _: FinishReason, _: &RequestUsage) {}

    pub(crate) fn fail(&self, _: &Error) {}
}
