//! Activations.

use jamba_core::host::zeros;
use jamba_core::shape::Shaped;
use jamba_core::{Cols, Error, Result};

/// Row-major f32 activations, allocated for a maximum of rows.
pub struct Tensor {
    values: Vec<f32>,
    rows: usize,
    cols: usize,
    capacity: usize,
}

impl Tensor {
    pub(crate) fn new(capacity: usize, cols: usize) -> Result<Self> {
        let values = zeros("the activations of a step", &[capacity, cols])?;
        Ok(Self { values, rows: 0, cols, capacity })
    }

    /// Sets the rows in use and returns their values, which are to be overwritten.
    pub(crate) fn resize(&mut self, op: &'static str, rows: usize) -> Result<&mut [f32]> {
        if rows > self.capacity {
            let (expected, got) = ([self.capacity, self.cols], [rows, self.cols]);
            return Err(Error::Shape { op, what: "rows in use", expected, got });
        }
        self.rows = rows;
        Ok(self.values_mut())
    }

    /// The rows in use.
    pub(crate) fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.cols]
    }

    /// The rows in use.
    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.cols]
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

/// Some columns of row-major values.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    pub(crate) rows: usize,
    stride: usize,
    start: usize,
    pub(crate) cols: usize,
}

impl<'a> View<'a> {
    /// All columns of `values`, in rows of `cols`.
    pub(crate) fn new(values: &'a [f32], cols: usize) -> Self {
        let rows = values.len().checked_div(cols).unwrap_or(0);
        Self { values, rows, stride: cols, start: 0, cols }
    }

    /// One row of the columns viewed.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        let start = row * self.stride + self.start;
        &self.values[start..start + self.cols]
    }
}

impl<'a> From<&Cols<'a, Tensor>> for View<'a> {
    fn from(x: &Cols<'a, Tensor>) -> Self {
        let [rows, stride] = x.tensor.shape();
        let (start, cols) = (x.cols.start, x.cols.len());
        Self { values: x.tensor.values(), rows, stride, start, cols }
    }
}
