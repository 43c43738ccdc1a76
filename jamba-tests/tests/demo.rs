//! The demo model end to end, against what transformers computes with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jamba_core::{
    FinishReason, GenerateOptions, LanguageModel, Model, Precision, Sampling, Session,
    SessionOptions, Tokenizer, generate, log_prob,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn backends() -> Vec<Box<dyn LanguageModel>> {
    let mut all: Vec<Box<dyn LanguageModel>> =
        vec![Box::new(Model::load(folder(), ReferenceBackend::new()).unwrap())];
    for backend in CpuBackend::all() {
        let backend = backend.with_precision(Precision::F32);
        all.push(Box::new(Model::load(folder(), backend).unwrap()));
    }
    all
}

fn session(model: &dyn LanguageModel, context: usize) -> Session {
    model.session(SessionOptions { context, chunk: 64, outputs: 64 }).unwrap()
}

#[test]
fn greedy_text_and_log_probabilities_are_those_of_transformers() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    let golden = golden();
    let cases = golden["greedy"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for model in backends() {
        for case in cases {
            let prompt = case["prompt"].as_str().unwrap();
            let expected = ids(&case["ids"]);
            let options = GenerateOptions {
                sampling: Sampling::greedy(),
                max_tokens: expected.len(),
                ..GenerateOptions::default()
            };
            let mut session = session(&*model, 256);
            let got = generate(&mut session, &tokenizer, prompt, options).unwrap();
            let name = model.backend_name();
            assert_eq!(got.prompt_ids, ids(&case["prompt_ids"]), "{name}: {prompt}");
            assert_eq!(got.ids, expected, "{name}: {prompt}");
            assert_eq!(got.text, case["text"].as_str().unwrap(), "{name}: {prompt}");
            assert_eq!(got.finish_reason, FinishReason::Length);
            for (i, (got, expected)) in
                got.logprobs.iter().zip(case["logprobs"].as_array().unwrap()).enumerate()
            {
                let expected = expected.as_f64().unwrap();
                let error = (f64::from(*got) - expected).abs();
                assert!(error < 1e-3, "{name}: {prompt}, token {i}: {got} not {expected}");
            }
        }
    }
}

#[test]
fn mean_losses_are_those_of_transformers() {
    let golden = golden();
    let cases = golden["nll"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    let mut models = backends();
    // The reference has one passage to score, the fast backends all.
    for (m, model) in models.drain(..).enumerate() {
        for case in &cases[..if m == 0 { 1 } else { cases.len() }] {
            let tokens = ids(&case["ids"]);
            let mut loss = 0.0;
            session(&*model, tokens.len())
                .append_each(&tokens, |i, logits| {
                    if let Some(&next) = tokens.get(i + 1) {
                        loss -= f64::from(log_prob(logits, next));
                    }
                })
                .unwrap();
            let mean = loss / (tokens.len() - 1) as f64;
            let expected = case["mean_nll"].as_f64().unwrap();
            let name = model.backend_name();
            assert!((mean - expected).abs() < 1e-4, "{name}: {mean} not {expected}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text_on_any_number_of_threads() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    let model = Model::load(folder(), CpuBackend::new()).unwrap();
    let story = |threads: usize, chunk: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let options = GenerateOptions {
                sampling: Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::default() },
                max_tokens: 60,
                ..GenerateOptions::default()
            };
            let options_of = SessionOptions { context: 256, chunk, outputs: 1 };
            let mut session = model.session(options_of).unwrap();
            let prompt = "The old woman looked at the fire and said that on the hill";
            let mut got = generate(&mut session, &tokenizer, prompt, options).unwrap();
            got.usage.prompt_time = Duration::ZERO;
            got.usage.generation_time = Duration::ZERO;
            got
        })
    };
    let expected = story(1, 512, 3);
    for (threads, chunk) in [(1, 1), (2, 512), (3, 5), (4, 2)] {
        assert_eq!(story(threads, chunk, 3), expected, "{threads} threads, chunks of {chunk}");
    }
    assert_ne!(story(2, 512, 4).ids, expected.ids, "another seed");
}
