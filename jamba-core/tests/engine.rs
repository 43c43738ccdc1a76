//! The engine: many requests give what each gives alone, and leave nothing behind.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use jamba_core::{
    Arrival, Completion, Engine, EngineOptions, Error, FinishReason, GenerateOptions, Generator,
    LanguageModel, Model, Request, Sampling, Scored, SessionOptions, Streams, Tokenizer,
    generate_ids,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

fn golden(name: &str) -> Model<CpuBackend> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden").join(name);
    Model::load(folder, CpuBackend::new()).unwrap()
}

/// The small models have no tokenizer: the first of the demo model's tokens are theirs.
fn tokenizer() -> Tokenizer {
    static SMALL: OnceLock<Tokenizer> = OnceLock::new();
    SMALL.get_or_init(|| small_tokenizer(101)).clone()
}

fn small_tokenizer(vocab_size: u64) -> Tokenizer {
    let bytes = std::fs::read(demo().join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < vocab_size);
    let vocab = vocab.clone();
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.retain(|pair| {
        let text = |part: &serde_json::Value| part.as_str().unwrap().to_owned();
        let [a, b] = match pair {
            serde_json::Value::Array(pair) => [text(&pair[0]), text(&pair[1])],
            pair => text(pair).split_once(' ').map(|(a, b)| [a.into(), b.into()]).unwrap(),
        };
        [&a, &b, &(a.clone() + &b)].iter().all(|part| vocab.contains_key(*part))
    });
    let folder = tempfile::TempDir::new().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

const SMALL: EngineOptions = EngineOptions {
    slots: 8,
    context: 64,
    step_tokens: 32,
    queue: 4096,
    prefix_cache: 1 << 20,
    memory: None,
};

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| 3 + self.below(90) as u32).collect()
    }
}

fn options(seed: u64, max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling { temperature: 1.1, top_p: 0.95, seed, ..Sampling::default() };
    GenerateOptions { sampling, max_tokens, ..GenerateOptions::default() }
}

/// What the request gives alone.
fn alone(model: &dyn LanguageModel, context: usize, request: &Request) -> jamba_core::Generation {
    alone_with(model, &tokenizer(), context, request)
}

fn alone_with(
    model: &dyn LanguageModel,
    tokenizer: &Tokenizer,
    context: usize,
    request: &Request,
) -> jamba_core::Generation {
    let options = SessionOptions { context, chunk: context, outputs: context };
    let mut session = model.session(options).unwrap();
    generate_ids(&mut session, tokenizer, &request.prompt, request.options.clone()).unwrap()
}

fn bits(logprobs: &[f32]) -> Vec<u32> {
    logprobs.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
fn same(got: &Completion, alone: &jamba_core::Generation) {
    assert_eq!(got.ids, alone.ids);
    assert_eq!(bits(&got.logprobs), bits(&alone.logprobs));
    assert_eq!(got.text, alone.text);
    assert_eq!(got.finish_reason, Some(alone.finish_reason));
    assert_eq!(got.top_logprobs, alone.top_logprobs);
    assert_eq!(got.prompt_logprobs, alone.prompt_logprobs);
    assert_eq!(got.usage.prompt_tokens, alone.prompt_ids.len());
    assert_eq!(got.usage.generated_tokens, alone.ids.len());
}

#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}

#[cfg(not(target_os = "linux"))]
fn resident_bytes() -> usize {
    0
}

/// Random requests, some cancelled, some dropped, from four threads.
fn soak(model: &dyn LanguageModel, engine: &Engine, requests: usize, seed: u64) {
    let mut random = Random(seed);
    let shared = random.ids(40);
    let plans: Vec<(Request, usize)> = (0..requests)
        .map(|i| {
            let common = random.below(40);
            let own = 1 + random.below(12);
            let prompt = [&shared[..common], &random.ids(own)].concat();
            let options = options(i as u64, random.below(24));
            let request =
                Request { priority: random.below(3) as i32, ..Request::new(prompt, options) };
            (request, random.below(6))
        })
        .collect();
    let completions = Mutex::new(HashMap::new());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (plans, completions) = (&plans, &completions);
            scope.spawn(move || {
                let mut streams = Vec::new();
                for (i, (request, fate)) in
                    plans.iter().enumerate().filter(|(i, _)| i % 4 == thread)
                {
                    let mut stream = engine.submit(request.clone()).unwrap();
                    match fate {
                        // Dropped at once, cancelled after some pieces, or read to the end.
                        0 => drop(stream),
                        1 => {
                            let heard = stream.by_ref().take(i % 5).count();
                            stream.cancel();
                            assert!(heard <= 5);
                            streams.push((i, true, stream));
                        }
                        _ => streams.push((i, false, stream)),
                    }
                }
                for (i, cancelled, stream) in streams {
                    let completion = stream.collect_all().unwrap();
                    if !cancelled {
                        completions.lock().unwrap().insert(i, completion);
                    }
                }
            });
        }
    });
    let completions = completions.into_inner().unwrap();
    assert!(completions.len() > requests / 2);
    for (i, completion) in &completions {
        same(completion, &alone(model, SMALL.context, &plans[*i].0));
    }
}

