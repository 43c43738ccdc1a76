//! Convolution and SSM states, KV cache and the staged batch.

use std::ops::Range;

use jamba_core::backend::{Limits, StatePart};
use jamba_core::host::zeros;
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::shape;
use jamba_core::{Batch, Config, Error, Result};
use ndarray::{Array, Array3, Array4, ArrayViewMutD, Dimension, IntoDimension, s};

/// State of all layers and slots.
pub struct ReferenceState {
    pub(super) batch: Batch,
    layers: Vec<LayerState>,
    limits: Limits,
}

enum LayerState {
    Mamba {
        /// `(slots, d_inner, d_conv - 1)`.
        conv: Array3<f32>,
        /// `(slots, d_inner, d_state)`.
        ssm: Array3<f32>,
    },
    Attention(Cache),
}

/// Keys and values of one layer.
pub(super) struct Cache {
    /// `(slots, kv_heads, context, head_dim)`.
    pub(super) keys: Array4<f32>,
    /// `(slots, kv_heads, context, head_dim)`.
    pub(super) values: Array4<f32>,
    /// `[heads, kv_heads, head_dim]`.
    pub(super) heads: [usize; 3],
}

impl ReferenceState {
    pub(super) fn new(config: &Config, limits: &Limits) -> Result<Self> {
        let &Limits { slots, context, .. } = limits;
        let d_inner = config.d_inner();
        let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let channels = |per_channel| {
            let shape = [slots, d_inner, per_channel];
            array(shape, zeros("Mamba states", &shape)?)
        };
        let cache = || {
            let shape = [slots, kv_heads, context, head_dim];
            array(shape, zeros("a KV cache", &shape)?)
        };
        let layer = |mixer| match mixer {
            MixerKind::Mamba => Ok(LayerState::Mamba {
                conv: channels(config.mamba_d_conv - 1)?,
                ssm: channels(config.mamba_d_state)?,
            }),
            MixerKind::Attention => Ok(LayerState::Attention(Cache {
                keys: cache()?,
                values: cache()?,
                heads: [config.num_attention_heads, kv_heads, head_dim],
            })),
        };
        let schedule = Schedule::new(config);
        let layers = schedule.iter().map(|kind| layer(kind.mixer)).collect::<Result<_>>()?;
        Ok(Self { batch: Batch::new(), layers, limits: *limits })
    }

    pub(super) fn conv(&mut self, layer: usize) -> Result<(&Batch, &mut Array3<f32>)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { conv, .. }) => Ok((&self.batch, conv)),
            _ => Err(no_such_state(layer, StatePart::Conv)),
        }
    }

    pub(super) fn ssm(&mut self, layer: usize) -> Result<(&Batch, &mut Array3<f32>)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Mamba { ssm, .. }) => Ok((&self.batch, ssm)),
            _ => Err(no_such_state(layer, StatePart::Ssm)),
        }
    }

    pub(super) fn cache(&mut self, layer: usize) -> Result<(&Batch, &mut Cache)> {
        match self.layers.get_mut(layer) {
            Some(LayerState::Attention(cache)) => Ok((&self.batch, cache)),
            _ => Err(no_such_state(layer, StatePart::Keys)),
        }
    }

    pub(super) fn reset(&mut self, slot: usize) -> Result<()> {
        shape::state(&self.limits, slot, &(0..0))?;
        for layer in &mut self.layers {
            if let LayerState::Mamba { conv, ssm } = layer {
                conv.slice_mut(s![slot, .., ..]).fill(0.0);
                ssm.slice_mut(s![slot, .., ..]).fill(0.0);
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
        shape::state(&self.limits, slot, &positions)?;
        let values = match (self.layers.get(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => {
                conv.slice(s![slot, .., ..]).iter().copied().collect()
            }
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => {
                ssm.slice(s![slot, .., ..]).iter().copied().collect()
            }
            (Some(LayerState::Attention(cache)), StatePart::Keys) => {
                cache.keys.slice(s![slot, .., positions, ..]).iter().copied().collect()
            }
            (Some(LayerState::Attention(cache)), StatePart::Values) => {
                cache.values.slice(s![slot, .., positions, ..]).iter().copied().collect()
            }
            _ => return Err(no_such_state(layer, part)),
        };
        Ok(values)
    }

    pub(super) fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        shape::state(&self.limits, slot, &positions)?;
        let mut target: ArrayViewMutD<'_, f32> = match (self.layers.get_mut(layer), part) {
            (Some(LayerState::Mamba { conv, .. }), StatePart::Conv) => {
                conv.slice_mut(s![slot, .., ..]).into_dyn()
            }
            (Some(LayerState::Mamba { ssm, .. }), StatePart::Ssm) => {
                ssm.slice_mut(s![slot, .., ..]).into_dyn()
            }
            (Some(LayerState::Attention(cache)), StatePart::Keys) => {
                cache.keys.slice_mut(s![slot, .., positions, ..]).into_dyn()
            }
            (Some(LayerState::Attention(cache)), StatePart::Values) => {
                cache.values.slice_mut(s![slot, .., positions, ..]).into_dyn()
            }
            _ => return Err(no_such_state(layer, part)),
        };
        if target.len() != values.len() {
            let (expected, got) = ([1, target.len()], [1, values.len()]);
            return Err(Error::Shape { op: "write_state", what: "values", expected, got });
        }
        target.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

/// Values as an array of a shape of as many elements.
fn array<const N: usize, D>(shape: [usize; N], values: Vec<f32>) -> Result<Array<f32, D>>
where
    [usize; N]: IntoDimension<Dim = D>,
    D: Dimension,
{
    let got = [1, values.len()];
    Array::from_shape_vec(shape, values).map_err(|_| Error::Shape {
        op: "new_state",
        what: "values",
        expected: [1, shape.iter().product()],
        got,
    })
}

fn no_such_state(layer: usize, part: StatePart) -> Error {
    Error::Unsupported { backend: "reference", what: format!("{part:?} state of layer {layer}") }
}
