//! Convolution and SSM states, KV cache and the staged batch.

use std::ops::Range;

use half::bf16;
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{Batch, Config, Limits, Run, StatePart};

use crate::device::{Buffer, Device, Staging};
use crate::error::Result;
use crate::ops::attention::Attention;
use crate::ops::conv1d::Conv1d;
use crate::ops::scan::Scan;
use crate::ops::scan_step::ScanStep;
use crate::options::Precision;
use crate::step::Graphs;

/// Tokens of a segment: `SEGMENT` of common.cuh.
pub(crate) const SEGMENT: usize = 64;
/// Words of a `Run` of common.cuh.
const RUN_WORDS: usize = 8;

/// State of all layers and slots, and the kernels specialised to its sizes.
pub struct State {
    pub(crate) batch: Staged,
    pub(crate) kernels: Kernels,
    pub(crate) graphs: Graphs,
    layers: Vec<LayerState>,
    limits: Limits,
    precision: Precision,
}

/// The kernels that are specialised to the sizes of a model; of the kinds of layer that it has.
#[derive(Clone)]
pub(crate) struct Kernels {
    pub(crate) conv1d: Option<Conv1d>,
    pub(crate) scan: Option<Scan>,
    pub(crate) scan_step: Option<ScanStep>,
    pub(crate) attention: Option<Attention>,
}

enum LayerState {
    Mamba { conv: Channels, ssm: Channels },
    Attention(Cache),
}

/// `(slots, channels, per_channel)` in f32.
pub(crate) struct Channels {
    pub(crate) values: Buffer,
    pub(crate) channels: usize,
    pub(crate) per_channel: usize,
}

/// Keys and values of one layer, `(slots, kv_heads, context, head_dim)` each, in the precision of
/// the backend.
pub(crate) struct Cache {
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    pub(crate) context: usize,
    /// `[heads, kv_heads, head_dim]`.
    pub(crate) heads: [usize; 3],
}

/// The batch that operators work on: in device buffers at fixed addresses, with what a launcher
/// must know of it.
pub(crate) struct Staged {
    words: Buffer,
    staging: Staging,
    limits: Limits,
    pub(crate) tokens: usize,
    pub(crate) runs: usize,
    pub(crate) outputs: usize,
    /// Of all runs, each cut into [`SEGMENT`] tokens.
    pub(crate) segments: usize,
    pub(crate) shortest: usize,
    pub(crate) longest: usize,
    /// Positions after the step, of the run that then has most.
    pub(crate) positions: usize,
    /// And of all runs together.
    pub(crate) cached: usize,
    /// Keys that all tokens together attend to.
    pub(crate) seen: usize,
    /// And where it is.
    largest_token: (u32, usize),
}

/// Bytes of one element of the KV cache.
pub(crate) fn kv_element_bytes(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 => 2,
        Precision::F32 => 4,
    }
}

/// Words of the staged batch: runs, output rows, (token, run) pairs.
pub(crate) fn staged_words(limits: &Limits) -> usize {
    let runs = limits.slots.saturating_mul(RUN_WORDS);
    let outputs = limits.outputs.saturating_add(limits.outputs % 2);
    runs.saturating_add(outputs).saturating_add(limits.tokens.saturating_mul(2))
}

impl Staged {
    fn new(device: &Device, limits: &Limits) -> Result<Self> {
        let words = staged_words(limits);
        Ok(Self {
            words: device.alloc(words.saturating_mul(4))?,
            staging: Staging::new(device, words)?,
            limits: *limits,
            tokens: 0,
            runs: 0,
            outputs: 0,
            segments: 0,
            shortest: 0,
            longest: 0,
            positions: 0,
            cached: 0,
            seen: 0,
            largest_token: (0, 0),
        })
    }

    /// Whether every run is one token.
    pub(crate) fn is_decode(&self) -> bool {
        (self.shortest, self.longest) == (1, 1)
    }

    /// Whether every token is a row of a table of so many.
    pub(crate) fn check_ids(&self, vocab_size: usize) -> jamba_core::Result<()> {
        let (id, index) = self.largest_token;
        if self.tokens > 0 && id as usize >= vocab_size {
            return Err(jamba_core::Error::Token { id, index, vocab_size });
        }
        Ok(())
    }

