//! From the engine's thread to one stream: events in order, for a reader that polls, that waits, or
//! that is told when there is something.
//!
//! Why it is not a library's: the same events are to be had without waiting, waiting, waiting until a
//! deadline, and by a waker, in any order. Channels of the standard library and crossbeam have no
//! wakers, those for executors (tokio, futures, async-channel) no deadline. flume has all of it, for
//! six crates in everybody's build and a queue for many receivers, of which there is one here;
//! and it cannot be run under loom, which tries this one in all interleavings (`loom.rs`). What is
//! sent is at most a piece for each of a request's tokens: it needs no bound of its own, and the
//! engine waits for no reader.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::sync::{Condvar, Mutex, MutexGuard};

/// Puts events in. When it is dropped, the events are all there will be.
pub(super) struct Sender<T>(Arc<Channel<T>>);

/// Takes events out.
pub(super) struct Receiver<T>(Arc<Channel<T>>);

struct Channel<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    events: VecDeque<T>,
    has_sender: bool,
    has_receiver: bool,
    /// Of whoever polled last and found nothing.
    waker: Option<Waker>,
}

pub(super) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let (has_sender, has_receiver) = (true, true);
    let state = State { events: VecDeque::new(), has_sender, has_receiver, waker: None };
    let channel = Arc::new(Channel { state: Mutex::new(state), changed: Condvar::new() });
    (Sender(channel.clone()), Receiver(channel))
}

impl<T> Channel<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes the state, then tells the receiver, if it waits.
    fn change(&self, change: impl FnOnce(&mut State<T>)) {
        let waker = {
            let mut state = self.lock();
            change(&mut state);
            state.waker.take()
        };
        self.changed.notify_one();
        // Not under the lock: it runs whatever an executor does. If that panics, it is no reason for
        // the engine to end.
        if let Some(waker) = waker {
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }
}

impl<T> State<T> {
    /// The next event; none when all have been taken and no more come.
    fn take(&mut self) -> Poll<Option<T>> {
        match self.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if self.has_sender => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

impl<T> Sender<T> {
    /// Whether somebody will hear it.
    pub(super) fn send(&self, event: T) -> bool {
        let mut heard = false;
        self.0.change(|state| {
            heard = state.has_receiver;
            if heard {
                state.events.push_back(event);
            }
        });
        heard
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.change(|state| state.has_sender = false);
    }
}

impl<T> Receiver<T> {
    /// What is there now.
    pub(super) fn try_receive(&self) -> Poll<Option<T>> {
        self.0.lock().take()
    }

    /// Waits for the next event, until `deadline` if there is one.
    pub(super) fn receive(&self, deadline: Option<Instant>) -> Poll<Option<T>> {
        let mut state = self.0.lock();
        loop {
            let taken = state.take();
            if taken.is_ready() {
                return taken;
            }
            state = match deadline {
                None => self.0.changed.wait(state).unwrap_or_else(|p| p.into_inner()),
                Some(deadline) => {
                    let rest = deadline.saturating_duration_since(Instant::now());
                    if rest.is_zero() {
                        return Poll::Pending;
                    }
                    let waited = self.0.changed.wait_timeout(state, rest);
                    waited.unwrap_or_else(|p| p.into_inner()).0
                }
            };
        }
    }

    /// What is there now; if nothing is, the task is woken when something is.
    pub(super) fn poll(&self, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.lock();
        let taken = state.take();
        if taken.is_pending() {
            match &mut state.waker {
                Some(waker) => waker.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
        }
        taken
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let unheard = {
            let mut state = self.0.lock();
            state.has_receiver = false;
            state.waker = None;
            std::mem::take(&mut state.events)
        };
        drop(unheard);
    }
}
