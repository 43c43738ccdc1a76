//! What a backend that computes on the host needs besides its operators: tensors, states, and the
//! scalar functions of the model.
//!
//! A backend whose tensors and parameters are [`Matrix`] and whose state is [`State`] writes
//! [`host_memory!()`](crate::host_memory) for all methods that move memory, and then its operators.
//! It is meant for backends that are read: plain loops in f32. Fast ones keep parameters in their
//! stored dtype and lay states out for their vectors.

use std::ops::{Deref, DerefMut, Range};

use crate::backend::{Cols, Limits, StatePart};
use crate::batch::Batch;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::schedule::{MixerKind, Schedule};
use crate::shape::{self, Shaped};
use crate::tensor::{Param, Role};

pub use crate::pages::Pages;

/// Zeros of the product of `sizes`; pages that are never written take no memory.
///
/// # Errors
/// [`Error::Memory`] if the machine does not have that much.
pub fn zeros(what: &'static str, sizes: &[usize]) -> Result<Vec<f32>> {
    let elements = sizes.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
    let bytes = elements.and_then(|n| n.checked_mul(size_of::<f32>()));
    match (elements, bytes) {
        // A larger vector than this does not exist, and asking for it would panic.
        (Some(n), Some(bytes)) if isize::try_from(bytes).is_ok() => {
            bytemuck::allocation::try_zeroed_vec(n).map_err(|()| Error::Memory {
                what,
                bytes: bytes as u64,
                available: None,
            })
        }
        _ => Err(Error::Memory { what, bytes: u64::MAX, available: None }),
    }
}

/// Activations or a parameter: row-major f32 values, and the rows that there is room for.
#[derive(Clone, Debug)]
pub struct Matrix {
    values: Vec<f32>,
    shape: [usize; 2],
    capacity: usize,
    role: Option<Role>,
}

impl Matrix {
    /// Activations for up to `rows` rows, of which none is in use.
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { values: Vec::new(), shape: [0, cols], capacity: rows, role: None }
    }

    /// A parameter, widened; all dimensions but the last are rows, a vector is one row.
    ///
    /// # Errors
    /// Those of [`shape::upload`].
    pub fn parameter(param: &Param) -> Result<Self> {
        let shape @ [capacity, _] = shape::upload(param)?;
        Ok(Self { values: param.to_f32(), shape, capacity, role: Some(param.role) })
    }

    /// Rows in use.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        (0..self.shape[0]).map(|r| self.row(r))
    }

    /// Rows in use, to be changed.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_exact_mut(self.shape[1].max(1))
    }

    /// One row in use.
    ///
    /// # Panics
    /// If it is not in use.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.values[r * self.shape[1]..(r + 1) * self.shape[1]]
    }

    /// Replaces all rows, row-major, and sets how many are in use.
    ///
    /// # Errors
    /// [`Error::Shape`] if these are no whole rows, or more than there is room for.
    pub fn set(&mut self, values: Vec<f32>) -> Result<()> {
        self.shape[0] = shape::write(values.len(), self.shape[1], self.capacity)?;
        self.values = values;
        Ok(())
    }
}

/// All values of the rows in use; of a vector its elements.
impl Deref for Matrix {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl DerefMut for Matrix {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Shaped for Matrix {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn role(&self) -> Option<Role> {
        self.role
    }
}

impl<'a> Cols<'a, Matrix> {
    /// The columns viewed of one row.
    pub fn row(&self, r: usize) -> &'a [f32] {
        &self.tensor.row(r)[self.cols.clone()]
    }

    /// The columns viewed of all rows in use.
    pub fn rows(&self) -> impl Iterator<Item = &'a [f32]> {
        (0..self.tensor.shape[0]).map(|r| self.row(r))
    }
}

/// One part of the state of one layer: `(slots, rows, columns)`, which is `(d_inner, d_conv - 1)`,
/// `(d_inner, d_state)`, or `(num_kv_heads, context * head_dim)` for each slot.
#[derive(Clone, Debug)]
pub struct Slots {
    values: Vec<f32>,
    shape: [usize; 2],
}

impl Slots {
    fn new(slots: usize, shape: [usize; 2]) -> Result<Self> {
        Ok(Self { values: zeros("states", &[slots, shape[0], shape[1]])?, shape })
    }

