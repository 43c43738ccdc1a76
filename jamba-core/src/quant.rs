//! Weights in fewer bits: the formats that a backend can keep a model in, defined once for all
//! backends down to the byte.
//!
//! A [`WeightFormat`] is chosen for the whole model. [`WeightFormat::layout`] says what becomes of
//! each parameter: f32, as it is stored, or packed into a [`Quantized`] matrix with one of three
//! [`Packing`]s. Quantising is a pure function of one row: it does not depend on the machine, the
//! number of threads, or how the parameter is cut into parts.
//!
//! # Rules
//!
//! | parameter | `stored` | `experts-int8` | `int8` | `int4` |
//! |---|---|---|---|---|
//! | norms, biases, D, taps of the convolution, A | f32 | f32 | f32 | f32 |
//! | router | stored | stored | stored | stored |
//! | embedding, head | stored | stored | int8 blocks | int8 blocks |
//! | `x_proj`, `dt_proj` | stored | stored | int8 blocks | int8 blocks |
//! | other linears: `in_proj`, `out_proj`, `qkv_proj`, `o_proj` | stored | stored | int8 blocks | int4 blocks |
//! | experts, dense MLPs | stored | int8 rows | int8 blocks | int4 blocks |
//!
//! # Packings
//!
//! W `(rows, cols)` is kept as two arrays, both row-major, the first on a boundary of 64 bytes.
//! Where a row is cut into blocks of [`BLOCK`] along the input, the last block of a row may be
//! short: it is filled up with zeros, so that every row has whole blocks.
//!
//! | packing | quants of a row | scales of a row | bits a weight |
//! |---|---|---|---|
//! | [`Int8Row`](Packing::Int8Row) | `cols` i8 | one f32 | 8 |
//! | [`Int8Block`](Packing::Int8Block) | `blocks * 32` i8 | `blocks` bf16 | 8.5 |
//! | [`Int4Block`](Packing::Int4Block) | `blocks * 16` bytes | `blocks` bf16 | 4.5 |
//!
//! A byte of an int4 block holds two weights: byte j has weight j in its low four bits and weight
//! j + 16 in its high four bits, each as `q + 8`, 0 to 15; padding is 8, in bytes `0x88`.
//!
//! The weight is `q * scale`, which is exact in f32: q has at most 7 significant bits, a bf16 scale
//! 8, and the low 8 bits of an f32 scale are zero. Scales are zero, where all weights of the block
//! are, or normal numbers: no kernel need mind subnormals. Those of int8 are never negative, those
//! of int4 may be.
//!
//! # Rounding
//!
//! `q` is `w / scale`, divided in f32, rounded to the nearest integer, ties to even. For the scale,
//! let a be the largest magnitude of the block or row.
//!
//! - Int8 row: `a / 127`, rounded up to 16 significant bits.
//! - Int8 block: `a / m`, rounded up to bf16, for m of 127 and 126.
//! - Int4 block: `a / m`, rounded up to bf16, for the m of [`INT4_STEPS`], negative if the weight
//!   of magnitude a is positive (and the largest negative one smaller): q goes from -8 to 7, and the
//!   largest magnitude gets the longer side.
//!
//! Of the scales to choose from, those are left out that are subnormal, that take a q out of its
//! range (no weight is clipped), or that leave no q of magnitude 126 or 127 (7 or 8 in int4);
//! without any left, all q and the scale are zero. Of the others the one with the least squared
//! error is taken, the first among equals: f32 sums of `(w / scale - q)^2`, added in halves (weight
//! i with i + 16, then i + 8, ...), times the square of `scale / first scale`.
//!
//! Hence no weight is off by more than half a scale, and quantising what was dequantised gives the
//! same again.

mod block;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::pages::Pages;
use crate::tensor::{Dtype, Param, Role};

pub use block::INT4_STEPS;

/// Weights of a block, along the input.
pub const BLOCK: usize = 32;

/// Magnitude from which on a weight cannot be quantised.
pub const LIMIT: f32 = f32::from_bits((126 + 127) << 23);

/// How a backend keeps the weights of a model. The [rules](self#rules) say what that means for
/// each parameter.
///
/// ```
/// use jamba_core::{LanguageModel, Model, WeightFormat};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let backend = CpuBackend::new().with_format(WeightFormat::Int8);
/// let model = Model::load(folder, backend)?;
/// assert_eq!(model.weight_format(), WeightFormat::Int8);
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// Matrices as they are in the checkpoint: f32, f16 or bf16.
    #[default]
    Stored,
    /// Experts and dense MLPs in int8 with one scale per output channel, the rest as stored
    /// (ExpertsInt8, arXiv 2408.12570).
    ExpertsInt8,
    /// Every matrix but the router in int8 with a scale per 32 weights.
    Int8,
    /// Experts, MLPs and large linear maps in 4 bits with a scale per 32 weights, what is small or
    /// delicate as in [`Int8`](Self::Int8).
    Int4,
}

