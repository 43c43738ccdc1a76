//! What does not fit each of them.

use std::ops::Range;

use jamba_core::weights::Moe;
use jamba_core::{
    Backend, CausalConv1d, Cols, HostTensor, Limits, Param, Result, Role, SelectiveScan, StatePart,
};

use super::Answer::{Refusal, Shape};
use super::{ATTENTION, Bench, Found, LIMITS, MAMBA, TOKENS, values};

/// Tries everything that does not fit one of [`NAMES`](super::NAMES).
///
/// # Errors
/// What the backend reports of operands that fit.
pub(crate) fn run<B: Backend>(name: &str, b: &B) -> Result<Found> {
    let mut t = Bench::new(b)?;
    match name {
        "upload" => upload(&mut t)?,
        "write" => write(&mut t)?,
        "read" => read(&mut t)?,
        "state" => state(&mut t)?,
        "embed" => embed(&mut t)?,
        "linear" => linear(&mut t)?,
        "rms_norm" => rms_norm(&mut t)?,
        "rms_norm_cols" => rms_norm_cols(&mut t)?,
        "add_assign" => add_assign(&mut t)?,
        "silu_mul" => silu_mul(&mut t)?,
        "causal_conv1d" => causal_conv1d(&mut t)?,
        "selective_scan" => selective_scan(&mut t)?,
        "attention" => attention(&mut t)?,
        "moe_experts" => moe_experts(&mut t)?,
        "output_rows" => output_rows(&mut t)?,
        other => unreachable!("{other} is not one of NAMES"),
    }
    Ok(t.found())
}

/// A range that ends before it begins.
const INVERTED: Range<usize> = Range { start: 8, end: 1 };

fn cols<T>(tensor: &T, cols: Range<usize>) -> Cols<'_, T> {
    Cols { tensor, cols }
}

fn upload<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    t.weight(Role::Linear, &[4, 3])?;
    let part =
        |shape: &[usize]| HostTensor::from_f32(shape.to_vec(), values(shape.iter().product()));
    for role in [Role::Linear, Role::Experts, Role::Vector, Role::Conv, Role::A] {
        let misfits: [(&str, &[usize], Vec<HostTensor>); 6] = [
            ("no parts", &[4, 3], vec![]),
            ("a row less", &[4, 3], vec![part(&[2, 3]), part(&[1, 3])]),
            ("a row more", &[4, 3], vec![part(&[2, 3]), part(&[3, 3])]),
            ("parts that split a row", &[4, 3], vec![part(&[5]), part(&[7])]),
            ("elements beyond the rows", &[4, 3], vec![part(&[13])]),
            ("a shape of more elements than there are numbers", &[1 << 40, 1 << 40], vec![]),
        ];
        for (what, shape, parts) in misfits {
            let param = Param { name: "weight".into(), role, shape: shape.to_vec(), parts };
            t.refuses(&format!("{role:?}: {what}"), Shape, |b, _| b.upload(param))?;
        }
    }
    Ok(())
}

fn write<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    t.fits(t.out(4)?, |b, out, _| b.write(out, &values(TOKENS * 4)))?;
    t.fits(t.out(4)?, |b, out, _| b.write(out, &[]))?;
    t.fits(t.b.alloc(TOKENS, 0)?, |b, out, _| b.write(out, &[]))?;
    for (what, n) in [("less than a row", 3), ("half a row", 6), ("a row too many", 16)] {
        t.refused(what, Shape, t.out(4)?, |b, out, _| b.write(out, &values(n)))?;
    }
    let out = t.b.alloc(TOKENS, 0)?;
    t.refused("values for no columns", Shape, out, |b, out, _| b.write(out, &[1.0]))
}

fn read<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let x = t.tensor(2, 4)?;
    let got = t.b.read(cols(&x, 1..3))?;
    t.tried += 1;
    if got != [&values(8)[1..3], &values(8)[5..7]].concat() {
        t.wrong.push(format!("columns 1 and 2: {got:?}"));
    }
    for range in [2..5, 5..6, 0..usize::MAX, INVERTED] {
        let what = format!("columns {range:?} of 4");
        t.refuses(&what, Shape, |b, _| b.read(cols(&x, range)))?;
    }
    Ok(())
}

