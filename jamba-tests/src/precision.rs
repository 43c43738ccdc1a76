//! Number formats: of a backend's activations, and of stored weights.

use half::{bf16, f16};
use jamba_core::{Dtype, HostTensor};
use serde::{Deserialize, Serialize};

/// The precision in which a backend keeps activations, convolution states and the KV cache. (The
/// SSM state, A and dt are f32 in every backend.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE binary32: 24 bits.
    F32,
    /// bfloat16: 8 bits, hence 2^-9 relative per rounding.
    Bf16,
}

impl Precision {
    /// The nearest value that the backend can hold: inputs are drawn so that the backend and the
    /// oracle start from the same numbers.
    pub fn round(self, v: f32) -> f32 {
        match self {
            Self::F32 => v,
            Self::Bf16 => bf16::from_f32(v).to_f32(),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// Element type in which matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The dtype of stored tensors.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
        }
    }

    /// The nearest value that can be stored.
    pub fn round(self, v: f32) -> f32 {
        match self {
            Self::F32 => v,
            Self::F16 => f16::from_f32(v).to_f32(),
            Self::Bf16 => bf16::from_f32(v).to_f32(),
        }
    }

    /// Stores values, row-major.
    pub(crate) fn store(self, shape: Vec<usize>, values: &[f32]) -> HostTensor {
        let halves = |bits: fn(f32) -> u16| {
            let bits = values.iter().map(|&v| bits(v)).collect();
            HostTensor::from_halves(self.dtype(), shape.clone(), bits)
        };
        match self {
            Self::F32 => HostTensor::from_f32(shape, values.to_vec()),
            Self::F16 => halves(|v| f16::from_f32(v).to_bits()),
            Self::Bf16 => halves(|v| bf16::from_f32(v).to_bits()),
        }
    }
}
