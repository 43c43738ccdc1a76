//! Launches `kernels/sample.cu`.
#![allow(unsafe_code, reason = "launches kernels")]

use std::sync::{Mutex, PoisonError};

use jamba_core::{Choice, Sampled};

use super::workspace::Workspace;
use crate::device::{Buffer, Device, Grid, Kernel, Staging};
use crate::error::Result;
use crate::kernels::{Loader, Unit};
use crate::tensor::Tensor;

pub(super) fn unit() -> Unit {
    super::plain("sample", include_str!("../../kernels/sample.cu"))
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleArgs {
    x: u64,
    scores: u64,
    part: u64,
    part_sums: u64,
    counts: u64,
    sums: u64,
    chosen: u64,
    row: u64,
    edits: u64,
    cols: u32,
    parts: u32,
}

/// `Row` of sample.cu, in words.
type Row = [u32; ROW_WORDS];
const ROW_WORDS: usize = 16;

/// `COLS`, `BINS` and `LIST` of sample.cu.
const COLS: usize = 2048;
const BINS: usize = 2048;
const LIST: usize = 1024;

/// `Chosen` of sample.cu: id, and the bits of the logarithm.
type Chosen = [u32; 2];

/// In the place of an id: the host is to say why.
const UNUSABLE: u32 = u32::MAX;

/// Where things are in the workspace: bytes of each for so many rows, all multiples of 8 but the
/// last two.
struct Layout {
    chosen: usize,
    sums: usize,
    part_sums: usize,
    counts: usize,
    part: usize,
    scores: usize,
}

impl Layout {
    fn new(rows: usize, cols: usize) -> Self {
        let parts = cols.div_ceil(COLS);
        Self {
            chosen: rows.saturating_mul(size_of::<Chosen>()),
            sums: rows.saturating_mul(8 * BINS),
            part_sums: rows.saturating_mul(8 * parts),
            counts: rows.saturating_mul(4 * BINS),
            part: rows.saturating_mul(20 * parts),
            scores: rows.saturating_mul(4 * cols),
        }
    }

    /// Bytes in all.
    fn bytes(&self) -> usize {
        let Self { chosen, sums, part_sums, counts, part, scores } = *self;
        [chosen, sums, part_sums, counts, part, scores].into_iter().fold(0, usize::saturating_add)
    }
}

/// Bytes between the kernels, and between them and the host, for so many rows.
pub(crate) fn workspace_bytes(rows: usize, cols: usize) -> usize {
    Layout::new(rows, cols).bytes()
}

/// Kernels of `sample.cu`, and what they need room for.
pub(crate) struct Sample {
    parts: Kernel,
    weights: Kernel,
    sample: Kernel,
    room: Mutex<Room>,
}

#[derive(Default)]
struct Room {
    workspace: Workspace,
    /// Rows and edits, of which the host writes the one and the card reads the other.
    words: Option<(Staging, Buffer)>,
}

impl Sample {
    pub(crate) fn load(loader: &Loader) -> Result<Self> {
        let module = loader.module(&unit())?;
        Ok(Self {
            parts: module.overlapping("sample_parts")?,
            weights: module.overlapping("sample_weights")?,
            sample: module.overlapping("sample")?,
            room: Mutex::default(),
        })
    }

    /// Allocates for so many rows; of tokens with a bias or penalty there may be more.
    pub(crate) fn reserve(&self, device: &Device, rows: usize, cols: usize) -> Result<()> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.workspace.reserve(device, workspace_bytes(rows, cols))?;
        room.words(device, rows * ROW_WORDS).map(drop)
    }

    /// Bytes allocated for it.
    pub(crate) fn bytes(&self) -> usize {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.workspace.bytes() + room.words.as_ref().map_or(0, |(_, words)| words.bytes())
    }

    /// The token of every row of `x` for which there is a choice; `None` where the host is to say
    /// why there is none.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: &Tensor,
        choices: &[Option<Choice<'_>>],
    ) -> Result<Vec<Option<Sampled>>> {
        let mut sampled = vec![None; choices.len()];
        let (mut rows, mut edits) = (Vec::new(), Vec::new());
        // Rows of x that are chosen from.
        let mut places = Vec::new();
        for (row, choice) in choices.iter().enumerate().take(x.rows()) {
            if let Some(choice) = choice {
                places.push(row);
                rows.push(row_of(row, choice, &mut edits));
            }
        }
        if rows.is_empty() || x.cols() == 0 {
            return Ok(sampled);
        }
        let draws = choices.iter().flatten().any(|choice| choice.sampling.temperature > 0.0);
        let (count, cols) = (rows.len(), x.cols());
        let parts = cols.div_ceil(COLS);
        let layout = Layout::new(count, cols);
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = room.workspace.reserve(device, layout.bytes())?;
        let len = count * ROW_WORDS + edits.len();
        let (staging, words) = room.words(device, len)?;
        staging.upload(device, words, len, |to| {
            let (to_rows, to_edits) = to.split_at_mut(count * ROW_WORDS);
            to_rows.copy_from_slice(bytemuck::cast_slice(&rows));
            to_edits.copy_from_slice(&edits);
        })?;
        let sums = chosen + layout.chosen as u64;
        let part_sums = sums + layout.sums as u64;
        let counts = part_sums + layout.part_sums as u64;
        let part = counts + layout.counts as u64;
        let args = SampleArgs {
            x: x.ptr(),
            scores: part + layout.part as u64,
            part,
            part_sums,
            counts,
            sums,
            chosen,
            row: words.ptr(),
            edits: words.ptr() + 4 * (count * ROW_WORDS) as u64,
            cols: cols as u32,
            parts: parts as u32,
        };
        let all = 4 * count * cols;
        let grid = Grid::new("sample_parts", [count, parts, 1], 256, 0)?.doing(all, 0);
        // SAFETY: each row is one of x; the workspace has room for what the layout says of so many
        // rows, and edits lie within the words that were copied.
        unsafe { device.launch(&self.parts, &grid, &args) }?;
        if draws {
            let grid = Grid::new("sample_weights", [count, parts, 1], 256, 0)?.doing(all, 0);
            // SAFETY: as before; the parts and, where a row has edits, its scores were written.
            unsafe { device.launch(&self.weights, &grid, &args) }?;
        }
        // Nothing more than the results, if all are greedy.
        let read = count * size_of::<Chosen>() + if draws { all } else { layout.part };
        let grid = Grid::new("sample", [count, 1, 1], LIST, 0)?.doing(read, 0);
        // SAFETY: as before; sums of parts and of bins were written for every row that draws.
        unsafe { device.launch(&self.sample, &grid, &args) }?;
        let mut results = vec![Chosen::default(); count];
        room.workspace.read(device, bytemuck::cast_slice_mut(&mut results))?;
        for (row, [id, logprob]) in places.into_iter().zip(results) {
            let token = Sampled { id, logprob: f32::from_bits(logprob) };
            sampled[row] = (id != UNUSABLE).then_some(token);
        }
        Ok(sampled)
    }
}

