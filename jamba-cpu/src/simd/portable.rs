//! Arrays, for machines whose instruction set is not written out.

use half::{bf16, f16};

use super::Simd;

/// Eight lanes, vectorised as the compiler can.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; 8];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F = V;
    const LANES: usize = 8;
    const TILE_M: usize = 2;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, v: f32) -> V {
        [v; 8]
    }

    #[inline(always)]
    fn load(self, v: &[f32]) -> V {
        std::array::from_fn(|i| v[i])
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16]) -> V {
        std::array::from_fn(|i| bf16::from_bits(v[i]).to_f32())
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16]) -> V {
        std::array::from_fn(|i| f16::from_bits(v[i]).to_f32())
    }

    #[inline(always)]
    fn store(self, v: V, to: &mut [f32]) {
        to[..8].copy_from_slice(&v);
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    // f32::mul_add calls a library function where the machine has no fused instruction.
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: V) -> V {
        // Adding 1.5 * 2^23 leaves no bits below the point, for |a| < 2^22.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|a| (a + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn ldexp(self, a: V, n: V) -> V {
        // Two steps, because 2^128 is not an f32.
        zip(a, n, |a, n| {
            let half = n as i32 / 2;
            let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            a * power(half) * power(n as i32 - half)
        })
    }

    #[inline(always)]
    fn frexp(self, a: V) -> (V, V) {
        let mantissa = |a: f32| f32::from_bits(a.to_bits() & 0x007f_ffff | 0x3f80_0000);
        let exponent = |a: f32| ((a.to_bits() >> 23) as i32 - 127) as f32;
        (a.map(mantissa), a.map(exponent))
    }

    #[inline(always)]
    fn select_gt(self, x: V, y: V, a: V, b: V) -> V {
        std::array::from_fn(|i| if x[i] > y[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn sum4(self, a: [V; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = ((a[0] + a[2]) + (a[1] + a[3])) + ((a[4] + a[6]) + (a[5] + a[7]));
        }
        sums
    }

    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
