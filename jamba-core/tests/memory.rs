//! What is said of memory before a state is made is what it then takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use jamba_core::weights::ParamSpec;
use jamba_core::{
    Backend, Config, Engine, EngineOptions, Error, GenerateOptions, LanguageModel, Limits, Model,
    Need, Param, ParamSource, Request, SessionOptions, WeightFormat, memory,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};

/// Counts the bytes that are allocated and not yet freed.
struct Counting;

static HELD: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is the system allocator's, with the arguments as they came.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: the count is of the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes that `make` leaves allocated.
fn taken<T>(make: impl Fn() -> T) -> u64 {
    // The harness starts threads meanwhile: what most of three times say is it.
    let mut taken = [0; 3].map(|_| {
        let before = HELD.load(Ordering::Relaxed);
        let made = make();
        let after = HELD.load(Ordering::Relaxed);
        drop(made);
        after.saturating_sub(before)
    });
    taken.sort_unstable();
    taken[1]
}

fn check<B: Backend>(backend: &B, config: &Config, limits: Limits) {
    let said = limits.slots as u64 * backend.sequence_bytes(config, limits.context);
    let took = taken(|| backend.new_state(config, &limits).unwrap());
    // The list of the layers, and what each is known by.
    let lists = 400 * config.num_hidden_layers as u64;
    assert!((said..=said + lists).contains(&took), "{}: said {said}, took {took}", backend.name());
}

#[test]
fn a_state_takes_what_was_said() {
    let _alone = ALONE.lock().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden");
    let small = ["paper-block", "odd-shapes", "pure-attention", "pure-mamba"];
    let mut configs: Vec<_> =
        small.iter().map(|name| Config::from_folder(golden.join(name)).unwrap()).collect();
    configs.extend(["jamba-tales-11m", "jamba-reasoning-3b"].map(|n| Config::preset(n).unwrap()));
    for config in &configs {
        for (slots, context) in [(1, 1), (3, 129), (8, 1000)] {
            let limits = Limits { slots, context, tokens: 4, outputs: 1 };
            check(&CpuBackend::new(), config, limits);
            check(&ReferenceBackend::default(), config, limits);
        }
        // Channels are padded: no less than the configuration alone says, and not much more.
        let said = CpuBackend::new().sequence_bytes(config, 100);
        let plain = memory::sequence_bytes(config, 100, 4);
        assert!(said >= plain && said < 2 * plain, "{said} {plain}");
    }
}

/// Nobody asks it for anything.
struct Untouched;

impl ParamSource for Untouched {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        panic!("{} is loaded", spec.name)
    }
}

/// What the machine has no room for is refused before anything of it is loaded or allocated.
#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_is_refused_beforehand() {
    let _alone = ALONE.lock().unwrap();
    let refused = |error: Option<Error>, what: &str| match error {
        Some(Error::Memory { bytes, available: Some(free), what: got }) => {
            assert!(bytes > free && got.contains(what), "{got}: {bytes} of {free}");
        }
        other => panic!("{other:?}"),
    };
    let mut config = Config::preset("jamba-tales-11m").unwrap();
    (config.vocab_size, config.hidden_size, config.num_hidden_layers) = (1 << 24, 1 << 18, 1);
    config.num_attention_heads = 1 << 8;
    let limits = Limits { slots: 1, context: 1, tokens: 1, outputs: 1 };
    let quantised = CpuBackend::new().with_format(WeightFormat::Int4);
    refused(Model::new(config.clone(), &Untouched, quantised).err(), "weights");
    refused(Model::new(config.clone(), &Untouched, ReferenceBackend::new()).err(), "weights");
    // As they are stored they are mapped; only some tables are not.
    CpuBackend::new().check_memory(&config, Need::Weights { mapped: true }).unwrap();
    refused(Model::new(config.clone(), &Untouched, CpuBackend::new()).err(), "weights");
    CpuBackend::new().check_memory(&config, Need::Runner(&limits)).unwrap();

    let config = Config::preset("jamba-tales-11m").unwrap();
    let free = memory::available().unwrap();
    let context = (2 * free / memory::kv_bytes_per_token(&config, 4)) as usize;
    let before = HELD.load(Ordering::Relaxed);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m");
    let model = Model::load(folder, CpuBackend::new()).unwrap();
    let options = SessionOptions { context, ..SessionOptions::default() };
    refused(model.session(options).err(), "states");
    let chunk = (free / 256) as usize;
    let options = SessionOptions { context: chunk, chunk, ..SessionOptions::default() };
    refused(model.session(options).err(), "states");
    drop(model);
    assert!(HELD.load(Ordering::Relaxed) < before + (1 << 20));
}

