//! `forward`: the whole model, tokens to logits.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, Config, Result};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench;
use super::block::{Block, Loaded, Sizes, ids, settle, smallest_margin};
use super::ragged::{Feed, Ragged};
use super::sequential::{self, Sequential};
use crate::precision::{Format, Numbers};
use crate::random::Random;

/// Sizes of [`Backend::forward`]: a model of one to four layers of any kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Forward(pub Block);

impl Forward {
    /// The model with a seed for which every choice of experts is beyond doubt.
    pub(crate) fn settled(block: Block) -> Self {
        let margin = |seed| {
            let forward = Self(Block { seed, ..block.clone() });
            smallest_margin(block.sizes.top_k, |b| forward.run(b).map(drop))
        };
        Self(Block { seed: settle(block.seed, block.precision, margin), ..block })
    }

    fn id(inputs: &Recording, row: usize) -> u32 {
        inputs.tensors["ids"].values[row] as u32
    }
}

impl Problem for Forward {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let period = || (1..=3usize).prop_flat_map(|n| (Just(n), 0..n)).prop_map(|(n, at)| [n, at]);
        (Block::strategy(numbers, |sizes| sizes), 1..=4usize, period(), period())
            .prop_map(|(mut block, layers, attn, expert)| {
                block.sizes = Sizes { layers, attn, expert, ..block.sizes };
                Self::settled(block)
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
        let mut inputs = self.0.inputs(&[], "");
        let mut random = Random::new(self.0.seed.into(), "ids");
        let mut id = ids(self.0.sizes.vocab);
        let values = (0..self.0.batch.tokens()).map(|i| id(&mut random, i)).collect();
        let ids = Recorded { shape: vec![self.0.batch.tokens()], values };
        inputs.tensors.insert("ids".into(), ids);
        inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let mut l = self.0.load(b, &inputs)?;
        let ids: Vec<u32> = (0..self.0.batch.tokens()).map(|row| Self::id(&inputs, row)).collect();
        b.stage(&mut l.state, &self.0.batch.batch(&ids))?;
        b.forward(&l.config, &l.weights, &mut l.scratch, &mut l.state)?;
        let mut out = Recording::default();
        out.tensors.insert("logits".into(), bench::read(b, &l.scratch.logits)?);
        let held = bench::held_after(&self.0.batch);
        bench::read_states(b, &l.config, &l.state, held, &mut out)?;
        Ok(out)
    }
}

impl Sequential for Forward {
    type Held<B: Backend> = Loaded<B>;

    fn config(&self) -> Config {
        self.0.sizes.config()
    }

    fn ragged(&self) -> &Ragged {
        &self.0.batch
    }

    fn with_ragged(&self, batch: Ragged) -> Self {
        Self::settled(Block { batch, ..self.0.clone() })
    }

    fn alter(&self, inputs: &mut Recording, row: usize) {
        let id = &mut inputs.tensors.get_mut("ids").expect("an input").values[row];
        *id = ((*id as usize + 1) % self.0.sizes.vocab) as f32;
    }

    fn hold<B: Backend>(&self, b: &B, inputs: &Recording) -> Result<Loaded<B>> {
        self.0.load(b, inputs)
    }

    fn step<B: Backend>(
        &self,
        b: &B,
        held: &mut Loaded<B>,
        inputs: &Recording,
        feeds: &[Feed],
        state: &mut B::State,
    ) -> Result<Recorded> {
        sequential::stage(b, state, feeds, |row| Self::id(inputs, row))?;
        b.forward(&held.config, &held.weights, &mut held.scratch, state)?;
        bench::read(b, &held.scratch.logits)
    }
}
