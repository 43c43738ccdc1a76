//! What each operator and each block must do: sizes, inputs, and how to run it on any backend.
//!
//! A problem is a small struct of sizes and a seed. Everything else is derived from it, so that
//! its JSON, one line, replays it:
//!
//! ```
//! use jamba_tests::problem::{AnyProblem, Problem};
//! use jamba_tests::oracle::OracleBackend;
//!
//! let problem: AnyProblem = r#"{"op":"silu_mul","rows":2,"n":5,"precision":"f32","seed":7}"#
//!     .parse()
//!     .unwrap();
//! let expected = problem.run(&OracleBackend)?;
//! assert_eq!(expected.tensors["out"].shape, [2, 5]);
//! # Ok::<(), jamba_core::Error>(())
//! ```

pub mod block;
pub mod ragged;
pub mod sequential;

pub(crate) mod bench;
mod extent;

pub use extent::Extent;

use std::fmt;
use std::str::FromStr;

use jamba_core::recording::Recording;
use jamba_core::{Backend, Result};
use proptest::strategy::{BoxedStrategy, Strategy, ValueTree};
use proptest::test_runner::{Config as ProptestConfig, RngAlgorithm, TestRng, TestRunner};
use serde::{Deserialize, Serialize};

use crate::precision::{Format, Numbers};
use crate::random::Random;
use crate::wrap::Composed;

/// One operator or block with sizes and a seed.
pub trait Problem: Clone + fmt::Debug + 'static {
    /// Sizes small and odd, and those of published models cut in one dimension, for backends
    /// that hold such numbers.
    fn strategy(numbers: &Numbers) -> BoxedStrategy<Self>;

    /// The format of its matrices; any, where it has none.
    fn format(&self) -> Format {
        Format::F32
    }

    /// What its tensors take; refuses sizes that there is no such operator of.
    ///
    /// # Errors
    /// Names the size.
    fn extent(&self) -> Result<Extent>;

    /// Everything that the operator reads, by name: activations, weights as f32, states.
    fn inputs(&self) -> Recording;

    /// Runs it on a backend. Returns everything that it writes by name, all states of all slots
    /// among it.
    ///
    /// # Errors
    /// What the backend reports.
    fn run<B: Backend>(&self, b: &B) -> Result<Recording>;
}

macro_rules! problems {
    ($($stem:ident: $variant:ident,)*) => {
        $(pub mod $stem;)*

        /// A problem of any kind. Displayed as one line of JSON, parsed from it.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "op", rename_all = "snake_case")]
        #[allow(missing_docs, reason = "each is documented where it is defined")]
        pub enum AnyProblem {
            $($variant($stem::$variant),)*
        }

        /// The names of all problems: those of the operators and blocks.
        pub const NAMES: &[&str] = &[$(stringify!($stem)),*];

        impl AnyProblem {
            /// Name of the operator or block.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => stringify!($stem),)*
                }
            }

            /// Problems of this name; `None` if there is no such operator or block.
            pub fn strategy_of(name: &str, numbers: &Numbers) -> Option<BoxedStrategy<Self>> {
                match name {
                    $(stringify!($stem) => {
                        Some($stem::$variant::strategy(numbers).prop_map(Self::$variant).boxed())
                    })*
                    _ => None,
                }
            }

            /// [`Problem::format`].
            pub fn format(&self) -> Format {
                match self {
                    $(Self::$variant(problem) => problem.format(),)*
                }
            }

            fn extent(&self) -> Result<Extent> {
                match self {
                    $(Self::$variant(problem) => problem.extent(),)*
                }
            }

            /// [`Problem::inputs`].
            pub fn inputs(&self) -> Recording {
                match self {
                    $(Self::$variant(problem) => problem.inputs(),)*
                }
            }

            /// [`Problem::run`].
            ///
            /// # Errors
            /// What the backend reports.
            pub fn run<B: Backend>(&self, b: &B) -> Result<Recording> {
                match self {
                    $(Self::$variant(problem) => problem.run(b),)*
                }
            }
        }
    };
}

problems! {
    embed: Embed,
    linear: Linear,
    rms_norm: RmsNorm,
    rms_norm_cols: RmsNormCols,
    add_assign: AddAssign,
    silu_mul: SiluMul,
    causal_conv1d: CausalConv1d,
    selective_scan: SelectiveScan,
    attention: Attention,
    moe_experts: MoeExperts,
    output_rows: OutputRows,
    mamba_mixer: MambaMixer,
    attention_block: AttentionBlock,
    mlp: Mlp,
    moe_ffn: MoeFfn,
    add_rms_norm: AddRmsNorm,
    layer: Layer,
    forward: Forward,
}

/// Those of [`NAMES`] that a backend may override: compared with their composition.
pub const BLOCKS: &[&str] =
    &["mamba_mixer", "attention_block", "mlp", "moe_ffn", "add_rms_norm", "layer", "forward"];

impl AnyProblem {
    /// [`run`](Self::run) on the operators of the backend alone, its blocks and its step composed
    /// of them.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn run_composed<B: Backend>(&self, b: &B) -> Result<Recording> {
        self.run(&Composed(b))
    }
}

/// A problem of this name at random; `None` if there is no such operator or block.
pub fn example(name: &str, numbers: &Numbers, seed: u64) -> Option<AnyProblem> {
    let strategy = AnyProblem::strategy_of(name, numbers)?;
    let mut random = Random::new(seed, name);
    let bytes: Vec<u8> = (0..32).map(|_| random.below(256) as u8).collect();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    strategy.new_tree(&mut runner).ok().map(|tree| tree.current())
}

impl fmt::Display for AnyProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for AnyProblem {
    type Err = serde_json::Error;

    /// Refuses sizes that there is no such operator of, or that no machine has the memory for.
    fn from_str(line: &str) -> std::result::Result<Self, Self::Err> {
        let problem: Self = serde_json::from_str(line)?;
        problem.check().map_err(serde::de::Error::custom)?;
        Ok(problem)
    }
}

impl AnyProblem {
    /// Refuses sizes that there is no such operator of, and more than 2^27 elements of all tensors
    /// together, which take a gibibyte in f64.
    pub(crate) fn check(&self) -> Result<()> {
        self.extent()?.check()
    }
}