#[test]
fn two_thousand_requests_through_eight_slots() {
    let model = golden("paper-block");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    // The first round brings memory to its level.
    soak(&model, &engine, 500, 1);
    let before = resident_bytes();
    soak(&model, &engine, 2000, 2);
    let grown = resident_bytes().saturating_sub(before);
    engine.shutdown();
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.failed), (0, 0, 0), "{stats:?}");
    assert_eq!(stats.finished + stats.cancelled, 2500, "{stats:?}");
    assert!(stats.prefix.hits > 500 && stats.prefix.evicted > 0, "{stats:?}");
    assert!(stats.prefix.bytes <= SMALL.prefix_cache, "{stats:?}");
    println!("{stats:?}; resident memory grew by {grown} bytes");
    assert!(grown < 64 << 20, "{grown} bytes");
}

#[test]
fn requests_are_as_alone_on_the_reference() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/odd-shapes");
    let model = Model::load(folder, ReferenceBackend::new()).unwrap();
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    soak(&model, &engine, 60, 5);
}

#[test]
fn the_prefix_cache_changes_nothing_but_speed() {
    let model = golden("reasoning-dense");
    let mut random = Random(9);
    let shared = random.ids(30);
    let requests: Vec<Request> = (0..60)
        .map(|i| {
            let cut = random.below(31);
            let own = 1 + random.below(8);
            let prompt = [&shared[..cut], &random.ids(own)].concat();
            Request { keep_at: vec![7], ..Request::new(prompt, options(i, 6)) }
        })
        .collect();
    let run = |prefix_cache: u64| {
        let options = EngineOptions { prefix_cache, ..SMALL };
        let engine = Engine::new(&model, &tokenizer(), options).unwrap();
        let all = requests.iter().map(|r| engine.submit(r.clone()).unwrap().collect_all().unwrap());
        let all: Vec<_> = all.map(|c| (c.ids, bits(&c.logprobs), c.text)).collect();
        engine.shutdown();
        (all, engine.stats().prefix)
    };
    let (off, none) = run(0);
    assert_eq!((none.hits, none.misses, none.bytes), (0, 0, 0));
    let (on, stats) = run(1 << 20);
    assert!(stats.hits > 30 && stats.hit_tokens > 400, "{stats:?}");
    assert!(on == off);
    let (small, stats) = run(60_000);
    assert!(stats.evicted > 0 && stats.bytes <= 60_000, "{stats:?}");
    assert!(small == off);
}

