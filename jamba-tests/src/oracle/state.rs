//! States of the oracle, in f64.

use std::ops::Range;

use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::shape;
use jamba_core::{Batch, Config, Error, Limits, Result, StatePart};

/// State of all layers and slots, and the staged batch.
#[derive(Clone, Debug)]
pub struct OracleState {
    pub(super) batch: Batch,
    layers: Vec<LayerState>,
    limits: Limits,
    /// `d_inner`, `d_conv - 1`, `d_state`.
    sizes: [usize; 3],
}

#[derive(Clone, Debug)]
enum LayerState {
    /// `conv (slots, d_inner, d_conv - 1)`, `ssm (slots, d_inner, d_state)`.
    Mamba {
        conv: Vec<f64>,
        ssm: Vec<f64>,
    },
    Attention(Cache),
}

/// Keys and values of one layer, `(slots, kv_heads, context, head_dim)` each.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    pub(super) keys: Vec<f64>,
    pub(super) values: Vec<f64>,
    /// `[heads, kv_heads, head_dim]`.
    pub(super) heads: [usize; 3],
    context: usize,
}

impl Cache {
    /// Where the `head_dim` values of one position are.
    pub(super) fn at(&self, slot: usize, kv_head: usize, position: usize) -> Range<usize> {
        let [_, kv_heads, head_dim] = self.heads;
        let start = ((slot * kv_heads + kv_head) * self.context + position) * head_dim;
        start..start + head_dim
    }
}

impl OracleState {
    pub(super) fn new(config: &Config, limits: &Limits) -> Self {
        let d_inner = config.d_inner();
        let sizes = [d_inner, config.mamba_d_conv - 1, config.mamba_d_state];
        let cache = limits.slots * limits.context * config.kv_width();
        let layer = |mixer| match mixer {
            MixerKind::Mamba => LayerState::Mamba {
                conv: vec![0.0; limits.slots * d_inner * sizes[1]],
                ssm: vec![0.0; limits.slots * d_inner * sizes[2]],
            },
            MixerKind::Attention => LayerState::Attention(Cache {
                keys: vec![0.0; cache],
                values: vec![0.0; cache],
                heads: [config.num_attention_heads, config.num_key_value_heads, config.head_dim],
                context: limits.context,
            }),
        };
        let layers = Schedule::new(config).iter().map(|kind| layer(kind.mixer)).collect();
        Self { batch: Batch::new(), layers, limits: *limits, sizes }
    }

    /// The batch, `(slots, d_inner, d_conv - 1)`, and `[d_inner, d_conv - 1]`.
    pub(super) fn conv(&mut self, layer: usize) -> Result<(&Batch, &mut [f64], [usize; 2])> {
        let [d_inner, context, _] = self.sizes;
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { conv, .. }) => Ok((&self.batch, conv, [d_inner, context])),
            _ => Err(none(layer, StatePart::Conv)),
        }
    }

    /// The batch, `(slots, d_inner, d_state)`, and `[d_inner, d_state]`.
    pub(super) fn ssm(&mut self, layer: usize) -> Result<(&Batch, &mut [f64], [usize; 2])> {
        let [d_inner, _, d_state] = self.sizes;
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { ssm, .. }) => Ok((&self.batch, ssm, [d_inner, d_state])),
            _ => Err(none(layer, StatePart::Ssm)),
        }
    }

    pub(super) fn cache(&mut self, layer: usize) -> Result<(&Batch, &mut Cache)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Attention(cache)) => Ok((&self.batch, cache)),
            _ => Err(none(layer, StatePart::Keys)),
        }
    }

    pub(super) fn reset(&mut self, slot: usize) -> Result<()> {
        for layer in 0..self.layers.len() {
            for part in [StatePart::Conv, StatePart::Ssm] {
                if let LayerState::Mamba { .. } = self.layers[layer] {
                    self.values(layer, part, slot, 0..0)?.into_iter().for_each(|v| *v = 0.0);
                }
            }
        }
        Ok(())
    }

    pub(super) fn read(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        // A copy of the oracle's small states costs less than saying everything twice.
        let mut copy = self.clone();
        Ok(copy.values(layer, part, slot, positions)?.into_iter().map(|v| *v as f32).collect())
    }

    pub(super) fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        let target = self.values(layer, part, slot, positions)?;
        if target.len() != values.len() {
            let (expected, got) = ([1, target.len()], [1, values.len()]);
            return Err(Error::Shape { op: "write_state", what: "values", expected, got });
        }
        target.into_iter().zip(values).for_each(|(to, from)| *to = f64::from(*from));
        Ok(())
    }

    /// The values of a part, in the order that [`StatePart`] states.
    fn values(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<&mut f64>> {
        shape::state(&self.limits, slot, &positions)?;
        let Limits { slots, context, .. } = self.limits;
        let of_slot = |all: &mut Vec<f64>| {
            let len = all.len() / slots;
            slot * len..(slot + 1) * len
        };
        match (self.layers.get_mut(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => {
                let range = of_slot(conv);
                Ok(conv[range].iter_mut().collect())
            }
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => {
                let range = of_slot(ssm);
                Ok(ssm[range].iter_mut().collect())
            }
            (Some(LayerState::Attention(cache)), StatePart::Keys | StatePart::Values) => {
                let [_, _, head_dim] = cache.heads;
                let all = if part == StatePart::Keys { &mut cache.keys } else { &mut cache.values };
                let slot = of_slot(all);
                let range = positions.start * head_dim..positions.end * head_dim;
                let heads = all[slot].chunks_exact_mut(context * head_dim);
                Ok(heads.flat_map(|head| &mut head[range.clone()]).collect())
            }
            _ => Err(none(layer, part)),
        }
    }
}

fn none(layer: usize, part: StatePart) -> Error {
    Error::Unsupported { backend: "oracle", what: format!("{part:?} state of layer {layer}") }
}