/// How one parameter is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// f32.
    F32,
    /// In the dtype of the checkpoint.
    Stored,
    /// As a [`Quantized`] matrix.
    Packed(Packing),
}

/// How a matrix is quantised. The [module](self#packings) has the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// int8 with an f32 scale per row.
    Int8Row,
    /// int8 in blocks with a bf16 scale each.
    Int8Block,
    /// 4 bits in blocks with a bf16 scale each.
    Int4Block,
}

impl WeightFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Stored, Self::ExpertsInt8, Self::Int8, Self::Int4];

    /// Its name, as [`FromStr`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::ExpertsInt8 => "experts-int8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// How a parameter of this role is kept: the [rules](self#rules).
    pub fn layout(self, role: Role) -> Layout {
        use Packing::{Int4Block, Int8Block, Int8Row};
        let packing = match (self, role) {
            (_, Role::Vector | Role::Conv | Role::A) => return Layout::F32,
            (Self::Stored, _) | (_, Role::Router) => return Layout::Stored,
            (Self::ExpertsInt8, Role::Experts | Role::Mlp) => Int8Row,
            (Self::ExpertsInt8, _) => return Layout::Stored,
            // Four bits would save x_proj and dt_proj little, and cost: docs/formats.md has figures.
            (Self::Int4, Role::Experts | Role::Mlp | Role::Linear) => Int4Block,
            (Self::Int8 | Self::Int4, _) => Int8Block,
        };
        Layout::Packed(packing)
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for WeightFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| Error::Option {
            option: "weight format",
            value: format!("`{name}`"),
            allowed: "it must be stored, experts-int8, int8 or int4",
        })
    }
}

impl Layout {
    /// Bytes of a matrix, scales and padding included; `stored` is the dtype of the checkpoint.
    pub fn bytes(self, [rows, cols]: [u64; 2], stored: Dtype) -> u64 {
        match self {
            Self::F32 => 4 * rows * cols,
            Self::Stored => stored.size() as u64 * rows * cols,
            Self::Packed(packing) => rows * packing.row_bytes(cols),
        }
    }
}

impl Packing {
    /// Bytes of the quants of a row.
    pub fn stride(self, cols: usize) -> usize {
        match self {
            Self::Int8Row => cols,
            Self::Int8Block => cols.next_multiple_of(BLOCK),
            Self::Int4Block => cols.next_multiple_of(BLOCK) / 2,
        }
    }

    /// Scales of a row.
    pub fn scales(self, cols: usize) -> usize {
        match self {
            Self::Int8Row => 1,
            Self::Int8Block | Self::Int4Block => cols.div_ceil(BLOCK),
        }
    }

    /// Bytes of a row, quants and scales.
    fn row_bytes(self, cols: u64) -> u64 {
        let blocks = cols.div_ceil(BLOCK as u64);
        match self {
            Self::Int8Row => cols + 4,
            Self::Int8Block => blocks * (BLOCK as u64 + 2),
            Self::Int4Block => blocks * (BLOCK as u64 / 2 + 2),
        }
    }
}

