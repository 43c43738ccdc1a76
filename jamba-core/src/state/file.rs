//! States in safetensors files.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, serialize_to_file};

use super::{Mark, Origin, Segment, Snapshot, Span, Value};
use crate::backend::StatePart;
use crate::error::{Error, Result};
use crate::files::regular_file;
use crate::fingerprint::{Fingerprint, Hasher};
use crate::{memory, transfer};

/// What the header's `format` says.
const FORMAT: &str = "jamba-state";
/// Of the format; another one is refused.
const VERSION: &str = "1";

/// The name of a part in a file, as [`Recording`](crate::recording::Recording) names it.
fn name(layer: usize, part: StatePart) -> String {
    let part = match part {
        StatePart::Conv => "conv",
        StatePart::Ssm => "ssm",
        StatePart::Keys => "k",
        StatePart::Values => "v",
    };
    format!("state.{layer}.{part}")
}

/// A tensor of a file.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Entry {
    fn ids(name: &str, ids: impl Iterator<Item = u32>) -> Self {
        let bytes: Vec<u8> = ids.flat_map(u32::to_le_bytes).collect();
        Self { name: name.into(), dtype: Dtype::U32, shape: vec![bytes.len() / 4], bytes }
    }

    fn values(name: String, shape: Vec<usize>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, dtype: Dtype::F32, shape, bytes }
    }
}

impl Snapshot {
    /// Writes the state to a safetensors file, F32: `tokens`, `logits`, and the parts
    /// `state.I.{conv (d_inner, d_conv - 1), ssm (d_inner, d_state), k, v (kv_heads, tokens,
    /// head_dim)}`. The header names the format, the model's fingerprint, configuration and weight
    /// format, and a checksum.
    ///
    /// The file appears whole or not at all: it is written beside its place, brought to the disk,
    /// and then renamed. A file that was there is replaced; of a link, the file that it leads to.
    ///
    /// # Errors
    /// [`Error::Io`], also for a folder, a device, or a link that leads nowhere; what was there is as
    /// before.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let entries = self.entries();
        let Value { origin, tokens, .. } = &*self.0;
        let config: serde_json::Map<_, _> =
            origin.config.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        let header = HashMap::from([
            ("format".into(), FORMAT.into()),
            ("version".into(), VERSION.into()),
            ("fingerprint".into(), origin.fingerprint.to_string()),
            ("config".into(), serde_json::Value::Object(config).to_string()),
            ("dtype".into(), "F32".into()),
            ("positions".into(), tokens.len().to_string()),
            ("checksum".into(), checksum(&entries)),
        ]);
        Replacement::write(path, |path| write(&entries, header, path))?.put()
    }

    fn entries(&self) -> Vec<Entry> {
        let Value { tokens, steps, spans, checkpoint, .. } = &*self.0;
        let steps = steps.iter().filter_map(|&step| u32::try_from(step).ok());
        let mut entries =
            vec![Entry::ids("tokens", tokens.iter().copied()), Entry::ids("steps", steps)];
        let logits = &checkpoint.logits;
        entries.push(Entry::values("logits".into(), vec![logits.len()], logits));
        for (layer, part, values) in &checkpoint.states {
            entries.push(Entry::values(name(*layer, *part), vec![values.len()], values));
        }
        if let Some(first) = spans.first() {
            let kv_heads = first.segment.kv_heads;
            for (index, (layer, part, _)) in first.segment.parts.iter().enumerate() {
                let pieces: Vec<_> =
                    spans.iter().map(|span| span.cut(index, 0..span.positions)).collect();
                let pieces: Vec<&[f32]> = pieces.iter().map(|piece| &**piece).collect();
                let values = transfer::join(&pieces, kv_heads);
                entries.push(Entry::values(name(*layer, *part), vec![values.len()], &values));
            }
        }
        for entry in &mut entries {
            let elements = entry.bytes.len() / 4;
            if let Some(shape) = self.0.origin.shape(&entry.name, tokens.len())
                && shape.iter().product::<usize>() == elements
            {
                entry.shape = shape;
            }
        }
        entries
    }

    /// Reads what [`save`](Self::save) wrote, and checks all of it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::StateFile`] for a file that is truncated, damaged, or no state,
    /// [`Error::Memory`] for one that the machine has no room for.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        regular_file(path)?;
        let damaged = |reason| Error::StateFile { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut bytes = read_header(&mut file, length).map_err(Error::io(path))?;
        check_length(&bytes, length).map_err(damaged)?;
        // Of the tensors there are their bytes and, until they are checked, their values.
        memory::check("a saved state", length.saturating_mul(3))?;
        file.take(length - bytes.len() as u64).read_to_end(&mut bytes).map_err(Error::io(path))?;
        parse(&bytes).map_err(damaged)
    }
}

