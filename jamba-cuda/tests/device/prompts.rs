//! Problems of the conformance kit of as many tokens as prompts have, in sizes that the kernels
//! for prompts are made for: random problems are of some ten tokens, and mostly of odd sizes.

use jamba_tests::conformance::Instance;
use jamba_tests::problem::AnyProblem;
use jamba_tests::problem::attention::Attention;
use jamba_tests::problem::attention_block::AttentionBlock;
use jamba_tests::problem::block::{Block, Sizes};
use jamba_tests::problem::causal_conv1d::CausalConv1d;
use jamba_tests::problem::forward::Forward;
use jamba_tests::problem::layer::Layer;
use jamba_tests::problem::linear::Linear;
use jamba_tests::problem::mamba_mixer::MambaMixer;
use jamba_tests::problem::mlp::Mlp;
use jamba_tests::problem::moe_experts::MoeExperts;
use jamba_tests::problem::moe_ffn::MoeFfn;
use jamba_tests::problem::ragged::{Ragged, Rows, Sequence};
use jamba_tests::problem::selective_scan::SelectiveScan;
use jamba_tests::{Format, Precision};
use libtest_mimic::Trial;

use crate::support::{PRECISIONS, of_table};

/// Every line is of a problem that there can be, and of a case.
pub(crate) fn trial() -> Trial {
    Trial::test("prompts::lines", || {
        for line in PRECISIONS
            .map(of_table)
            .map(|(p, w)| regressions(p, w))
            .iter()
            .flat_map(|text| text.lines())
        {
            line.parse::<Instance>().map_err(|error| format!("{error}: {line}"))?;
        }
        Ok(())
    })
}

fn seq(slot: usize, past: usize, len: usize, rows: Rows) -> Sequence {
    Sequence { slot, past, len, rows }
}

/// A long prompt, the end of another, a token of a third sequence and none of a fourth.
fn batch() -> Ragged {
    let seqs = vec![
        seq(2, 0, 197, Rows::Last),
        seq(0, 131, 70, Rows::All),
        seq(4, 9, 1, Rows::Last),
        seq(1, 3, 0, Rows::Last),
    ];
    Ragged { slots: 5, seqs }
}

