//! Activations in the forms in which they are multiplied.

use std::cell::Cell;
use std::ops::Range;

use half::bf16;
use jamba_core::Precision;
#[cfg(target_arch = "x86_64")]
use jamba_core::quant::BLOCK;

#[cfg(target_arch = "x86_64")]
use crate::columns::for_each_rows;
use crate::columns::parallel;
use crate::linear::Products;
use crate::packed::{Activations, Group};
use crate::simd::Isa;
#[cfg(target_arch = "x86_64")]
use crate::simd::{
    Amx, Avx512Bf16,
    amx::{self, Chunk, Fours, Pairs},
};
use crate::tensor::View;
use crate::weight::Weight;

/// Rows of x from which on quantised rows of W are unpacked into tiles.
#[cfg(target_arch = "x86_64")]
const LEAST_FOURS: usize = 24;

/// Activations that are to be multiplied, in the forms that the kernels want.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) f32: View<'a>,
    pub(crate) bf16: Option<View<'a, bf16>>,
    /// Of [`bf16`](Self::bf16), for tiles.
    #[cfg(target_arch = "x86_64")]
    pub(crate) pairs: Option<Pairs<'a>>,
    pub(crate) int8: Option<Rounded<'a>>,
    /// Of [`int8`](Self::int8), for tiles: the groups that are large enough.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fours: Option<Fours<'a>>,
}

/// Rows rounded to int8: of all, or of those of `index`, the ones from number `first` on.
#[derive(Clone, Copy)]
pub(crate) struct Rounded<'a> {
    all: &'a Activations,
    index: Option<&'a [usize]>,
    first: usize,
}

impl<'a> Rounded<'a> {
    fn range(self, rows: Range<usize>) -> Self {
        Self { first: self.first + rows.start, ..self }
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [Group] {
        let row = self.first + row;
        self.all.row(self.index.map_or(row, |index| index[row]))
    }
}

impl<'a> Operand<'a> {
    /// The rows in this range, which begins and ends with a group or is a panel of one.
    pub(crate) fn range(self, rows: Range<usize>) -> Self {
        Self {
            f32: self.f32.range(rows.clone()),
            bf16: self.bf16.map(|x| x.range(rows.clone())),
            #[cfg(target_arch = "x86_64")]
            pairs: self.pairs.map(|x| x.range(rows.clone())),
            #[cfg(target_arch = "x86_64")]
            fours: self.fours.map(|x| x.range(rows.clone())),
            int8: self.int8.map(|x| x.range(rows)),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.f32.rows
    }
}

impl Products {
    /// Calls `f` with x in the form in which it is multiplied with `weight`. Its rows are of groups,
    /// each of which ends at one of `ends`, that are multiplied with different rows of it.
    pub(crate) fn prepare<R>(
        self,
        x: View<'_>,
        ends: &[usize],
        weight: &Weight,
        f: impl FnOnce(Operand<'_>) -> R,
    ) -> R {
        thread_local! {
            // Taken out while it is used: another session may run on this thread meanwhile.
            static INTEGERS: Cell<Activations> = Cell::default();
        }
        let plain = Operand {
            f32: x,
            bf16: None,
            #[cfg(target_arch = "x86_64")]
            pairs: None,
            int8: None,
            #[cfg(target_arch = "x86_64")]
            fours: None,
        };
        if self.precision != Precision::Bf16 {
            return f(plain);
        }
        // Every row once, however many groups it is in.
        let (all, index) = x.all();
        let len = all.rows * all.cols;
        if weight.is_packed() {
            let mut integers = INTEGERS.take();
            integers.resize(all.rows, all.cols);
            integers.round(self.isa, all.rows, len >= parallel::PRODUCTS / 4, |row| all.row(row));
            let rounded = Rounded { all: &integers, index, first: 0 };
            let plain = Operand { int8: Some(rounded), ..plain };
            let result = match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx(tiles) => packed_fours(tiles, rounded, all.cols, ends, |fours| {
                    f(Operand { fours: Some(fours), ..plain })
                }),
                _ => f(plain),
            };
            INTEGERS.set(integers);
            return result;
        }
        if !weight.has_bf16() {
            return f(plain);
        }
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(tiles) => rounded(tiles.vectors(), all, |rows| {
                let bf16 = index.map_or(rows, |index| rows.select(index));
                match tiles.takes(all.cols) {
                    true => packed_pairs(tiles, bf16, ends, |pairs| {
                        f(Operand { bf16: Some(bf16), pairs: Some(pairs), ..plain })
                    }),
                    false => f(Operand { bf16: Some(bf16), ..plain }),
                }
            }),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(s) => rounded(s, all, |rows| {
                let bf16 = Some(index.map_or(rows, |index| rows.select(index)));
                f(Operand { bf16, ..plain })
            }),
            _ => f(plain),
        }
    }
}

/// Calls `f` with rows rounded to bf16.
#[cfg(target_arch = "x86_64")]
fn rounded<R>(s: Avx512Bf16, x: View<'_>, f: impl FnOnce(View<'_, bf16>) -> R) -> R {
    thread_local! {
        static ROUNDED: Cell<Vec<bf16>> = const { Cell::new(Vec::new()) };
    }
    let mut buffer = ROUNDED.take();
    // Rows begin on a cache line.
    let stride = x.cols.next_multiple_of(32);
    let rows = aligned(&mut buffer, x.rows * stride);
    let parallel = rows.len() >= parallel::PRODUCTS;
    for_each_rows(rows, stride, 16, parallel, |first, rows| {
        for (r, to) in rows.chunks_exact_mut(stride).enumerate() {
            s.round(x.row(first + r), &mut to[..x.cols]);
        }
    });
    let result = f(View::padded(&*rows, stride, x.cols));
    ROUNDED.set(buffer);
    result
}

