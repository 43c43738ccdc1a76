//! Dot products of integers: quantised weights with activations rounded to int8.
//!
//! Both are in the order of [`crate::packed`]. For each group of 16 blocks the sums of the products
//! of integers, which are exact, become f32, are multiplied with the product of the two scales, and
//! added to one chain of sums in each lane: a result does not depend on the other rows.

use jamba_core::Packing;

use super::Simd;
use super::dots::{self, Turn, prefetch_stream};
use super::integers::Integers;
use crate::packed::{Group, LANES, PAIR, PackedRows, STEP, block_bytes};

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
    let mut out = match w.shape.packing {
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
    let shape = w.shape;
    let equal = x.iter().all(|x| x.len() == shape.blocks.div_ceil(LANES));
    assert!(equal, "rows of different lengths");
    let s = d.simd();
    let (whole, rest) = (shape.blocks / LANES, shape.blocks % LANES);
    let bytes = shape.group_bytes(LANES);
    let of_scales = if shape.has_block_scales() { bytes } else { 0 };
    let mut lanes = [[s.splat(0.0); N]; M];
    let mut of_w = places(w, rows, 0);
    for g in 0..whole {
        let of = (LANES, turn == 0);
        // SAFETY: every row of W has this group, and x too.
        unsafe { group::<D, M, N, FOUR_BITS, true>(d, x, g, of_w, of, &mut lanes) };
        for place in &mut of_w {
            place.quants = place.quants.wrapping_add(bytes);
            place.scales = place.scales.wrapping_byte_add(of_scales);
        }
        turn = if turn == 0 { tiles } else { turn } - 1;
    }
    if rest > 0 {
        let of_w = places(w, rows, whole);
        // Of one row of x alone: with more, there is enough to do meanwhile.
        let of = (rest, M == 1 && turn == 0);
        // SAFETY: the rest of each row has this many blocks, and x has the group.
        unsafe { group::<D, M, N, FOUR_BITS, false>(d, x, whole, of_w, of, &mut lanes) };
    }
    let mut out = [[0.0; N]; M];
    for m in 0..M {
        out[m] = dots::sum(lanes[m], s.splat(0.0), |four| s.sum4(four));
    }
    out
}

/// Where a group of a row of W is.
#[derive(Clone, Copy)]
struct Place {
    quants: *const u8,
    scales: *const u16,
}

/// Where group number `g` is of each of these rows.
#[inline(always)]
fn places<const N: usize>(w: PackedRows<'_>, rows: [usize; N], g: usize) -> [Place; N] {
    /// Scales of a row that has none in its groups.
    const ONES: &[u16; LANES] = &[0x3f80; LANES];
    let mut places = [Place { quants: std::ptr::null(), scales: ONES.as_ptr() }; N];
    for (place, row) in places.iter_mut().zip(rows) {
        let (pair, row) = w.pair(row);
        let ([scales, quants], blocks) = w.shape.group(row, g);
        debug_assert!(scales + blocks * size_of::<u16>() <= pair.len());
        debug_assert!(quants + blocks * block_bytes(w.shape.packing) <= pair.len());
        place.quants = pair.as_ptr().wrapping_add(quants);
        if w.shape.has_block_scales() {
            place.scales = pair.as_ptr().wrapping_add(scales).cast();
        }
    }
    places
}

/// Adds the products of group number g, of so many blocks, 16 if it is a `WHOLE` one. What comes after
/// is fetched meanwhile if asked for, line by line, which is faster than all at once.
///
/// # Safety
/// Each of `w_at` must have the quants of so many blocks, and as many scales, and each row of x the group.
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
    w_at: [Place; N],
    (blocks, fetches): (usize, bool),
    lanes: &mut [[<D::S as Simd>::F; N]; M],
) {
    let s = d.simd();
    let blocks = if WHOLE { LANES } else { blocks };
    // Of `steps` vectors of W, each is multiplied once or, of four bits, twice.
    let steps = if FOUR_BITS { 4 } else { 8 };
    let width = D::S::LANES;
    // One or two rows of x pass over each row of W in turn, the order of memory. Those of larger tiles, or of as
    // many rows as prompts have, pass over all together: loads of x would take longest.
    let together = if M <= 2 && M < D::TILE_M { 1 } else { N };
    debug_assert!((1..=LANES).contains(&blocks) && LANES.is_multiple_of(width));
    debug_assert!(x.iter().all(|x| g < x.len()), "group {g} of x");
    for first in (0..LANES).step_by(width) {
        if !WHOLE && first >= blocks {
            break;
        }
        // SAFETY: the row has the group.
        let x = x.map(|x| unsafe { x.get_unchecked(g) });
        let mut w_scales = [s.splat(0.0); N];
        let left = if WHOLE { width } else { width.min(blocks - first) };
        for n in 0..N {
            // Those of a pair are in one line.
            if fetches && first == 0 && n % PAIR == 0 {
                prefetch_stream(w_at[n].scales);
            }
            // SAFETY: so many are left of it.
            let scales =
                unsafe { std::slice::from_raw_parts(w_at[n].scales.wrapping_add(first), left) };
            w_scales[n] = s.load_bf16_partial(scales);
        }
        let mut sums = [[d.zero(); N]; M];
        for m in 0..M {
            // SAFETY: a group has 16 of them.
            let minus = unsafe { d.load_bytes(x[m].minus[first..].as_ptr().cast()) };
            sums[m] = [if FOUR_BITS { d.start4(minus) } else { d.start8(minus) }; N];
        }
        let of_x =
            |m: usize, step: usize| x[m].quants[(step * LANES + first) * STEP..].as_ptr().cast();
        for row in (0..N).step_by(together) {
            let rows = row..row + together;
            for i in 0..steps {
                let mut w = [d.zero(); N];
                for n in rows.clone() {
                    let at = w_at[n].quants.wrapping_add((i * blocks + first) * STEP);
                    if fetches && first == 0 {
                        prefetch_stream(at);
                    }
                    w[n] = if WHOLE {
                        // SAFETY: a whole group has 16 lanes in each of its vectors.
                        unsafe { d.load_bytes(at) }
                    } else {
                        // SAFETY: so many lanes are left in this vector.
                        unsafe { d.load_some(at, blocks - first) }
                    };
                }
                for (m, sums) in sums.iter_mut().enumerate() {
                    if FOUR_BITS {
                        // SAFETY: a group of x has 8 vectors.
                        let low = unsafe { d.load_bytes(of_x(m, 2 * i)) };
                        // SAFETY: as above.
                        let high = unsafe { d.load_bytes(of_x(m, 2 * i + 1)) };
                        for n in rows.clone() {
                            sums[n] = d.dot4(d.low_bits(w[n]), low, sums[n]);
                        }
                        for n in rows.clone() {
                            sums[n] = d.dot4(d.high_bits(w[n]), high, sums[n]);
                        }
                    } else {
                        // SAFETY: as above.
                        let x = unsafe { d.load_bytes(of_x(m, i)) };
                        for n in rows.clone() {
                            sums[n] = d.dot8(w[n], x, sums[n]);
                        }
                    }
                }
            }
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
