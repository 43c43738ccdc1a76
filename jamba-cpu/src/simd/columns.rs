//! A row-major matrix handed to several threads, each some of its columns.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

/// A mutable row-major matrix, cut into blocks of columns.
pub(crate) struct Columns<'a> {
    values: *mut f32,
    rows: usize,
    stride: usize,
    cols: usize,
    width: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for the `&mut [f32]` that it was made from, which is Send and Sync.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above; blocks are only made in `for_each`, each column once.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Rows of `stride` values, of which the first `cols` are cut into blocks of `width`.
    pub(crate) fn new(values: &'a mut [f32], stride: usize, cols: usize, width: usize) -> Self {
        assert!(cols <= stride && width > 0, "{cols} columns of {stride} in blocks of {width}");
        let rows = values.len().checked_div(stride).unwrap_or(0);
        Self { values: values.as_mut_ptr(), rows, stride, cols, width, borrowed: PhantomData }
    }

    fn len(&self) -> usize {
        self.cols.div_ceil(self.width)
    }
}

/// Some columns of a matrix, to be written by one thread.
pub(crate) struct Block<'a> {
    values: *mut f32,
    rows: usize,
    stride: usize,
    cols: Range<usize>,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl Block<'_> {
    /// Which columns of the matrix these are.
    pub(crate) fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// Those columns of a row.
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies within the matrix.
        let start = unsafe { self.values.add(row * self.stride + self.cols.start) };
        // SAFETY: so do these columns of it; no other block has them, and this one is borrowed
        // mutably for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(start, self.cols.len()) }
    }
}

/// Calls `f` once for every block, with the same block of each matrix; on the threads of the
/// current pool if `parallel`. The matrices must have as many blocks each.
pub(crate) fn for_each<const N: usize>(
    matrices: [Columns<'_>; N],
    parallel: bool,
    f: impl Fn([Block<'_>; N]) + Sync,
) {
    let blocks = matrices.first().map_or(0, Columns::len);
    assert!(matrices.iter().all(|m| m.len() == blocks), "matrices of different numbers of blocks");
    let call = |index: usize| {
        f(std::array::from_fn(|i| {
            let m = &matrices[i];
            let start = index * m.width;
            Block {
                values: m.values,
                rows: m.rows,
                stride: m.stride,
                cols: start..(start + m.width).min(m.cols),
                borrowed: PhantomData,
            }
        }));
    };
    if parallel && blocks > 1 {
        (0..blocks).into_par_iter().for_each(call);
    } else {
        (0..blocks).for_each(call);
    }
}