    /// Where the output rows start; an even number of words, as the pairs after them need.
    fn outputs_at(&self) -> usize {
        RUN_WORDS * self.limits.slots
    }

    fn tokens_at(&self) -> usize {
        self.outputs_at() + self.limits.outputs + self.limits.outputs % 2
    }

    /// Address of the runs.
    pub(crate) fn runs_ptr(&self) -> u64 {
        self.words.ptr()
    }

    /// Address of the output rows.
    pub(crate) fn outputs_ptr(&self) -> u64 {
        self.words.ptr() + 4 * self.outputs_at() as u64
    }

    /// Address of the (token, run) pairs.
    pub(crate) fn tokens_ptr(&self) -> u64 {
        self.words.ptr() + 4 * self.tokens_at() as u64
    }

    pub(crate) fn stage(&mut self, device: &Device, batch: &Batch) -> jamba_core::Result<()> {
        let limits = &self.limits;
        let too_many = [
            ("number of tokens", batch.tokens().len(), limits.tokens),
            ("number of logit rows", batch.outputs().len(), limits.outputs),
            ("number of runs", batch.runs().len(), limits.slots),
        ];
        for (what, got, max) in too_many {
            if got > max {
                let allowed = format!("but at most {max} is allowed here");
                return Err(jamba_core::Error::Batch { what, got, allowed });
            }
        }
        // What kernels rely on to stay within the state.
        for run in batch.runs() {
            if run.slot >= limits.slots {
                let allowed = format!("but there are {} slots", limits.slots);
                return Err(jamba_core::Error::Batch { what: "slot", got: run.slot, allowed });
            }
            let needed = run.position.saturating_add(run.len);
            if needed > limits.context {
                return Err(jamba_core::Error::Context { needed, allocated: limits.context });
            }
        }
        let (outputs_at, tokens_at) = (self.outputs_at(), self.tokens_at());
        let len = tokens_at + 2 * batch.tokens().len();
        let runs = batch.runs();
        let mut segments = 0;
        self.staging.upload(device, &mut self.words, len, |words| {
            let (runs_at, words) = words.split_at_mut(outputs_at);
            let (rows, pairs) = words.split_at_mut(tokens_at - outputs_at);
            let (mut start, mut pairs) = (0, pairs.chunks_exact_mut(2));
            let runs_at = runs_at.chunks_exact_mut(RUN_WORDS);
            for (index, (run, to)) in runs.iter().zip(runs_at).enumerate() {
                let fields = [start, run.len, run.position, run.slot, segments, 0, 0, 0];
                to.iter_mut().zip(fields).for_each(|(to, v)| *to = v as u32);
                let ids = &batch.tokens()[start..start + run.len];
                for (id, pair) in ids.iter().zip(&mut pairs) {
                    pair.copy_from_slice(&[*id, index as u32]);
                }
                start += run.len;
                segments += run.len.div_ceil(SEGMENT);
            }
            rows.iter_mut().zip(batch.outputs()).for_each(|(to, row)| *to = *row as u32);
        })?;
        self.tokens = batch.tokens().len();
        self.runs = runs.len();
        self.outputs = batch.outputs().len();
        self.segments = segments;
        self.shortest = runs.iter().map(|run| run.len).min().unwrap_or(0);
        self.longest = runs.iter().map(|run| run.len).max().unwrap_or(0);
        self.positions = runs.iter().map(|run| run.position + run.len).max().unwrap_or(0);
        self.cached = runs.iter().map(|run| run.position + run.len).sum();
        let seen = |run: &Run| run.len * run.position + run.len * (run.len + 1) / 2;
        self.seen = runs.iter().map(seen).sum();
        let tokens = batch.tokens().iter().copied().zip(0..);
        self.largest_token = tokens.max_by_key(|(id, _)| *id).unwrap_or((0, 0));
        Ok(())
    }
}

