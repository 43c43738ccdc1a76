//! Many requests on one model: a queue, slots that requests come and go in, a stream for each.
//!
//! One thread owns the [`Runner`](crate::Runner). A step of it has one token of every running
//! generation and, in what room is left, parts of the prompts that are being read, so that streams
//! do not stall while a prompt is read. A request gets the tokens that it would get alone: bit for
//! bit where the backend's results do not depend on what else is in a step
//! ([`is_chunk_invariant`](crate::Backend::is_chunk_invariant)), else within its tolerance.
//!
//! ```
//! use jamba_core::{Engine, EngineOptions, GenerateOptions, Model, Request, Tokenizer};
//! use jamba_cpu::CpuBackend;
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
//! let model = Model::load(folder, CpuBackend::new())?;
//! let tokenizer = Tokenizer::from_folder(folder)?;
//! let options = EngineOptions { slots: 2, context: 64, ..Default::default() };
//! let engine = Engine::new(&model, &tokenizer, options)?;
//!
//! let options = GenerateOptions { max_tokens: 8, ..Default::default() };
//! let fox = engine.submit(Request::new(tokenizer.encode("A fox")?, options.clone()))?;
//! let owl = engine.submit(Request::new(tokenizer.encode("An owl")?, options))?;
//! for piece in fox {
//!     print!("{}", piece?.text);
//! }
//! println!("{}", owl.collect_all()?.text);
//! # Ok::<(), jamba_core::Error>(())
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::Instant;

use crate::backend::Limits;
use crate::config::Config;
use crate::error::{Error, Result, at_least_one};
use crate::generate::{CancelToken, GenerateOptions, Writer};
use crate::model::LanguageModel;
use crate::spans::RequestSpan;
use crate::tokenizer::Tokenizer;

#[cfg(feature = "async")]
mod asynchronous;
mod channel;
#[cfg(all(test, loom))]
mod loom;
mod prefix;
mod queue;
mod sequence;
mod stream;
mod streams;
mod sync;
mod worker;

pub use prefix::PrefixStats;
pub use queue::EngineStats;
use queue::{Job, Shared};
pub use stream::{Completion, RequestUsage, Stream};
pub use streams::{Arrival, Streams};
use worker::Worker;

/// Rows of logits of a step beyond one for each slot, at least one more for each: for prompts whose
/// tokens are scored.
const SCORE_ROWS: usize = 32;

/// What an [`Engine`] is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Requests that run at the same time.
    pub slots: usize,
    /// Tokens of one request at most, prompt and generated ones.
    pub context: usize,
    /// Tokens of one step at most, all requests together; at least one for each slot is allowed.
    /// More read prompts faster; fewer let running streams go on sooner.
    pub step_tokens: usize,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Bytes of states on the host that are kept to start later prompts from; 0 keeps none.
    pub prefix_cache: u64,
    /// Bytes that the states of running requests may take together; `None`: as much as all slots
    /// take. A request counts with all the tokens that it may come to
    /// ([`Backend::sequence_bytes`](crate::Backend::sequence_bytes)), and waits for its turn where
    /// they do not fit.
    pub memory: Option<u64>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            slots: 8,
            context: 4096,
            step_tokens: 256,
            queue: 1024,
            prefix_cache: 256 << 20,
            memory: None,
        }
    }
}

/// What is to be generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Token ids; none are the model's beginning-of-text token.
    pub prompt: Vec<u32>,
    /// How to go on. Every request has its own seed.
    pub options: GenerateOptions,
    /// Each step of priority is a head start of 64 requests: a request gets a slot before those that
    /// were submitted fewer than 64 requests earlier for each step that it is above them. So one of
    /// a higher priority goes first, and equals go as they came; and yet nobody waits for ever: of
    /// the requests that come later, fewer than `64 * (their priority - this one's)` go before it.
    pub priority: i32,
    /// Positions of the prompt at which other prompts are known to go on differently (the end of a
    /// system prompt): the engine keeps the state there. It finds such places by itself too, from
    /// the prompts that it has seen.
    pub keep_at: Vec<usize>,
}

impl Request {
    /// A request of priority 0.
    pub fn new(prompt: Vec<u32>, options: GenerateOptions) -> Self {
        Self { prompt, options, ..Self::default() }
    }
}

