//! A row-major matrix handed to several threads, each some of its elements.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use crate::simd::dots::{LINE, prefetch};
use crate::team;

/// Work below which a second thread is no gain.
pub(crate) mod parallel {
    /// Multiply-adds of products with matrices, and of attention.
    pub(crate) const PRODUCTS: usize = 1 << 17;
    /// Multiply-adds of the convolution.
    pub(crate) const CONV: usize = 1 << 13;
    /// Updates of the scan's states.
    pub(crate) const SCAN: usize = 1 << 14;
    /// Elements that are added, multiplied or normed.
    pub(crate) const ELEMENTS: usize = 1 << 15;
}

/// How many rows later the operands are that are fetched into the cache meanwhile, where some columns of many
/// rows are read: they are further apart than the machine looks ahead by itself.
pub(crate) const ROWS_AHEAD: usize = 2;

/// Asks for some columns of a row.
#[inline(always)]
pub(crate) fn prefetch_row(values: &[f32]) {
    values.chunks(LINE).for_each(|line| prefetch(line.as_ptr()));
    // Where the row does not begin with a line.
    if let Some(last) = values.last() {
        prefetch(last);
    }
}

/// A mutable row-major matrix, cut into blocks of columns.
pub(crate) struct Columns<'a> {
    values: *mut f32,
    rows: usize,
    stride: usize,
    cols: usize,
    cut: Cut,
    borrowed: PhantomData<&'a mut [f32]>,
}

/// How columns are cut into blocks.
#[derive(Clone, Copy)]
enum Cut {
    /// As wide as one another.
    Even(usize),
    /// For so many threads, two at least: each round gives every thread one, and is half of what is left; the
    /// last is all of it. Few have to begin, and all end together.
    Halving(usize),
}

/// Columns that blocks of rounds are multiples of.
const STEP: usize = 16;
/// Rounds before the last.
const ROUNDS: usize = 4;

impl Cut {
    /// Block number `index`, empty if there is none.
    fn block(self, cols: usize, index: usize) -> Range<usize> {
        let (mut start, mut index, mut round) = (0, index, 0);
        let width = loop {
            let width = self.width(cols - start);
            match self {
                Self::Halving(threads) if round < ROUNDS && index >= threads => {
                    start = cols.min(start + threads * width);
                    (index, round) = (index - threads, round + 1);
                }
                _ => break width,
            }
        };
        let start = cols.min(start + index * width);
        start..cols.min(start + width)
    }

    /// Width of the blocks of the round before which so many columns are left.
    fn width(self, left: usize) -> usize {
        match self {
            Self::Even(width) => width,
            Self::Halving(threads) => left.div_ceil(2 * threads).next_multiple_of(STEP).max(STEP),
        }
    }

    /// Number of blocks.
    fn len(self, cols: usize) -> usize {
        let (mut left, mut len) = (cols, 0);
        if let Self::Halving(threads) = self {
            for _ in 0..ROUNDS {
                let width = self.width(left);
                len += threads.min(left.div_ceil(width));
                left = left.saturating_sub(threads * width);
            }
        }
        len + left.div_ceil(self.width(left))
    }
}

// SAFETY: it stands for the `&mut [f32]` that it was made from, which is Send and Sync.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above; blocks do not overlap.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Rows of `stride` values, of which the first `cols` are cut into blocks of `width`.
    pub(crate) fn new(values: &'a mut [f32], stride: usize, cols: usize, width: usize) -> Self {
        assert!(cols <= stride && width > 0, "{cols} columns of {stride} in blocks of {width}");
        Self::cut(values, stride, cols, Cut::Even(width))
    }

    /// Rows of `cols` values, cut into blocks for the threads of this step, wide ones first; into one if it is
    /// not `parallel`.
    pub(crate) fn halving(values: &'a mut [f32], cols: usize, parallel: bool) -> Self {
        let cut = match if parallel { team::members() } else { 1 } {
            0..=1 => Cut::Even(cols.max(1)),
            threads => Cut::Halving(threads),
        };
        Self::cut(values, cols, cols, cut)
    }

    /// Columns of the widest block.
    pub(crate) fn widest(&self) -> usize {
        self.cut.block(self.cols, 0).len()
    }

    fn cut(values: &'a mut [f32], stride: usize, cols: usize, cut: Cut) -> Self {
        let rows = values.len().checked_div(stride).unwrap_or(0);
        Self { values: values.as_mut_ptr(), rows, stride, cols, cut, borrowed: PhantomData }
    }

    fn len(&self) -> usize {
        self.cut.len(self.cols)
    }

    /// Block number `index` of some rows.
    ///
    /// # Safety
    /// No other block that lives may have any of its elements.
    unsafe fn block(&self, rows: Range<usize>, index: usize) -> Block<'_> {
        let cols = self.cut.block(self.cols, index);
        debug_assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {}", self.rows);
        debug_assert!(cols.start < self.cols, "column {} of {}", cols.start, self.cols);
        Block {
            values: self.values.wrapping_add(rows.start * self.stride),
            rows: rows.len(),
            stride: self.stride,
            cols,
            borrowed: PhantomData,
        }
    }
}

