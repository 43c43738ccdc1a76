//! Activations of transformers for small configurations, under `golden/`.

use std::path::{Path, PathBuf};

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Error, Result};
use safetensors::{Dtype, SafeTensors};

/// The configurations there are, by folder name.
pub const NAMES: [&str; 7] = [
    "odd-shapes",
    "paper-block",
    "pure-attention",
    "pure-mamba",
    "reasoning-dense",
    "sharded-bf16",
    "top1-every-layer",
];

/// One configuration: a model folder, tokens, and what transformers computes for them.
pub struct Golden {
    /// The model folder.
    pub folder: PathBuf,
    /// Run as one prompt.
    pub input_ids: Vec<u32>,
    /// Run one at a time after it.
    pub decode_ids: Vec<u32>,
    /// The activations, named as [`Recording`] names them.
    pub expected: Recording,
}

/// The folder of a golden configuration: in this crate, or in `$JAMBA_GOLDEN` for tests that run on
/// another machine than they were built on, and for those that have this crate from a registry,
/// where the weights and activations (13 MB) are left out: they are in `jamba-tests/golden` of the
/// repository.
pub fn folder(name: &str) -> PathBuf {
    let all = match std::env::var_os("JAMBA_GOLDEN") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"),
    };
    all.join(name)
}

impl Golden {
    /// Loads the configuration of this name.
    ///
    /// # Panics
    /// If the file is not there ([`folder`]) or not as it should be.
    pub fn load(name: &str) -> Self {
        Self::from_folder(&folder(name))
    }

    /// Loads a folder with a model and a `golden.safetensors`.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    pub fn from_folder(folder: &Path) -> Self {
        let path = folder.join("golden.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| {
            let path = path.display();
            panic!("{path}: {e}; set JAMBA_GOLDEN to `jamba-tests/golden` of the repository")
        });
        let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
        let mut golden = Self {
            folder: folder.to_owned(),
            input_ids: Vec::new(),
            decode_ids: Vec::new(),
            expected: Recording::default(),
        };
        for (name, view) in file.iter() {
            match (name, view.dtype()) {
                ("input_ids", Dtype::I64) => golden.input_ids = ids(view.data()),
                ("decode_ids", Dtype::I64) => golden.decode_ids = ids(view.data()),
                (_, Dtype::F32) => {
                    let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                    let tensor =
                        Recorded { shape: view.shape().to_vec(), values: values.collect() };
                    golden.expected.tensors.insert(name.into(), tensor);
                }
                (_, dtype) => panic!("{name} is {dtype:?}"),
            }
        }
        golden
    }
}

/// Reads the tensors of a safetensors file that hold activations, as f32: F32, F16 and BF16.
/// Tensors of other types, such as token ids, are left out.
///
/// # Errors
/// [`Error::Io`] or [`Error::Safetensors`].
pub fn read_trace(path: &Path) -> Result<Recording> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let invalid = |e: safetensors::SafeTensorError| Error::Safetensors {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    let bytes = std::fs::read(path).map_err(io)?;
    let file = SafeTensors::deserialize(&bytes).map_err(invalid)?;
    let mut recording = Recording::default();
    for (name, view) in file.iter() {
        let data = view.data();
        let halves = |widen: fn(u16) -> f32| {
            data.as_chunks().0.iter().map(|b| widen(u16::from_le_bytes(*b))).collect()
        };
        let values = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => halves(|bits| half::f16::from_bits(bits).to_f32()),
            Dtype::BF16 => halves(|bits| half::bf16::from_bits(bits).to_f32()),
            _ => continue,
        };
        let tensor = Recorded { shape: view.shape().to_vec(), values };
        recording.tensors.insert(name.into(), tensor);
    }
    Ok(recording)
}

fn ids(bytes: &[u8]) -> Vec<u32> {
    let ids = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
    ids.map(|id| u32::try_from(id).expect("a token id")).collect()
}
