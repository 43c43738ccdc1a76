//! Whatever a client, a reader or a backend does: the others are served, and everybody hears of the
//! end.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use jamba_core::{
    Backend, Checkpoint, Config, Engine, EngineOptions, Error, FinishReason, GenerateOptions,
    Model, Request, Result, Sampling, Scratch, Streams, delegate_backend, weights::Weights,
};
use jamba_cpu::CpuBackend;

use crate::support::{SMALL, alone, endless, folder, golden, options, same, tokenizer};

/// The CPU backend, with something before every step, which is told its number.
struct Scripted {
    cpu: CpuBackend,
    before: Box<dyn Fn(usize) -> Result<()> + Send + Sync>,
    steps: AtomicUsize,
    /// Tokens of each step.
    sizes: Arc<Mutex<Vec<usize>>>,
}

impl Backend for Scripted {
    type Tensor = <CpuBackend as Backend>::Tensor;
    type Weight = <CpuBackend as Backend>::Weight;
    type State = <CpuBackend as Backend>::State;

    delegate_backend!(|this| this.cpu; operators);

    fn forward(
        &self,
        config: &Config,
        weights: &Weights<Self::Weight>,
        scratch: &mut Scratch<Self::Tensor>,
        state: &mut Self::State,
    ) -> Result<()> {
        (self.before)(self.steps.fetch_add(1, Ordering::Relaxed))?;
        self.cpu.forward(config, weights, scratch, state)?;
        self.sizes.lock().unwrap().push(self.shape(&scratch.hidden)[0]);
        Ok(())
    }
}

type Sizes = Arc<Mutex<Vec<usize>>>;

fn scripted(
    name: &str,
    before: impl Fn(usize) -> Result<()> + Send + Sync + 'static,
) -> (Model<Scripted>, Sizes) {
    let sizes = Sizes::default();
    let (steps, before) = (AtomicUsize::new(0), Box::new(before));
    let backend = Scripted { cpu: CpuBackend::new(), before, steps, sizes: sizes.clone() };
    let config = Config::from_folder(folder(name)).unwrap();
    let checkpoint = Checkpoint::open(folder(name)).unwrap();
    (Model::new(config, &checkpoint, backend).unwrap(), sizes)
}

/// A model whose first step waits until it is let go.
fn held(name: &str) -> (Model<Scripted>, Arc<AtomicBool>) {
    let go = Arc::new(AtomicBool::new(false));
    let let_go = go.clone();
    let (model, _) = scripted(name, move |step| {
        while step == 0 && !let_go.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(())
    });
    (model, go)
}

fn requests(n: u32, max_tokens: usize) -> Vec<Request> {
    let of = |i| {
        let options = GenerateOptions { ignore_eos: true, ..options(i, max_tokens) };
        Request::new(vec![4, 5, 6 + i as u32], options)
    };
    (0..n.into()).map(of).collect()
}

/// Runs `f` on another thread and fails if it does not return.
fn returns(f: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(f);
    let start = Instant::now();
    while !thread.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(20), "it hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().unwrap();
}

#[test]
fn a_step_that_fails_fails_those_who_are_in_it() {
    let (model, _) = scripted("paper-block", |step| match step {
        5 => Err(Error::Unsupported { backend: "scripted", what: "step 5".into() }),
        _ => Ok(()),
    });
    let options_of = EngineOptions { slots: 2, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let requests = requests(6, 12);
    let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let plain = golden("paper-block");
    let mut failed = 0;
    for (stream, request) in streams.into_iter().zip(&requests) {
        match stream.collect_all() {
            Err(Error::Step { source }) => {
                assert!(source.to_string().contains("step 5"));
                failed += 1;
            }
            result => same(&result.unwrap(), &alone(&plain, SMALL.context, request)),
        }
    }
    assert!((1..=2).contains(&failed), "{failed}");
    engine.shutdown();
    let stats = engine.stats();
    assert_eq!((stats.failed, stats.finished, stats.running), (failed, 6 - failed, 0));
}

#[test]
fn a_backend_that_panics_leaves_nobody_waiting() {
    returns(|| {
        let (model, _) = scripted("paper-block", |step| {
            assert!(step != 5, "this is part of the test");
            Ok(())
        });
        let options_of = EngineOptions { slots: 2, ..SMALL };
        let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
        // Some run, some wait.
        let streams: Vec<_> =
            requests(6, 12).into_iter().map(|r| engine.submit(r).unwrap()).collect();
        for stream in streams {
            assert!(matches!(stream.collect_all(), Err(Error::EngineStopped)));
        }
        engine.shutdown();
        assert!(!engine.is_running());
        let refused = engine.submit(Request::new(vec![4], options(1, 1)));
        assert!(matches!(refused, Err(Error::EngineStopped)));
    });
}

/// What it does is done on the engine's thread.
struct Call<F>(F);

impl<F: Fn() + Send + Sync + 'static> Wake for Call<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
}

#[test]
fn a_waker_that_panics_is_no_reason_to_end() {
    let (model, go) = held("pure-mamba");
    let engine = Engine::new(&model, &tokenizer(), EngineOptions { slots: 1, ..SMALL }).unwrap();
    let called = Arc::new(AtomicUsize::new(0));
    let count = called.clone();
    let waker = Waker::from(Arc::new(Call(move || {
        count.fetch_add(1, Ordering::Relaxed);
        panic!("this is part of the test");
    })));
    let [first, second] = &requests(2, 40)[..] else { panic!() };
    let mut stream = engine.submit(first.clone()).unwrap();
    assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_pending());
    go.store(true, Ordering::Relaxed);
    let start = Instant::now();
    while called.load(Ordering::Relaxed) == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "it was never woken");
    }
    let other = engine.submit(second.clone()).unwrap();
    same(&other.collect_all().unwrap(), &alone(&model, SMALL.context, second));
    assert!(stream.collect_all().unwrap().finish_reason.is_some());
}

