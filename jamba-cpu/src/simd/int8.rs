//! Dot products of integers: quantised weights with activations rounded to int8.
//!
//! Both are in the order of [`crate::packed`]. For each group of 16 blocks the sums of the products
//! of integers, which are exact, become f32, are multiplied with the product of the two scales, and
//! added to one chain of sums in each lane: a result does not depend on the other rows.

use jamba_core::Packing;

use crate::packed::{ActivationRow, GROUP, LANES, PackedRows, STEP, block_bytes};

/// Sums of products of a group, one for each block.
type Sums = [i32; LANES];

/// The products of M rows of x and rows `j` to `j + N` of W; past the last row it stands in for
/// those that are not there. Any machine.
#[inline(always)]
pub(crate) fn tile<const M: usize, const N: usize>(
    x: [ActivationRow<'_>; M],
    w: PackedRows<'_>,
    rows: [usize; N],
) -> [[f32; N]; M] {
    let mut out = [[0.0; N]; M];
    let bytes = block_bytes(w.packing);
    for n in 0..N {
        let quants = &w.quants[rows[n] * w.stride()..][..w.stride()];
        let mut lanes = [[0f32; LANES]; M];
        for (g, quants) in quants.chunks(LANES * bytes).enumerate() {
            let blocks = quants.len() / bytes;
            let mut scales = [1f32; LANES];
            if w.row_scales.is_empty() {
                let bits = &w.block_scales[rows[n] * w.blocks + g * LANES..][..blocks];
                scales.iter_mut().zip(bits).for_each(|(s, b)| {
                    *s = f32::from_bits(u32::from(*b) << 16);
                });
            }
            for m in 0..M {
                let sums = group(w.packing, quants, blocks, &x[m].quants[g]);
                for l in 0..blocks {
                    lanes[m][l] += sums[l] as f32 * (scales[l] * x[m].scales[g][l]);
                }
            }
        }
        let scale = w.row_scales.get(rows[n]).copied().unwrap_or(1.0);
        for (out, lanes) in out.iter_mut().zip(lanes) {
            out[n] = sum(lanes) * scale;
        }
    }
    out
}

#[inline(always)]
fn group(packing: Packing, quants: &[u8], blocks: usize, x: &[i8; GROUP]) -> Sums {
    let mut sums = [0; LANES];
    let x = x.as_chunks::<STEP>().0.chunks_exact(LANES);
    if packing == Packing::Int4Block {
        let mut x = x;
        for quants in quants.chunks_exact(blocks * STEP) {
            let (Some(low), Some(high)) = (x.next(), x.next()) else { break };
            let quants = quants.as_chunks::<STEP>().0;
            for (((sum, q), low), high) in sums.iter_mut().zip(quants).zip(low).zip(high) {
                for i in 0..STEP {
                    *sum += (i32::from(q[i] & 15) - 8) * i32::from(low[i]);
                    *sum += (i32::from(q[i] >> 4) - 8) * i32::from(high[i]);
                }
            }
        }
    } else {
        for (quants, x) in quants.chunks_exact(blocks * STEP).zip(x) {
            let quants = quants.as_chunks::<STEP>().0;
            for ((sum, q), x) in sums.iter_mut().zip(quants).zip(x) {
                for i in 0..STEP {
                    *sum += i32::from(q[i].cast_signed()) * i32::from(x[i]);
                }
            }
        }
    }
    sums
}

/// In the order of `Avx512::sum4`.
#[inline(always)]
fn sum(v: [f32; LANES]) -> f32 {
    let mut fours = [0.0; 4];
    for (four, v) in fours.iter_mut().zip(v.as_chunks::<4>().0) {
        *four = (v[0] + v[2]) + (v[1] + v[3]);
    }
    (fours[0] + fours[2]) + (fours[1] + fours[3])
}

#[cfg(target_arch = "x86_64")]
pub(crate) use vnni::tile as tile_vnni;

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use jamba_core::Packing;

    use super::super::bf16::Avx512Bf16;
    use super::super::dots::prefetch;
    use super::super::x86::Avx512;
    use crate::packed::{ActivationRow, GROUP, LANES, PackedRows, STEP, block_bytes};
    use crate::simd::Simd;

    /// As [`super::tile`], `FOUR_BITS` for that packing; what lies `ahead` bytes further on in W is
    /// fetched into the cache, if that is not 0. The instruction multiplies unsigned with signed
    /// integers: weights are taken as `q + 128`, or `q + 8` of four bits, and the sums begin with
    /// that many times minus the sum of x.
    #[inline(always)]
    pub(crate) fn tile<const M: usize, const N: usize, const FOUR_BITS: bool>(
        isa: Avx512Bf16,
        x: [ActivationRow<'_>; M],
        w: PackedRows<'_>,
        rows: [usize; N],
        ahead: usize,
    ) -> [[f32; N]; M] {
        assert_eq!(w.packing == Packing::Int4Block, FOUR_BITS);
        let s = isa.avx512();
        let by_row = !w.row_scales.is_empty();
        // Bytes of a whole group.
        let width = block_bytes(w.packing) * LANES;
        let mut lanes = [[s.splat(0.0); N]; M];
        for g in 0..w.blocks.div_ceil(LANES) {
            let blocks = LANES.min(w.blocks - g * LANES);
            let mask = (0xffff_u32 >> (LANES - blocks)) as __mmask16;
            let mut quants = [&[][..]; N];
            let mut w_scales = [s.splat(1.0); N];
            for n in 0..N {
                let of_row = &w.quants[rows[n] * w.stride()..][..w.stride()];
                quants[n] = &of_row[g * width..of_row.len().min((g + 1) * width)];
                if !by_row {
                    let scales = &w.block_scales[rows[n] * w.blocks + g * LANES..][..blocks];
                    // SAFETY: as many are read as there are blocks.
                    let bits = unsafe { _mm256_maskz_loadu_epi16(mask, scales.as_ptr().cast()) };
                    w_scales[n] = s.widen_bf16(bits);
                }
                if ahead > 0 {
                    for line in (0..width).step_by(64) {
                        prefetch(quants[n].as_ptr().wrapping_add(ahead + line));
                    }
                }
            }
            let sums = if blocks == LANES {
                group::<M, N, FOUR_BITS, true>(isa, &x, g, quants, blocks)
            } else {
                group::<M, N, FOUR_BITS, false>(isa, &x, g, quants, blocks)
            };
            for m in 0..M {
                let x_scales = s.load(&x[m].scales[g]);
                for n in 0..N {
                    let scale = s.mul(w_scales[n], x_scales);
                    lanes[m][n] = s.fma(s.convert(sums[m][n]), scale, lanes[m][n]);
                }
            }
        }
        let mut out = [[0.0; N]; M];
        for m in 0..M {
            for n in (0..N).step_by(2) {
                let [a, b, ..] = s.sum4([lanes[m][n], lanes[m][n + 1], lanes[m][n], lanes[m][n]]);
                out[m][n..n + 2].copy_from_slice(&[a, b]);
            }
        }
        if by_row {
            for out in &mut out {
                for n in 0..N {
                    out[n] *= w.row_scales[rows[n]];
                }
            }
        }
        out
    }

    /// Sums of the products of a group; a `WHOLE` one has 16 blocks.
    #[inline(always)]
    fn group<const M: usize, const N: usize, const FOUR_BITS: bool, const WHOLE: bool>(
        isa: Avx512Bf16,
        x: &[ActivationRow<'_>; M],
        g: usize,
        quants: [&[u8]; N],
        blocks: usize,
    ) -> [[__m512i; N]; M] {
        let s = isa.avx512();
        let blocks = if WHOLE { LANES } else { blocks };
        let mask = (0xffff_u32 >> (LANES - blocks)) as __mmask16;
        // Of `steps` vectors of W, each is multiplied once or, of four bits, twice.
        let steps = if FOUR_BITS { 4 } else { 8 };
        for quants in quants {
            assert!(quants.len() == steps * blocks * STEP);
        }
        let mut sums = [[s.zero_i32(); N]; M];
        for m in 0..M {
            let minus = s.load_i32(&x[m].sums[g]);
            let start = if FOUR_BITS { s.shift::<3>(minus) } else { s.shift::<7>(minus) };
            sums[m] = [start; N];
        }
        for i in 0..steps {
            for n in 0..N {
                let at = quants[n].as_ptr().wrapping_add(i * blocks * STEP);
                let q = if WHOLE {
                    // SAFETY: the row has 16 lanes in each of `steps` vectors.
                    unsafe { _mm512_loadu_si512(at.cast()) }
                } else {
                    // SAFETY: the lanes of the mask are those that the row has.
                    unsafe { _mm512_maskz_loadu_epi32(mask, at.cast()) }
                };
                for m in 0..M {
                    let x = &x[m].quants[g];
                    sums[m][n] = if FOUR_BITS {
                        let low = isa.dot_i8(s.low_bits(q), x, 2 * i, sums[m][n]);
                        isa.dot_i8(s.high_bits(q), x, 2 * i + 1, low)
                    } else {
                        isa.dot_i8(s.flip(q), x, i, sums[m][n])
                    };
                }
            }
        }
        sums
    }

    impl Avx512Bf16 {
        /// Adds the products of 64 unsigned and signed integers, four to a lane.
        #[inline(always)]
        fn dot_i8(self, w: __m512i, x: &[i8; GROUP], step: usize, sums: __m512i) -> __m512i {
            let x = &x[step * LANES * STEP..(step + 1) * LANES * STEP];
            // SAFETY: 64 bytes are read.
            let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
            // SAFETY: `self` proves that the machine has the instruction.
            unsafe { _mm512_dpbusd_epi32(sums, w, x) }
        }
    }

    /// Calls an intrinsic.
    macro_rules! intrinsic {
        ($call:expr) => {
            // SAFETY: `self` proves that the machine has the instruction.
            unsafe { $call }
        };
    }

    impl Avx512 {
        #[inline(always)]
        fn zero_i32(self) -> __m512i {
            intrinsic!(_mm512_setzero_si512())
        }

        #[inline(always)]
        fn load_i32(self, v: &[i32; LANES]) -> __m512i {
            // SAFETY: 64 bytes are read.
            unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
        }

        /// Times a power of two.
        #[inline(always)]
        fn shift<const BITS: u32>(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_slli_epi32::<BITS>(v))
        }

        /// Signed bytes plus 128.
        #[inline(always)]
        fn flip(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_xor_si512(v, _mm512_set1_epi8(i8::MIN)))
        }

        /// The lower four bits of every byte.
        #[inline(always)]
        fn low_bits(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_and_si512(v, _mm512_set1_epi8(15)))
        }

        /// The upper four bits of every byte.
        #[inline(always)]
        fn high_bits(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_and_si512(_mm512_srli_epi32::<4>(v), _mm512_set1_epi8(15)))
        }

        #[inline(always)]
        fn convert(self, v: __m512i) -> __m512 {
            intrinsic!(_mm512_cvtepi32_ps(v))
        }

        /// From bits of bf16.
        #[inline(always)]
        fn widen_bf16(self, v: __m256i) -> __m512 {
            intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))))
        }
    }
}