/// Bytes of a header at most: that of the largest model has less than a tenth of them.
const MAX_HEADER: u64 = 16 << 20;

/// The header and the eight bytes before it that state its length; less of a file that has less.
fn read_header(file: &mut File, length: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(8).read_to_end(&mut bytes)?;
    let stated = bytes.as_chunks().0.first().map_or(0, |b| u64::from_le_bytes(*b));
    file.take(stated.min(length).min(MAX_HEADER)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether a file is as long as its header says.
fn check_length(header: &[u8], length: u64) -> Result<(), String> {
    let json = header.get(8..).unwrap_or_default();
    let metadata: Metadata = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let ends = metadata.tensors().into_values().map(|tensor| tensor.data_offsets.1 as u64);
    let expected = ends.max().unwrap_or(0).saturating_add(header.len() as u64);
    if length == expected {
        return Ok(());
    }
    Err(format!("it has {length} bytes, its header says {expected}"))
}

impl Origin {
    fn size(&self, name: &str) -> Option<usize> {
        self.config.iter().find(|(key, _)| key == name)?.1.parse().ok()
    }

    /// The shape of a part in a file of a sequence of so many tokens.
    fn shape(&self, name: &str, tokens: usize) -> Option<Vec<usize>> {
        let d_inner = self.size("mamba_expand")?.checked_mul(self.size("hidden_size")?)?;
        Some(match name.rsplit_once('.')?.1 {
            "conv" => vec![d_inner, self.size("mamba_d_conv")?.checked_sub(1)?],
            "ssm" => vec![d_inner, self.size("mamba_d_state")?],
            _ => vec![self.size("num_key_value_heads")?, tokens, self.size("head_dim")?],
        })
    }

    /// The parts of the state of the model, as [`transfer::parts`] lists them.
    fn parts(&self) -> Option<Vec<(usize, StatePart)>> {
        let (period, offset) = (self.size("attn_layer_period")?, self.size("attn_layer_offset")?);
        let layers = self.size("num_hidden_layers")?;
        let of = |layer: usize| match layer.checked_rem(period) == Some(offset) {
            true => [(layer, StatePart::Keys), (layer, StatePart::Values)],
            false => [(layer, StatePart::Conv), (layer, StatePart::Ssm)],
        };
        // More layers than a configuration may have: not a file of ours.
        (layers <= 1 << 12).then(|| (0..layers).flat_map(of).collect())
    }
}

/// Reads and checks a whole file; the error says what is wrong with it.
fn parse(bytes: &[u8]) -> Result<Snapshot, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let header = metadata.metadata().as_ref();
    let field = |key: &str| {
        let value = header.and_then(|header| header.get(key));
        value.ok_or_else(|| format!("its header has no `{key}`"))
    };
    for (key, expected) in [("format", FORMAT), ("version", VERSION), ("dtype", "F32")] {
        let got = field(key)?;
        if got != expected {
            return Err(format!("its {key} is `{got}`, `{expected}` is expected"));
        }
    }
    let fingerprint = Fingerprint::parse(field("fingerprint")?).ok_or("its fingerprint is none")?;
    let config: HashMap<String, String> =
        serde_json::from_str(field("config")?).map_err(|e| format!("its config: {e}"))?;
    let mut config: Vec<_> = config.into_iter().collect();
    config.sort_unstable();
    let origin = Origin { fingerprint, config };

    let mut entries = Vec::new();
    let mut take = |name: String, dtype: Dtype, shape: Option<Vec<usize>>| {
        let view = file.tensor(&name).map_err(|_| format!("it has no tensor `{name}`"))?;
        let got = view.shape().to_vec();
        if view.dtype() != dtype || shape.as_ref().is_some_and(|shape| *shape != got) {
            return Err(format!("tensor `{name}` is {:?} {got:?}", view.dtype()));
        }
        let bytes = view.data().to_vec();
        let words = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        entries.push(Entry { name, dtype, shape: got, bytes });
        Ok::<Vec<u32>, String>(words)
    };
    let floats = |words: Vec<u32>| words.into_iter().map(f32::from_bits).collect::<Vec<_>>();

    let tokens = take("tokens".into(), Dtype::U32, None)?;
    if field("positions")? != &tokens.len().to_string() {
        return Err("its tokens are not as many as its positions".into());
    }
    let steps = take("steps".into(), Dtype::U32, None)?;
    let steps: Vec<usize> = steps.into_iter().map(|step| step as usize).collect();
    if !steps.is_sorted() || steps.last().is_some_and(|last| *last > tokens.len()) {
        return Err("its steps are not positions in order".into());
    }
    let vocab_size = origin.size("vocab_size").ok_or("its config has no vocab_size")?;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
        return Err(format!("token id {id} is beyond its vocabulary of {vocab_size}"));
    }
    let logits = floats(take("logits".into(), Dtype::F32, None)?);
    if !logits.is_empty() && logits.len() != vocab_size {
        return Err(format!("{} logits are not those of {vocab_size} tokens", logits.len()));
    }

    let parts = origin.parts().ok_or("its config does not say which layers there are")?;
    let (mut states, mut kv) = (Vec::new(), Vec::new());
    for (layer, part) in parts {
        let is_kv = matches!(part, StatePart::Keys | StatePart::Values);
        if is_kv && tokens.is_empty() {
            continue;
        }
        let name = name(layer, part);
        let shape = origin.shape(&name, tokens.len()).ok_or("its config lacks a size")?;
        let values = floats(take(name, Dtype::F32, Some(shape))?);
        if is_kv { &mut kv } else { &mut states }.push((layer, part, values));
    }
    let (stated, found) = (field("checksum")?, checksum(&entries));
    if *stated != found {
        return Err(format!("its checksum is `{stated}`, that of its contents is `{found}`"));
    }

    let positions = tokens.len();
    let kv_heads = origin.size("num_key_value_heads").unwrap_or(1);
    let spans = match kv.is_empty() {
        true => Vec::new(),
        false => {
            let segment = Arc::new(Segment { positions, kv_heads, parts: kv });
            vec![Span { segment, positions }]
        }
    };
    let checkpoint = Arc::new(Mark { position: positions, states, logits });
    Ok(Snapshot(Arc::new(Value { origin, tokens, steps, spans, checkpoint })))
}

