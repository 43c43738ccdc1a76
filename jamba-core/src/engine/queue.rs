//! Requests that wait, between the threads that submit them and the one that runs them.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::prefix::PrefixStats;
use super::stream::Event;
use crate::error::{Error, Result};
use crate::generate::{CancelToken, GenerateOptions};

/// What an [`Engine`](super::Engine) has done and is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// Requests that have a slot.
    pub running: usize,
    /// Bytes that the running requests count with.
    pub running_bytes: u64,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Requests that were cancelled, waiting or running.
    pub cancelled: u64,
    /// Requests that failed after they were accepted.
    pub failed: u64,
    /// Steps run.
    pub steps: u64,
    /// Tokens of prompts run.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// What the prefix cache has done.
    pub prefix: PrefixStats,
}

/// A request that waits.
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) options: GenerateOptions,
    pub(super) priority: i32,
    pub(super) keep_at: Vec<usize>,
    pub(super) events: Sender<Event>,
    pub(super) cancel: CancelToken,
    pub(super) submitted: Instant,
    pub(super) bytes: u64,
}

pub(super) struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    limit: usize,
}

struct Queue {
    /// In the order in which they get slots.
    jobs: VecDeque<Job>,
    closed: bool,
    /// As of the last step.
    stats: EngineStats,
    /// Requests that were cancelled before they got a slot.
    dropped: u64,
}

impl Shared {
    pub(super) fn new(limit: usize) -> Self {
        let queue = Queue {
            jobs: VecDeque::new(),
            closed: false,
            stats: EngineStats::default(),
            dropped: 0,
        };
        Self { queue: Mutex::new(queue), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, job: Job) -> Result<()> {
        let mut queue = self.lock();
        if queue.closed {
            return Err(Error::EngineStopped);
        }
        if queue.jobs.len() >= self.limit {
            queue.drop_cancelled();
        }
        if queue.jobs.len() >= self.limit {
            return Err(Error::QueueFull { limit: self.limit });
        }
        let at = queue.jobs.partition_point(|other| other.priority >= job.priority);
        queue.jobs.insert(at, job);
        self.changed.notify_one();
        Ok(())
    }

    /// No more jobs come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Ends every job that waits: nobody will run it.
    pub(super) fn abandon(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        queue.jobs.clear();
    }

    pub(super) fn stats(&self) -> EngineStats {
        let queue = self.lock();
        let cancelled = queue.stats.cancelled + queue.dropped;
        EngineStats { waiting: queue.jobs.len(), cancelled, ..queue.stats }
    }

    /// Takes the first jobs, as many as `fits` lets in, and waits for one if there is nothing else
    /// to do (`idle`). `None` when nothing will come any more. `stats` become known.
    pub(super) fn take(
        &self,
        idle: bool,
        stats: EngineStats,
        mut fits: impl FnMut(&Job) -> bool,
    ) -> Option<Vec<Job>> {
        let mut queue = self.lock();
        queue.stats = stats;
        loop {
            queue.drop_cancelled();
            let mut jobs = Vec::new();
            while queue.jobs.front().is_some_and(&mut fits) {
                jobs.extend(queue.jobs.pop_front());
            }
            if !idle || !jobs.is_empty() {
                return Some(jobs);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    fn drop_cancelled(&mut self) {
        let before = self.jobs.len();
        self.jobs.retain(|job| {
            let cancelled = job.cancel.is_cancelled();
            if cancelled {
                let _ = job.events.send(Event::cancelled(job.submitted.elapsed()));
            }
            !cancelled
        });
        self.dropped += (before - self.jobs.len()) as u64;
    }
}
