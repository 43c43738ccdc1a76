//! Laws that need no oracle: what must be the same however a prompt is run.
//!
//! Each is tried on the three operators that have a state and on whole models, with random
//! sequences, some of which go on from a state.

mod moves;
mod play;

use jamba_core::recording::Recording;
use jamba_core::{Backend, Error, Result};

use crate::problem::AnyProblem;
use crate::problem::ragged::Sequence;
use crate::problem::sequential::Sequential;
use crate::random::Random;
use play::{Play, Turn};

/// The problems that laws are tried on.
pub const TARGETS: [&str; 4] = ["causal_conv1d", "selective_scan", "attention", "forward"];

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Law {
    /// A prompt cut into chunks, whatever else is run between them, gives what the whole gives.
    Chunking,
    /// Another token changes its own output and no earlier one, nor that of another sequence.
    Causality,
    /// Sequences in another order and in other slots give the same results.
    Permutation,
    /// A sequence gives alone what it gives in a batch.
    Independence,
    /// A used slot, once reset, is as a fresh one: bit by bit.
    SlotReset,
    /// The same run twice gives the same bits.
    Rerun,
    /// A state read and written to another slot of another state goes on as the original.
    Snapshot,
    /// Runs without tokens change nothing.
    EmptyRuns,
    /// Some positions of keys and values are those among all of them.
    ReadPositions,
    /// Some positions written after others, and nothing else, are read among all.
    WritePositions,
    /// A slot copied over another one goes on there as the original, and nothing else changes.
    CopySlot,
    /// The bytes of a sequence are as many as its state has at least, and grow with it.
    SequenceBytes,
}

impl Law {
    /// All laws by name.
    pub const ALL: [(&'static str, Self); 12] = [
        ("chunking", Self::Chunking),
        ("causality", Self::Causality),
        ("permutation", Self::Permutation),
        ("independence", Self::Independence),
        ("slot_reset", Self::SlotReset),
        ("rerun", Self::Rerun),
        ("snapshot", Self::Snapshot),
        ("empty_runs", Self::EmptyRuns),
        ("read_positions", Self::ReadPositions),
        ("write_positions", Self::WritePositions),
        ("copy_slot", Self::CopySlot),
        ("sequence_bytes", Self::SequenceBytes),
    ];

    /// The problems that the law is tried on: those of [`TARGETS`] that have what it is about.
    pub fn targets(self) -> &'static [&'static str] {
        match self {
            Self::ReadPositions | Self::WritePositions => &TARGETS[2..],
            Self::SequenceBytes => &TARGETS[3..],
            _ => &TARGETS,
        }
    }
}

/// What two results must be to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// The same bits, of any backend.
    Bits,
    /// The same bits of a backend that says so, the same within the tolerance of others.
    Same,
    /// Not the same: the law would hold of a backend that returns nothing new.
    Different,
    /// Nothing to compare: what is said is wrong.
    Broken,
}

/// Two results and what they must be to each other.
pub(crate) struct Comparison {
    pub(crate) what: &'static str,
    pub(crate) got: Recording,
    pub(crate) expected: Recording,
    pub(crate) relation: Relation,
}

fn compare(
    what: &'static str,
    got: Recording,
    expected: Recording,
    relation: Relation,
) -> Comparison {
    Comparison { what, got, expected, relation }
}

/// Tries a law on a problem of [`TARGETS`]. `plan` decides where prompts are cut and the like.
///
/// # Errors
/// What the backend reports.
pub(crate) fn run<B: Backend>(
    law: Law,
    problem: &AnyProblem,
    plan: u32,
    b: &B,
) -> Result<Vec<Comparison>> {
    match problem {
        AnyProblem::CausalConv1d(p) => law.of(p, plan, b),
        AnyProblem::SelectiveScan(p) => law.of(p, plan, b),
        AnyProblem::Attention(p) => law.of(p, plan, b),
        AnyProblem::Forward(p) => law.of(p, plan, b),
        other => {
            let what = format!("laws of {}: they are tried on {TARGETS:?}", other.name());
            Err(Error::Unsupported { backend: "kit", what })
        }
    }
}

impl Law {
    fn of<P: Sequential, B: Backend>(self, p: &P, plan: u32, b: &B) -> Result<Vec<Comparison>> {
        // At least two tokens, of one sequence.
        let mut ragged = p.ragged().clone();
        ragged.seqs[0].len = ragged.seqs[0].len.max(2);
        if self == Self::SlotReset {
            ragged.seqs.iter_mut().for_each(|s| s.past = 0);
        }
        let p = &p.with_ragged(ragged);
        let seqs = &p.ragged().seqs;
        let random = &mut Random::new(plan.into(), "law");
        match self {
            Self::Chunking => chunking(p, seqs, random, b),
            Self::Causality => causality(p, seqs, random, b),
            Self::Permutation => permutation(p, seqs, random, b),
            Self::Independence => independence(p, seqs, b),
            Self::SlotReset => slot_reset(p, seqs, b),
            Self::Rerun => {
                let (got, expected) = (whole(p, b)?, whole(p, b)?);
                Ok(vec![compare("the second run", got, expected, Relation::Bits)])
            }
            Self::Snapshot => snapshot(p, seqs, b),
            Self::EmptyRuns => empty_runs(p, seqs, random, b),
            Self::ReadPositions => moves::read_positions(p, random, b),
            Self::WritePositions => moves::write_positions(p, random, b),
            Self::CopySlot => moves::copy_slot(p, random, b),
            Self::SequenceBytes => Ok(moves::sequence_bytes(p, b)),
        }
    }
}

