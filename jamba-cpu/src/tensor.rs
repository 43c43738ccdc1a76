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

/// Some columns of some rows of row-major values.
pub(crate) struct View<'a, T = f32> {
    values: &'a [T],
    pub(crate) rows: usize,
    stride: usize,
    start: usize,
    pub(crate) cols: usize,
    index: Option<&'a [usize]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a, T> View<'a, T> {
    /// All columns of `values`, in rows of `cols`.
    pub(crate) fn new(values: &'a [T], cols: usize) -> Self {
        Self::padded(values, cols, cols)
    }

    /// The first `cols` columns of `values`, in rows of `stride`.
    pub(crate) fn padded(values: &'a [T], stride: usize, cols: usize) -> Self {
        let rows = values.len().checked_div(stride).unwrap_or(0);
        Self { values, rows, stride, start: 0, cols, index: None }
    }

    /// Of all rows these, in this order.
    pub(crate) fn select(self, index: &'a [usize]) -> Self {
        debug_assert!(self.index.is_none());
        Self { rows: index.len(), index: Some(index), ..self }
    }

    /// All rows that some of are chosen, and which.
    pub(crate) fn all(self) -> (Self, Option<&'a [usize]>) {
        let rows = match self.index {
            Some(_) => self.values.len().checked_div(self.stride).unwrap_or(0),
            None => self.rows,
        };
        (Self { rows, index: None, ..self }, self.index)
    }

    /// The rows in this range.
    pub(crate) fn range(self, rows: std::ops::Range<usize>) -> Self {
        debug_assert!(rows.end <= self.rows);
        if let Some(index) = self.index {
            return Self { rows: rows.len(), index: Some(&index[rows]), ..self };
        }
        let values = &self.values[rows.start * self.stride..rows.end * self.stride];
        Self { values, rows: rows.len(), ..self }
    }

    /// One row of the columns viewed.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        let row = self.index.map_or(row, |index| index[row]);
        let start = row * self.stride + self.start;
        &self.values[start..start + self.cols]
    }
}

impl<'a> From<&Cols<'a, Tensor>> for View<'a> {
    fn from(x: &Cols<'a, Tensor>) -> Self {
        let [rows, stride] = x.tensor.shape();
        let (start, cols) = (x.cols.start, x.cols.len());
        Self { values: x.tensor.values(), rows, stride, start, cols, index: None }
    }
}
