//! Loops that do nothing but what is measured: multiply-adds in registers, and reading.

use std::hint::black_box;

use super::dots::{LINE, prefetch_stream};
use super::integers::Integers;
use super::{Isa, Simd};

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
        for line in block.chunks(LINE) {
            prefetch_stream(line.as_ptr());
        }
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

/// Multiply-adds of bytes into 32 bits; returns how many operations they were.
#[inline(always)]
pub(crate) fn integer_multiply_adds<D: Integers>(d: D, rounds: usize) -> usize {
    let bytes = black_box([3; 64]);
    // SAFETY: no vector has more bytes.
    let v = unsafe { d.load_bytes(bytes.as_ptr()) };
    let mut sums = [d.zero(); CHAINS];
    for _ in 0..rounds {
        // New weights each time, or what they are made into is made once.
        let w = black_box(v);
        for sum in &mut sums {
            *sum = d.dot8(w, v, *sum);
        }
    }
    let s = d.simd();
    for sum in sums {
        black_box(s.sum(d.convert(sum)));
    }
    2 * 4 * D::S::LANES * CHAINS * rounds
}

/// Multiply-adds of bf16 into f32, where the machine has them; returns how many operations they were.
pub(crate) fn bf16_multiply_adds(isa: Isa) -> Option<impl Fn(usize) -> usize + Sync> {
    #[cfg(not(target_arch = "x86_64"))]
    {
        _ = isa;
        None::<fn(usize) -> usize>
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn in_vectors(rounds: usize) -> usize {
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
            2 * 32 * CHAINS * rounds
        }
        isa.bf16().map(move |_| {
            move |rounds| match isa {
                Isa::Amx(tiles) => tiles.multiply_adds(rounds, false),
                // SAFETY: the vectors of bf16 prove that the machine has these instructions.
                _ => unsafe { in_vectors(rounds) },
            }
        })
    }
}
