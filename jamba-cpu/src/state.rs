//! Convolution and SSM states, KV cache and the staged batch.

use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{Batch, Config, Error, Limits, Result, StatePart};

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

/// Values per channel, channels contiguous: per slot `(per_channel, padded channels)`.
pub(crate) struct Channels {
    pub(crate) values: Vec<f32>,
    pub(crate) channels: usize,
    pub(crate) per_channel: usize,
}

impl Channels {
    fn new(slots: usize, per_channel: usize, channels: usize) -> Self {
        let values = vec![0.0; slots * per_channel * channels.next_multiple_of(PAD)];
        Self { values, channels, per_channel }
    }

    fn slot(&mut self, slot: usize) -> &mut [f32] {
        let len = self.per_channel * self.channels.next_multiple_of(PAD);
        &mut self.values[slot * len..(slot + 1) * len]
    }

    /// Where element `n` of a channel of a slot is.
    fn index(&self, slot: usize, channel: usize, n: usize) -> usize {
        (slot * self.per_channel + n) * self.channels.next_multiple_of(PAD) + channel
    }

    /// Indices of all elements of a slot in the order `(channels, per_channel)`.
    fn indices(&self, slot: usize) -> impl Iterator<Item = usize> + '_ {
        let of_channel = move |c| (0..self.per_channel).map(move |n| self.index(slot, c, n));
        (0..self.channels).flat_map(of_channel)
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

    /// The ranges of a slot's first `positions` positions, one per head.
    fn ranges(&self, slot: usize, positions: usize) -> Vec<std::ops::Range<usize>> {
        let kv_heads = 0..self.heads[1];
        kv_heads.map(|g| self.at(slot, g, 0)..self.at(slot, g, positions)).collect()
    }
}

impl State {
    pub(crate) fn new(config: &Config, limits: &Limits) -> Self {
        let &Limits { slots, context, .. } = limits;
        let (d_inner, kv_heads) = (config.d_inner(), config.num_key_value_heads);
        let kv = slots * kv_heads * context * config.head_dim;
        let layer = |mixer| match mixer {
            MixerKind::Mamba => LayerState::Mamba {
                conv: Channels::new(slots, config.mamba_d_conv - 1, d_inner),
                ssm: Channels::new(slots, config.mamba_d_state, d_inner),
            },
            MixerKind::Attention => LayerState::Attention(Cache {
                keys: vec![0.0; kv],
                values: vec![0.0; kv],
                context,
                heads: [config.num_attention_heads, kv_heads, config.head_dim],
            }),
        };
        let layers = Schedule::new(config).iter().map(|kind| layer(kind.mixer)).collect();
        Self { batch: Batch::new(), layers, limits: *limits }
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
        self.check(slot, 0)?;
        for layer in &mut self.layers {
            if let LayerState::Mamba { conv, ssm } = layer {
                conv.slot(slot).fill(0.0);
                ssm.slot(slot).fill(0.0);
            }
        }
        Ok(())
    }

    pub(crate) fn read(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
    ) -> Result<Vec<f32>> {
        self.check(slot, positions)?;
        let channels = |of: &Channels| of.indices(slot).map(|i| of.values[i]).collect();
        let heads = |of: &Cache, values: &[f32]| {
            of.ranges(slot, positions).into_iter().flat_map(|r| values[r].to_vec()).collect()
        };
        match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => Ok(channels(conv)),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => Ok(channels(ssm)),
            (Some(LayerState::Attention(of)), StatePart::Keys) => Ok(heads(of, &of.keys)),
            (Some(LayerState::Attention(of)), StatePart::Values) => Ok(heads(of, &of.values)),
            _ => Err(no_such_state(layer, part)),
        }
    }

    pub(crate) fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: usize,
        values: &[f32],
    ) -> Result<()> {
        self.check(slot, positions)?;
        let indices: Vec<usize> = match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => conv.indices(slot).collect(),
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => ssm.indices(slot).collect(),
            (Some(LayerState::Attention(of)), StatePart::Keys | StatePart::Values) => {
                of.ranges(slot, positions).into_iter().flatten().collect()
            }
            _ => return Err(no_such_state(layer, part)),
        };
        if indices.len() != values.len() {
            let (expected, got) = ([1, indices.len()], [1, values.len()]);
            return Err(Error::Shape { op: "write_state", what: "values", expected, got });
        }
        let target = match (&mut self.layers[layer], part) {
            (LayerState::Mamba { conv, .. }, StatePart::Conv) => &mut conv.values,
            (LayerState::Mamba { ssm, .. }, _) => &mut ssm.values,
            (LayerState::Attention(of), StatePart::Keys) => &mut of.keys,
            (LayerState::Attention(of), _) => &mut of.values,
        };
        indices.into_iter().zip(values).for_each(|(i, v)| target[i] = *v);
        Ok(())
    }

    fn check(&self, slot: usize, positions: usize) -> Result<()> {
        let &Limits { slots, context, .. } = &self.limits;
        if slot >= slots {
            let allowed = format!("but there are {slots} slots");
            return Err(Error::Batch { what: "slot", got: slot, allowed });
        }
        if positions > context {
            return Err(Error::Context { needed: positions, allocated: context });
        }
        Ok(())
    }
}

fn no_such_state(layer: usize, part: StatePart) -> Error {
    Error::Unsupported { backend: "cpu", what: format!("{part:?} state of layer {layer}") }
}