/// Of prompts that share a beginning of any length, only the rest is run.
#[test]
fn junctions_are_learnt_and_chosen() {
    let model = golden("paper-block");
    let engine =
        Engine::new(&model, &tokenizer(), EngineOptions { context: 400, ..SMALL }).unwrap();
    let mut random = Random(3);
    let shared = random.ids(203);
    let cached = |keep_at: Vec<usize>, random: &mut Random, shared: &[u32]| {
        let prompt = [shared, &random.ids(30)].concat();
        let request = Request { keep_at, ..Request::new(prompt, options(1, 1)) };
        engine.submit(request).unwrap().collect_all().unwrap().usage.cached_tokens
    };
    assert_eq!(cached(vec![], &mut random, &shared), 0);
    // 233 tokens, of which states are kept 16, 32, 64, ... before the end: 201 is the nearest.
    assert_eq!(cached(vec![], &mut random, &shared), 201);
    let other = random.ids(203);
    assert_eq!(cached(vec![203], &mut random, &other), 0);
    assert_eq!(cached(vec![], &mut random, &other), 203);
    // Prompts that part early: the second learns where, the third starts there.
    let early = random.ids(100);
    let long = |random: &mut Random| {
        let prompt = [&early[..], &random.ids(290)].concat();
        let request = Request::new(prompt, options(1, 1));
        engine.submit(request).unwrap().collect_all().unwrap().usage.cached_tokens
    };
    assert_eq!([long(&mut random), long(&mut random), long(&mut random)], [0, 0, 100]);
}

#[test]
fn the_second_of_two_prompts_that_share_2000_tokens() {
    let model = Model::load(demo(), CpuBackend::new()).unwrap();
    let options_of = EngineOptions { context: 2200, slots: 2, ..Default::default() };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut random = Random(11);
    let shared = random.ids(2000);
    let mut first_token = |tail: usize| {
        let prompt = [&shared[..], &random.ids(tail)].concat();
        let stream = engine.submit(Request::new(prompt, options(1, 2))).unwrap();
        stream.collect_all().unwrap().usage
    };
    let first = first_token(12);
    let second = first_token(12);
    let ratio = second.first_token_time.as_secs_f64() / first.first_token_time.as_secs_f64();
    println!(
        "first {:?}, second {:?} ({} of 2012 tokens cached): {:.2} %",
        first.first_token_time,
        second.first_token_time,
        second.cached_tokens,
        100.0 * ratio
    );
    assert_eq!(second.cached_tokens, 1996);
    assert!(ratio < 0.05, "{ratio}");
}

