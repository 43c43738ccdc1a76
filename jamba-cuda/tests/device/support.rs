//! Random values, comparison, and what the trials need to know of a backend.

use std::path::PathBuf;
use std::sync::OnceLock;

use half::bf16;
use jamba_core::backend::Backend;
use jamba_core::weights::ParamSpec;
use jamba_core::{HostTensor, Param, ParamSource, Role};
use jamba_cpu::ReferenceBackend;
use jamba_cuda::{CudaBackend, CudaOptions, KernelCache, Precision};

/// A generator of 64-bit states, good enough to fill tensors.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub(crate) fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    pub(crate) fn values(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.between(low, high)).collect()
    }

    /// Values that bf16 has, so that a weight is the same in every precision.
    pub(crate) fn weights(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| bf16::from_f32(self.between(low, high)).to_f32()).collect()
    }
}

/// Parameters of any model, in the domains of trained ones.
pub(crate) struct Random(pub(crate) u64);

impl ParamSource for Random {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let seed = spec.name.bytes().fold(self.0, |h, b| h.wrapping_mul(31) ^ u64::from(b));
        let n = spec.elements() as usize;
        let width = spec.shape.last().map_or(1.0, |&n| n as f32);
        let (low, high) = match spec.role {
            Role::A => (-16.0, -1.0),
            Role::Vector if spec.name.ends_with("dt_proj.bias") => (-5.0, -1.0),
            Role::Vector if spec.name.ends_with("bias") => (-0.2, 0.2),
            Role::Vector => (0.5, 1.5),
            Role::Conv => (-0.5, 0.5),
            _ => (-(3.0 / width).sqrt(), (3.0 / width).sqrt()),
        };
        let values = Rng::new(seed).weights(n, low, high);
        Ok(Param::new(
            spec.name.clone(),
            spec.role,
            HostTensor::from_f32(spec.shape.clone(), values),
        ))
    }
}

/// A backend whose rows beyond those in use can be looked at.
pub(crate) trait Fenced: Backend {
    /// All rows that are allocated.
    fn allocated(&self, x: &Self::Tensor) -> Option<Vec<f32>>;
}

impl Fenced for ReferenceBackend {
    fn allocated(&self, _: &Self::Tensor) -> Option<Vec<f32>> {
        None
    }
}

impl Fenced for CudaBackend {
    fn allocated(&self, x: &Self::Tensor) -> Option<Vec<f32>> {
        Some(self.read_allocated(x).expect("readable"))
    }
}

/// Where the trials keep compiled kernels.
pub(crate) fn cache() -> KernelCache {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = || std::env::temp_dir().join(format!("jamba-cuda-{}", std::process::id()));
    KernelCache::Folder(FOLDER.get_or_init(folder).clone())
}

/// The first card.
pub(crate) fn open(precision: Precision) -> jamba_cuda::Result<CudaBackend> {
    CudaBackend::with_options(CudaOptions { precision, cache: cache(), ..CudaOptions::default() })
}

/// The root of the project.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("JAMBA_ROOT") {
        Some(root) => root.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

/// Largest error as a share of the largest value, and root mean square of the errors as a share
/// of that of the values.
pub(crate) struct Tolerance {
    pub(crate) element: f64,
    pub(crate) rms: f64,
}

/// A product of bf16 operands has errors of 2^-9 in each; they average out in the sum, hence the
/// root mean square is smaller than the largest.
pub(crate) fn tolerance(precision: Precision) -> Tolerance {
    match precision {
        Precision::F32 => Tolerance { element: 1e-5, rms: 3e-6 },
        Precision::Bf16 => Tolerance { element: 1e-2, rms: 4e-3 },
    }
}

/// How far `got` is from `expected`, or why they cannot be compared.
pub(crate) fn difference(got: &[f32], expected: &[f32]) -> Result<(f64, f64), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values instead of {}", got.len(), expected.len()));
    }
    if let Some(i) = got.iter().position(|v| !v.is_finite()) {
        return Err(format!("element {i} is {} instead of {}", got[i], expected[i]));
    }
    let (mut worst, mut largest, mut error, mut square) = (0f64, 0f64, 0f64, 0f64);
    for (&g, &e) in got.iter().zip(expected) {
        let (g, e) = (f64::from(g), f64::from(e));
        worst = worst.max((g - e).abs());
        largest = largest.max(e.abs());
        error += (g - e).powi(2);
        square += e * e;
    }
    let share = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
    Ok((share(worst, largest), share(error.sqrt(), square.sqrt())))
}

/// Fails where `got` is not within the tolerance; tells how far it is otherwise.
pub(crate) fn close(
    name: &str,
    got: &[f32],
    expected: &[f32],
    t: &Tolerance,
) -> Result<(f64, f64), String> {
    let (element, rms) = difference(got, expected).map_err(|e| format!("{name}: {e}"))?;
    if element <= t.element && rms <= t.rms {
        return Ok((element, rms));
    }
    Err(format!("{name}: element {element:.2e}, rms {rms:.2e}"))
}
