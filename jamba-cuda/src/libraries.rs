//! Whether the libraries of CUDA are on this machine, asked before any of them is called.
#![allow(unsafe_code, reason = "loading a library runs its initialisers")]

use crate::error::{Error, Result};

const DRIVER: &str = "install the NVIDIA driver of the card, or start the container with the \
                      card (docker run --gpus all)";
const NVRTC: &str = "install it with `pip install nvidia-cuda-nvrtc` or as the package \
                     cuda-nvrtc of the CUDA repository, and put its folder into LD_LIBRARY_PATH";
const CUBLAS: &str = "install it with `pip install nvidia-cublas` or as the package libcublas \
                      of the CUDA repository, and put its folder into LD_LIBRARY_PATH";

/// The driver, `libcuda`.
pub(crate) fn driver() -> Result<()> {
    // SAFETY: loads the driver, whose initialisers ask nothing of the caller.
    let present = unsafe { cudarc::driver::sys::is_culib_present() };
    require(present, "the CUDA driver", "cuda", DRIVER)
}

/// The compiler, `libnvrtc`.
pub(crate) fn nvrtc() -> Result<()> {
    // SAFETY: loads NVRTC, whose initialisers ask nothing of the caller.
    let present = unsafe { cudarc::nvrtc::sys::is_culib_present() };
    require(present, "NVRTC, which compiles the kernels for the card,", "nvrtc", NVRTC)
}

/// Matrix products, `libcublasLt`.
pub(crate) fn cublaslt() -> Result<()> {
    // SAFETY: loads cuBLASLt, whose initialisers ask nothing of the caller.
    let present = unsafe { cudarc::cublaslt::sys::is_culib_present() };
    require(present, "cuBLASLt, which computes large matrix products,", "cublasLt", CUBLAS)
}

fn require(present: bool, what: &'static str, name: &str, remedy: &'static str) -> Result<()> {
    if present {
        return Ok(());
    }
    let search_path = std::env::var("LD_LIBRARY_PATH").unwrap_or_else(|_| "not set".into());
    // The others are of other systems.
    let mut names = cudarc::get_lib_name_candidates(name);
    names.retain(|name| !name.contains("64"));
    names.dedup();
    Err(Error::Missing { what, names, search_path, remedy })
}