#[test]
fn logprobs_and_scores_are_those_of_a_session() {
    let model = Model::load(demo(), CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(demo()).unwrap();
    let engine = Engine::new(&model, &tokenizer, EngineOptions { context: 128, ..SMALL }).unwrap();
    let prompt = tokenizer.encode("The old woman looked at the fire and said that").unwrap();
    let options = GenerateOptions { logprobs: 3, prompt_logprobs: Some(2), ..options(4, 8) };
    let request = Request::new(prompt.clone(), options);
    let streams: Vec<_> = (0..3).map(|_| engine.submit(request.clone()).unwrap()).collect();
    let expected = alone_with(&model, &tokenizer, 128, &request);
    for stream in streams {
        same(&stream.collect_all().unwrap(), &expected);
    }
    assert_eq!(expected.prompt_logprobs.len(), prompt.len() - 1);
    for scored in &expected.prompt_logprobs {
        assert_eq!(scored.top.len(), 2);
        assert!(scored.top[0].logprob >= scored.logprob);
    }
    for (top, (id, logprob)) in
        expected.top_logprobs.iter().zip(expected.ids.iter().zip(&expected.logprobs))
    {
        assert_eq!(top.len(), 3);
        if let Some(found) = top.iter().find(|t| t.id == *id) {
            assert!((found.logprob - logprob).abs() < 1e-5);
        }
    }
    let session_options = SessionOptions { context: 128, chunk: 5, outputs: 5 };
    let mut session = model.session(session_options).unwrap();
    let scores: Vec<Scored> = session.score(&prompt[..1], &prompt[1..], 2).unwrap();
    assert_eq!(scores, expected.prompt_logprobs);
    assert!(matches!(session.score(&[], &[], 0), Err(Error::EmptyPrompt)));
    assert_eq!(session.score(&[], &prompt[1..3], 0).unwrap().len(), 2);
}

#[test]
fn requests_that_cannot_run_are_refused() {
    let model = golden("pure-mamba");
    let one = model.runner(jamba_core::Limits { slots: 1, context: 1, tokens: 1, outputs: 1 });
    let bytes = one.unwrap().sequence_bytes(64);
    let options_of = EngineOptions { memory: Some(2 * bytes), queue: 2, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    assert_eq!(engine.fits(10, 20), 2);
    assert_eq!(engine.fits(65, 1), 0);
    assert_eq!(engine.bytes(10, 1000), bytes);
    let refused = |prompt: Vec<u32>, options| engine.submit(Request::new(prompt, options)).err();
    assert!(matches!(refused(vec![160], options(0, 1)), Some(Error::Token { id: 160, .. })));
    assert!(matches!(refused(vec![4; 65], options(0, 1)), Some(Error::Context { .. })));
    let bad = GenerateOptions { stop: vec![String::new()], ..options(0, 1) };
    assert!(matches!(refused(vec![4], bad), Some(Error::Option { .. })));
    let tight = EngineOptions { memory: Some(100), ..SMALL };
    assert!(matches!(
        Engine::new(&model, &tokenizer(), tight),
        Err(Error::Budget { budget: 100, .. })
    ));

    // Two run, two wait, the fifth is refused.
    let long = || {
        let options = GenerateOptions { ignore_eos: true, ..options(3, 60) };
        engine.submit(Request::new(vec![4], options))
    };
    let mut streams = Vec::new();
    let full = (0..200).find_map(|_| match long() {
        Ok(stream) => {
            streams.push(stream);
            None
        }
        Err(error) => Some(error),
    });
    assert!(matches!(full, Some(Error::QueueFull { limit: 2 })));
    for stream in streams {
        assert_eq!(stream.collect_all().unwrap().ids.len(), 60);
    }
    engine.shutdown();
    assert!(matches!(long(), Err(Error::EngineStopped)));
}

#[test]
fn a_dropped_engine_finishes_what_it_accepted() {
    let model = golden("pure-mamba");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let streams: Vec<_> =
        (0..20).map(|i| engine.submit(Request::new(vec![5, 6], options(i, 9))).unwrap()).collect();
    drop(engine);
    for stream in streams {
        assert!(stream.collect_all().unwrap().finish_reason.is_some());
    }
}

#[test]
fn a_cancelled_request_makes_room_at_once() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let endless = GenerateOptions { ignore_eos: true, ..options(3, 99_000) };
    let mut first = engine.submit(Request::new(vec![4], endless.clone())).unwrap();
    assert!(first.next().unwrap().is_ok());
    let second = engine.submit(Request::new(vec![4], endless)).unwrap();
    let third = engine.submit(Request { priority: 1, ..Request::new(vec![4], options(3, 3)) });
    drop(second);
    let start = Instant::now();
    first.cancel();
    assert!(third.unwrap().collect_all().is_ok());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let rest = first.by_ref().count();
    assert!(rest < 99_000);
    assert_eq!(first.finish_reason(), Some(FinishReason::Cancelled));
}

#[test]
fn a_request_with_no_finite_logits_fails_alone() {
    // The embedding of one token is NaN: whoever has that token fails.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/odd-shapes");
    let copy = tempfile::TempDir::new().unwrap();
    std::fs::copy(folder.join("config.json"), copy.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let entry = &json["model.embed_tokens.weight"];
    assert_eq!(entry["dtype"], "F32");
    let start = 8 + header + entry["data_offsets"][0].as_u64().unwrap() as usize;
    let hidden = entry["shape"][1].as_u64().unwrap() as usize;
    let row = start + 4 * hidden * 100;
    bytes[row..row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
    let model = Model::load(copy.path(), CpuBackend::new()).unwrap();
    let config = model.config();
    assert!(!config.tie_word_embeddings, "the head must stay finite");

    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let bias = |options: GenerateOptions| {
        // So that nobody generates that token.
        let sampling = Sampling { logit_bias: vec![(100, f32::NEG_INFINITY)], ..options.sampling };
        GenerateOptions { sampling, ..options }
    };
    let requests: Vec<Request> = (0..24)
        .map(|i| {
            let bad = if i % 3 == 0 { 100 } else { 7 };
            Request::new(vec![5, bad, 6 + i as u32], bias(options(i, 12)))
        })
        .collect();
    let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for (i, stream) in streams.into_iter().enumerate() {
        let result = stream.collect_all();
        if i % 3 == 0 {
            assert!(matches!(result, Err(Error::NonFinite { .. })), "{result:?}");
        } else {
            same(&result.unwrap(), &alone(&model, SMALL.context, &requests[i]));
        }
    }
    engine.shutdown();
    assert_eq!(engine.stats().failed, 8);
}

/// A model that can be made to wait before a step.
fn endless(seed: u64) -> GenerateOptions {
    GenerateOptions { ignore_eos: true, ..options(seed, 99_000) }
}

#[test]
fn a_stream_can_be_asked_without_waiting() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut first = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(first.next(), Some(Ok(_))));
    // The only slot is taken: nothing comes of the second, however it is asked.
    let mut second = engine.submit(Request::new(vec![4, 5], options(2, 5))).unwrap();
    assert!(second.try_next().is_pending());
    let start = Instant::now();
    assert!(second.next_timeout(Duration::from_millis(30)).is_pending());
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert!(second.next_timeout(Duration::ZERO).is_pending());
    first.cancel();
    let mut ids = Vec::new();
    loop {
        match second.next_timeout(Duration::MAX) {
            Poll::Pending => panic!("it was to wait"),
            Poll::Ready(Some(piece)) => ids.push(piece.unwrap().id.unwrap()),
            Poll::Ready(None) => break,
        }
    }
    let request = Request::new(vec![4, 5], options(2, 5));
    assert_eq!(ids, alone(&model, 64, &request).ids);
    assert!(matches!(second.try_next(), Poll::Ready(None)));
    assert!(second.next().is_none() && second.usage().is_some());
    // Of an engine that is gone, too, the end comes.
    let left = first.by_ref().last();
    assert!(left.is_none_or(|piece| piece.is_ok()));
    assert_eq!(first.finish_reason(), Some(FinishReason::Cancelled));
}

/// An executor of one task: it parks its thread until it is woken.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn a_task_is_woken_for_every_piece() {
    let model = golden("pure-mamba");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let waker = Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let request = Request::new(vec![4, 5], options(2, 20));
    let mut stream = engine.submit(request.clone()).unwrap();
    let mut ids = Vec::new();
    loop {
        match stream.poll_next(&mut Context::from_waker(&waker)) {
            Poll::Pending => std::thread::park(),
            Poll::Ready(Some(piece)) => ids.extend(piece.unwrap().id),
            Poll::Ready(None) => break,
        }
    }
    assert_eq!(ids, alone(&model, 64, &request).ids);
}

