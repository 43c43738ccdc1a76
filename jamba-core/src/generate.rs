//! From a prompt to text: the loop of sampling and stepping, as an iterator of pieces.

use std::fmt;
use std::iter::FusedIterator;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::logprobs::{Scored, TokenLogProb, scored};
use crate::sampler::Sampling;
use crate::session::Session;
use crate::tokenizer::Tokenizer;

mod cancel;
mod hold;
mod stops;
#[cfg(test)]
mod tests;
mod writer;

pub use cancel::CancelToken;
pub(crate) use hold::Hold;
#[cfg(test)]
use stops::Stops;
pub(crate) use writer::Writer;

/// What to generate and when to stop. The default is 256 tokens at [`Sampling::default`], which is
/// the model's own distribution: what the model's authors recommend is [`Sampling::from_folder`].
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
    /// The most probable tokens that each piece is to name, with their probabilities.
    pub logprobs: usize,
    /// Whether the tokens of the prompt are to be scored too, and how many of the most probable
    /// tokens each score is to name.
    pub prompt_logprobs: Option<usize>,
    /// What the text must follow, from its first character on; it ends where nothing can follow it
    /// any more. A text that is cut off ([`max_tokens`](Self::max_tokens), a stop string) is the
    /// beginning of one that does.
    #[cfg(feature = "structured")]
    pub grammar: Option<crate::grammar::Grammar>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            sampling: Sampling::default(),
            max_tokens: 256,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: 0,
            prompt_logprobs: None,
            #[cfg(feature = "structured")]
            grammar: None,
        }
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
    /// The text is complete: its grammar allows nothing more.
    Grammar,
    /// [`GenerateOptions::max_tokens`] were generated.
    Length,
    /// The session is full.
    Context,
    /// Its [`CancelToken`] was cancelled.
    Cancelled,
}

impl FinishReason {
    /// `eos`, `stop`, `grammar`, `length`, `context` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Grammar => "grammar",
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
    /// [`Sampled::logprob`](crate::Sampled::logprob) of the token; 0 without one.
    pub logprob: f32,
    /// The [`GenerateOptions::logprobs`] most probable tokens in its place, most probable first.
    pub top: Vec<TokenLogProb>,
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
///
/// ```
/// use jamba_core::{
///     GenerateOptions, Generator, LanguageModel, Model, Sampling, SessionOptions, Tokenizer,
/// };
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let tokenizer = Tokenizer::from_folder(folder)?;
/// let mut session = model.session(SessionOptions { context: 64, ..Default::default() })?;
/// let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
/// let options = GenerateOptions { sampling, max_tokens: 8, ..Default::default() };
/// let mut generator = Generator::new(&mut session, &tokenizer, options)?;
/// generator.prompt_text("Once upon a time")?;
/// let pieces = generator.collect::<jamba_core::Result<Vec<_>>>()?;
/// let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
/// assert!(text.starts_with(" there was"), "{text}");
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub struct Generator<'a> {
    session: &'a mut Session,
    tokenizer: Option<&'a Tokenizer>,
    writer: Writer,
    prompt_logprobs: Option<usize>,
    prompt_scores: Vec<Scored>,
    cancel: CancelToken,
    stage: Stage,
    finish_reason: Option<FinishReason>,
    prompt_ids: Vec<u32>,
    /// Tokens that the writer knows.
    told: usize,
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
    /// A generator that appends to `session`. The tokens that the session holds already count as
    /// part of the prompt: for penalties, and for what a new token adds to the text.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::Tokenizer`], also for a tokenizer of another model.
    pub fn new(
        session: &'a mut Session,
        tokenizer: &'a Tokenizer,
        options: GenerateOptions,
    ) -> Result<Self> {
        Self::start(session, Some(tokenizer), options)
    }