fn state<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    use StatePart::{Conv, Keys, Ssm, Values};
    let Limits { slots, context, .. } = LIMITS;
    let config = t.config.clone();
    let (kv, width) = (config.num_key_value_heads, config.kv_width());
    let nowhere = [
        ("a slot that is not there", MAMBA, Ssm, slots, 1),
        ("a layer that is not there", 2, Ssm, 0, 1),
        ("the scan of an attention layer", ATTENTION, Ssm, 0, 1),
        ("the convolution of an attention layer", ATTENTION, Conv, 0, 1),
        ("the keys of a Mamba layer", MAMBA, Keys, 0, 1),
        ("positions beyond the context", ATTENTION, Values, 0, context + 1),
        ("more positions than can be", ATTENTION, Keys, 0, usize::MAX),
    ];
    for (what, layer, part, slot, positions) in nowhere {
        t.refuses(&format!("read_state: {what}"), Refusal, |b, state| {
            b.read_state(state, layer, part, slot, 0..positions)
        })?;
        t.refuses(&format!("write_state: {what}"), Refusal, |b, state| {
            b.write_state(state, layer, part, slot, 0..positions, &[0.0; 4])
        })?;
    }
    let lengths = [
        (MAMBA, Conv, config.d_inner() * (config.mamba_d_conv - 1)),
        (MAMBA, Ssm, config.d_inner() * config.mamba_d_state),
        (ATTENTION, Keys, 2 * width),
        (ATTENTION, Values, 2 * width),
    ];
    for (layer, part, n) in lengths {
        for wrong in [0, n - 1, n + 1, n + width] {
            let what = format!("write_state: {part:?} of {wrong} values instead of {n}");
            t.refuses(&what, Shape, |b, state| {
                b.write_state(state, layer, part, 0, 0..2, &vec![0.0; wrong])
            })?;
        }
    }
    t.refuses("reset_slot: a slot that is not there", Refusal, |b, s| b.reset_slot(s, slots))?;
    for (from, to, positions) in [(slots, 0, 1), (0, slots, 1), (0, 1, context + 1)] {
        let what = format!("copy_slot: {from} to {to} of {slots}, {positions} positions");
        let copy = |b: &B, s: &mut B::State| b.copy_slot(&config, s, from, to, positions);
        t.refuses(&what, Refusal, copy)?;
    }
    for range in [6..context + 1, INVERTED, usize::MAX - 1..usize::MAX] {
        let what = format!("read_state: {range:?} of {context}");
        t.refuses(&what, Refusal, |b, s| b.read_state(s, ATTENTION, Keys, 0, range.clone()))?;
        let n = range.len().min(8) * width;
        let what = format!("write_state: {range:?} of {context}");
        t.refuses(&what, Refusal, |b, s| {
            b.write_state(s, ATTENTION, Keys, 0, range.clone(), &vec![0.0; n])
        })?;
    }
    for wrong in [0, 2 * width - 1, 2 * width + 1, 2 * width + kv] {
        let what = format!("write_state: {wrong} values instead of {}", 2 * width);
        t.refuses(&what, Shape, |b, s| {
            b.write_state(s, ATTENTION, Values, 1, 2..4, &vec![0.0; wrong])
        })?;
    }
    for limits in [Limits { context: usize::MAX, ..LIMITS }, Limits { slots: usize::MAX, ..LIMITS }]
    {
        t.refuses(&format!("new_state: {limits:?}"), Refusal, |b, _| {
            b.new_state(&config, &limits)
        })?;
    }
    Ok(())
}

fn embed<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let table = t.weight(Role::Embedding, &[5, 6])?;
    t.fits(t.out(6)?, |b, out, s| b.embed(&table, s, out))?;
    t.refused("a result with a column less", Shape, t.out(5)?, |b, o, s| b.embed(&table, s, o))?;
    t.refused("a result with a column more", Shape, t.out(7)?, |b, o, s| b.embed(&table, s, o))?;
    let small = t.b.alloc(2, 6)?;
    t.refused("a result without room", Shape, small, |b, o, s| b.embed(&table, s, o))?;
    for (what, answer, role, shape, cols) in [
        ("a token beyond the table", Refusal, Role::Embedding, &[4, 6][..], 6),
        ("a vector as table", Refusal, Role::Vector, &[6], 6),
        ("no columns", Shape, Role::Embedding, &[5, 0], 0),
    ] {
        let table = t.weight(role, shape)?;
        t.refused(what, answer, t.out(cols)?, |b, out, s| b.embed(&table, s, out))?;
    }
    Ok(())
}

