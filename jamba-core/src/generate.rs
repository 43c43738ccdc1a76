//! From a prompt to text: the loop of sampling and stepping, as an iterator of pieces.

use std::fmt;
use std::iter::FusedIterator;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sampler::{Sampled, Sampler, Sampling};
use crate::session::Session;
use crate::tokenizer::{Decoder, Tokenizer};

#[cfg(test)]
mod tests;

/// What to generate and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// The text ends before the first of these strings to be completed. The tokens they are made
    /// of do not matter.
    pub stop: Vec<String>,
    /// Whether to go on after an end-of-text token.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sampling: Sampling::default(), max_tokens: 256, stop: Vec::new(), ignore_eos: false }
    }
}

/// Cancels a generation from another thread, or from the one that runs it. Clones are one token.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the end: no step begins after it is seen.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model ended the text.
    Eos,
    /// A stop string was completed.
    Stop,
    /// [`GenerateOptions::max_tokens`] were generated.
    Length,
    /// The session is full.
    Context,
    /// Its [`CancelToken`] was cancelled.
    Cancelled,
}

impl FinishReason {
    /// `eos`, `stop`, `length`, `context` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One generated token and the text that became certain with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token; `None` in a last piece that only brings text that was held back.
    pub id: Option<u32>,
    /// [`Sampled::logprob`] of the token; 0 without one.
    pub logprob: f32,
    /// Whole characters. Empty while they may be the beginning of a stop string, or bytes of a
    /// character are still missing.
    pub text: String,
}

/// How much was done, and in what time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt that the session was given.
    pub prompt_tokens: usize,
    /// Tokens generated, the end-of-text token included.
    pub generated_tokens: usize,
    /// Time that the prompt took.
    pub prompt_time: Duration,
    /// Time that generating took; not the time between two calls of `next`.
    pub generation_time: Duration,
}

/// Generates a text: give it a [`prompt`](Self::prompt), then iterate over its [`Piece`]s.
///
/// The last generated token is not run, as nothing is sampled after it: the session holds the
/// prompt and all generated tokens but the last, at every moment and also when the generator is
/// dropped. What goes on from there (the next turn of a chat) must begin with that token: give
/// [`pending`](Self::pending) as the first prompt of the next generator.
///
/// An error is the last item, and text held back until then is lost.
pub struct Generator<'a> {
    session: &'a mut Session,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    decoder: Decoder,
    stops: Stops,
    max_tokens: usize,
    ignore_eos: bool,
    cancel: CancelToken,
    stage: Stage,
    finish_reason: Option<FinishReason>,
    prompt_ids: Vec<u32>,
    usage: Usage,
}

enum Stage {
    /// No prompt yet.
    New,
    /// The prompt is in the session, and its logits too.
    Prompted,
    /// A token was generated that is not in the session.
    Going(u32),
    /// Nothing more will come; the generated token that is not in the session.
    Done(Option<u32>),
}

impl<'a> Generator<'a> {
    /// A generator that appends to `session`.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::Tokenizer`].
    pub fn new(
        session: &'a mut Session,
        tokenizer: &'a Tokenizer,
        options: GenerateOptions,
    ) -> Result<Self> {
        let GenerateOptions { sampling, max_tokens, stop, ignore_eos } = options;
        Ok(Self {
            sampler: Sampler::new(sampling, session.config().vocab_size)?,
            decoder: tokenizer.decoder(&[])?,
            stops: Stops::new(stop)?,
            session,
            tokenizer,
            max_tokens,
            ignore_eos,
            cancel: CancelToken::new(),
            stage: Stage::New,
            finish_reason: None,
            prompt_ids: Vec::new(),
            usage: Usage::default(),
        })
    }

