//! What any backend of [`jamba_core`] is held to.
//!
//! ```ignore
//! // tests/conformance.rs of a backend
//! jamba_tests::conformance!(MyBackend::new());
//! ```
//!
//! expands to one test per case: every operator and block as a [problem] against an
//! [oracle](oracle::OracleBackend) in f64, every [law](laws) that needs none, every fused block
//! against its composition, operands that [do not fit](misfit), every model of [`lockstep`] layer by layer, and transformers'
//! [golden] activations. What passes is said by one table, [`tolerance`]. How to write a backend
//! and read a failure is told in `docs/adding-a-backend.md`.

/// Compiles the code of the docs that is not part of the backend they write.
#[cfg(doctest)]
#[doc = include_str!("../../docs/adding-a-backend.md")]
struct Docs;

pub mod compare;
pub mod conformance;
pub mod golden;
pub mod laws;
pub mod lockstep;
pub mod misfit;
pub mod mutant;
pub mod oracle;
pub mod precision;
pub mod problem;
pub mod tolerance;

mod random;
mod wrap;

#[doc(hidden)]
pub use jamba_core::Result as __Result;

pub use conformance::{Case, Failure, Passed, Support, cases};
pub use precision::{Format, Numbers, Precision};
