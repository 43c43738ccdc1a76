//! The backend against the reference. One trial per operator, model and precision; on a machine
//! without a card, or without NVRTC, those that need it are listed as ignored, and why is said.
//!
//! `JAMBA_ROOT` is the root of the project where that is not where it was built.

mod faults;
mod kernels;
mod models;
mod operators;
mod support;

use std::process::ExitCode;

use jamba_cuda::{KernelCache, Precision};
use libtest_mimic::{Arguments, Trial};

use crate::support::{cache, open};

fn main() -> ExitCode {
    if std::env::var_os(faults::TRAP).is_some() {
        return match faults::after_a_trap() {
            Ok(()) => ExitCode::SUCCESS,
            Err(failed) => {
                println!("{failed:?}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments::from_args();
    let (mut trials, missing) = match (open(Precision::F32), open(Precision::Bf16)) {
        (Ok(f32), Ok(bf16)) => {
            println!("{f32:?} and {bf16:?}");
            let backends = [f32, bf16].map(|b| &*Box::leak(Box::new(b)));
            let trials = backends.into_iter().flat_map(|b| {
                [operators::trials(Some(b)), models::trials(Some(b))].into_iter().flatten()
            });
            (trials.chain(faults::trials(true)).collect::<Vec<_>>(), None)
        }
        (f32, bf16) => {
            let reason = [f32.err(), bf16.err()].into_iter().flatten().next();
            let trials = [operators::trials(None), models::trials(None), faults::trials(false)];
            (trials.into_iter().flatten().collect(), reason)
        }
    };
    if let Some(reason) = missing {
        println!("not run: no CUDA device: {reason}");
        trials = trials.into_iter().map(|t: Trial| t.with_ignored_flag(true)).collect();
    }
    trials.extend(kernels::trials());
    trials.extend(faults::anywhere());
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let KernelCache::Folder(folder) = cache() {
        let _ = std::fs::remove_dir_all(folder);
    }
    conclusion.exit_code()
}
