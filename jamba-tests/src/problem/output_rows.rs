//! `output_rows`: the rows whose logits are asked for.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench::{self, Draw};
use super::block::Sizes;
use super::ragged::{Ragged, ragged};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::output_rows`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct OutputRows {
    pub cols: usize,
    pub batch: Ragged,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for OutputRows {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let cols = prop_oneof![6 => bench::width(70), 1 => Just(4096usize)];
        (cols, ragged(30), any::<u32>())
            .prop_map(move |(cols, batch, seed)| Self { cols, batch, precision, seed })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        let sizes = Sizes { hidden: self.cols, ..Sizes::small() };
        Extent::of(&[&[self.cols]]).states(&sizes.unchecked(), &self.batch, self.cols)
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        draw.activations("x", [self.batch.tokens(), self.cols], |r| r.normal());
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let x = bench::tensor(b, &inputs.tensors["x"])?;
        let sizes = Sizes { hidden: self.cols, ..Sizes::small() };
        let mut state = b.new_state(&sizes.config(), &bench::limits(&self.batch))?;
        b.stage(&mut state, &self.batch.batch(&vec![0; self.batch.tokens()]))?;
        let mut out = bench::output(b, self.batch.tokens(), self.cols)?;
        b.output_rows(&x, &state, &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