    /// Ends with [`FinishReason::Cancelled`] soon after `token` is cancelled: it is looked at
    /// before every chunk of the prompt and before every generated token.
    pub fn with_cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Appends the prompt to the session, [`Session::chunk`] tokens at a time. More than one
    /// prompt may be given; they follow one another.
    ///
    /// In an empty session an empty prompt is the model's beginning-of-text token. Iterating
    /// without a prompt gives an empty one.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::Token`], [`Error::Context`], and [`Error::LatePrompt`]
    /// after the first token: the session is as before. What [`Session::append`] reports: the
    /// generator has ended.
    pub fn prompt(&mut self, ids: &[u32]) -> Result<()> {
        let bos = self.session.config().bos_token_id;
        let bos = bos.filter(|_| self.session.position() == 0);
        let ids = if ids.is_empty() { bos.as_slice() } else { ids };
        if !matches!(self.stage, Stage::New | Stage::Prompted) {
            return Err(Error::LatePrompt);
        }
        self.session.check(ids)?;
        let start = Instant::now();
        let result = self.append(ids);
        self.usage.prompt_time += start.elapsed();
        if result.is_err() {
            self.stage = Stage::Done(None);
        }
        result
    }

    /// [`prompt`](Self::prompt) with the ids of `text`: [`Tokenizer::encode`] in an empty session,
    /// [`Tokenizer::encode_plain`] where it goes on from earlier tokens.
    ///
    /// # Errors
    /// As `prompt`, and [`Error::Tokenizer`].
    pub fn prompt_text(&mut self, text: &str) -> Result<()> {
        let ids = match self.session.position() {
            0 => self.tokenizer.encode(text)?,
            _ => self.tokenizer.encode_plain(text)?,
        };
        self.prompt(&ids)
    }

    fn append(&mut self, ids: &[u32]) -> Result<()> {
        let done = self.session.append_while(ids, || !self.cancel.is_cancelled())?;
        self.sampler.observe_prompt(&ids[..done]);
        self.prompt_ids.extend_from_slice(&ids[..done]);
        self.usage.prompt_tokens += done;
        if done < ids.len() {
            self.end(FinishReason::Cancelled, None);
            return Ok(());
        }
        self.decoder = self.tokenizer.decoder(&self.prompt_ids)?;
        self.stage = Stage::Prompted;
        if self.max_tokens == 0 {
            self.end(FinishReason::Length, None);
        }
        Ok(())
    }

    fn end(&mut self, reason: FinishReason, pending: Option<u32>) {
        self.finish_reason = Some(reason);
        self.stage = Stage::Done(pending);
    }

    /// Why the generation ended; `None` before that, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// The last generated token, which the session does not hold yet; `None` after an error, from
    /// where the session is to be [`reset`](Session::reset).
    pub fn pending(&self) -> Option<u32> {
        match self.stage {
            Stage::Going(id) => Some(id),
            Stage::Done(pending) => pending,
            Stage::New | Stage::Prompted => None,
        }
    }

    /// What was done so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    fn advance(&mut self) -> Result<Option<Piece>> {
        if self.cancel.is_cancelled() {
            self.end(FinishReason::Cancelled, self.pending());
            let text = self.flush()?.0;
            return Ok((!text.is_empty()).then_some(Piece { id: None, logprob: 0.0, text }));
        }
        let Sampled { id, logprob } = match &self.stage {
            Stage::Prompted => self.sampler.sample(self.session.logits())?,
            Stage::Going(id) => self.sampler.sample(self.session.append(&[*id])?)?,
            Stage::New | Stage::Done(_) => return Ok(None),
        };
        self.stage = Stage::Going(id);
        self.usage.generated_tokens += 1;

