//! CPU backends for [`jamba_core`].
//!
//! - [`ReferenceBackend`]: one obvious loop per equation in f64, to be read beside the paper and
//!   to hold other backends to.
//! - [`CpuBackend`]: rayon and SIMD, weights in their stored dtype. The one to use.

// Errors are values. Slices are indexed, after the checks of shapes; what only a defect of this crate
// could break is asserted.
#![cfg_attr(
    not(test),
    deny(
        clippy::dbg_macro,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stderr,
        clippy::print_stdout,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

mod attention;
mod backend;
mod columns;
mod conv1d;
mod elementwise;
mod linear;
mod memory;
mod moe;
mod norm;
mod operand;
mod packed;
mod probe;
pub mod reference;
mod scan;
mod simd;
mod state;
mod team;
mod tensor;
mod weight;

pub use backend::CpuBackend;
pub use probe::{Probe, probe};
pub use reference::ReferenceBackend;
pub use state::State;
pub use tensor::Tensor;
pub use weight::Weight;
