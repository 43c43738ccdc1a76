//! The step: blocks with the residual between layers fused, and decode steps as graphs.
//!
//! A step of one token in each run launches the same kernels with the same arguments again and
//! again: ids, positions and slots are read from the staged batch, lengths too. From the second
//! step of so many sequences on, it is a graph, which the host launches at once, and the card
//! starts kernels without waiting for the host. There is a graph for each number of sequences,
//! without padding, and so with the bits of the step launched kernel by kernel.

use jamba_core::backend::{Backend, Scratch};
use jamba_core::compose;
use jamba_core::shape::Shaped;
use jamba_core::weights::{FeedForward, Mixer, Weights};
use jamba_core::{Config, Result};

use crate::backend::CudaBackend;
use crate::blocks::{self, Begin};
use crate::device::Graph;
use crate::profile;
use crate::prompt;
use crate::state::State;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// Graphs of a state at most; the one that was used longest ago makes room.
const KEPT: usize = 256;

/// The decode steps that were met, and their graphs.
#[derive(Default)]
pub(crate) struct Graphs {
    /// The latest used last.
    met: Vec<Met>,
}

/// A decode step that was met.
struct Met {
    key: Vec<u64>,
    /// From the second time on.
    graph: Option<Graph>,
    /// Rows in use that the step leaves in the tensors of the scratch.
    rows: [usize; TENSORS],
}

/// The step, as a graph where it is one that was met before.
pub(crate) fn forward(
    b: &CudaBackend,
    config: &Config,
    w: &Weights<Weight>,
    s: &mut Scratch<Tensor>,
    state: &mut State,
) -> Result<()> {
    if prompt::is_for(b, config, w, state) {
        return prompt::forward(b, config, w, s, state);
    }
    if !state.batch.is_decode() || profile::is_on() {
        return run(b, config, w, s, state);
    }
    // What a graph leaves to its callers.
    state.batch.check_ids(w.embed_tokens.shape()[0])?;
    let found = {
        // Held until the graph is launched, so that nobody replaces a workspace before.
        let workspaces = b.workspaces();
        let key = key(config, w, s, state, workspaces.ids());
        let found = state.graphs.met.iter().position(|met| met.key == key);
        let met = match found {
            Some(at) => state.graphs.met.remove(at),
            None => Met { key, graph: None, rows: [0; TENSORS] },
        };
        if let Some(graph) = &met.graph {
            b.device.replay(graph)?;
            tensors(s).into_iter().zip(met.rows).try_for_each(|(t, n)| t.resize("forward", n))?;
            state.graphs.met.push(met);
            return Ok(());
        }
        state.graphs.make_room();
        state.graphs.met.push(met);
        found
    };
    if found.is_none() {
        // All memory is allocated and all algorithms are chosen once this has run.
        return run(b, config, w, s, state);
    }
    let Some(graph) = b.device.capture(|| run(b, config, w, s, state))? else {
        // The next such step tries again.
        return run(b, config, w, s, state);
    };
    let rows = tensors(s).map(|t| t.rows());
    let workspaces = b.workspaces();
    let key = key(config, w, s, state, workspaces.ids());
    if let Some(met) = state.graphs.met.last_mut()
        && met.key == key
    {
        b.device.replay(&graph)?;
        (met.graph, met.rows) = (Some(graph), rows);
        return Ok(());
    }
    // Another runner took a workspace of another size meanwhile.
    drop(workspaces);
    state.graphs.met.pop();
    run(b, config, w, s, state)
}

impl Graphs {
    fn make_room(&mut self) {
        if self.met.len() >= KEPT {
            self.met.remove(0);
        }
    }
}

/// Everything that decides what a decode step launches: sizes, and the allocations whose addresses
/// are in its kernels' arguments. (Those of the state are always the same.)
fn key(
    config: &Config,
    w: &Weights<Weight>,
    s: &mut Scratch<Tensor>,
    state: &State,
    workspaces: impl Iterator<Item = u64>,
) -> Vec<u64> {
    let batch = &state.batch;
    let sizes = [batch.tokens, batch.outputs, config.num_experts_per_tok];
    let mut key = sizes.map(|size| size as u64).to_vec();
    key.push(config.rms_norm_eps.to_bits().into());
    key.extend(workspaces);
    key.extend(tensors(s).map(|t| t.buffer().id()));
    w.for_each(|weight| key.push(weight.id()));
    key
}

const TENSORS: usize = 16;

fn tensors(s: &mut Scratch<Tensor>) -> [&mut Tensor; TENSORS] {
    let Scratch {
        hidden,
        normed,
        block_out,
        xz,
        conv_out,
        x_dbl,
        dt,
        y,
        qkv,
        context,
        router_logits,
        gate_up,
        act,
        output_hidden,
        output_normed,
        logits,
    } = s;
    [
        hidden,
        normed,
        block_out,
        xz,
        conv_out,
        x_dbl,
        dt,
        y,
        qkv,
        context,
        router_logits,
        gate_up,
        act,
        output_hidden,
        output_normed,
        logits,
    ]
}

/// The step kernel by kernel. The residual after a block and the norm before the next are one
/// kernel, or part of the product that the next begins with; else it is what [`compose::forward`] does, to the bit.
fn run(
    b: &CudaBackend,
    config: &Config,
    w: &Weights<Weight>,
    s: &mut Scratch<Tensor>,
    state: &mut State,
) -> Result<()> {
    let eps = config.rms_norm_eps;
    b.embed(&w.embed_tokens, state, &mut s.hidden)?;
    let stream = s.hidden.buffer().id();
    for (index, layer) in w.layers.iter().enumerate() {
        let begin = Begin::Norm { weight: &layer.input_layernorm, eps, adds: index > 0 };
        match &layer.mixer {
            Mixer::Mamba(w) => blocks::mamba_mixer(b, config, w, index, s, state, begin)?,
            Mixer::Attention(w) => {
                begin.norm(b, s)?;
                b.attention_block(config, w, index, s, state)?;
            }
        }
        let begin = Begin::Norm { weight: &layer.pre_ff_layernorm, eps, adds: true };
        match &layer.feed_forward {
            FeedForward::Mlp(w) => blocks::mlp(b, w, s, begin)?,
            FeedForward::Moe(w) => {
                begin.norm(b, s)?;
                b.moe_ffn(config, w, index, s)?;
            }
        }
    }
    if s.hidden.buffer().id() == stream {
        if !w.layers.is_empty() {
            b.add_assign(&mut s.hidden, &s.block_out)?;
        }
    } else {
        // A step ends with the tensors where they were when it began, as a graph of it does.
        b.elementwise.add(&b.device, &s.hidden, &s.block_out, &mut s.normed)?;
        std::mem::swap(&mut s.hidden, &mut s.normed);
    }
    compose::head(b, config, w, s, state)
}
