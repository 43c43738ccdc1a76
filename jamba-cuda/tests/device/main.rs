//! The CUDA backend in both precisions and every format: the conformance kit, models, the engine,
//! faults. On a
//! machine without a card, or without NVRTC, the trials that need it are listed as ignored, and why
//! is said.
//!
//! `JAMBA_ROOT` is the root of the project where that is not where it was built, and
//! `JAMBA_GOLDEN` the folder of the golden models. `PROPTEST_CASES` shortens the kit;
//! `JAMBA_KERNELS` is a folder for compiled kernels that stays.

mod drawn;
mod engine;
mod faults;
mod kernels;
mod models;
mod profile;
mod prompts;
mod quantised;
mod sample;
mod step;
mod support;

use std::process::ExitCode;

use jamba_core::WeightFormat;
use jamba_cuda::{KernelCache, Precision};
use jamba_tests::conformance::summary;
use jamba_tests::{Format, cases};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::support::{KERNELS, PRECISIONS, cache, guarded_with, open, support};

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
    let mut trials = Vec::new();
    for precision in PRECISIONS {
        trials.extend(kit(precision, None, |_| true));
        for format in Format::QUANTISED {
            // In f32 they are the values that they stand for, of which all else is told above.
            let is_all = precision == Precision::Bf16;
            trials.extend(kit(precision, Some(format), |case| {
                is_all || ["problem::linear", "problem::forward"].contains(&case)
            }));
        }
        trials.extend(quantised::trials(precision));
        trials.extend(models::trials(precision));
        trials.extend(step::trials(precision));
        trials.extend(engine::trials(precision));
        trials.extend(drawn::trials(precision));
        trials.extend(sample::trials(precision));
        trials.extend(profile::trials(precision));
    }
    trials.extend(faults::trials());
    let mut alone = faults::alone();
    match PRECISIONS.map(open) {
        [Ok(f32), Ok(bf16)] => println!("{f32:?} and {bf16:?}"),
        missing => {
            let reason = missing.into_iter().find_map(Result::err);
            let reason = reason.map_or(String::new(), |reason| reason.to_string());
            println!("not run: no CUDA device: {} trials: {reason}", trials.len());
            let ignored = |trial: Trial| trial.with_ignored_flag(true);
            trials = trials.into_iter().map(ignored).collect();
            alone = alone.into_iter().map(ignored).collect();
        }
    }
    trials.extend(kernels::trials());
    trials.extend(faults::anywhere());
    trials.push(prompts::trial());
    let exit = libtest_mimic::run(&arguments, trials).exit_code();
    let exit = match libtest_mimic::run(&arguments, alone).has_failed() {
        true => ExitCode::FAILURE,
        false => exit,
    };
    if let KernelCache::Folder(folder) = cache()
        && std::env::var_os(KERNELS).is_none()
    {
        let _ = std::fs::remove_dir_all(folder);
    }
    exit
}

/// The conformance kit, each case on a backend of its own: `PRECISION::CASE`, or
/// `PRECISION::FORMAT::CASE`.
fn kit(precision: Precision, format: Option<Format>, wanted: impl Fn(&str) -> bool) -> Vec<Trial> {
    let name = format.map_or(format!("{precision:?}"), |format| format!("{precision:?}::{format}"));
    let declared = {
        let name = name.clone();
        Trial::test(format!("{name}::kit"), move || {
            println!("{name}: {}", summary(&support(precision, format))?);
            Ok(())
        })
    };
    let cases = cases().into_iter().filter(|case| wanted(&case.to_string())).map(|case| {
        let name = format!("{name}::{case}");
        Trial::test(name.clone(), move || {
            let support = support(precision, format);
            let run = |backend| case.check(backend, &support).map_err(Failed::from);
            let weights = format.map_or(WeightFormat::Stored, Format::weight_format);
            println!("{name}: {}", guarded_with(precision, weights, run)?);
            Ok(())
        })
    });
    std::iter::once(declared).chain(cases).collect()
}