impl State {
    pub(crate) fn new(
        device: &Device,
        kernels: Kernels,
        config: &Config,
        limits: &Limits,
        precision: Precision,
    ) -> Result<Self> {
        let &Limits { slots, context, .. } = limits;
        let (d_inner, kv_heads) = (config.d_inner(), config.num_key_value_heads);
        // What no address can be made for is refused as what there is no memory for.
        let product =
            |sizes: &[usize]| sizes.iter().fold(1, |n: usize, &size| n.saturating_mul(size));
        let element = kv_element_bytes(precision);
        let kv = product(&[slots, kv_heads, context, config.head_dim, element]);
        let channels = |per_channel| {
            let values = device.alloc(product(&[4, slots, d_inner, per_channel]))?;
            Ok(Channels { values, channels: d_inner, per_channel })
        };
        let layer = |mixer| match mixer {
            MixerKind::Mamba => Ok(LayerState::Mamba {
                conv: channels(config.mamba_d_conv - 1)?,
                ssm: channels(config.mamba_d_state)?,
            }),
            MixerKind::Attention => Ok(LayerState::Attention(Cache {
                keys: device.alloc(kv)?,
                values: device.alloc(kv)?,
                context,
                heads: [config.num_attention_heads, kv_heads, config.head_dim],
            })),
        };
        let schedule = Schedule::new(config);
        let layers = schedule.iter().map(|kind| layer(kind.mixer)).collect::<Result<_>>()?;
        let batch = Staged::new(device, limits)?;
        Ok(Self { batch, kernels, graphs: Graphs::default(), layers, limits: *limits, precision })
    }

    pub(crate) fn conv(&self, layer: usize) -> jamba_core::Result<&Channels> {
        match self.layers.get(layer) {
            Some(LayerState::Mamba { conv, .. }) => Ok(conv),
            _ => Err(no_such_state(layer, StatePart::Conv)),
        }
    }

    pub(crate) fn ssm(&self, layer: usize) -> jamba_core::Result<&Channels> {
        match self.layers.get(layer) {
            Some(LayerState::Mamba { ssm, .. }) => Ok(ssm),
            _ => Err(no_such_state(layer, StatePart::Ssm)),
        }
    }

    pub(crate) fn cache(&self, layer: usize) -> jamba_core::Result<&Cache> {
        match self.layers.get(layer) {
            Some(LayerState::Attention(cache)) => Ok(cache),
            _ => Err(no_such_state(layer, StatePart::Keys)),
        }
    }

