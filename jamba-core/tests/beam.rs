//! Beam search against transformers' (`beam.json`: the demo model, `num_beams` without sampling
//! and without a cache, made with the version that it names), and one beam against greedy.

use std::path::{Path, PathBuf};

use jamba_core::{
    BeamOptions, GenerateOptions, LanguageModel, Model, Precision, Sampling, SessionOptions,
    Tokenizer, beam_search, generate_ids,
};
use jamba_cpu::CpuBackend;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn beams_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(include_str!("beam.json")).unwrap();
    let model = Model::load(folder(), CpuBackend::new().with_precision(Precision::F32)).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 15);
    for (number, case) in cases.iter().enumerate() {
        let mut options = BeamOptions {
            beams: case["beams"].as_u64().unwrap() as usize,
            max_tokens: golden["max_tokens"].as_u64().unwrap() as usize,
            length_penalty: case["length_penalty"].as_f64().unwrap() as f32,
            early_stopping: case["early_stopping"].as_bool().unwrap(),
            ..BeamOptions::default()
        };
        options.eos_token_ids = case["eos"].as_u64().map(|id| vec![id as u32]);
        let got = beam_search(&model, &ids(&case["prompt_ids"]), &options).unwrap();
        let expected = case["hypotheses"].as_array().unwrap();
        assert_eq!(got.len(), expected.len(), "case {number}");
        for (got, expected) in got.iter().zip(expected) {
            assert_eq!(got.ids, ids(&expected["ids"]), "case {number}");
            if let Some(score) = expected["score"].as_f64() {
                let error = (got.score - score).abs();
                assert!(error < 1e-4 * score.abs().max(1.0), "case {number}: {}", got.score);
            }
        }
    }
}

#[test]
fn one_beam_is_greedy() {
    let model = Model::load(folder(), CpuBackend::new().with_precision(Precision::F32)).unwrap();
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    for (prompt, length_penalty) in [("The king", 1.0), ("Once upon a time", 3.0)] {
        let prompt = tokenizer.encode(prompt).unwrap();
        let options =
            GenerateOptions { sampling: Sampling::greedy(), max_tokens: 30, ..Default::default() };
        let session_options = SessionOptions { context: 64, ..Default::default() };
        let mut session = model.session(session_options).unwrap();
        let greedy = generate_ids(&mut session, &tokenizer, &prompt, options).unwrap();
        // A token of the text as its end: the search must stop there too.
        for eos in [None, Some(vec![greedy.ids[12]])] {
            let end = eos
                .as_ref()
                .map_or(30, |eos| 1 + greedy.ids.iter().position(|id| *id == eos[0]).unwrap());
            let options = BeamOptions {
                beams: 1,
                max_tokens: 30,
                length_penalty,
                eos_token_ids: eos,
                ..Default::default()
            };
            let beams = beam_search(&model, &prompt, &options).unwrap();
            assert_eq!(beams.len(), 1);
            assert_eq!(beams[0].ids, greedy.ids[..end]);
        }
    }
}

#[test]
fn bad_options_are_refused() {
    let model = Model::load(folder(), CpuBackend::new().with_precision(Precision::F32)).unwrap();
    let refused = |prompt: &[u32], options: BeamOptions, part: &str| {
        let message = beam_search(&model, prompt, &options).unwrap_err().to_string();
        assert!(message.contains(part), "`{part}` is not in: {message}");
    };
    let default = BeamOptions::default;
    refused(&[1], BeamOptions { beams: 0, ..default() }, "beams");
    refused(&[1], BeamOptions { max_tokens: 0, ..default() }, "max_tokens");
    refused(&[1], BeamOptions { length_penalty: f32::NAN, ..default() }, "length_penalty");
    refused(&[], default(), "prompt");
    refused(&[4096], default(), "4096");
}
