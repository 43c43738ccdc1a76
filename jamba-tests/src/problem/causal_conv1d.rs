//! `causal_conv1d`: the convolution, going on from the latest inputs.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, CausalConv1d as Args, Cols, Config, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench::{self, Draw};
use super::block::{LAYER, Sizes};
use super::ragged::{Feed, Ragged, ragged};
use super::sequential::{self, Sequential};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::causal_conv1d`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct CausalConv1d {
    pub d_inner: usize,
    pub d_conv: usize,
    pub bias: bool,
    pub batch: Ragged,
    pub precision: Precision,
    pub seed: u32,
}

impl CausalConv1d {
    fn sizes(&self) -> Sizes {
        Sizes { hidden: self.d_inner, expand: 1, d_conv: self.d_conv, ..Sizes::small() }
    }
}

impl Problem for CausalConv1d {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let sizes = prop_oneof![
            6 => (bench::width(140), 1..=5usize, ragged(30)),
            // The published models, cut in tokens.
            1 => (prop::sample::select(vec![5120usize, 8192, 16384]), Just(4usize), ragged(7)),
        ];
        (sizes, any::<bool>(), any::<u32>())
            .prop_map(move |((d_inner, d_conv, batch), bias, seed)| {
                Self { d_inner, d_conv, bias, batch, precision, seed }
            })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        let weight = Extent::of(&[&[self.d_inner, self.d_conv], &[3, self.d_inner]]);
        weight.check()?;
        weight.states(&self.sizes().unchecked(), &self.batch, self.d_inner.saturating_mul(3))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        let (d_inner, d_conv) = (self.d_inner, self.d_conv);
        // Columns [x | z], of which z is not to be touched.
        draw.activations("xz", [self.batch.tokens(), 2 * d_inner], |r| r.normal());
        let fan_in = (d_conv as f32).sqrt().recip();
        draw.exact("weight", &[d_inner, d_conv], |r, _| fan_in * r.normal());
        if self.bias {
            draw.exact("bias", &[d_inner], |r, _| 0.5 * r.normal());
        }
        draw.states(&self.config(), &self.batch);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        sequential::run(self, b)
    }
}

impl Sequential for CausalConv1d {
    type Held<B: Backend> = (B::Weight, Option<B::Weight>);

    fn config(&self) -> Config {
        self.sizes().config()
    }

    fn ragged(&self) -> &Ragged {
        &self.batch
    }

    fn with_ragged(&self, batch: Ragged) -> Self {
        Self { batch, ..self.clone() }
    }

    fn alter(&self, inputs: &mut Recording, row: usize) {
        let x = inputs.tensors.get_mut("xz").expect("an input");
        x.values[row * 2 * self.d_inner..][..self.d_inner].iter_mut().for_each(|v| *v += 1.0);
    }

    fn hold<B: Backend>(&self, b: &B, inputs: &Recording) -> Result<Self::Held<B>> {
        let bias = match self.bias {
            true => Some(bench::vector(b, Role::Vector, inputs, "bias")?),
            false => None,
        };
        Ok((bench::vector(b, Role::Conv, inputs, "weight")?, bias))
    }

    fn step<B: Backend>(
        &self,
        b: &B,
        (weight, bias): &mut Self::Held<B>,
        inputs: &Recording,
        feeds: &[Feed],
        state: &mut B::State,
    ) -> Result<Recorded> {
        let tokens = sequential::stage(b, state, feeds, |_| 0)?;
        let rows = feeds.iter().map(|f| f.rows.clone());
        let xz = bench::tensor(b, &bench::gather(&inputs.tensors["xz"], rows))?;
        let mut out = bench::output(b, tokens, self.d_inner)?;
        let x = Cols { tensor: &xz, cols: 0..self.d_inner };
        let args = Args { x, weight, bias: bias.as_ref() };
        b.causal_conv1d(args, LAYER, state, &mut out)?;
        bench::read(b, &out)
    }
}