fn linear<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let x = t.tensor(TOKENS, 9)?;
    let (weight, bias) = (t.weight(Role::Linear, &[5, 7])?, t.weight(Role::Vector, &[5])?);
    t.fits(t.out(5)?, |b, out, _| b.linear(cols(&x, 1..8), &weight, Some(&bias), out))?;
    for range in [1..7, 1..9, 5..12, 9..16, usize::MAX - 7..usize::MAX, INVERTED] {
        let what = format!("columns {range:?} of 9 for a weight of 7");
        let out = t.out(5)?;
        t.refused(&what, Shape, out, |b, out, _| b.linear(cols(&x, range), &weight, None, out))?;
    }
    for n in [4, 6] {
        let what = format!("a result of {n} columns for a weight of 5 rows");
        let out = t.out(n)?;
        t.refused(&what, Shape, out, |b, o, _| b.linear(cols(&x, 1..8), &weight, None, o))?;
    }
    let small = t.b.alloc(2, 5)?;
    t.refused("a result without room", Shape, small, |b, out, _| {
        b.linear(cols(&x, 1..8), &weight, None, out)
    })?;
    for (what, answer, role, shape) in [
        ("a bias of 4", Shape, Role::Vector, &[4][..]),
        ("a bias of 6", Shape, Role::Vector, &[6]),
        ("a column as bias", Refusal, Role::Linear, &[5, 1]),
        ("a matrix as bias", Refusal, Role::Linear, &[1, 5]),
    ] {
        let bias = t.weight(role, shape)?;
        t.refused(what, answer, t.out(5)?, |b, out, _| {
            b.linear(cols(&x, 1..8), &weight, Some(&bias), out)
        })?;
    }
    for (what, answer, role, shape, range) in [
        ("a vector as weight", Refusal, Role::Vector, &[7][..], 1..8),
        ("taps as weight", Refusal, Role::Conv, &[5, 7], 1..8),
        ("A as weight", Refusal, Role::A, &[5, 7], 1..8),
        ("a sum over nothing", Shape, Role::Linear, &[5, 0], 2..2),
        ("a weight without rows", Shape, Role::Linear, &[0, 7], 1..8),
    ] {
        let weight = t.weight(role, shape)?;
        let n = if shape.len() == 1 { 1 } else { shape[0] };
        t.refused(what, answer, t.out(n)?, |b, out, _| {
            b.linear(cols(&x, range), &weight, None, out)
        })?;
    }
    Ok(())
}

fn rms_norm<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let (x, weight) = (t.tensor(TOKENS, 6)?, t.weight(Role::Vector, &[6])?);
    t.fits(t.out(6)?, |b, out, _| b.rms_norm(&x, &weight, 1e-6, out))?;
    for n in [5, 7] {
        let what = format!("a result of {n} columns for 6");
        let out = t.out(n)?;
        t.refused(&what, Shape, out, |b, out, _| b.rms_norm(&x, &weight, 1e-6, out))?;
    }
    let small = t.b.alloc(2, 6)?;
    t.refused("a result without room", Shape, small, |b, o, _| b.rms_norm(&x, &weight, 1e-6, o))?;
    for (what, answer, role, shape) in [
        ("a weight of 5", Shape, Role::Vector, &[5][..]),
        ("a weight of 7", Shape, Role::Vector, &[7]),
        ("a matrix as weight", Refusal, Role::Linear, &[1, 6]),
    ] {
        let weight = t.weight(role, shape)?;
        t.refused(what, answer, t.out(6)?, |b, out, _| b.rms_norm(&x, &weight, 1e-6, out))?;
    }
    let (x, weight) = (t.b.alloc(TOKENS, 0)?, t.weight(Role::Vector, &[0])?);
    t.refused("no columns", Shape, t.out(0)?, |b, out, _| b.rms_norm(&x, &weight, 1e-6, out))
}

