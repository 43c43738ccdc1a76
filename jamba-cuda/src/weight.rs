//! Parameters on the device.

use half::{bf16, f16};
use jamba_core::shape::{self, Shaped};
use jamba_core::{Dtype, HostTensor, Param, Role};

use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::ops::draw::{Drawing, Drawn};
use crate::options::Precision;

/// Elements that are converted on the host at a time: what bounds its memory.
const CHUNK: usize = 4 << 20;

/// A parameter: a matrix in the precision of the backend, its rows padded with zeros to a
/// multiple of 16 bytes; or a vector or table per channel in f32, without padding.
pub struct Weight {
    buffer: Buffer,
    shape: [usize; 2],
    ld: usize,
    element: Dtype,
    matrix: bool,
    role: Role,
}

/// Bytes that a parameter of this role and shape takes on the device.
pub(crate) fn bytes(role: Role, rows: u64, cols: u64, precision: Precision) -> u64 {
    let (element, ld, _) = form(role, cols as usize, precision);
    rows * ld as u64 * element.size() as u64
}

/// Element type, elements per row, and whether it is a matrix.
fn form(role: Role, cols: usize, precision: Precision) -> (Dtype, usize, bool) {
    match (role, precision) {
        (Role::Vector | Role::Conv | Role::A, _) => (Dtype::F32, cols, false),
        (_, Precision::Bf16) => (Dtype::Bf16, cols.next_multiple_of(8), true),
        (_, Precision::F32) => (Dtype::F32, cols.next_multiple_of(4), true),
    }
}

impl Weight {
    /// Copies the parts one below the other, straight from where they are stored if they are
    /// stored as they are kept; what is random is drawn on the device.
    pub(crate) fn new(
        device: &Device,
        drawing: &Drawing,
        param: &Param,
        precision: Precision,
    ) -> jamba_core::Result<Self> {
        let shape @ [rows, cols] = shape::upload(param)?;
        let (element, ld, matrix) = form(param.role, cols, precision);
        let buffer = device.alloc(rows * ld * element.size())?;
        let mut weight = Self { buffer, shape, ld, element, matrix, role: param.role };
        let mut row = 0;
        for part in &param.parts {
            let rows = elements(part).checked_div(cols).unwrap_or(0);
            match part.draw() {
                Some(draw) if Drawing::fits(part.dtype(), element) => {
                    let ptr = weight.buffer.ptr() + (row * ld * element.size()) as u64;
                    let to = Drawn { ptr, element, rows, cols, ld };
                    drawing.run(device, draw, part.dtype(), to)?;
                }
                _ => weight.upload(device, part, row)?,
            }
            part.release();
            row += rows;
        }
        Ok(weight)
    }

    fn upload(&mut self, device: &Device, part: &HostTensor, row: usize) -> Result<()> {
        let ([_, cols], ld, size) = (self.shape, self.ld, self.element.size());
        let offset = row * ld * size;
        if part.dtype() == self.element && ld == cols {
            return device.upload(&mut self.buffer, offset, part.bytes());
        }
        if cols == 0 {
            return Ok(());
        }
        let rows_at_once = (CHUNK / ld).max(1);
        let row_bytes = cols * part.dtype().size();
        let mut converted = Vec::new();
        for (i, rows) in part.bytes().chunks(rows_at_once * row_bytes).enumerate() {
            converted.clear();
            for row in rows.chunks_exact(row_bytes) {
                convert(part.dtype(), row, self.element, &mut converted);
                converted.resize(converted.len().next_multiple_of(ld * size), 0);
            }
            let at = offset + i * rows_at_once * ld * size;
            device.upload(&mut self.buffer, at, &converted)?;
        }
        Ok(())
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.buffer.ptr()
    }

    /// Tells it from every other allocation.
    pub(crate) fn id(&self) -> u64 {
        self.buffer.id()
    }

    /// Elements from one row to the next.
    pub(crate) fn ld(&self) -> u32 {
        self.ld as u32
    }

    /// Address of a matrix in the precision of the backend.
    pub(crate) fn matrix(&self) -> jamba_core::Result<u64> {
        if self.matrix { Ok(self.ptr()) } else { Err(other_form("a matrix")) }
    }

    /// Address of a vector or table per channel in f32.
    pub(crate) fn vector(&self) -> jamba_core::Result<u64> {
        if self.matrix { Err(other_form("a vector")) } else { Ok(self.ptr()) }
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

fn elements(part: &HostTensor) -> usize {
    part.shape().iter().product()
}

/// Appends the elements in another type.
fn convert(from: Dtype, bytes: &[u8], to: Dtype, out: &mut Vec<u8>) {
    if from == to {
        return out.extend_from_slice(bytes);
    }
    let start = out.len();
    out.resize(start + bytes.len() / from.size() * to.size(), 0);
    let out = &mut out[start..];
    let half = |b: [u8; 2]| match from {
        Dtype::Bf16 => bf16::from_le_bytes(b).to_f32(),
        _ => f16::from_le_bytes(b).to_f32(),
    };
    match (from.size(), to) {
        (4, _) => each(bytes, out, |b| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()),
        (_, Dtype::F32) => each(bytes, out, |b| half(b).to_le_bytes()),
        (_, _) => each(bytes, out, |b| bf16::from_f32(half(b)).to_le_bytes()),
    }
}

fn each<const N: usize, const M: usize>(
    bytes: &[u8],
    out: &mut [u8],
    convert: impl Fn([u8; N]) -> [u8; M],
) {
    let elements = bytes.as_chunks::<N>().0.iter();
    elements.zip(out.as_chunks_mut::<M>().0).for_each(|(from, to)| *to = convert(*from));
}

fn other_form(needed: &str) -> jamba_core::Error {
    let what = format!("this parameter where {needed} is needed");
    jamba_core::Error::Unsupported { backend: "cuda", what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_round_to_the_nearest() {
        let mut out = Vec::new();
        let third = f16::from_f32(1.0 / 3.0);
        convert(Dtype::F16, &third.to_le_bytes(), Dtype::Bf16, &mut out);
        assert_eq!(out, bf16::from_f32(third.to_f32()).to_le_bytes());
        out.clear();
        convert(Dtype::Bf16, &bf16::from_f32(-2.5).to_le_bytes(), Dtype::F32, &mut out);
        assert_eq!(out, (-2.5f32).to_le_bytes());
    }

    #[test]
    fn matrices_are_padded_and_tables_are_not() {
        assert_eq!(bytes(Role::Linear, 3, 5, Precision::Bf16), 3 * 8 * 2);
        assert_eq!(bytes(Role::Linear, 3, 5, Precision::F32), 3 * 8 * 4);
        assert_eq!(bytes(Role::Conv, 3, 5, Precision::Bf16), 3 * 5 * 4);
    }
}
