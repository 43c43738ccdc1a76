//! Both CPU backends against transformers, activation by activation.

use jamba_core::backend::Backend;
use jamba_core::recording::Recording;
use jamba_core::trace::Detail;
use jamba_core::{LanguageModel, Model, SessionOptions};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use jamba_tests::compare::differences;
use jamba_tests::golden::Golden;
use jamba_tests::tolerance::GOLDEN;

/// Chunk lengths: one token at a time, odd ones, a power of two, the whole prompt.
const CHUNKS: [usize; 5] = [1, 3, 7, 16, usize::MAX];

fn check<B: Backend + Send + Sync + 'static>(name: &str, backend: B) {
    let golden = Golden::load(name);
    assert!(golden.expected.tensors.len() > 30, "{name}: too few golden tensors");
    let backend_name = backend.name();
    let model = Model::load(&golden.folder, backend).unwrap();
    let tokens = golden.input_ids.len() + golden.decode_ids.len();
    let options = SessionOptions { context: tokens, chunk: tokens, outputs: tokens };
    let mut session = model.session(options).unwrap();
    let mut failures = String::new();
    for chunk in CHUNKS {
        let recording = Recording::new(
            &mut session,
            &golden.input_ids,
            chunk,
            &golden.decode_ids,
            Detail::Operators,
        )
        .unwrap();
        let differences = differences(&recording, &golden.expected);
        let worst = differences.iter().max_by(|a, b| a.element.total_cmp(&b.element)).unwrap();
        println!(
            "{backend_name} {name} chunk {chunk}: {} tensors, worst {worst}",
            differences.len()
        );
        for bad in differences.iter().filter(|d| !d.within(&GOLDEN)) {
            failures += &format!("chunk {chunk}: {bad}\n");
        }
    }
    assert!(failures.is_empty(), "{backend_name} departs from transformers on {name}:\n{failures}");
}

macro_rules! golden {
    ($($test:ident: $name:literal,)*) => {
        mod reference {
            use super::*;
            $(#[test] fn $test() { check($name, ReferenceBackend); })*
        }
        mod cpu {
            use super::*;
            $(#[test] fn $test() { CpuBackend::all().into_iter().for_each(|b| check($name, b)); })*
        }
    };
}

golden! {
    odd_shapes: "odd-shapes",
    paper_block: "paper-block",
    pure_attention: "pure-attention",
    pure_mamba: "pure-mamba",
    reasoning_dense: "reasoning-dense",
    sharded_bf16: "sharded-bf16",
    top1_every_layer: "top1-every-layer",
}
