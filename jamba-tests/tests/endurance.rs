//! Long texts, and numbers at the edges of what their types hold.

use std::path::{Path, PathBuf};
use std::time::Instant;

use half::{bf16, f16};
use jamba_core::recording::Recorded;
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{
    Backend, Dtype, HostTensor, LanguageModel, Model, Param, Precision, Role, Sampler, Sampling,
    Session, SessionOptions, StatePart,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use jamba_tests::compare::Difference;
use jamba_tests::precision::{Format, Precision as Numbers};
use jamba_tests::tolerance::{Tolerance, tolerance};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

fn cpu() -> CpuBackend {
    CpuBackend::new().with_precision(Precision::F32)
}

fn session(model: &dyn LanguageModel, context: usize) -> Session {
    model.session(SessionOptions { context, chunk: 256, outputs: 1 }).unwrap()
}

/// Logits and states of two sessions of the same tokens: the largest differences.
#[track_caller]
fn check(what: &str, got: &Session, expected: &Session, tolerance: &Tolerance) -> Difference {
    let tensor = |values: Vec<f32>| Recorded { shape: vec![values.len()], values };
    assert_eq!(got.tokens(), expected.tokens());
    let of = |session: &Session| {
        let mut all = vec![("logits".to_owned(), tensor(session.last_logits().to_vec()))];
        for (layer, kind) in Schedule::new(session.config()).iter().enumerate() {
            let parts = match kind.mixer {
                MixerKind::Mamba => [StatePart::Conv, StatePart::Ssm],
                MixerKind::Attention => [StatePart::Keys, StatePart::Values],
            };
            for part in parts {
                let values = session.read_state(layer, part).unwrap();
                all.push((format!("layers.{layer} {part:?}"), tensor(values)));
            }
        }
        all
    };
    let differences = of(got).into_iter().zip(of(expected));
    let differences = differences.map(|((name, a), (_, b))| Difference::new(&name, &a, &b));
    let differences: Vec<_> = differences.collect();
    for difference in &differences {
        assert!(difference.within(tolerance), "{what}: {difference}");
    }
    differences.into_iter().max_by(|a, b| a.element.total_cmp(&b.element)).unwrap()
}

/// Generates a text token by token. Every so often the state that was carried all the way is compared
/// with one computed anew from all tokens in chunks, and, of the first tokens, with the reference's in
/// f64; and the reference goes on from the carried state for some tokens beside it.
fn endure(tokens: usize, every: usize, by_reference: usize) {
    let model = Model::load(folder(), cpu()).unwrap();
    let reference = Model::load(folder(), ReferenceBackend::new()).unwrap();
    let [law, other] = ["law", "golden"].map(|what| tolerance(what, Numbers::F32, Format::Bf16));
    let mut carried = session(&model, tokens + 8);
    let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, model.config().vocab_size).unwrap();
    carried.append(&[1]).unwrap();
    let began = Instant::now();
    let mut next = |session: &mut Session| {
        let id = sampler.sample(session.last_logits()).unwrap().id;
        session.append(&[id]).unwrap();
    };
    while carried.position() < tokens {
        next(&mut carried);
        let position = carried.position();
        if position == by_reference {
            let mut exact = session(&reference, position);
            exact.append(carried.tokens()).unwrap();
            let worst = check("against the reference", &carried, &exact, other);
            println!("{position} tokens, against the reference from the first: {worst}");
        }
        if position.is_multiple_of(every) {
            let seconds = began.elapsed().as_secs_f64();
            let mut anew = session(&model, position);
            anew.append(carried.tokens()).unwrap();
            let worst = check("against chunks", &carried, &anew, law);
            println!("{position} tokens ({seconds:.0} s), against chunks: {worst}");
            drop(anew);
            let mut beside = session(&reference, position + 4);
            beside.restore(&carried.snapshot().unwrap()).unwrap();
            for _ in 0..4 {
                next(&mut carried);
                beside.append(&[*carried.tokens().last().unwrap()]).unwrap();
            }
            let worst = check("beside the reference", &carried, &beside, other);
            println!("{position} tokens, 4 more beside the reference: {worst}");
        }
    }
}

