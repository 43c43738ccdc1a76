//! `rms_norm` of whole rows.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::rms_norm`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct RmsNorm {
    pub rows: usize,
    pub cols: usize,
    pub eps: f32,
    /// Magnitude of x: small ones make `eps` matter.
    pub scale: f32,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for RmsNorm {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let cols = prop_oneof![
            6 => bench::width(140),
            1 => prop::sample::select(vec![2560usize, 4096, 8192]),
        ];
        let scale = prop::sample::select(vec![1f32, 1e-3, 300.0]);
        (0..=9usize, cols, bench::eps(), scale, any::<u32>())
            .prop_map(move |(rows, cols, eps, scale, seed)| {
                Self { rows, cols, eps, scale, precision, seed }
            })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        some(&[("cols", self.cols)])?;
        Ok(Extent::of(&[&[2, self.rows, self.cols], &[self.cols]]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        draw.activations("x", [self.rows, self.cols], |r| self.scale * r.normal());
        draw.norm("weight", self.cols);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let x = bench::tensor(b, &inputs.tensors["x"])?;
        let weight = bench::vector(b, Role::Vector, &inputs, "weight")?;
        let mut out = bench::output(b, self.rows, self.cols)?;
        b.rms_norm(&x, &weight, self.eps, &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
