//! One request while it has a slot.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::channel::Sender;
use super::queue::Job;
use super::stream::{Event, RequestUsage};
use crate::error::{Error, Result, said};
use crate::generate::{CancelToken, FinishReason, Writer};
use crate::logprobs::{Scored, scored};
use crate::sampler::{Choice, Sampled};
use crate::spans::RequestSpan;

/// Tokens that are not worth a state of their own.
const GRAIN: usize = 16;

/// A request that runs.
pub(super) struct Sequence {
    pub(super) prompt: Vec<u32>,
    pub(super) cancel: CancelToken,
    /// Bytes that it counts with.
    pub(super) bytes: u64,
    /// Tokens that its slot holds: of the prompt, then generated ones.
    pub(super) position: usize,
    /// Generated tokens.
    pub(super) reply: Vec<u32>,
    /// The last of them, which the slot does not hold yet.
    pub(super) pending: Option<u32>,
    /// Positions of the prompt at which the state is to be kept, ascending.
    pub(super) keep_at: Vec<usize>,
    /// The last position of which a state is kept; `None` where none is wanted.
    kept: Option<usize>,
    writer: Writer,
    scores: Option<Scores>,
    events: Sender<Event>,
    submitted: Instant,
    /// When it got its slot, then when its prompt was read.
    since: Instant,
    usage: RequestUsage,
    span: RequestSpan,
}

/// Of the prompt's tokens.
struct Scores {
    top: usize,
    done: Vec<Scored>,
    /// Logits after the last token of the prompt so far.
    previous: Vec<f32>,
}

/// What a step told of the next token.
#[derive(Clone, Copy)]
pub(super) enum Told<'a> {
    Logits(&'a [f32]),
    /// It, which the backend chose, and which row of the step's logits is its.
    Chosen(Sampled, usize),
}

impl Told<'_> {
    pub(super) const NOTHING: Self = Self::Logits(&[]);
}

/// Whether a sequence goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    GoOn,
    /// It ends.
    Finished(FinishReason),
    /// Nobody listens any more.
    Unheard,
}

/// Does what is of one request only: if it panics, that request fails, and the engine goes on. What
/// it leaves half done is of a sequence that ends.
pub(super) fn apart<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(Error::Panic { reason: said(&*panic) }))
}

impl Sequence {
    pub(super) fn new(job: Job, writer: Writer) -> Self {
        let Job { prompt, options, keep_at, events, cancel, submitted, span, bytes, .. } = job;
        let top = options.prompt_logprobs;
        let queue_time = submitted.elapsed();
        Self {
            prompt,
            cancel,
            bytes,
            position: 0,
            reply: Vec::new(),
            pending: None,
            keep_at,
            kept: None,
            writer,
            scores: top.map(|top| Scores { top, done: Vec::new(), previous: Vec::new() }),
            events,
            submitted,
            since: Instant::now(),
            usage: RequestUsage { queue_time, ..RequestUsage::default() },
            span,
        }
    }

    /// Whether every token of the prompt has to be run, for its logits.
    pub(super) fn is_scored(&self) -> bool {
        self.scores.is_some()
    }

    /// The first tokens of the prompt are there.
    pub(super) fn start(&mut self, cached: usize) {
        self.position = cached;
        self.usage.cached_tokens = cached;
        self.usage.prompt_tokens = cached;
        self.span.start(&self.usage);
    }

    /// Decides where states are to be kept: at the end of the prompt, at what the request names, at
    /// the junction with prompts seen before, and before the end at distances that double. So a
    /// prompt that parts from this one `n` tokens before its end runs fewer than `max(n, GRAIN)` of
    /// its tokens again, for a number of states that is the logarithm of its length.
    pub(super) fn plan(&mut self, known: usize) {
        let (start, end) = (self.position, self.prompt.len());
        let distances = std::iter::successors(Some(GRAIN), |distance| distance.checked_mul(2));
        let before = distances.map_while(|distance| end.checked_sub(distance));
        let before = before.take_while(|at| *at >= start + GRAIN);
        self.keep_at.extend(before);
        self.keep_at.push(end);
        if known >= start + GRAIN {
            self.keep_at.push(known);
        }
        self.keep_at.retain(|at| (start + 1..=end).contains(at));
        self.keep_at.sort_unstable();
        self.keep_at.dedup();
        self.kept = Some(start);
    }

