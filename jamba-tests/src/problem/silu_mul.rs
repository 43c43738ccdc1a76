//! `silu_mul`: the product within SwiGLU.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::silu_mul`]: `(rows, 2 n) -> (rows, n)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct SiluMul {
    pub rows: usize,
    pub n: usize,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for SiluMul {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let n = prop_oneof![
            6 => bench::width(140),
            1 => prop::sample::select(vec![8192usize, 14336, 24576]),
        ];
        (0..=9usize, n, any::<u32>())
            .prop_map(move |(rows, n, seed)| Self { rows, n, precision, seed })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        some(&[("n", self.n)])?;
        Ok(Extent::of(&[&[3, self.rows, self.n], &[2, self.n]]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        // Mostly about the bend of SiLU; some where e^-x is large, or no longer counts.
        draw.activations("gate_up", [self.rows, 2 * self.n], |r| match r.below(16) {
            0 => r.between(-60.0, -10.0),
            1 => r.between(10.0, 60.0),
            _ => 2.0 * r.normal(),
        });
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let gate_up = bench::tensor(b, &inputs.tensors["gate_up"])?;
        let mut out = bench::output(b, self.rows, self.n)?;
        b.silu_mul(&gate_up, &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
