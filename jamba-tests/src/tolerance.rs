//! The one table of tolerances, each with its reason.
//!
//! An error is measured against the largest `|expected|` of its tensor. To pass, every element of
//! every tensor must be finite and within [`Tolerance::element`], *and* the root mean square of
//! the errors, as a share of that of the expected values, within [`Tolerance::rms`]: a mean alone
//! lets one element be badly wrong, a bound per element alone hides a drift.

use std::fmt::Write;

use crate::precision::Precision::{Bf16, Bf16Products, F32};
use crate::precision::{Format, Precision};

/// How far a tensor may be from what it is compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Largest `|got - expected|` of any element, as a share of the largest `|expected|`.
    pub element: f64,
    /// Largest root mean square of `got - expected`, as a share of that of `expected`.
    pub rms: f64,
    /// Why it is not smaller.
    pub reason: &'static str,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What is compared: operators, blocks, or comparisons of whole models.
    pub what: &'static [&'static str],
    /// Precision of the backend's activations.
    pub precision: Precision,
    /// Formats of the weights. The oracle computes from what a format makes of them: the bounds
    /// need another row only where a backend rounds activations, or sums, differently for it.
    pub formats: &'static [Format],
    /// The bounds.
    pub tolerance: Tolerance,
}

const fn row(
    what: &'static [&'static str],
    precision: Precision,
    element: f64,
    rms: f64,
    reason: &'static str,
) -> Row {
    let tolerance = Tolerance { element, rms, reason };
    Row { what, precision, formats: &Format::ALL, tolerance }
}

/// The row for some formats only.
const fn of(formats: &'static [Format], row: Row) -> Row {
    Row { formats, ..row }
}

/// Largest relative error of one rounding to bf16, which has 8 significant bits.
const U: f64 = 1.0 / 256.0;

/// The table. Bounds of f32 are twice to three times the largest error of 1500 random problems on
/// the reference, the CPU backend on every instruction set and a backend of plain f32 loops; those
/// of bf16 follow from the number of roundings, and hold with the same room for the reference with
/// every activation rounded.
pub const TABLE: &[Row] = &[
    row(&["embed", "output_rows"], F32, 0.0, 0.0, "copies"),
    row(&["add_assign"], F32, 6e-8, 6e-8, "one rounding, 2^-24"),
    row(&["silu_mul"], F32, 4e-7, 3e-7, "exp, a quotient and two products, each rounded"),
    row(
        &["rms_norm", "rms_norm_cols", "add_rms_norm"],
        F32,
        3e-6,
        2.5e-6,
        "a sum of up to 8192 squares in any order; the whole row is off by its error",
    ),
    row(&["causal_conv1d"], F32, 8e-7, 4e-7, "a sum of five products and SiLU"),
    row(
        &["linear"],
        F32,
        1e-5,
        8e-6,
        "a sum of up to 14336 products in any order, one after the other at worst",
    ),
    row(
        &["selective_scan"],
        F32,
        4e-6,
        2e-6,
        "states of up to 40 steps, each rounded; exp(dt A) where dt A is -16 and more",
    ),
    row(
        &["attention"],
        F32,
        2e-6,
        1.5e-6,
        "two sums, of head_dim and of 140 positions, and exp of the first",
    ),
    row(&["moe_experts"], F32, 1.5e-5, 1.2e-5, "two products of up to 14336 terms, as linear"),
    row(&["mlp", "moe_ffn"], F32, 2e-6, 1.5e-6, "two or three products of up to 40 terms"),
    row(&["attention_block"], F32, 8e-6, 5e-6, "two products, and softmax of scores off by one"),
    row(
        &["mamba_mixer", "layer", "lockstep", "fused"],
        F32,
        1e-5,
        6e-6,
        "the norms of dt, B and C and the exponent of the scan magnify the error of x_proj",
    ),
    row(
        &["forward", "law"],
        F32,
        6e-5,
        4e-5,
        "up to four layers of random weights, each magnifying the error of the ones before it: \
         operators and lockstep are held to more",
    ),
    row(
        &["golden"],
        F32,
        3e-5,
        1.5e-5,
        "two f32 computations of up to eight layers, each with its own order of summation: \
         transformers in f64 departs from the golden values by up to 1.2e-5, the kernels of one \
         instruction set or another by up to 2.3e-5",
    ),
    row(&["embed", "output_rows"], Bf16Products, 0.0, 0.0, "copies"),
    row(&["add_assign"], Bf16Products, 6e-8, 6e-8, "one rounding, 2^-24"),
    row(&["silu_mul"], Bf16Products, 4e-7, 3e-7, "as in f32"),
    row(&["rms_norm", "rms_norm_cols", "add_rms_norm"], Bf16Products, 3e-6, 2.5e-6, "as in f32"),
    row(&["causal_conv1d"], Bf16Products, 8e-7, 4e-7, "as in f32"),
    row(&["linear"], Bf16Products, 1e-5, 8e-6, "as in f32: operands that bf16, or 8 bits, hold"),
    row(&["selective_scan"], Bf16Products, 4e-6, 2e-6, "as in f32"),
    row(&["attention"], Bf16Products, 2e-6, 1.5e-6, "as in f32"),
    of(
        &Format::STORED,
        row(
            &["moe_experts", "mlp", "moe_ffn", "attention_block"],
            Bf16Products,
            1.5 * U,
            U,
            "what goes into the second product is rounded once, 2^-9, and sums of few terms cancel",
        ),
    ),
    of(
        &Format::STORED,
        row(
            &["mamba_mixer", "layer", "lockstep", "fused"],
            Bf16Products,
            0.05,
            0.04,
            "the norms of dt, B and C and the exponent of the scan magnify the rounding before \
             x_proj",
        ),
    ),
    of(
        &Format::STORED,
        row(
            &["forward", "law"],
            Bf16Products,
            0.1,
            0.08,
            "up to four layers, each magnifying the error of the ones before it",
        ),
    ),
    of(
        &Format::STORED,
        row(
            &["golden"],
            Bf16Products,
            0.75,
            0.3,
            "eight layers, in which a rounding may choose another expert: shows that names, order \
             and states are right, and leaves the numbers to lockstep",
        ),
    ),
    of(
        &Format::QUANTISED,
        row(
            &["moe_experts", "mlp", "moe_ffn", "attention_block"],
            Bf16Products,
            0.1,
            0.1,
            "what goes into a product is rounded to 8 bits of the largest of 32, and sums of few \
             terms cancel; linear, whose operands 8 bits hold, shows that the product is exact",
        ),
    ),
    of(
        &Format::QUANTISED,
        row(
            &["mamba_mixer", "layer", "lockstep", "fused"],
            Bf16Products,
            0.25,
            0.15,
            "as in the blocks, and the norms of dt, B and C and the exponent of the scan magnify it",
        ),
    ),
    of(
        &Format::QUANTISED,
        row(
            &["forward", "law"],
            Bf16Products,
            0.4,
            0.3,
            "up to four layers, each magnifying the error of the ones before it",
        ),
    ),
    of(
        &Format::QUANTISED,
        row(
            &["golden"],
            Bf16Products,
            1.0,
            0.5,
            "eight layers, in which a rounding may choose another expert: shows that names, order \
             and states are right, and leaves the numbers to lockstep",
        ),
    ),
    row(&["output_rows"], Bf16, 0.0, 0.0, "copies of values that bf16 holds"),
    of(&Format::STORED, row(&["embed"], Bf16, 0.0, 0.0, "copies of values that bf16 holds")),
    of(
        &Format::QUANTISED,
        row(&["embed"], Bf16, 1.5 * U, 0.9 * U, "quants times scales have up to 15 bits"),
    ),
    row(
        &[
            "linear",
            "rms_norm",
            "rms_norm_cols",
            "add_assign",
            "silu_mul",
            "causal_conv1d",
            "selective_scan",
        ],
        Bf16,
        1.5 * U,
        0.9 * U,
        "the result is rounded once, 2^-8; sums and states are f32",
    ),
    row(
        &["attention", "moe_experts", "add_rms_norm"],
        Bf16,
        3.0 * U,
        2.0 * U,
        "the result and what is between two products or sums are rounded",
    ),
    row(
        &["attention_block", "mlp", "moe_ffn"],
        Bf16,
        4.0 * U,
        2.5 * U,
        "three or four roundings one after the other",
    ),
    row(
        &["mamba_mixer", "layer", "lockstep", "fused"],
        Bf16,
        0.1,
        0.08,
        "eight roundings; the norms of dt, B and C and the exponent of the scan magnify those \
         before them",
    ),
    row(
        &["forward", "law"],
        Bf16,
        0.2,
        0.15,
        "up to four layers, each magnifying the error of the ones before it",
    ),
    row(
        &["golden"],
        Bf16,
        0.75,
        0.3,
        "eight layers, in which a rounding may choose another expert: shows that names, order \
         and states are right, and leaves the numbers to lockstep",
    ),
];

