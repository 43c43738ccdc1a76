//! Which shapes each operator accepts: called by backends before they touch a value.

use std::ops::Range;

use crate::backend::{CausalConv1d, Cols, SelectiveScan};
use crate::error::{Error, Result};
use crate::weights::Moe;

/// What has rows in use and columns: activations, parameters.
pub trait Shaped {
    /// `[rows, columns]`; a vector is one row.
    fn shape(&self) -> [usize; 2];
}

fn same(op: &'static str, what: &'static str, got: [usize; 2], expected: [usize; 2]) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { op, what, expected, got }) }
}

fn width(op: &'static str, what: &'static str, t: &impl Shaped, cols: usize) -> Result<()> {
    let got = t.shape();
    same(op, what, got, [got[0], cols])
}

fn vector(op: &'static str, what: &'static str, w: &impl Shaped, len: usize) -> Result<()> {
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

/// Operands of [`embed`](crate::Backend::embed).
pub fn embed(table: &impl Shaped, out: &impl Shaped) -> Result<()> {
    width("embed", "out", out, table.shape()[1])
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
    within(OP, "x", x.tensor, rows, &x.cols)?;
    same(OP, "x", [rows, x.cols.len()], [rows, k])?;
    width(OP, "out", out, n)?;
    bias.map_or(Ok(()), |bias| vector(OP, "bias", bias, n))
}

/// Operands of [`rms_norm`](crate::Backend::rms_norm).
pub fn rms_norm<T: Shaped>(x: &T, weight: &impl Shaped, out: &T) -> Result<()> {
    let cols = x.shape()[1];
    vector("rms_norm", "weight", weight, cols)?;
    width("rms_norm", "out", out, cols)
}

/// Operands of [`rms_norm_cols`](crate::Backend::rms_norm_cols).
pub fn rms_norm_cols(x: &impl Shaped, cols: &Range<usize>, weight: &impl Shaped) -> Result<()> {
    within("rms_norm_cols", "x", x, x.shape()[0], cols)?;
    vector("rms_norm_cols", "weight", weight, cols.len())
}

/// Operands of [`add_assign`](crate::Backend::add_assign).
pub fn add_assign<T: Shaped>(x: &T, y: &T) -> Result<()> {
    same("add_assign", "y", y.shape(), x.shape())
}

/// Operands of [`silu_mul`](crate::Backend::silu_mul).
pub fn silu_mul<T: Shaped>(gate_up: &T, out: &T) -> Result<()> {
    width("silu_mul", "gate_up", gate_up, 2 * out.shape()[1])
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
    same(OP, "weight", args.weight.shape(), state)?;
    within(OP, "x", args.x.tensor, tokens, &args.x.cols)?;
    same(OP, "x", [tokens, args.x.cols.len()], [tokens, d_inner])?;
    width(OP, "out", out, d_inner)?;
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
    width(OP, "y", y, d_inner)
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
    width("attention", "out", out, q_width)
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
    same(OP, "router_logits", router_logits.shape(), [tokens, experts])?;
    same(OP, "gate_up_proj", weights.gate_up_proj.shape(), [experts * 2 * inter, hidden])?;
    same(OP, "down_proj", [down_rows, inter], [experts * hidden, inter])?;
    width(OP, "out", out, hidden)?;
    if (1..=experts).contains(&top_k) {
        return Ok(inter);
    }
    Err(Error::Batch { what: "top_k", got: top_k, allowed: format!("1 to {experts} is allowed") })
}

/// Operands of [`output_rows`](crate::Backend::output_rows) for `tokens` staged tokens.
pub fn output_rows<T: Shaped>(x: &T, tokens: usize, out: &T) -> Result<()> {
    let cols = x.shape()[1];
    same("output_rows", "x", x.shape(), [tokens, cols])?;
    width("output_rows", "out", out, cols)
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