    /// Rows and columns of each slot.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// A row of a slot: a channel, or the positions of a head one after the other.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, slot: usize, row: usize) -> &[f32] {
        let [rows, cols] = self.shape;
        &self.values[(slot * rows + row) * cols..][..cols]
    }

    /// [`row`](Self::row), to be changed.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_mut(&mut self, slot: usize, row: usize) -> &mut [f32] {
        let [rows, cols] = self.shape;
        &mut self.values[(slot * rows + row) * cols..][..cols]
    }
}

/// Convolution and SSM states, KV cache and the staged batch, laid out as [`StatePart`] says.
#[derive(Clone, Debug)]
pub struct State {
    batch: Batch,
    config: Config,
    limits: Limits,
    layers: Vec<(MixerKind, [Slots; 2])>,
}

impl State {
    /// States of zeros.
    ///
    /// # Errors
    /// [`Error::Memory`] if the machine does not have as much.
    pub fn new(config: &Config, limits: &Limits) -> Result<Self> {
        let context = limits.context.saturating_mul(config.head_dim);
        let shapes = |mixer| match mixer {
            MixerKind::Mamba => [config.mamba_d_conv - 1, config.mamba_d_state]
                .map(|per_channel| [config.d_inner(), per_channel]),
            MixerKind::Attention => [[config.num_key_value_heads, context]; 2],
        };
        let layer = |mixer| {
            let [first, second] = shapes(mixer);
            Ok((mixer, [Slots::new(limits.slots, first)?, Slots::new(limits.slots, second)?]))
        };
        let schedule = Schedule::new(config);
        let layers = schedule.iter().map(|kind| layer(kind.mixer)).collect::<Result<_>>()?;
        Ok(Self { batch: Batch::new(), config: config.clone(), limits: *limits, layers })
    }

    /// The staged batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Makes `batch` the staged one.
    pub fn stage(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    /// What an operator of a layer works on: the configuration, the staged batch, and the
    /// convolution and SSM states, or the keys and values.
    ///
    /// # Errors
    /// [`Error::Layer`] if the layer is not of this kind.
    pub fn layer(
        &mut self,
        layer: usize,
        mixer: MixerKind,
    ) -> Result<(&Config, &Batch, &mut [Slots; 2])> {
        match self.layers.get_mut(layer) {
            Some((kind, parts)) if *kind == mixer => Ok((&self.config, &self.batch, parts)),
            _ => Err(Error::Layer { layer, what: format!("{mixer:?} state") }),
        }
    }

    /// See [`Backend::reset_slot`](crate::Backend::reset_slot).
    ///
    /// # Errors
    /// [`Error::Batch`] if there is no such slot.
    pub fn reset(&mut self, slot: usize) -> Result<()> {
        shape::state(&self.limits, slot, &(0..0))?;
        for (kind, parts) in &mut self.layers {
            if *kind == MixerKind::Mamba {
                for part in parts {
                    let [rows, _] = part.shape;
                    (0..rows).for_each(|row| part.row_mut(slot, row).fill(0.0));
                }
            }
        }
        Ok(())
    }

    /// See [`Backend::read_state`](crate::Backend::read_state).
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::Batch`] or [`Error::Context`] if there is no such state.
    pub fn read(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        let index = self.part(layer, part, slot, &positions)?;
        let slots = &self.layers[layer].1[index];
        let used = self.used(part, slots, positions);
        let rows = (0..slots.shape[0]).map(|row| &slots.row(slot, row)[used.clone()]);
        Ok(rows.flatten().copied().collect())
    }

    /// See [`Backend::write_state`](crate::Backend::write_state).
    ///
    /// # Errors
    /// Those of [`read`](Self::read); [`Error::Shape`] if these are not as many values.
    pub fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        let index = self.part(layer, part, slot, &positions)?;
        let used = self.used(part, &self.layers[layer].1[index], positions);
        let slots = &mut self.layers[layer].1[index];
        let (rows, cols) = (slots.shape[0], used.len());
        if values.len() != rows * cols {
            let (expected, got) = ([1, rows * cols], [1, values.len()]);
            return Err(Error::Shape { op: "write_state", what: "values", expected, got });
        }
        for row in 0..rows {
            let values = &values[row * cols..(row + 1) * cols];
            slots.row_mut(slot, row)[used.clone()].copy_from_slice(values);
        }
        Ok(())
    }

    /// Columns of a row that `positions` take.
    fn used(&self, part: StatePart, slots: &Slots, positions: Range<usize>) -> Range<usize> {
        let width = self.config.head_dim;
        match part {
            StatePart::Conv | StatePart::Ssm => 0..slots.shape[1],
            StatePart::Keys | StatePart::Values => positions.start * width..positions.end * width,
        }
    }

    /// The index of a part among those of its layer.
    fn part(
        &self,
        layer: usize,
        part: StatePart,
        slot: usize,
        positions: &Range<usize>,
    ) -> Result<usize> {
        shape::state(&self.limits, slot, positions)?;
        match (self.layers.get(layer).map(|(kind, _)| *kind), part) {
            (Some(MixerKind::Mamba), StatePart::Conv)
            | (Some(MixerKind::Attention), StatePart::Keys) => Ok(0),
            (Some(MixerKind::Mamba), StatePart::Ssm)
            | (Some(MixerKind::Attention), StatePart::Values) => Ok(1),
            _ => Err(Error::Layer { layer, what: format!("{part:?} state") }),
        }
    }
}

/// The sum of products.
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// `x sigmoid(x)`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`, and x itself above 20 as in PyTorch.
pub fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// `exp(x_i) / sum_j exp(x_j)`, in place.
pub fn softmax(x: &mut [f32]) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|v| *v = (*v - largest).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|v| *v /= sum);
}

