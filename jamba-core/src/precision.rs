//! The precision of matrix products.

/// In which precision a backend computes matrix products. The residual stream, the states of
/// the scan, and everything that is not a matrix product are f32 in both; a backend may round what a
/// product reads where it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands rounded to bf16, sums in f32. What a backend does with matrices that are stored
    /// otherwise, and with the KV cache, it says itself.
    #[default]
    Bf16,
    /// Operands and sums in f32.
    F32,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}
