//! Long texts, and numbers at the edges of what their types hold.

use std::path::{Path, PathBuf};
use std::time::Instant;

use half::{bf16, f16};
use jamba_core::recording::Recorded;
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{
    Backend, Dtype, HostTensor, LanguageModel, Layout, Model, Param, Precision, Quantized, Role,
    Sampler, Sampling, Session, SessionOptions, StatePart, WeightFormat,
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

/// Logits and states.
fn all(session: &Session) -> Vec<(String, Recorded)> {
    let tensor = |values: Vec<f32>| Recorded { shape: vec![values.len()], values };
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
}

/// Two sessions of the same tokens: the largest differences.
#[track_caller]
fn check(what: &str, got: &Session, expected: &Session, tolerance: &Tolerance) -> Difference {
    assert_eq!(got.tokens(), expected.tokens());
    let differences = all(got).into_iter().zip(all(expected));
    let differences = differences.map(|((name, a), (_, b))| Difference::new(&name, &a, &b));
    let differences: Vec<_> = differences.collect();
    for difference in &differences {
        assert!(difference.within(tolerance), "{what}: {difference}");
    }
    differences.into_iter().max_by(|a, b| a.element.total_cmp(&b.element)).unwrap()
}

/// Two sessions of the same tokens, to the bit.
#[track_caller]
fn same(what: &str, got: &Session, expected: &Session) {
    assert_eq!(got.tokens(), expected.tokens());
    for ((name, got), (_, expected)) in all(got).into_iter().zip(all(expected)) {
        assert!(got.values.iter().all(|v| v.is_finite()), "{what}: {name}");
        let bits = |of: Recorded| of.values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert!(bits(got) == bits(expected), "{what}: {name} differs");
    }
}

/// Generates a text token by token. Every so often the state that was carried all the way is that of
/// all tokens computed anew in chunks, to the bit; then `also` may look at it and go on with it.
fn carry(
    backend: CpuBackend,
    tokens: usize,
    every: usize,
    mut also: impl FnMut(&mut Session, &mut dyn FnMut(&mut Session)),
) {
    let name = format!("{backend:?}");
    let model = Model::load(folder(), backend).unwrap();
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
        if position.is_multiple_of(every) {
            let seconds = began.elapsed().as_secs_f64();
            let mut anew = session(&model, position);
            anew.append(carried.tokens()).unwrap();
            same(&format!("{name} after {position}"), &carried, &anew);
            println!("{name}: {position} tokens ({seconds:.0} s), as in chunks");
        }
        also(&mut carried, &mut next);
    }
}

/// [`carry`] in f32; the state is compared with the reference's in f64, of the first tokens, and every
/// so often the reference goes on from the carried state for some tokens beside it.
fn endure(tokens: usize, every: usize, by_reference: usize) {
    let reference = Model::load(folder(), ReferenceBackend::new()).unwrap();
    let tolerance = tolerance("golden", Numbers::F32, Format::Bf16);
    carry(cpu(), tokens, every, |carried, next| {
        let position = carried.position();
        if position == by_reference {
            let mut exact = session(&reference, position);
            exact.append(carried.tokens()).unwrap();
            let worst = check("against the reference", carried, &exact, tolerance);
            println!("{position} tokens, against the reference from the first: {worst}");
        }
        if position.is_multiple_of(every) {
            let mut beside = session(&reference, position + 4);
            beside.restore(&carried.snapshot().unwrap()).unwrap();
            for _ in 0..4 {
                next(carried);
                beside.append(&[*carried.tokens().last().unwrap()]).unwrap();
            }
            let worst = check("beside the reference", carried, &beside, tolerance);
            println!("{position} tokens, 4 more beside the reference: {worst}");
        }
    });
}

/// As users have them: products of bf16 where the machine has them, and of integers.
fn defaults() -> [CpuBackend; 2] {
    [CpuBackend::new(), CpuBackend::new().with_format(WeightFormat::Int8)]
}

#[test]
fn a_text_of_a_thousand_tokens() {
    endure(1000, 500, 200);
    for backend in defaults() {
        carry(backend, 400, 200, |_, _| ());
    }
}

