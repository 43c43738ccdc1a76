//! Dot products along contiguous memory: the inner loop of every matrix product.
//!
//! M rows of x and four rows of W at a time share their loads. Each product is one chain of
//! multiply-adds in each lane and one fixed tree over the lanes, whatever the tile it is in: its
//! bits do not depend on which other rows are in the batch.

use std::marker::PhantomData;

use bytemuck::Zeroable;

use super::{Element, Simd};

/// Rows of W in a tile.
pub(crate) const TILE_N: usize = 4;
/// Values of f32 in a line of the cache.
pub(crate) const LINE: usize = 16;
/// Bytes between what is read of a stream and what is fetched meanwhile.
const AHEAD: usize = 1024;
/// Elements that any [`Dots`] takes at once at most.
const MAX_STEP: usize = 32;

/// A way to multiply and add.
pub(crate) trait Dots: Copy + Send + Sync {
    /// Element of x.
    type X: bytemuck::Pod + Send + Sync;
    /// Element of W.
    type W: bytemuck::Pod + Send + Sync;
    /// Elements of W in a register.
    type V: Copy;
    /// Partial sums.
    type Sum: Copy;
    /// Elements that are multiplied at once.
    const STEP: usize;
    /// Rows of x in the largest tile: 6, 4 or 2.
    const TILE_M: usize;

    /// Runs `f` compiled for the instruction set.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;
    /// No products.
    fn zero(self) -> Self::Sum;
    /// Loads elements of W.
    ///
    /// # Safety
    /// [`STEP`](Self::STEP) elements must be readable at `w`.
    unsafe fn load(self, w: *const Self::W) -> Self::V;
    /// Multiplies with elements of x and adds.
    ///
    /// # Safety
    /// [`STEP`](Self::STEP) elements must be readable at `x`.
    unsafe fn dot(self, x: *const Self::X, w: Self::V, sum: Self::Sum) -> Self::Sum;
    /// Adds the lanes of each.
    fn sum4(self, sums: [Self::Sum; 4]) -> [f32; 4];
}

/// f32 activations with weights of any dtype, widened.
pub(crate) struct Widened<S, E>(pub(crate) S, pub(crate) PhantomData<E>);

impl<S: Copy, E> Clone for Widened<S, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Copy, E> Copy for Widened<S, E> {}

impl<S: Simd, E: Element> Dots for Widened<S, E> {
    type X = f32;
    type W = E;
    type V = S::F;
    type Sum = S::F;
    const STEP: usize = S::LANES;
    const TILE_M: usize = S::TILE_M;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        self.0.vectorize(f)
    }

    #[inline(always)]
    fn zero(self) -> S::F {
        self.0.splat(0.0)
    }

    #[inline(always)]
    unsafe fn load(self, w: *const E) -> S::F {
        // SAFETY: the caller's.
        E::load(self.0, unsafe { std::slice::from_raw_parts(w, S::LANES) })
    }

    #[inline(always)]
    unsafe fn dot(self, x: *const f32, w: S::F, sum: S::F) -> S::F {
        // SAFETY: the caller's.
        let x = self.0.load(unsafe { std::slice::from_raw_parts(x, S::LANES) });
        self.0.fma(x, w, sum)
    }

    #[inline(always)]
    fn sum4(self, sums: [S::F; 4]) -> [f32; 4] {
        self.0.sum4(sums)
    }
}

/// Whose turn it is to fetch what of W comes next into the cache, among the tiles that have the same
/// rows of it: each does so at every one of so many steps.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    /// Number of tiles that take turns.
    pub(crate) tiles: usize,
    /// Number of this tile.
    pub(crate) turn: usize,
    /// Whether each row of W is followed by its next one, and not by that of the next tile.
    pub(crate) quarters: bool,
}

impl Turn {
    /// No turn at all.
    pub(crate) const NEVER: Self = Self { tiles: usize::MAX, turn: usize::MAX, quarters: false };
}

