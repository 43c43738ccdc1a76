//! `embed`: rows of a table.

use jamba_core::recording::Recording;
use jamba_core::{Backend, Limits, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench::{self, Draw};
use super::block::{Sizes, ids};
use super::ragged::{Ragged, ragged};
use crate::precision::{Format, Numbers, Precision};

/// Sizes of [`Backend::embed`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct Embed {
    pub vocab: usize,
    pub hidden: usize,
    pub batch: Ragged,
    pub weights: Format,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for Embed {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let sizes = prop_oneof![
            6 => (2..=70usize, bench::width(70)),
            // The published models, cut in the vocabulary.
            1 => (2..=9usize, prop::sample::select(vec![2560usize, 4096, 8192])),
        ];
        (sizes, ragged(30), bench::format(numbers), any::<u32>())
            .prop_map(move |((vocab, hidden), batch, weights, seed)| {
                Self { vocab, hidden, batch, weights, precision, seed }
            })
            .boxed()
    }

    fn format(&self) -> Format {
        self.weights
    }

    fn extent(&self) -> Result<Extent> {
        let sizes = Sizes { vocab: self.vocab, hidden: self.hidden, ..Sizes::small() };
        let table = Extent::of(&[&[self.vocab, self.hidden]]);
        table.check()?;
        table.states(&sizes.unchecked(), &self.batch, self.hidden)
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        draw.matrix(Role::Embedding, "table", &[self.vocab, self.hidden], self.weights);
        if !Format::QUANTISED.contains(&self.weights) {
            let table = draw.inputs.tensors.get_mut("table").expect("just drawn");
            table.values.iter_mut().for_each(|v| *v = self.precision.round(*v));
        }
        draw.exact("ids", &[self.batch.tokens()], ids(self.vocab));
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let inputs = self.inputs();
        let sizes = Sizes { vocab: self.vocab, hidden: self.hidden, ..Sizes::small() };
        let table = bench::matrix(b, Role::Embedding, &inputs, "table", self.weights, 1)?;
        let limits: Limits = bench::limits(&self.batch);
        let mut state = b.new_state(&sizes.config(), &limits)?;
        let ids: Vec<u32> = inputs.tensors["ids"].values.iter().map(|v| *v as u32).collect();
        b.stage(&mut state, &self.batch.batch(&ids))?;
        let mut out = bench::output(b, ids.len(), self.hidden)?;
        b.embed(&table, &state, &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
