//! Requests that wait, between the threads that submit them and the one that runs them.

use std::collections::VecDeque;
use std::time::Instant;

use super::channel::Sender;
use super::prefix::PrefixStats;
use super::stream::{Event, RequestUsage};
use super::sync::{Condvar, Mutex, MutexGuard};
use crate::error::{Error, Result};
use crate::generate::{CancelToken, FinishReason, GenerateOptions};
use crate::spans::RequestSpan;

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

/// Requests that one step of priority is worth: a request goes before those that came fewer than
/// this many requests earlier, for each step that it is above them.
const HEAD_START: i64 = 64;

/// A request that waits.
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) options: GenerateOptions,
    pub(super) priority: i32,
    pub(super) keep_at: Vec<usize>,
    pub(super) events: Sender<Event>,
    pub(super) cancel: CancelToken,
    pub(super) submitted: Instant,
    pub(super) span: RequestSpan,
    pub(super) bytes: u64,
}

pub(super) struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    limit: usize,
}

struct Queue {
    /// With their ranks, which ascend: the order in which they get slots.
    jobs: VecDeque<(i64, Job)>,
    /// Requests that were accepted so far.
    accepted: i64,
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
            accepted: 0,
            closed: false,
            stats: EngineStats::default(),
            dropped: 0,
        };
        Self { queue: Mutex::new(queue), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn push(&self, job: Job) -> Result<()> {
        let mut ended = Ended::default();
        let mut queue = self.lock();
        if queue.closed {
            return Err(Error::EngineStopped);
        }
        if queue.jobs.len() >= self.limit {
            queue.drop_cancelled(&mut ended);
        }
        if queue.jobs.len() >= self.limit {
            return Err(Error::QueueFull { limit: self.limit });
        }
        // When it would have come, had it no priority. What comes later has a higher rank from some
        // request on, whatever its priority: nobody waits for ever.
        let rank = queue.accepted - HEAD_START * i64::from(job.priority);
        queue.accepted += 1;
        let at = queue.jobs.partition_point(|(other, _)| *other <= rank);
        queue.jobs.insert(at, (rank, job));
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
        let jobs = std::mem::take(&mut queue.jobs);
        drop(queue);
        drop(jobs);
    }

    pub(super) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// `stats` become known.
    pub(super) fn publish(&self, stats: EngineStats) {
        self.lock().stats = stats;
    }

    pub(super) fn stats(&self) -> EngineStats {
        let queue = self.lock();
        let cancelled = queue.stats.cancelled + queue.dropped;
        EngineStats { waiting: queue.jobs.len(), cancelled, ..queue.stats }
    }

    /// Takes the first jobs, as many as `fits` lets in, and waits for one if there is nothing else
    /// to do (`idle`). `None` when nothing will come any more. `stats` become known. There may be none
    /// if some were cancelled.
    pub(super) fn take(
        &self,
        idle: bool,
        stats: EngineStats,
        mut fits: impl FnMut(&Job) -> bool,
    ) -> Option<Vec<Job>> {
        let mut ended = Ended::default();
        let mut queue = self.lock();
        queue.stats = stats;
        loop {
            queue.drop_cancelled(&mut ended);
            let mut jobs = Vec::new();
            while queue.jobs.front().is_some_and(|(_, job)| fits(job)) {
                jobs.extend(queue.jobs.pop_front().map(|(_, job)| job));
            }
            if !idle || !jobs.is_empty() || !ended.0.is_empty() {
                return Some(jobs);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(|p| p.into_inner());
        }
    }
}

impl Queue {
    fn drop_cancelled(&mut self, ended: &mut Ended) {
        if !self.jobs.iter().any(|(_, job)| job.cancel.is_cancelled()) {
            return;
        }
        let before = ended.0.len();
        let jobs = std::mem::take(&mut self.jobs);
        for (rank, job) in jobs {
            if job.cancel.is_cancelled() {
                ended.0.push(job);
            } else {
                self.jobs.push_back((rank, job));
            }
        }
        self.dropped += (ended.0.len() - before) as u64;
    }
}

/// Requests that were cancelled before they got a slot. They are told so when this is dropped, which
/// must not be under the lock of the queue: whoever is woken may submit the next.
#[derive(Default)]
struct Ended(Vec<Job>);

impl Drop for Ended {
    fn drop(&mut self) {
        for job in &self.0 {
            job.span.finish(FinishReason::Cancelled, &RequestUsage::default());
            job.events.send(Event::cancelled(job.submitted.elapsed()));
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::engine::channel::{Receiver, channel};

    pub(in crate::engine) fn job(priority: i32) -> (Job, Receiver<Event>) {
        let (events, receiver) = channel();
        let job = Job {
            prompt: vec![1],
            options: GenerateOptions::default(),
            priority,
            keep_at: Vec::new(),
            events,
            cancel: CancelToken::new(),
            submitted: Instant::now(),
            span: RequestSpan::new(1, &GenerateOptions::default(), priority),
            bytes: 0,
        };
        (job, receiver)
    }

    fn take_one(shared: &Shared) -> i32 {
        let mut free = 1;
        let fits = |_: &Job| std::mem::take(&mut free) == 1;
        shared.take(true, EngineStats::default(), fits).unwrap()[0].priority
    }

    #[test]
    fn a_higher_priority_goes_first_and_equals_as_they_came() {
        let shared = Shared::new(100);
        let priorities = [0, 3, -1, 3, 1, 0, i32::MAX, i32::MIN];
        let heard = priorities.map(job).map(|(job, receiver)| {
            shared.push(job).unwrap();
            receiver
        });
        let order: Vec<i32> = heard.iter().map(|_| take_one(&shared)).collect();
        assert_eq!(order, [i32::MAX, 3, 3, 1, 0, 0, -1, i32::MIN]);
    }

    /// However many requests of a higher priority come, those before it are counted.
    #[test]
    fn a_wait_is_bounded() {
        for above in [1, 2, 10] {
            let shared = Shared::new(10_000);
            let mut heard = Vec::new();
            let mut push = |priority| {
                let (job, receiver) = job(priority);
                shared.push(job).unwrap();
                heard.push(receiver);
            };
            push(-3);
            let mut overtaken = 0;
            loop {
                // Two come for each that goes: the queue only grows.
                push(above - 3);
                push(above - 3);
                if take_one(&shared) == -3 {
                    break;
                }
                overtaken += 1;
                assert!(overtaken < 2000, "{above}");
            }
            assert_eq!(overtaken, HEAD_START * i64::from(above) - 1, "{above}");
        }
    }
}