/// `cargo test --release -p jamba-tests --test endurance -- --ignored --nocapture`
#[test]
#[ignore = "an hour and a half on one core; its figures are in docs/numerics.md"]
fn a_text_of_a_hundred_thousand_tokens() {
    endure(100_000, 20_000, 4_000);
    for backend in defaults() {
        carry(backend, 100_000, 20_000, |_, _| ());
    }
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
            let one_hot: Vec<f32> = (0..k * k).map(|i| f32::from(i % (k + 1) == 0)).collect();
            let got = products(&backend, tensor.clone(), &one_hot);
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

/// `x W`, a row of x with a row of W each.
fn products(backend: &CpuBackend, weight: HostTensor, x: &[f32]) -> Vec<f32> {
    let &[n, k] = weight.shape() else { panic!("a matrix") };
    let weight = backend.upload(Param::new("weight", Role::Linear, weight)).unwrap();
    let rows = x.len() / k;
    let mut tensor = backend.alloc(rows, k).unwrap();
    backend.write(&mut tensor, x).unwrap();
    let mut out = backend.alloc(rows, n).unwrap();
    let cols = |tensor, width| jamba_core::Cols { tensor, cols: 0..width };
    backend.linear(cols(&tensor, k), &weight, None, &mut out).unwrap();
    backend.read(cols(&out, n)).unwrap()
}

/// Products of bf16 take subnormal numbers for zero where they are the processor's, and all others for
/// what they are, up to the largest.
#[test]
fn the_edges_of_products_of_bf16() {
    let bits: Vec<u16> = (0..=u16::MAX).filter(|b| bf16::from_bits(*b).is_finite()).collect();
    let bits = &bits[..bits.len() / 64 * 64];
    let (n, k) = (bits.len() / 64, 64);
    let one_hot: Vec<f32> = (0..k * k).map(|i| f32::from(i % (k + 1) == 0)).collect();
    for backend in CpuBackend::all() {
        let tensor = HostTensor::from_halves(Dtype::Bf16, vec![n, k], bits.to_vec());
        let got = products(&backend, tensor, &one_hot);
        for (i, bits) in bits.iter().enumerate() {
            let (got, expected) = (got[i % k * n + i / k], bf16::from_bits(*bits).to_f32());
            let flushed = expected.is_subnormal() && backend.precision() == Precision::Bf16;
            let is_right = got == expected || flushed && got == 0.0;
            assert!(is_right, "{backend:?} {bits:#06x}: {got:e} not {expected:e}");
        }
    }
}

/// Products of integers of the largest and of the smallest activations and weights that there are: as
/// exact as others, or zero where the product is below what f32 holds; never infinite where it is not.
#[test]
fn the_edges_of_products_of_integers() {
    let k = 64;
    let row = |scale: f32| (0..k).map(move |i| scale * (((i * 37 % 127) as f32 - 63.0) / 64.0));
    for backend in CpuBackend::all() {
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let backend = backend.clone().with_format(format);
            for (w_scale, x_scale) in [
                (1e19, 1e18),
                (1e-19, 1e38),
                (1.0, 3e38 / 1e4),
                (1e-19, 1e-10),
                (1.0, 1e-36),
                (1.0, 1e-40),
                (1e-30, 1e-30),
            ] {
                let x: Vec<f32> = row(x_scale).collect();
                let tensor = HostTensor::from_f32(vec![1, k], row(w_scale).collect());
                let param = Param::new("weight", Role::Linear, tensor.clone());
                let Layout::Packed(packing) = format.layout(Role::Linear) else {
                    panic!("{format}")
                };
                let weight = Quantized::new(&param, packing).unwrap().dequantize();
                let terms = weight.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, size) =
                    terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                let got = f64::from(products(&backend, tensor, &x)[0]);
                // Half a step of each activation, all of those whose step is no normal number, and a sum
                // that is none.
                let weights: f64 = weight.iter().map(|w| f64::from(w.abs())).sum();
                let smallest = f64::from(f32::MIN_POSITIVE);
                let bound = size * 0.02 + smallest * (127.0 * weights + 1.0);
                let what = format!("{backend:?} {w_scale:e} {x_scale:e}: {got:e} not {sum:e}");
                assert!((got - sum).abs() <= bound, "{what} within {bound:e}");
            }
        }
    }
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
