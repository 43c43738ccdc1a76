//! The CPU backend on every instruction set: `avx512::problem::selective_scan` and the like.

use jamba_cpu::CpuBackend;
use jamba_tests::{Support, cases};
use libtest_mimic::{Arguments, Failed, Trial};

/// Best first, as [`CpuBackend::all`] has them.
const ISAS: [&str; 3] = ["avx512", "avx2", "portable"];

fn main() {
    let mut trials = Vec::new();
    for isa in ISAS {
        let backend = CpuBackend::all().into_iter().find(|b| b.isa() == isa);
        for case in cases() {
            let trial = Trial::test(format!("{isa}::{case}"), move || {
                let backend = backend.ok_or("this machine does not have the instruction set")?;
                case.check(backend, &Support::default()).map_err(Failed::from)?;
                Ok(())
            });
            // Shown as ignored, never as passed, where it cannot run.
            trials.push(trial.with_ignored_flag(backend.is_none()));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
