//! What can go wrong on a CUDA device.

use crate::plan::Plan;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that the CUDA backend reports by itself. Where a method of
/// [`Backend`](jamba_core::Backend) fails, it is the source of a [`jamba_core::Error::Device`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library of CUDA is not on this machine.
    #[error(
        "{what} was not found: none of {} could be loaded \
         (LD_LIBRARY_PATH is {search_path}); {remedy}",
        .names.join(", ")
    )]
    Missing {
        /// What it is.
        what: &'static str,
        /// File names that were tried.
        names: Vec<String>,
        /// `LD_LIBRARY_PATH`, which is searched before the system's folders.
        search_path: String,
        /// How to get it.
        remedy: &'static str,
    },
    /// No device of this number.
    #[error("there is no CUDA device {ordinal}: {}", match .count {
        0 => "the driver sees none (is one passed to this container, \
              is CUDA_VISIBLE_DEVICES empty?)".to_string(),
        n => format!("the driver sees {n}, numbered from 0"),
    })]
    NoDevice {
        /// Number asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// The card cannot run this backend, or NVRTC cannot compile for it.
    #[error("the card ({card}, {arch}) cannot be used: {reason}")]
    Architecture {
        /// Name of the card.
        card: String,
        /// Its architecture, `sm_90` for example.
        arch: String,
        /// What is needed.
        reason: String,
    },
    /// The driver refused or a kernel failed. After a failed kernel every call of the process on
    /// this device reports the same error: only a new process can use it again.
    #[error("{what}: {name} ({code}): {text}")]
    Driver {
        /// What was being done.
        what: &'static str,
        /// Number of the error.
        code: u32,
        /// Its name in the CUDA driver API.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// cuBLASLt refused.
    #[error("cuBLASLt: {what}: {status}")]
    CublasLt {
        /// What was being done.
        what: String,
        /// Its status.
        status: String,
    },
    /// A kernel did not compile.
    #[error("NVRTC: {stem}.cu for {arch}: {status}\n{log}")]
    Compile {
        /// File name of the kernel without its ending.
        stem: &'static str,
        /// Architecture compiled for.
        arch: String,
        /// Status of NVRTC.
        status: String,
        /// Its messages.
        log: String,
    },
    /// An allocation did not fit.
    #[error(
        "out of device memory: {bytes} bytes were asked for, {free} of {total} are free \
         (CudaBackend::plan tells beforehand what a model needs)"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free now.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A model with these limits does not fit on the device.
    #[error("it does not fit on the device: {0}")]
    DoesNotFit(Box<Plan>),
    /// A copy would leave the memory that was allocated.
    #[error("bytes {} to {} lie beyond an allocation of {allocated}", range.start, range.end)]
    Range {
        /// Bytes to be copied.
        range: std::ops::Range<usize>,
        /// Bytes there are.
        allocated: usize,
    },
    /// A size that no kernel is made for.
    #[error("{op}: {what} is {got}, but {allowed}")]
    Size {
        /// Operator.
        op: &'static str,
        /// The size.
        what: &'static str,
        /// Its value.
        got: usize,
        /// What would be accepted.
        allowed: &'static str,
    },
}

impl From<Error> for jamba_core::Error {
    fn from(error: Error) -> Self {
        Self::Device { backend: "cuda", source: Box::new(error) }
    }
}
