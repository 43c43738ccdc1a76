//! The CPU backend on every instruction set, with weights as they are stored and in every other
//! format: `avx512::problem::selective_scan`, `avx512::int8::problem::linear` and the like.

use jamba_cpu::CpuBackend;
use jamba_tests::{Format, Precision, Support, cases};
use libtest_mimic::{Arguments, Failed, Trial};

/// Instruction sets, best first as [`CpuBackend::all`] has them, and precisions of products. Where
/// they are of f32, `avx512bf16` is `avx512`.
const RUNS: [(&str, Precision); 4] = [
    ("avx512bf16", Precision::Bf16Products),
    ("avx512", Precision::F32),
    ("avx2", Precision::F32),
    ("portable", Precision::F32),
];

/// Problems of a case in a format that quantises: what does not touch weights is the same code as
/// in all problems of the stored ones.
const CASES_QUANTISED: u32 = 16;

fn main() {
    let mut trials = Vec::new();
    for (isa, precision) in RUNS {
        let stored = CpuBackend::all().into_iter().find(|b| b.isa() == isa);
        let stored = stored.map(|b| match precision {
            Precision::F32 => b.with_precision(jamba_core::Precision::F32),
            _ => b.with_precision(jamba_core::Precision::Bf16),
        });
        for format in [None].into_iter().chain(Format::QUANTISED.map(Some)) {
            let support = Support::default().precision(precision);
            let (name, backend, support) = match format {
                None => (isa.to_owned(), stored, support),
                Some(format) => (
                    format!("{isa}::{format}"),
                    stored.map(|backend| backend.with_format(format.weight_format())),
                    support.weights(&[format]).cases(CASES_QUANTISED),
                ),
            };
            for case in cases() {
                let support = support.clone();
                let trial = Trial::test(format!("{name}::{case}"), move || {
                    let backend =
                        backend.ok_or("this machine does not have the instruction set")?;
                    case.check(backend, &support).map_err(Failed::from)?;
                    Ok(())
                });
                // Shown as ignored, never as passed, where it cannot run.
                trials.push(trial.with_ignored_flag(backend.is_none()));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