#[test]
fn an_engine_can_be_shut_down_from_anywhere() {
    returns(|| {
        let (model, go) = held("pure-mamba");
        let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
        let end = engine.clone();
        let waker = Waker::from(Arc::new(Call(move || end.shutdown())));
        let mut stream = engine.submit(requests(1, 30).remove(0)).unwrap();
        assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_pending());
        go.store(true, Ordering::Relaxed);
        // Everybody who shuts it down waits for the end.
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    engine.shutdown();
                    assert_eq!(engine.stats().running, 0);
                });
            }
        });
        assert_eq!(stream.by_ref().filter(|piece| piece.is_err()).count(), 0);
        assert_eq!(stream.finish_reason(), Some(FinishReason::Length));
    });
}

#[test]
fn a_reader_that_does_not_read_holds_nobody_up() {
    let model = golden("paper-block");
    let engine = Engine::new(&model, &tokenizer(), EngineOptions { slots: 2, ..SMALL }).unwrap();
    let requests = requests(9, 50);
    let unread = engine.submit(requests[0].clone()).unwrap();
    for request in &requests[1..] {
        let completion = engine.submit(request.clone()).unwrap().collect_all().unwrap();
        same(&completion, &alone(&model, SMALL.context, request));
    }
    engine.shutdown();
    assert_eq!(engine.stats().finished, 9);
    same(&unread.collect_all().unwrap(), &alone(&model, SMALL.context, &requests[0]));
}

/// While prompts are read, a running stream gets a token of every step, and no step is larger than
/// was said.
#[test]
fn a_stream_does_not_stall_while_prompts_are_read() {
    let (model, sizes) = scripted("pure-mamba", |_| Ok(()));
    let options_of =
        EngineOptions { slots: 4, context: 4096, step_tokens: 32, prefix_cache: 0, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut running = engine.submit(Request::new(vec![4], endless(3))).unwrap();
    assert!(matches!(running.next(), Some(Ok(_))));
    let mut reading = Streams::new();
    for i in 0..6 {
        reading.push(engine.submit(Request::new(vec![5 + i; 1500], options(1, 1))).unwrap());
    }
    let read: Vec<_> = reading.collect();
    running.cancel();
    let pieces = 1 + running.filter(|piece| piece.as_ref().unwrap().id.is_some()).count();
    engine.shutdown();
    let sizes = sizes.lock().unwrap();
    assert_eq!(read.len(), 12, "a token and an end each");
    assert_eq!(pieces, sizes.len(), "a token of every step");
    assert!(sizes.iter().all(|size| *size <= 32), "{sizes:?}");
    // All but the token of the stream is of prompts, as long as there are any.
    assert!(sizes.iter().filter(|size| **size == 32).count() >= 6 * 1500 / 32, "{sizes:?}");
}

#[test]
fn options_that_no_machine_has_room_for() {
    let model = golden("paper-block");
    let huge = usize::MAX;
    for options in [
        EngineOptions { slots: huge, ..SMALL },
        EngineOptions { context: huge, ..SMALL },
        EngineOptions { step_tokens: huge, ..SMALL },
        EngineOptions { slots: huge, context: huge, step_tokens: huge, queue: huge, ..SMALL },
        EngineOptions { slots: 0, ..SMALL },
        EngineOptions { queue: 0, ..SMALL },
        EngineOptions { memory: Some(0), ..SMALL },
    ] {
        assert!(Engine::new(&model, &tokenizer(), options).is_err(), "{options:?}");
    }
    let engine = Engine::new(&model, &tokenizer(), EngineOptions { queue: huge, ..SMALL }).unwrap();
    let submit = |request: Request| engine.submit(request).unwrap().collect_all().unwrap();
    // The whole context is the prompt; nothing is to be generated; more than fits is.
    let all = |max_tokens| Request::new(vec![4; SMALL.context], options(1, max_tokens));
    assert_eq!(submit(all(9)).finish_reason, Some(FinishReason::Context));
    let none = submit(Request { keep_at: vec![0, 7, 7, huge], ..all(0) });
    assert_eq!((none.ids.len(), none.finish_reason), (0, Some(FinishReason::Length)));
    assert_eq!(none.usage.prompt_tokens, SMALL.context);
    let long = submit(Request::new(vec![4], GenerateOptions { max_tokens: huge, ..endless(1) }));
    assert_eq!((long.ids.len(), long.finish_reason), (64, Some(FinishReason::Context)));
    let empty = submit(Request::new(Vec::new(), options(1, 3)));
    assert_eq!(empty.usage.prompt_tokens, 1, "the model's beginning-of-text token");
    let everything =
        GenerateOptions { logprobs: huge, prompt_logprobs: Some(huge), ..options(1, 3) };
    let scored = submit(Request::new(vec![4, 5, 6], everything));
    assert_eq!(scored.prompt_logprobs[0].top.len(), model.config().vocab_size);
    let nothing = Sampling { logit_bias: vec![(4, f32::NEG_INFINITY)], ..Sampling::default() };
    submit(Request::new(vec![4], GenerateOptions { sampling: nothing, ..options(1, 3) }));
}
