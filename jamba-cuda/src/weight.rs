//! Parameters on the device.

use half::{bf16, f16};
use jamba_core::quant::Packing;
use jamba_core::shape::{self, Shaped};
use jamba_core::{Dtype, HostTensor, Layout, Param, Role, WeightFormat};

use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::ops::draw::{Drawing, Drawn};
use crate::ops::quant::{Quant, Stored};
use crate::options::Precision;

/// Elements that are converted, on the host or on the device, at a time: what bounds the memory
/// that loading takes.
const CHUNK: usize = 4 << 20;

/// A parameter: a matrix in the precision of the backend, or quantised, its rows and those of the
/// scales of blocks padded with zeros to a multiple of 16 bytes; or a vector or table per channel in f32, without padding.
pub struct Weight {
    shape: [usize; 2],
    role: Role,
    form: Form,
}

enum Form {
    Table(Buffer),
    /// Elements from one row to the next.
    Dense(Buffer, usize),
    Packed {
        packing: Packing,
        quants: Buffer,
        scales: Buffer,
    },
}

/// A matrix as kernels see it that read any form.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    /// `None` where the elements are those of the precision.
    pub(crate) packing: Option<Packing>,
    /// Elements or quants.
    pub(crate) ptr: u64,
    pub(crate) scales: u64,
    /// Bytes from one row to the next, of elements or quants and of scales.
    pub(crate) stride: usize,
    pub(crate) scale_stride: usize,
}

impl Matrix {
    fn packed(packing: Packing, cols: usize, quants: &Buffer, scales: &Buffer) -> Self {
        let [stride, scale_stride] = strides(packing, cols);
        let (packing, ptr, scales) = (Some(packing), quants.ptr(), scales.ptr());
        Self { packing, ptr, scales, stride, scale_stride }
    }

    /// The rows from this one on.
    pub(crate) fn rows_from(self, row: usize) -> Self {
        Self {
            ptr: self.ptr + (row * self.stride) as u64,
            scales: self.scales + (row * self.scale_stride) as u64,
            ..self
        }
    }
}

/// Bytes of the quants of a row and of its scales, padded.
fn strides(packing: Packing, cols: usize) -> [usize; 2] {
    let scales = scale_bytes(packing) * packing.scales(cols);
    let scales = if packing == Packing::Int8Row { scales } else { scales.next_multiple_of(16) };
    [packing.stride(cols).next_multiple_of(16), scales]
}

fn scale_bytes(packing: Packing) -> usize {
    match packing {
        Packing::Int8Row => 4,
        Packing::Int8Block | Packing::Int4Block => 2,
    }
}

/// Bytes that a parameter of this role and shape takes on the device.
pub(crate) fn bytes(
    role: Role,
    [rows, cols]: [u64; 2],
    precision: Precision,
    format: WeightFormat,
) -> u64 {
    let cols = cols as usize;
    let row = match layout(role, precision, format) {
        Layout::F32 => 4 * cols,
        Layout::Packed(packing) => strides(packing, cols).iter().sum(),
        Layout::Stored => element(precision).size() * padded(cols, precision),
    };
    rows.saturating_mul(row as u64)
}

/// How a parameter is quantised on the device. What its format quantises is otherwise kept
/// dequantised: in f32, which holds it exactly, and so are x_proj and dt_proj in bf16, which are
/// some 2 % of the weights and which decode steps read in kernels that do more than a product.
pub(crate) fn packing(role: Role, precision: Precision, format: WeightFormat) -> Option<Packing> {
    match (format.layout(role), precision, role) {
        (_, Precision::F32, _) | (_, _, Role::Selection) => None,
        (Layout::Packed(packing), Precision::Bf16, _) => Some(packing),
        (Layout::F32 | Layout::Stored, ..) => None,
    }
}

/// How a parameter of this role is kept on the device, [`Layout::Stored`] being the elements of the
/// precision: as the format says, but for what is kept dequantised.
pub fn layout(role: Role, precision: Precision, format: WeightFormat) -> Layout {
    match (format.layout(role), packing(role, precision, format)) {
        (Layout::Packed(_), None) => Layout::Stored,
        (layout, _) => layout,
    }
}

/// What matrices consist of that are not quantised.
pub(crate) fn element(precision: Precision) -> Dtype {
    match precision {
        Precision::Bf16 => Dtype::Bf16,
        Precision::F32 => Dtype::F32,
    }
}

/// Elements of a row of a matrix, each of which begins where 16 bytes do.
pub(crate) fn padded(cols: usize, precision: Precision) -> usize {
    cols.next_multiple_of(16 / element(precision).size())
}

/// What makes weights of parameters.
pub(crate) struct Loading<'a> {
    pub(crate) device: &'a Device,
    pub(crate) quant: &'a Quant,
    pub(crate) drawing: &'a Drawing,
    pub(crate) precision: Precision,
    pub(crate) format: WeightFormat,
}

