//! Activations of transformers for small configurations, under `golden/`.

use std::path::{Path, PathBuf};

use jamba_core::recording::{Recorded, Recording};
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

/// The folder of a golden configuration.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

impl Golden {
    /// Loads the configuration of this name.
    ///
    /// # Panics
    /// If the file is not there or not as it should be: it is part of this crate.
    pub fn load(name: &str) -> Self {
        Self::from_folder(&folder(name))
    }

    /// Loads a folder with a model and a `golden.safetensors`.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    pub fn from_folder(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("golden.safetensors")).expect("golden.safetensors");
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

fn ids(bytes: &[u8]) -> Vec<u32> {
    let ids = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
    ids.map(|id| u32::try_from(id).expect("a token id")).collect()
}
