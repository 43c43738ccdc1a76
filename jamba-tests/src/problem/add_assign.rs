//! `add_assign`: the residual.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::add_assign`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct AddAssign {
    pub rows: usize,
    pub cols: usize,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for AddAssign {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let cols = prop_oneof![6 => bench::width(140), 1 => Just(8192usize)];
        (0..=9usize, cols, any::<u32>())
            .prop_map(move |(rows, cols, seed)| Self { rows, cols, precision, seed })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        some(&[("cols", self.cols)])?;
        Ok(Extent::of(&[&[2, self.rows, self.cols]]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        draw.activations("x", [self.rows, self.cols], |r| 3.0 * r.normal());
        draw.activations("y", [self.rows, self.cols], |r| r.normal());
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let mut x = bench::tensor(b, &inputs.tensors["x"])?;
        let y = bench::tensor(b, &inputs.tensors["y"])?;
        b.add_assign(&mut x, &y)?;
        Ok(bench::only(bench::read(b, &x)?))
    }
}
