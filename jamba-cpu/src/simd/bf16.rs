//! Dot products of bf16, two at a time in each lane of f32.

use std::arch::x86_64::*;

use half::bf16;

use super::Simd;
use super::dots::Dots;
use super::x86::Avx512;

/// Proof that the machine has AVX-512 with BF16 and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    pub(crate) fn detect(avx512: Avx512) -> Option<Self> {
        let all = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
        all.then_some(Self(avx512))
    }

    /// The vectors of f32.
    pub(crate) fn avx512(self) -> Avx512 {
        self.0
    }

    /// Rounds f32 to the nearest bf16, ties to even; subnormal numbers to zero. NaN stays NaN.
    pub(crate) fn round(self, from: &[f32], to: &mut [bf16]) {
        assert_eq!(from.len(), to.len());
        let to: &mut [u16] = bytemuck::cast_slice_mut(to);
        self.vectorize(
            #[inline(always)]
            || {
                let (from, from_rest) = from.as_chunks::<16>();
                let (to, to_rest) = to.as_chunks_mut::<16>();
                for (from, to) in from.iter().zip(to) {
                    self.round16(from, to);
                }
                if !from_rest.is_empty() {
                    let (mut padded, mut rounded) = ([0.0; 16], [0; 16]);
                    padded[..from_rest.len()].copy_from_slice(from_rest);
                    self.round16(&padded, &mut rounded);
                    to_rest.copy_from_slice(&rounded[..to_rest.len()]);
                }
            },
        );
    }

    #[inline(always)]
    fn round16(self, from: &[f32; 16], to: &mut [u16; 16]) {
        // SAFETY: 16 values are read.
        let values = unsafe { _mm512_loadu_ps(from.as_ptr()) };
        // SAFETY: `self` proves that the machine has the instruction.
        let rounded = unsafe { _mm512_cvtneps_pbh(values) };
        // SAFETY: both are 32 bytes, and any bits are u16.
        *to = unsafe { std::mem::transmute::<__m256bh, [u16; 16]>(rounded) };
    }
}

impl Dots for Avx512Bf16 {
    type X = bf16;
    type W = bf16;
    type V = __m512bh;
    type Sum = __m512;
    const STEP: usize = 32;
    const TILE_M: usize = 6;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[inline]
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16,avx512vnni"
        )]
        fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` proves that the machine has these instructions.
        unsafe { run(f) }
    }

    #[inline(always)]
    fn zero(self) -> __m512 {
        self.0.splat(0.0)
    }

    #[inline(always)]
    unsafe fn load(self, w: *const bf16) -> __m512bh {
        // SAFETY: the caller's; any bits are 32 bf16.
        unsafe { w.cast::<__m512bh>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn dot(self, x: *const bf16, w: __m512bh, sum: __m512) -> __m512 {
        // SAFETY: the caller's; any bits are 32 bf16.
        let x = unsafe { x.cast::<__m512bh>().read_unaligned() };
        // SAFETY: `self` proves that the machine has the instruction.
        unsafe { _mm512_dpbf16_ps(sum, w, x) }
    }

    #[inline(always)]
    fn sum4(self, sums: [__m512; 4]) -> [f32; 4] {
        self.0.sum4(sums)
    }
}
