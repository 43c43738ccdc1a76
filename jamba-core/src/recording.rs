//! Everything that a model computes for some tokens, by name: what golden files hold.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::backend::StatePart;
use crate::batch::Outputs;
use crate::error::{Error, Result};
use crate::schedule::{MixerKind, Schedule};
use crate::session::Session;
use crate::trace::{Activation, Detail};

/// A row-major f32 tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recorded {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// Named tensors of a prompt, of single tokens after it, and of the states at the end:
///
/// - activations of the prompt, named as [`Activation`] says, `(tokens, width)`;
/// - `decode_logits`, `(decoded tokens, vocab_size)`;
/// - `state.I.conv` `(d_inner, d_conv)`, the latest `d_conv` inputs of the convolution, zero
///   before the first; `state.I.ssm` `(d_inner, d_state)`; `state.I.k` and `state.I.v`
///   `(num_kv_heads, tokens, head_dim)`.
///
/// ```
/// use jamba_core::recording::Recording;
/// use jamba_core::trace::Detail;
/// use jamba_core::{LanguageModel, Model, SessionOptions};
/// use jamba_cpu::ReferenceBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, ReferenceBackend::new())?;
/// let options = SessionOptions { context: 8, chunk: 3, outputs: 3 };
/// let mut session = model.session(options)?;
/// let recording = Recording::new(&mut session, &[1, 2, 3], 3, &[4], Detail::Operators)?;
/// assert_eq!(recording.tensors["layers.3.mamba.scan"].shape, [3, 512]);
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// The tensors by name.
    pub tensors: BTreeMap<String, Recorded>,
}

impl Recording {
    /// Runs `prompt` in steps of at most `chunk` tokens, then `decode` one token at a time, and
    /// keeps every activation. The session starts anew, and must have been made for `chunk` rows
    /// of logits ([`SessionOptions::outputs`](crate::SessionOptions)).
    ///
    /// # Errors
    /// Those of [`Session::append_traced`].
    pub fn new(
        session: &mut Session,
        prompt: &[u32],
        chunk: usize,
        decode: &[u32],
        detail: Detail,
    ) -> Result<Self> {
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        session.reset()?;
        let mut recording = Self::default();
        let mut inputs = ConvInputs::default();
        for part in prompt.chunks(chunk.max(1)) {
            let mut listen = |at: Activation, shape: [usize; 2], values: &[f32]| {
                inputs.listen(at, shape, values);
                recording.append(at.to_string(), shape[1], values);
            };
            session.append_traced(part, Outputs::All, detail, &mut listen)?;
        }
        for id in decode {
            let mut listen = |at: Activation, shape: [usize; 2], values: &[f32]| {
                inputs.listen(at, shape, values);
                if at == Activation::model("logits") {
                    recording.append("decode_logits".into(), shape[1], values);
                }
            };
            session.append_traced(&[*id], Outputs::All, detail, &mut listen)?;
        }
        recording.read_states(session, &inputs)?;
        Ok(recording)
    }

    fn append(&mut self, name: String, cols: usize, values: &[f32]) {
        let tensor = self.tensors.entry(name).or_default();
        tensor.values.extend_from_slice(values);
        tensor.shape = vec![tensor.values.len() / cols.max(1), cols];
    }

    fn insert(&mut self, name: String, shape: Vec<usize>, values: Vec<f32>) {
        self.tensors.insert(name, Recorded { shape, values });
    }

    fn read_states(&mut self, session: &Session, inputs: &ConvInputs) -> Result<()> {
        let config = session.config();
        let (d_inner, d_conv) = (config.d_inner(), config.mamba_d_conv);
        for (layer, kind) in Schedule::new(config).iter().enumerate() {
            let mut read = |name: &str, part, shape: Vec<usize>| {
                let values = session.read_state(layer, part)?;
                self.insert(format!("state.{layer}.{name}"), shape, values);
                Ok::<_, Error>(())
            };
            match kind.mixer {
                MixerKind::Mamba => {
                    let state = session.read_state(layer, StatePart::Conv)?;
                    read("ssm", StatePart::Ssm, vec![d_inner, config.mamba_d_state])?;
                    // The state has the d_conv - 1 inputs that are needed to go on; the one
                    // before them is known only if every operator was traced.
                    if let Some(oldest) = inputs.oldest(layer, d_conv) {
                        let rows = oldest.iter().zip(rows(&state, d_conv - 1, d_inner));
                        let conv = rows.flat_map(|(x, rest)| [&[*x], rest].concat()).collect();
                        self.insert(format!("state.{layer}.conv"), vec![d_inner, d_conv], conv);
                    }
                }
                MixerKind::Attention => {
                    let shape =
                        vec![config.num_key_value_heads, session.position(), config.head_dim];
                    read("k", StatePart::Keys, shape.clone())?;
                    read("v", StatePart::Values, shape)?;
                }
            }
        }
        Ok(())
    }

    /// Writes all tensors to a safetensors file, as F32.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Safetensors`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let views: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, t)| {
                let bytes = bytemuck::cast_slice(&t.values);
                TensorView::new(Dtype::F32, t.shape.clone(), bytes).map(|view| (name, view))
            })
            .collect::<Result<_, _>>()
            .map_err(|e| unwritten(path, e))?;
        let bytes = serialize(views, None).map_err(|e| unwritten(path, e))?;
        std::fs::write(path, bytes).map_err(Error::io(path))
    }
}

fn unwritten(path: &Path, e: safetensors::SafeTensorError) -> Error {
    Error::Safetensors { path: path.to_owned(), reason: e.to_string() }
}

/// `n` rows of `cols` values; also where `cols` is zero.
fn rows(values: &[f32], cols: usize, n: usize) -> impl Iterator<Item = &[f32]> {
    (0..n).map(move |row| &values[row * cols..(row + 1) * cols])
}

/// Inputs of the convolutions, `(tokens, d_inner)` per layer.
#[derive(Default)]
struct ConvInputs {
    x: HashMap<usize, Recorded>,
}

impl ConvInputs {
    fn listen(&mut self, at: Activation, shape: [usize; 2], values: &[f32]) {
        let (Some(layer), "mamba.in_proj") = (at.layer, at.name) else { return };
        let d_inner = shape[1] / 2;
        let kept = self.x.entry(layer).or_default();
        values.chunks_exact(shape[1]).for_each(|row| kept.values.extend(&row[..d_inner]));
        kept.shape = vec![kept.values.len() / d_inner, d_inner];
    }

    /// The inputs of the `n`-th token from the end, zeros before the first.
    fn oldest(&self, layer: usize, n: usize) -> Option<Vec<f32>> {
        let kept = self.x.get(&layer)?;
        let [tokens, d_inner] = kept.shape[..] else { return None };
        Some(match tokens.checked_sub(n) {
            Some(t) => kept.values[t * d_inner..(t + 1) * d_inner].to_vec(),
            None => vec![0.0; d_inner],
        })
    }
}