    /// The state of the first `end` tokens is kept.
    pub(super) fn keep(&mut self, end: usize) {
        self.kept = Some(end);
    }

    /// Whether the end of the reply is worth a state: the prompt of the next turn begins with it.
    pub(super) fn is_worth_keeping(&self) -> bool {
        self.kept.is_some_and(|kept| self.position >= kept + GRAIN)
    }

    /// The tokens that the slot holds.
    pub(super) fn held(&self) -> Vec<u32> {
        let (prompt, reply) = (self.prompt.len().min(self.position), self.reply.iter());
        let reply = reply.take(self.position - prompt);
        self.prompt[..prompt].iter().chain(reply).copied().collect()
    }

    /// Tokens of the prompt that are still to run.
    pub(super) fn rest(&self) -> usize {
        self.prompt.len() - self.position.min(self.prompt.len())
    }

    /// The end of the next part of the prompt, of at most `tokens` tokens.
    pub(super) fn part_end(&self, tokens: usize) -> usize {
        let end = self.position + self.rest().min(tokens);
        self.keep_at.iter().copied().find(|at| *at > self.position).map_or(end, |at| at.min(end))
    }

    /// The slot holds more of the prompt; `rows` of logits of these tokens, if it is scored.
    pub(super) fn read_part(&mut self, end: usize, vocab_size: usize, rows: &[f32]) {
        let part = self.position..end;
        self.usage.prompt_tokens += part.len();
        self.position = end;
        let Some(scores) = &mut self.scores else { return };
        for (&id, logits) in self.prompt[part].iter().zip(rows.chunks_exact(vocab_size)) {
            if !scores.previous.is_empty() {
                scores.done.push(scored(&scores.previous, id, scores.top));
            }
            scores.previous.clear();
            scores.previous.extend_from_slice(logits);
        }
    }

    /// The whole prompt is in the slot.
    pub(super) fn end_prompt(&mut self) -> Next {
        self.usage.prompt_time = self.since.elapsed();
        self.since = Instant::now();
        if let Some(scores) = self.scores.take() {
            self.events.send(Event::PromptScores(scores.done));
        }
        if self.writer.is_done() {
            return Next::Finished(FinishReason::Length);
        }
        Next::GoOn
    }

    /// How the backend may choose the token after `end`, where nothing else is wanted of the
    /// logits there.
    pub(super) fn choice_at(&self, end: usize) -> Option<Choice<'_>> {
        let is_read = self.pending.is_some() || end == self.prompt.len();
        let is_kept = self.pending.is_none() && self.keep_at.contains(&end);
        let choice = (is_read && !is_kept && !self.is_scored()).then(|| self.writer.choice());
        choice.flatten()
    }

    /// Takes the next token. `is_full` says that the slot has no room for it.
    pub(super) fn write(&mut self, last: Told<'_>, is_full: bool) -> Result<Next> {
        #[cfg(test)]
        assert!(self.prompt != super::worker::tests::PANICS, "this is part of the test");
        let (piece, reason) = match last {
            Told::Logits(logits) if !logits.iter().all(|v| v.is_finite()) => {
                return Err(Error::NonFinite { position: self.position });
            }
            Told::Logits(logits) => self.writer.write(logits, is_full)?,
            Told::Chosen(chosen, _) => self.writer.write_chosen(chosen, is_full)?,
        };
        self.pending = piece.id;
        self.reply.extend(piece.id);
        self.usage.generated_tokens += 1;
        if self.usage.generated_tokens == 1 {
            self.usage.first_token_time = self.submitted.elapsed();
        }
        if !self.events.send(Event::Piece(piece)) {
            return Ok(Next::Unheard);
        }
        Ok(reason.map_or(Next::GoOn, Next::Finished))
    }

    /// Tells the end; after a cancellation, with the text that was held back.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        if reason == FinishReason::Cancelled
            && let Ok(Some(piece)) = apart(|| self.writer.rest())
        {
            self.events.send(Event::Piece(piece));
        }
        if self.position >= self.prompt.len() {
            self.usage.generation_time = self.since.elapsed();
        } else {
            self.usage.prompt_time = self.since.elapsed();
        }
        self.span.finish(reason, &self.usage);
        // Whoever does not listen any more does not need to know.
        self.events.send(Event::Finished(reason, self.usage));
    }

    pub(super) fn fail(&self, error: Error) {
        self.span.fail(&error);
        self.events.send(Event::Failed(error));
    }
}
