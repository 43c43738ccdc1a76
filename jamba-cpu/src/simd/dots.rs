//! Dot products along contiguous memory: the inner loop of every matrix product.
//!
//! M rows of x and N rows of W at a time share their loads. Each product is one chain of
//! multiply-adds in each lane and one fixed tree over the lanes, whatever the tile it is in: its
//! bits do not depend on which other rows are in the batch.

use std::marker::PhantomData;

use bytemuck::Zeroable;

use super::{Element, Simd};

/// Rows of W in a tile, at most.
pub(crate) const TILE_N: usize = 4;
/// Values of f32 in a line of the cache.
pub(crate) const LINE: usize = 16;
/// Bytes between what is read of a stream and what is fetched meanwhile.
const AHEAD: usize = 4096;
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
    /// Whether the rows of W that are read together are streams, each followed by its next one, and not
    /// neighbours.
    pub(crate) streams: bool,
}

impl Turn {
    /// No turn at all, over neighbours.
    pub(crate) const NEVER: Self = Self { tiles: usize::MAX, turn: usize::MAX, streams: false };
}

/// The products of M rows of x and N rows of W, at most [`TILE_N`], all of the same length. The rows of W
/// that come next are fetched meanwhile.
#[inline(always)]
pub(crate) fn tile<D: Dots, const M: usize, const N: usize>(
    d: D,
    x: [&[D::X]; M],
    w: [&[D::W]; N],
    Turn { tiles, mut turn, streams }: Turn,
) -> [[f32; N]; M] {
    let k = w[0].len();
    let equal = x.iter().all(|x| x.len() == k) && w.iter().all(|w| w.len() == k);
    assert!(equal, "rows of different lengths");
    let (x_at, w_at) = (x.map(<[_]>::as_ptr), w.map(<[_]>::as_ptr));
    let mut sums = [[d.zero(); N]; M];
    let full = k - k % D::STEP;
    let mut i = 0;
    while i < full {
        // SAFETY: i + STEP <= k, the length of every row.
        unsafe { step(d, x_at, w_at, i, &mut sums) };
        if turn == 0 {
            turn = tiles;
            for w in w_at {
                if streams {
                    // With more rows of x there is less room in the first-level cache.
                    prefetch(w.wrapping_add(i).wrapping_byte_add(if M == 1 {
                        AHEAD
                    } else {
                        AHEAD / 2
                    }));
                } else {
                    prefetch(w.wrapping_add(N * k + i));
                }
            }
        }
        turn -= 1;
        i += D::STEP;
    }
    if full < k {
        const { assert!(D::STEP <= MAX_STEP) };
        let mut x_rest = [[D::X::zeroed(); MAX_STEP]; M];
        let mut w_rest = [[D::W::zeroed(); MAX_STEP]; N];
        for (to, x) in x_rest.iter_mut().zip(x) {
            to[..k - full].copy_from_slice(&x[full..]);
        }
        for (to, w) in w_rest.iter_mut().zip(w) {
            to[..k - full].copy_from_slice(&w[full..]);
        }
        let (mut x_at, mut w_at) = (x_at, w_at);
        x_at.iter_mut().zip(&x_rest).for_each(|(at, rest)| *at = rest.as_ptr());
        w_at.iter_mut().zip(&w_rest).for_each(|(at, rest)| *at = rest.as_ptr());
        // SAFETY: they are MAX_STEP elements long.
        unsafe { step(d, x_at, w_at, 0, &mut sums) };
    }
    // By number, as in `step`.
    let mut out = [[0.0; N]; M];
    for m in 0..M {
        out[m] = sum(sums[m], d.zero(), |four| d.sum4(four));
    }
    out
}

/// Adds the lanes of each of N vectors, at most four, by what does so for four.
#[inline(always)]
pub(super) fn sum<V: Copy, const N: usize>(
    vectors: [V; N],
    zero: V,
    sum4: impl FnOnce([V; TILE_N]) -> [f32; TILE_N],
) -> [f32; N] {
    const { assert!(N <= TILE_N) };
    let at = |n: usize| if n < N { vectors[n] } else { zero };
    let four = sum4([at(0), at(1), at(2), at(3)]);
    std::array::from_fn(|n| four[n])
}

/// Adds the products of the elements from number `i` on of every pair of rows.
///
/// # Safety
/// [`Dots::STEP`] elements must be readable there.
#[inline(always)]
unsafe fn step<D: Dots, const M: usize, const N: usize>(
    d: D,
    x: [*const D::X; M],
    w: [*const D::W; N],
    i: usize,
    sums: &mut [[D::Sum; N]; M],
) {
    // By number and not by `map`: a function of an array of vectors that is not inlined takes them through
    // memory, and without the instructions of `vectorize`.
    // SAFETY: the caller's.
    let mut v = [unsafe { d.load(w[0].wrapping_add(i)) }; N];
    for n in 1..N {
        // SAFETY: as above.
        v[n] = unsafe { d.load(w[n].wrapping_add(i)) };
    }
    for m in 0..M {
        for n in 0..N {
            // SAFETY: as above.
            sums[m][n] = unsafe { d.dot(x[m].wrapping_add(i), v[n], sums[m][n]) };
        }
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
/// other.
#[inline(always)]
pub(crate) fn prefetch_stream<T>(at: *const T) {
    prefetch(at.wrapping_byte_add(AHEAD));
}
