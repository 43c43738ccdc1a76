use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::Sampling;
use crate::testing::{Heard, Script};

#[path = "../../tests/state/play.rs"]
mod play;

use play::{Act, acts, play};

const CONTEXT: usize = 100;

/// It fails where a token is 9.
fn session(invariant: bool) -> (Session, Heard) {
    script(invariant).session()
}

fn script(invariant: bool) -> Script {
    let limits = Limits { slots: 1, context: CONTEXT, tokens: 8, outputs: 8 };
    Script { invariant, fails_at: Some(9), ..Script::new(limits) }
}

/// Position and length of the steps.
fn take(heard: &Heard) -> Vec<(usize, usize)> {
    let steps = std::mem::take(&mut *heard.lock().unwrap());
    steps.iter().map(|(position, tokens)| (*position, tokens.len())).collect()
}

#[test]
fn a_replay_repeats_the_steps_where_they_matter() {
    for invariant in [false, true] {
        let (mut s, heard) = session(invariant);
        s.append(&[1; 11]).unwrap();
        s.append(&[2; 2]).unwrap();
        s.append(&[3]).unwrap();
        assert_eq!(take(&heard), [(0, 8), (8, 3), (11, 2), (13, 1)]);
        s.rewind(1).unwrap();
        let steps = take(&heard);
        if invariant {
            assert_eq!(steps, [(0, 8), (8, 5)]);
        } else {
            assert_eq!(steps, [(0, 8), (8, 3), (11, 2)]);
        }
        // A snapshot knows the steps too; a rewind into one of them runs its beginning.
        let snapshot = s.snapshot().unwrap();
        s.append(&[4; 3]).unwrap();
        s.restore(&snapshot).unwrap();
        s.unmark(13);
        take(&heard);
        s.rewind_to(12).unwrap();
        let last = if invariant { vec![(8, 4)] } else { vec![(8, 3), (11, 1)] };
        assert_eq!(take(&heard)[1..], last);
    }
}

#[test]
fn a_failed_step_can_be_rewound() {
    let (mut s, heard) = session(true);
    s.append(&[1; 4]).unwrap();
    s.mark().unwrap();
    s.append(&[1; 2]).unwrap();
    assert!(s.append(&[9]).is_err());
    assert!(matches!(s.append(&[1]), Err(Error::Poisoned)));
    assert!(matches!(s.snapshot(), Err(Error::Poisoned)));
    take(&heard);
    let rewound = s.rewind(0).unwrap();
    assert_eq!((rewound, s.position()), (Rewound { checkpoint: Some(4), replayed: 2 }, 6));
    s.append(&[1]).unwrap();
    assert_eq!(take(&heard), [(4, 2), (6, 1)]);
}

#[test]
fn logits_of_chosen_steps_are_read_when_they_are_asked_for() {
    let script = Script { say: Some(Arc::new(|_| Some(5))), ..script(true) };
    let reads = script.reads.clone();
    let reads = || reads.load(Ordering::Relaxed);
    let (mut s, heard) = script.session();
    let sampling = Sampling { top_k: 1, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, s.config().vocab_size).unwrap();
    for _ in 0..3 {
        assert_eq!(s.append_sampled(&[1; 3], &mut sampler).unwrap().id, 5);
    }
    assert_eq!((reads(), take(&heard).len()), (0, 3));
    assert_eq!(s.last_logits().len(), s.config().vocab_size);
    assert_eq!((s.logits().len(), reads()), (s.config().vocab_size, 1));

    s.append_sampled(&[1], &mut sampler).unwrap();
    assert_eq!(s.snapshot().unwrap().logits().len(), s.config().vocab_size);
    s.append(&[1]).unwrap();
    assert!(s.take_chosen().is_none(), "the logits are here");
    s.append_sampled(&[1], &mut sampler).unwrap();
    s.reset().unwrap();
    assert!(s.take_chosen().is_none() && s.logits().is_empty());
}

#[test]
fn a_chosen_step_without_finite_logits_is_an_error() {
    let say = |tokens| (tokens != 3).then_some(5);
    let (mut s, _) = Script { say: Some(Arc::new(say)), ..script(true) }.session();
    let mut greedy = Sampler::new(Sampling::greedy(), s.config().vocab_size).unwrap();
    s.append_sampled(&[1, 2], &mut greedy).unwrap();
    let error = s.append_sampled(&[8], &mut greedy).unwrap_err();
    assert!(matches!(error, Error::NonFinite { position: 3 }), "{error}");
    assert!(matches!(s.append_sampled(&[1], &mut greedy), Err(Error::Poisoned)));
    s.rewind(0).unwrap();
    assert_eq!(s.append_sampled(&[1, 1], &mut greedy).unwrap().id, 5);
}

/// Logits and states, as bits.
fn contents(s: &Session) -> Vec<Vec<u32>> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let parts = [(0, StatePart::Ssm), (1, StatePart::Keys)];
    let states = parts.map(|(layer, part)| bits(&s.read_state(layer, part).unwrap()));
    [&[bits(s.last_logits())], &states[..]].concat()
}

/// A session that ran these tokens, and did nothing else: where it matters, in steps that end here.
fn fresh(invariant: bool, tokens: &[u32], steps: &[usize]) -> Vec<Vec<u32>> {
    let (mut s, _) = session(invariant);
    for &end in steps.iter().filter(|_| !invariant) {
        s.step(&tokens[s.position()..end], Outputs::Last, None).unwrap();
    }
    if invariant && !tokens.is_empty() {
        s.append(tokens).unwrap();
    }
    assert_eq!(s.tokens(), tokens);
    contents(&s)
}

/// Holds each session to a fresh one after every act. `steps` has what the session must remember:
/// where a backend's results depend on it, tokens that are appended end steps where they did, whatever
/// came between.
fn hold(invariant: bool, acts: &[Act]) {
    let mut known = HashMap::new();
    let before = |s: &Session| s.steps.clone();
    play(session(invariant).0, acts, before, |s, act, mut steps| {
        match act {
            Act::Append(_) | Act::AppendEach(_) => assert_eq!(s.steps[..steps.len()], steps),
            Act::Rewind(_) if !invariant => {
                let position = s.position();
                steps.retain(|step| *step < position);
                steps.extend((position > 0).then_some(position));
                assert_eq!(s.steps, steps);
            }
            _ => {}
        }
        let key = (s.tokens().to_vec(), s.steps.clone());
        let fresh =
            known.entry(key).or_insert_with_key(|(ids, steps)| fresh(invariant, ids, steps));
        assert!(contents(s) == *fresh, "{act:?}: {:?} {:?}", s.tokens(), s.steps);
    });
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(7),
        cases: 400,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_interleaving_equals_a_fresh_run(acts in acts(20, Some(9))) {
        hold(true, &acts);
    }

    /// Of a backend whose results depend on the steps: the same steps give the same.
    #[test]
    fn any_interleaving_equals_a_fresh_run_in_the_same_steps(
        acts in acts(20, Some(9)),
    ) {
        hold(false, &acts);
    }
}
