//! Ragged batches as data.

use std::ops::Range;

use jamba_core::{Batch, Outputs};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Which tokens of a sequence get logits; [`Outputs`] as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "those of Outputs")]
pub enum Rows {
    None,
    Last,
    All,
}

impl From<Rows> for Outputs {
    fn from(rows: Rows) -> Self {
        match rows {
            Rows::None => Self::None,
            Rows::Last => Self::Last,
            Rows::All => Self::All,
        }
    }
}

/// One sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sequence {
    /// State slot.
    pub slot: usize,
    /// Tokens that the slot holds already; 0 for a new sequence.
    pub past: usize,
    /// Tokens of this step, possibly none.
    pub len: usize,
    /// Which of them get logits.
    pub rows: Rows,
}

/// A batch: sequences of different lengths laid end to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Ragged {
    /// Slots of the state. Those that no sequence uses hold [`IDLE`] tokens and must stay so.
    pub slots: usize,
    /// The sequences, each with a slot of its own.
    pub seqs: Vec<Sequence>,
}

/// A [`Ragged`] as it is written.
#[derive(Deserialize)]
struct Unchecked {
    slots: usize,
    seqs: Vec<Sequence>,
}

impl TryFrom<Unchecked> for Ragged {
    type Error = String;

    fn try_from(Unchecked { slots, seqs }: Unchecked) -> Result<Self, String> {
        for (i, seq) in seqs.iter().enumerate() {
            if seq.slot >= slots || seqs[..i].iter().any(|other| other.slot == seq.slot) {
                return Err(format!("slot {} is used twice, or not one of {slots}", seq.slot));
            }
        }
        if seqs.is_empty() {
            return Err("a batch has at least one sequence".into());
        }
        Ok(Self { slots, seqs })
    }
}

/// Tokens that a slot holds which is not in the batch.
pub const IDLE: usize = 3;

/// A part of one sequence for one step: rows of the problem's inputs and where they go.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    pub(crate) slot: usize,
    /// Position of the first row in its sequence.
    pub(crate) position: usize,
    /// Rows of the inputs.
    pub(crate) rows: Range<usize>,
}

impl Ragged {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.seqs.iter().map(|s| s.len).sum()
    }

    /// Positions that any sequence may reach, and some more.
    pub fn context(&self) -> usize {
        self.seqs.iter().map(|s| s.past + s.len).max().unwrap_or(0).max(IDLE) + 2
    }

    /// Tokens that a slot holds before the step.
    pub fn past(&self, slot: usize) -> usize {
        self.seqs.iter().find(|s| s.slot == slot).map_or(IDLE, |s| s.past)
    }

    /// The batch of core, its tokens `ids`.
    pub fn batch(&self, ids: &[u32]) -> Batch {
        let mut batch = Batch::new();
        let mut first = 0;
        for seq in &self.seqs {
            batch.push(seq.slot, seq.past, &ids[first..first + seq.len], seq.rows.into());
            first += seq.len;
        }
        batch
    }

    /// Every sequence whole.
    pub(crate) fn feeds(&self) -> Vec<Feed> {
        let mut first = 0;
        let feed = |s: &Sequence| {
            first += s.len;
            Feed { slot: s.slot, position: s.past, rows: first - s.len..first }
        };
        self.seqs.iter().map(feed).collect()
    }
}

/// 1 to 5 sequences in slots in any order: lengths about the width of a convolution and longer
/// ones up to `longest`, new ones and some that go on.
pub fn ragged(longest: usize) -> BoxedStrategy<Ragged> {
    let len = prop_oneof![4 => 0..=5usize, 2 => 6..=longest.max(7), 1 => Just(1usize)];
    let past = prop_oneof![3 => Just(0usize), 3 => 1..=6usize, 1 => 60..=70usize];
    let rows = prop_oneof![Just(Rows::None), Just(Rows::Last), Just(Rows::All)];
    (prop::collection::vec((len, past, rows), 1..=5), 0..=1usize, any::<u16>())
        .prop_map(|(seqs, spare, order)| {
            let slots = seqs.len() + spare;
            let order = Random::new(order.into(), "slots").permutation(slots);
            let sequence = |((len, past, rows), slot)| Sequence { slot, past, len, rows };
            Ragged { slots, seqs: seqs.into_iter().zip(order).map(sequence).collect() }
        })
        .boxed()
}