        let eos = !self.ignore_eos && self.session.config().eos_token_ids.contains(&id);
        let decoded = if eos { String::new() } else { self.decoder.push(id)? };
        let (mut text, stopped) = self.stops.push(&decoded);
        let mut reason = if stopped {
            Some(FinishReason::Stop)
        } else if eos {
            Some(FinishReason::Eos)
        } else if self.usage.generated_tokens >= self.max_tokens {
            Some(FinishReason::Length)
        } else if self.session.position() >= self.session.context() {
            Some(FinishReason::Context)
        } else {
            None
        };
        if reason.is_some() && !stopped {
            let (rest, stopped) = self.flush()?;
            text.push_str(&rest);
            reason = if stopped { Some(FinishReason::Stop) } else { reason };
        }
        if let Some(reason) = reason {
            self.end(reason, Some(id));
        }
        Ok(Some(Piece { id: Some(id), logprob, text }))
    }

    /// The text held back, and whether a stop string ends it.
    fn flush(&mut self) -> Result<(String, bool)> {
        let (mut text, stopped) = self.stops.push(&self.decoder.finish()?);
        text.push_str(&self.stops.rest());
        Ok((text, stopped))
    }

    fn collect(mut self) -> Result<Generation> {
        let (mut ids, mut logprobs, mut text) = (Vec::new(), Vec::new(), String::new());
        for piece in &mut self {
            let piece = piece?;
            if let Some(id) = piece.id {
                ids.push(id);
                logprobs.push(piece.logprob);
            }
            text.push_str(&piece.text);
        }
        // Without an error there is a reason.
        let finish_reason = self.finish_reason.unwrap_or(FinishReason::Length);
        let Self { prompt_ids, usage, .. } = self;
        Ok(Generation { prompt_ids, ids, text, logprobs, finish_reason, usage })
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Stage::New = self.stage
            && let Err(error) = self.prompt(&[])
        {
            self.stage = Stage::Done(None);
            return Some(Err(error));
        }
        if let Stage::Done(_) = self.stage {
            return None;
        }
        let start = Instant::now();
        let result = self.advance();
        self.usage.generation_time += start.elapsed();
        if result.is_err() {
            self.stage = Stage::Done(None);
            self.finish_reason = None;
        }
        result.transpose()
    }
}

impl FusedIterator for Generator<'_> {}

/// A finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The prompt, as the session was given it.
    pub prompt_ids: Vec<u32>,
    /// The generated tokens, the end-of-text token included. The last is not in the session.
    pub ids: Vec<u32>,
    /// What they add to the text of the prompt, special tokens left out, up to a stop string.
    pub text: String,
    /// [`Sampled::logprob`] of each of `ids`.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// Appends `prompt` to the session and generates what follows: [`Generator::prompt_text`], then
/// all pieces.
///
/// # Errors
/// Those of [`Generator::new`], [`Generator::prompt_text`] and [`Session::append`].
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: GenerateOptions,
) -> Result<Generation> {
    let mut generator = Generator::new(session, tokenizer, options)?;
    generator.prompt_text(prompt)?;
    generator.collect()
}

/// [`generate`] from token ids.
///
/// # Errors
/// Those of [`Generator::new`], [`Generator::prompt`] and [`Session::append`].
pub fn generate_ids(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: GenerateOptions,
) -> Result<Generation> {
    let mut generator = Generator::new(session, tokenizer, options)?;
    generator.prompt(prompt)?;
    generator.collect()
}

/// Finds stop strings in a text that comes in pieces.
struct Stops {
    strings: Vec<String>,
    /// The longest end of the text that may be the beginning of a stop string.
    held: String,
}

impl Stops {
    fn new(strings: Vec<String>) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            let allowed = "a stop string must have at least one character";
            return Err(Error::Option { option: "stop", value: "\"\"".into(), allowed });
        }
        Ok(Self { strings, held: String::new() })
    }

    /// Takes the next text and returns what can be shown, and whether a stop string ends it.
    ///
    /// Of several stop strings, that counts which is completed first (of those that end together,
    /// the one that begins first), so that it does not matter how the text is cut into pieces.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.strings.iter().filter_map(|s| Some((self.held.find(s)?, s.len())));
        if let Some((start, _)) = found.min_by_key(|(start, len)| (start + len, *start)) {
            self.held.truncate(start);
            return (self.rest(), true);
        }
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.floor_char_boundary(self.held.len().saturating_sub(longest));
        let mut starts = self.held[from..].char_indices().map(|(at, _)| from + at);
        let keep = starts.find(|&at| self.strings.iter().any(|s| s.starts_with(&self.held[at..])));
        let keep = keep.unwrap_or(self.held.len());
        (self.held.drain(..keep).collect(), false)
    }

    /// What is held, which is then no longer.
    fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