/// The lines that the kit tries before random problems. Of experts all are chosen where a rounding
/// could choose others.
pub(crate) fn regressions(precision: Precision, weights: Format) -> String {
    let batch = batch();
    let tokens: usize = batch.seqs.iter().map(|seq| seq.len).sum();
    let even = Sizes {
        hidden: 72,
        inter: 136,
        vocab: 50,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        d_state: 16,
        d_conv: 4,
        expand: 2,
        dt_rank: 12,
        ..Sizes::small()
    };
    // 20 query heads to a key head, as in the 3B; a state of an odd number of vectors.
    let wide = Sizes {
        hidden: 136,
        inter: 72,
        heads: 20,
        kv_heads: 1,
        head_dim: 128,
        d_state: 12,
        d_conv: 3,
        expand: 1,
        dt_rank: 8,
        ..even.clone()
    };
    // No size that vectors could be made of.
    let odd = Sizes {
        hidden: 35,
        inter: 19,
        heads: 3,
        kv_heads: 3,
        head_dim: 20,
        d_state: 7,
        d_conv: 2,
        dt_rank: 5,
        ..even.clone()
    };
    let attends = |sizes: &Sizes| Sizes { attn: [1, 0], ..sizes.clone() };
    // The kit draws weights for which every choice is clear; of more experts it finds none here.
    let routes =
        |sizes: &Sizes, top_k| Sizes { expert: [1, 0], experts: 3, top_k, ..sizes.clone() };
    let block =
        |sizes: Sizes, seed| Block { sizes, batch: batch.clone(), weights, precision, seed };
    let moe = |rows, hidden, inter, experts, top_k, seed| {
        let (ties, pieces) = (true, 2);
        let sizes = MoeExperts {
            rows,
            hidden,
            inter,
            experts,
            top_k,
            ties,
            pieces,
            weights,
            precision,
            seed,
        };
        AnyProblem::MoeExperts(sizes)
    };
    // More rows than a tile of any kernel for few rows has, up to those from which on weights are
    // dequantised beforehand, and those.
    let linear = |rows, k, n, seed| {
        let (beside, pieces, bias) = ([0, 0], 2, true);
        AnyProblem::Linear(Linear { rows, k, n, beside, pieces, bias, weights, precision, seed })
    };
    let rows = Ragged { slots: 2, seqs: vec![seq(0, 0, 61, Rows::All), seq(1, 0, 36, Rows::Last)] };
    let few = |sizes: &Sizes, seed| Block { batch: rows.clone(), ..block(sizes.clone(), seed) };
    let mut problems = vec![
        linear(65, 72, 24, 1),
        linear(97, 520, 300, 2),
        linear(128, 2560, 136, 3),
        linear(192, 136, 72, 4),
        linear(193, 136, 72, 5),
        // More tiles than a card runs at a time.
        linear(130, 72, 9000, 6),
        AnyProblem::Mlp(Mlp(few(&Sizes { inter: 4600, ..even.clone() }, 3))),
        AnyProblem::Mlp(Mlp(few(&even, 4))),
        AnyProblem::Layer(Layer(few(&wide, 5))),
    ];
    for (seed, (d_inner, d_state, dt_rank)) in
        (1..).zip([(144, 16, 12), (200, 12, 8), (35, 7, 5), (72, 128, 4)])
    {
        let batch = batch.clone();
        let scan = SelectiveScan { d_inner, d_state, dt_rank, batch, precision, seed };
        problems.push(AnyProblem::SelectiveScan(scan));
    }
    for (seed, (d_inner, d_conv)) in (1..).zip([(144, 4), (136, 8), (35, 2), (24, 1)]) {
        let conv =
            CausalConv1d { d_inner, d_conv, bias: true, batch: batch.clone(), precision, seed };
        problems.push(AnyProblem::CausalConv1d(conv));
    }
    for (seed, (heads, kv_heads, head_dim)) in
        (1..).zip([(6, 2, 64), (20, 1, 128), (3, 3, 20), (4, 2, 96)])
    {
        let batch = batch.clone();
        let attention = Attention { heads, kv_heads, head_dim, batch, precision, seed };
        problems.push(AnyProblem::Attention(attention));
    }
    problems.extend([
        // Tiles of `grouped.cu` that are full and those that are not, and experts of no token; few
        // entries for each expert; sizes that are not for it.
        moe(600, 264, 136, 37, 2, 1),
        moe(300, 72, 264, 4, 3, 2),
        moe(140, 136, 72, 16, 1, 3),
        moe(200, 35, 19, 5, 2, 4),
    ]);
    for (sizes, seed) in [(&even, 1), (&wide, 2), (&odd, 3)] {
        problems.extend([
            AnyProblem::MambaMixer(MambaMixer(block(sizes.clone(), seed))),
            AnyProblem::Mlp(Mlp(block(sizes.clone(), seed))),
            AnyProblem::AttentionBlock(AttentionBlock(block(attends(sizes), seed))),
            AnyProblem::MoeFfn(MoeFfn(block(routes(sizes, 2), seed))),
            AnyProblem::Layer(Layer(block(sizes.clone(), seed))),
            AnyProblem::Layer(Layer(block(routes(&attends(sizes), 3), seed))),
            AnyProblem::Forward(Forward(block(
                Sizes { layers: 2, attn: [2, 1], ..routes(sizes, 3) },
                seed,
            ))),
        ]);
    }
    assert!(tokens >= 128, "too few tokens for the steps of prompts");
    let law = |law: &str, problem: &AnyProblem| Instance::Law {
        law: law.into(),
        plan: 1,
        problem: problem.clone(),
    };
    let forward = Forward(block(Sizes { layers: 2, attn: [2, 1], ..even.clone() }, 4));
    let forward = AnyProblem::Forward(forward);
    let laws = ["chunking", "causality", "independence", "rerun", "permutation"];
    let laws = laws.map(|name| law(name, &forward));
    let lines = problems.into_iter().map(Instance::Problem).chain(laws);
    lines.map(|line| format!("{line}\n")).collect()
}
