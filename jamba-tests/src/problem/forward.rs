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
use crate::compare::{Difference, all_differences};
use crate::mutant::{Bug, Mutant};
use crate::oracle::OracleBackend;
use crate::precision::{Format, Numbers, Precision};
use crate::random::Random;
use crate::tolerance::tolerance;

/// Sizes of [`Backend::forward`]: a model of one to four layers of any kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Forward(pub Block);

impl Forward {
    /// The model with a seed for which every choice of experts is beyond doubt and rounding
    /// changes little; where there is none, with all experts chosen, and then of fewer layers.
    pub(crate) fn settled(block: Block) -> Self {
        let mut block = block;
        loop {
            let of = |seed| Self(Block { seed, ..block.clone() });
            let margin =
                |seed| smallest_margin(block.sizes.top_k, |b| of(seed).run(b).map(drop));
            let sound = |seed| of(seed).is_well_conditioned();
            if let Ok(seed) = settle(block.seed, block.precision, margin, sound) {
                return of(seed);
            }
            if block.sizes.top_k < block.sizes.experts {
                block.sizes.top_k = block.sizes.experts;
            } else if block.sizes.layers > 1 {
                block.sizes.layers -= 1;
            } else {
                return Self(block);
            }
        }
    }

    /// Whether no row of logits and no state moves by more than half of what is allowed when
    /// every activation is rounded to bf16. Deep models of random weights magnify a rounding
    /// without limit: what is left of such a draw says nothing about a backend.
    fn is_well_conditioned(&self) -> bool {
        if self.0.precision == Precision::F32 {
            return true;
        }
        let allowed = tolerance("forward", Precision::Bf16, self.0.weights);
        let rows = |mut out: Recording| {
            let logits = out.tensors.remove("logits").expect("an output");
            let cols = self.0.sizes.vocab;
            for (row, values) in logits.values.chunks_exact(cols).enumerate() {
                let values = values.to_vec();
                out.tensors.insert(format!("row.{row}"), Recorded { shape: vec![cols], values });
            }
            out
        };
        let rounding = Mutant::new(OracleBackend, Some(Bug::Bf16Activations));
        let exact = rows(self.run(&OracleBackend).expect("the oracle runs it"));
        let rounded = rows(self.run(&rounding).expect("the oracle runs it"));
        let half = |d: &Difference| {
            d.fault.is_none() && 2.0 * d.element <= allowed.element && 2.0 * d.rms <= allowed.rms
        };
        all_differences(&rounded, &exact).iter().all(half)
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
