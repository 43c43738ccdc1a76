//! AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::Simd;

/// Proof that the machine has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Calls an intrinsic.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` proves that the machine has the instruction, and a pointer that is read
        // or written comes from a slice that was cut to as many elements.
        unsafe { $call }
    };
}

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        all.then_some(Self(()))
    }

    /// Makes columns of the rows of a square.
    #[inline(always)]
    pub(crate) fn transpose(self, square: &mut [u32; 256]) {
        // SAFETY: both are 1,024 bytes, and any bits are either.
        let rows = unsafe { square.as_ptr().cast::<[__m512i; 16]>().read_unaligned() };
        let cols = intrinsic!(transposed512(rows));
        // SAFETY: as above.
        unsafe { square.as_mut_ptr().cast::<[__m512i; 16]>().write_unaligned(cols) };
    }
}

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

/// In every four lanes the sums of those four lanes of a, b, c and d.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed_sum512(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    // Sums of the pairs (0, 2) and (1, 3) of every four lanes, then of those.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let even = _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd);
    let odd = _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd);
    _mm512_add_ps(even, odd)
}

/// Rows as columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed512(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Every four columns of four rows, in every four lanes; then of all rows.
    let mut fours = rows;
    for (from, to) in rows.as_chunks::<4>().0.iter().zip(fours.as_chunks_mut::<4>().0) {
        let [a, b, c, d] = *from;
        let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
        let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
        *to = [
            _mm512_unpacklo_epi64(low[0], low[1]),
            _mm512_unpackhi_epi64(low[0], low[1]),
            _mm512_unpacklo_epi64(high[0], high[1]),
            _mm512_unpackhi_epi64(high[0], high[1]),
        ];
    }
    let mut cols = rows;
    for i in 0..4 {
        const EVEN: i32 = 0b10_00_10_00;
        const ODD: i32 = 0b11_01_11_01;
        let [a, b] = [[fours[i], fours[4 + i]], [fours[8 + i], fours[12 + i]]];
        let even =
            [_mm512_shuffle_i32x4::<EVEN>(a[0], a[1]), _mm512_shuffle_i32x4::<EVEN>(b[0], b[1])];
        let odd =
            [_mm512_shuffle_i32x4::<ODD>(a[0], a[1]), _mm512_shuffle_i32x4::<ODD>(b[0], b[1])];
        cols[i] = _mm512_shuffle_i32x4::<EVEN>(even[0], even[1]);
        cols[4 + i] = _mm512_shuffle_i32x4::<EVEN>(odd[0], odd[1]);
        cols[8 + i] = _mm512_shuffle_i32x4::<ODD>(even[0], even[1]);
        cols[12 + i] = _mm512_shuffle_i32x4::<ODD>(odd[0], odd[1]);
    }
    cols
}

