//! A [`Runner`] without a model: for tests of what stands above one.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::backend::{Limits, StatePart};
use crate::batch::Batch;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Hasher};
use crate::runner::Runner;
use crate::sampler::{Choice, Sampled};
use crate::session::Session;
use crate::trace::{Detail, Listener};

/// The steps that a [`Script`] was given: position and tokens.
pub(crate) type Heard = Arc<Mutex<Vec<(usize, Vec<u32>)>>>;

/// Called with the number of tokens so far: what the model says next, `None` for NaN.
pub(crate) type Say = Arc<dyn Fn(usize) -> Option<u32> + Send + Sync>;

/// One slot of a hybrid of two layers in whole numbers: a recurrent state, which every token
/// overwrites, and a key for each position, which stays. Its logits depend on all of them, unless
/// it is told what to say.
pub(crate) struct Script {
    pub(crate) config: Config,
    pub(crate) limits: Limits,
    pub(crate) say: Option<Say>,
    pub(crate) heard: Heard,
    /// If not, the state depends on where steps end.
    pub(crate) invariant: bool,
    /// A token that makes a step fail.
    pub(crate) fails_at: Option<u32>,
    pub(crate) state: u32,
    /// Tokens that the state is after.
    pub(crate) length: usize,
    pub(crate) keys: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    /// How many times the logits were read.
    pub(crate) reads: Arc<AtomicUsize>,
}

/// What both tokenizer and model of the tests know.
const VOCAB: usize = 4096;

impl Script {
    pub(crate) fn new(limits: Limits) -> Self {
        let preset = Config::preset("jamba-tales-11m").unwrap();
        let (num_hidden_layers, attn_layer_period, attn_layer_offset) = (2, 2, 1);
        let config = Config {
            num_hidden_layers,
            attn_layer_period,
            attn_layer_offset,
            hidden_size: 4,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 1,
            mamba_expand: 1,
            mamba_d_state: 1,
            mamba_d_conv: 2,
            vocab_size: VOCAB,
            ..preset
        };
        Self {
            config,
            limits,
            say: None,
            heard: Heard::default(),
            invariant: true,
            fails_at: None,
            state: 0,
            length: 0,
            keys: vec![0; limits.context],
            logits: Vec::new(),
            reads: Arc::default(),
        }
    }

    pub(crate) fn session(self) -> (Session, Heard) {
        let heard = self.heard.clone();
        (Session::new(Box::new(self)), heard)
    }
}

fn mix(state: u32, value: u32) -> u32 {
    (state ^ value).wrapping_mul(0x9E37_79B1).rotate_left(13).wrapping_add(value)
}

/// A number in parts that f32 holds exactly.
fn halves(value: u32) -> [f32; 2] {
    [(value >> 16) as f32, (value & 0xFFFF) as f32]
}

fn whole(halves: &[f32]) -> u32 {
    ((halves[0] as u32) << 16) | halves[1] as u32
}

impl Runner for Script {
    fn config(&self) -> &Config {
        &self.config
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        batch.check(&self.config, &self.limits)?;
        let run = batch.runs()[0];
        assert_eq!(run.position, self.length, "the state is of another position");
        self.heard.lock().unwrap().push((run.position, batch.tokens().to_vec()));
        if !self.invariant {
            self.state = mix(self.state, 1 << 20);
        }
        self.logits.clear();
        for (at, &id) in batch.tokens().iter().enumerate() {
            self.state = mix(self.state, id);
            self.keys[run.position + at] = mix(self.state, id);
            self.length += 1;
            if Some(id) == self.fails_at {
                return Err(Error::EngineStopped);
            }
            let said = self.say.as_ref().map(|say| say(self.length));
            if batch.outputs().contains(&at) {
                let context = &self.keys[..self.length];
                let seen = context.iter().fold(self.state, |all, key| mix(all, *key));
                let logit = |i: usize| match said {
                    None => (mix(seen, i as u32) % 1000) as f32 / 100.0,
                    Some(None) => f32::NAN,
                    Some(Some(id)) if id as usize == i => 9.0,
                    Some(Some(_)) => 0.0,
                };
                self.logits.extend((0..self.config.vocab_size).map(logit));
            }
        }
        Ok(())
    }

    fn step_traced(&mut self, batch: &Batch, _: Detail, _: &mut Listener<'_>) -> Result<()> {
        self.step(batch)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(self.logits.clone())
    }

    fn choose(&self, choices: &[Option<Choice<'_>>]) -> Result<Vec<Option<Sampled>>> {
        let rows = self.logits.chunks_exact(self.config.vocab_size).zip(choices);
        Ok(rows.map(|(row, choice)| choice.and_then(|c| c.sample(row).ok())).collect())
    }

    fn reset(&mut self, _: usize) -> Result<()> {
        (self.state, self.length) = (0, 0);
        Ok(())
    }

    /// `(4, 1)` of convolution and scan, `(2, positions, 1)` of keys and values.
    fn read_state(
        &self,
        _: usize,
        part: StatePart,
        _: usize,
        positions: Range<usize>,
    ) -> Result<Vec<f32>> {
        let keys = self.keys[positions].iter().map(|key| halves(*key));
        Ok(match part {
            StatePart::Conv | StatePart::Ssm => [halves(self.state), [0.0; 2]].concat(),
            StatePart::Keys | StatePart::Values => {
                let (high, low): (Vec<f32>, Vec<f32>) = keys.map(|[high, low]| (high, low)).unzip();
                [high, low].concat()
            }
        })
    }

    fn write_state(
        &mut self,
        _: usize,
        part: StatePart,
        _: usize,
        positions: Range<usize>,
        values: &[f32],
    ) -> Result<()> {
        match part {
            StatePart::Conv | StatePart::Ssm => {
                self.state = whole(values);
                self.length = positions.end;
            }
            StatePart::Keys | StatePart::Values => {
                let (high, low) = values.split_at(positions.len());
                for (key, (high, low)) in self.keys[positions].iter_mut().zip(high.iter().zip(low))
                {
                    *key = whole(&[*high, *low]);
                }
            }
        }
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

    fn sibling(&self, limits: Limits) -> Result<Box<dyn Runner>> {
        let (say, heard, reads) = (self.say.clone(), self.heard.clone(), self.reads.clone());
        let Self { invariant, fails_at, .. } = *self;
        Ok(Box::new(Self { say, heard, reads, invariant, fails_at, ..Self::new(limits) }))
    }
}
