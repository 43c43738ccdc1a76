//! `attention`: grouped queries over the cache.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, Config, Result};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench::{self, Draw};
use super::block::{LAYER, Sizes};
use super::ragged::{Feed, Ragged, ragged};
use super::sequential::{self, Sequential};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::attention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub batch: Ragged,
    pub precision: Precision,
    pub seed: u32,
}

impl Attention {
    fn sizes(&self) -> Sizes {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        Sizes { heads, kv_heads, head_dim, attn: [1, 0], ..Sizes::small() }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

impl Problem for Attention {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let small = (1..=3usize, 1..=4usize, bench::width(40), ragged(70))
            .prop_map(|(kv, group, head_dim, batch)| (kv * group, kv, head_dim, batch));
        // The published models, cut in tokens.
        let published = (prop::sample::select(vec![(32usize, 8usize), (64, 8), (20, 1)]), ragged(7))
            .prop_map(|((heads, kv), batch)| (heads, kv, 128, batch));
        (prop_oneof![6 => small, 1 => published], any::<u32>())
            .prop_map(move |((heads, kv_heads, head_dim, batch), seed)| {
                Self { heads, kv_heads, head_dim, batch, precision, seed }
            })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        let heads = [self.heads, self.kv_heads].map(|heads| Extent::of(&[&[heads, self.head_dim]]));
        heads.iter().try_for_each(|width| width.check())?;
        heads[0].states(&self.sizes().unchecked(), &self.batch, self.width())
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        draw.activations("qkv", [self.batch.tokens(), self.width()], |r| 1.2 * r.normal());
        draw.states(&self.config(), &self.batch);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        sequential::run(self, b)
    }
}

impl Sequential for Attention {
    type Held<B: Backend> = ();

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
        let qkv = inputs.tensors.get_mut("qkv").expect("an input");
        let width = self.width();
        qkv.values[row * width..][..width].iter_mut().for_each(|v| *v += 1.0);
    }

    fn hold<B: Backend>(&self, _: &B, _: &Recording) -> Result<()> {
        Ok(())
    }

    fn step<B: Backend>(
        &self,
        b: &B,
        (): &mut (),
        inputs: &Recording,
        feeds: &[Feed],
        state: &mut B::State,
    ) -> Result<Recorded> {
        let tokens = sequential::stage(b, state, feeds, |_| 0)?;
        let rows = feeds.iter().map(|f| f.rows.clone());
        let qkv = bench::tensor(b, &bench::gather(&inputs.tensors["qkv"], rows))?;
        let mut out = bench::output(b, tokens, self.heads * self.head_dim)?;
        b.attention(&qkv, LAYER, state, &mut out)?;
        bench::read(b, &out)
    }
}
