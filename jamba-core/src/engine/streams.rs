//! Several streams, waited for together.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::Stream;
use super::sync::{Condvar, Mutex, MutexGuard};
use crate::error::Result;
use crate::generate::Piece;

/// Several streams, waited for together: an iterator over what comes of any of them, in turns where
/// several have something. Waiting costs nothing and takes no thread, however many there are.
///
/// A stream is known by its number: the first that was pushed is 0, the next 1. Each comes to one
/// [`Arrival::End`]; the iterator ends when all have, and goes on when another is pushed. Dropping
/// it cancels what has not ended.
///
/// ```
/// # use jamba_core::{Engine, GenerateOptions, Model, Request};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// # let model = Model::load(folder, jamba_cpu::CpuBackend::new())?;
/// # let tokenizer = jamba_core::Tokenizer::from_folder(folder)?;
/// # let engine = Engine::new(&model, &tokenizer, Default::default())?;
/// use jamba_core::{Arrival, Streams};
///
/// let mut streams = Streams::new();
/// for prompt in ["A fox", "An owl"] {
///     let options = GenerateOptions { max_tokens: 8, ..Default::default() };
///     streams.push(engine.submit(Request::new(tokenizer.encode(prompt)?, options))?);
/// }
/// let mut texts = [String::new(), String::new()];
/// for (number, arrival) in &mut streams {
///     match arrival {
///         Arrival::Piece(piece) => texts[number] += &piece.text,
///         Arrival::End(stream) => assert!(stream?.finish_reason().is_some()),
///     }
/// }
/// assert!(streams.is_empty());
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Default)]
pub struct Streams {
    streams: HashMap<usize, (Stream, Waker)>,
    ready: Arc<Ready>,
    pushed: usize,
}

/// What came of one of several streams.
#[derive(Debug)]
pub enum Arrival {
    /// Its next piece.
    Piece(Piece),
    /// It has ended, and says why and what it took; or it failed.
    End(Result<Stream>),
}

/// Numbers of the streams that may have something, each once.
#[derive(Default)]
struct Ready {
    numbers: Mutex<VecDeque<usize>>,
    some: Condvar,
}

impl Ready {
    fn lock(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.numbers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn add(&self, number: usize) {
        self.lock().push_back(number);
        self.some.notify_one();
    }

    /// The first, waited for until `deadline`; none then.
    fn take(&self, deadline: Option<Instant>) -> Option<usize> {
        let mut numbers = self.lock();
        loop {
            if let Some(number) = numbers.pop_front() {
                return Some(number);
            }
            numbers = match deadline {
                None => self.some.wait(numbers).unwrap_or_else(|p| p.into_inner()),
                Some(deadline) => {
                    let rest = deadline.saturating_duration_since(Instant::now());
                    if rest.is_zero() {
                        return None;
                    }
                    let waited = self.some.wait_timeout(numbers, rest);
                    waited.unwrap_or_else(|p| p.into_inner()).0
                }
            };
        }
    }
}

/// Rings when a stream has something.
struct Bell {
    number: usize,
    ready: Arc<Ready>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ready.add(self.number);
    }
}

impl Streams {
    /// No streams yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a stream and returns its number.
    pub fn push(&mut self, stream: Stream) -> usize {
        let number = self.pushed;
        self.pushed += 1;
        let bell = Bell { number, ready: self.ready.clone() };
        self.streams.insert(number, (stream, Waker::from(Arc::new(bell))));
        self.ready.add(number);
        number
    }

    /// Takes a stream out, to be read alone or dropped; `None` if it has ended.
    pub fn remove(&mut self, number: usize) -> Option<Stream> {
        self.streams.remove(&number).map(|(stream, _)| stream)
    }

    /// A stream that has not ended: to cancel it, for example.
    pub fn get(&self, number: usize) -> Option<&Stream> {
        self.streams.get(&number).map(|(stream, _)| stream)
    }

    /// Streams that have not ended.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether all have ended.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// What has come; `Pending` if nothing has, `Ready(None)` when all have ended.
    pub fn try_next(&mut self) -> Poll<Option<(usize, Arrival)>> {
        self.next_timeout(Duration::ZERO)
    }

    /// As the iterator, but waits no longer than `timeout`: `Pending` then.
    pub fn next_timeout(&mut self, timeout: Duration) -> Poll<Option<(usize, Arrival)>> {
        self.next_until(Instant::now().checked_add(timeout))
    }

    fn next_until(&mut self, deadline: Option<Instant>) -> Poll<Option<(usize, Arrival)>> {
        while !self.streams.is_empty() {
            let Some(number) = self.ready.take(deadline) else { return Poll::Pending };
            // It was taken out since.
            let Some((stream, waker)) = self.streams.get_mut(&number) else { continue };
            let arrival = match stream.poll_next(&mut Context::from_waker(waker)) {
                Poll::Pending => continue,
                Poll::Ready(Some(Ok(piece))) => {
                    // There may be more of it; the others first.
                    self.ready.add(number);
                    Arrival::Piece(piece)
                }
                Poll::Ready(Some(Err(error))) => {
                    self.streams.remove(&number);
                    Arrival::End(Err(error))
                }
                Poll::Ready(None) => {
                    let Some((stream, _)) = self.streams.remove(&number) else { continue };
                    Arrival::End(Ok(stream))
                }
            };
            return Poll::Ready(Some((number, arrival)));
        }
        Poll::Ready(None)
    }
}

impl Iterator for Streams {
    type Item = (usize, Arrival);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Poll::Ready(next) = self.next_until(None) {
                return next;
            }
        }
    }
}
