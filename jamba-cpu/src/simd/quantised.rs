//! Dot products of integers: quantised weights with activations rounded to int8.
//!
//! Both are in the order of [`crate::packed`]. For each group of 16 blocks the sums of the products
//! of integers, which are exact, become f32, are multiplied with the product of the two scales, and
//! added to one chain of sums in each lane: a result does not depend on the other rows.

use jamba_core::Packing;

use super::Simd;
use super::dots::{self, Turn, prefetch, prefetch_stream};
use super::integers::Integers;
use crate::packed::{Group, LANES, PackedRows, STEP, block_bytes};

/// Scales between those that are read and those that are fetched meanwhile.
const SCALES_AHEAD: usize = 256;

/// The products of M rows of x and N rows of W, which are given by number. What comes after each row is
/// fetched meanwhile.
#[inline(always)]
pub(crate) fn tile<D: Integers, const M: usize, const N: usize>(
    d: D,
    x: [&[Group]; M],
    w: PackedRows<'_>,
    rows: [usize; N],
    turn: Turn,
) -> [[f32; N]; M] {
    let mut out = match w.packing {
        Packing::Int4Block => sums::<D, M, N, true>(d, x, w, rows, turn),
        Packing::Int8Row | Packing::Int8Block => sums::<D, M, N, false>(d, x, w, rows, turn),
    };
    if !w.row_scales.is_empty() {
        for out in &mut out {
            for (out, row) in out.iter_mut().zip(rows) {
                *out *= w.row_scales[row];
            }
        }
    }
    out
}

/// As [`tile`], without the scales of rows.
#[inline(always)]
fn sums<D: Integers, const M: usize, const N: usize, const FOUR_BITS: bool>(
    d: D,
    x: [&[Group]; M],
    w: PackedRows<'_>,
    rows: [usize; N],
    Turn { tiles, mut turn, .. }: Turn,
) -> [[f32; N]; M] {
    /// Scales of a row that has none in its groups.
    const ONES: &[u16; LANES] = &[0x3f80; LANES];
    let equal = x.iter().all(|x| x.len() == w.blocks.div_ceil(LANES));
    assert!(equal, "rows of different lengths");
    let s = d.simd();
    let (whole, rest) = (w.blocks / LANES, w.blocks % LANES);
    let bytes = block_bytes(w.packing) * LANES;
    let (stride, by_row) = (w.stride(), !w.row_scales.is_empty());
    let quants = rows.map(|row| w.quants[row * stride..][..stride].as_ptr());
    let scales = rows.map(|row| match by_row {
        true => ONES.as_ptr(),
        false => w.block_scales[row * w.blocks..][..w.blocks].as_ptr(),
    });
    let mut lanes = [[s.splat(0.0); N]; M];
    for g in 0..whole {
        debug_assert!((g + 1) * bytes <= stride, "group {g} of rows of {stride} bytes");
        let quants = quants.map(|at| at.wrapping_add(g * bytes));
        let scales = scales.map(|at| at.wrapping_add(if by_row { 0 } else { g * LANES }));
        let of = (LANES, turn == 0);
        // SAFETY: every row of W has this group, and x too.
        unsafe { group::<D, M, N, FOUR_BITS, true>(d, x, g, quants, scales, of, &mut lanes) };
        turn = if turn == 0 { tiles } else { turn } - 1;
    }
    if rest > 0 {
        debug_assert_eq!(whole * bytes + rest * block_bytes(w.packing), stride);
        let quants = quants.map(|at| at.wrapping_add(whole * bytes));
        let scales = scales.map(|at| at.wrapping_add(if by_row { 0 } else { whole * LANES }));
        // Of one row of x alone: with more, there is enough to do meanwhile.
        let of = (rest, M == 1 && turn == 0);
        // SAFETY: the rest of each row has this many blocks, and x has the group.
        unsafe { group::<D, M, N, FOUR_BITS, false>(d, x, whole, quants, scales, of, &mut lanes) };
    }
    let mut out = [[0.0; N]; M];
    for m in 0..M {
        out[m] = dots::sum(lanes[m], s.splat(0.0), |four| s.sum4(four));
    }
    out
}

