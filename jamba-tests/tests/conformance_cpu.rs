//! The CPU backend on every instruction set, with weights as they are stored and in every other
//! format: `avx512::problem::selective_scan`, `avx512::int8::problem::linear` and the like.

use jamba_cpu::CpuBackend;
use jamba_tests::{Format, Support, cases};
use libtest_mimic::{Arguments, Failed, Trial};

/// Best first, as [`CpuBackend::all`] has them.
const ISAS: [&str; 3] = ["avx512", "avx2", "portable"];

/// Problems of a case in a format that quantises: what does not touch weights is the same code as
/// in all problems of the stored ones.
const CASES_QUANTISED: u32 = 48;

fn main() {
    let mut trials = Vec::new();
    for isa in ISAS {
        let stored = CpuBackend::all().into_iter().find(|b| b.isa() == isa);
        for format in [None].into_iter().chain(Format::QUANTISED.map(Some)) {
            let (name, backend, support) = match format {
                None => (isa.to_owned(), stored, Support::default()),
                Some(format) => (
                    format!("{isa}::{format}"),
                    stored.map(|backend| backend.with_format(format.weight_format())),
                    Support::default().weights(&[format]).cases(CASES_QUANTISED),
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
