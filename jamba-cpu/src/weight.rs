//! Parameters in the form that the kernels want.

use std::ops::Range;

use half::{bf16, f16};
use jamba_core::shape::{self, Shaped};
use jamba_core::{Dtype, Error, HostTensor, Layout, Param, Quantized, Result, Role, WeightFormat};

use crate::packed::Packed;

/// Rows of per-channel tables are padded to a multiple of the widest vector.
pub(crate) const PAD: usize = 16;

/// A parameter.
pub struct Weight {
    shape: [usize; 2],
    role: Role,
    form: Form,
}

enum Form {
    /// A matrix as it is stored, in pieces laid one below the other.
    Matrix(Vec<Piece>),
    /// A quantised matrix.
    Packed(Packed),
    /// A vector.
    Vector(Vec<f32>),
    /// A table per channel, transposed, channels padded with zeros to a multiple of [`PAD`]: what
    /// vectors across channels read. Of the convolution `(cols, padded rows)`; of A
    /// `(padded rows / PAD, cols, PAD)`, as the states of the scan are.
    Transposed(Vec<f32>),
}

/// Some rows of a matrix, in their stored dtype: mapped from the checkpoint where they are
/// aligned for it, copied otherwise.
struct Piece {
    rows: usize,
    values: Values,
}

enum Values {
    Stored(HostTensor),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// Rows of a matrix in one dtype, or quantised.
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// These rows of it.
    Packed(&'a Packed, Range<usize>),
}

impl Weight {
    pub(crate) fn new(param: Param, format: WeightFormat) -> Result<Self> {
        let shape @ [rows, cols] = shape::upload(&param)?;
        let role = param.role;
        let form = match role {
            Role::Vector => Form::Vector(param.to_f32()),
            Role::Conv => {
                let all = rows.next_multiple_of(PAD);
                Form::Transposed(transposed(&param.to_f32(), rows, cols, all))
            }
            Role::A => Form::Transposed(transposed(&param.to_f32(), rows, cols, PAD)),
            Role::Embedding
            | Role::Head
            | Role::Linear
            | Role::Selection
            | Role::Router
            | Role::Experts
            | Role::Mlp => match format.layout(param.role) {
                Layout::Packed(packing) => {
                    Form::Packed(Packed::new(Quantized::new(&param, packing)?)?)
                }
                Layout::F32 | Layout::Stored => {
                    Form::Matrix(param.parts.into_iter().map(|p| Piece::new(p, cols)).collect())
                }
            },
        };
        Ok(Self { shape, role, form })
    }

    /// The vector that this is.
    pub(crate) fn vector(&self) -> Result<&[f32]> {
        match &self.form {
            Form::Vector(values) => Ok(values),
            _ => Err(other_form("a vector")),
        }
    }

    /// The per-channel table that this is.
    pub(crate) fn transposed(&self) -> Result<&[f32]> {
        match &self.form {
            Form::Transposed(values) => Ok(values),
            _ => Err(other_form("a table per channel")),
        }
    }

    /// Fails if this is not a matrix.
    pub(crate) fn check_matrix(&self) -> Result<()> {
        self.pieces(0, 0, |_, _| ())
    }

    /// Whether any of it is stored as bf16.
    pub(crate) fn has_bf16(&self) -> bool {
        let Form::Matrix(pieces) = &self.form else { return false };
        pieces.iter().any(|piece| matches!(piece.rows(0..0), Rows::Bf16(_)))
    }

    /// Whether it is quantised.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.form, Form::Packed(_))
    }

    /// Calls `f` with the pieces that make up these rows of the matrix, and the number of the
    /// first row of each, counted from `start`.
    pub(crate) fn pieces<'a>(
        &'a self,
        start: usize,
        len: usize,
        mut f: impl FnMut(usize, Rows<'a>),
    ) -> Result<()> {
        let pieces = match &self.form {
            Form::Matrix(pieces) => pieces,
            Form::Packed(weights) => {
                if len > 0 {
                    f(0, Rows::Packed(weights, start..start + len));
                }
                return Ok(());
            }
            Form::Vector(_) | Form::Transposed(_) => return Err(other_form("a matrix")),
        };
        let cols = self.shape[1];
        let mut first = 0;
        for piece in pieces {
            let from = start.max(first);
            let to = (start + len).min(first + piece.rows);
            if from < to {
                let range = (from - first) * cols..(to - first) * cols;
                f(from - start, piece.rows(range));
            }
            first += piece.rows;
        }
        Ok(())
    }
}

impl Shaped for Weight {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn role(&self) -> Option<Role> {
        Some(self.role)
    }
}

impl Piece {
    fn new(tensor: HostTensor, cols: usize) -> Self {
        let rows = tensor.shape().iter().product::<usize>().checked_div(cols).unwrap_or(0);
        let aligned = tensor.bytes().as_ptr().addr().is_multiple_of(tensor.dtype().size());
        let values = match tensor.dtype() {
            _ if aligned => Values::Stored(tensor),
            Dtype::F32 => Values::F32(tensor.to_f32().into_owned()),
            Dtype::F16 => Values::F16(copied(tensor.bytes(), f16::from_bits)),
            Dtype::Bf16 => Values::Bf16(copied(tensor.bytes(), bf16::from_bits)),
        };
        Self { rows, values }
    }

    /// Some of its elements.
    fn rows(&self, elements: Range<usize>) -> Rows<'_> {
        match &self.values {
            Values::Stored(tensor) => match tensor.dtype() {
                Dtype::F32 => Rows::F32(&bytemuck::cast_slice(tensor.bytes())[elements]),
                Dtype::F16 => Rows::F16(&bytemuck::cast_slice(tensor.bytes())[elements]),
                Dtype::Bf16 => Rows::Bf16(&bytemuck::cast_slice(tensor.bytes())[elements]),
            },
            Values::F32(values) => Rows::F32(&values[elements]),
            Values::F16(values) => Rows::F16(&values[elements]),
            Values::Bf16(values) => Rows::Bf16(&values[elements]),
        }
    }
}

fn copied<T>(bytes: &[u8], from_bits: impl Fn(u16) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|b| from_bits(u16::from_le_bytes(*b))).collect()
}

impl Rows<'_> {
    /// The values as f32.
    pub(crate) fn widen(self, to: &mut [f32]) {
        match self {
            Self::F32(v) => to.copy_from_slice(v),
            Self::F16(v) => to.iter_mut().zip(v).for_each(|(to, v)| *to = v.to_f32()),
            Self::Bf16(v) => to.iter_mut().zip(v).for_each(|(to, v)| *to = v.to_f32()),
            Self::Packed(weights, rows) => {
                weights.widen(rows, to);
            }
        }
    }
}

/// `(padded rows / group, cols, group)`.
fn transposed(values: &[f32], rows: usize, cols: usize, group: usize) -> Vec<f32> {
    let mut out = vec![0.0; cols * rows.next_multiple_of(PAD)];
    for r in 0..rows {
        for c in 0..cols {
            out[(r / group * cols + c) * group + r % group] = values[r * cols + c];
        }
    }
    out
}

fn other_form(needed: &str) -> Error {
    Error::Unsupported { backend: "cpu", what: format!("this parameter where {needed} is needed") }
}
