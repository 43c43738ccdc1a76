//! The CPU backend on every instruction set, with weights as they are stored and in every other
//! format: `avx512::problem::selective_scan`, `avx512::int8::problem::linear` and the like.

use jamba_cpu::CpuBackend;
use jamba_tests::{Format, Precision, Support, cases};
use libtest_mimic::{Arguments, Failed, Trial};

/// Instruction sets, best first as [`CpuBackend::all`] has them.
const ISAS: [&str; 5] = ["amx", "avx512bf16", "avx512", "avx2", "portable"];

/// Those with products of bf16.
const WITH_BF16: [&str; 2] = ["amx", "avx512bf16"];

/// Problems of a case on another instruction set than the best, and in a format that quantises: most
/// of the code is that of all problems with stored weights on the best.
const CASES_OTHERS: u32 = 64;
const CASES_QUANTISED: u32 = 16;

fn main() {
    let mut trials = Vec::new();
    let best = CpuBackend::all()[0].isa();
    for isa in ISAS {
        let native =
            if WITH_BF16.contains(&isa) { Precision::Bf16Products } else { Precision::F32 };
        trials.extend(trials_of(isa, native, None, |_| true));
        for format in Format::QUANTISED {
            // Integers on every instruction set, and products of f32 with what they stand for.
            trials.extend(trials_of(isa, Precision::Bf16Products, Some(format), |case| {
                isa == best || case.starts_with("problem::")
            }));
            trials.extend(trials_of(isa, Precision::F32, Some(format), |case| {
                case.starts_with("problem::")
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The cases of one backend: `ISA::CASE`, `ISA::FORMAT::CASE`, or `ISA::FORMAT-f32::CASE`.
fn trials_of(
    isa: &str,
    precision: Precision,
    format: Option<Format>,
    wanted: impl Fn(&str) -> bool,
) -> Vec<Trial> {
    let backend = CpuBackend::all().into_iter().find(|b| b.isa() == isa);
    let mut backend = backend.map(|b| {
        b.with_precision(match precision {
            Precision::F32 => jamba_core::Precision::F32,
            _ => jamba_core::Precision::Bf16,
        })
    });
    let mut support = Support::default().precision(precision);
    if isa != CpuBackend::all()[0].isa() {
        support = support.cases(CASES_OTHERS);
    }
    let mut name = isa.to_owned();
    if let Some(format) = format {
        backend = backend.map(|b| b.with_format(format.weight_format()));
        support = support.weights(&[format]).cases(CASES_QUANTISED);
        let suffix = if precision == Precision::F32 { "-f32" } else { "" };
        name = format!("{isa}::{format}{suffix}");
    }
    let trial = |case: jamba_tests::Case| {
        let (backend, support) = (backend.clone(), support.clone());
        let is_missing = backend.is_none();
        let trial = Trial::test(format!("{name}::{case}"), move || {
            let backend = backend.ok_or("this machine does not have the instruction set")?;
            case.check(backend, &support).map_err(Failed::from)?;
            Ok(())
        });
        // Shown as ignored, never as passed, where it cannot run.
        trial.with_ignored_flag(is_missing)
    };
    cases().into_iter().filter(|case| wanted(&case.to_string())).map(trial).collect()
}
