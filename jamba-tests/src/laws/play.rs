//! Running the sequences of a problem in any steps, order and slots.

use jamba_core::recording::{Recorded, Recording};
use jamba_core::{Backend, Result, StatePart};

use crate::problem::bench;
use crate::problem::ragged::Feed;
use crate::problem::sequential::Sequential;

/// The next tokens of a sequence, by its index in the problem.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) seq: usize,
    pub(super) len: usize,
}

/// A problem that is being run, its results kept by sequence and input row.
pub(super) struct Play<'a, P: Sequential, B: Backend> {
    problem: &'a P,
    pub(super) b: &'a B,
    inputs: Recording,
    held: P::Held<B>,
    pub(super) state: B::State,
    /// Slot of each sequence.
    pub(super) slots: Vec<usize>,
    /// Tokens run of each sequence.
    done: Vec<usize>,
    out: Recording,
}

/// Name of an output row.
pub(super) fn row_name(row: usize) -> String {
    format!("row.{row}")
}

/// Whether this is the name of a state of a sequence.
pub(super) fn is_state_of(name: &str, seq: usize) -> bool {
    name.starts_with("state.") && name.ends_with(&format!(".{seq}"))
}

impl<'a, P: Sequential, B: Backend> Play<'a, P, B> {
    /// Every sequence in its slot, with the past that it has.
    pub(super) fn new(problem: &'a P, b: &'a B) -> Result<Self> {
        let slots: Vec<_> = problem.ragged().seqs.iter().map(|s| s.slot).collect();
        Self::in_slots(problem, b, &slots)
    }

    /// Every sequence in another slot.
    pub(super) fn in_slots(problem: &'a P, b: &'a B, slots: &[usize]) -> Result<Self> {
        let (inputs, ragged) = (problem.inputs(), problem.ragged());
        let held = problem.hold(b, &inputs)?;
        let state = b.new_state(&problem.config(), &bench::limits(ragged))?;
        let (slots, done) = (slots.to_vec(), vec![0; ragged.seqs.len()]);
        let mut play =
            Self { problem, b, inputs, held, state, slots, done, out: Recording::default() };
        play.begin()?;
        Ok(play)
    }

    /// Every sequence as it was at first, in the slots of now, whatever those held.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.out = Recording::default();
        for (seq, s) in self.problem.ragged().seqs.iter().enumerate() {
            self.reset(seq)?;
            for (layer, part) in bench::parts(&self.problem.config()) {
                let name = bench::state_name(layer, part, s.slot);
                if let Some(values) = self.inputs.tensors.get(&name) {
                    let values = values.values.clone();
                    self.write(layer, part, seq, &values)?;
                }
            }
        }
        Ok(())
    }

    /// The same, in a state of its own, in which the sequences have these states and slots. Each
    /// slot has been used: what a backend keeps beside the values (where a ring begins, a length)
    /// is that of another sequence until the states are written.
    pub(super) fn restored(&self, slots: &[usize], states: &Recording) -> Result<Self> {
        let mut play = Self::in_slots(self.problem, self.b, slots)?;
        play.step(&play.all())?;
        play.done.clone_from(&self.done);
        play.out = self.out.clone();
        for (layer, part) in bench::parts(&self.problem.config()) {
            for seq in 0..slots.len() {
                let values = &states.tensors[&bench::state_name(layer, part, seq)].values;
                play.write(layer, part, seq, values)?;
            }
        }
        Ok(play)
    }

    pub(super) fn write(
        &mut self,
        layer: usize,
        part: StatePart,
        seq: usize,
        values: &[f32],
    ) -> Result<()> {
        let (slot, positions) = (self.slots[seq], self.positions(seq));
        self.b.write_state(&mut self.state, layer, part, slot, 0..positions, values)
    }

    /// Tokens that a sequence holds.
    pub(super) fn positions(&self, seq: usize) -> usize {
        self.problem.ragged().seqs[seq].past + self.done[seq]
    }

    /// Tokens run of a sequence.
    pub(super) fn done(&self, seq: usize) -> usize {
        self.done[seq]
    }

    /// All that is left of all sequences.
    pub(super) fn all(&self) -> Vec<Turn> {
        let seqs = self.problem.ragged().seqs.iter().enumerate();
        seqs.map(|(seq, s)| Turn { seq, len: s.len - self.done[seq] }).collect()
    }

    /// Makes the token in this row of the inputs another one.
    pub(super) fn alter(&mut self, row: usize) {
        self.problem.alter(&mut self.inputs, row);
    }

    /// Runs one step.
    pub(super) fn step(&mut self, turns: &[Turn]) -> Result<()> {
        let firsts = self.problem.ragged().feeds();
        let feed = |turn: &Turn| {
            let first = firsts[turn.seq].rows.start + self.done[turn.seq];
            let position = self.positions(turn.seq);
            Feed { slot: self.slots[turn.seq], position, rows: first..first + turn.len }
        };
        let feeds: Vec<_> = turns.iter().map(feed).collect();
        let (b, inputs) = (self.b, &self.inputs);
        let out = self.problem.step(b, &mut self.held, inputs, &feeds, &mut self.state)?;
        let rows = feeds.into_iter().flat_map(|feed| feed.rows);
        for (row, values) in rows.zip(out.values.chunks_exact(out.shape[1])) {
            let values = Recorded { shape: vec![1, values.len()], values: values.to_vec() };
            self.out.tensors.insert(row_name(row), values);
        }
        turns.iter().for_each(|turn| self.done[turn.seq] += turn.len);
        Ok(())
    }

    /// Forgets a sequence.
    pub(super) fn reset(&mut self, seq: usize) -> Result<()> {
        self.done[seq] = 0;
        self.b.reset_slot(&mut self.state, self.slots[seq])
    }

    /// The states by sequence: `state.LAYER.PART.SEQUENCE`.
    pub(super) fn states(&self) -> Result<Recording> {
        let config = self.problem.config();
        let mut all = Recording::default();
        for (layer, part) in bench::parts(&config) {
            for (seq, &slot) in self.slots.iter().enumerate() {
                let positions = self.positions(seq);
                let values = self.b.read_state(&self.state, layer, part, slot, 0..positions)?;
                let shape = bench::part_shape(&config, part, positions);
                let name = bench::state_name(layer, part, seq);
                all.tensors.insert(name, Recorded { shape, values });
            }
        }
        Ok(all)
    }

    /// All output rows, `row.N`, and all states.
    pub(super) fn end(&self) -> Result<Recording> {
        let mut all = self.states()?;
        all.tensors.extend(self.out.tensors.clone());
        Ok(all)
    }
}
