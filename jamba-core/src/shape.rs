//! Which operands each operator accepts: called by backends before they touch a value.
//!
//! A tensor may have no rows; an operator works on at least one column.

use std::ops::Range;

use crate::backend::{CausalConv1d, Cols, Limits, SelectiveScan};
use crate::error::{Error, Result};
use crate::tensor::{Param, Role};
use crate::weights::Moe;

/// What has rows in use and columns: activations, parameters.
pub trait Shaped {
    /// `[rows, columns]`; a vector is one row.
    fn shape(&self) -> [usize; 2];

    /// Rows that activations are allocated for, where they tell: an operator whose results need
    /// more is refused before it changes a state.
    fn capacity(&self) -> usize {
        usize::MAX
    }

    /// What a parameter is for, where it tells: a vector is then not taken for a matrix of one
    /// row.
    fn role(&self) -> Option<Role> {
        None
    }
}

/// Kinds of parameters, as operators tell them apart.
#[derive(Clone, Copy)]
enum Kind {
    Matrix,
    Vector,
    Conv,
    A,
}

fn kind(op: &'static str, what: &'static str, w: &impl Shaped, kind: Kind) -> Result<()> {
    let Some(role) = w.role() else { return Ok(()) };
    let (expected, fits) = match kind {
        Kind::Matrix => ("a matrix", !matches!(role, Role::Vector | Role::Conv | Role::A)),
        Kind::Vector => ("a vector", role == Role::Vector),
        Kind::Conv => ("taps of the convolution", role == Role::Conv),
        Kind::A => ("A", role == Role::A),
    };
    if fits { Ok(()) } else { Err(Error::Role { op, what, expected, got: role }) }
}

fn same(op: &'static str, what: &'static str, got: [usize; 2], expected: [usize; 2]) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { op, what, expected, got }) }
}

/// `t` has `cols` columns, of which there is one at least.
fn width(op: &'static str, what: &'static str, t: &impl Shaped, cols: usize) -> Result<()> {
    let got = t.shape();
    same(op, what, got, [got[0], cols.max(1)])
}

/// `out` has room for `rows` rows of `cols` columns.
fn room(op: &'static str, out: &impl Shaped, rows: usize, cols: usize) -> Result<()> {
    width(op, "out", out, cols)?;
    if rows <= out.capacity() {
        return Ok(());
    }
    Err(Error::Shape { op, what: "out", expected: [rows, cols], got: [out.capacity(), cols] })
}

fn vector(op: &'static str, what: &'static str, w: &impl Shaped, len: usize) -> Result<()> {
    kind(op, what, w, Kind::Vector)?;
    same(op, what, w.shape(), [1, len])
}

/// `cols` lie within the columns of `t`, which has `rows` rows.
fn within(
    op: &'static str,
    what: &'static str,
    t: &impl Shaped,
    rows: usize,
    cols: &Range<usize>,
) -> Result<()> {
    let got = t.shape();
    if got[0] == rows && cols.start <= cols.end && cols.end <= got[1] {
        return Ok(());
    }
    Err(Error::Shape { op, what, expected: [rows, cols.end], got })
}

/// Operands of [`embed`](crate::Backend::embed), but for the token ids.
pub fn embed(table: &impl Shaped, out: &impl Shaped) -> Result<()> {
    kind("embed", "table", table, Kind::Matrix)?;
    width("embed", "out", out, table.shape()[1])
}

/// Token ids of [`embed`](crate::Backend::embed): each is a row of the table.
pub fn ids(table: &impl Shaped, tokens: &[u32], out: &impl Shaped) -> Result<()> {
    let [vocab_size, cols] = table.shape();
    if let Some(index) = tokens.iter().position(|&id| id as usize >= vocab_size) {
        return Err(Error::Token { id: tokens[index], index, vocab_size });
    }
    room("embed", out, tokens.len(), cols)
}

/// Operands of [`linear`](crate::Backend::linear).
pub fn linear<T: Shaped, W: Shaped>(
    x: &Cols<'_, T>,
    weight: &W,
    bias: Option<&W>,
    out: &T,
) -> Result<()> {
    const OP: &str = "linear";
    let [n, k] = weight.shape();
    let rows = x.tensor.shape()[0];
    kind(OP, "weight", weight, Kind::Matrix)?;
    within(OP, "x", x.tensor, rows, &x.cols)?;
    same(OP, "x", [rows, x.cols.len()], [rows, k.max(1)])?;
    room(OP, out, rows, n)?;
    bias.map_or(Ok(()), |bias| vector(OP, "bias", bias, n))
}