/// Some columns of some rows of a matrix, to be written by one thread.
pub(crate) struct Block<'a> {
    values: *mut f32,
    rows: usize,
    stride: usize,
    cols: Range<usize>,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl<'a> Block<'a> {
    /// All of a matrix in rows of `cols`.
    pub(crate) fn new(values: &'a mut [f32], cols: usize) -> Self {
        let rows = values.len().checked_div(cols).unwrap_or(0);
        let (values, cols) = (values.as_mut_ptr(), 0..cols);
        Self { values, rows, stride: cols.end, cols, borrowed: PhantomData }
    }

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

/// Calls `f` once for every block, with the same block of each matrix; on several threads if
/// `parallel`. The matrices must have as many blocks each.
pub(crate) fn for_each<const N: usize>(
    matrices: [Columns<'_>; N],
    parallel: bool,
    f: impl Fn([Block<'_>; N]) + Sync,
) {
    let blocks = matrices.first().map_or(0, Columns::len);
    assert!(matrices.iter().all(|m| m.len() == blocks), "matrices of different numbers of blocks");
    run(blocks, parallel, |index| {
        f(std::array::from_fn(|i| {
            let m = &matrices[i];
            // SAFETY: this block is handed out once, and no other overlaps it.
            unsafe { m.block(0..m.rows, index) }
        }));
    });
}

/// Calls `f` once for every block of every group of rows, with the number of the group; on several
/// threads if `parallel`. A group begins where the one before it ends.
pub(crate) fn for_each_group(
    matrix: &Columns<'_>,
    ends: &[usize],
    parallel: bool,
    f: impl Fn(usize, Block<'_>) + Sync,
) {
    let ascend = ends.is_sorted() && ends.last().is_none_or(|end| *end <= matrix.rows);
    assert!(ascend, "groups {ends:?} of {} rows", matrix.rows);
    let blocks = matrix.len();
    run(ends.len() * blocks, parallel, |index| {
        let (group, index) = (index / blocks, index % blocks);
        let start = if group == 0 { 0 } else { ends[group - 1] };
        // SAFETY: this block is handed out once, and no other overlaps it.
        f(group, unsafe { matrix.block(start..ends[group], index) });
    });
}

/// Values that several threads write, each its own.
struct Shared<'a, T> {
    values: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for the `&mut [T]` that it was made from, and each value is handed to one
// thread.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    fn new(values: &'a mut [T]) -> Self {
        Self { values: values.as_mut_ptr(), len: values.len(), borrowed: PhantomData }
    }

    /// `width` values, and fewer at the end.
    ///
    /// # Safety
    /// No other part that lives may have any of them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, width: usize) -> &mut [T] {
        assert!(start <= self.len);
        let width = width.min(self.len - start);
        // SAFETY: they lie within the values, and no other part has any of them.
        unsafe { std::slice::from_raw_parts_mut(self.values.wrapping_add(start), width) }
    }
}

/// Calls `f` once for every `rows` rows of `cols` values, and fewer at the end, with the number of
/// the first; on several threads if `parallel`.
pub(crate) fn for_each_rows<T: Send>(
    values: &mut [T],
    cols: usize,
    rows: usize,
    parallel: bool,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let width = (rows * cols).max(1);
    let (tasks, shared) = (values.len().div_ceil(width), Shared::new(values));
    run(tasks, parallel, |index| {
        // SAFETY: this part is handed out once, and no other overlaps it.
        f(index * rows, unsafe { shared.part(index * width, width) });
    });
}

fn run(tasks: usize, parallel: bool, f: impl Fn(usize) + Sync) {
    if parallel && tasks > 1 {
        team::lead(|| team::run(tasks, f));
    } else {
        (0..tasks).for_each(f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_rounds_are_all_columns_once() {
        for threads in [2, 3, 8, 32, 96, 192] {
            for cols in [0, 1, 16, 17, 160, 2560, 10_240, 65_537] {
                let cut = Cut::Halving(threads);
                let (mut end, mut last) = (0, usize::MAX);
                for index in 0..cut.len(cols) {
                    let block = cut.block(cols, index);
                    assert_eq!(block.start, end, "{threads} threads, {cols} columns");
                    assert!((1..=last).contains(&block.len()), "{block:?} after {last}");
                    (end, last) = (block.end, block.len());
                }
                assert_eq!(end, cols, "{threads} threads");
                let enough = cut.len(cols) >= 3 * threads || last <= STEP || cols == 0;
                assert!(enough, "{threads} threads, {cols} columns: {}", cut.len(cols));
            }
        }
    }

    #[test]
    fn every_column_is_written_once_by_any_number_of_threads() {
        for threads in [1, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut values = vec![0.0; 2 * 333];
            let write = || {
                for_each([Columns::halving(&mut values, 333, true)], true, |[mut block]| {
                    let start = block.cols().start;
                    for row in 0..2 {
                        for (i, v) in block.row(row).iter_mut().enumerate() {
                            *v += (row * 333 + start + i) as f32;
                        }
                    }
                });
            };
            pool.install(write);
            assert!(values.iter().enumerate().all(|(i, v)| *v == i as f32), "{threads} threads");
        }
    }
}
