//! The threads that share the operators of a step.
//!
//! An operator of a small model takes a few microseconds: less than it takes to wake a thread. So
//! the threads of the rayon pool are asked for once a step, and look out for work until it ends. The
//! thread that runs the step needs none of them: it does whatever no other has taken, and waits
//! only for what one is doing. On a pool of one thread, or a busy one, it does everything itself.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// How long helpers look out for the next step, while nobody else runs one: as long as it takes to choose a
/// token, and to tell it.
const GRACE: Duration = Duration::from_millis(1);
/// The same in a pool whose threads may have other things to do: the one that the step runs in.
const GRACE_OF_GUESTS: Duration = Duration::from_micros(100);
/// Bits of a ticket for the number of tasks, and for that of the next.
const BITS: u32 = 20;

/// Steps that are being run, in whatever pool.
static LEADERS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Outside) };
    static TEAM: Arc<Team> = Arc::new(Team::default());
}

/// What this thread is doing.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// Nothing of ours.
    Outside,
    /// It runs a step.
    Leading,
    /// It runs a task, and shares nothing further.
    Task,
}

/// Work of one thread that others help with.
#[derive(Default)]
struct Team {
    /// Number of the region, its number of tasks, and the next task to be taken.
    ticket: AtomicU64,
    /// What to do: a function, and what it is called with beside the number of the task.
    call: AtomicPtr<()>,
    data: AtomicPtr<()>,
    /// Tasks of the region that are done.
    done: AtomicUsize,
    /// Helpers that were asked for and have not left.
    helpers: AtomicUsize,
    /// Threads that the step runs on, or the last one did.
    threads: AtomicUsize,
    /// Whether a step is being run.
    open: AtomicBool,
    panicked: AtomicBool,
}

/// Runs `f`, a step: what it [`run`]s is shared with the threads of the current rayon pool.
pub(crate) fn lead<R>(f: impl FnOnce() -> R) -> R {
    lead_on(None, f)
}

/// [`lead`] with the threads of this pool, if there is one.
pub(crate) fn lead_on<R>(pool: Option<&ThreadPool>, f: impl FnOnce() -> R) -> R {
    if PLACE.get() != Place::Outside {
        return f();
    }
    struct End(Arc<Team>);
    impl Drop for End {
        fn drop(&mut self) {
            LEADERS.fetch_sub(1, Ordering::Relaxed);
            self.0.open.store(false, Ordering::Relaxed);
            PLACE.set(Place::Outside);
        }
    }
    let team = TEAM.with(Arc::clone);
    // Before this is a leader: helpers that see one look whether it is theirs.
    team.open.store(true, Ordering::Relaxed);
    let leaders = LEADERS.fetch_add(1, Ordering::Release) + 1;
    let end = End(team);
    PLACE.set(Place::Leading);
    let team = &end.0;
    let pool = match pool {
        Some(_) => pool,
        None => shared(),
    };
    let threads = size(pool);
    team.threads.store(threads, Ordering::Relaxed);
    for _ in team.helpers.load(Ordering::Relaxed)..threads.saturating_sub(leaders) {
        team.helpers.fetch_add(1, Ordering::Relaxed);
        let team = Arc::clone(team);
        let grace = if pool.is_some() { GRACE } else { GRACE_OF_GUESTS };
        let help = move || team.help(grace);
        match pool {
            Some(pool) => pool.spawn(help),
            None => rayon::spawn(help),
        }
    }
    f()
}

fn size(pool: Option<&ThreadPool>) -> usize {
    pool.map_or_else(rayon::current_num_threads, ThreadPool::current_num_threads)
}

/// How many threads share what is [`run`] here at most.
pub(crate) fn members() -> usize {
    match PLACE.get() {
        Place::Outside => size(shared()),
        Place::Leading => TEAM.with(|team| team.threads.load(Ordering::Relaxed)),
        Place::Task => 1,
    }
}

/// The pool of all backends, for a thread that is of no pool: nobody else's tasks wait there.
fn shared() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return None;
    }
    let build = || {
        let asked = std::env::var("RAYON_NUM_THREADS").ok();
        let cores = std::thread::available_parallelism().map_or(16, NonZeroUsize::get);
        let threads = threads(asked.as_deref(), cores);
        let name = |index| format!("jamba-cpu-{index}");
        ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()
    };
    POOL.get_or_init(build).as_ref()
}

/// As many threads as are asked for, but four a core at most: each step would wait for more. 0 leaves it to
/// rayon.
fn threads(asked: Option<&str>, cores: usize) -> usize {
    asked.and_then(|n| n.parse().ok()).unwrap_or(0).min(4 * cores)
}

