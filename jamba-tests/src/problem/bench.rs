//! Drawing inputs, and getting tensors to a backend and back.

use jamba_core::quant::BLOCK;
use jamba_core::recording::{Recorded, Recording};
use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{Backend, Cols, Config, HostTensor, Limits, Param, Result, Role, StatePart};
use proptest::prelude::*;

use super::ragged::Ragged;
use crate::precision::{Format, Numbers, Precision};
use crate::random::Random;

/// Inputs under construction, each from the seed and its own name.
pub(crate) struct Draw {
    seed: u64,
    pub(crate) precision: Precision,
    pub(crate) inputs: Recording,
}

impl Draw {
    pub(crate) fn new(seed: u32, precision: Precision) -> Self {
        Self { seed: seed.into(), precision, inputs: Recording::default() }
    }

    /// Values of any distribution, as given.
    pub(crate) fn exact(
        &mut self,
        name: &str,
        shape: &[usize],
        mut value: impl FnMut(&mut Random, usize) -> f32,
    ) {
        let mut random = Random::new(self.seed, name);
        let n: usize = shape.iter().product();
        let values = (0..n).map(|i| value(&mut random, i)).collect();
        self.inputs.tensors.insert(name.into(), Recorded { shape: shape.to_vec(), values });
    }

    /// Activations: rounded as the backend will.
    pub(crate) fn activations(
        &mut self,
        name: &str,
        shape: [usize; 2],
        mut value: impl FnMut(&mut Random) -> f32,
    ) {
        let precision = self.precision;
        self.exact(name, &shape, |r, _| precision.round(value(r)));
    }

    /// Makes activations, from column `start` on in these many, values that 8 bits with a scale for
    /// each 32 can hold: of a block the first is 127 steps, the others are fewer. bf16 holds them too.
    pub(crate) fn on_int8_grid(&mut self, name: &str, start: usize, cols: usize) {
        let drawn = self.inputs.tensors.get_mut(name).expect("just drawn");
        let width = drawn.shape[1].max(1);
        for row in drawn.values.chunks_exact_mut(width) {
            for block in row[start..start + cols].chunks_mut(BLOCK) {
                let largest = block.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
                let step = (largest / 127.0).log2().ceil().exp2();
                block.iter_mut().for_each(|v| *v = (*v / step).round() * step);
                block[0] = 127.0 * step;
            }
        }
    }

    /// A matrix of values that its format can hold, whose products with rows of deviation 1 have
    /// deviation 1; a table of deviation 1.
    pub(crate) fn matrix(&mut self, role: Role, name: &str, shape: &[usize], format: Format) {
        let cols = shape[shape.len() - 1];
        let fan_in = if role == Role::Embedding { 1.0 } else { (cols as f32).sqrt().recip() };
        self.exact(name, shape, |r, _| fan_in * r.normal());
        let drawn = self.inputs.tensors.get_mut(name).expect("just drawn");
        format.round(role, cols, &mut drawn.values);
    }

    /// Weights of a norm.
    pub(crate) fn norm(&mut self, name: &str, n: usize) {
        self.exact(name, &[n], |r, _| 1.0 + 0.1 * r.normal());
    }

    /// What the slots hold before the step: `state.LAYER.PART.SLOT`.
    pub(crate) fn states(&mut self, config: &Config, ragged: &Ragged) {
        for (layer, part) in parts(config) {
            for slot in 0..ragged.slots {
                let past = ragged.past(slot);
                if past > 0 {
                    let precision =
                        if part == StatePart::Ssm { Precision::F32 } else { self.precision };
                    let shape = part_shape(config, part, past);
                    self.exact(&state_name(layer, part, slot), &shape, |r, _| {
                        precision.round(r.normal())
                    });
                }
            }
        }
    }
}

/// The states of the model's layers.
pub(crate) fn parts(config: &Config) -> Vec<(usize, StatePart)> {
    let of = |kind| match kind {
        MixerKind::Mamba => [StatePart::Conv, StatePart::Ssm],
        MixerKind::Attention => [StatePart::Keys, StatePart::Values],
    };
    let layers = Schedule::new(config);
    let layers = layers.iter().enumerate();
    layers.flat_map(|(layer, kind)| of(kind.mixer).map(|part| (layer, part))).collect()
}

pub(crate) fn part_shape(config: &Config, part: StatePart, positions: usize) -> Vec<usize> {
    match part {
        StatePart::Conv => vec![config.d_inner(), config.mamba_d_conv - 1],
        StatePart::Ssm => vec![config.d_inner(), config.mamba_d_state],
        StatePart::Keys | StatePart::Values => {
            vec![config.num_key_value_heads, positions, config.head_dim]
        }
    }
}

pub(crate) fn state_name(layer: usize, part: StatePart, slot: usize) -> String {
    format!("state.{layer}.{}.{slot}", part_name(part))
}

/// As in traces: `conv`, `ssm`, `k`, `v`.
pub(crate) fn part_name(part: StatePart) -> &'static str {
    match part {
        StatePart::Conv => "conv",
        StatePart::Ssm => "ssm",
        StatePart::Keys => "k",
        StatePart::Values => "v",
    }
}

/// Limits for a problem: one slot more than it uses.
pub(crate) fn limits(ragged: &Ragged) -> Limits {
    let tokens = ragged.tokens().max(1);
    Limits { slots: ragged.slots + 1, context: ragged.context(), tokens, outputs: tokens }
}

