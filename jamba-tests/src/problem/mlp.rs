//! `mlp`: the dense feed-forward.

use jamba_core::recording::Recording;
use jamba_core::weights::FeedForward;
use jamba_core::{Backend, Result};
use proptest::strategy::{BoxedStrategy, Strategy};
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::block::{Block, LAYER, Loaded, Sizes, wrong_layer};
use crate::precision::{Format, Numbers};

/// Sizes of [`Backend::mlp`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mlp(pub Block);

impl Problem for Mlp {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        Block::strategy(numbers, |sizes| Sizes { experts: 0, top_k: 1, ..sizes }).prop_map(Self).boxed()
    }

    fn format(&self) -> Format {
        self.0.weights
    }

    fn extent(&self) -> Result<Extent> {
        Extent::model(&self.0.sizes.unchecked(), &self.0.batch)
    }

    fn inputs(&self) -> Recording {
        self.0.inputs(&["hidden", "normed"], "model.layers.1.feed_forward.")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let run = |l: &mut Loaded<B>| match &l.weights.layers[LAYER].feed_forward {
            FeedForward::Mlp(w) => b.mlp(w, &mut l.scratch),
            FeedForward::Moe(_) => wrong_layer("dense MLP"),
        };
        self.0.run(b, &inputs, run, &["hidden", "block_out"])
    }
}
