use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::*;
use crate::fingerprint::{Fingerprint, Hasher};

/// Position and length of the steps that a runner was given.
type Heard = Arc<Mutex<Vec<(usize, usize)>>>;

/// A model of which only the steps matter. It fails where a token is 9.
struct Steps {
    config: Config,
    heard: Heard,
    invariant: bool,
}

impl Runner for Steps {
    fn config(&self) -> &Config {
        &self.config
    }

    fn limits(&self) -> Limits {
        Limits { slots: 1, context: 100, tokens: 8, outputs: 8 }
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        let run = batch.runs()[0];
        self.heard.lock().unwrap().push((run.position, run.len));
        if batch.tokens().contains(&9) { Err(Error::EngineStopped) } else { Ok(()) }
    }

    fn step_traced(&mut self, batch: &Batch, _: Detail, _: &mut Listener<'_>) -> Result<()> {
        self.step(batch)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(vec![0.0; self.config.vocab_size])
    }

    fn reset(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn read_state(&self, _: usize, _: StatePart, _: usize, _: usize) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }

    fn write_state(&mut self, _: usize, _: StatePart, _: usize, _: usize, _: &[f32]) -> Result<()> {
        Ok(())
    }

    fn read_positions(
        &self,
        _: usize,
        _: StatePart,
        _: usize,
        _: Range<usize>,
    ) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }

    fn write_positions(
        &mut self,
        _: usize,
        _: StatePart,
        _: usize,
        _: Range<usize>,
        _: &[f32],
    ) -> Result<()> {
        Ok(())
    }

    fn copy_slot(&mut self, _: usize, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn fingerprint(&self) -> Fingerprint {
        Hasher::new().finish()
    }

    fn sequence_bytes(&self, _: usize) -> u64 {
        0
    }

    fn is_chunk_invariant(&self) -> bool {
        self.invariant
    }

    fn sibling(&self, _: Limits) -> Result<Box<dyn Runner>> {
        let Self { config, heard, invariant } = self;
        Ok(Box::new(Self { config: config.clone(), heard: heard.clone(), invariant: *invariant }))
    }
}

fn session(invariant: bool) -> (Session, Heard) {
    let config = Config::preset("jamba-tales-11m").unwrap();
    let heard = Heard::default();
    (Session::new(Box::new(Steps { config, heard: heard.clone(), invariant })), heard)
}

fn take(heard: &Heard) -> Vec<(usize, usize)> {
    std::mem::take(&mut heard.lock().unwrap())
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