/// Scales of a [`Quantized`] matrix, row-major.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales<'a> {
    /// One per row.
    Rows(&'a [f32]),
    /// One per block, as the bits of bf16.
    Blocks(&'a [u16]),
}

/// A quantised matrix on the host, `(rows, cols)`.
pub struct Quantized {
    packing: Packing,
    shape: [usize; 2],
    quants: Pages<u8>,
    row_scales: Pages<f32>,
    block_scales: Pages<u16>,
}

impl Quantized {
    /// Quantises a parameter, all dimensions but the last being rows: row by row, on the threads of
    /// the current rayon pool, from where the parts are stored. Apart from the result it needs one
    /// row of f32 per thread.
    ///
    /// # Errors
    /// [`Error::WeightRange`] for a weight that is not finite, or of magnitude [`LIMIT`] and more;
    /// [`Error::Shape`] for parts that do not make up the parameter; [`Error::Memory`].
    pub fn new(param: &Param, packing: Packing) -> Result<Self> {
        let shape @ [rows, cols] = param.matrix_shape();
        let elements = |p: &crate::HostTensor| p.shape().iter().product::<usize>();
        let held = param.parts.iter().map(elements).sum();
        let whole_rows = cols == 0 || param.parts.iter().all(|p| elements(p).is_multiple_of(cols));
        if held != rows * cols || !whole_rows {
            let (expected, got) = (shape, [held, 1]);
            return Err(Error::Shape { op: "quantise", what: "parts", expected, got });
        }
        let (stride, scales) = (packing.stride(cols), packing.scales(cols));
        let by_row = packing == Packing::Int8Row;
        let mut all = Self {
            packing,
            shape,
            quants: zeros(rows * stride)?,
            row_scales: zeros(if by_row { rows } else { 0 })?,
            block_scales: zeros(if by_row { 0 } else { rows * scales })?,
        };
        if rows * cols == 0 {
            return Ok(all);
        }
        let mut first = 0;
        for part in &param.parts {
            let rows = elements(part) / cols;
            let quants = &mut all.quants[first * stride..(first + rows) * stride];
            let quants = quants.par_chunks_mut(stride).enumerate();
            // Filled up with zeros to whole blocks.
            let buffer = || vec![0.0; cols.next_multiple_of(BLOCK)];
            let read = |row: usize, to: &mut Vec<f32>| {
                part.read_f32(row * cols, &mut to[..cols]);
                block::check(&to[..cols]).map_err(|at| Error::WeightRange {
                    name: param.name.clone(),
                    row: first + row,
                    column: at,
                    value: to[at],
                })
            };
            match packing {
                Packing::Int8Row => {
                    let scales = all.row_scales[first..first + rows].par_iter_mut();
                    quants.zip(scales).try_for_each_init(buffer, |row, ((r, quants), scale)| {
                        read(r, row)?;
                        *scale = block::int8_row(&row[..cols], quants);
                        Ok(())
                    })
                }
                Packing::Int8Block | Packing::Int4Block => {
                    let of_part = &mut all.block_scales[first * scales..(first + rows) * scales];
                    let scales = of_part.par_chunks_mut(scales);
                    let (bytes, quantize) = match packing {
                        Packing::Int4Block => (BLOCK / 2, block::int4 as Quantize),
                        _ => (BLOCK, block::int8 as Quantize),
                    };
                    quants.zip(scales).try_for_each_init(buffer, |row, ((r, quants), scales)| {
                        read(r, row)?;
                        let blocks = row.as_chunks().0.iter().zip(quants.chunks_exact_mut(bytes));
                        for ((block, quants), scale) in blocks.zip(scales) {
                            *scale = quantize(block, quants);
                        }
                        Ok(())
                    })
                }
            }?;
            first += rows;
        }
        Ok(all)
    }

    /// How it is packed.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The quants of all rows, each [`stride`](Packing::stride) bytes; on a boundary of 64 bytes.
    pub fn quants(&self) -> &[u8] {
        &self.quants
    }

    /// The scales of all rows, [`Packing::scales`] each.
    pub fn scales(&self) -> Scales<'_> {
        match self.packing {
            Packing::Int8Row => Scales::Rows(&self.row_scales),
            Packing::Int8Block | Packing::Int4Block => Scales::Blocks(&self.block_scales),
        }
    }

    /// Bytes of quants and scales.
    pub fn bytes(&self) -> u64 {
        self.quants().len() as u64
            + 4 * self.row_scales.len() as u64
            + 2 * self.block_scales.len() as u64
    }

    /// The weights of a row, exact.
    ///
    /// # Panics
    /// If there is no such row, or `to` does not have its columns.
    pub fn dequantize_row(&self, row: usize, to: &mut [f32]) {
        let [rows, cols] = self.shape;
        assert!(row < rows && to.len() == cols, "row {row} of {rows}, {} of {cols}", to.len());
        let stride = self.packing.stride(cols);
        let quants = &self.quants()[row * stride..(row + 1) * stride];
        let scale = |block: usize| {
            let per_row = self.packing.scales(cols);
            f32::from_bits(u32::from(self.block_scales[row * per_row + block]) << 16)
        };
        match self.packing {
            Packing::Int8Row => {
                let scale = self.row_scales[row];
                let int8 = |&q: &u8| f32::from(q.cast_signed()) * scale;
                to.iter_mut().zip(quants).for_each(|(to, q)| *to = int8(q));
            }
            Packing::Int8Block => {
                for (b, to) in to.chunks_mut(BLOCK).enumerate() {
                    let scale = scale(b);
                    let quants = &quants[b * BLOCK..];
                    to.iter_mut()
                        .zip(quants)
                        .for_each(|(to, q)| *to = f32::from(q.cast_signed()) * scale);
                }
            }
            Packing::Int4Block => {
                for (b, to) in to.chunks_mut(BLOCK).enumerate() {
                    let scale = scale(b);
                    let bytes = &quants[b * BLOCK / 2..(b + 1) * BLOCK / 2];
                    let nibbles = bytes.iter().map(|q| q & 15).chain(bytes.iter().map(|q| q >> 4));
                    to.iter_mut()
                        .zip(nibbles)
                        .for_each(|(to, q)| *to = (f32::from(q) - 8.0) * scale);
                }
            }
        }
    }

    /// All weights, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut all = vec![0.0; rows * cols];
        if cols > 0 {
            let rows = all.chunks_exact_mut(cols).enumerate();
            rows.for_each(|(row, to)| self.dequantize_row(row, to));
        }
        all
    }
}

impl fmt::Debug for Quantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Quantized({:?} {:?})", self.packing, self.shape)
    }
}

/// Writes the quants of a block, and returns the bits of its scale.
type Quantize = fn(&[f32; BLOCK], &mut [u8]) -> u16;

fn zeros<T: bytemuck::Pod>(len: usize) -> Result<Pages<T>> {
    Pages::zeros("quantised weights", len)
}
