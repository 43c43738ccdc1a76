//! What comes back of a request.

use std::iter::FusedIterator;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::channel::Receiver;
use crate::error::{Error, Result};
use crate::generate::{CancelToken, FinishReason, Piece};
use crate::logprobs::{Scored, TokenLogProb};

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestUsage {
    /// Tokens of the prompt that are in its state.
    pub prompt_tokens: usize,
    /// Those of them that were not run, as a stored state had them.
    pub cached_tokens: usize,
    /// Tokens generated, the end-of-text token included.
    pub generated_tokens: usize,
    /// From the submission to the slot.
    pub queue_time: Duration,
    /// From the slot to the end of the prompt.
    pub prompt_time: Duration,
    /// From the submission to the first generated token; zero without one.
    pub first_token_time: Duration,
    /// From the end of the prompt to the end.
    pub generation_time: Duration,
}

/// From the engine to a stream.
pub(super) enum Event {
    PromptScores(Vec<Scored>),
    Piece(Piece),
    Finished(FinishReason, RequestUsage),
    Failed(Error),
}

impl Event {
    /// The end of a request that never got a slot.
    pub(super) fn cancelled(queue_time: Duration) -> Self {
        let usage = RequestUsage { queue_time, ..RequestUsage::default() };
        Self::Finished(FinishReason::Cancelled, usage)
    }
}

/// The pieces of one request, as they come: an iterator that waits for the next. An error is the
/// last item. Dropping it cancels the request.
///
/// [`try_next`](Self::try_next) and [`next_timeout`](Self::next_timeout) wait not at all, or not for
/// ever; [`Streams`](super::Streams) waits for several; [`poll_next`](Self::poll_next) is for
/// executors. All of them take from the same pieces, and may be mixed.
pub struct Stream {
    events: Receiver<Event>,
    cancel: CancelToken,
    ended: bool,
    finish_reason: Option<FinishReason>,
    usage: Option<RequestUsage>,
    prompt_logprobs: Vec<Scored>,
}

impl Stream {
    pub(super) fn new(events: Receiver<Event>, cancel: CancelToken) -> Self {
        Self {
            events,
            cancel,
            ended: false,
            finish_reason: None,
            usage: None,
            prompt_logprobs: Vec::new(),
        }
    }

    /// Asks for the end, with [`FinishReason::Cancelled`]: its slot is free before the next step.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Cancels the request from elsewhere.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Why it ended; `None` before the iterator has, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// What it took; `None` before the iterator has ended, and after an error.
    pub fn usage(&self) -> Option<RequestUsage> {
        self.usage
    }

    /// The scores of the prompt's tokens but the first, if they were
    /// [asked for](crate::GenerateOptions::prompt_logprobs): there with the first piece.
    pub fn prompt_logprobs(&self) -> &[Scored] {
        &self.prompt_logprobs
    }

    /// The next piece, if it has come: `Pending` if not, `Ready(None)` after the end.
    pub fn try_next(&mut self) -> Poll<Option<Result<Piece>>> {
        self.take(Receiver::try_receive)
    }

    /// As the iterator, but waits no longer than `timeout`: `Pending` then.
    pub fn next_timeout(&mut self, timeout: Duration) -> Poll<Option<Result<Piece>>> {
        let deadline = Instant::now().checked_add(timeout);
        self.take(|events| events.receive(deadline))
    }

    /// [`try_next`](Self::try_next) for asynchronous tasks: where it is `Pending`, the task of
    /// `context` (of the last call, if there were several) is woken as soon as there is something.
    /// The engine's thread wakes it; no other is needed.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece>>> {
        self.take(|events| events.poll(context))
    }

    /// Takes events, as `receive` gets them, up to the next that is an item.
    fn take(
        &mut self,
        mut receive: impl FnMut(&Receiver<Event>) -> Poll<Option<Event>>,
    ) -> Poll<Option<Result<Piece>>> {
        while !self.ended {
            let Poll::Ready(event) = receive(&self.events) else { return Poll::Pending };
            match event {
                Some(Event::PromptScores(scores)) => self.prompt_logprobs = scores,
                Some(Event::Piece(piece)) => return Poll::Ready(Some(Ok(piece))),
                Some(Event::Finished(reason, usage)) => {
                    self.ended = true;
                    self.finish_reason = Some(reason);
                    self.usage = Some(usage);
                }
                Some(Event::Failed(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(Error::EngineStopped)));
                }
            }
        }
        Poll::Ready(None)
    }

    /// Waits for the end and returns everything.
    ///
    /// # Errors
    /// [`Error::NonFinite`], [`Error::Step`], [`Error::EngineStopped`], or what the request's
    /// options make impossible.
    pub fn collect_all(mut self) -> Result<Completion> {
        let mut all = Completion::default();
        for piece in &mut self {
            let piece = piece?;
            if let Some(id) = piece.id {
                all.ids.push(id);
                all.logprobs.push(piece.logprob);
                all.top_logprobs.push(piece.top);
            }
            all.text.push_str(&piece.text);
        }
        all.prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
        all.finish_reason = self.finish_reason;
        all.usage = self.usage.unwrap_or_default();
        Ok(all)
    }
}

impl Iterator for Stream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // Without a deadline it waits until there is something.
            if let Poll::Ready(next) = self.take(|events| events.receive(None)) {
                return next;
            }
        }
    }
}

impl FusedIterator for Stream {}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ended, finish_reason, usage, .. } = self;
        let mut debug = f.debug_struct("Stream");
        debug.field("ended", ended).field("finish_reason", finish_reason).field("usage", usage);
        debug.finish_non_exhaustive()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// A finished request.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Completion {
    /// The generated tokens, the end-of-text token included.
    pub ids: Vec<u32>,
    /// What they add to the text of the prompt, special tokens left out, up to a stop string.
    pub text: String,
    /// [`Sampled::logprob`](crate::Sampled::logprob) of each of `ids`.
    pub logprobs: Vec<f32>,
    /// The most probable tokens in the place of each of `ids`, as many as were asked for.
    pub top_logprobs: Vec<Vec<TokenLogProb>>,
    /// [`Stream::prompt_logprobs`].
    pub prompt_logprobs: Vec<Scored>,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
    /// What it took.
    pub usage: RequestUsage,
}
