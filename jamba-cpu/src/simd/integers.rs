//! Vectors of integers for the instruction sets of the machine.

use super::{Portable, Simd};

/// A way to multiply integers and add the products, four to a lane of 32 bits.
pub(crate) trait Integers: Copy + Send + Sync {
    /// Vectors of f32 with as many lanes.
    type S: Simd;
    /// A vector of 32-bit integers, or of four times as many bytes.
    type I: Copy;
    /// Rows of x in the largest tile: 6, 4 or 2.
    const TILE_M: usize;

    /// The vectors of f32.
    fn simd(self) -> Self::S;
    /// Runs `f` compiled for the instruction set.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;
    /// All lanes 0.
    fn zero(self) -> Self::I;
    /// Loads a vector.
    ///
    /// # Safety
    /// Its bytes must be readable at `from`.
    unsafe fn load_bytes(self, from: *const u8) -> Self::I;
    /// Loads some lanes; the others, where there are more, are zero.
    ///
    /// # Safety
    /// The bytes of `lanes` lanes, of one at least, must be readable at `from`.
    unsafe fn load_some(self, from: *const u8, lanes: usize) -> Self::I;
    /// Where sums of [`dot8`](Self::dot8) begin, for minus the sums of x.
    fn start8(self, minus: Self::I) -> Self::I;
    /// Where sums of [`dot4`](Self::dot4) begin, whose weights are 8 too large.
    fn start4(self, minus: Self::I) -> Self::I;
    /// Adds products of weights of -127 to 127 with integers of the same range.
    fn dot8(self, w: Self::I, x: Self::I, sums: Self::I) -> Self::I;
    /// Adds products of weights of 0 to 15 with integers of -127 to 127.
    fn dot4(self, w: Self::I, x: Self::I, sums: Self::I) -> Self::I;
    /// The lower four bits of every byte.
    fn low_bits(self, v: Self::I) -> Self::I;
    /// The upper four bits of every byte.
    fn high_bits(self, v: Self::I) -> Self::I;
    /// To f32.
    fn convert(self, v: Self::I) -> <Self::S as Simd>::F;
}

impl Integers for Portable {
    type S = Self;
    type I = [i32; 8];
    const TILE_M: usize = 2;

