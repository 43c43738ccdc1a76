//! The one entry point: what a backend must pass, case by case.

mod instance;
mod run;
mod support;

use std::fmt;
use std::str::FromStr;

use jamba_core::Backend;

use crate::golden;
use crate::laws::Law;
use crate::misfit;
use crate::problem::{BLOCKS, NAMES};

pub use instance::Instance;
pub use support::Support;

/// Something that a backend must pass: `problem::selective_scan`, `golden::odd_shapes`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// `problem`, `fused`, `shape`, `law`, `lockstep` or `golden`.
    pub group: &'static str,
    /// Name within the group.
    pub name: String,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.group, self.name)
    }
}

/// All cases, in the order of the groups.
pub fn cases() -> Vec<Case> {
    let models: Vec<String> = golden::NAMES.iter().map(|name| name.replace('-', "_")).collect();
    let lockstep = models.iter().cloned().chain(["uneven".to_owned()]).collect();
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let laws: Vec<&str> = Law::ALL.iter().map(|(name, _)| *name).collect();
    let groups: [(&'static str, Vec<String>); 6] = [
        ("problem", names(NAMES)),
        ("fused", names(BLOCKS)),
        ("shape", names(&misfit::NAMES)),
        ("law", names(&laws)),
        ("lockstep", lockstep),
        ("golden", models.clone()),
    ];
    let of = |(group, names): (&'static str, Vec<String>)| {
        names.into_iter().map(move |name| Case { group, name })
    };
    groups.into_iter().flat_map(of).collect()
}

/// How much of a case was run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Problems, runs or chunk lengths that were run and passed.
    pub executed: usize,
    /// Those that the backend refused with [`Error::Unsupported`](jamba_core::Error), as its
    /// [`Support`] declares.
    pub unsupported: usize,
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} executed, {} not supported", self.executed, self.unsupported)
    }
}

/// Why a case did not pass: every tensor that is off, and the line that replays it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(pub(crate) String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl FromStr for Case {
    type Err = Failure;

    /// One of [`cases`], as it is displayed.
    fn from_str(name: &str) -> Result<Self, Failure> {
        let found = cases().into_iter().find(|case| case.to_string() == name);
        found.ok_or_else(|| Failure(format!("there is no case `{name}`")))
    }
}

impl Case {
    /// Runs the case: what the tests of [`conformance!`](crate::conformance!) do, for test
    /// harnesses that are made at run time.
    ///
    /// A backend that is costly to make is shared by the cases as `Arc<B>`, which is a [`Backend`]
    /// as well. It may be used by as many threads as the harness runs tests in.
    ///
    /// # Errors
    /// What is wrong, in full.
    pub fn check<B: Backend + Send + Sync + 'static>(
        &self,
        backend: B,
        support: &Support,
    ) -> Result<Passed, Failure> {
        run::check(self, backend, support)
    }
}

/// What a backend passes of all cases and what it does not do, as a table.
///
/// # Errors
/// If the declaration names a case that does not exist, or the same twice.
pub fn summary(support: &Support) -> Result<String, Failure> {
    let all: Vec<String> = cases().iter().map(Case::to_string).collect();
    let mut text = String::new();
    let mut seen = Vec::new();
    for (case, reason) in support.refused() {
        if !all.iter().any(|known| known == case) {
            return Err(Failure(format!("the Support names `{case}`, which is no case")));
        }
        if seen.contains(&case) {
            return Err(Failure(format!("the Support names `{case}` twice")));
        }
        seen.push(case);
        text += &format!("not supported: {case}: {reason}\n");
    }
    for (case, reason) in support.excepted() {
        if !all.iter().any(|known| known == case) {
            return Err(Failure(format!("the Support names `{case}`, which is no case")));
        }
        text += &format!("not supported in part: {case}: {reason}\n");
    }
    let (total, refused) = (all.len(), seen.len());
    let run = total - refused;
    Ok(format!("{text}{total} cases: {run} to be run, {refused} not supported\n"))
}

/// Expands to a module `conformance` with one `#[test]` for each of [`cases`](crate::cases), and
/// one that prints the numbers run and not supported.
///
/// The first operand is an expression that makes the backend, evaluated by every test, in which `?`
/// may be used; the second, if there is one, an expression of type [`Support`](crate::Support).
/// (A `#[test]` cannot say at run time that it was not run: tests of a device that may be absent
/// are made with [`cases`](crate::cases) and a harness that can.)
#[macro_export]
macro_rules! conformance {
    ($backend:expr) => {
        $crate::conformance!($backend, $crate::Support::default());
    };
    ($backend:expr, $support:expr $(,)?) => {
        mod conformance {
            use super::*;

            fn run(name: &str) {
                let case: $crate::Case = name.parse().unwrap_or_else(|e| panic!("{e}"));
                let make = || -> $crate::__Result<_> { Ok($backend) };
                let backend = make().unwrap_or_else(|e| panic!("there is no backend: {e}"));
                match case.check(backend, &$support) {
                    Ok(passed) => println!("{case}: {passed}"),
                    Err(failure) => panic!("{failure}"),
                }
            }

            #[test]
            fn summary() {
                match $crate::conformance::summary(&$support) {
                    Ok(text) => println!("{text}"),
                    Err(failure) => panic!("{failure}"),
                }
            }

            $crate::__conformance_tests! {
                problem {
                    embed linear rms_norm rms_norm_cols add_assign silu_mul causal_conv1d
                    selective_scan attention moe_experts output_rows mamba_mixer attention_block
                    mlp moe_ffn add_rms_norm layer forward
                }
                fused { mamba_mixer attention_block mlp moe_ffn add_rms_norm layer forward }
                shape {
                    upload write read state embed linear rms_norm rms_norm_cols add_assign
                    silu_mul causal_conv1d selective_scan attention moe_experts output_rows
                }
                law {
                    chunking causality permutation independence slot_reset rerun snapshot
                    empty_runs read_positions write_positions copy_slot sequence_bytes
                }
                lockstep {
                    odd_shapes paper_block pure_attention pure_mamba reasoning_dense sharded_bf16
                    top1_every_layer uneven
                }
                golden {
                    odd_shapes paper_block pure_attention pure_mamba reasoning_dense sharded_bf16
                    top1_every_layer
                }
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_tests {
    ($($group:ident { $($name:ident)* })*) => {
        $(mod $group {
            $(#[test]
            fn $name() {
                super::run(concat!(stringify!($group), "::", stringify!($name)));
            })*
        })*

        #[test]
        fn every_case_has_a_test() {
            let tests = [$($(concat!(stringify!($group), "::", stringify!($name))),*),*];
            let cases: Vec<String> = $crate::cases().iter().map(|c| c.to_string()).collect();
            assert_eq!(tests[..], cases[..]);
        }
    };
}
