//! `attention_block`: q, k and v, attention, o_proj.

use jamba_core::recording::Recording;
use jamba_core::weights::Mixer;
use jamba_core::{Backend, Result};
use proptest::strategy::{BoxedStrategy, Strategy};
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::block::{Block, LAYER, Loaded, Sizes, wrong_layer};
use crate::precision::{Format, Numbers};

/// Sizes of [`Backend::attention_block`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AttentionBlock(pub Block);

impl Problem for AttentionBlock {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        Block::strategy(numbers, |sizes| Sizes { attn: [1, 0], experts: 0, top_k: 1, inter: 3, ..sizes }).prop_map(Self).boxed()
    }

    fn format(&self) -> Format {
        self.0.weights
    }

    fn extent(&self) -> Result<Extent> {
        Extent::model(&self.0.sizes.unchecked(), &self.0.batch)
    }

    fn inputs(&self) -> Recording {
        self.0.inputs(&["hidden", "normed"], "model.layers.1.self_attn.")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let run = |l: &mut Loaded<B>| match &l.weights.layers[LAYER].mixer {
            Mixer::Attention(w) => {
                b.attention_block(&l.config, w, LAYER, &mut l.scratch, &mut l.state)
            }
            Mixer::Mamba(_) => wrong_layer("attention"),
        };
        self.0.run(b, &inputs, run, &["hidden", "block_out"])
    }
}
