//! What the examples have in common: choosing a model and a backend, failing with a message.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use jamba_core::{Error, LanguageModel, Model, Result};
use jamba_cpu::{CpuBackend, ReferenceBackend};

/// The backends that an example can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// Multi-threaded, vectorised.
    Cpu,
    /// One obvious loop per equation, in f64: slow, and what others are held to.
    Reference,
}

impl BackendName {
    /// Loads a model folder.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn load(self, folder: &Path) -> Result<Box<dyn LanguageModel>> {
        Ok(match self {
            Self::Cpu => Box::new(Model::load(folder, CpuBackend::new())?),
            Self::Reference => Box::new(Model::load(folder, ReferenceBackend)?),
        })
    }
}

/// The demo model: in `models/` of the working directory, else where this was built from.
pub fn demo_model() -> PathBuf {
    let name = Path::new("models/jamba-tales-11m");
    if name.is_dir() {
        return name.to_owned();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Runs an example: an error is printed to stderr, with exit code 2 where the input is to blame
/// and 1 where it is not.
pub fn run(main: impl FnOnce() -> Result<()>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let innocent = matches!(error, Error::Device { .. } | Error::Poisoned);
            ExitCode::from(if innocent { 1 } else { 2 })
        }
    }
}

/// Parses a list of token ids: `1,2,3`, an empty list from the empty string.
///
/// # Errors
/// Names the item that is no token id.
pub fn parse_ids(text: &str) -> std::result::Result<Vec<u32>, String> {
    let items = text.split([',', ' ']).map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| item.parse().map_err(|_| format!("`{item}` is not a token id"))).collect()
}

/// The program in the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
