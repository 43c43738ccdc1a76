//! Loops that do nothing but what is measured: multiply-adds in registers, and reading.

use std::hint::black_box;

use super::Simd;

/// Sums that do not wait for one another: more than the latency of two units.
const CHAINS: usize = 12;

/// Multiply-adds of f32; returns how many operations they were.
#[inline(always)]
pub(crate) fn multiply_adds<S: Simd>(s: S, rounds: usize) -> usize {
    let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(1e-3)));
    let mut sums = [s.splat(1.0); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = s.fma(*sum, a, b);
        }
    }
    for sum in sums {
        black_box(s.sum(sum));
    }
    2 * S::LANES * CHAINS * rounds
}

/// The sum of all values, in some order.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, values: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 8];
    let mut blocks = values.chunks_exact(8 * S::LANES);
    for block in &mut blocks {
        for (sum, v) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
            *sum = s.add(*sum, s.load(v));
        }
    }
    let rest: f32 = blocks.remainder().iter().sum();
    let mut all = sums[0];
    for sum in &sums[1..] {
        all = s.add(all, *sum);
    }
    s.sum(all) + rest
}

/// Proof that the machine multiplies pairs of bf16 and adds them to f32.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Dots(());

#[cfg(target_arch = "x86_64")]
impl Bf16Dots {
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        all.then_some(Self(()))
    }

    /// Dot products; returns how many operations they were.
    pub(crate) fn run(self, rounds: usize) -> usize {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn run(rounds: usize) {
            use std::arch::x86_64::*;
            let v = _mm512_cvtne2ps_pbh(
                _mm512_set1_ps(black_box(1e-3)),
                _mm512_set1_ps(black_box(0.5)),
            );
            let mut sums = [_mm512_setzero_ps(); CHAINS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, v, v);
                }
            }
            for sum in sums {
                black_box(_mm512_reduce_add_ps(sum));
            }
        }
        // SAFETY: `self` proves that the machine has these instructions.
        unsafe { run(rounds) };
        2 * 32 * CHAINS * rounds
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Bf16Dots {
    pub(crate) fn detect() -> Option<Self> {
        None
    }

    pub(crate) fn run(self, _: usize) -> usize {
        0
    }
}