/// Calls `f` with rows packed for tiles.
#[cfg(target_arch = "x86_64")]
fn packed_pairs<R>(
    tiles: Amx,
    x: View<'_, bf16>,
    ends: &[usize],
    f: impl FnOnce(Pairs<'_>) -> R,
) -> R {
    thread_local! {
        static PACKED: Cell<(Vec<bf16>, Vec<Chunk>)> = Cell::default();
    }
    let (mut buffer, mut chunks) = PACKED.take();
    Chunk::of_groups(ends, 1, &mut chunks);
    let values = aligned(&mut buffer, chunks.len() * amx::ROWS * x.cols);
    let parallel = values.len() >= parallel::PRODUCTS;
    for_each_rows(values, amx::ROWS * x.cols, 1, parallel, |chunk, to| {
        tiles.pack_pairs(chunks[chunk], |row| x.row(row), to);
    });
    let result = f(Pairs { values, chunks: &chunks, k: x.cols });
    PACKED.set((buffer, chunks));
    result
}

/// Calls `f` with the rows of large groups packed for tiles.
#[cfg(target_arch = "x86_64")]
fn packed_fours<R>(
    tiles: Amx,
    x: Rounded<'_>,
    k: usize,
    ends: &[usize],
    f: impl FnOnce(Fours<'_>) -> R,
) -> R {
    thread_local! {
        static PACKED: Cell<(Vec<amx::Tile>, Vec<Chunk>)> = Cell::default();
    }
    let (mut buffer, mut chunks) = PACKED.take();
    Chunk::of_groups(ends, LEAST_FOURS, &mut chunks);
    let blocks = k.div_ceil(BLOCK);
    let len = chunks.len() * blocks;
    if buffer.len() < len {
        buffer.resize(len, amx::Tile::default());
    }
    let parallel = len * BLOCK * amx::ROWS >= parallel::PRODUCTS;
    for_each_rows(&mut buffer[..len], blocks, 1, parallel, |chunk, to| {
        tiles.pack_fours(chunks[chunk], |row| x.row(row), to);
    });
    let result = f(Fours { values: &buffer[..len], chunks: &chunks, blocks });
    PACKED.set((buffer, chunks));
    result
}

/// Values on whole cache lines.
#[cfg(target_arch = "x86_64")]
fn aligned(buffer: &mut Vec<bf16>, len: usize) -> &mut [bf16] {
    if buffer.len() < len + 31 {
        buffer.resize(len + 31, bf16::ZERO);
    }
    let start = buffer.as_ptr().align_offset(64).min(31);
    &mut buffer[start..start + len]
}

#[cfg(test)]
mod tests {
    use jamba_core::shape::Shaped;
    use jamba_core::{Dtype, HostTensor, Param, Role, WeightFormat};

    use super::*;
    use crate::columns::Block;

    /// Each row of each group gives what it gives alone, to the bit; what is not finite stays in its row.
    #[test]
    fn groups_are_multiplied_as_if_each_row_were_alone() {
        use WeightFormat::{ExpertsInt8, Int4, Int8, Stored};
        const SIZES: [usize; 8] = [1, 1, 2, 15, 17, 0, 24, 33];
        let (n, k, tokens) = (21, 96, 40);
        let value = |i: usize| (i * 7919 % 1009) as f32 / 504.0 - 1.0;
        let mut x: Vec<f32> = (0..tokens * k).map(value).collect();
        (x[3 * k + 5], x[7 * k]) = (f32::NAN, f32::INFINITY);
        let mut ends = Vec::new();
        SIZES.iter().fold(0, |end, size| {
            ends.push(end + size);
            end + size
        });
        let rows = ends[ends.len() - 1];
        let index: Vec<usize> = (0..rows).map(|i| i * 11 % tokens).collect();
        for isa in Isa::available() {
            let products = Products { isa, precision: Precision::Bf16 };
            for format in [Stored, ExpertsInt8, Int8, Int4] {
                let bits =
                    (0..SIZES.len() * n * k).map(|i| half::bf16::from_f32(value(i)).to_bits());
                let shape = vec![SIZES.len() * n, k];
                let tensor = HostTensor::from_halves(Dtype::Bf16, shape, bits.collect());
                let weight = Weight::new(Param::new("w", Role::Experts, tensor), format).unwrap();
                assert_eq!(weight.shape(), [SIZES.len() * n, k]);
                let run = |index: &[usize], ends: &[usize], first: usize| {
                    let mut out = vec![0.0; index.len() * n];
                    products.prepare(View::new(&x, k).select(index), ends, &weight, |x| {
                        let mut start = 0;
                        for (group, &end) in ends.iter().enumerate() {
                            let mut block = Block::new(&mut out[start * n..end * n], n);
                            let x = x.range(start..end);
                            products.products(x, &weight, (first + group) * n, &mut block);
                            start = end;
                        }
                    });
                    out
                };
                let together = run(&index, &ends, 0);
                for (row, got) in together.chunks_exact(n).enumerate() {
                    let group = ends.partition_point(|end| *end <= row);
                    let alone = run(&index[row..=row], &[1], group);
                    let same = |(a, b): (&f32, &f32)| {
                        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
                    };
                    let name = isa.name();
                    assert!(
                        got.iter().zip(&alone).all(same),
                        "{name} {format}: row {row} of {group}"
                    );
                    let is_finite = ![3, 7].contains(&index[row]);
                    assert_eq!(
                        got.iter().all(|v| v.is_finite()),
                        is_finite,
                        "{name} {format}: {row}"
                    );
                }
            }
        }
    }
}
