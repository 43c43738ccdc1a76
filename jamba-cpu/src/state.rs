//! Convolution and SSM states, KV cache and the staged batch.

use std::ops::Range;

use jamba_core::host::zeros;
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::shape;
use jamba_core::{Batch, Config, Error, Limits, Result, StatePart, memory};

use crate::tensor::View;
use crate::weight::PAD;

/// State of all layers and slots.
pub struct State {
    pub(crate) batch: Batch,
    layers: Vec<LayerState>,
    limits: Limits,
}

enum LayerState {
    Mamba { conv: Channels, ssm: Channels },
    Attention(Cache),
}

/// Values per channel, neighbouring channels contiguous: per slot
/// `(padded channels / group, per_channel, group)`.
pub(crate) struct Channels {
    pub(crate) values: Vec<f32>,
    pub(crate) channels: usize,
    pub(crate) per_channel: usize,
    group: usize,
}

impl Channels {
    fn new(slots: usize, per_channel: usize, channels: usize, group: usize) -> Result<Self> {
        let sizes = [slots, per_channel, channels.next_multiple_of(PAD)];
        Ok(Self { values: zeros("Mamba states", &sizes)?, channels, per_channel, group })
    }

    fn slot(&mut self, slot: usize) -> &mut [f32] {
        let len = self.per_channel * self.channels.next_multiple_of(PAD);
        &mut self.values[slot * len..(slot + 1) * len]
    }

    /// Values of a slot as `(channels, per_channel)`.
    fn read(&self, slot: usize) -> Vec<f32> {
        let &Self { channels, per_channel, group, .. } = self;
        let mut out = vec![0.0; channels * per_channel];
        if per_channel > 0 {
            let len = per_channel * channels.next_multiple_of(PAD);
            let groups =
                self.values[slot * len..(slot + 1) * len].chunks_exact(group * per_channel);
            for (out, values) in out.chunks_mut(group * per_channel).zip(groups) {
                for (n, row) in values.chunks_exact(group).enumerate() {
                    let to = out.iter_mut().skip(n).step_by(per_channel);
                    to.zip(row).for_each(|(to, v)| *to = *v);
                }
            }
        }
        out
    }

    /// Writes what [`read`](Self::read) returned.
    fn write(&mut self, slot: usize, values: &[f32]) -> Result<()> {
        check_len(values.len(), self.channels * self.per_channel)?;
        let (per_channel, group) = (self.per_channel, self.group);
        if per_channel > 0 {
            let groups = self.slot(slot).chunks_exact_mut(group * per_channel);
            for (values, group_of) in values.chunks(group * per_channel).zip(groups) {
                for (n, row) in group_of.chunks_exact_mut(group).enumerate() {
                    let from = values.iter().skip(n).step_by(per_channel);
                    row.iter_mut().zip(from).for_each(|(to, v)| *to = *v);
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize) {
        let len = self.per_channel * self.channels.next_multiple_of(PAD);
        self.values.copy_within(from * len..(from + 1) * len, to * len);
    }
}

/// Keys and values of one layer: `(slots, kv_heads, context, head_dim)`.
pub(crate) struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    context: usize,
    /// `[heads, kv_heads, head_dim]`.
    pub(crate) heads: [usize; 3],
}

impl Cache {
    /// Writes the keys and values of a batch, columns `[q | k | v]`, at their positions.
    pub(crate) fn append(&mut self, qkv: View<'_>, batch: &Batch) {
        let [heads, kv_heads, head_dim] = self.heads;
        let mut t = 0;
        for run in batch.runs() {
            for position in run.position..run.position + run.len {
                let row = qkv.row(t);
                for g in 0..kv_heads {
                    let at = self.at(run.slot, g, position);
                    let (k, v) = ((heads + g) * head_dim, (heads + kv_heads + g) * head_dim);
                    self.keys[at..at + head_dim].copy_from_slice(&row[k..k + head_dim]);
                    self.values[at..at + head_dim].copy_from_slice(&row[v..v + head_dim]);
                }
                t += 1;
            }
        }
    }

    /// Keys and values of one head, `(context, head_dim)` each.
    pub(crate) fn head(&self, slot: usize, kv_head: usize) -> (&[f32], &[f32]) {
        let all = self.at(slot, kv_head, 0)..self.at(slot, kv_head + 1, 0);
        (&self.keys[all.clone()], &self.values[all])
    }

    fn at(&self, slot: usize, kv_head: usize, position: usize) -> usize {
        let [_, kv_heads, head_dim] = self.heads;
        ((slot * kv_heads + kv_head) * self.context + position) * head_dim
    }

    /// Where some positions of a slot are, head by head.
    fn ranges(
        &self,
        slot: usize,
        positions: &Range<usize>,
    ) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
        let [_, kv_heads, head_dim] = self.heads;
        let head = self.context * head_dim;
        let first = slot * kv_heads * head;
        let (start, end) = (first + positions.start * head_dim, first + positions.end * head_dim);
        (0..kv_heads).map(move |g| start + g * head..end + g * head)
    }

    fn part(&mut self, part: StatePart) -> &mut [f32] {
        if part == StatePart::Keys { &mut self.keys } else { &mut self.values }
    }

    fn copy(&mut self, from: usize, to: usize, positions: &Range<usize>) {
        for (from, to) in self.ranges(from, positions).zip(self.ranges(to, positions)) {
            self.keys.copy_within(from.clone(), to.start);
            self.values.copy_within(from, to.start);
        }
    }
}

/// What [`State::new`] takes for each slot: everything in f32, channels padded.
pub(crate) fn sequence_bytes(config: &Config, positions: usize) -> u64 {
    let padded = config.d_inner().next_multiple_of(PAD) as u64;
    let per_channel = (config.mamba_d_conv - 1 + config.mamba_d_state) as u64;
    let mamba_layers = Schedule::new(config).mamba_layers() as u64;
    let mamba = 4 * (mamba_layers * padded).saturating_mul(per_channel);
    memory::kv_bytes(config, positions, 4).saturating_add(mamba)
}

impl State {
    pub(crate) fn new(config: &Config, limits: &Limits) -> Result<Self> {
        let &Limits { slots, context, .. } = limits;
        let (d_inner, kv_heads) = (config.d_inner(), config.num_key_value_heads);
        let padded = d_inner.next_multiple_of(PAD);
        let cache = || zeros("a KV cache", &[slots, kv_heads, context, config.head_dim]);
        let layer = |mixer| match mixer {
            MixerKind::Mamba => Ok(LayerState::Mamba {
                conv: Channels::new(slots, config.mamba_d_conv - 1, d_inner, padded)?,
                ssm: Channels::new(slots, config.mamba_d_state, d_inner, PAD)?,
            }),
            MixerKind::Attention => Ok(LayerState::Attention(Cache {
                keys: cache()?,
                values: cache()?,
                context,
                heads: [config.num_attention_heads, kv_heads, config.head_dim],
            })),
        };
        let schedule = Schedule::new(config);
        let layers = schedule.iter().map(|kind| layer(kind.mixer)).collect::<Result<_>>()?;
        Ok(Self { batch: Batch::new(), layers, limits: *limits })
    }