/// Submits another request as soon as it is woken, on the thread that wakes.
struct Submit {
    engine: Engine,
    streams: Mutex<Vec<jamba_core::Stream>>,
}

impl Wake for Submit {
    fn wake(self: std::sync::Arc<Self>) {
        let stream = self.engine.submit(Request::new(vec![4], options(1, 2))).unwrap();
        self.streams.lock().unwrap().push(stream);
    }
}

/// Whoever is woken may use the engine: nothing is locked, also when a waiting request is cancelled.
#[test]
fn a_waker_may_submit() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut running = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(running.next(), Some(Ok(_))));
    let submit = std::sync::Arc::new(Submit { engine: engine.clone(), streams: Mutex::default() });
    let waker = Waker::from(submit.clone());
    let mut waiting = engine.submit(Request::new(vec![4], options(1, 2))).unwrap();
    assert!(waiting.poll_next(&mut Context::from_waker(&waker)).is_pending());
    waiting.cancel();
    assert!(waiting.next().is_none());
    assert_eq!(waiting.finish_reason(), Some(FinishReason::Cancelled));
    drop(running);
    let start = Instant::now();
    while submit.streams.lock().unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing was submitted");
        std::thread::yield_now();
    }
    let stream = submit.streams.lock().unwrap().pop().unwrap();
    assert!(stream.collect_all().unwrap().finish_reason.is_some());
}

