//! `linear`: a matrix product, of some columns, with a weight in one or several pieces.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Cols, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Format, Numbers, Precision};

/// Sizes of [`Backend::linear`]: `(rows, k) -> (rows, n)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// Rows of x.
    pub rows: usize,
    /// Columns of x that are used.
    pub k: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of x before and after those.
    pub beside: [usize; 2],
    /// Pieces that the weight is uploaded in.
    pub pieces: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// Format of the weight.
    pub weights: Format,
    /// Precision of activations.
    pub precision: Precision,
    /// Of all values.
    pub seed: u32,
}

impl Problem for Linear {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let rows = || prop_oneof![2 => Just(1usize), 1 => Just(0usize), 5 => 2..=9usize, 1 => 63..=70usize];
        let sizes = prop_oneof![
            8 => (rows(), bench::width(300), bench::width(150)),
            // The projections of published models, cut in n, and in k.
            1 => (1..=3usize, prop::sample::select(vec![2560usize, 4096, 8192, 14336]), 3..=9usize),
            1 => (1..=3usize, 3..=9usize, prop::sample::select(vec![288usize, 2816, 4096, 6144])),
        ];
        let beside = prop_oneof![Just([0, 0]), Just([0, 7]), Just([5, 0]), Just([16, 3])];
        (sizes, beside, 1..=3usize, any::<bool>(), bench::format(numbers), any::<u32>())
            .prop_map(move |((rows, k, n), beside, pieces, bias, weights, seed)| {
                Self { rows, k, n, beside, pieces, bias, weights, precision, seed }
            })
            .boxed()
    }

    fn format(&self) -> Format {
        self.weights
    }

    fn extent(&self) -> Result<Extent> {
        some(&[("k", self.k), ("n", self.n), ("pieces", self.pieces)])?;
        let [before, after] = self.beside;
        let width = before.saturating_add(self.k).saturating_add(after);
        Ok(Extent::of(&[&[self.rows, width], &[self.rows, self.n], &[self.n, self.k], &[self.n]]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        let [before, after] = self.beside;
        draw.activations("x", [self.rows, before + self.k + after], |r| r.normal());
        if self.precision == Precision::Bf16Products && Format::QUANTISED.contains(&self.weights) {
            draw.on_int8_grid("x", before, self.k);
        }
        draw.matrix(Role::Linear, "weight", &[self.n, self.k], self.weights);
        if self.bias {
            draw.exact("bias", &[self.n], |r, _| r.normal());
        }
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let x = bench::tensor(b, &inputs.tensors["x"])?;
        let weight = bench::matrix(b, Role::Linear, &inputs, "weight", self.weights, self.pieces)?;
        let bias = match self.bias {
            true => Some(bench::vector(b, Role::Vector, &inputs, "bias")?),
            false => None,
        };
        let mut out = bench::output(b, self.rows, self.n)?;
        let cols = self.beside[0]..self.beside[0] + self.k;
        b.linear(Cols { tensor: &x, cols }, &weight, bias.as_ref(), &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