    pub(crate) fn reset(&mut self, device: &Device, slot: usize) -> jamba_core::Result<()> {
        self.check(slot, 0)?;
        for layer in &mut self.layers {
            if let LayerState::Mamba { conv, ssm } = layer {
                for of in [conv, ssm] {
                    let bytes = 4 * of.channels * of.per_channel;
                    device.zero(&mut of.values, slot * bytes..(slot + 1) * bytes)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn read(
        &self,
        device: &Device,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> jamba_core::Result<Vec<f32>> {
        let ranges = self.ranges(layer, part, slot, positions)?;
        let (buffer, narrow) = self.part(layer, part)?;
        let size = if narrow { 2 } else { 4 };
        let mut values = Vec::new();
        for (start, len) in ranges {
            let mut bytes = vec![0; size * len];
            device.download(buffer, size * start, &mut bytes)?;
            if narrow {
                let halves = bytes.as_chunks().0.iter();
                values.extend(halves.map(|b| bf16::from_le_bytes(*b).to_f32()));
            } else {
                values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
            }
        }
        Ok(values)
    }

    pub(crate) fn write(
        &mut self,
        device: &Device,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> jamba_core::Result<()> {
        let ranges = self.ranges(layer, part, slot, positions)?;
        let elements = ranges.iter().map(|(_, len)| len).sum();
        if elements != values.len() {
            let (expected, got) = ([1, elements], [1, values.len()]);
            let (op, what) = ("write_state", "values");
            return Err(jamba_core::Error::Shape { op, what, expected, got });
        }
        let mut values = values.iter();
        for (start, len) in ranges {
            let (buffer, narrow) = self.part_mut(layer, part)?;
            let values = values.by_ref().take(len);
            if narrow {
                let bytes: Vec<u8> =
                    values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
                device.upload(buffer, 2 * start, &bytes)?;
            } else {
                let bytes: Vec<u8> = values.flat_map(|v| v.to_le_bytes()).collect();
                device.upload(buffer, 4 * start, &bytes)?;
            }
        }
        Ok(())
    }

    /// Makes slot `to` hold what slot `from` does, a sequence of `positions` tokens.
    pub(crate) fn copy_slot(
        &mut self,
        device: &Device,
        from: usize,
        to: usize,
        positions: usize,
    ) -> jamba_core::Result<()> {
        use StatePart::{Conv, Keys, Ssm, Values};
        for layer in 0..self.layers.len() {
            let parts = match &self.layers[layer] {
                LayerState::Mamba { .. } => [Conv, Ssm],
                LayerState::Attention(_) => [Keys, Values],
            };
            for part in parts {
                let sources = self.ranges(layer, part, from, 0..positions)?;
                let targets = self.ranges(layer, part, to, 0..positions)?;
                let (buffer, narrow) = self.part_mut(layer, part)?;
                let size = if narrow { 2 } else { 4 };
                for ((from, len), (to, _)) in sources.into_iter().zip(targets) {
                    device.copy_within(buffer, size * from, size * to, size * len)?;
                }
            }
        }
        Ok(())
    }

    /// The buffer of a part, and whether its elements are bf16.
    fn part(&self, layer: usize, part: StatePart) -> jamba_core::Result<(&Buffer, bool)> {
        let narrow = self.precision == Precision::Bf16;
        match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => Ok((&conv.values, false)),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => Ok((&ssm.values, false)),
            (Some(LayerState::Attention(of)), StatePart::Keys) => Ok((&of.keys, narrow)),
            (Some(LayerState::Attention(of)), StatePart::Values) => Ok((&of.values, narrow)),
            _ => Err(no_such_state(layer, part)),
        }
    }

    fn part_mut(
        &mut self,
        layer: usize,
        part: StatePart,
    ) -> jamba_core::Result<(&mut Buffer, bool)> {
        let narrow = self.precision == Precision::Bf16;
        match (self.layers.get_mut(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => {
                Ok((&mut conv.values, false))
            }
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => Ok((&mut ssm.values, false)),
            (Some(LayerState::Attention(of)), StatePart::Keys) => Ok((&mut of.keys, narrow)),
            (Some(LayerState::Attention(of)), StatePart::Values) => Ok((&mut of.values, narrow)),
            _ => Err(no_such_state(layer, part)),
        }
    }

    /// The elements of a part of a slot: (start, length) of each contiguous piece. Of keys and
    /// values those at `positions`.
    fn ranges(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> jamba_core::Result<Vec<(usize, usize)>> {
        self.check(slot, positions.end)?;
        if positions.start > positions.end {
            let allowed = format!("but the last is {}", positions.end);
            let (what, got) = ("first position", positions.start);
            return Err(jamba_core::Error::Batch { what, got, allowed });
        }
        let channels = |of: &Channels| {
            let len = of.channels * of.per_channel;
            vec![(slot * len, len)]
        };
        match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => Ok(channels(conv)),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => Ok(channels(ssm)),
            (Some(LayerState::Attention(of)), StatePart::Keys | StatePart::Values) => {
                let [_, kv_heads, head_dim] = of.heads;
                let start = |g| ((slot * kv_heads + g) * of.context + positions.start) * head_dim;
                let len = positions.len() * head_dim;
                Ok((0..kv_heads).map(|g| (start(g), len)).collect())
            }
            _ => Err(no_such_state(layer, part)),
        }
    }

    fn check(&self, slot: usize, positions: usize) -> jamba_core::Result<()> {
        let &Limits { slots, context, .. } = &self.limits;
        if slot >= slots {
            let allowed = format!("but there are {slots} slots");
            return Err(jamba_core::Error::Batch { what: "slot", got: slot, allowed });
        }
        if positions > context {
            return Err(jamba_core::Error::Context { needed: positions, allocated: context });
        }
        Ok(())
    }
}

fn no_such_state(layer: usize, part: StatePart) -> jamba_core::Error {
    let what = format!("{part:?} state of layer {layer}");
    jamba_core::Error::Unsupported { backend: "cuda", what }
}
