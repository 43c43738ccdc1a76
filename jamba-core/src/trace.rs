//! Named activations of every step, for whoever checks numerics.

use std::fmt;
use std::sync::Mutex;

use crate::backend::{Backend, Cols, Scratch};
use crate::compose;
use crate::config::Config;
use crate::delegate_backend;
use crate::error::Result;
use crate::weights::{Attention, Mamba, Mlp, Moe};

/// Name of an activation: `embed`, `layers.3.mamba.scan`, `logits`, ...
///
/// Per model: `embed`, `final_norm`, `logits` (both of the rows whose logits were asked for). Per
/// layer: `input_norm`, `mamba.{in_proj,conv,dt,B,C,scan,out}`, `attn.{q,k,v,context,out}`,
/// `ff_norm`, `moe.router_logits`, `ff`, `out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Activation {
    /// Layer it belongs to, if any.
    pub layer: Option<usize>,
    /// Name within the layer or the model.
    pub name: &'static str,
}

impl Activation {
    /// An activation of the whole model.
    pub fn model(name: &'static str) -> Self {
        Self { layer: None, name }
    }

    /// An activation of a layer.
    pub fn layer(layer: usize, name: &'static str) -> Self {
        Self { layer: Some(layer), name }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layers.{layer}.{}", self.name),
            None => f.write_str(self.name),
        }
    }
}

/// Gets named activations: the name, (rows, columns), and the values row-major.
pub type Listener<'a> = dyn FnMut(Activation, [usize; 2], &[f32]) + Send + 'a;

/// How much of a step is visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Every operator: blocks run as the composition of operators, even where the backend fuses.
    Operators,
    /// Blocks run as the backend runs them; activations inside a fused block are not seen.
    Blocks,
}

/// A backend whose activations are listened to.
pub struct Traced<'a, B> {
    inner: &'a B,
    detail: Detail,
    listener: Mutex<&'a mut Listener<'a>>,
}

impl<'a, B: Backend> Traced<'a, B> {
    /// Listens to `inner`.
    pub fn new(inner: &'a B, detail: Detail, listener: &'a mut Listener<'a>) -> Self {
        Self { inner, detail, listener: Mutex::new(listener) }
    }
}

impl<B: Backend> Backend for Traced<'_, B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type State = B::State;

    delegate_backend!(|this| *this.inner; operators);

    fn mamba_mixer(
        &self,
        config: &Config,
        weights: &Mamba<B::Weight>,
        layer: usize,
        scratch: &mut Scratch<B::Tensor>,
        state: &mut B::State,
    ) -> Result<()> {
        match self.detail {
            Detail::Operators => compose::mamba_mixer(self, config, weights, layer, scratch, state),
            Detail::Blocks => self.inner.mamba_mixer(config, weights, layer, scratch, state),
        }
    }

    fn attention_block(
        &self,
        config: &Config,
        weights: &Attention<B::Weight>,
        layer: usize,
        scratch: &mut Scratch<B::Tensor>,
        state: &mut B::State,
    ) -> Result<()> {
        match self.detail {
            Detail::Operators => {
                compose::attention_block(self, config, weights, layer, scratch, state)
            }
            Detail::Blocks => self.inner.attention_block(config, weights, layer, scratch, state),
        }
    }

    fn mlp(&self, weights: &Mlp<B::Weight>, scratch: &mut Scratch<B::Tensor>) -> Result<()> {
        match self.detail {
            Detail::Operators => compose::mlp(self, weights, scratch),
            Detail::Blocks => self.inner.mlp(weights, scratch),
        }
    }

    fn moe_ffn(
        &self,
        config: &Config,
        weights: &Moe<B::Weight>,
        layer: usize,
        scratch: &mut Scratch<B::Tensor>,
    ) -> Result<()> {
        match self.detail {
            Detail::Operators => compose::moe_ffn(self, config, weights, layer, scratch),
            Detail::Blocks => self.inner.moe_ffn(config, weights, layer, scratch),
        }
    }

    fn add_rms_norm(
        &self,
        weight: &B::Weight,
        eps: f32,
        scratch: &mut Scratch<B::Tensor>,
    ) -> Result<()> {
        match self.detail {
            Detail::Operators => compose::add_rms_norm(self, weight, eps, scratch),
            Detail::Blocks => self.inner.add_rms_norm(weight, eps, scratch),
        }
    }

    fn observe(&self, at: Activation, x: Cols<'_, B::Tensor>) -> Result<()> {
        let shape = [self.inner.shape(x.tensor)[0], x.cols.len()];
        let values = self.inner.read(x)?;
        let mut listener = self.listener.lock().unwrap_or_else(|e| e.into_inner());
        listener(at, shape, &values);
        Ok(())
    }
}
