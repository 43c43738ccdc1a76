//! One block or row: its scale and its quants. The parent module states the rules.

use super::{BLOCK, LIMIT};

/// The scales that an int4 block chooses from, as what the largest magnitude is divided by. 8 and
/// 7 are among them: a block that was dequantised has one of these as its largest q. The first
/// gives up some of the largest weight, still less than half a scale, for a finer step.
pub const INT4_STEPS: [f32; 4] = [8.375, 8.0, 7.5, 7.0];

/// Those of an int8 block, with the same reason.
const INT8_STEPS: [f32; 2] = [127.0, 126.0];

/// Fails with the index of a weight that cannot be quantised.
pub(super) fn check(row: &[f32]) -> Result<(), usize> {
    // NaN is not less than anything.
    #[allow(clippy::neg_cmp_op_on_partial_ord)]
    let bad = |w: &f32| !(w.abs() < LIMIT);
    // All of them first: that is a loop of vectors.
    if row.iter().fold(false, |any, w| any | bad(w)) {
        return row.iter().position(bad).map_or(Ok(()), Err);
    }
    Ok(())
}

/// To the nearest integer, ties to even, for magnitudes below 2^22; faster than the function of
/// that name where the machine has no instruction for it.
fn round(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: what is added to it has no bits after the point.
    (v + SHIFT) - SHIFT
}

fn largest(w: &[f32]) -> f32 {
    w.iter().fold(0.0, |a: f32, w| if w.abs() > a { w.abs() } else { a })
}

/// `a / m`, rounded up to a number whose low `bits` bits are zero: `m` times it is at least `a`.
fn divide_up(a: f32, m: f32, bits: u32) -> f32 {
    let low = (1u32 << bits) - 1;
    let up = ((a / m).to_bits() + low) & !low;
    let scale = f32::from_bits(up);
    // The quotient itself may have been rounded down, onto such a number.
    if scale * m < a { f32::from_bits(up + low + 1) } else { scale }
}

/// The quants of a block under a scale, and the squares of what they are off by, in scales.
fn quantize(w: &[f32; BLOCK], scale: f32) -> ([f32; BLOCK], f32) {
    let mut q = [0.0; BLOCK];
    let mut squares = [0.0; BLOCK];
    for i in 0..BLOCK {
        let quotient = w[i] / scale;
        q[i] = round(quotient);
        squares[i] = (quotient - q[i]) * (quotient - q[i]);
    }
    let mut half = BLOCK / 2;
    while half > 0 {
        for i in 0..half {
            squares[i] += squares[i + half];
        }
        half /= 2;
    }
    (q, squares[0])
}

/// The best of the scales with what it makes of the block; `None` if none is usable.
fn best(
    w: &[f32; BLOCK],
    scales: impl IntoIterator<Item = f32>,
    usable: impl Fn(&[f32; BLOCK]) -> bool,
) -> Option<(f32, [f32; BLOCK])> {
    let mut first = None;
    let mut best: Option<(f32, f32, [f32; BLOCK])> = None;
    for scale in scales {
        if scale.abs() < f32::MIN_POSITIVE {
            continue;
        }
        let (q, squares) = quantize(w, scale);
        if !usable(&q) {
            continue;
        }
        let relative = scale / *first.get_or_insert(scale);
        let error = squares * (relative * relative);
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, scale, q));
        }
    }
    best.map(|(_, scale, q)| (scale, q))
}

/// The upper half of a scale, whose lower half is zero.
fn bf16(scale: f32) -> u16 {
    (scale.to_bits() >> 16) as u16
}

/// Quantises a block to int8; the scale as the bits of bf16.
pub(super) fn int8(w: &[f32; BLOCK], quants: &mut [u8]) -> u16 {
    let a = largest(w);
    let scales = INT8_STEPS.map(|m| divide_up(a, m, 16));
    let Some((scale, q)) = best(w, scales, |q| largest(q) >= 126.0) else {
        quants.fill(0);
        return 0;
    };
    quants.iter_mut().zip(q).for_each(|(to, q)| *to = (q as i8).cast_unsigned());
    bf16(scale)
}

/// Quantises a block to 4 bits; the scale as the bits of bf16.
pub(super) fn int4(w: &[f32; BLOCK], quants: &mut [u8]) -> u16 {
    let (low, high) = w.iter().fold((0.0f32, 0.0f32), |(low, high), &w| {
        (if w < low { w } else { low }, if w > high { w } else { high })
    });
    let (a, sign) = if high > -low { (high, -1.0) } else { (-low, 1.0) };
    let scales = INT4_STEPS.map(|m| sign * divide_up(a, m, 16));
    let usable = |q: &[f32; BLOCK]| {
        let (low, high) = q.iter().fold((0.0f32, 0.0f32), |(low, high), &q| {
            (if q < low { q } else { low }, if q > high { q } else { high })
        });
        (-8.0..=-7.0).contains(&low) && high <= 7.0
    };
    let Some((scale, q)) = best(w, scales, usable) else {
        quants.fill(0x88);
        return 0;
    };
    for (j, to) in quants.iter_mut().enumerate() {
        let nibble = |q: f32| (q + 8.0) as u8;
        *to = nibble(q[j]) | nibble(q[j + BLOCK / 2]) << 4;
    }
    bf16(scale)
}

/// Quantises a row to int8; the scale has 16 significant bits.
pub(super) fn int8_row(w: &[f32], quants: &mut [u8]) -> f32 {
    let scale = divide_up(largest(w), 127.0, 8);
    if scale < f32::MIN_POSITIVE {
        quants.fill(0);
        return 0.0;
    }
    let int8 = |w: f32| (round(w / scale) as i8).cast_unsigned();
    quants.iter_mut().zip(w).for_each(|(to, &w)| *to = int8(w));
    scale
}