#[test]
fn several_streams_are_waited_for_together() {
    let model = golden("paper-block");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let requests: Vec<Request> = (0..40)
        .map(|i| Request::new(vec![5, 6, 7 + i as u32], options(i, i as usize % 20)))
        .collect();
    let mut streams = Streams::new();
    assert!(streams.next().is_none() && matches!(streams.try_next(), Poll::Ready(None)));
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(streams.push(engine.submit(request.clone()).unwrap()), i);
    }
    // One is read alone, one is cancelled by its number, one is dropped.
    let own = streams.remove(7).unwrap().collect_all().unwrap();
    same(&own, &alone(&model, 64, &requests[7]));
    streams.get(8).unwrap().cancel();
    drop(streams.remove(9));
    let mut ids = vec![Vec::new(); requests.len()];
    let mut ended = vec![0; requests.len()];
    for (number, arrival) in &mut streams {
        match arrival {
            Arrival::Piece(piece) => ids[number].extend(piece.id),
            Arrival::End(stream) => {
                let stream = stream.unwrap();
                ended[number] += 1;
                assert!(stream.finish_reason().is_some() && stream.usage().is_some());
            }
        }
    }
    assert!(streams.is_empty() && streams.get(0).is_none() && streams.remove(1).is_none());
    for (i, request) in requests.iter().enumerate() {
        let expected = alone(&model, 64, request).ids;
        match i {
            7 | 9 => assert_eq!(ended[i], 0),
            8 => assert!(ended[i] == 1 && expected.starts_with(&ids[i])),
            _ => assert!(ended[i] == 1 && ids[i] == expected, "{i}"),
        }
    }
    // Nothing comes of what waits.
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut running = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(running.next(), Some(Ok(_))));
    streams.push(engine.submit(Request::new(vec![4], options(1, 3))).unwrap());
    assert!(streams.try_next().is_pending());
    assert!(streams.next_timeout(Duration::from_millis(20)).is_pending());
    drop(running);
    assert!(matches!(streams.next(), Some((40, _))));
}

/// Prompts that are scored share the rows of logits: none waits until others have been read.
#[test]
fn a_scored_prompt_is_not_overtaken_for_ever() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 2, context: 200, step_tokens: 256, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let score = GenerateOptions { prompt_logprobs: Some(0), ..options(0, 0) };
    let mut streams = Streams::new();
    for i in 0..40 {
        streams.push(engine.submit(Request::new(vec![5 + i; 160], score.clone())).unwrap());
    }
    let order: Vec<usize> = streams
        .filter_map(|(number, arrival)| match arrival {
            Arrival::End(stream) => stream.map(|_| number).ok(),
            Arrival::Piece(_) => None,
        })
        .collect();
    let first = order.iter().position(|number| *number == 0).unwrap();
    assert!(order.len() == 40 && first < 4, "{order:?}");
}

#[test]
fn ids_are_enough() {
    let model = golden("paper-block");
    let engine = Engine::ids_only(&model, SMALL).unwrap();
    let request = Request::new(vec![5, 6, 7], options(3, 12));
    let got = engine.submit(request.clone()).unwrap().collect_all().unwrap();
    let expected = alone(&model, 64, &request);
    assert_eq!((got.ids, bits(&got.logprobs)), (expected.ids.clone(), bits(&expected.logprobs)));
    assert!(got.text.is_empty());
    let stop = GenerateOptions { stop: vec!["x".into()], ..options(3, 12) };
    let refused = engine.submit(Request::new(vec![5], stop)).err().unwrap();
    assert!(matches!(refused, Error::Option { option: "stop", .. }), "{refused}");
    let mut session = model.session(SessionOptions::default()).unwrap();
    let mut generator = Generator::ids_only(&mut session, options(3, 12)).unwrap();
    generator.prompt(&[5, 6, 7]).unwrap();
    assert_eq!(generator.filter_map(|p| p.unwrap().id).collect::<Vec<_>>(), expected.ids);

    let other = Tokenizer::from_folder(demo()).unwrap();
    let error = Engine::new(&model, &other, SMALL).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("another model"), "{error}");
}