/// Adds the products of group number g, of so many blocks, 16 if it is a `WHOLE` one. What comes after
/// is fetched meanwhile if asked for, line by line, which is faster than all at once.
///
/// # Safety
/// Each of `quants` must have the bytes of so many blocks, each of `scales` as many, and each row of x
/// the group.
#[inline(always)]
unsafe fn group<
    D: Integers,
    const M: usize,
    const N: usize,
    const FOUR_BITS: bool,
    const WHOLE: bool,
>(
    d: D,
    x: [&[Group]; M],
    g: usize,
    quants: [*const u8; N],
    scales: [*const u16; N],
    (blocks, fetches): (usize, bool),
    lanes: &mut [[<D::S as Simd>::F; N]; M],
) {
    let s = d.simd();
    let blocks = if WHOLE { LANES } else { blocks };
    // Of `steps` vectors of W, each is multiplied once or, of four bits, twice.
    let steps = if FOUR_BITS { 4 } else { 8 };
    let width = D::S::LANES;
    debug_assert!((1..=LANES).contains(&blocks) && LANES.is_multiple_of(width));
    debug_assert!(x.iter().all(|x| g < x.len()), "group {g} of x");
    for first in (0..LANES).step_by(width) {
        if !WHOLE && first >= blocks {
            break;
        }
        // SAFETY: the row has the group.
        let x = x.map(|x| unsafe { x.get_unchecked(g) });
        let mut sums = [[d.zero(); N]; M];
        for m in 0..M {
            // SAFETY: a group has 16 of them.
            let minus = unsafe { d.load_bytes(x[m].minus[first..].as_ptr().cast()) };
            sums[m] = [if FOUR_BITS { d.start4(minus) } else { d.start8(minus) }; N];
        }
        for i in 0..steps {
            let mut w = [d.zero(); N];
            for n in 0..N {
                let at = quants[n].wrapping_add((i * blocks + first) * STEP);
                w[n] = if WHOLE {
                    // SAFETY: a whole group has 16 lanes in each of its vectors.
                    unsafe { d.load_bytes(at) }
                } else {
                    // SAFETY: so many lanes are left in this vector.
                    unsafe { d.load_some(at, blocks - first) }
                };
                if fetches && first == 0 {
                    prefetch_stream(at);
                }
            }
            for m in 0..M {
                let at = |step: usize| x[m].quants[(step * LANES + first) * STEP..].as_ptr().cast();
                if FOUR_BITS {
                    // SAFETY: a group of x has 8 vectors.
                    let low = unsafe { d.load_bytes(at(2 * i)) };
                    // SAFETY: as above.
                    let high = unsafe { d.load_bytes(at(2 * i + 1)) };
                    for n in 0..N {
                        sums[m][n] = d.dot4(d.low_bits(w[n]), low, sums[m][n]);
                    }
                    for n in 0..N {
                        sums[m][n] = d.dot4(d.high_bits(w[n]), high, sums[m][n]);
                    }
                } else {
                    // SAFETY: as above.
                    let x = unsafe { d.load_bytes(at(i)) };
                    for n in 0..N {
                        sums[m][n] = d.dot8(w[n], x, sums[m][n]);
                    }
                }
            }
        }
        let mut w_scales = [s.splat(0.0); N];
        let left = if WHOLE { width } else { width.min(blocks - first) };
        for n in 0..N {
            if fetches {
                prefetch(scales[n].wrapping_add(SCALES_AHEAD));
            }
            // SAFETY: so many are left of it.
            let of_w = unsafe { std::slice::from_raw_parts(scales[n].wrapping_add(first), left) };
            w_scales[n] = s.load_bf16_partial(of_w);
        }
        for m in 0..M {
            let x_scales = s.load(&x[m].scales[first..first + width]);
            for n in 0..N {
                let scale = s.mul(w_scales[n], x_scales);
                lanes[m][n] = s.fma(d.convert(sums[m][n]), scale, lanes[m][n]);
            }
        }
    }
}
