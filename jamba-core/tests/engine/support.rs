//! Models, requests, and what a request gives alone.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use jamba_core::{
    Completion, EngineOptions, GenerateOptions, LanguageModel, Model, Request, Sampling,
    SessionOptions, Tokenizer, generate_ids,
};
use jamba_cpu::CpuBackend;

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden").join(name)
}

pub(crate) fn golden(name: &str) -> Model<CpuBackend> {
    Model::load(folder(name), CpuBackend::new()).unwrap()
}

/// The small models have no tokenizer: the first of the demo model's tokens are theirs.
pub(crate) fn tokenizer() -> Tokenizer {
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

pub(crate) const SMALL: EngineOptions = EngineOptions {
    slots: 8,
    context: 64,
    step_tokens: 32,
    queue: 4096,
    prefix_cache: 1 << 20,
    memory: None,
};

/// Numbers that look random.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    pub(crate) fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| 3 + self.below(90) as u32).collect()
    }
}

pub(crate) fn options(seed: u64, max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling { temperature: 1.1, top_p: 0.95, seed, ..Sampling::default() };
    GenerateOptions { sampling, max_tokens, ..GenerateOptions::default() }
}

/// What the request gives alone.
pub(crate) fn alone(
    model: &dyn LanguageModel,
    context: usize,
    request: &Request,
) -> jamba_core::Generation {
    alone_with(model, &tokenizer(), context, request)
}

pub(crate) fn alone_with(
    model: &dyn LanguageModel,
    tokenizer: &Tokenizer,
    context: usize,
    request: &Request,
) -> jamba_core::Generation {
    let options = SessionOptions { context, chunk: context, outputs: context };
    let mut session = model.session(options).unwrap();
    generate_ids(&mut session, tokenizer, &request.prompt, request.options.clone()).unwrap()
}

pub(crate) fn bits(logprobs: &[f32]) -> Vec<u32> {
    logprobs.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
pub(crate) fn same(got: &Completion, alone: &jamba_core::Generation) {
    assert_eq!(got.ids, alone.ids);
    assert_eq!(bits(&got.logprobs), bits(&alone.logprobs));
    assert_eq!(got.text, alone.text);
    assert_eq!(got.finish_reason, Some(alone.finish_reason));
    assert_eq!(got.top_logprobs, alone.top_logprobs);
    assert_eq!(got.prompt_logprobs, alone.prompt_logprobs);
    assert_eq!(got.usage.prompt_tokens, alone.prompt_ids.len());
    assert_eq!(got.usage.generated_tokens, alone.ids.len());
}

pub(crate) fn endless(seed: u64) -> GenerateOptions {
    GenerateOptions { ignore_eos: true, ..options(seed, 99_000) }
}
