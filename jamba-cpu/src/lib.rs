//! CPU backends for [`jamba_core`].
//!
//! - [`ReferenceBackend`]: one obvious loop per equation in f64, to be read beside the paper and
//!   to hold other backends to.
//! - [`CpuBackend`]: rayon and SIMD, weights in their stored dtype. The one to use.

mod attention;
mod backend;
mod conv1d;
mod elementwise;
mod linear;
mod moe;
mod norm;
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
