//! Weights in safetensors files, sharded or not, memory-mapped.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files::{missing, read_json, regular_file};
use crate::tensor::{Bytes, Dtype, HostTensor, Owner, Param};
use crate::weights::{ParamSpec, Source, Weights};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

const LFS_POINTER: &str = "it is a Git LFS pointer, not the file itself: run `git lfs pull`";

/// Where parameters come from.
pub trait ParamSource {
    /// The parameter that `spec` describes.
    ///
    /// # Errors
    /// Whatever keeps it from being had; the error names it.
    fn param(&self, spec: &ParamSpec) -> Result<Param>;

    /// Bytes that the parameter takes where it comes from, to tell how far a load is. Provided: those
    /// of f32.
    fn bytes(&self, spec: &ParamSpec) -> u64 {
        4 * spec.shape.iter().product::<usize>() as u64
    }

    /// Whether parameters lie in mapped files, whose pages are the system's to drop. Provided: they do
    /// not.
    fn is_mapped(&self) -> bool {
        false
    }
}

/// The tensors of a model folder.
///
/// Files are mapped, not read: opening costs the headers, and a backend that keeps parameters as
/// they are stored shares the page cache with everyone else who has the file open. On Linux tensors
/// that are not there yet come some MiB at a time, in large pages where the file system has them
/// (`MADV_HUGEPAGE`).
///
/// A file that is truncated by someone else *while it is mapped* ends the process (SIGBUS) where the
/// lost part is read: replace model files by renaming, do not write into them. A file that is too
/// short already when a tensor is [asked for](Self::tensor) is an error.
///
/// ```
/// use jamba_core::{Checkpoint, Dtype};
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let checkpoint = Checkpoint::open(folder)?;
/// let embedding = checkpoint.tensor("model.embed_tokens.weight", &[4096, 256])?;
/// assert_eq!(embedding.dtype(), Dtype::Bf16);
/// let first_row = &embedding.to_f32()[..256];
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Stored>,
}

struct Shard {
    path: PathBuf,
    file: File,
    bytes: Owner,
}

impl Shard {
    /// Refuses a file that no longer has its first `end` bytes.
    fn check_length(&self, end: usize) -> Result<()> {
        let length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        if length >= end as u64 {
            return Ok(());
        }
        let reason = format!("it was cut off at {length} bytes after it was opened");
        Err(Error::Safetensors { path: self.path.clone(), reason })
    }
}

impl Bytes for Mmap {
    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        let drop_pages = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the pages of a read-only map of a file are read from it again where they are
        // touched again.
        #[allow(unsafe_code)]
        let dropped = unsafe { self.unchecked_advise_range(drop_pages, range.start, range.len()) };
        // Advice: memory that is kept is no failure.
        drop(dropped);
    }
}