fn rms_norm_cols<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let weight = t.weight(Role::Vector, &[6])?;
    t.fits(t.out(9)?, |b, x, _| b.rms_norm_cols(x, 2..8, &weight, 1e-6))?;
    for range in [2..7, 2..9, 4..10, 9..15, usize::MAX - 6..usize::MAX, INVERTED] {
        let what = format!("columns {range:?} of 9 for a weight of 6");
        let x = t.out(9)?;
        t.refused(&what, Shape, x, |b, x, _| b.rms_norm_cols(x, range, &weight, 1e-6))?;
    }
    for (what, answer, role, shape, range) in [
        ("a matrix as weight", Refusal, Role::Linear, &[1, 6][..], 2..8),
        ("no columns", Shape, Role::Vector, &[0], 2..2),
    ] {
        let weight = t.weight(role, shape)?;
        let x = t.out(9)?;
        t.refused(what, answer, x, |b, x, _| b.rms_norm_cols(x, range, &weight, 1e-6))?;
    }
    Ok(())
}

fn add_assign<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let y = t.tensor(1, 6)?;
    t.fits(t.out(6)?, |b, x, _| b.add_assign(x, &y))?;
    for [rows, n] in [[2, 6], [0, 6], [1, 5], [1, 7], [6, 1]] {
        let y = t.tensor(rows, n)?;
        let what = format!("({rows}, {n}) added to (1, 6)");
        t.refused(&what, Shape, t.out(6)?, |b, x, _| b.add_assign(x, &y))?;
    }
    Ok(())
}

fn silu_mul<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let gate_up = t.tensor(TOKENS, 8)?;
    t.fits(t.out(4)?, |b, out, _| b.silu_mul(&gate_up, out))?;
    for n in [3, 5, 8] {
        let what = format!("a result of {n} columns for 8");
        t.refused(&what, Shape, t.out(n)?, |b, out, _| b.silu_mul(&gate_up, out))?;
    }
    let small = t.b.alloc(2, 4)?;
    t.refused("a result without room", Shape, small, |b, out, _| b.silu_mul(&gate_up, out))?;
    let odd = t.tensor(TOKENS, 7)?;
    t.refused("an odd number of columns", Shape, t.out(3)?, |b, out, _| b.silu_mul(&odd, out))?;
    let none = t.b.alloc(TOKENS, 0)?;
    t.refused("no columns", Shape, t.out(0)?, |b, out, _| b.silu_mul(&none, out))
}

