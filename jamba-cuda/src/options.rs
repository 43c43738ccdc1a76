//! What a backend is made with.

use std::path::PathBuf;

use jamba_core::WeightFormat;

/// [`Precision::Bf16`]: weights and the KV cache in bf16 too. Weights stored as f16 or f32 are rounded
/// to the nearest bf16, ties to even: f16 has three bits of mantissa more, which are lost.
/// [`Precision::F32`]: all in f32, without TF32.
pub use jamba_core::Precision;

/// Bytes of an element of a weight, or of an operand of a product.
pub(crate) fn element_bytes(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 => 2,
        Precision::F32 => 4,
    }
}

/// Where compiled kernels are kept between runs of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KernelCache {
    /// `$XDG_CACHE_HOME/jamba-cuda`, or `~/.cache/jamba-cuda`; nowhere if neither variable is set.
    #[default]
    Default,
    /// This folder, made if it is not there.
    Folder(PathBuf),
    /// Nowhere: kernels are compiled anew by every backend.
    Off,
}

impl KernelCache {
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        match self {
            Self::Default => variable("XDG_CACHE_HOME")
                .or_else(|| variable("HOME").map(|home| home.join(".cache")))
                .map(|cache| cache.join("jamba-cuda")),
            Self::Folder(folder) => Some(folder.clone()),
            Self::Off => None,
        }
    }
}

/// Options of [`CudaBackend::with_options`](crate::CudaBackend::with_options).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Number of the device, from 0.
    pub ordinal: usize,
    /// Precision of weights and matrix products.
    pub precision: Precision,
    /// How matrices are kept: in the precision where the format says as stored.
    pub format: WeightFormat,
    /// Where compiled kernels are kept.
    pub cache: KernelCache,
    /// For tests: every allocation lies between bytes that are looked at when it is freed, and
    /// what was not written is NaN ([`CudaBackend::overruns`](crate::CudaBackend::overruns)).
    pub is_guarded: bool,
}
