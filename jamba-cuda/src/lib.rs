//! CUDA backend for [`jamba_core`].
//!
//! [`CudaBackend`] runs every operator on one NVIDIA card (sm_80 and later). Nothing of CUDA is
//! needed to build: driver, NVRTC and cuBLASLt are loaded when a backend is made, and what is
//! missing is an [`Error`] that says so. Kernels are CUDA C++ under `kernels/`, compiled for
//! the card at that moment, those for sizes of the model when its first runner is made, and kept on
//! disk ([`KernelCache`]).
//!
//! ```no_run
//! use jamba_core::Model;
//! use jamba_cuda::CudaBackend;
//!
//! let model = Model::load("models/jamba-reasoning-3b", CudaBackend::new(0)?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Where to read: an operator of the stem `scan` has its equation, layout and kernel in
//! `kernels/scan.cu` and its launcher in `src/ops/scan.rs`.

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

mod backend;
mod blocks;
mod cache;
mod device;
mod error;
mod kernels;
mod libraries;
mod nvrtc;
mod ops;
mod options;
mod plan;
mod probe;
mod profile;
mod prompt;
mod state;
mod step;
mod tensor;
mod trap;
mod weight;

pub use backend::CudaBackend;
pub use error::{Error, Result};
pub use kernels::{Compiled, compile};
pub use options::{CudaOptions, KernelCache, Precision};
pub use plan::Plan;
pub use probe::{Probe, memory_used};
pub use profile::{KernelTime, profile};
pub use state::State;
pub use tensor::Tensor;
pub use weight::{Weight, layout};

const _: () = {
    const fn send<T: Send>() {}
    const fn sync<T: Sync>() {}
    send::<CudaBackend>();
    sync::<CudaBackend>();
    send::<Tensor>();
    send::<Weight>();
    sync::<Weight>();
    send::<State>();
    send::<Error>();
    sync::<Error>();
};