fn causal_conv1d<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let (d_inner, d_conv) = (t.config.d_inner(), t.config.mamba_d_conv);
    let xz = t.tensor(TOKENS, 2 * d_inner)?;
    let weight = t.weight(Role::Conv, &[d_inner, d_conv])?;
    let bias = t.weight(Role::Vector, &[d_inner])?;
    let all = || CausalConv1d { x: cols(&xz, 0..d_inner), weight: &weight, bias: Some(&bias) };
    t.fits(t.out(d_inner)?, |b, out, s| b.causal_conv1d(all(), MAMBA, s, out))?;
    let beyond = d_inner + 1..2 * d_inner + 1;
    for range in [0..d_inner - 1, 0..d_inner + 1, beyond, 0..0, INVERTED] {
        let what = format!("columns {range:?} of {} for {d_inner} channels", 2 * d_inner);
        let (args, out) = (CausalConv1d { x: cols(&xz, range), ..all() }, t.out(d_inner)?);
        t.refused(&what, Shape, out, |b, out, s| b.causal_conv1d(args, MAMBA, s, out))?;
    }
    for rows in [0, TOKENS - 1, TOKENS + 1] {
        let x = t.tensor(rows, d_inner)?;
        let what = format!("{rows} rows for {TOKENS} tokens");
        let args = CausalConv1d { x: cols(&x, 0..d_inner), ..all() };
        let out = t.out(d_inner)?;
        t.refused(&what, Shape, out, |b, out, s| b.causal_conv1d(args, MAMBA, s, out))?;
    }
    for n in [d_inner - 1, d_inner + 1] {
        let what = format!("a result of {n} columns for {d_inner} channels");
        let out = t.out(n)?;
        t.refused(&what, Shape, out, |b, out, s| b.causal_conv1d(all(), MAMBA, s, out))?;
    }
    let small = t.b.alloc(2, d_inner)?;
    t.refused("a result without room", Shape, small, |b, out, s| {
        b.causal_conv1d(all(), MAMBA, s, out)
    })?;
    for layer in [ATTENTION, 2] {
        let (what, out) = (format!("layer {layer} has no convolution"), t.out(d_inner)?);
        t.refused(&what, Refusal, out, |b, out, s| b.causal_conv1d(all(), layer, s, out))?;
    }
    for (what, answer, role, shape) in [
        ("a tap less", Shape, Role::Conv, [d_inner, d_conv - 1]),
        ("a tap more", Shape, Role::Conv, [d_inner, d_conv + 1]),
        ("a channel less", Shape, Role::Conv, [d_inner - 1, d_conv]),
        ("taps transposed", Shape, Role::Conv, [d_conv, d_inner]),
        ("a matrix as taps", Refusal, Role::Linear, [d_inner, d_conv]),
    ] {
        let (weight, out) = (t.weight(role, &shape)?, t.out(d_inner)?);
        let args = CausalConv1d { weight: &weight, ..all() };
        t.refused(what, answer, out, |b, out, s| b.causal_conv1d(args, MAMBA, s, out))?;
    }
    for (what, answer, role, shape) in [
        ("a bias too short", Shape, Role::Vector, &[d_inner - 1][..]),
        ("a bias too long", Shape, Role::Vector, &[d_inner + 1]),
        ("a matrix as bias", Refusal, Role::Linear, &[1, d_inner]),
    ] {
        let (bias, out) = (t.weight(role, shape)?, t.out(d_inner)?);
        let args = CausalConv1d { bias: Some(&bias), ..all() };
        t.refused(what, answer, out, |b, out, s| b.causal_conv1d(args, MAMBA, s, out))?;
    }
    Ok(())
}

/// Changes one operand of a scan.
type Change<'a, B> = &'a dyn for<'b> Fn(
    &mut SelectiveScan<'b, <B as Backend>::Tensor, <B as Backend>::Weight>,
    Cols<'b, <B as Backend>::Tensor>,
);