#[test]
fn a_text_of_a_thousand_tokens() {
    endure(1000, 500, 200);
}

/// `cargo test --release -p jamba-tests --test endurance -- --ignored --nocapture`
#[test]
#[ignore = "half an hour on one core; its figures are in docs/numerics.md"]
fn a_text_of_a_hundred_thousand_tokens() {
    endure(100_000, 20_000, 4_000);
}

/// Every finite value of the 16-bit types, the subnormal ones and the largest among them, is itself
/// in a product: nothing flushes it or rounds it.
#[test]
fn every_16_bit_weight_is_itself() {
    type Widen = fn(u16) -> f32;
    let types: [(Dtype, Widen); 2] = [
        (Dtype::F16, |bits| f16::from_bits(bits).to_f32()),
        (Dtype::Bf16, |bits| f32::from_bits(u32::from(bits) << 16)),
    ];
    for (dtype, widen) in types {
        let bits: Vec<u16> = (0..=u16::MAX).filter(|bits| widen(*bits).is_finite()).collect();
        let bits = &bits[..bits.len() / 64 * 64];
        let expected: Vec<f32> = bits.iter().map(|bits| widen(*bits)).collect();
        let (n, k) = (bits.len() / 64, 64);
        let tensor = HostTensor::from_halves(dtype, vec![n, k], bits.to_vec());
        assert_eq!(tensor.to_f32().to_vec(), expected);
        for backend in CpuBackend::all() {
            let backend = backend.with_precision(Precision::F32);
            let param = Param::new("weight", Role::Linear, tensor.clone());
            let weight = backend.upload(param).unwrap();
            let mut x = backend.alloc(k, k).unwrap();
            let one_hot: Vec<f32> = (0..k * k).map(|i| f32::from(i % (k + 1) == 0)).collect();
            backend.write(&mut x, &one_hot).unwrap();
            let mut out = backend.alloc(k, n).unwrap();
            let cols = |tensor, width| jamba_core::Cols { tensor, cols: 0..width };
            backend.linear(cols(&x, k), &weight, None, &mut out).unwrap();
            let got = backend.read(cols(&out, n)).unwrap();
            for (i, expected) in expected.iter().enumerate() {
                let got = got[i % k * n + i / k];
                assert!(got == *expected, "{dtype} {:#06x}: {got:e} not {expected:e}", bits[i]);
            }
        }
    }
    // What is quantised or stored from f32 goes to infinity beyond the type, and to zero below it.
    assert_eq!(f16::from_f32(65_520.0), f16::INFINITY);
    assert_eq!(bf16::from_f32(f32::MAX), bf16::INFINITY);
    assert_eq!(f16::from_f32(2f32.powi(-26)).to_bits(), 0);
}

/// A program may have told its threads to take subnormal numbers for zero, as those of C compiled for
/// speed do: a text comes out the same.
#[cfg(target_arch = "x86_64")]
#[test]
fn subnormal_numbers_do_not_matter() {
    let flush = |_| {
        let control: u32 = 0x8040 | 0x1f80;
        // SAFETY: this thread's register gets its usual value with two more bits, which leave rounding
        // and exceptions as they are. The thread runs nothing but this test's steps.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const control);
        }
    };
    let run = || {
        let model = Model::load(folder(), cpu()).unwrap();
        let mut session = session(&model, 512);
        let mut bits = Vec::new();
        let words: Vec<u32> = (5..300).collect();
        let parts: [&[u32]; 4] = [&words, &[0; 100], &[7], &[8]];
        for ids in parts {
            bits.extend(session.append(ids).unwrap().iter().map(|v| v.to_bits()));
        }
        bits
    };
    let expected = run();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(flush);
    let tiny = std::hint::black_box(f32::MIN_POSITIVE);
    let pool = pool.build().unwrap();
    assert_eq!(pool.install(|| std::hint::black_box(tiny) * 0.5), 0.0, "the pool does not flush");
    assert!(pool.install(run) == expected);
}