/// Runs requests from any thread. A clone is the same engine.
///
/// When the last clone is dropped, no request can come any more: those that were accepted are
/// finished, as long as somebody holds their streams, and then the engine's thread ends.
/// [`shutdown`](Self::shutdown) waits for that.
#[derive(Clone)]
pub struct Engine(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
    thread: ThreadId,
    tokenizer: Option<Tokenizer>,
    config: Config,
    limits: Limits,
    /// Bytes of the state of a sequence without tokens, and of each token.
    bytes: [u64; 2],
    budget: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Engine {
    /// Starts an engine, with a thread of its own for the steps; the backend may use others (the CPU
    /// backend does, and none that wait for an engine).
    ///
    /// # Errors
    /// [`Error::Option`] for a zero, [`Error::Budget`] where the budget does not hold a single
    /// token, [`Error::Tokenizer`] for one of another model, or what the backend reports.
    pub fn new(
        model: &dyn LanguageModel,
        tokenizer: &Tokenizer,
        options: EngineOptions,
    ) -> Result<Self> {
        tokenizer.check_vocab(model.config().vocab_size)?;
        Self::start(model, Some(tokenizer.clone()), options)
    }

    /// An engine without a tokenizer: pieces have ids and no text, and no request can have stop
    /// strings.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn ids_only(model: &dyn LanguageModel, options: EngineOptions) -> Result<Self> {
        Self::start(model, None, options)
    }

    fn start(
        model: &dyn LanguageModel,
        tokenizer: Option<Tokenizer>,
        options: EngineOptions,
    ) -> Result<Self> {
        let EngineOptions { slots, context, step_tokens, queue, prefix_cache, memory } = options;
        at_least_one(&[
            ("slots", slots),
            ("context", context),
            ("step_tokens", step_tokens),
            ("queue", queue),
        ])?;
        let (tokens, outputs) =
            (step_tokens.max(slots), slots.saturating_add(slots.max(SCORE_ROWS)));
        let limits = Limits { slots, context, tokens, outputs };
        let runner = model.runner(limits)?;
        let empty = runner.sequence_bytes(0);
        let full = runner.sequence_bytes(context);
        let per_token = full.saturating_sub(empty).div_ceil(context as u64);
        let budget = memory.unwrap_or(u64::MAX);
        let needed = empty.saturating_add(per_token);
        if needed > budget {
            return Err(Error::Budget { needed, budget });
        }
        let shared = Arc::new(Shared::new(queue));
        let worker = Worker::new(shared.clone(), runner, tokenizer.clone(), prefix_cache, budget);
        let thread = std::thread::Builder::new().name("jamba-engine".into());
        let worker = thread.spawn(move || worker.run()).map_err(|source| Error::Device {
            backend: model.backend_name(),
            source: Box::new(source),
        })?;
        Ok(Self(Arc::new(Handle {
            shared,
            thread: worker.thread().id(),
            worker: Mutex::new(Some(worker)),
            tokenizer,
            config: model.config().clone(),
            limits,
            bytes: [empty, per_token],
            budget,
        })))
    }

    /// Puts a request into the queue and returns its stream. Dropping the stream cancels it.
    ///
    /// # Errors
    /// The request is checked before it waits: [`Error::Token`], [`Error::EmptyPrompt`],
    /// [`Error::Context`] for a prompt that does not fit, [`Error::Budget`] for one that could
    /// never run, [`Error::Option`] and [`Error::Tokenizer`] for its options;
    /// [`Error::QueueFull`], [`Error::EngineStopped`].
    pub fn submit(&self, request: Request) -> Result<Stream> {
        let Handle { shared, tokenizer, config, limits, .. } = &*self.0;
        let Request { mut prompt, options, priority, keep_at } = request;
        if prompt.is_empty() {
            prompt.extend(config.bos_token_id);
        }
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let vocab_size = config.vocab_size;
        if let Some(index) = prompt.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::Token { id: prompt[index], index, vocab_size });
        }
        if prompt.len() > limits.context {
            return Err(Error::Context { needed: prompt.len(), allocated: limits.context });
        }
        let needed = self.bytes(prompt.len(), options.max_tokens);
        if needed > self.0.budget {
            return Err(Error::Budget { needed, budget: self.0.budget });
        }
        // Only to check the options: a waiting request should not hold tables of the vocabulary.
        Writer::new(tokenizer.as_ref(), config, options.clone())?;

        let (events, receiver) = channel::channel();
        let cancel = CancelToken::new();
        let stream = Stream::new(receiver, cancel.clone());
        let submitted = Instant::now();
        let span = RequestSpan::new(prompt.len(), &options, priority);
        shared.push(Job {
            prompt,
            options,
            priority,
            keep_at,
            events,
            cancel,
            submitted,
            span,
            bytes: needed,
        })?;
        Ok(stream)
    }

    /// Bytes of state that a request counts with: those of its prompt and of all tokens that it may
    /// generate within the context.
    pub fn bytes(&self, prompt_tokens: usize, max_tokens: usize) -> u64 {
        let [empty, per_token] = self.0.bytes;
        let tokens = prompt_tokens.saturating_add(max_tokens).min(self.0.limits.context);
        empty.saturating_add(per_token.saturating_mul(tokens as u64))
    }

    /// How many requests of this length run at the same time; 0 for one that would be refused.
    pub fn fits(&self, prompt_tokens: usize, max_tokens: usize) -> usize {
        if prompt_tokens > self.0.limits.context {
            return 0;
        }
        let fit = self.0.budget / self.bytes(prompt_tokens, max_tokens).max(1);
        usize::try_from(fit).unwrap_or(usize::MAX).min(self.0.limits.slots)
    }

    /// What the engine has done so far, and what it is doing.
    pub fn stats(&self) -> EngineStats {
        self.0.shared.stats()
    }

    /// Whether it takes requests: not after [`shutdown`](Self::shutdown), nor if its thread has ended.
    pub fn is_running(&self) -> bool {
        self.0.shared.is_open()
    }

    /// Takes no more requests, and waits until those that were accepted have ended. On the engine's
    /// own thread, where wakers run, it does not wait.
    pub fn shutdown(&self) {
        self.0.shared.close();
        if std::thread::current().id() == self.0.thread {
            return;
        }
        // Held while it waits: whoever else shuts the engine down waits too.
        let mut worker = self.0.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = worker.take() {
            // If its thread panicked, the streams say that the engine has stopped.
            let _ = worker.join();
        }
    }
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    const fn sent<T: Send>() {}
    shared::<Engine>();
    sent::<Stream>();
};