/// The products of M rows of x and four rows of W, all of the same length. The rows of W that come
/// next are fetched meanwhile.
#[inline(always)]
pub(crate) fn tile<D: Dots, const M: usize>(
    d: D,
    x: [&[D::X]; M],
    w: [&[D::W]; TILE_N],
    Turn { tiles, mut turn, quarters }: Turn,
) -> [[f32; TILE_N]; M] {
    let k = w[0].len();
    let (mut equal, mut x_at) = (true, [std::ptr::null(); M]);
    for (at, x) in x_at.iter_mut().zip(x) {
        equal &= x.len() == k;
        *at = x.as_ptr();
    }
    for w in w {
        equal &= w.len() == k;
    }
    assert!(equal, "rows of different lengths");
    let w_at = [w[0].as_ptr(), w[1].as_ptr(), w[2].as_ptr(), w[3].as_ptr()];

    let mut sums = [[d.zero(); TILE_N]; M];
    let full = k - k % D::STEP;
    let mut i = 0;
    while i < full {
        // SAFETY: i + STEP <= k, the length of every row.
        unsafe { step(d, x_at, w_at, i, &mut sums) };
        if turn == 0 {
            turn = tiles;
            for w in w_at {
                if quarters {
                    prefetch_stream(w.wrapping_add(i));
                } else {
                    prefetch(w.wrapping_add(TILE_N * k + i));
                }
            }
        }
        turn -= 1;
        i += D::STEP;
    }
    if full < k {
        const { assert!(D::STEP <= MAX_STEP) };
        let mut x_rest = [[D::X::zeroed(); MAX_STEP]; M];
        let mut w_rest = [[D::W::zeroed(); MAX_STEP]; TILE_N];
        for ((at, to), x) in x_at.iter_mut().zip(&mut x_rest).zip(x) {
            to[..k - full].copy_from_slice(&x[full..]);
            *at = to.as_ptr();
        }
        for (to, w) in w_rest.iter_mut().zip(w) {
            to[..k - full].copy_from_slice(&w[full..]);
        }
        let [a, b, c, e] = &w_rest;
        // SAFETY: they are MAX_STEP elements long.
        unsafe {
            step(d, x_at, [a.as_ptr(), b.as_ptr(), c.as_ptr(), e.as_ptr()], 0, &mut sums);
        }
    }
    let mut out = [[0.0; TILE_N]; M];
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = d.sum4(sums);
    }
    out
}

/// Adds the products of the elements from number `i` on of every pair of rows. Written out, because
/// a loop over vectors in an array goes through memory.
///
/// # Safety
/// [`Dots::STEP`] elements must be readable there.
#[inline(always)]
unsafe fn step<D: Dots, const M: usize>(
    d: D,
    x: [*const D::X; M],
    w: [*const D::W; TILE_N],
    i: usize,
    sums: &mut [[D::Sum; TILE_N]; M],
) {
    // SAFETY: the caller's, for this and all below.
    let w0 = unsafe { d.load(w[0].wrapping_add(i)) };
    // SAFETY: as above.
    let w1 = unsafe { d.load(w[1].wrapping_add(i)) };
    // SAFETY: as above.
    let w2 = unsafe { d.load(w[2].wrapping_add(i)) };
    // SAFETY: as above.
    let w3 = unsafe { d.load(w[3].wrapping_add(i)) };
    for m in 0..M {
        let (x, sums) = (x[m].wrapping_add(i), &mut sums[m]);
        // SAFETY: as above.
        sums[0] = unsafe { d.dot(x, w0, sums[0]) };
        // SAFETY: as above.
        sums[1] = unsafe { d.dot(x, w1, sums[1]) };
        // SAFETY: as above.
        sums[2] = unsafe { d.dot(x, w2, sums[2]) };
        // SAFETY: as above.
        sums[3] = unsafe { d.dot(x, w3, sums[3]) };
    }
}

/// Asks for what is at an address, which need not be readable.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no more than a hint: it reads nothing and cannot fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for what comes [`AHEAD`] bytes after an address, in memory that is read from one end to the
/// other: it need come no nearer than the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_stream<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_byte_add(AHEAD).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