/// The lower four lanes plus the upper four.
#[inline]
#[target_feature(enable = "avx2")]
fn halves_sum(v: __m256) -> [f32; 4] {
    let sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let mut sums = [0.0; 4];
    // SAFETY: four values are written to an array of four.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), sum) };
    sums
}

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const TILE_M: usize = 6;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` proves that the machine has these instructions.
        unsafe { run(f) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(v))
    }

    #[inline(always)]
    fn load(self, v: &[f32]) -> __m512 {
        let v = &v[..16];
        intrinsic!(_mm512_loadu_ps(v.as_ptr()))
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16]) -> __m512 {
        let v = &v[..16];
        let bits = intrinsic!(_mm256_loadu_si256(v.as_ptr().cast()));
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
    }

    #[inline(always)]
    fn load_bf16_partial(self, v: &[u16]) -> __m512 {
        let mask = (0xffff_u32 >> 16usize.saturating_sub(v.len())) as __mmask16;
        let bits = intrinsic!(_mm256_maskz_loadu_epi16(mask, v.as_ptr().cast()));
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16]) -> __m512 {
        let v = &v[..16];
        let bits = intrinsic!(_mm256_loadu_si256(v.as_ptr().cast()));
        intrinsic!(_mm512_cvtph_ps(bits))
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32]) {
        let to = &mut to[..16];
        intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn ldexp(self, a: __m512, n: __m512) -> __m512 {
        intrinsic!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn frexp(self, a: __m512) -> (__m512, __m512) {
        let m = intrinsic!(_mm512_getmant_ps::<_MM_MANT_NORM_1_2, _MM_MANT_SIGN_SRC>(a));
        (m, intrinsic!(_mm512_getexp_ps(a)))
    }

    #[inline(always)]
    fn select_gt(self, x: __m512, y: __m512, a: __m512, b: __m512) -> __m512 {
        let greater = intrinsic!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, y));
        intrinsic!(_mm512_mask_blend_ps(greater, b, a))
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let four = intrinsic!(transposed_sum512(a, b, c, d));
        let halves = intrinsic!(_mm256_add_ps(
            _mm512_castps512_ps256(four),
            _mm512_extractf32x8_ps::<1>(four)
        ));
        intrinsic!(halves_sum(halves))
    }

    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }
}

impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;
    const TILE_M: usize = 2;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` proves that the machine has these instructions.
        unsafe { run(f) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(v))
    }

    #[inline(always)]
    fn load(self, v: &[f32]) -> __m256 {
        let v = &v[..8];
        intrinsic!(_mm256_loadu_ps(v.as_ptr()))
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16]) -> __m256 {
        let v = &v[..8];
        let bits = intrinsic!(_mm_loadu_si128(v.as_ptr().cast()));
        intrinsic!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))))
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16]) -> __m256 {
        let v = &v[..8];
        let bits = intrinsic!(_mm_loadu_si128(v.as_ptr().cast()));
        intrinsic!(_mm256_cvtph_ps(bits))
    }

    #[inline(always)]
    fn store(self, v: __m256, to: &mut [f32]) {
        let to = &mut to[..8];
        intrinsic!(_mm256_storeu_ps(to.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsic!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        intrinsic!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn ldexp(self, a: __m256, n: __m256) -> __m256 {
        let power = |n: __m256i| {
            let bias = intrinsic!(_mm256_set1_epi32(127));
            intrinsic!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, bias))))
        };
        // Two steps, because 2^128 is not an f32.
        let n = intrinsic!(_mm256_cvtps_epi32(n));
        let half = intrinsic!(_mm256_srai_epi32::<1>(n));
        let rest = intrinsic!(_mm256_sub_epi32(n, half));
        intrinsic!(_mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(rest)))
    }

    #[inline(always)]
    fn frexp(self, a: __m256) -> (__m256, __m256) {
        let bits = intrinsic!(_mm256_castps_si256(a));
        let (fraction, one) =
            (intrinsic!(_mm256_set1_epi32(0x007f_ffff)), intrinsic!(_mm256_set1_ps(1.0)));
        let m = intrinsic!(_mm256_castsi256_ps(_mm256_and_si256(bits, fraction)));
        let bias = intrinsic!(_mm256_set1_epi32(127));
        let e = intrinsic!(_mm256_sub_epi32(_mm256_srli_epi32::<23>(bits), bias));
        (intrinsic!(_mm256_or_ps(m, one)), intrinsic!(_mm256_cvtepi32_ps(e)))
    }

    #[inline(always)]
    fn select_gt(self, x: __m256, y: __m256, a: __m256, b: __m256) -> __m256 {
        let greater = intrinsic!(_mm256_cmp_ps::<_CMP_GT_OQ>(x, y));
        intrinsic!(_mm256_blendv_ps(b, a, greater))
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // Sums of the pairs (0, 2) and (1, 3) of every four lanes, then of those.
        let ab = intrinsic!(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
        let cd = intrinsic!(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
        let even = intrinsic!(_mm256_shuffle_ps::<0b01_00_01_00>(ab, cd));
        let odd = intrinsic!(_mm256_shuffle_ps::<0b11_10_11_10>(ab, cd));
        intrinsic!(halves_sum(_mm256_add_ps(even, odd)))
    }

    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        let mut v = [0.0; 8];
        self.store(a, &mut v);
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