/// Calls `f` with every number below `tasks`: on several threads inside of [`lead`], on this one
/// otherwise.
pub(crate) fn run<F: Fn(usize) + Sync>(tasks: usize, f: F) {
    if !(2..1 << BITS).contains(&tasks) || PLACE.get() != Place::Leading {
        return (0..tasks).for_each(f);
    }
    TEAM.with(|team| team.run(tasks, &f));
}

impl Team {
    fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: &F) {
        /// # Safety
        /// `f` must point to an F.
        unsafe fn call<F: Fn(usize)>(f: *const (), task: usize) {
            // SAFETY: the caller's.
            unsafe { (*f.cast::<F>())(task) }
        }
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                PLACE.set(Place::Leading);
            }
        }
        PLACE.set(Place::Task);
        let _back = Back;
        // No task of an earlier region is left, so nobody calls what these are.
        self.call.store(call::<F> as *mut (), Ordering::Relaxed);
        self.data.store(std::ptr::from_ref(f).cast_mut().cast(), Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        let region = (self.ticket.load(Ordering::Relaxed) >> (2 * BITS)) + 1;
        self.ticket.store((region << BITS | tasks as u64) << BITS, Ordering::Release);
        while self.take() {}
        let mut spins = 0u32;
        while self.done.load(Ordering::Acquire) < tasks {
            wait(&mut spins);
        }
        assert!(!self.panicked.swap(false, Ordering::Relaxed), "a task of a step panicked");
    }

    /// Does the next task, if there is one.
    fn take(&self) -> bool {
        const MASK: u64 = (1 << BITS) - 1;
        let ticket = self.ticket.load(Ordering::Acquire);
        let (next, tasks) = (ticket & MASK, ticket >> BITS & MASK);
        if next >= tasks {
            return false;
        }
        let (call, data) = (self.call.load(Ordering::Relaxed), self.data.load(Ordering::Relaxed));
        let taken = self.ticket.compare_exchange_weak(
            ticket,
            ticket + 1,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if taken.is_err() {
            return true;
        }
        // SAFETY: `call` was made from a function of this type.
        let call = unsafe { std::mem::transmute::<*mut (), unsafe fn(*const (), usize)>(call) };
        // The task was taken, so the region was not over when these two were read, nor is it before
        // `done` says so: they are its own, and the function lives.
        // SAFETY: hence `data` is what `call` takes.
        let call = || unsafe { call(data, next as usize) };
        if catch_unwind(AssertUnwindSafe(call)).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }

    fn help(&self, grace: Duration) {
        PLACE.set(Place::Task);
        let (mut since, mut spins) = (Instant::now(), 0u32);
        loop {
            if self.take() {
                spins = 0;
            } else {
                wait(&mut spins);
                if spins.is_multiple_of(32) {
                    let is_any_led = LEADERS.load(Ordering::Acquire) > 0;
                    if self.open.load(Ordering::Relaxed) {
                        since = Instant::now();
                    } else if is_any_led || since.elapsed() > grace {
                        break;
                    }
                }
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
        PLACE.set(Place::Outside);
    }
}

/// Waits a moment; every now and then it lets other threads run.
fn wait(spins: &mut u32) {
    *spins = spins.wrapping_add(1);
    if spins.is_multiple_of(1024) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_those_asked_for_up_to_four_a_core() {
        let asked = [None, Some(""), Some("many"), Some("0"), Some("1"), Some("8"), Some("10000")];
        assert_eq!(asked.map(|asked| threads(asked, 2)), [0, 0, 0, 0, 1, 8, 8]);
    }

    #[test]
    fn every_task_is_done_once_before_a_region_ends() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| {
            for step in 0..if cfg!(miri) { 5 } else { 200 } {
                lead(|| {
                    for tasks in [1, 2, 3, 17, step] {
                        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        run(tasks, |task| {
                            counts[task].fetch_add(1, Ordering::Relaxed);
                            // A region in a task is no region.
                            run(2, |_| _ = counts[task].fetch_add(1, Ordering::Relaxed));
                        });
                        assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 3));
                    }
                });
            }
        });
    }

    #[test]
    fn several_steps_share_a_pool() {
        const STEPS: usize = if cfg!(miri) { 3 } else { 100 };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..STEPS {
                            lead(|| run(10, |n| _ = total.fetch_add(n, Ordering::Relaxed)));
                        }
                    });
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * STEPS * 45);
    }

    #[test]
    fn a_panic_in_a_task_comes_to_the_step() {
        let result = catch_unwind(|| lead(|| run(8, |task| assert!(task != 5, "five"))));
        assert!(result.is_err());
        lead(|| run(8, |_| ()));
    }
}
