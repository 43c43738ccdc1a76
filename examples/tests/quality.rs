//! How much quality the formats of weights cost: bounds on the demo model and its held-out text.

use jamba_core::WeightFormat;
use jamba_examples::quality::{Quality, held_out};
use jamba_examples::{BackendName, demo_model};

/// Largest increase of the loss in nats a token, largest KL divergence, least agreement.
type Bounds = (WeightFormat, f64, f64, f64);

/// Of weights alone: activations are f32.
const WEIGHTS: [Bounds; 4] = [
    (WeightFormat::Stored, 0.0, 0.0, 1.0),
    (WeightFormat::ExpertsInt8, 0.005, 0.001, 0.98),
    (WeightFormat::Int8, 0.005, 0.001, 0.98),
    (WeightFormat::Int4, 0.05, 0.03, 0.89),
];

/// Of the default: activations are 8 bits too where weights are quantised, and bf16 where the machine
/// multiplies it.
const DEFAULT: [Bounds; 3] = [
    (WeightFormat::Stored, 0.005, 0.001, 0.97),
    (WeightFormat::Int8, 0.005, 0.002, 0.97),
    (WeightFormat::Int4, 0.05, 0.03, 0.88),
];

fn check(backend: BackendName, bounds: &[Bounds]) {
    let windows = held_out(&demo_model()).unwrap();
    let stored = BackendName::CpuF32.load(&demo_model(), WeightFormat::Stored).unwrap();
    for &(format, delta, kl, agreement) in bounds {
        let model = backend.load(&demo_model(), format).unwrap();
        let q = Quality::measure(&*stored, &*model, &windows, 128).unwrap();
        println!("{format}: {q:?}, delta {:+.5}", q.delta());
        assert_eq!(q.tokens, 3 * 511);
        // What transformers computed in float32.
        assert!((q.base_loss - (2.796_412 + 2.639_506 + 2.839_169) / 3.0).abs() < 1e-4, "{q:?}");
        assert!(
            q.delta().abs() <= delta && q.kl <= kl && q.agreement >= agreement,
            "{format} {q:?}"
        );
        // Formats that change nothing were not measured.
        assert!(q.kl > 1e-7 || format == WeightFormat::Stored, "{format} {q:?}");
    }
}

#[test]
fn formats_keep_the_demo_model_as_good_as_it_is() {
    check(BackendName::CpuF32, &WEIGHTS);
}

#[test]
fn activations_of_the_default_backend_do_too() {
    check(BackendName::Cpu, &DEFAULT);
}