/// Operands of [`rms_norm`](crate::Backend::rms_norm).
pub fn rms_norm<T: Shaped>(x: &T, weight: &impl Shaped, out: &T) -> Result<()> {
    let [rows, cols] = x.shape();
    vector("rms_norm", "weight", weight, cols)?;
    room("rms_norm", out, rows, cols)
}

/// Operands of [`rms_norm_cols`](crate::Backend::rms_norm_cols).
pub fn rms_norm_cols(x: &impl Shaped, cols: &Range<usize>, weight: &impl Shaped) -> Result<()> {
    within("rms_norm_cols", "x", x, x.shape()[0], cols)?;
    vector("rms_norm_cols", "weight", weight, cols.len().max(1))
}

/// Operands of [`add_assign`](crate::Backend::add_assign).
pub fn add_assign<T: Shaped>(x: &T, y: &T) -> Result<()> {
    same("add_assign", "y", y.shape(), x.shape())
}

/// Operands of [`silu_mul`](crate::Backend::silu_mul).
pub fn silu_mul<T: Shaped>(gate_up: &T, out: &T) -> Result<()> {
    let [rows, cols] = gate_up.shape();
    room("silu_mul", out, rows, cols / 2)?;
    width("silu_mul", "gate_up", gate_up, cols / 2 * 2)
}

/// Operands of [`causal_conv1d`](crate::Backend::causal_conv1d) for `tokens` staged tokens and a
/// state of `(d_inner, d_conv)`.
pub fn causal_conv1d<T: Shaped, W: Shaped>(
    args: &CausalConv1d<'_, T, W>,
    tokens: usize,
    state: [usize; 2],
    out: &T,
) -> Result<()> {
    const OP: &str = "causal_conv1d";
    let d_inner = state[0];
    kind(OP, "weight", args.weight, Kind::Conv)?;
    same(OP, "weight", args.weight.shape(), state)?;
    within(OP, "x", args.x.tensor, tokens, &args.x.cols)?;
    same(OP, "x", [tokens, args.x.cols.len()], [tokens, d_inner])?;
    room(OP, out, tokens, d_inner)?;
    args.bias.map_or(Ok(()), |bias| vector(OP, "bias", bias, d_inner))
}

/// Operands of [`selective_scan`](crate::Backend::selective_scan) for `tokens` staged tokens and
/// a state of `(d_inner, d_state)`.
pub fn selective_scan<T: Shaped, W: Shaped>(
    args: &SelectiveScan<'_, T, W>,
    tokens: usize,
    state: [usize; 2],
    y: &T,
) -> Result<()> {
    const OP: &str = "selective_scan";
    let [d_inner, d_state] = state;
    kind(OP, "a", args.a, Kind::A)?;
    same(OP, "a", args.a.shape(), state)?;
    let operands = [
        ("x", &args.x, d_inner),
        ("dt", &args.dt, d_inner),
        ("b", &args.b, d_state),
        ("c", &args.c, d_state),
        ("z", &args.z, d_inner),
    ];
    for (what, view, cols) in operands {
        within(OP, what, view.tensor, tokens, &view.cols)?;
        same(OP, what, [tokens, view.cols.len()], [tokens, cols])?;
    }
    vector(OP, "d", args.d, d_inner)?;
    vector(OP, "dt_bias", args.dt_bias, d_inner)?;
    room(OP, y, tokens, d_inner)
}

/// Operands of [`attention`](crate::Backend::attention) for `tokens` staged tokens, queries of
/// `q_width` and keys (and values) of `kv_width`.
pub fn attention<T: Shaped>(
    qkv: &T,
    tokens: usize,
    q_width: usize,
    kv_width: usize,
    out: &T,
) -> Result<()> {
    same("attention", "qkv", qkv.shape(), [tokens, q_width + 2 * kv_width])?;
    room("attention", out, tokens, q_width)
}

