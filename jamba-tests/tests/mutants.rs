//! The kit bites: every bug is caught, and by which cases; a backend without one passes.

use jamba_core::Precision as Products;
use jamba_cpu::CpuBackend;
use jamba_tests::mutant::{Bug, Mutant};
use jamba_tests::{Case, Precision, Support, cases};

/// The cases that a backend with this bug fails.
fn caught_by(bug: Option<Bug>, support: &Support) -> Vec<String> {
    // Every failing run panics inside the kit, or reports; neither is news here.
    let backend = CpuBackend::new().with_precision(Products::F32);
    let fails = |case: &Case| case.check(Mutant::new(backend.clone(), bug), support).is_err();
    cases().into_iter().filter(fails).map(|case| case.to_string()).collect()
}

fn support() -> Support {
    Support::default().cases(24).shrink(0)
}

/// The bug is caught by at least these cases.
fn assert_caught(bug: Bug, expected: &[&str]) {
    let caught = caught_by(Some(bug), &support());
    println!("{bug:?} is caught by {} cases: {}", caught.len(), caught.join(" "));
    let missed: Vec<_> = expected.iter().filter(|e| !caught.iter().any(|c| c == **e)).collect();
    assert!(!caught.is_empty(), "{bug:?} is not caught");
    assert!(missed.is_empty(), "{bug:?} is not caught by {missed:?}, but by {caught:?}");
    // Nor by what it does not touch.
    assert!(!caught.iter().any(|c| c == "problem::add_assign") || bug == Bug::Bf16Activations);
}

#[test]
fn without_a_bug_everything_passes() {
    assert_eq!(caught_by(None, &support()), [""; 0]);
}

#[test]
fn bf16_activations_are_right_for_a_backend_that_claims_them() {
    let support = Support::default().precision(Precision::Bf16).cases(24).shrink(0);
    assert_eq!(caught_by(Some(Bug::Bf16Activations), &support), [""; 0]);
}

macro_rules! mutants {
    ($($test:ident: $bug:ident caught by $expected:expr;)*) => {
        $(#[test] fn $test() { assert_caught(Bug::$bug, &$expected); })*

        #[test]
        fn every_bug_is_tried() {
            let tried = [$(Bug::$bug),*];
            assert!(Bug::ALL.iter().all(|bug| tried.contains(bug)));
        }
    };
}

mutants! {
    conv_context_dropped: ConvContextDropped caught by [
        "problem::causal_conv1d", "problem::mamba_mixer", "law::chunking",
        "lockstep::pure_mamba", "golden::pure_mamba",
    ];
    scan_restarted: ScanRestarted caught by [
        "problem::selective_scan", "problem::mamba_mixer", "law::chunking",
        "lockstep::pure_mamba", "golden::pure_mamba",
    ];
    b_layernorm_skipped: BLayernormSkipped caught by [
        "problem::mamba_mixer", "problem::layer", "lockstep::pure_mamba", "golden::pure_mamba",
    ];
    x_and_z_swapped: XzSwapped caught by [
        "problem::mamba_mixer", "problem::layer", "lockstep::pure_mamba", "golden::pure_mamba",
    ];
    top_k_renormalised: TopKRenormalised caught by [
        "problem::moe_experts", "problem::moe_ffn", "lockstep::paper_block",
        "golden::top1_every_layer",
    ];
    expert_ids_swapped: ExpertIdsSwapped caught by [
        "problem::moe_experts", "problem::moe_ffn", "lockstep::paper_block",
        "golden::paper_block",
    ];
    dt_bias_outside: DtBiasOutside caught by [
        "problem::selective_scan", "problem::mamba_mixer", "lockstep::pure_mamba",
        "golden::pure_mamba",
    ];
    kv_off_by_one: KvOffByOne caught by [
        "problem::attention", "problem::attention_block", "law::chunking",
        "lockstep::pure_attention", "golden::pure_attention",
    ];
    stale_slot: StaleSlot caught by ["law::slot_reset", "golden::pure_mamba"];
    one_in_a_thousand: OneInAThousand caught by [
        "problem::linear", "lockstep::paper_block", "golden::paper_block",
    ];
    bf16_state: Bf16State caught by [
        "problem::selective_scan", "problem::mamba_mixer", "lockstep::pure_mamba",
        "golden::pure_mamba",
    ];
    bf16_activations: Bf16Activations caught by [
        "problem::linear", "problem::rms_norm", "problem::add_assign", "problem::silu_mul",
        "problem::causal_conv1d", "problem::selective_scan", "problem::attention",
        "problem::moe_experts", "problem::embed", "lockstep::uneven", "golden::odd_shapes",
    ];
    slots_shared: SlotsShared caught by [
        "problem::selective_scan", "law::independence", "law::permutation",
    ];
    wrong_output_row: WrongOutputRow caught by ["problem::output_rows", "problem::forward"];
    ring_not_turned: RingNotTurned caught by ["law::snapshot", "law::copy_slot"];
    column_unwritten: ColumnUnwritten caught by ["problem::linear", "problem::mlp"];
}
