//! Elementary functions on vectors.

use super::Simd;

/// `e^x`, within 2 units in the last place; zero below -87.3, infinity above 88.7.
///
/// `e^x = 2^n e^r` with n = round(x / ln 2), so that |r| <= ln 2 / 2, where the polynomial (the
/// Taylor series to r^7, whose first term left out is below 6e-9) holds.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let c = |v: f32| s.splat(v);
    let (low, high) = (c(-87.3), c(88.7));
    // In this order of operands a NaN comes through.
    let clamped = s.max(low, s.min(high, x));
    let n = s.round(s.mul(clamped, c(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first exact in its products with n.
    let r = s.fma(n, c(-0.693_359_4), clamped);
    let r = s.fma(n, c(2.121_944_4e-4), r);
    let mut p = c(1.0 / 5040.0);
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, c(term));
    }
    let y = s.ldexp(p, n);
    let y = s.select_gt(x, high, c(f32::INFINITY), y);
    s.select_gt(low, x, c(0.0), y)
}

/// `2^x` for x of at most 127, within 2 units in the last place; `2^-126` below that.
///
/// `2^x = 2^n 2^r` with n = round(x), and r exact. The polynomial is the one of least relative
/// error on |r| <= 1/2, 2e-9.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // In this order of operands a NaN comes through.
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let mut p = s.splat(1.534_581_2e-4);
    let ln_2 = std::f32::consts::LN_2;
    for term in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_6e-2, 0.240_226_46, ln_2, 1.0] {
        p = s.fma(p, r, s.splat(term));
    }
    s.ldexp(p, n)
}

/// `ln x` for positive normal x, within 2 units in the last place of max(|ln x|, 1/8).
#[inline(always)]
fn ln<S: Simd>(s: S, x: S::F) -> S::F {
    let c = |v: f32| s.splat(v);
    let (m, e) = s.frexp(x);
    // m in [sqrt(1/2), sqrt(2)), so that the series below is about zero.
    let above = c(std::f32::consts::SQRT_2);
    let e = s.select_gt(m, above, s.add(e, c(1.0)), e);
    let m = s.select_gt(m, above, s.mul(m, c(0.5)), m);
    // ln m = 2 artanh(t), t = (m - 1) / (m + 1), |t| < 0.172.
    let t = s.div(s.sub(m, c(1.0)), s.add(m, c(1.0)));
    let t2 = s.mul(t, t);
    let mut p = c(1.0 / 9.0);
    for term in [1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0] {
        p = s.fma(p, t2, c(term));
    }
    let two_t = s.add(t, t);
    let ln_m = s.fma(s.mul(two_t, t2), p, two_t);
    let low = s.fma(e, c(-2.121_944_4e-4), ln_m);
    s.fma(e, c(0.693_359_4), low)
}

/// `ln(1 + e^x)`, and x itself above 20.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let u = exp(s, x);
    let w = s.add(one, u);
    // ln(1 + u) = ln(w) u / (w - 1): the factor takes back what w lost in rounding.
    let lost = s.sub(w, one);
    let y = s.mul(ln(s, w), s.div(u, lost));
    let y = s.select_gt(lost, s.splat(0.0), y, u);
    s.select_gt(x, s.splat(20.0), x, y)
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, with_simd};

    /// Largest error of a function over `values`, relative to `scale(exact)`, on every
    /// instruction set of the machine.
    macro_rules! worst {
        ($f:ident, $exact:expr, $scale:expr, $values:expr) => {{
            let mut worst = 0f64;
            for isa in Isa::available() {
                for x in $values {
                    let mut got = [0f32; 1];
                    with_simd!(isa, s => s.store_partial($f(s, s.splat(x)), &mut got));
                    let exact: f64 = $exact(f64::from(x));
                    let error = (f64::from(got[0]) - exact).abs() / $scale(exact.abs());
                    assert!(error < 1e-3, "{} of {x}: {} not {exact}", isa.name(), got[0]);
                    worst = worst.max(error);
                }
            }
            worst
        }};
    }

    fn grid(low: f32, high: f32) -> impl Iterator<Item = f32> {
        let steps = if cfg!(miri) { 100 } else { 20_000 };
        (0..=steps).map(move |i| low + (high - low) * i as f32 / steps as f32)
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let worst = worst!(exp, f64::exp, |e: f64| e, grid(-87.2, 88.6));
        assert!(worst < 2.0 * 2f64.powi(-24) * 2.0, "{worst:e}");
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        let worst = worst!(exp2, f64::exp2, |e: f64| e, grid(-126.0, 20.0));
        assert!(worst < 2.0 * 2f64.powi(-24) * 2.0, "{worst:e}");
    }

    #[test]
    fn softplus_and_silu_are_exact_to_f32() {
        let softplus_exact = |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() };
        let small = worst!(softplus, softplus_exact, |e: f64| e, grid(-80.0, 30.0));
        assert!(small < 4e-7, "{small:e}");
        let silu_exact = |x: f64| x / (1.0 + (-x).exp());
        let small = worst!(silu, silu_exact, |e: f64| e.max(1e-30), grid(-60.0, 60.0));
        assert!(small < 4e-7, "{small:e}");
    }

    #[test]
    fn extremes_and_nan() {
        for isa in Isa::available() {
            let mut y = [0f32; 5];
            let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 89.0, -104.0];
            with_simd!(isa, s => s.store_partial(exp(s, s.load_partial(&x)), &mut y));
            assert!(y[0].is_nan(), "{}: {y:?}", isa.name());
            assert_eq!(y[1..], [f32::INFINITY, 0.0, f32::INFINITY, 0.0], "{}", isa.name());
            let x = [f32::NAN, f32::NEG_INFINITY, -126.5, 0.0, 1.0];
            with_simd!(isa, s => s.store_partial(exp2(s, s.load_partial(&x)), &mut y));
            assert!(y[0].is_nan(), "{}: {y:?}", isa.name());
            let least = f32::MIN_POSITIVE;
            assert_eq!(y[1..], [least, least, 1.0, 2.0], "{}", isa.name());
            let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30];
            with_simd!(isa, s => s.store_partial(softplus(s, s.load_partial(&x)), &mut y));
            assert!(y[0].is_nan());
            assert_eq!(y[1..], [f32::INFINITY, 0.0, 1e30, 0.0], "{}", isa.name());
            with_simd!(isa, s => s.store_partial(silu(s, s.load_partial(&x)), &mut y));
            assert!(y[0].is_nan());
            assert_eq!((y[1], y[3], y[4]), (f32::INFINITY, 1e30, 0.0), "{}", isa.name());
        }
    }
}
