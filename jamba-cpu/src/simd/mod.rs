//! Vectors of f32 for the instruction sets of the machine: with `columns` and `team` the only unsafe code
//! of this crate.
//!
//! A [`Simd`] value is proof that the machine has its instructions: [`Isa::available`] is the only
//! source of one for x86. Kernels are generic over it, and run inside [`Simd::vectorize`], which
//! compiles them for the instruction set.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod math;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) mod dots;
pub(crate) mod integers;
pub(crate) mod peak;
pub(crate) mod quantised;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::Amx;
#[cfg(target_arch = "x86_64")]
pub(crate) use bf16::Avx512Bf16;
use portable::Portable;
#[cfg(target_arch = "x86_64")]
use x86::{Avx2, Avx512};

/// Vectors of [`LANES`](Self::LANES) f32.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type F: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of activations in a tile of the matrix product.
    const TILE_M: usize;

    /// Runs `f` compiled for the instruction set.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// The first `LANES` elements; panics if there are fewer.
    fn load(self, v: &[f32]) -> Self::F;
    /// As [`load`](Self::load), from bf16 bits.
    fn load_bf16(self, v: &[u16]) -> Self::F;
    /// As [`load`](Self::load), from f16 bits.
    fn load_f16(self, v: &[u16]) -> Self::F;
    /// Writes the first `LANES` elements; panics if there are fewer.
    fn store(self, v: Self::F, to: &mut [f32]);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger, `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller, `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integral n of -126 to 128.
    fn ldexp(self, a: Self::F, n: Self::F) -> Self::F;
    /// `(m, e)` with `a = m 2^e` and `1 <= m < 2`, for positive normal `a`.
    fn frexp(self, a: Self::F) -> (Self::F, Self::F);
    /// `x > y ? a : b`.
    fn select_gt(self, x: Self::F, y: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// Sums of all lanes of each, always in the same order.
    fn sum4(self, a: [Self::F; 4]) -> [f32; 4];
    /// Largest lane.
    fn max_lane(self, a: Self::F) -> f32;

    /// Sum of all lanes, in the order of [`sum4`](Self::sum4).
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        self.sum4([a; 4])[0]
    }

    /// As [`load`](Self::load), zero past the end where there are fewer.
    #[inline(always)]
    fn load_partial(self, v: &[f32]) -> Self::F {
        if v.len() >= Self::LANES {
            return self.load(v);
        }
        let mut padded = [0.0; 16];
        padded[..v.len()].copy_from_slice(v);
        self.load(&padded)
    }

    /// As [`load_bf16`](Self::load_bf16), as many as there are; the other lanes are zero.
    #[inline(always)]
    fn load_bf16_partial(self, v: &[u16]) -> Self::F {
        if v.len() >= Self::LANES {
            return self.load_bf16(v);
        }
        let mut padded = [0; 16];
        padded[..v.len()].copy_from_slice(v);
        self.load_bf16(&padded)
    }

    /// As [`store`](Self::store), as many as fit.
    #[inline(always)]
    fn store_partial(self, v: Self::F, to: &mut [f32]) {
        if to.len() >= Self::LANES {
            return self.store(v, to);
        }
        let mut padded = [0.0; 16];
        self.store(v, &mut padded);
        to.copy_from_slice(&padded[..to.len()]);
    }
}

/// An element type of weights.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// The first `LANES` elements as f32; panics if there are fewer.
    fn load<S: Simd>(s: S, v: &[Self]) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[f32]) -> S::F {
        s.load(v)
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[Self]) -> S::F {
        s.load_bf16(bytemuck::cast_slice(v))
    }
}

impl Element for half::f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[Self]) -> S::F {
        s.load_f16(bytemuck::cast_slice(v))
    }
}

/// The instruction set that kernels run on.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    /// AMX with BF16 and INT8, beside AVX-512 with BF16 and VNNI.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    /// AVX-512 with BF16 and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// Whatever the compiler makes of arrays.
    Portable(Portable),
}

/// The vectors of f32 of an instruction set.
pub(crate) enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

/// The vectors of integers of an instruction set.
pub(crate) enum IntegerVectors {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Bf16),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

impl Isa {
    /// All that this machine has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = Avx512::detect();
            let bf16 = avx512.and_then(Avx512Bf16::detect);
            all.extend(bf16.and_then(Amx::detect).map(Self::Amx));
            all.extend(bf16.map(Self::Avx512Bf16));
            all.extend(avx512.map(Self::Avx512));
            all.extend(Avx2::detect().map(Self::Avx2));
        }
        all.push(Self::Portable(Portable));
        all
    }

    /// `amx`, `avx512bf16`, `avx512`, `avx2` or `portable`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            Self::Portable(_) => "portable",
        }
    }

    /// What every machine has.
    pub(crate) fn portable() -> Self {
        Self::Portable(Portable)
    }

    /// Whether it multiplies bf16.
    pub(crate) fn has_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.bf16().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Its vectors of bf16.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bf16(self) -> Option<Avx512Bf16> {
        match self {
            Self::Amx(s) => Some(s.vectors()),
            Self::Avx512Bf16(s) => Some(s),
            _ => None,
        }
    }

    /// Its vectors of f32.
    pub(crate) fn vectors(self) -> Vectors {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(s) => Vectors::Avx512(s.vectors().avx512()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(s) => Vectors::Avx512(s.avx512()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => Vectors::Avx512(s),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => Vectors::Avx2(s),
            Self::Portable(s) => Vectors::Portable(s),
        }
    }

    /// Its vectors of integers.
    pub(crate) fn integers(self) -> IntegerVectors {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(s) => IntegerVectors::Avx512Vnni(s.vectors()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(s) => IntegerVectors::Avx512Vnni(s),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => IntegerVectors::Avx512(s),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => IntegerVectors::Avx2(s),
            Self::Portable(s) => IntegerVectors::Portable(s),
        }
    }
}

/// Runs an expression with `$s` bound to the [`Simd`] value of an [`Isa`], compiled for it.
macro_rules! with_simd {
    ($isa:expr, $s:ident => $body:expr) => {{
        use $crate::simd::{Simd, Vectors};
        match $isa.vectors() {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512($s) => Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2($s) => Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            Vectors::Portable($s) => Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
        }
    }};
}
pub(crate) use with_simd;

/// As [`with_simd`], for [`Integers`](integers::Integers).
macro_rules! with_integers {
    ($isa:expr, $d:ident => $body:expr) => {{
        use $crate::simd::{IntegerVectors, integers::Integers};
        match $isa.integers() {
            #[cfg(target_arch = "x86_64")]
            IntegerVectors::Avx512Vnni($d) => Integers::vectorize(
                $d,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            IntegerVectors::Avx512($d) => Integers::vectorize(
                $d,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            IntegerVectors::Avx2($d) => Integers::vectorize(
                $d,
                #[inline(always)]
                || $body,
            ),
            IntegerVectors::Portable($d) => Integers::vectorize(
                $d,
                #[inline(always)]
                || $body,
            ),
        }
    }};
}
pub(crate) use with_integers;

pub(crate) use math::{exp, exp2, silu, softplus};