/// What a row is chosen by; adds what changes single scores to `edits`.
fn row_of(row: usize, choice: &Choice<'_>, edits: &mut Vec<u32>) -> Row {
    let count = |id: &u32| choice.counts.get(*id as usize).copied().unwrap_or(0);
    let first = edits.len() / 2;
    edits.extend(choice.bias.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]));
    let between = edits.len() / 2;
    edits.extend(choice.known.iter().flat_map(|id| [*id, count(id)]));
    let (uniform, sampling) = (choice.uniform.to_bits(), choice.sampling);
    [
        uniform as u32,
        (uniform >> 32) as u32,
        sampling.temperature.to_bits(),
        sampling.top_p.to_bits(),
        sampling.min_p.to_bits(),
        sampling.repetition_penalty.to_bits(),
        sampling.presence_penalty.to_bits(),
        sampling.frequency_penalty.to_bits(),
        // As many as there can be are all.
        u32::try_from(sampling.top_k).unwrap_or(0),
        row as u32,
        first as u32,
        between as u32,
        between as u32,
        edits.len() as u32 / 2,
        0,
        0,
    ]
}

impl Room {
    /// Room for so many words.
    fn words(&mut self, device: &Device, len: usize) -> Result<&mut (Staging, Buffer)> {
        let fits = |(_, words): &(Staging, Buffer)| words.bytes() >= 4 * len;
        let words = match self.words.take().filter(fits) {
            Some(words) => words,
            None => {
                let len = len.next_power_of_two();
                (Staging::new(device, len)?, device.alloc(4 * len)?)
            }
        };
        Ok(self.words.insert(words))
    }
}