    /// A generator without a tokenizer: pieces have ids and no text, prompts are ids too, and there
    /// are no stop strings.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn ids_only(session: &'a mut Session, options: GenerateOptions) -> Result<Self> {
        Self::start(session, None, options)
    }

    fn start(
        session: &'a mut Session,
        tokenizer: Option<&'a Tokenizer>,
        options: GenerateOptions,
    ) -> Result<Self> {
        Ok(Self {
            prompt_logprobs: options.prompt_logprobs,
            writer: Writer::new(tokenizer, session.config(), options)?,
            session,
            tokenizer,
            prompt_scores: Vec::new(),
            cancel: CancelToken::new(),
            stage: Stage::New,
            finish_reason: None,
            prompt_ids: Vec::new(),
            told: 0,
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
    /// As `prompt`, [`Error::Tokenizer`], and [`Error::NoTokenizer`].
    pub fn prompt_text(&mut self, text: &str) -> Result<()> {
        let tokenizer = self.tokenizer.ok_or(Error::NoTokenizer)?;
        let ids = match self.session.position() {
            0 => tokenizer.encode(text)?,
            _ => tokenizer.encode_plain(text)?,
        };
        self.prompt(&ids)
    }

    /// Goes on from where the session is, without a prompt: its logits are there after
    /// [`Session::append`], and after a [restore](Session::restore), a [fork](Session::fork) or a
    /// [rewind](Session::rewind). The tokens of the session count as the prompt.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] where the session has no logits to go on from, [`Error::LatePrompt`]
    /// after a prompt or the first token, [`Error::Tokenizer`].
    pub fn resume(&mut self) -> Result<()> {
        if !matches!(self.stage, Stage::New) {
            return Err(Error::LatePrompt);
        }
        if self.session.last_logits().is_empty() {
            return Err(Error::EmptyPrompt);
        }
        // Another's choice, if there is one.
        self.session.take_chosen();
        let tokens = self.session.tokens().to_vec();
        self.tell(&tokens)?;
        self.prompt_ids = tokens;
        self.begin();
        Ok(())
    }

    fn append(&mut self, ids: &[u32]) -> Result<()> {
        // Before the step, at the end of which the first token may be chosen.
        self.tell(&[self.session.tokens(), ids].concat())?;
        let cancel = &self.cancel;
        let done = match self.prompt_logprobs {
            None => {
                let choice = self.writer.choice();
                self.session.append_choosing(ids, choice, || !cancel.is_cancelled())?
            }
            Some(top) => self.append_scored(ids, top)?,
        };
        self.prompt_ids.extend_from_slice(&ids[..done]);
        self.usage.prompt_tokens += done;
        if done < ids.len() {
            self.end(FinishReason::Cancelled, None);
            return Ok(());
        }
        self.begin();
        Ok(())
    }

    /// Tells the writer all tokens so far.
    fn tell(&mut self, tokens: &[u32]) -> Result<()> {
        self.writer.prompt(tokens, tokens.len() - self.told)?;
        self.told = tokens.len();
        Ok(())
    }

    /// The prompt is in the session, and its logits too.
    fn begin(&mut self) {
        self.stage = Stage::Prompted;
        if self.writer.is_done() {
            self.end(FinishReason::Length, None);
        }
    }

    fn append_scored(&mut self, ids: &[u32], top: usize) -> Result<usize> {
        let (mut previous, mut done) = (self.session.last_logits().to_vec(), 0);
        while done < ids.len() && !self.cancel.is_cancelled() {
            let part = &ids[done..ids.len().min(done + self.session.chunk())];
            let scores = &mut self.prompt_scores;
            self.session.append_each(part, |i, logits| {
                if !previous.is_empty() {
                    scores.push(scored(&previous, part[i], top));
                }
                previous.clear();
                previous.extend_from_slice(logits);
            })?;
            done += part.len();
        }
        Ok(done)
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

    /// The scores of the prompt's tokens where [`GenerateOptions::prompt_logprobs`] asks for them;
    /// the first token of an empty session has none.
    pub fn prompt_logprobs(&self) -> &[Scored] {
        &self.prompt_scores
    }

    /// The session, at the end.
    #[cfg(feature = "chat")]
    pub(crate) fn into_session(self) -> &'a mut Session {
        self.session
    }

    fn advance(&mut self) -> Result<Option<Piece>> {
        if self.cancel.is_cancelled() {
            self.end(FinishReason::Cancelled, self.pending());
            return self.writer.rest();
        }
        match self.stage {
            Stage::Prompted => {}
            Stage::Going(id) => {
                self.session.append_choosing(&[id], self.writer.choice(), || true)?;
            }
            Stage::New | Stage::Done(_) => return Ok(None),
        }
        let is_full = self.session.position() >= self.session.context();
        let (piece, reason) = match self.session.take_chosen() {
            Some(chosen) => self.writer.write_chosen(chosen, is_full)?,
            None => self.writer.write(self.session.last_logits(), is_full)?,
        };
        let Some(id) = piece.id else { return Ok(None) };
        self.stage = Stage::Going(id);
        self.usage.generated_tokens += 1;
        if let Some(reason) = reason {
            self.end(reason, Some(id));
        }
        Ok(Some(piece))
    }

    fn collect(mut self) -> Result<Generation> {
        let (mut ids, mut logprobs, mut text) = (Vec::new(), Vec::new(), String::new());
        let mut top_logprobs = Vec::new();
        for piece in &mut self {
            let piece = piece?;
            if let Some(id) = piece.id {
                ids.push(id);
                logprobs.push(piece.logprob);
                top_logprobs.push(piece.top);
            }
            text.push_str(&piece.text);
        }
        // Whoever goes on with the session goes on from the text that was returned.
        if let Some(last) = self.pending()
            && self.session.position() < self.session.context()
        {
            let start = Instant::now();
            self.session.append(&[last])?;
            self.usage.generation_time += start.elapsed();
        }
        // Without an error there is a reason.
        let finish_reason = self.finish_reason.unwrap_or(FinishReason::Length);
        let Self { prompt_ids, prompt_scores: prompt_logprobs, usage, .. } = self;
        Ok(Generation {
            prompt_ids,
            ids,
            text,
            logprobs,
            top_logprobs,
            prompt_logprobs,
            finish_reason,
            usage,
        })
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
    /// The generated tokens, the end-of-text token included.
    pub ids: Vec<u32>,
    /// What they add to the text of the prompt, special tokens left out, up to a stop string.
    pub text: String,
    /// [`Sampled::logprob`](crate::Sampled::logprob) of each of `ids`.
    pub logprobs: Vec<f32>,
    /// The [`GenerateOptions::logprobs`] most probable tokens in the place of each of `ids`.
    pub top_logprobs: Vec<Vec<TokenLogProb>>,
    /// [`Generator::prompt_logprobs`].
    pub prompt_logprobs: Vec<Scored>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// Appends `prompt` to the session and generates what follows: [`Generator::prompt_text`], then
/// all pieces. Unlike after a [`Generator`], the session then holds every generated token, the
/// last one too if there was room for it: a second call goes on from there.
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