impl Loading<'_> {
    /// Copies the parts one below the other, straight from where they are stored if they are
    /// stored as they are kept; what is random is drawn on the device. What the format quantises is
    /// quantised on the device, and where it is not kept so, dequantised at once.
    pub(crate) fn weight(&self, param: &Param) -> jamba_core::Result<Weight> {
        let &Self { device, precision, .. } = self;
        let shape @ [rows, cols] = shape::upload(param)?;
        let kept = packing(param.role, precision, self.format);
        let form = match (self.format.layout(param.role), kept) {
            (Layout::F32, _) => Form::Table(self.dense(param, cols, Dtype::F32)?),
            (Layout::Stored, _) => {
                let ld = padded(cols, precision);
                Form::Dense(self.dense(param, ld, element(precision))?, ld)
            }
            (Layout::Packed(_), Some(packing)) => {
                let [stride, scale_stride] = strides(packing, cols);
                let (quants, scales) =
                    (device.alloc(rows * stride)?, device.alloc(rows * scale_stride)?);
                let matrix = Matrix::packed(packing, cols, &quants, &scales);
                self.quantize(param, |from, bad| {
                    self.quant.quantize(device, from, (packing, matrix.rows_from(from.first)), bad)
                })?;
                Form::Packed { packing, quants, scales }
            }
            (Layout::Packed(packing), None) => {
                let (ld, size) = (padded(cols, precision), element(precision).size());
                let dense = device.alloc(rows * ld * size)?;
                let [stride, scale_stride] = strides(packing, cols);
                self.quantize(param, |from, bad| {
                    let quants = device.alloc(from.rows * stride)?;
                    let scales = device.alloc(from.rows * scale_stride)?;
                    let part = Matrix::packed(packing, cols, &quants, &scales);
                    self.quant.quantize(device, from, (packing, part), bad)?;
                    let to = dense.ptr() + (from.first * ld * size) as u64;
                    self.quant.dequantize(device, (packing, part), [from.rows, cols], (to, ld))
                })?;
                Form::Dense(dense, ld)
            }
        };
        Ok(Weight { shape, role: param.role, form })
    }

    /// Rows of `ld` elements.
    fn dense(&self, param: &Param, ld: usize, element: Dtype) -> Result<Buffer> {
        let [rows, cols] = param.matrix_shape();
        let size = element.size();
        let mut to = self.device.alloc(rows * ld * size)?;
        let mut row = 0;
        for part in &param.parts {
            let rows = elements(part).checked_div(cols).unwrap_or(0);
            match part.draw() {
                Some(draw) if Drawing::fits(part.dtype(), element) => {
                    let ptr = to.ptr() + (row * ld * size) as u64;
                    let to = Drawn { ptr, element, rows, cols, ld };
                    self.drawing.run(self.device, draw, part.dtype(), to)?;
                }
                _ => self.convert(part, cols, (&mut to, row * ld * size), (ld, element))?,
            }
            part.release();
            row += rows;
        }
        Ok(to)
    }

    fn convert(
        &self,
        part: &HostTensor,
        cols: usize,
        (to, offset): (&mut Buffer, usize),
        (ld, element): (usize, Dtype),
    ) -> Result<()> {
        if part.dtype() == element && ld == cols {
            return self.device.upload(to, offset, part.bytes());
        }
        if cols == 0 {
            return Ok(());
        }
        let size = element.size();
        let rows_at_once = (CHUNK / ld).max(1);
        let row_bytes = cols * part.dtype().size();
        let mut converted = Vec::new();
        for (i, rows) in part.bytes().chunks(rows_at_once * row_bytes).enumerate() {
            converted.clear();
            for row in rows.chunks_exact(row_bytes) {
                convert(part.dtype(), row, element, &mut converted);
                converted.resize(converted.len().next_multiple_of(ld * size), 0);
            }
            self.device.upload(to, offset + i * rows_at_once * ld * size, &converted)?;
        }
        Ok(())
    }

    /// Puts some rows after the other on the device, as they are stored, for `quantize`, which
    /// leaves the number of the first element that cannot be quantised in the buffer.
    fn quantize(
        &self,
        param: &Param,
        quantize: impl Fn(Stored, &Buffer) -> Result<()>,
    ) -> jamba_core::Result<()> {
        let [rows, cols] = param.matrix_shape();
        if rows * cols == 0 {
            return Ok(());
        }
        let rows_at_once = (CHUNK / cols).max(1);
        let mut stage = self.device.alloc(4 * rows_at_once.min(rows) * cols)?;
        let mut bad = self.device.alloc(8)?;
        self.device.upload(&mut bad, 0, &[0xff; 8])?;
        let mut first = 0;
        for part in &param.parts {
            let (dtype, all) = (part.dtype(), elements(part));
            for start in (0..all).step_by(rows_at_once * cols) {
                let end = all.min(start + rows_at_once * cols);
                let (ptr, rows) = (stage.ptr(), (end - start) / cols);
                match part.draw() {
                    Some(draw) if Drawing::fits(dtype, dtype) => {
                        let to = Drawn { ptr, element: dtype, rows, cols, ld: cols };
                        self.drawing.run(self.device, draw.skip(start), dtype, to)?;
                    }
                    _ => self.device.upload(&mut stage, 0, &part.read(start..end))?,
                }
                quantize(Stored { ptr, dtype, rows, cols, first }, &bad)?;
                first += rows;
            }
            part.release();
        }
        let mut found = [0; 8];
        self.device.download(&bad, 0, &mut found)?;
        match u64::from_le_bytes(found) {
            u64::MAX => Ok(()),
            at => Err(out_of_range(param, at as usize)),
        }
    }
}