fn selective_scan<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let (d_inner, d_state) = (t.config.d_inner(), t.config.mamba_d_state);
    let (wide, narrow) = (t.tensor(TOKENS, d_inner)?, t.tensor(TOKENS, 2 * d_state)?);
    let (a, d) = (t.weight(Role::A, &[d_inner, d_state])?, t.weight(Role::Vector, &[d_inner])?);
    let all = || SelectiveScan {
        x: cols(&wide, 0..d_inner),
        dt: cols(&wide, 0..d_inner),
        a: &a,
        b: cols(&narrow, 0..d_state),
        c: cols(&narrow, d_state..2 * d_state),
        d: &d,
        z: cols(&wide, 0..d_inner),
        dt_bias: &d,
    };
    t.fits(t.out(d_inner)?, |b, y, s| b.selective_scan(all(), MAMBA, s, y))?;
    let operands: [(&str, usize, Change<'_, B>); 5] = [
        ("x", d_inner, &|args, view| args.x = view),
        ("dt", d_inner, &|args, view| args.dt = view),
        ("b", d_state, &|args, view| args.b = view),
        ("c", d_state, &|args, view| args.c = view),
        ("z", d_inner, &|args, view| args.z = view),
    ];
    for (name, n, change) in operands {
        let many = t.tensor(TOKENS, n + 2)?;
        for range in [0..n - 1, 0..n + 1, 3..n + 3, 0..0, INVERTED] {
            let (what, y) = (format!("columns {range:?} of {} as {name}", n + 2), t.out(d_inner)?);
            let mut args = all();
            change(&mut args, cols(&many, range));
            t.refused(&what, Shape, y, |b, y, s| b.selective_scan(args, MAMBA, s, y))?;
        }
        for rows in [0, TOKENS - 1, TOKENS + 1] {
            let (other, y) = (t.tensor(rows, n)?, t.out(d_inner)?);
            let mut args = all();
            change(&mut args, cols(&other, 0..n));
            let what = format!("{rows} rows as {name} for {TOKENS} tokens");
            t.refused(&what, Shape, y, |b, y, s| b.selective_scan(args, MAMBA, s, y))?;
        }
    }
    for n in [d_inner - 1, d_inner + 1] {
        let (what, y) = (format!("a result of {n} columns for {d_inner} channels"), t.out(n)?);
        t.refused(&what, Shape, y, |b, y, s| b.selective_scan(all(), MAMBA, s, y))?;
    }
    let small = t.b.alloc(2, d_inner)?;
    t.refused("a result without room", Shape, small, |b, y, s| {
        b.selective_scan(all(), MAMBA, s, y)
    })?;
    for layer in [ATTENTION, 2] {
        let (what, y) = (format!("layer {layer} has no scan"), t.out(d_inner)?);
        t.refused(&what, Refusal, y, |b, y, s| b.selective_scan(all(), layer, s, y))?;
    }
    for (what, answer, role, shape) in [
        ("a state less in A", Shape, Role::A, [d_inner, d_state - 1]),
        ("a state more in A", Shape, Role::A, [d_inner, d_state + 1]),
        ("a channel less in A", Shape, Role::A, [d_inner - 1, d_state]),
        ("A transposed", Shape, Role::A, [d_state, d_inner]),
        ("a matrix as A", Refusal, Role::Linear, [d_inner, d_state]),
    ] {
        let (a, y) = (t.weight(role, &shape)?, t.out(d_inner)?);
        let args = SelectiveScan { a: &a, ..all() };
        t.refused(what, answer, y, |b, y, s| b.selective_scan(args, MAMBA, s, y))?;
    }
    for (what, answer, role, shape) in [
        ("a vector too short", Shape, Role::Vector, &[d_inner - 1][..]),
        ("a vector too long", Shape, Role::Vector, &[d_inner + 1]),
        ("a matrix", Refusal, Role::Linear, &[1, d_inner]),
    ] {
        let v = t.weight(role, shape)?;
        let (as_d, as_bias) =
            (SelectiveScan { d: &v, ..all() }, SelectiveScan { dt_bias: &v, ..all() });
        for (name, args) in [("D", as_d), ("the bias of dt", as_bias)] {
            let (what, y) = (format!("{what} as {name}"), t.out(d_inner)?);
            t.refused(&what, answer, y, |b, y, s| b.selective_scan(args, MAMBA, s, y))?;
        }
    }
    Ok(())
}

fn attention<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let (q, n) = (t.config.q_width(), t.config.q_width() + 2 * t.config.kv_width());
    let qkv = t.tensor(TOKENS, n)?;
    t.fits(t.out(q)?, |b, out, s| b.attention(&qkv, ATTENTION, s, out))?;
    for [rows, n] in [[TOKENS, n - 1], [TOKENS, n + 1], [TOKENS - 1, n], [TOKENS + 1, n], [0, n]] {
        let qkv = t.tensor(rows, n)?;
        let what = format!("({rows}, {n}) as q, k and v");
        t.refused(&what, Shape, t.out(q)?, |b, o, s| b.attention(&qkv, ATTENTION, s, o))?;
    }
    for n in [q - 1, q + 1] {
        let what = format!("a result of {n} columns for {q}");
        t.refused(&what, Shape, t.out(n)?, |b, o, s| b.attention(&qkv, ATTENTION, s, o))?;
    }
    let small = t.b.alloc(2, q)?;
    t.refused("a result without room", Shape, small, |b, o, s| b.attention(&qkv, ATTENTION, s, o))?;
    for layer in [MAMBA, 2] {
        let what = format!("layer {layer} has no cache");
        t.refused(&what, Refusal, t.out(q)?, |b, out, s| b.attention(&qkv, layer, s, out))?;
    }
    Ok(())
}

