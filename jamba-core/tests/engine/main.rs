//! The engine: many requests give what each gives alone, and leave nothing behind.

use std::path::Path;
use std::time::{Duration, Instant};

use jamba_core::{
    Arrival, Engine, EngineOptions, Error, FinishReason, GenerateOptions, Generator, LanguageModel,
    Model, Request, Sampling, Scored, SessionOptions, Streams, Tokenizer,
};
use jamba_cpu::CpuBackend;

mod hostile;
mod soak;
mod streams;
mod support;

use support::{
    Random, SMALL, alone, alone_with, bits, demo, endless, golden, options, same, tokenizer,
};

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

/// The next turn of a conversation begins with the prompt and the reply: all of it is there but the
/// last token, which was not run.
#[test]
fn the_end_of_a_reply_is_kept() {
    let model = golden("paper-block");
    let options_of = EngineOptions { context: 300, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut random = Random(8);
    let mut prompt = random.ids(37);
    for (turn, seed) in (0..3).zip(5..) {
        let options = GenerateOptions { ignore_eos: true, ..options(seed, 40) };
        let request = Request::new(prompt.clone(), options);
        let completion = engine.submit(request.clone()).unwrap().collect_all().unwrap();
        same(&completion, &alone(&model, 300, &request));
        // What was said after the reply of the turn before, and its last token.
        let expected = if turn == 0 { 0 } else { prompt.len() - 8 };
        assert_eq!(completion.usage.cached_tokens, expected);
        prompt.extend(&completion.ids);
        prompt.extend(random.ids(7));
    }
    // A prompt that is no longer than what is kept: its logits are there too, whoever chose the token.
    for sampling in [options(9, 0).sampling, Sampling::greedy()] {
        let options = GenerateOptions { ignore_eos: true, sampling, ..options(9, 40) };
        let request = Request::new(random.ids(37), options);
        let first = engine.submit(request.clone()).unwrap().collect_all().unwrap();
        let again = [&request.prompt[..], &first.ids[..39]].concat();
        let again = Request { prompt: again, ..request };
        let completion = engine.submit(again.clone()).unwrap().collect_all().unwrap();
        same(&completion, &alone(&model, 300, &again));
        assert_eq!(completion.usage.cached_tokens, 37 + 39);
    }
    // A reply of a few tokens is not worth a state.
    let few = |prompt: &[u32]| {
        let options = GenerateOptions { ignore_eos: true, ..options(1, 8) };
        engine.submit(Request::new(prompt.to_vec(), options)).unwrap().collect_all().unwrap()
    };
    let first = few(&[4; 40]);
    let next = [&[4; 40][..], &first.ids, &[5, 6]].concat();
    assert_eq!(few(&next).usage.cached_tokens, 40);
}

/// Who hears of an end finds it counted, and its slot free.
#[test]
fn an_end_is_counted_before_it_is_told() {
    let model = golden("pure-mamba");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let (mut finished, mut cancelled, mut generated) = (0, 0, 0);
    for i in 0..200 {
        let mut stream = engine.submit(Request::new(vec![4, 5 + i % 90], options(1, 6))).unwrap();
        if i % 3 == 0 {
            stream.cancel();
        }
        generated += stream.by_ref().filter(|piece| piece.as_ref().unwrap().id.is_some()).count();
        match stream.finish_reason() {
            Some(FinishReason::Cancelled) => cancelled += 1,
            _ => finished += 1,
        }
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.cancelled, stats.failed), (finished, cancelled, 0));
        assert_eq!((stats.running, stats.running_bytes, stats.waiting), (0, 0, 0));
        assert_eq!(stats.generated_tokens, generated as u64);
    }
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

/// However many slots are free, no more runs than the budget has room for.
#[test]
fn a_budget_limits_what_runs() {
    let model = golden("paper-block");
    let bytes = Engine::new(&model, &tokenizer(), SMALL).unwrap().bytes(4, 40);
    let options_of = EngineOptions { memory: Some(2 * bytes), ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    assert_eq!(engine.fits(4, 40), 2);
    let large = GenerateOptions { ignore_eos: true, ..options(3, 40) };
    let mut streams = Streams::new();
    for i in 0..12 {
        streams.push(engine.submit(Request::new(vec![4, 5, 6, 7 + i], large.clone())).unwrap());
    }
    let mut most = 0;
    while streams.next().is_some() {
        let stats = engine.stats();
        assert!(stats.running <= 2 && stats.running_bytes <= 2 * bytes, "{stats:?}");
        most = most.max(stats.running_bytes);
    }
    assert_eq!((most, engine.stats().finished), (2 * bytes, 12));

    let tight = EngineOptions { memory: Some(bytes), ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), tight).unwrap();
    let refused = engine.submit(Request::new(vec![4; 5], large.clone())).err().unwrap();
    assert!(
        matches!(refused, Error::Budget { needed, budget } if needed > bytes && budget == bytes),
        "{refused}"
    );
    assert!(engine.submit(Request::new(vec![4; 4], large)).unwrap().collect_all().is_ok());
}

#[test]
fn a_higher_priority_gets_the_next_slot() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut busy = engine.submit(Request::new(vec![4], endless(3))).unwrap();
    assert!(busy.next().unwrap().is_ok());
    let mut streams = Streams::new();
    for priority in [0, -1, 2, 0, 1] {
        let request = Request { priority, ..Request::new(vec![5], options(1, 3)) };
        streams.push(engine.submit(request).unwrap());
    }
    busy.cancel();
    let ends = streams.filter_map(|(number, arrival)| match arrival {
        Arrival::End(stream) => stream.map(|_| number).ok(),
        Arrival::Piece(_) => None,
    });
    assert_eq!(ends.collect::<Vec<_>>(), [2, 4, 0, 3, 1]);
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
    let mut first = engine.submit(Request::new(vec![4], endless(3))).unwrap();
    assert!(first.next().unwrap().is_ok());
    let second = engine.submit(Request::new(vec![4], endless(3))).unwrap();
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
    // It is in the prompt, or the first token that is generated.
    let forced = |options: GenerateOptions| {
        let sampling = Sampling { logit_bias: vec![(100, 1e9)], ..options.sampling };
        GenerateOptions { sampling, ..options }
    };
    let requests: Vec<Request> = (0..24)
        .map(|i| match i % 6 {
            0 => Request::new(vec![5, 100, 6 + i as u32], bias(options(i, 12))),
            3 => Request::new(vec![5, 7, 6 + i as u32], forced(options(i, 12))),
            _ => Request::new(vec![5, 7, 6 + i as u32], bias(options(i, 12))),
        })
        .collect();
    let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let mut generated = 0;
    for (i, mut stream) in streams.into_iter().enumerate() {
        if i % 3 == 0 {
            let pieces = stream.by_ref().take_while(Result::is_ok).count();
            assert_eq!(pieces, i % 2, "the token that makes it fail is generated");
            generated += pieces;
        } else {
            let completion = stream.collect_all().unwrap();
            same(&completion, &alone(&model, SMALL.context, &requests[i]));
            generated += completion.ids.len();
        }
    }
    engine.shutdown();
    assert_eq!((engine.stats().failed, engine.stats().generated_tokens), (8, generated as u64));
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
