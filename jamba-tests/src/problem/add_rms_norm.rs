//! `add_rms_norm`: the residual and the norm after it.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result};
use proptest::strategy::{BoxedStrategy, Strategy};
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::block::{Block, LAYER, Loaded, Sizes};
use crate::precision::{Format, Numbers};

/// Sizes of [`Backend::add_rms_norm`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AddRmsNorm(pub Block);

impl Problem for AddRmsNorm {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        Block::strategy(numbers, |sizes| Sizes { experts: 0, top_k: 1, inter: 3, ..sizes }).prop_map(Self).boxed()
    }

    fn format(&self) -> Format {
        self.0.weights
    }

    fn extent(&self) -> Result<Extent> {
        Extent::model(&self.0.sizes.unchecked(), &self.0.batch)
    }

    fn inputs(&self) -> Recording {
        self.0.inputs(&["hidden", "block_out"], "model.layers.1.pre_ff_layernorm.")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let run = |l: &mut Loaded<B>| {
            let weight = &l.weights.layers[LAYER].pre_ff_layernorm;
            b.add_rms_norm(weight, self.0.sizes.eps, &mut l.scratch)
        };
        self.0.run(b, &inputs, run, &["hidden", "normed"])
    }
}
