//! The one table of tolerances, each with its reason.

/// How far a tensor may be from what it is compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Largest `|got - expected|` of any element, as a share of the largest `|expected|`.
    pub element: f64,
    /// Largest root mean square of `got - expected`, as a share of that of `expected`.
    pub rms: f64,
    /// Why it is not smaller.
    pub reason: &'static str,
}

/// Activations and states against transformers in f32, the whole model run from the tokens.
///
/// The golden values are themselves f32 results: transformers in f64 departs from them by up to
/// 1.2e-5 of the largest magnitude in the eight-layer configurations.
pub const GOLDEN: Tolerance = Tolerance {
    element: 2e-5,
    rms: 1e-5,
    reason: "two f32 computations of up to eight layers, each with its own order of summation",
};