/// Operands of [`moe_experts`](crate::Backend::moe_experts). Returns the intermediate size.
pub fn moe_experts<T: Shaped, W: Shaped>(
    x: &T,
    router_logits: &T,
    weights: &Moe<W>,
    top_k: usize,
    out: &T,
) -> Result<usize> {
    const OP: &str = "moe_experts";
    let [tokens, hidden] = x.shape();
    let experts = router_logits.shape()[1];
    let [down_rows, inter] = weights.down_proj.shape();
    kind(OP, "gate_up_proj", &weights.gate_up_proj, Kind::Matrix)?;
    kind(OP, "down_proj", &weights.down_proj, Kind::Matrix)?;
    let rows = |n: usize| experts.saturating_mul(n);
    let gate_up = rows(inter.saturating_mul(2));
    same(OP, "router_logits", router_logits.shape(), [tokens, experts])?;
    same(OP, "gate_up_proj", weights.gate_up_proj.shape(), [gate_up, hidden])?;
    same(OP, "down_proj", [down_rows, inter], [rows(hidden), inter.max(1)])?;
    room(OP, out, tokens, hidden)?;
    if (1..=experts).contains(&top_k) {
        return Ok(inter);
    }
    Err(Error::Batch { what: "top_k", got: top_k, allowed: format!("1 to {experts} is allowed") })
}

/// Operands of [`output_rows`](crate::Backend::output_rows) for `tokens` staged tokens, of which
/// `outputs` get logits.
pub fn output_rows<T: Shaped>(x: &T, tokens: usize, outputs: usize, out: &T) -> Result<()> {
    let cols = x.shape()[1];
    same("output_rows", "x", x.shape(), [tokens, cols])?;
    room("output_rows", out, outputs, cols)
}

/// Slot and positions of [`read_state`](crate::Backend::read_state) and of what writes states.
///
/// # Errors
/// [`Error::Batch`], or [`Error::Context`] for positions beyond the context.
pub fn state(limits: &Limits, slot: usize, positions: &Range<usize>) -> Result<()> {
    let &Limits { slots, context, .. } = limits;
    if slot >= slots {
        let allowed = format!("but there are {slots} slots");
        return Err(Error::Batch { what: "slot", got: slot, allowed });
    }
    if positions.end > context {
        return Err(Error::Context { needed: positions.end, allocated: context });
    }
    if positions.start > positions.end {
        let allowed = format!("but it must not be after the end, {}", positions.end);
        return Err(Error::Batch { what: "first position", got: positions.start, allowed });
    }
    Ok(())
}

/// Columns of [`read`](crate::Backend::read).
pub fn read<T: Shaped>(src: &Cols<'_, T>) -> Result<()> {
    within("read", "src", src.tensor, src.tensor.shape()[0], &src.cols)
}

/// Pieces of [`upload`](crate::Backend::upload): whole rows that together are the parameter.
/// Returns its rows and columns.
pub fn upload(param: &Param) -> Result<[usize; 2]> {
    let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let (whole, cols) = (elements(&param.shape), param.shape.last().copied().unwrap_or(1));
    let parts = param.parts.iter().map(|part| elements(part.shape()));
    let split = |n: usize| n.checked_rem(cols).is_some_and(|rest| rest != 0);
    let held = parts.clone().try_fold(0usize, |sum, n| sum.checked_add(n?));
    if whole.is_some() && held == whole && !parts.flatten().any(split) {
        return Ok(param.matrix_shape());
    }
    let rows = whole.map_or(usize::MAX, |n| n.checked_div(cols).unwrap_or(0));
    let got = [held.map_or(usize::MAX, |n| n.checked_div(cols).unwrap_or(n)), cols];
    Err(Error::Shape { op: "upload", what: "parts", expected: [rows, cols], got })
}

/// Values given to [`write`](crate::Backend::write) for a tensor of `cols` columns. Returns rows.
pub fn write(len: usize, cols: usize, capacity: usize) -> Result<usize> {
    let rows = len.checked_div(cols).unwrap_or(0);
    if rows * cols == len && rows <= capacity {
        return Ok(rows);
    }
    let expected = [capacity, cols];
    Err(Error::Shape { op: "write", what: "src", expected, got: [len.div_ceil(cols.max(1)), cols] })
}