/// All sequences whole, in one step.
fn whole<P: Sequential, B: Backend>(p: &P, b: &B) -> Result<Recording> {
    let mut play = Play::new(p, b)?;
    play.step(&play.all())?;
    play.end()
}

fn chunking<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut play = Play::new(p, b)?;
    while seqs.iter().enumerate().any(|(i, s)| play.done(i) < s.len) {
        // Some of the sequences, each by some tokens or none.
        let mut turns = Vec::new();
        for (i, seq) in seqs.iter().enumerate() {
            let left = seq.len - play.done(i);
            if random.below(3) > 0 {
                turns.push(Turn { seq: i, len: random.below(left.min(6) + 1) });
            }
        }
        play.step(&turns)?;
    }
    Ok(vec![compare("in chunks, against whole", play.end()?, whole(p, b)?, Relation::Same)])
}

fn causality<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    // A token of the first sequence that is not its first.
    let row = 1 + random.below(seqs[0].len - 1);
    let mut play = Play::new(p, b)?;
    play.alter(row);
    play.step(&play.all())?;
    let (altered, original) = (play.end()?, whole(p, b)?);
    let later: Vec<String> = (row..seqs[0].len).map(play::row_name).collect();
    let own = |name: &String| later.contains(name) || play::is_state_of(name, 0);
    let split = |mut all: Recording, keep: &dyn Fn(&String) -> bool| {
        all.tensors.retain(|name, _| keep(name));
        all
    };
    let not_own = |name: &String| !own(name);
    let itself = |name: &String| *name == later[0];
    Ok(vec![
        compare(
            "earlier rows and other sequences, after a token was changed",
            split(altered.clone(), &not_own),
            split(original.clone(), &not_own),
            Relation::Same,
        ),
        compare(
            "the row of the changed token",
            split(altered, &itself),
            split(original, &itself),
            Relation::Different,
        ),
    ])
}

fn permutation<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let slots = random.permutation(p.ragged().slots + 1);
    let mut play = Play::in_slots(p, b, &slots[..seqs.len()])?;
    let order = random.permutation(seqs.len());
    let turns: Vec<_> = order.into_iter().map(|i| Turn { seq: i, len: seqs[i].len }).collect();
    play.step(&turns)?;
    let got = play.end()?;
    Ok(vec![compare("in another order and other slots", got, whole(p, b)?, Relation::Same)])
}

fn independence<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut play = Play::new(p, b)?;
    for (seq, Sequence { len, .. }) in seqs.iter().enumerate() {
        play.step(&[Turn { seq, len: *len }])?;
    }
    Ok(vec![compare("each alone, against all together", play.end()?, whole(p, b)?, Relation::Same)])
}

fn slot_reset<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut play = Play::new(p, b)?;
    play.step(&play.all())?;
    (0..seqs.len()).try_for_each(|seq| play.reset(seq))?;
    play.step(&play.all())?;
    Ok(vec![compare("after a reset, against fresh", play.end()?, whole(p, b)?, Relation::Bits)])
}

fn snapshot<P: Sequential, B: Backend>(p: &P, seqs: &[Sequence], b: &B) -> Result<Vec<Comparison>> {
    let turns = |len: fn(usize) -> usize| -> Vec<Turn> {
        seqs.iter().enumerate().map(|(seq, s)| Turn { seq, len: len(s.len) }).collect()
    };
    let (first, second) = (turns(|n| n / 2), turns(|n| n - n / 2));
    let mut original = Play::new(p, b)?;
    original.step(&first)?;
    // The same slots, each one further, of another state.
    let slots = p.ragged().slots + 1;
    let moved: Vec<usize> = seqs.iter().map(|s| (s.slot + 1) % slots).collect();
    let saved = original.states()?;
    let mut restored = original.restored(&moved, &saved)?;
    let read_back = restored.states()?;
    original.step(&second)?;
    restored.step(&second)?;
    Ok(vec![
        compare("a state written and read", read_back, saved, Relation::Bits),
        compare("restored, against never left", restored.end()?, original.end()?, Relation::Same),
    ])
}

fn empty_runs<P: Sequential, B: Backend>(
    p: &P,
    seqs: &[Sequence],
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut play = Play::new(p, b)?;
    let before = play.states()?;
    let nothing: Vec<_> = (0..seqs.len()).map(|seq| Turn { seq, len: 0 }).collect();
    play.step(&nothing)?;
    let after = play.states()?;
    // All but one, and then those beside an empty run of that one.
    let idle = random.below(seqs.len());
    let mut turns: Vec<_> = play.all();
    turns[idle].len = 0;
    play.step(&turns)?;
    turns.remove(idle);
    let mut without = Play::new(p, b)?;
    without.step(&turns)?;
    Ok(vec![
        compare("states after a step of empty runs", after, before, Relation::Bits),
        compare("beside an empty run", play.end()?, without.end()?, Relation::Same),
    ])
}
