use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::tensor::HostTensor;

const PACKINGS: [Packing; 3] = [Packing::Int8Row, Packing::Int8Block, Packing::Int4Block];

fn param(rows: usize, cols: usize, values: Vec<f32>) -> Param {
    Param::new("w", Role::Linear, HostTensor::from_f32(vec![rows, cols], values))
}

fn quantized(rows: usize, cols: usize, values: Vec<f32>, packing: Packing) -> Quantized {
    Quantized::new(&param(rows, cols, values), packing).unwrap()
}

/// The scale of every weight of a row.
fn scales_of(q: &Quantized, row: usize) -> Vec<f32> {
    let cols = q.shape()[1];
    let of = |i: usize| match q.scales() {
        Scales::Rows(rows) => rows[row],
        Scales::Blocks(blocks) => {
            let bits = blocks[row * cols.div_ceil(BLOCK) + i / BLOCK];
            bf16::from_bits(bits).to_f32()
        }
    };
    (0..cols).map(of).collect()
}

/// Weights of a layer: around zero, some blocks of them larger, some zeros, some in bf16.
fn matrix() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
    let cols = prop_oneof![1..=70usize, Just(32), Just(64), Just(96)];
    (1..=4usize, cols, -30..=30i32, any::<bool>()).prop_flat_map(|(rows, cols, power, stored)| {
        let weight = prop_oneof![
            8 => -1.0f32..1.0,
            1 => Just(0.0f32),
            1 => prop::sample::select(vec![1.0f32, -1.0, 0.5, -8.0, 8.0, 1e-3]),
        ];
        let weight = weight.prop_map(move |w| {
            let w = w * 2f32.powi(power);
            if stored { bf16::from_f32(w).to_f32() } else { w }
        });
        prop::collection::vec(weight, rows * cols).prop_map(move |w| (rows, cols, w))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn no_weight_is_off_by_more_than_half_a_scale((rows, cols, w) in matrix()) {
        for packing in PACKINGS {
            let q = quantized(rows, cols, w.clone(), packing);
            for row in 0..rows {
                let mut got = vec![0.0; cols];
                q.dequantize_row(row, &mut got);
                let scales = scales_of(&q, row);
                for i in 0..cols {
                    let w = w[row * cols + i];
                    let off = (f64::from(got[i]) - f64::from(w)).abs();
                    // w / scale is rounded to f32 before it is rounded to an integer.
                    let half = f64::from(scales[i].abs()) * 0.5 * (1.0 + 1e-5);
                    prop_assert!(off <= half, "{packing:?} {w} became {} under {}", got[i], scales[i]);
                }
            }
        }
    }

    #[test]
    fn quantising_what_was_dequantised_changes_nothing((rows, cols, w) in matrix()) {
        for packing in PACKINGS {
            let once = quantized(rows, cols, w.clone(), packing).dequantize();
            let twice = quantized(rows, cols, once.clone(), packing).dequantize();
            prop_assert_eq!(&once, &twice, "{:?}", packing);
        }
    }

    #[test]
    fn a_row_depends_on_itself_alone((rows, cols, w) in matrix()) {
        for packing in PACKINGS {
            let whole = quantized(rows, cols, w.clone(), packing);
            let reversed: Vec<f32> = w.chunks(cols).rev().flatten().copied().collect();
            let reversed = quantized(rows, cols, reversed, packing);
            let parts = w.chunks(cols).map(|row| HostTensor::from_f32(vec![1, cols], row.to_vec()));
            let parts = Param { parts: parts.collect(), ..param(rows, cols, w.clone()) };
            let parts = Quantized::new(&parts, packing).unwrap();
            prop_assert_eq!(whole.quants(), parts.quants());
            prop_assert_eq!(whole.scales(), parts.scales());
            let stride = packing.stride(cols);
            for row in 0..rows {
                let other = rows - 1 - row;
                prop_assert_eq!(
                    &whole.quants()[row * stride..(row + 1) * stride],
                    &reversed.quants()[other * stride..(other + 1) * stride]
                );
                prop_assert_eq!(scales_of(&whole, row), scales_of(&reversed, other));
            }
        }
    }

    #[test]
    fn the_sign_of_a_row_does_not_matter((rows, cols, w) in matrix()) {
        for packing in PACKINGS {
            let negated = quantized(rows, cols, w.iter().map(|w| -w).collect(), packing);
            let got: Vec<f32> = negated.dequantize().iter().map(|w| -w).collect();
            prop_assert_eq!(got, quantized(rows, cols, w.clone(), packing).dequantize());
        }
    }

    #[test]
    fn scales_are_zero_or_normal(bits in prop::collection::vec(any::<u32>(), 40)) {
        // Floats of all magnitudes, below the limit.
        let w: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let w: Vec<f32> = w.into_iter().map(|w| if w.abs() < LIMIT { w } else { 0.0 }).collect();
        for packing in PACKINGS {
            let q = quantized(1, 40, w.clone(), packing);
            for (scale, (w, got)) in scales_of(&q, 0).into_iter().zip(w.iter().zip(q.dequantize())) {
                prop_assert!(scale == 0.0 || scale.is_normal(), "{scale:e}");
                prop_assert!(scale >= 0.0 || packing == Packing::Int4Block);
                prop_assert!(got.is_finite());
                if scale == 0.0 {
                    prop_assert!(got == 0.0 && w.abs() <= 127.0 * f32::MIN_POSITIVE, "{w:e}");
                }
            }
        }
    }
}

#[test]
fn bytes_are_where_the_documentation_says() {
    // A row of 40: one whole block, and one of 8 weights and 24 zeros.
    let mut w: Vec<f32> = (0..40).map(|i| (i % 15) as f32 - 7.0).collect();
    w[3] = -8.0;
    w[39] = -8.0;
    let q = quantized(1, 40, w.clone(), Packing::Int4Block);
    assert_eq!(q.scales(), Scales::Blocks(&[0x3f80, 0x3f80]));
    assert_eq!(q.quants().len(), 32);
    let nibble = |q: f32| (q + 8.0) as u8;
    for j in 0..16 {
        assert_eq!(q.quants()[j], nibble(w[j]) | nibble(w[j + 16]) << 4, "byte {j}");
        let tail = if j < 8 { nibble(w[32 + j]) } else { 8 };
        assert_eq!(q.quants()[16 + j], tail | 0x80, "byte {j} of the tail");
    }
    assert_eq!(q.dequantize(), w);

    w.iter_mut().for_each(|w| *w *= 15.875);
    let q = quantized(1, 40, w.clone(), Packing::Int8Block);
    assert_eq!(q.scales(), Scales::Blocks(&[0x3f80, 0x3f80]));
    let expected: Vec<u8> = w.iter().map(|w| (w.round_ties_even() as i8).cast_unsigned()).collect();
    assert_eq!(q.quants()[..40], expected);
    assert_eq!(q.quants()[40..], [0; 24]);

    let q = quantized(1, 40, w, Packing::Int8Row);
    assert_eq!(q.scales(), Scales::Rows(&[1.0]));
    assert_eq!(q.quants(), expected);
    assert!(q.quants().as_ptr().addr().is_multiple_of(64));
}

#[test]
fn the_longer_side_of_int4_is_for_the_largest_magnitude() {
    for sign in [1.0, -1.0] {
        let mut w = vec![0.1 * sign; 32];
        w[5] = 8.0 * sign;
        let q = quantized(1, 32, w, Packing::Int4Block);
        assert_eq!(scales_of(&q, 0)[0], -sign);
        assert_eq!(q.quants()[5] & 15, 0, "q of -8");
    }
    // Both signs of the same magnitude: seven steps each, and nothing is clipped.
    let mut w = vec![0.0; 32];
    [w[0], w[1]] = [7.0, -7.0];
    let q = quantized(1, 32, w.clone(), Packing::Int4Block);
    assert_eq!(q.dequantize(), w);
}

#[test]
fn zeros_stay_zeros_and_whole_rows_of_them_have_no_scale() {
    for packing in PACKINGS {
        let q = quantized(3, 40, vec![-0.0; 120], packing);
        assert_eq!(scales_of(&q, 1), vec![0.0; 40]);
        assert_eq!(q.dequantize(), vec![0.0; 120]);
    }
}

#[test]
fn weights_at_the_ends_of_the_range() {
    for packing in PACKINGS {
        for w in [f32::from_bits(LIMIT.to_bits() - 1), 1e30, 1e-30, f32::MIN_POSITIVE * 127.0] {
            let got = quantized(1, 1, vec![w], packing).dequantize()[0];
            assert!(((got - w) / w).abs() < 1.0 / 64.0, "{packing:?}: {w:e} became {got:e}");
        }
        let tiny = quantized(1, 2, vec![1e-45, -1e-40], packing);
        assert_eq!((tiny.dequantize(), scales_of(&tiny, 0)), (vec![0.0; 2], vec![0.0; 2]));
    }
}

#[test]
fn a_weight_without_a_scale_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, LIMIT, -f32::MAX] {
        for packing in PACKINGS {
            let mut w = vec![0.5; 120];
            w[2 * 40 + 33] = bad;
            let message = Quantized::new(&param(3, 40, w), packing).unwrap_err().to_string();
            for word in ["`w`", "row 2, column 33", "quantised"] {
                assert!(message.contains(word), "{message}");
            }
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut cut = param(2, 3, vec![0.5; 6]);
    cut.parts = vec![
        HostTensor::from_f32(vec![4], vec![0.5; 4]),
        HostTensor::from_f32(vec![2], vec![0.5; 2]),
    ];
    let short = Param { shape: vec![3, 3], ..param(2, 3, vec![0.5; 6]) };
    for param in [cut, short] {
        assert!(matches!(Quantized::new(&param, Packing::Int8Block), Err(Error::Shape { .. })));
    }
}

#[test]
fn stored_dtypes_are_read_as_they_are() {
    let values = [0.5f32, -1.0, 0.375, 0.0, 2.0, -0.125];
    let halves = |dtype, bits: fn(f32) -> u16| {
        let bits = values.iter().map(|&v| bits(v)).collect();
        Param::new("w", Role::Linear, HostTensor::from_halves(dtype, vec![2, 3], bits))
    };
    let all = [
        param(2, 3, values.to_vec()),
        halves(Dtype::Bf16, |v| bf16::from_f32(v).to_bits()),
        halves(Dtype::F16, |v| half::f16::from_f32(v).to_bits()),
    ];
    for packing in PACKINGS {
        let all = all.each_ref().map(|p| Quantized::new(p, packing).unwrap());
        assert!(all.iter().all(|q| q.quants() == all[0].quants() && q.scales() == all[0].scales()));
    }
}

#[test]
fn sizes_are_those_that_are_planned() {
    for (rows, cols) in [(3, 40), (2, 32), (1, 1), (5, 64), (0, 40), (2, 0)] {
        for packing in PACKINGS {
            let q = quantized(rows, cols, vec![0.25; rows * cols], packing);
            let planned = Layout::Packed(packing).bytes([rows as u64, cols as u64], Dtype::Bf16);
            let empty = rows * cols == 0;
            assert!(q.bytes() == planned || empty, "{packing:?} {rows} x {cols}");
            assert_eq!(q.quants().len(), rows * packing.stride(cols));
        }
    }
}

#[test]
fn names_lead_back_to_formats() {
    for format in WeightFormat::ALL {
        assert_eq!(format.to_string().parse::<WeightFormat>().unwrap(), format);
    }
    let message = "q4".parse::<WeightFormat>().unwrap_err().to_string();
    assert!(WeightFormat::ALL.iter().all(|f| message.contains(f.name())), "{message}");
    assert!(message.contains("`q4`"), "{message}");
}

/// The table of the module's documentation.
#[test]
fn rules() {
    use Layout::{F32, Packed, Stored};
    use Packing::{Int4Block, Int8Block, Int8Row};
    let roles = [
        (Role::Vector, [F32; 4]),
        (Role::Conv, [F32; 4]),
        (Role::A, [F32; 4]),
        (Role::Router, [Stored; 4]),
        (Role::Embedding, [Stored, Stored, Packed(Int8Block), Packed(Int8Block)]),
        (Role::Head, [Stored, Stored, Packed(Int8Block), Packed(Int8Block)]),
        (Role::Selection, [Stored, Stored, Packed(Int8Block), Packed(Int8Block)]),
        (Role::Linear, [Stored, Stored, Packed(Int8Block), Packed(Int4Block)]),
        (Role::Experts, [Stored, Packed(Int8Row), Packed(Int8Block), Packed(Int4Block)]),
        (Role::Mlp, [Stored, Packed(Int8Row), Packed(Int8Block), Packed(Int4Block)]),
    ];
    for (role, expected) in roles {
        assert_eq!(WeightFormat::ALL.map(|format| format.layout(role)), expected, "{role:?}");
    }
}
