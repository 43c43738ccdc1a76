//! States between devices and the host: what there is to move, and how positions are cut.

use std::ops::Range;

use crate::backend::StatePart;
use crate::config::Config;
use crate::error::Result;
use crate::runner::Runner;
use crate::schedule::{MixerKind, Schedule};

/// Every part of the state of one slot: its layer and what it is, in the order of the layers.
pub(crate) fn parts(config: &Config) -> Vec<(usize, StatePart)> {
    let of = |(layer, mixer)| match mixer {
        MixerKind::Mamba => [(layer, StatePart::Conv), (layer, StatePart::Ssm)],
        MixerKind::Attention => [(layer, StatePart::Keys), (layer, StatePart::Values)],
    };
    Schedule::new(config).iter().map(|kind| kind.mixer).enumerate().flat_map(of).collect()
}

/// Some positions of keys or values: of `(heads, positions, width)`, `(heads, range, width)`.
pub(crate) fn cut(all: &[f32], heads: usize, positions: usize, range: Range<usize>) -> Vec<f32> {
    let Some(width) = all.len().checked_div(heads * positions) else { return Vec::new() };
    let head = positions * width;
    let mut out = Vec::with_capacity(heads * range.len() * width);
    for g in 0..heads {
        out.extend_from_slice(&all[g * head + range.start * width..g * head + range.end * width]);
    }
    out
}

/// Pieces of `(heads, positions, width)` each, one after the other.
pub(crate) fn join(pieces: &[&[f32]], heads: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
    for g in 0..heads {
        for piece in pieces {
            let head = piece.len() / heads;
            out.extend_from_slice(&piece[g * head..(g + 1) * head]);
        }
    }
    out
}

/// Moves sequences of `positions` tokens between slots, all at once: afterwards slot `i` holds
/// what slot `sources[i]` held.
pub(crate) fn gather<R: Runner + ?Sized>(
    runner: &mut R,
    sources: &[usize],
    positions: usize,
) -> Result<()> {
    let moves = |(to, from): (usize, &usize)| (to != *from).then_some((to, Some(*from)));
    // Where a sequence comes from; none: from the host.
    let mut moves: Vec<(usize, Option<usize>)> =
        sources.iter().enumerate().filter_map(moves).collect();
    let mut saved: Vec<(usize, StatePart, Vec<f32>)> = Vec::new();
    while !moves.is_empty() {
        let needed = |slot: usize| moves.iter().any(|(_, from)| *from == Some(slot));
        if let Some(free) = moves.iter().position(|(to, _)| !needed(*to)) {
            match moves.swap_remove(free) {
                (to, Some(from)) => runner.copy_slot(from, to, positions)?,
                (to, None) => {
                    for (layer, part, values) in &saved {
                        runner.write_state(*layer, *part, to, 0..positions, values)?;
                    }
                }
            }
            continue;
        }
        // Only cycles are left: one of their slots steps aside. The cycle it was in ends in the
        // slots that wait for it, before another is opened: each is followed from where it opened.
        let (slot, _) = moves[0];
        saved.clear();
        for (layer, part) in parts(runner.config()) {
            saved.push((layer, part, runner.read_state(layer, part, slot, 0..positions)?));
        }
        moves.iter_mut().filter(|(_, from)| *from == Some(slot)).for_each(|m| m.1 = None);
    }
    Ok(())
}