    pub(crate) fn conv(&mut self, layer: usize) -> Result<(&Batch, &mut Channels)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { conv, .. }) => Ok((&self.batch, conv)),
            _ => Err(no_such_state(layer, StatePart::Conv)),
        }
    }

    pub(crate) fn ssm(&mut self, layer: usize) -> Result<(&Batch, &mut Channels)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { ssm, .. }) => Ok((&self.batch, ssm)),
            _ => Err(no_such_state(layer, StatePart::Ssm)),
        }
    }

    pub(crate) fn cache(&mut self, layer: usize) -> Result<(&Batch, &mut Cache)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Attention(cache)) => Ok((&self.batch, cache)),
            _ => Err(no_such_state(layer, StatePart::Keys)),
        }
    }

    pub(crate) fn reset(&mut self, slot: usize) -> Result<()> {
        shape::state(&self.limits, slot, &(0..0))?;
        for layer in &mut self.layers {
            if let LayerState::Mamba { conv, ssm } = layer {
                conv.slot(slot).fill(0.0);
                ssm.slot(slot).fill(0.0);
            }
        }
        Ok(())
    }

    /// A part of the state; of keys and values these positions.
    pub(crate) fn read(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        shape::state(&self.limits, slot, &positions)?;
        match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => Ok(conv.read(slot)),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => Ok(ssm.read(slot)),
            (Some(LayerState::Attention(of)), StatePart::Keys | StatePart::Values) => {
                let all = if part == StatePart::Keys { &of.keys } else { &of.values };
                let heads: Vec<_> = of.ranges(slot, &positions).map(|r| &all[r]).collect();
                Ok(heads.concat())
            }
            _ => Err(no_such_state(layer, part)),
        }
    }

    /// Writes what [`read`](Self::read) returned.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        shape::state(&self.limits, slot, &positions)?;
        match (self.layers.get_mut(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => conv.write(slot, values),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => ssm.write(slot, values),
            (Some(LayerState::Attention(of)), StatePart::Keys | StatePart::Values) => {
                let [_, kv_heads, head_dim] = of.heads;
                let head = positions.len() * head_dim;
                check_len(values.len(), kv_heads * head)?;
                let ranges = of.ranges(slot, &positions);
                let all = of.part(part);
                for (g, range) in ranges.enumerate() {
                    all[range].copy_from_slice(&values[g * head..(g + 1) * head]);
                }
                Ok(())
            }
            _ => Err(no_such_state(layer, part)),
        }
    }

    /// Makes slot `to` hold what slot `from` does, a sequence of `positions` tokens.
    pub(crate) fn copy(&mut self, from: usize, to: usize, positions: usize) -> Result<()> {
        for slot in [from, to] {
            shape::state(&self.limits, slot, &(0..positions))?;
        }
        for layer in &mut self.layers {
            match layer {
                LayerState::Mamba { conv, ssm } => {
                    conv.copy(from, to);
                    ssm.copy(from, to);
                }
                LayerState::Attention(cache) => cache.copy(from, to, &(0..positions)),
            }
        }
        Ok(())
    }
}

fn check_len(got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = ([1, expected], [1, got]);
    Err(Error::Shape { op: "write_state", what: "values", expected, got })
}

fn no_such_state(layer: usize, part: StatePart) -> Error {
    Error::Unsupported { backend: "cpu", what: format!("{part:?} state of layer {layer}") }
}
