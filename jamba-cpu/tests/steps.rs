//! A step allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use jamba_core::{Batch, Limits, Model, ModelRunner, Outputs, Precision, Runner, WeightFormat};
use jamba_cpu::CpuBackend;

/// Counts allocations of all threads.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's, with the arguments as they came.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of a step.
fn count(runner: &mut impl Runner, batch: &Batch) -> usize {
    let before = COUNT.load(Ordering::Relaxed);
    runner.step(batch).unwrap();
    COUNT.load(Ordering::Relaxed) - before
}

/// A prompt of 12 tokens, and then a token for it and one for another sequence.
fn batches() -> [Batch; 2] {
    let prompt: Vec<u32> = (5..17).collect();
    let mut tokens = Batch::single(0, 12, &[7], Outputs::Last);
    tokens.push(1, 0, &[9], Outputs::Last);
    [Batch::single(0, 0, &prompt, Outputs::Last), tokens]
}

fn runner(backend: CpuBackend) -> ModelRunner<CpuBackend> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m");
    let model = Model::load(folder, backend).unwrap();
    ModelRunner::new(model, Limits { slots: 2, context: 64, tokens: 12, outputs: 2 }).unwrap()
}

/// Every instruction set and format, after steps of the same sizes: on a pool of one thread, where
/// none has to be asked to help, never; on two threads, where a helper that has given up waiting is
/// asked for again, not while it is there.
#[test]
fn a_step_allocates_nothing() {
    let pool = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // A thread allocates when it starts, which may be later.
        pool.broadcast(|_| {});
        pool
    };
    let (one, two) = (pool(1), pool(2));
    for backend in CpuBackend::all() {
        for precision in [Precision::Bf16, Precision::F32] {
            for format in WeightFormat::ALL {
                let backend = backend.clone().with_precision(precision).with_format(format);
                let mut runner = runner(backend.clone());
                let mut steps = |times: usize| {
                    let mut counts = [[0; 2]; 2];
                    for n in 0..times {
                        for slot in 0..2 {
                            runner.reset(slot).unwrap();
                        }
                        counts[n % 2] = batches().each_ref().map(|b| count(&mut runner, b));
                    }
                    counts
                };
                let name = format!("{} {precision} {format}", backend.isa());
                one.install(|| {
                    steps(1);
                    assert_eq!(steps(2), [[0; 2]; 2], "{name}");
                });
                let quiet = two.install(|| (0..50).any(|_| steps(2)[1] == [0; 2]));
                assert!(quiet, "{name} on two threads");
            }
        }
    }
}