/// The error for a weight that cannot be quantised, the element of this number.
fn out_of_range(param: &Param, at: usize) -> jamba_core::Error {
    let [_, cols] = param.matrix_shape();
    let (mut before, mut value) = (0, [f32::NAN]);
    for part in &param.parts {
        if (before..before + elements(part)).contains(&at) {
            part.read_f32(at - before, &mut value);
        }
        before += elements(part);
    }
    let (name, row, column) = (param.name.clone(), at / cols, at % cols);
    jamba_core::Error::WeightRange { name, row, column, value: value[0] }
}

impl Weight {
    /// Tells it from every other allocation.
    pub(crate) fn id(&self) -> u64 {
        match &self.form {
            Form::Table(buffer) | Form::Dense(buffer, _) => buffer.id(),
            Form::Packed { quants, .. } => quants.id(),
        }
    }

    /// Elements from one row to the next of a matrix that is not quantised.
    pub(crate) fn ld(&self) -> u32 {
        match self.form {
            Form::Dense(_, ld) => ld as u32,
            Form::Table(_) | Form::Packed { .. } => self.shape[1] as u32,
        }
    }

    /// Address of a matrix in the precision of the backend.
    pub(crate) fn dense(&self) -> jamba_core::Result<u64> {
        match &self.form {
            Form::Dense(buffer, _) => Ok(buffer.ptr()),
            Form::Table(_) | Form::Packed { .. } => Err(other_form("a matrix, not quantised,")),
        }
    }

    /// A matrix in any form.
    pub(crate) fn matrix(&self) -> jamba_core::Result<Matrix> {
        match &self.form {
            Form::Dense(buffer, ld) => Ok(Matrix {
                packing: None,
                ptr: buffer.ptr(),
                scales: 0,
                stride: buffer.bytes().checked_div(self.shape[0]).unwrap_or(*ld),
                scale_stride: 0,
            }),
            Form::Packed { packing, quants, scales } => {
                Ok(Matrix::packed(*packing, self.shape[1], quants, scales))
            }
            Form::Table(_) => Err(other_form("a matrix")),
        }
    }

    /// How it is quantised, if it is.
    pub(crate) fn packing(&self) -> Option<Packing> {
        match self.form {
            Form::Packed { packing, .. } => Some(packing),
            Form::Table(_) | Form::Dense(..) => None,
        }
    }

    /// Address of a vector or table per channel in f32.
    pub(crate) fn vector(&self) -> jamba_core::Result<u64> {
        match &self.form {
            Form::Table(buffer) => Ok(buffer.ptr()),
            Form::Dense(..) | Form::Packed { .. } => Err(other_form("a vector")),
        }
    }

    /// Quants and scales as they lie on the device, for tests: rows of quants, and the bytes of their
    /// scales, both without padding. `None` where it is not quantised.
    #[doc(hidden)]
    pub fn quantized(&self, backend: &crate::CudaBackend) -> Result<Option<[Vec<u8>; 2]>> {
        let Form::Packed { packing, quants, scales } = &self.form else { return Ok(None) };
        let cols = self.shape[1];
        let [stride, scale_stride] = strides(*packing, cols);
        let rows = |from: &Buffer, stride: usize, used: usize| {
            let mut bytes = vec![0; from.bytes()];
            backend.device.download(from, 0, &mut bytes)?;
            let rows = bytes.chunks(stride.max(1)).flat_map(|row| &row[..used]);
            Ok(rows.copied().collect())
        };
        let used = scale_bytes(*packing) * packing.scales(cols);
        Ok(Some([rows(quants, stride, packing.stride(cols))?, rows(scales, scale_stride, used)?]))
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
        let bytes = |role, precision, format| bytes(role, [3, 5], precision, format);
        use WeightFormat::{Int8, Stored};
        assert_eq!(bytes(Role::Linear, Precision::Bf16, Stored), 3 * 8 * 2);
        assert_eq!(bytes(Role::Linear, Precision::F32, Stored), 3 * 8 * 4);
        assert_eq!(bytes(Role::Conv, Precision::Bf16, Stored), 3 * 5 * 4);
        // A block of 32 and its scale, padded to 16 bytes; in f32 what they stand for.
        assert_eq!(bytes(Role::Linear, Precision::Bf16, Int8), 3 * (32 + 16));
        assert_eq!(bytes(Role::Linear, Precision::F32, Int8), 3 * 8 * 4);
    }
}
