//! Thousands of requests, some of them given up.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use jamba_core::{Completion, Engine, LanguageModel, Model, Request};
use jamba_cpu::ReferenceBackend;

use crate::support::{Random, SMALL, alone, bits, golden, options, same, tokenizer};

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
    let completions = Mutex::new(HashMap::<usize, (Vec<u32>, Completion)>::new());
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
                            let heard: Vec<_> = stream.by_ref().take(i % 5).collect();
                            stream.cancel();
                            streams.push((i, heard, stream));
                        }
                        _ => streams.push((i, Vec::new(), stream)),
                    }
                }
                for (i, heard, stream) in streams {
                    let ids = heard.into_iter().filter_map(|piece| piece.unwrap().id).collect();
                    let completion = stream.collect_all().unwrap();
                    completions.lock().unwrap().insert(i, (ids, completion));
                }
            });
        }
    });
    let completions = completions.into_inner().unwrap();
    assert!(completions.len() > requests / 2);
    let mut cut_off = 0;
    for (i, (heard, completion)) in &completions {
        let alone = alone(model, SMALL.context, &plans[*i].0);
        if plans[*i].1 != 1 {
            same(completion, &alone);
            continue;
        }
        // What was said before it was given up is what is said alone.
        let ids: Vec<u32> = heard.iter().chain(&completion.ids).copied().collect();
        assert!(alone.ids.starts_with(&ids), "{ids:?} of {:?}", alone.ids);
        let logprobs = &alone.logprobs[heard.len().min(ids.len())..ids.len()];
        assert_eq!(bits(&completion.logprobs), bits(logprobs));
        cut_off += usize::from(!ids.is_empty() && ids.len() < alone.ids.len());
    }
    assert!(cut_off > 0);
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
