//! `selective_scan`: the state space model, going on from its state.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, Cols, Config, Result, Role, SelectiveScan as Args};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::Extent;
use super::bench::{self, Draw, gather, tensor};
use super::block::{LAYER, Sizes};
use super::ragged::{Feed, Ragged, ragged};
use super::sequential::{self, Sequential};
use crate::precision::{Numbers, Precision};

/// Sizes of [`Backend::selective_scan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct SelectiveScan {
    pub d_inner: usize,
    pub d_state: usize,
    /// Columns before B in the tensor `[dt | B | C]` that B and C are columns of.
    pub dt_rank: usize,
    pub batch: Ragged,
    pub precision: Precision,
    pub seed: u32,
}

impl SelectiveScan {
    fn sizes(&self) -> Sizes {
        let (hidden, d_state) = (self.d_inner, self.d_state);
        Sizes { hidden, expand: 1, d_state, dt_rank: self.dt_rank, ..Sizes::small() }
    }
}

impl Problem for SelectiveScan {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let d_state = prop_oneof![3 => Just(16usize), 1 => Just(8usize), 2 => 1..=19usize];
        let sizes = prop_oneof![
            6 => (bench::width(100), d_state, 1..=9usize, ragged(40)),
            // The published models, cut in tokens.
            1 => (prop::sample::select(vec![5120usize, 8192]), Just(16usize), Just(160usize), ragged(7)),
        ];
        (sizes, any::<u32>())
            .prop_map(move |((d_inner, d_state, dt_rank, batch), seed)| {
                Self { d_inner, d_state, dt_rank, batch, precision, seed }
            })
            .boxed()
    }

    fn extent(&self) -> Result<Extent> {
        let wide = Extent::of(&[&[5, self.d_inner], &[self.dt_rank], &[self.d_inner, self.d_state]]);
        wide.check()?;
        let cols = 5 * self.d_inner + self.dt_rank + 2 * self.d_state;
        wide.states(&self.sizes().unchecked(), &self.batch, cols)
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        let (tokens, d_inner, d_state) = (self.batch.tokens(), self.d_inner, self.d_state);
        draw.activations("x", [tokens, d_inner], |r| r.normal());
        // With the bias about the bend of softplus, some past 20 where it is the identity.
        draw.activations("dt", [tokens, d_inner], |r| match r.below(24) {
            0 => r.between(20.0, 26.0),
            1 => r.between(-20.0, -8.0),
            _ => 1.5 * r.normal(),
        });
        draw.activations("x_dbl", [tokens, self.dt_rank + 2 * d_state], |r| r.normal());
        draw.activations("xz", [tokens, 2 * d_inner], |r| 1.5 * r.normal());
        draw.exact("a", &[d_inner, d_state], |r, _| -r.between(1.0, 16.0));
        draw.exact("d", &[d_inner], |r, _| 1.0 + 0.1 * r.normal());
        draw.exact("dt_bias", &[d_inner], |r, _| r.between(-5.0, 1.0));
        draw.states(&self.config(), &self.batch);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        sequential::run(self, b)
    }
}

impl Sequential for SelectiveScan {
    type Held<B: Backend> = [B::Weight; 3];

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
        let x = inputs.tensors.get_mut("x").expect("an input");
        x.values[row * self.d_inner..][..self.d_inner].iter_mut().for_each(|v| *v += 1.0);
    }

    fn hold<B: Backend>(&self, b: &B, inputs: &Recording) -> Result<Self::Held<B>> {
        Ok([
            bench::vector(b, Role::A, inputs, "a")?,
            bench::vector(b, Role::Vector, inputs, "d")?,
            bench::vector(b, Role::Vector, inputs, "dt_bias")?,
        ])
    }

    fn step<B: Backend>(
        &self,
        b: &B,
        [a, d, dt_bias]: &mut Self::Held<B>,
        inputs: &Recording,
        feeds: &[Feed],
        state: &mut B::State,
    ) -> Result<Recorded> {
        let tokens = sequential::stage(b, state, feeds, |_| 0)?;
        let rows = || feeds.iter().map(|f| f.rows.clone());
        let on = |name: &str| tensor(b, &gather(&inputs.tensors[name], rows()));
        let (x, dt, x_dbl, xz) = (on("x")?, on("dt")?, on("x_dbl")?, on("xz")?);
        let mut y = bench::output(b, tokens, self.d_inner)?;
        let (d_inner, d_state, dt_rank) = (self.d_inner, self.d_state, self.dt_rank);
        let args = Args {
            x: Cols { tensor: &x, cols: 0..d_inner },
            dt: Cols { tensor: &dt, cols: 0..d_inner },
            a,
            b: Cols { tensor: &x_dbl, cols: dt_rank..dt_rank + d_state },
            c: Cols { tensor: &x_dbl, cols: dt_rank + d_state..dt_rank + 2 * d_state },
            d,
            z: Cols { tensor: &xz, cols: d_inner..2 * d_inner },
            dt_bias,
        };
        b.selective_scan(args, LAYER, state, &mut y)?;
        bench::read(b, &y)
    }
}
