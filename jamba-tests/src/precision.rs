//! Number formats: of a backend's activations, and of stored weights.

use half::{bf16, f16};
use jamba_core::{Dtype, HostTensor, Layout, Param, Quantized, Role, WeightFormat};
use serde::{Deserialize, Serialize};

/// The precision in which a backend keeps activations, convolution states and the KV cache. (The
/// SSM state, A and dt are f32 in every backend.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE binary32: 24 bits.
    F32,
    /// IEEE binary32, but operands of products with matrices are rounded to bfloat16 where these are
    /// stored so. Inputs are drawn from bfloat16, so that a product alone is exact.
    Bf16Products,
    /// bfloat16: 8 bits, hence 2^-9 relative per rounding.
    Bf16,
}

impl Precision {
    /// The nearest value that the backend can hold: inputs are drawn so that the backend and the
    /// oracle start from the same numbers.
    pub fn round(self, v: f32) -> f32 {
        match self {
            Self::F32 => v,
            Self::Bf16 | Self::Bf16Products => bf16::from_f32(v).to_f32(),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16Products => "f32, products bf16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Format in which matrices are kept: the values that a weight can have.
///
/// The weights of a problem have, before anyone sees them, the values that their format can hold:
/// a backend that keeps them in it, and the oracle, which computes from them in f64, start from
/// the same numbers. A tolerance is therefore about the rounding of activations only.
///
/// To add a format: a variant, what [`round`](Self::round) makes of the values of each [`Role`],
/// the [`dtype`](Self::dtype) that carries them to a backend, and its rows in
/// [`TABLE`](crate::tolerance::TABLE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// [`WeightFormat::ExpertsInt8`]; matrices that it keeps as stored are in bf16.
    #[serde(rename = "experts-int8")]
    ExpertsInt8,
    /// [`WeightFormat::Int8`].
    Int8,
    /// [`WeightFormat::Int4`].
    Int4,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::ExpertsInt8 => "experts-int8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// What numbers a backend holds: what problems are drawn from, and what decides the tolerance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Of activations.
    pub precision: Precision,
    /// Of matrices: those that problems have.
    pub formats: Vec<Format>,
}

impl From<Precision> for Numbers {
    /// Matrices as they are stored, in any dtype of a checkpoint.
    fn from(precision: Precision) -> Self {
        Self { precision, formats: Format::STORED.to_vec() }
    }
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::F32, Self::F16, Self::Bf16, Self::ExpertsInt8, Self::Int8, Self::Int4];

    /// The dtypes of checkpoints: what a backend without a format of its own keeps.
    pub const STORED: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The formats that quantise.
    pub const QUANTISED: [Self; 3] = [Self::ExpertsInt8, Self::Int8, Self::Int4];

    /// What a backend is to be made with to keep matrices in this format.
    pub fn weight_format(self) -> WeightFormat {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => WeightFormat::Stored,
            Self::ExpertsInt8 => WeightFormat::ExpertsInt8,
            Self::Int8 => WeightFormat::Int8,
            Self::Int4 => WeightFormat::Int4,
        }
    }

    /// The dtype of the tensors that a backend is given: one that holds the values of the format.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 | Self::ExpertsInt8 | Self::Int8 | Self::Int4 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
        }
    }

    /// Makes of the values of a matrix, row-major in rows of `cols`, the nearest that it can have
    /// in this format; `role` tells which matrix it is, for formats that are not of all of them.
    ///
    /// Rounding twice is rounding once: a backend finds the same values again.
    ///
    /// # Panics
    /// If the values are not whole rows, or cannot be quantised.
    pub fn round(self, role: Role, cols: usize, values: &mut [f32]) {
        if let Layout::Packed(packing) = self.weight_format().layout(role) {
            let tensor = HostTensor::from_f32(vec![values.len() / cols, cols], values.to_vec());
            let quantized = Quantized::new(&Param::new("weights", role, tensor), packing);
            let quantized = quantized.expect("weights that can be quantised");
            return values.copy_from_slice(&quantized.dequantize());
        }
        match self {
            Self::F32 => {}
            Self::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
            Self::Bf16 | Self::ExpertsInt8 | Self::Int8 | Self::Int4 => {
                values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            }
        }
    }

    /// Stores values, row-major.
    pub(crate) fn store(self, shape: Vec<usize>, values: &[f32]) -> HostTensor {
        let halves = |bits: fn(f32) -> u16| {
            let bits = values.iter().map(|&v| bits(v)).collect();
            HostTensor::from_halves(self.dtype(), shape.clone(), bits)
        };
        match self.dtype() {
            Dtype::F32 => HostTensor::from_f32(shape, values.to_vec()),
            Dtype::F16 => halves(|v| f16::from_f32(v).to_bits()),
            Dtype::Bf16 => halves(|v| bf16::from_f32(v).to_bits()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn rounding_twice_is_rounding_once() {
        for format in Format::ALL {
            for role in [Role::Embedding, Role::Head, Role::Linear, Role::Router, Role::Experts] {
                for cols in [1, 3, 32, 33, 100] {
                    let mut random = Random::new(7, "weights");
                    let mut once: Vec<f32> = (0..7 * cols).map(|_| random.normal()).collect();
                    format.round(role, cols, &mut once);
                    let mut twice = once.clone();
                    format.round(role, cols, &mut twice);
                    let off =
                        once.iter().zip(&twice).find(|(a, b)| (*a - *b).abs() > 2e-7 * a.abs());
                    assert_eq!(off, None, "{format:?} of {role:?}, {cols} columns");
                    let stored = format.store(vec![7, cols], &once);
                    assert_eq!(*stored.to_f32(), once, "{format:?} is not held by its dtype");
                }
            }
        }
    }
}