    #[inline(always)]
    fn simd(self) -> Self {
        self
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn zero(self) -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> [i32; 8] {
        // SAFETY: the caller's; any bits are integers.
        unsafe { from.cast::<[i32; 8]>().read_unaligned() }.map(i32::from_le)
    }

    #[inline(always)]
    unsafe fn load_some(self, from: *const u8, lanes: usize) -> [i32; 8] {
        debug_assert!(lanes > 0);
        let mut all = [0; 8];
        for (i, lane) in all.iter_mut().enumerate().take(lanes) {
            // SAFETY: the caller's; any bits are an integer.
            *lane = i32::from_le(unsafe { from.cast::<i32>().wrapping_add(i).read_unaligned() });
        }
        all
    }

    #[inline(always)]
    fn start8(self, _minus: [i32; 8]) -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    fn start4(self, minus: [i32; 8]) -> [i32; 8] {
        minus.map(|v| v << 3)
    }

    #[inline(always)]
    fn dot8(self, w: [i32; 8], x: [i32; 8], mut sums: [i32; 8]) -> [i32; 8] {
        for shift in [24, 16, 8, 0] {
            for i in 0..8 {
                sums[i] += (w[i] << shift >> 24) * (x[i] << shift >> 24);
            }
        }
        sums
    }

    #[inline(always)]
    fn dot4(self, w: [i32; 8], x: [i32; 8], sums: [i32; 8]) -> [i32; 8] {
        self.dot8(w, x, sums)
    }

    #[inline(always)]
    fn low_bits(self, v: [i32; 8]) -> [i32; 8] {
        v.map(|v| v & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn high_bits(self, v: [i32; 8]) -> [i32; 8] {
        v.map(|v| v >> 4 & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn convert(self, v: [i32; 8]) -> [f32; 8] {
        v.map(|v| v as f32)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::x86::{Avx2, Avx512};
    use super::super::{Avx512Bf16, Simd};
    use super::Integers;

    /// Calls an intrinsic.
    macro_rules! intrinsic {
        ($call:expr) => {
            // SAFETY: `self` proves that the machine has the instruction; what is read is the caller's
            // to have.
            unsafe { $call }
        };
    }

    impl Integers for Avx512 {
        type S = Self;
        type I = __m512i;
        const TILE_M: usize = 4;

        #[inline(always)]
        fn simd(self) -> Self {
            self
        }

        #[inline(always)]
        fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            Simd::vectorize(self, f)
        }

        #[inline(always)]
        fn zero(self) -> __m512i {
            intrinsic!(_mm512_setzero_si512())
        }

        #[inline(always)]
        unsafe fn load_bytes(self, from: *const u8) -> __m512i {
            intrinsic!(_mm512_loadu_si512(from.cast()))
        }

        #[inline(always)]
        unsafe fn load_some(self, from: *const u8, lanes: usize) -> __m512i {
            debug_assert!(lanes > 0);
            let mask = (0xffff_u32 >> 16usize.saturating_sub(lanes)) as __mmask16;
            intrinsic!(_mm512_maskz_loadu_epi32(mask, from.cast()))
        }

        #[inline(always)]
        fn start8(self, _minus: __m512i) -> __m512i {
            self.zero()
        }

        #[inline(always)]
        fn start4(self, minus: __m512i) -> __m512i {
            intrinsic!(_mm512_slli_epi32::<3>(minus))
        }

        // The instruction takes one side without sign: it goes over to the other.
        #[inline(always)]
        fn dot8(self, w: __m512i, x: __m512i, sums: __m512i) -> __m512i {
            let negative = intrinsic!(_mm512_movepi8_mask(w));
            let x = intrinsic!(_mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x));
            self.dot4(intrinsic!(_mm512_abs_epi8(w)), x, sums)
        }

        // Two products of at most 127^2 fit 16 bits.
        #[inline(always)]
        fn dot4(self, w: __m512i, x: __m512i, sums: __m512i) -> __m512i {
            let pairs = intrinsic!(_mm512_maddubs_epi16(w, x));
            let fours = intrinsic!(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
            intrinsic!(_mm512_add_epi32(sums, fours))
        }

        #[inline(always)]
        fn low_bits(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_and_si512(v, _mm512_set1_epi8(15)))
        }

        #[inline(always)]
        fn high_bits(self, v: __m512i) -> __m512i {
            intrinsic!(_mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15)))
        }

        #[inline(always)]
        fn convert(self, v: __m512i) -> __m512 {
            intrinsic!(_mm512_cvtepi32_ps(v))
        }
    }

    /// With VNNI: products of bytes without and with sign. Weights of eight bits are taken as
    /// `q + 128`.
    impl Integers for Avx512Bf16 {
        type S = Avx512;
        type I = __m512i;
        const TILE_M: usize = 6;

        #[inline(always)]
        fn simd(self) -> Avx512 {
            self.avx512()
        }

        #[inline(always)]
        fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            super::super::dots::Dots::vectorize(self, f)
        }

        #[inline(always)]
        fn zero(self) -> __m512i {
            self.avx512().zero()
        }

        #[inline(always)]
        unsafe fn load_bytes(self, from: *const u8) -> __m512i {
            // SAFETY: the caller's.
            unsafe { self.avx512().load_bytes(from) }
        }

        #[inline(always)]
        unsafe fn load_some(self, from: *const u8, lanes: usize) -> __m512i {
            // SAFETY: the caller's.
            unsafe { self.avx512().load_some(from, lanes) }
        }

        #[inline(always)]
        fn start8(self, minus: __m512i) -> __m512i {
            intrinsic!(_mm512_slli_epi32::<7>(minus))
        }

        #[inline(always)]
        fn start4(self, minus: __m512i) -> __m512i {
            self.avx512().start4(minus)
        }

        #[inline(always)]
        fn dot8(self, w: __m512i, x: __m512i, sums: __m512i) -> __m512i {
            let w = intrinsic!(_mm512_xor_si512(w, _mm512_set1_epi8(i8::MIN)));
            self.dot4(w, x, sums)
        }

        #[inline(always)]
        fn dot4(self, w: __m512i, x: __m512i, sums: __m512i) -> __m512i {
            intrinsic!(_mm512_dpbusd_epi32(sums, w, x))
        }

        #[inline(always)]
        fn low_bits(self, v: __m512i) -> __m512i {
            self.avx512().low_bits(v)
        }

        #[inline(always)]
        fn high_bits(self, v: __m512i) -> __m512i {
            self.avx512().high_bits(v)
        }

        #[inline(always)]
        fn convert(self, v: __m512i) -> __m512 {
            self.avx512().convert(v)
        }
    }

    impl Integers for Avx2 {
        type S = Self;
        type I = __m256i;
        const TILE_M: usize = 2;

        #[inline(always)]
        fn simd(self) -> Self {
            self
        }

        #[inline(always)]
        fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            Simd::vectorize(self, f)
        }

        #[inline(always)]
        fn zero(self) -> __m256i {
            intrinsic!(_mm256_setzero_si256())
        }

        #[inline(always)]
        unsafe fn load_bytes(self, from: *const u8) -> __m256i {
            intrinsic!(_mm256_loadu_si256(from.cast()))
        }

        #[inline(always)]
        unsafe fn load_some(self, from: *const u8, lanes: usize) -> __m256i {
            debug_assert!(lanes > 0);
            let index = intrinsic!(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let wanted = intrinsic!(_mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), index));
            intrinsic!(_mm256_maskload_epi32(from.cast(), wanted))
        }

        #[inline(always)]
        fn start8(self, _minus: __m256i) -> __m256i {
            self.zero()
        }

        #[inline(always)]
        fn start4(self, minus: __m256i) -> __m256i {
            intrinsic!(_mm256_slli_epi32::<3>(minus))
        }

        // The instruction takes one side without sign: it goes over to the other.
        #[inline(always)]
        fn dot8(self, w: __m256i, x: __m256i, sums: __m256i) -> __m256i {
            let x = intrinsic!(_mm256_sign_epi8(x, w));
            self.dot4(intrinsic!(_mm256_abs_epi8(w)), x, sums)
        }

        // Two products of at most 127^2 fit 16 bits.
        #[inline(always)]
        fn dot4(self, w: __m256i, x: __m256i, sums: __m256i) -> __m256i {
            let pairs = intrinsic!(_mm256_maddubs_epi16(w, x));
            let fours = intrinsic!(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            intrinsic!(_mm256_add_epi32(sums, fours))
        }

        #[inline(always)]
        fn low_bits(self, v: __m256i) -> __m256i {
            intrinsic!(_mm256_and_si256(v, _mm256_set1_epi8(15)))
        }

        #[inline(always)]
        fn high_bits(self, v: __m256i) -> __m256i {
            intrinsic!(_mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15)))
        }

        #[inline(always)]
        fn convert(self, v: __m256i) -> __m256 {
            intrinsic!(_mm256_cvtepi32_ps(v))
        }
    }
}