fn moe_experts<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let (experts, hidden, inter) = (4, 6, 5);
    let fit = (
        [TOKENS, hidden],
        [TOKENS, experts],
        [experts, 2 * inter, hidden],
        [experts, hidden, inter],
    );
    type Sizes = ([usize; 2], [usize; 2], [usize; 3], [usize; 3]);
    let moe = |t: &Bench<'_, B>, (x, logits, gate_up, down): Sizes, role| -> Result<_> {
        let weights = Moe {
            router: t.weight(Role::Router, &[experts, hidden])?,
            gate_up_proj: t.weight(role, &gate_up)?,
            down_proj: t.weight(role, &down)?,
        };
        Ok((t.tensor(x[0], x[1])?, t.tensor(logits[0], logits[1])?, weights))
    };
    let (x, logits, weights) = moe(t, fit, Role::Experts)?;
    t.fits(t.out(hidden)?, |b, out, _| b.moe_experts(&x, &logits, &weights, 2, out))?;
    for top_k in [0, experts + 1, usize::MAX] {
        let (what, out) = (format!("{top_k} of {experts} experts"), t.out(hidden)?);
        t.refused(&what, Refusal, out, |b, out, _| {
            b.moe_experts(&x, &logits, &weights, top_k, out)
        })?;
    }
    for n in [hidden - 1, hidden + 1] {
        let (what, out) = (format!("a result of {n} columns for {hidden}"), t.out(n)?);
        t.refused(&what, Shape, out, |b, o, _| b.moe_experts(&x, &logits, &weights, 2, o))?;
    }
    let small = t.b.alloc(2, hidden)?;
    t.refused("a result without room", Shape, small, |b, out, _| {
        b.moe_experts(&x, &logits, &weights, 2, out)
    })?;
    let (x, logits, gate_up, down) = fit;
    let misfits: [(&str, Sizes); 10] = [
        ("a column more in x", ([TOKENS, hidden + 1], logits, gate_up, down)),
        ("a row less of logits", (x, [TOKENS - 1, experts], gate_up, down)),
        ("a row more of logits", (x, [TOKENS + 1, experts], gate_up, down)),
        ("logits of one expert less", (x, [TOKENS, experts - 1], gate_up, down)),
        ("logits of one expert more", (x, [TOKENS, experts + 1], gate_up, down)),
        ("a gate that is too narrow", (x, logits, [experts, 2 * inter, hidden - 1], down)),
        ("a gate without its partner", (x, logits, [experts, 2 * inter - 1, hidden], down)),
        ("a down that is too narrow", (x, logits, gate_up, [experts, hidden, inter - 1])),
        ("a down that is too short", (x, logits, gate_up, [experts, hidden - 1, inter])),
        ("experts of no width", (x, logits, [experts, 0, hidden], [experts, hidden, 0])),
    ];
    for (what, sizes) in misfits {
        let ((x, logits, weights), out) = (moe(t, sizes, Role::Experts)?, t.out(hidden)?);
        t.refused(what, Shape, out, |b, o, _| b.moe_experts(&x, &logits, &weights, 2, o))?;
    }
    let ((x, logits, weights), out) = (moe(t, fit, Role::A)?, t.out(hidden)?);
    t.refused("A as experts", Refusal, out, |b, o, _| b.moe_experts(&x, &logits, &weights, 2, o))
}

fn output_rows<B: Backend>(t: &mut Bench<'_, B>) -> Result<()> {
    let x = t.tensor(TOKENS, 6)?;
    t.fits(t.out(6)?, |b, out, s| b.output_rows(&x, s, out))?;
    for rows in [0, TOKENS - 1, TOKENS + 1] {
        let x = t.tensor(rows, 6)?;
        let what = format!("{rows} rows for {TOKENS} tokens");
        t.refused(&what, Shape, t.out(6)?, |b, out, s| b.output_rows(&x, s, out))?;
    }
    for n in [5, 7] {
        let what = format!("a result of {n} columns for 6");
        t.refused(&what, Shape, t.out(n)?, |b, out, s| b.output_rows(&x, s, out))?;
    }
    let small = t.b.alloc(2, 6)?;
    t.refused("a result without room", Shape, small, |b, out, s| b.output_rows(&x, s, out))
}