/// Thousands of short requests, read, cancelled or dropped, leave nothing behind: of what an engine
/// holds nothing grows, and without it all is as before.
#[test]
fn requests_leave_nothing_behind() {
    let _alone = ALONE.lock().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/pure-mamba");
    let model = Model::load(folder, CpuBackend::new()).unwrap();
    let round = |engine: &Engine, requests: u32| {
        let mut streams = Vec::new();
        for i in 0..requests {
            let max_tokens = i as usize % 7;
            let options = GenerateOptions { max_tokens, ..GenerateOptions::default() };
            let prompt = vec![5 + i % 90, 5 + i / 90 % 90, 6];
            let mut stream = engine.submit(Request::new(prompt, options)).unwrap();
            match i % 5 {
                0 => drop(stream),
                1 => {
                    let _ = stream.next();
                    stream.cancel();
                    streams.push(stream);
                }
                _ => streams.push(stream),
            }
        }
        streams.into_iter().for_each(|stream| drop(stream.collect_all().unwrap()));
    };
    let options = EngineOptions {
        slots: 8,
        context: 32,
        step_tokens: 32,
        queue: 10_000,
        prefix_cache: 1 << 16,
        memory: None,
    };
    // The first engine starts threads, which stay.
    let warm = Engine::ids_only(&model, options).unwrap();
    round(&warm, 500);
    warm.shutdown();
    drop(warm);
    let before = HELD.load(Ordering::Relaxed);
    let engine = Engine::ids_only(&model, options).unwrap();
    round(&engine, 1000);
    let level = HELD.load(Ordering::Relaxed);
    for _ in 0..4 {
        round(&engine, 2500);
    }
    let later = HELD.load(Ordering::Relaxed);
    engine.shutdown();
    let stats = engine.stats();
    assert_eq!((stats.finished + stats.cancelled, stats.failed), (11_000, 0), "{stats:?}");
    drop(engine);
    let after = HELD.load(Ordering::Relaxed);
    println!("{before} bytes before, {level} at work, {later} later, {after} after");
    // Queues and caches grow to their size: less than a byte for each request may be left.
    assert!(later < level + (1 << 17), "{level} bytes became {later}");
    assert!(after < before + 10_000, "{before} bytes became {after}");
}

/// A thousand sessions at the same time, some forked, some saved to a value and put back: each is as
/// the first of its tokens, and when all are gone, so is what they took.
#[test]
fn a_thousand_sessions_leave_nothing_behind() {
    let _alone = ALONE.lock().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/tiny");
    let model = Model::load(folder, CpuBackend::new()).unwrap();
    let options = SessionOptions { context: 32, ..SessionOptions::default() };
    let round = |sessions: u32| {
        let make = |i: u32| {
            let mut session = model.session(options).unwrap();
            session.append(&[5 + i % 10, 6, 7]).unwrap();
            if i.is_multiple_of(3) {
                session = session.fork().unwrap();
            }
            session
        };
        let mut all: Vec<_> = (0..sessions).map(make).collect();
        let mut expected = Vec::new();
        for (i, session) in all.iter_mut().enumerate() {
            let before = session.snapshot().unwrap();
            session.append(&[8, 9]).unwrap();
            session.restore(&before).unwrap();
            let logits = session.append(&[10]).unwrap().to_vec();
            if i < 10 {
                expected.push(logits);
            } else {
                assert_eq!(logits, expected[i % 10], "session {i}");
            }
        }
    };
    round(20);
    let before = HELD.load(Ordering::Relaxed);
    round(1000);
    let after = HELD.load(Ordering::Relaxed);
    println!("{before} bytes before, {after} after");
    // Queues of threads grow to their size: of a session less than 50 bytes may be left.
    assert!(after < before + 50_000, "{before} bytes became {after}");
}
