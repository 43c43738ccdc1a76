//! The models that the kit runs in lockstep: random weights in the shapes of the golden
//! configurations, and an uneven one.

use jamba_core::weights::{ParamSpec, Weights};
use jamba_core::{
    Backend, Batch, Config, Limits, Model, Outputs, ParamSource, Result, Scratch, compose,
};

use super::{Layers, Report, lockstep};
use crate::golden;
use crate::oracle::OracleBackend;
use crate::precision::{Format, Precision};
use crate::problem::block::{KitParams, Sizes, settle, smallest_margin};
use crate::random::Random;

/// A model with random weights, and what is run on it.
pub(crate) struct RandomModel {
    config: Config,
    source: KitParams,
    batches: Vec<Batch>,
}

/// The model of this name, without dashes.
pub(crate) fn named(name: &str, format: Format, precision: Precision) -> RandomModel {
    let config = match name {
        "uneven" => uneven(),
        name => Config::from_folder(golden::folder(&name.replace('_', "-"))).expect("golden"),
    };
    let model = |seed: u32| RandomModel {
        source: KitParams { seed: seed.into(), format },
        batches: batches(&config, seed.into(), precision),
        config: config.clone(),
    };
    let settled = || settle(7, precision, |seed| model(seed).margin(), |_| true);
    let seed = if config.num_experts > 1 { settled() } else { Ok(7) };
    // Layers are compared one by one: a doubtful choice is of one layer only.
    model(seed.unwrap_or_else(|least_doubtful| least_doubtful))
}

fn uneven() -> Config {
    let sizes = Sizes {
        vocab: 61,
        hidden: 37,
        inter: 19,
        layers: 6,
        heads: 6,
        kv_heads: 2,
        head_dim: 7,
        attn: [3, 1],
        expert: [2, 0],
        experts: 5,
        top_k: 2,
        d_state: 11,
        d_conv: 5,
        expand: 3,
        dt_rank: 5,
        proj_bias: true,
        ..Sizes::small()
    };
    sizes.config()
}

const LIMITS: Limits = Limits { slots: 4, context: 40, tokens: 32, outputs: 32 };

/// Prompts, a mixture of chunk, empty run and single tokens, single tokens.
fn batches(config: &Config, seed: u64, precision: Precision) -> Vec<Batch> {
    let mut random = Random::new(seed, "tokens");
    let mut ids =
        |n: usize| -> Vec<u32> { (0..n).map(|_| random.below(config.vocab_size) as u32).collect() };
    let steps: &[&[(usize, usize, usize)]] = match precision {
        Precision::F32 => &[
            &[(2, 0, 9), (0, 0, 2), (3, 0, 17)],
            &[(0, 2, 5), (1, 0, 1), (2, 9, 0), (3, 17, 1)],
            &[(1, 1, 1), (3, 18, 1), (2, 9, 1), (0, 7, 1)],
        ],
        // Fewer tokens, so that there are weights that leave no doubt about any expert.
        Precision::Bf16Products | Precision::Bf16 => {
            &[&[(2, 0, 4), (0, 0, 2)], &[(0, 2, 2), (1, 0, 1), (2, 4, 0)]]
        }
    };
    let batch = |runs: &&[(usize, usize, usize)]| {
        let mut batch = Batch::new();
        for (slot, position, len) in *runs {
            batch.push(*slot, *position, &ids(*len), Outputs::All);
        }
        batch
    };
    steps.iter().map(batch).collect()
}

impl RandomModel {
    /// The smallest margin by which the oracle chooses any expert.
    fn margin(&self) -> f32 {
        smallest_margin(self.config.num_experts_per_tok, |b| {
            let weights = Weights::layout(&self.config)
                .try_map(&mut |spec: &ParamSpec| b.upload(self.source.param(spec)?))?;
            let mut scratch = Scratch::new(b, &self.config, &LIMITS)?;
            let mut state = b.new_state(&self.config, &LIMITS)?;
            for batch in &self.batches {
                b.stage(&mut state, batch)?;
                compose::forward(b, &self.config, &weights, &mut scratch, &mut state)?;
            }
            Ok(())
        })
    }

    /// The backend against the oracle.
    pub(crate) fn run<B: Backend>(&self, backend: B) -> Result<Report> {
        let oracle = Model::new(self.config.clone(), &self.source, OracleBackend)?;
        let model = Model::new(self.config.clone(), &self.source, backend)?;
        let (mut a, mut b) = (Layers::new(oracle, LIMITS)?, Layers::new(model, LIMITS)?);
        lockstep(&mut a, &mut b, &self.batches)
    }
}