/// `x / sqrt(mean(x^2) + eps) * weight`, in place.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = (dot(x, x) / x.len() as f32 + eps).sqrt().recip();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
}

/// The `top_k` experts of largest logit, of equal ones the lower first, each with its probability
/// among *all* experts: see [`Backend::moe_experts`](crate::Backend::moe_experts).
pub fn route(logits: &[f32], top_k: usize) -> impl Iterator<Item = (usize, f32)> {
    let mut p = logits.to_vec();
    softmax(&mut p);
    let mut order: Vec<usize> = (0..p.len()).collect();
    // Stable: of equal logits the lower index stays first.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.into_iter().take(top_k).map(move |e| (e, p[e]))
}

/// The methods of [`Backend`](crate::Backend) that move memory, for one whose tensors and
/// parameters are [`Matrix`](crate::host::Matrix) and whose state is [`State`](crate::host::State):
/// within its `impl`.
#[macro_export]
macro_rules! host_memory {
    () => {
        type Tensor = $crate::host::Matrix;
        type Weight = $crate::host::Matrix;
        type State = $crate::host::State;

        fn upload(&self, param: $crate::Param) -> $crate::Result<$crate::host::Matrix> {
            $crate::host::Matrix::parameter(&param)
        }

        fn alloc(&self, rows: usize, cols: usize) -> $crate::Result<$crate::host::Matrix> {
            Ok($crate::host::Matrix::new(rows, cols))
        }

        fn write(&self, dst: &mut $crate::host::Matrix, src: &[f32]) -> $crate::Result<()> {
            dst.set(src.to_vec())
        }

        fn read(&self, src: $crate::Cols<'_, $crate::host::Matrix>) -> $crate::Result<Vec<f32>> {
            $crate::shape::read(&src)?;
            Ok(src.rows().flatten().copied().collect())
        }

        fn shape(&self, tensor: &$crate::host::Matrix) -> [usize; 2] {
            $crate::shape::Shaped::shape(tensor)
        }

        fn new_state(
            &self,
            config: &$crate::Config,
            limits: &$crate::Limits,
        ) -> $crate::Result<$crate::host::State> {
            $crate::host::State::new(config, limits)
        }

        fn reset_slot(&self, state: &mut $crate::host::State, slot: usize) -> $crate::Result<()> {
            state.reset(slot)
        }

        fn read_state(
            &self,
            state: &$crate::host::State,
            layer: usize,
            part: $crate::StatePart,
            slot: usize,
            positions: ::std::ops::Range<usize>,
        ) -> $crate::Result<Vec<f32>> {
            state.read(layer, part, slot, positions)
        }

        fn write_state(
            &self,
            state: &mut $crate::host::State,
            layer: usize,
            part: $crate::StatePart,
            slot: usize,
            positions: ::std::ops::Range<usize>,
            values: &[f32],
        ) -> $crate::Result<()> {
            state.write(layer, part, slot, positions, values)
        }

        fn stage(
            &self,
            state: &mut $crate::host::State,
            batch: &$crate::Batch,
        ) -> $crate::Result<()> {
            state.stage(batch);
            Ok(())
        }
    };
}
