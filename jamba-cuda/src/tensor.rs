//! Activations.

use jamba_core::Cols;
use jamba_core::shape::Shaped;

use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::linear::Operand;

/// Row-major f32 activations on the device, allocated for a maximum of rows.
///
/// What an operator gives is f32, as it does not know who reads it. The blocks of prompts, which do,
/// keep what they round to bf16 in the same memory (`rounded`). A tensor belongs to
/// the backend that allocated it.
pub struct Tensor {
    buffer: Buffer,
    rows: usize,
    cols: usize,
    capacity: usize,
}

impl Tensor {
    pub(crate) fn new(device: &Device, capacity: usize, cols: usize) -> Result<Self> {
        // Kernels count rows and columns, each by itself, in 32 bits.
        for (what, got) in [("rows", capacity), ("columns", cols)] {
            if got > i32::MAX as usize {
                let allowed = "2^31 - 1 is the most";
                return Err(Error::Size { op: "alloc", what, got, allowed });
            }
        }
        let mut buffer = device.alloc(4 * capacity * cols)?;
        device.poison(&mut buffer)?;
        Ok(Self { buffer, rows: 0, cols, capacity })
    }

    /// Sets the rows in use, which are to be overwritten.
    pub(crate) fn resize(&mut self, op: &'static str, rows: usize) -> jamba_core::Result<()> {
        if rows > self.capacity {
            let (expected, got) = ([self.capacity, self.cols], [rows, self.cols]);
            return Err(jamba_core::Error::Shape { op, what: "rows in use", expected, got });
        }
        self.rows = rows;
        Ok(())
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Its memory as rows of bf16, for what only the operators of a fused block read: `ptr`, and
    /// the rows and columns that it has room for as its own.
    pub(crate) fn rounded(&self, op: &'static str, rows: usize) -> jamba_core::Result<Operand> {
        if rows > self.capacity {
            let (expected, got) = ([self.capacity, self.cols], [rows, self.cols]);
            return Err(jamba_core::Error::Shape { op, what: "rows in use", expected, got });
        }
        Ok(Operand { ptr: self.ptr(), rows, ld: self.cols as u32 })
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.buffer.ptr()
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    pub(crate) fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }
}

impl Shaped for Tensor {
    fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Some columns of a tensor, as a kernel sees them.
#[derive(Clone, Copy)]
pub(crate) struct View {
    /// Address of the first element.
    pub(crate) ptr: u64,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Elements from one row to the next.
    pub(crate) ld: u32,
}

impl View {
    /// Whether 16 bytes can be read at every fourth element.
    pub(crate) fn aligned(&self) -> bool {
        self.ptr.is_multiple_of(16) && self.ld.is_multiple_of(4)
    }
}

impl From<&Cols<'_, Tensor>> for View {
    fn from(x: &Cols<'_, Tensor>) -> Self {
        let ptr = x.tensor.ptr() + 4 * x.cols.start as u64;
        Self { ptr, rows: x.tensor.rows, cols: x.cols.len(), ld: x.tensor.cols as u32 }
    }
}