/// A state that holds what `inputs` say. Positions of the KV cache beyond hold nonsense.
pub(crate) fn state<B: Backend>(
    b: &B,
    config: &Config,
    ragged: &Ragged,
    inputs: &Recording,
) -> Result<B::State> {
    let limits = limits(ragged);
    let mut state = b.new_state(config, &limits)?;
    for (layer, part) in parts(config) {
        for slot in 0..ragged.slots {
            let past = ragged.past(slot);
            if matches!(part, StatePart::Keys | StatePart::Values) {
                let nonsense = vec![512.0; limits.context * config.kv_width()];
                b.write_state(&mut state, layer, part, slot, 0..limits.context, &nonsense)?;
            }
            if let Some(values) = inputs.tensors.get(&state_name(layer, part, slot)) {
                b.write_state(&mut state, layer, part, slot, 0..past, &values.values)?;
            }
        }
    }
    Ok(state)
}

/// All states of the slots, each holding so many tokens, into `out`.
pub(crate) fn read_states<B: Backend>(
    b: &B,
    config: &Config,
    state: &B::State,
    held: impl IntoIterator<Item = (usize, usize)>,
    out: &mut Recording,
) -> Result<()> {
    let parts = parts(config);
    for (slot, positions) in held {
        for &(layer, part) in &parts {
            let values = b.read_state(state, layer, part, slot, 0..positions)?;
            let recorded = Recorded { shape: part_shape(config, part, positions), values };
            out.tensors.insert(state_name(layer, part, slot), recorded);
        }
    }
    Ok(())
}

/// The tokens that each slot holds after the step.
pub(crate) fn held_after(ragged: &Ragged) -> Vec<(usize, usize)> {
    let len = |slot| ragged.seqs.iter().find(|s| s.slot == slot).map_or(0, |s| s.len);
    (0..ragged.slots).map(|slot| (slot, ragged.past(slot) + len(slot))).collect()
}

/// Activations on the backend, in a tensor of one row more.
pub(crate) fn tensor<B: Backend>(b: &B, from: &Recorded) -> Result<B::Tensor> {
    let [rows, cols] = from.shape[..] else { panic!("activations are (rows, columns)") };
    let mut tensor = b.alloc(rows + 1, cols)?;
    b.write(&mut tensor, &from.values)?;
    Ok(tensor)
}

/// Some rows of some activations.
pub(crate) fn gather(
    from: &Recorded,
    rows: impl IntoIterator<Item = std::ops::Range<usize>>,
) -> Recorded {
    let cols = from.shape[1];
    let values: Vec<f32> = rows
        .into_iter()
        .flat_map(|r| &from.values[r.start * cols..r.end * cols])
        .copied()
        .collect();
    Recorded { shape: vec![values.len() / cols, cols], values }
}

/// A tensor to write to, full of NaN: what is not written is found.
pub(crate) fn output<B: Backend>(b: &B, rows: usize, cols: usize) -> Result<B::Tensor> {
    let mut tensor = b.alloc(rows + 1, cols)?;
    poison(b, &mut tensor, rows + 1)?;
    Ok(tensor)
}

/// Makes `rows` rows of a tensor NaN.
pub(crate) fn poison<B: Backend>(b: &B, tensor: &mut B::Tensor, rows: usize) -> Result<()> {
    let cols = b.shape(tensor)[1];
    b.write(tensor, &vec![f32::NAN; rows * cols])
}

/// The rows in use.
pub(crate) fn read<B: Backend>(b: &B, tensor: &B::Tensor) -> Result<Recorded> {
    let shape = b.shape(tensor);
    let values = b.read(Cols { tensor, cols: 0..shape[1] })?;
    Ok(Recorded { shape: shape.to_vec(), values })
}

/// A matrix on the backend, in pieces of about equal height.
pub(crate) fn matrix<B: Backend>(
    b: &B,
    role: Role,
    inputs: &Recording,
    name: &str,
    format: Format,
    pieces: usize,
) -> Result<B::Weight> {
    let from = &inputs.tensors[name];
    let cols = from.shape[from.shape.len() - 1];
    let rows = from.values.len() / cols;
    let parts: Vec<HostTensor> = from
        .values
        .chunks(rows.div_ceil(pieces.max(1)) * cols)
        .map(|piece| format.store(vec![piece.len() / cols, cols], piece))
        .collect();
    b.upload(Param { name: name.into(), role, shape: from.shape.clone(), parts })
}

/// A vector, taps or A on the backend, stored as f32.
pub(crate) fn vector<B: Backend>(
    b: &B,
    role: Role,
    inputs: &Recording,
    name: &str,
) -> Result<B::Weight> {
    let from = &inputs.tensors[name];
    let tensor = HostTensor::from_f32(from.shape.clone(), from.values.clone());
    b.upload(Param::new(name, role, tensor))
}

/// A result of one tensor, `out`.
pub(crate) fn only(out: Recorded) -> Recording {
    Recording { tensors: [("out".to_owned(), out)].into() }
}

/// Widths about the vectors of real machines: none a multiple of more than it must be.
pub(crate) fn width(max: usize) -> BoxedStrategy<usize> {
    let near = prop::sample::select(vec![15usize, 16, 17, 31, 32, 33, 63, 65, 127, 129]);
    prop_oneof![3 => 3..=max, 2 => near.prop_map(move |n| n.min(max))].boxed()
}

pub(crate) fn format(numbers: &Numbers) -> impl Strategy<Value = Format> + Clone + use<> {
    prop::sample::select(numbers.formats.clone())
}

pub(crate) fn eps() -> impl Strategy<Value = f32> + Clone {
    prop::sample::select(vec![1e-6f32, 1e-5, 1e-2])
}
