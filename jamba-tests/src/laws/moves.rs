//! Moving states: positions of a cache, whole slots, and what they take.

use jamba_core::memory;
use jamba_core::recording::{Recorded, Recording};
use jamba_core::schedule::Schedule;
use jamba_core::{Backend, Result, StatePart};

use super::play::{Play, Turn};
use super::{Comparison, Relation, compare};
use crate::problem::bench;
use crate::problem::sequential::Sequential;
use crate::random::Random;

/// The layers that have keys and values.
fn caches<P: Sequential>(p: &P) -> Vec<(usize, StatePart)> {
    let of = |(_, part): &(usize, StatePart)| matches!(part, StatePart::Keys | StatePart::Values);
    bench::parts(&p.config()).into_iter().filter(of).collect()
}

/// Some positions of `(heads, positions, width)`.
fn cut(all: &Recorded, from: usize, to: usize) -> Recorded {
    let [heads, positions, width] = all.shape[..] else { panic!("{:?}", all.shape) };
    let head = |g: usize| &all.values[g * positions * width..(g + 1) * positions * width];
    let values = (0..heads).flat_map(|g| &head(g)[from * width..to * width]).copied().collect();
    Recorded { shape: vec![heads, to - from, width], values }
}

pub(super) fn read_positions<P: Sequential, B: Backend>(
    p: &P,
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut play = Play::new(p, b)?;
    play.step(&play.all())?;
    let states = play.states()?;
    let (mut got, mut expected) = (Recording::default(), Recording::default());
    for (layer, part) in caches(p) {
        for (seq, &slot) in play.slots.iter().enumerate() {
            let to = random.below(play.positions(seq) + 1);
            let from = random.below(to + 1);
            let name = bench::state_name(layer, part, seq);
            let some = cut(&states.tensors[&name], from, to);
            let values = b.read_state(&play.state, layer, part, slot, from..to)?;
            got.tensors.insert(name.clone(), Recorded { shape: some.shape.clone(), values });
            expected.tensors.insert(name, some);
        }
    }
    Ok(vec![compare("some positions, against all of them", got, expected, Relation::Bits)])
}

pub(super) fn write_positions<P: Sequential, B: Backend>(
    p: &P,
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let mut original = Play::new(p, b)?;
    original.step(&original.all())?;
    let states = original.states()?;
    // Another state holds nonsense, then the first positions, and then the rest in two pieces.
    let mut other = original.restored(&original.slots, &states)?;
    for (layer, part) in caches(p) {
        for (seq, &slot) in original.slots.iter().enumerate() {
            let held = original.positions(seq);
            let all = &states.tensors[&bench::state_name(layer, part, seq)];
            other.write(layer, part, seq, &vec![512.0; all.values.len()])?;
            let second = random.below(held + 1);
            let first = random.below(second + 1);
            let state = &mut other.state;
            b.write_state(state, layer, part, slot, 0..first, &cut(all, 0, first).values)?;
            for (from, to) in [(first, second), (second, held)] {
                let values = cut(all, from, to).values;
                b.write_state(state, layer, part, slot, from..to, &values)?;
            }
        }
    }
    Ok(vec![compare("written in pieces", other.states()?, states, Relation::Bits)])
}

pub(super) fn copy_slot<P: Sequential, B: Backend>(
    p: &P,
    random: &mut Random,
    b: &B,
) -> Result<Vec<Comparison>> {
    let seqs = &p.ragged().seqs;
    let turns = |len: fn(usize) -> usize| -> Vec<Turn> {
        seqs.iter().enumerate().map(|(seq, s)| Turn { seq, len: len(s.len) }).collect()
    };
    let (first, second) = (turns(|n| n / 2), turns(|n| n - n / 2));
    let config = p.config();
    let seq = random.below(seqs.len());
    let mut original = Play::new(p, b)?;
    original.step(&first)?;
    let (from, spare) = (original.slots[seq], p.ragged().slots);
    // The slot that is copied to has been used.
    let mut used = original.slots.clone();
    used[seq] = spare;
    let mut copied = Play::in_slots(p, b, &used)?;
    copied.step(&copied.all())?;
    copied.slots.clone_from(&original.slots);
    copied.begin()?;
    copied.step(&first)?;
    let held = copied.positions(seq);
    for (layer, part) in bench::parts(&config) {
        let n = bench::part_shape(&config, part, held).iter().product();
        b.write_state(&mut copied.state, layer, part, spare, 0..held, &vec![512.0; n])?;
    }
    b.copy_slot(&config, &mut copied.state, from, spare, held)?;
    let left = copied.states()?;
    copied.slots[seq] = spare;
    let (there, states) = (copied.states()?, original.states()?);
    // What is done to the slot it was copied from is not seen in the other.
    b.reset_slot(&mut copied.state, from)?;
    original.step(&second)?;
    copied.step(&second)?;
    Ok(vec![
        compare("states where a slot was copied from", left, states.clone(), Relation::Bits),
        compare("states where a slot was copied to", there, states, Relation::Bits),
        compare("gone on in the copy", copied.end()?, original.end()?, Relation::Same),
    ])
}

pub(super) fn sequence_bytes<P: Sequential, B: Backend>(p: &P, b: &B) -> Vec<Comparison> {
    let broken =
        |what| vec![compare(what, Recording::default(), Recording::default(), Relation::Broken)];
    let config = p.config();
    let lengths = [0, 1, 2, p.ragged().context(), 4096, 4097, 1 << 20, 1 << 40, usize::MAX];
    let bytes = lengths.map(|n| b.sequence_bytes(&config, n));
    if bytes.windows(2).any(|w| w[0] > w[1]) {
        return broken("sequence_bytes: a longer sequence takes less");
    }
    // The SSM state is f32 in every backend; keys and values have four bits at the very least.
    let schedule = Schedule::new(&config);
    let ssm = 4 * schedule.mamba_layers() * config.d_inner() * config.mamba_d_state;
    if bytes[0] < ssm as u64 {
        return broken("sequence_bytes: fewer than the SSM states take in f32");
    }
    let (short, long) = (bytes[1], bytes[6]);
    if long - short < memory::kv_bytes(&config, (1 << 20) - 1, 1) / 2 {
        return broken("sequence_bytes: fewer than four bits for each key and value");
    }
    Vec::new()
}