impl Row {
    fn is_of(&self, what: &str, precision: Precision, format: Format) -> bool {
        self.precision == precision && self.what.contains(&what) && self.formats.contains(&format)
    }
}

/// The tolerance of an operator, a block, or `fused`, `law`, `lockstep` or `golden`, on a backend
/// of this precision with weights in this format.
///
/// # Panics
/// If the table has no such row.
pub fn tolerance(what: &str, precision: Precision, format: Format) -> &'static Tolerance {
    let row = TABLE.iter().find(|row| row.is_of(what, precision, format));
    let row = row.unwrap_or_else(|| panic!("no tolerance of {what} in {precision}, {format}"));
    &row.tolerance
}

/// The table in Markdown.
pub fn markdown() -> String {
    let mut text = String::from(
        "| What | Activations | Weights | Element | RMS | Reason |\n|---|---|---|---|---|---|\n",
    );
    for Row { what, precision, formats, tolerance: t } in TABLE {
        let what = what.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", ");
        let weights = match formats {
            formats if **formats == Format::ALL => "any".to_owned(),
            formats if **formats == Format::STORED => "stored".to_owned(),
            formats if **formats == Format::QUANTISED => "quantised".to_owned(),
            formats => formats.iter().map(Format::to_string).collect::<Vec<_>>().join(", "),
        };
        let _ = writeln!(
            text,
            "| {what} | {precision} | {weights} | {:.1e} | {:.1e} | {} |",
            t.element, t.rms, t.reason
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::NAMES;

    #[test]
    fn every_comparison_has_one_row_in_each_precision_and_format() {
        for (precision, format) in [F32, Bf16].map(|p| Format::ALL.map(|f| (p, f))).concat() {
            for what in NAMES.iter().chain(&["fused", "law", "lockstep", "golden"]) {
                let of = |row: &&Row| row.is_of(what, precision, format);
                assert_eq!(TABLE.iter().filter(of).count(), 1, "{what}, {precision}, {format}");
            }
        }
    }

    #[test]
    fn every_row_has_a_reason_and_a_mean_below_its_bound() {
        for row in TABLE {
            assert!(!row.tolerance.reason.is_empty());
            assert!(row.tolerance.rms <= row.tolerance.element, "{row:?}");
        }
    }
}
