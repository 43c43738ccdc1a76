//! `rms_norm_cols`: some columns in place, the others as they were.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::rms_norm_cols`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct RmsNormCols {
    pub rows: usize,
    pub cols: usize,
    /// Columns before and after those that are normed.
    pub beside: [usize; 2],
    pub eps: f32,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for RmsNormCols {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        // dt, B and C of the published models have 160 to 512, and 16 columns.
        let cols = prop_oneof![4 => 2..=40usize, 1 => prop::sample::select(vec![160usize, 256, 512])];
        let beside = (0..=20usize, 0..=20usize).prop_map(|(a, b)| [a, b]);
        (0..=9usize, cols, beside, bench::eps(), any::<u32>())
            .prop_map(move |(rows, cols, beside, eps, seed)| {
                Self { rows, cols, beside, eps, precision, seed }
            })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        some(&[("cols", self.cols)])?;
        let [before, after] = self.beside;
        let width = before.saturating_add(self.cols).saturating_add(after);
        Ok(Extent::of(&[&[self.rows, width], &[self.cols]]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        let width = self.beside[0] + self.cols + self.beside[1];
        draw.activations("x", [self.rows, width], |r| r.normal());
        draw.norm("weight", self.cols);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let mut x = bench::tensor(b, &inputs.tensors["x"])?;
        let weight = bench::vector(b, Role::Vector, &inputs, "weight")?;
        let cols = self.beside[0]..self.beside[0] + self.cols;
        b.rms_norm_cols(&mut x, cols, &weight, self.eps)?;
        Ok(bench::only(bench::read(b, &x)?))
    }
}
