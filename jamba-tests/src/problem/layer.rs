//! `layer`: one decoder layer, `hidden -> hidden`.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result, compose};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::block::{Block, LAYER, Loaded, Sizes, settle, smallest_margin};
use crate::precision::{Format, Numbers};

/// Sizes of a layer of any kind ([`compose::layer`] on the blocks of the backend).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layer(pub Block);

impl Layer {
    fn run_inner<B: Backend>(&self, b: &B) -> Result<Recording> {
        let run = |l: &mut Loaded<B>| {
            let layer = &l.weights.layers[LAYER];
            compose::layer(b, &l.config, layer, LAYER, &mut l.scratch, &mut l.state)
        };
        self.0.run(b, &self.inputs(), run, &["hidden"])
    }
}

impl Problem for Layer {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let kinds = (any::<bool>(), any::<bool>());
        let block = Block::strategy(numbers, |sizes| sizes);
        (block, kinds)
            .prop_map(|(mut block, (attention, experts))| {
                let sizes = &mut block.sizes;
                let experts = experts && sizes.experts > 1;
                *sizes = Sizes {
                    attn: if attention { [1, 0] } else { [9, 8] },
                    expert: if experts { [1, 0] } else { [9, 8] },
                    ..sizes.clone()
                };
                let margin = |seed| {
                    let layer = Self(Block { seed, ..block.clone() });
                    smallest_margin(block.sizes.top_k, |b| layer.run_inner(b).map(drop))
                };
                match experts.then(|| settle(block.seed, block.precision, margin, |_| true)) {
                    Some(Ok(seed)) => Self(Block { seed, ..block }),
                    // No seed leaves no doubt: nothing is left to choose.
                    Some(Err(_)) => {
                        block.sizes.top_k = block.sizes.experts;
                        Self(block)
                    }
                    None => Self(block),
                }
            })
            .boxed()
    }

    fn format(&self) -> Format {
        self.0.weights
    }

    fn extent(&self) -> Result<Extent> {
        Extent::model(&self.0.sizes.unchecked(), &self.0.batch)
    }

    fn inputs(&self) -> Recording {
        self.0.inputs(&["hidden"], "model.layers.1.")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        self.run_inner(b)
    }
}
