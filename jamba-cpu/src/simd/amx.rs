//! Products on the tiles of AMX: eight registers of up to 16 rows of 64 bytes, and instructions that
//! multiply two of them and add to a third.
//!
//! `C (rows of W, rows of x) += A B`: A is a tile of 16 rows of W, and B of x, whose rows are packed for
//! it in chunks. Each product is added in one order along k, whatever else is in its tiles: its bits do
//! not depend on which other rows are in the batch.

mod fours;
mod pairs;

use std::arch::asm;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

pub(crate) use fours::{Fours, Tile};
pub(crate) use pairs::Pairs;

use super::bf16::Avx512Bf16;

/// Rows of a tile, and of x in a chunk at most.
pub(crate) const ROWS: usize = 16;

/// Proof that the machine has AMX with BF16 and INT8, beside AVX-512 with BF16 and VNNI, and that the
/// system lets this process use it.
#[derive(Clone, Copy)]
pub(crate) struct Amx(Avx512Bf16);

/// Up to 16 rows of x that are packed together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// Number of the first row.
    pub(crate) first: usize,
    /// Number of rows.
    pub(crate) rows: usize,
}

impl Chunk {
    /// The chunks of groups of rows, each of which ends at one of `ends`, that have so many at least.
    pub(crate) fn of_groups(ends: &[usize], least: usize, chunks: &mut Vec<Self>) {
        chunks.clear();
        let mut start = 0;
        for &end in ends {
            if end - start >= least {
                let firsts = (start..end).step_by(ROWS);
                chunks.extend(firsts.map(|first| Self { first, rows: (end - first).min(ROWS) }));
            }
            start = end;
        }
    }

    /// Of chunks in the order of their rows, those that have these: all of each.
    fn range(chunks: &[Self], rows: Range<usize>) -> Range<usize> {
        let number = |row| chunks.partition_point(|chunk| chunk.first < row);
        number(rows.start)..number(rows.end)
    }
}

/// Code that uses the tiles. What is in them does not outlive it; what they look like does.
macro_rules! tiles {
    ($($code:literal),* $(,)?; $($operands:tt)*) => {
        asm!(
            $($code),*,
            $($operands)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}
use tiles;

impl Amx {
    pub(crate) fn detect(vectors: Avx512Bf16) -> Option<Self> {
        // AMX-BF16, AMX-TILE and AMX-INT8.
        const ALL: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        let has = std::arch::x86_64::__cpuid_count(7, 0).edx & ALL == ALL;
        (has && is_permitted()).then_some(Self(vectors))
    }

    /// The products of vectors.
    pub(crate) fn vectors(self) -> Avx512Bf16 {
        self.0
    }
}

impl Amx {
    /// Multiplies full tiles of bf16, or of bytes; returns how many operations they were.
    pub(crate) fn multiply_adds(self, rounds: usize, of_bytes: bool) -> usize {
        const PRODUCTS: usize = 4;
        let mut shapes = Shapes::default();
        shapes.set(self, [(ROWS, 4 * ROWS); 8]);
        let rounds = rounds.max(1);
        // 60 as bytes, 0.0115 as bf16.
        let values = [0x3c_u8; 4 * ROWS * ROWS];
        macro_rules! multiply {
            ($of_0:literal, $of_1:literal, $of_2:literal, $of_3:literal) => {
                // SAFETY: the tiles are shaped, and as large as the values that are loaded.
                unsafe {
                    tiles!(
                        "tileloadd tmm4, [{values} + {line}]",
                        "tileloadd tmm5, [{values} + {line}]",
                        "tileloadd tmm6, [{values} + {line}]",
                        "tileloadd tmm7, [{values} + {line}]",
                        "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                        "2:",
                        $of_0,
                        $of_1,
                        $of_2,
                        $of_3,
                        "dec {rounds}",
                        "jnz 2b";
                        values = in(reg) values.as_ptr(),
                        line = in(reg) 4 * ROWS,
                        rounds = inout(reg) rounds => _,
                    )
                }
            };
        }
        match of_bytes {
            true => multiply!(
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7"
            ),
            false => multiply!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
        }
        let values = if of_bytes { 4 * ROWS } else { 2 * ROWS };
        2 * PRODUCTS * ROWS * ROWS * values * rounds
    }
}

/// What a tile looks like: rows, and bytes of each.
type Shape = (usize, usize);

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Palette {
    number: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// What the tiles of this thread look like, from the first [`set`](Self::set) on until it is
/// dropped.
#[derive(Default)]
struct Shapes(Option<[Shape; 8]>);

impl Shapes {
    /// Shapes all eight tiles.
    fn set(&mut self, _: Amx, shapes: [Shape; 8]) {
        if self.0 == Some(shapes) {
            return;
        }
        self.0 = Some(shapes);
        let mut palette =
            Palette { number: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            (palette.rows[i], palette.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        // SAFETY: the operand is 64 bytes, of a palette that every machine with tiles has; an `Amx`
        // proves that this is one.
        unsafe { tiles!("ldtilecfg [{}]"; in(reg) &raw const palette,) };
    }
}

impl Drop for Shapes {
    fn drop(&mut self) {
        if self.0.is_some() {
            // SAFETY: tiles that were shaped are of a machine that has them.
            unsafe { tiles!("tilerelease";) };
        }
    }
}

/// Whether the system lets this process use the tiles, whose state is large: it wants to be asked, and
/// refuses where a thread has a small stack for signals. It is asked once, so that all backends of a process
/// have the same.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        /// `ARCH_REQ_XCOMP_PERM` for `XFEATURE_XTILEDATA`.
        const ASK: [libc::c_ulong; 2] = [0x1023, 18];
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            // SAFETY: it takes two numbers, and changes what this process may use.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ASK[0], ASK[1]) == 0 }
        })
    }
    #[cfg(not(target_os = "linux"))]
    false
}
