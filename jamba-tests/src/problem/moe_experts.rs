//! `moe_experts`: routed experts.

use jamba_core::recording::Recording;
use jamba_core::weights::Moe;
use jamba_core::{Backend, Error, Result, Role};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::extent::{Extent, some};
use super::bench::{self, Draw};
use crate::precision::{Format, Numbers, Precision};

/// Sizes of [`Backend::moe_experts`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "sizes, named as everywhere")]
pub struct MoeExperts {
    pub rows: usize,
    pub hidden: usize,
    pub inter: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Whether every third row has equal logits throughout: the lower index is chosen.
    pub ties: bool,
    /// Pieces that the experts are uploaded in.
    pub pieces: usize,
    pub weights: Format,
    pub precision: Precision,
    pub seed: u32,
}

impl Problem for MoeExperts {
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self> {
        let precision = numbers.precision;
        let experts = (2..=9usize).prop_flat_map(|n| (Just(n), 1..=n));
        let sizes = prop_oneof![
            6 => (0..=12usize, bench::width(70), bench::width(70), experts),
            // The published models, cut in the width of an expert, and in its input.
            1 => (1..=5usize, Just(4096usize), 3..=5usize, Just((16usize, 2usize))),
            1 => (1..=5usize, 3..=5usize, Just(14336usize), Just((16usize, 2usize))),
        ];
        (sizes, any::<bool>(), 1..=3usize, bench::format(numbers), any::<u32>())
            .prop_map(move |((rows, hidden, inter, (experts, top_k)), ties, pieces, weights, seed)| {
                Self { rows, hidden, inter, experts, top_k, ties, pieces, weights, precision, seed }
            })
            .boxed()
    }

    fn format(&self) -> Format {
        self.weights
    }

    fn extent(&self) -> Result<Extent> {
        let Self { rows, hidden, inter, experts, top_k, pieces, .. } = *self;
        some(&[("hidden", hidden), ("inter", inter), ("top_k", top_k), ("pieces", pieces)])?;
        if top_k > experts {
            let allowed = "there must be as many experts";
            return Err(Error::Option { option: "top_k", value: top_k.to_string(), allowed });
        }
        let expert = Extent::of(&[&[3, experts, hidden, inter], &[rows, experts]]);
        Ok(expert.and(&[2, rows, hidden]).and(&[experts, hidden]).and(&[3, top_k, inter]))
    }

    fn inputs(&self) -> Recording {
        let mut draw = Draw::new(self.seed, self.precision);
        let Self { rows, hidden, inter, experts, .. } = *self;
        draw.activations("x", [rows, hidden], |r| r.normal());
        // In steps of a quarter, each expert its own: which are chosen is beyond doubt.
        let mut order = Vec::new();
        draw.exact("router_logits", &[rows, experts], |r, i| {
            if i % experts == 0 {
                order = r.permutation(experts);
            }
            let tied = self.ties && (i / experts) % 3 == 2;
            if tied { 0.5 } else { 0.25 * order[i % experts] as f32 - 1.0 }
        });
        draw.matrix(Role::Experts, "gate_up_proj", &[experts, 2 * inter, hidden], self.weights);
        draw.matrix(Role::Experts, "down_proj", &[experts, hidden, inter], self.weights);
        draw.inputs
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
        let mut inputs = self.inputs();
        let x = bench::tensor(b, &inputs.tensors["x"])?;
        let logits = bench::tensor(b, &inputs.tensors["router_logits"])?;
        // The router itself is not used here.
        let mut unused = Draw::new(self.seed, self.precision);
        unused.matrix(Role::Router, "router", &[self.experts, self.hidden], self.weights);
        inputs.tensors.append(&mut unused.inputs.tensors);
        let pieces = self.pieces.min(self.experts);
        let upload = |role, name, pieces| bench::matrix(b, role, &inputs, name, self.weights, pieces);
        let weights = Moe {
            router: upload(Role::Router, "router", 1)?,
            gate_up_proj: upload(Role::Experts, "gate_up_proj", pieces)?,
            down_proj: upload(Role::Experts, "down_proj", pieces)?,
        };
        let mut out = bench::output(b, self.rows, self.hidden)?;
        b.moe_experts(&x, &logits, &weights, self.top_k, &mut out)?;
        Ok(bench::only(bench::read(b, &out)?))
    }
}