struct Stored {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or, where there is none, the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`], [`Error::Safetensors`], [`Error::Index`], [`Error::Json`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut checkpoint =
            Self { folder: folder.to_owned(), shards: Vec::new(), tensors: HashMap::new() };
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        if regular_file(&single)?.is_some() {
            checkpoint.tensors = checkpoint.map(single)?;
        } else if let Some(value) = read_json(&index)? {
            checkpoint.open_shards(&index, &value)?;
        } else {
            return Err(missing(folder, "model.safetensors or model.safetensors.index.json"));
        }
        Ok(checkpoint)
    }

    fn open_shards(&mut self, index: &Path, value: &Value) -> Result<()> {
        let wrong = |reason: String| Error::Index { path: index.to_owned(), reason };
        let weight_map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| {
            wrong("`weight_map` is not an object of tensor names and files".into())
        })?;
        let mut names_of: HashMap<&str, Vec<&str>> = HashMap::new();
        for (name, file) in weight_map {
            let file = file
                .as_str()
                .filter(|f| Path::new(f).file_name().is_some_and(|plain| plain == *f))
                .ok_or_else(|| {
                    wrong(format!("tensor `{name}` is not placed in a file of this folder"))
                })?;
            names_of.entry(file).or_default().push(name);
        }
        let mut files: Vec<_> = names_of.into_iter().collect();
        files.sort_unstable();
        for (file, names) in files {
            let path = self.folder.join(file);
            if regular_file(&path)?.is_none() {
                return Err(wrong(format!("it names the shard {file}, which is not there")));
            }
            let mut found = self.map(path)?;
            for name in names {
                let stored = found.remove(name).ok_or_else(|| {
                    wrong(format!("it places tensor `{name}` in {file}, which does not have it"))
                })?;
                self.tensors.insert(name.to_owned(), stored);
            }
        }
        Ok(())
    }

    /// Maps one file and lists its tensors.
    fn map(&mut self, path: PathBuf) -> Result<HashMap<String, Stored>> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the map is read-only and private to this process's view; that nobody truncates
        // the file while it is mapped is asked of the user in the documentation of `Checkpoint`.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            let pointer = map.starts_with(b"version https://git-lfs");
            let reason = if pointer { LFS_POINTER.into() } else { e.to_string() };
            Error::Safetensors { path: path.clone(), reason }
        })?;
        // The tensors are read each as a whole, but for single rows of the embedding: in large pages,
        // where the file system has them. Advice.
        #[cfg(target_os = "linux")]
        drop(map.advise(memmap2::Advice::HugePage));
        let data = 8 + header;
        let shard = self.shards.len();
        let stored = metadata.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let bytes = data + start..data + end;
            (name, Stored { shard, dtype: info.dtype, shape: info.shape.clone(), bytes })
        });
        let stored = stored.collect();
        self.shards.push(Shard { path, file, bytes: Arc::new(map) });
        Ok(stored)
    }

    /// Names of all tensors, in no particular order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// One tensor, which must have this shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorDtype`], or
    /// [`Error::Safetensors`] for a file that was truncated since it was opened.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let stored = self.tensors.get(name).ok_or_else(|| self.lacks(name))?;
        let shard = &self.shards[stored.shard];
        if stored.shape != shape {
            return Err(Error::TensorShape {
                name: name.into(),
                path: shard.path.clone(),
                expected: shape.to_vec(),
                got: stored.shape.clone(),
            });
        }
        let dtype = match stored.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => {
                return Err(Error::TensorDtype {
                    name: name.into(),
                    path: shard.path.clone(),
                    got: format!("{other:?}"),
                });
            }
        };
        shard.check_length(stored.bytes.end)?;
        Ok(HostTensor::view(dtype, shape.to_vec(), shard.bytes.clone(), stored.bytes.clone()))
    }

    /// Tensors that the model of this layout does not use, sorted: a sign that `config.json`
    /// describes another model than the weights.
    pub fn unused(&self, layout: &Weights<ParamSpec>) -> Vec<String> {
        let mut unused: Vec<_> = self.names().map(str::to_owned).collect();
        unused.sort_unstable();
        let mut used = std::collections::HashSet::new();
        layout.for_each(|spec| match &spec.source {
            Source::Stored(_) => drop(used.insert(spec.name.clone())),
            Source::NegExp(name) => drop(used.insert(name.clone())),
            Source::Stacked(parts) | Source::StoredOrStacked(parts) => {
                used.insert(spec.name.clone());
                used.extend(parts.iter().map(|(name, _)| name.clone()));
            }
        });
        if layout.lm_head.is_none() && self.same_bytes("lm_head.weight", &layout.embed_tokens.name)
        {
            // Some writers repeat a tied head. One that differs is not tied, whatever is said.
            used.insert("lm_head.weight".into());
        }
        unused.retain(|name| !used.contains(name));
        unused
    }

    /// Refuses tensors that the model of this layout does not use.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`].
    pub fn check_unused(&self, layout: &Weights<ParamSpec>) -> Result<()> {
        match self.unused(layout).as_slice() {
            [] => Ok(()),
            unused @ [first, ..] => Err(Error::UnusedTensors {
                path: self.folder.clone(),
                count: unused.len(),
                name: first.clone(),
            }),
        }
    }

    fn same_bytes(&self, a: &str, b: &str) -> bool {
        let bytes = |name| {
            let stored: &Stored = self.tensors.get(name)?;
            let shard = &self.shards[stored.shard];
            shard.check_length(stored.bytes.end).ok()?;
            Some((stored.dtype, &(*shard.bytes).as_ref()[stored.bytes.clone()]))
        };
        bytes(a).is_some_and(|a| Some(a) == bytes(b))
    }

    fn lacks(&self, name: &str) -> Error {
        let path = match self.shards.as_slice() {
            [one] => one.path.clone(),
            _ => self.folder.clone(),
        };
        Error::MissingTensor { name: name.into(), path }
    }
}

impl ParamSource for Checkpoint {
    fn param(&self, spec: &ParamSpec) -> Result<Param> {
        let stacked = |parts: &[(String, Vec<usize>)]| {
            parts.iter().map(|(name, shape)| self.tensor(name, shape)).collect::<Result<_>>()
        };
        let parts = match &spec.source {
            Source::Stored(shape) => vec![self.tensor(&spec.name, shape)?],
            Source::NegExp(name) => {
                let log = self.tensor(name, &spec.shape)?;
                let values = log.to_f32().iter().map(|&v| -v.exp()).collect();
                vec![HostTensor::from_f32(spec.shape.clone(), values)]
            }
            Source::Stacked(parts) => stacked(parts)?,
            Source::StoredOrStacked(_) if self.contains(&spec.name) => {
                vec![self.tensor(&spec.name, &spec.shape)?]
            }
            Source::StoredOrStacked(parts) => stacked(parts)?,
        };
        Ok(Param { name: spec.name.clone(), role: spec.role, shape: spec.shape.clone(), parts })
    }

    fn bytes(&self, spec: &ParamSpec) -> u64 {
        let stored = |name: &str| self.tensors.get(name).map_or(0, |t| t.bytes.len() as u64);
        match &spec.source {
            Source::Stored(_) => stored(&spec.name),
            Source::NegExp(name) => stored(name),
            Source::StoredOrStacked(_) if self.contains(&spec.name) => stored(&spec.name),
            Source::Stacked(parts) | Source::StoredOrStacked(parts) => {
                parts.iter().map(|(name, _)| stored(name)).sum()
            }
        }
    }

    fn is_mapped(&self) -> bool {
        true
    }
}