/// Of names and contents, in an order that does not depend on that of the file.
fn checksum(entries: &[Entry]) -> String {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_unstable_by_key(|entry| &entry.name);
    let mut hasher = Hasher::new();
    for entry in sorted {
        hasher.bytes(entry.name.as_bytes());
        hasher.bytes(&entry.bytes);
    }
    hasher.finish().to_string()
}

fn write(entries: &[Entry], header: HashMap<String, String>, path: &Path) -> std::io::Result<()> {
    let other = |e: safetensors::SafeTensorError| match e {
        safetensors::SafeTensorError::IoError(e) => e,
        other => std::io::Error::other(other.to_string()),
    };
    let mut views = Vec::new();
    for entry in entries {
        let view = TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes);
        views.push((&entry.name, view.map_err(other)?));
    }
    serialize_to_file(views, Some(header), path).map_err(other)
}

/// Brings a renaming to the disk, where folders can be opened.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

/// A file that is written beside its place and then put there, whole; removed unless it was.
pub(crate) struct Replacement {
    /// Where it is for now; empty once it is in its place.
    temporary: PathBuf,
    place: PathBuf,
}

impl Replacement {
    /// Writes it, and brings it to the disk.
    pub(crate) fn write(
        path: &Path,
        write: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // A renaming would put the file in the place of a link or a device.
        let target = regular_file(path)?.and_then(|_| std::fs::canonicalize(path).ok());
        let place = target.unwrap_or_else(|| path.to_owned());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut name = place.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}-{count}.tmp", std::process::id()));
        let this = Self { temporary: place.with_file_name(name), place };
        let sync = || OpenOptions::new().write(true).open(&this.temporary)?.sync_all();
        write(&this.temporary).and_then(|()| sync()).map_err(Error::io(path))?;
        Ok(this)
    }

    /// Puts it in its place; a file that was there is replaced.
    pub(crate) fn put(mut self) -> Result<()> {
        std::fs::rename(&self.temporary, &self.place).map_err(Error::io(&self.place))?;
        self.temporary.clear();
        sync_folder(&self.place).map_err(Error::io(&self.place))
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
