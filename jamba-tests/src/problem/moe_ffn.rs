//! `moe_ffn`: router and routed experts.

use jamba_core::recording::Recording;
use jamba_core::weights::FeedForward;
use jamba_core::{Backend, Result};
use proptest::strategy::{BoxedStrategy, Strategy};
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::block::{Block, LAYER, Loaded, Sizes, decisive, margin, wrong_layer};
use crate::precision::{Format, Numbers};
use crate::random::Random;

/// Sizes of [`Backend::moe_ffn`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MoeFfn(pub Block);

impl Problem for MoeFfn {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        Block::strategy(numbers, |sizes| Sizes { experts: sizes.experts.max(2), expert: [1, 0], ..sizes }).prop_map(Self).boxed()
    }

    fn format(&self) -> Format {
        self.0.weights
    }

    fn extent(&self) -> Result<Extent> {
        Extent::model(&self.0.sizes.unchecked(), &self.0.batch)
    }

    fn inputs(&self) -> Recording {
        let mut inputs = self.0.inputs(&["hidden", "normed"], "model.layers.1.feed_forward.");
        self.decide(&mut inputs);
        inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let run = |l: &mut Loaded<B>| match &l.weights.layers[LAYER].feed_forward {
            FeedForward::Moe(w) => b.moe_ffn(&l.config, w, LAYER, &mut l.scratch),
            FeedForward::Mlp(_) => wrong_layer("experts"),
        };
        self.0.run(b, &inputs, run, &["hidden", "block_out"])
    }
}

impl MoeFfn {
    /// Draws rows anew until it is beyond doubt which experts each goes to.
    fn decide(&self, inputs: &mut Recording) {
        let Block { sizes, precision, seed, .. } = &self.0;
        let router = inputs.tensors["model.layers.1.feed_forward.router.weight"].values.clone();
        let normed = inputs.tensors.get_mut("normed").expect("an input");
        let mut random = Random::new((*seed).into(), "decide");
        for row in normed.values.chunks_exact_mut(sizes.hidden) {
            let undecided = |row: &[f32]| {
                let product = |w: &[f32]| row.iter().zip(w).map(|(x, w)| x * w).sum();
                let logits: Vec<f32> = router.chunks_exact(sizes.hidden).map(product).collect();
                margin(&logits, sizes.top_k) < decisive(*precision)
            };
            while undecided(row) {
                row.iter_mut().for_each(|v| *v = precision.round(random.normal()));
            }
        }
    }
}
