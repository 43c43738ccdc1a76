//! Logits to a token.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::files::read_json;

mod choice;
#[cfg(test)]
mod tests;

use choice::Work;
pub use choice::{Choice, log_prob};

/// How a token is chosen from the logits. Every option has a value that switches it off.
///
/// They are applied in the order of the fields, that of transformers' logits processors; what
/// remains is renormalised after each filter. The default leaves the model's own distribution as
/// it is: temperature 1 and everything else off.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Added to the logits of these tokens; `-inf` forbids one. Several for a token add up.
    pub logit_bias: Vec<(u32, f32)>,
    /// Divides a positive and multiplies a negative logit of every token that occurs in the prompt
    /// or was generated (Keskar et al., arXiv 1909.05858, section 4.1). 1 is off.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token that was generated; the prompt does not count, as in
    /// OpenAI's API. 0 is off.
    pub presence_penalty: f32,
    /// Taken from the logit of a token once for each time that it was generated; the prompt does
    /// not count. 0 is off.
    pub frequency_penalty: f32,
    /// Divides the logits. 0 is greedy: the largest logit is chosen, of equal ones that with the
    /// lowest id, and the options below have no effect. 1 is off.
    pub temperature: f32,
    /// Only the `top_k` most probable tokens are kept, of equal ones those with the lowest ids.
    /// 0 is off.
    pub top_k: usize,
    /// Only the smallest set of most probable tokens whose probabilities sum to at least `top_p`
    /// is kept; at least one. 1 is off.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as probable as the most probable one are kept. 0 is off.
    pub min_p: f32,
    /// Seed of the random numbers. The same seed, options and logits give the same tokens whatever
    /// the number of threads. (Where logits differ in the last bit, as they do between devices,
    /// a token may.)
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Temperature 0: always the most probable token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// What `generation_config.json` of a model folder asks for: `do_sample`, `temperature`,
    /// `top_k`, `top_p`, `min_p` and `repetition_penalty`.
    ///
    /// As in transformers, it is greedy unless `do_sample` is true, so also where there is no such
    /// file. Unlike there, a filter that the file does not name is off. (transformers has a
    /// `top_k` of 50 then.)
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], [`Error::Config`] for a field of another type than
    /// expected, [`Error::Option`] for a value that makes no sense.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let Some(file) = read_json(&folder.as_ref().join("generation_config.json"))? else {
            return Ok(Self::greedy());
        };
        let field = Fields::new(&file, "generation_config.json")?;
        let off = Self::default();
        let mut sampling = Self {
            repetition_penalty: field
                .float("repetition_penalty")?
                .unwrap_or(off.repetition_penalty),
            temperature: field.float("temperature")?.unwrap_or(off.temperature),
            top_k: field.size("top_k")?.unwrap_or(off.top_k),
            top_p: field.float("top_p")?.unwrap_or(off.top_p),
            min_p: field.float("min_p")?.unwrap_or(off.min_p),
            ..off
        };
        if field.flag("do_sample")? != Some(true) {
            sampling.temperature = 0.0;
        }
        sampling.check()?;
        Ok(sampling)
    }

    /// Checks every option; ids of `logit_bias` must be below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Option`] with the option, its value and what is allowed.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        self.check()?;
        for &(id, bias) in &self.logit_bias {
            option("logit_bias", bias, "it must be a finite number or -inf", |bias| {
                bias.is_finite() || bias == f32::NEG_INFINITY
            })?;
            if id as usize >= vocab_size {
                let allowed = "every token id must be below the model's vocab_size";
                return Err(Error::Option { option: "logit_bias", value: id.to_string(), allowed });
            }
        }
        Ok(())
    }

    /// What can be checked without knowing the vocabulary.
    fn check(&self) -> Result<()> {
        let positive = |v: f32| v.is_finite() && v > 0.0;
        let not_negative = |v: f32| v.is_finite() && v >= 0.0;
        let share = |v: f32| (0.0..=1.0).contains(&v);
        let (above_0, from_0) =
            ("it must be a number above 0", "it must be a number of at least 0");
        option("repetition_penalty", self.repetition_penalty, above_0, positive)?;
        option("presence_penalty", self.presence_penalty, "it must be finite", f32::is_finite)?;
        option("frequency_penalty", self.frequency_penalty, "it must be finite", f32::is_finite)?;
        option("temperature", self.temperature, from_0, not_negative)?;
        option("top_p", self.top_p, "0 to 1 is allowed", share)?;
        option("min_p", self.min_p, "0 to 1 is allowed", share)
    }
}

fn option(
    option: &'static str,
    value: f32,
    allowed: &'static str,
    holds: impl Fn(f32) -> bool,
) -> Result<()> {
    if holds(value) {
        Ok(())
    } else {
        Err(Error::Option { option, value: value.to_string(), allowed })
    }
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under the model: log-softmax of the logits as they
    /// came, before any option.
    pub logprob: f32,
}

/// Chooses the tokens of one sequence: the options, what was generated so far, and the generator
/// of random numbers (ChaCha with 8 rounds, keyed with the seed as 8 little-endian bytes and zeros).
///
/// ```
/// use jamba_core::{Sampler, Sampling};
///
/// let logits = [0.5, 2.0, -1.0, 1.5];
/// let mut greedy = Sampler::new(Sampling::greedy(), logits.len())?;
/// assert_eq!(greedy.sample(&logits)?.id, 1);
///
/// let sampling = Sampling { temperature: 0.7, top_k: 2, seed: 42, ..Default::default() };
/// let mut sampler = Sampler::new(sampling, logits.len())?;
/// let sampled = sampler.sample(&logits)?;
/// assert!([1, 3].contains(&sampled.id) && sampled.logprob < 0.0);
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Sampler {
    sampling: Sampling,
    /// `logit_bias` by ascending id.
    bias: Vec<(u32, f32)>,
    rng: ChaCha8Rng,
    /// `(vocab_size)`: how many times each token was generated.
    counts: Vec<u32>,
    /// `(vocab_size)`: whether a token is in `known`.
    is_known: Vec<bool>,
    /// Tokens of the prompt and generated ones, each once.
    known: Vec<u32>,
    /// Tokens seen, with repetitions.
    position: usize,
    /// The random number of the next token.
    uniform: f64,
    work: Work,
}

impl Sampler {
    /// A sampler for logits of `vocab_size` values.
    ///
    /// # Errors
    /// Those of [`Sampling::validate`].
    pub fn new(sampling: Sampling, vocab_size: usize) -> Result<Self> {
        sampling.validate(vocab_size)?;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&sampling.seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        let mut bias = sampling.logit_bias.clone();
        bias.sort_by_key(|(id, _)| *id);
        Ok(Self {
            uniform: if sampling.temperature == 0.0 { 0.0 } else { uniform(&mut rng) },
            sampling,
            bias,
            rng,
            counts: vec![0; vocab_size],
            is_known: vec![false; vocab_size],
            known: Vec::new(),
            position: 0,
            work: Work::default(),
        })
    }

    /// The options.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Tells the tokens of a prompt, which the repetition penalty counts. Ids beyond the
    /// vocabulary have no logit and no effect.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        self.position += ids.len();
        ids.iter().for_each(|&id| self.know(id));
    }

    fn know(&mut self, id: u32) {
        if let Some(is_known) = self.is_known.get_mut(id as usize)
            && !*is_known
        {
            *is_known = true;
            self.known.push(id);
        }
    }

    /// Chooses a token by `logits` (`vocab_size` values) and counts it as generated.
    ///
    /// A logit of `-inf` is never chosen. One random number is drawn for a token, none if greedy.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`] where a logit is NaN or `+inf` or all are `-inf`,
    /// [`Error::Option`] where `logit_bias` leaves no token. Nothing is drawn or counted then.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        self.choose(logits, None)
    }

    /// [`sample`](Self::sample) of the tokens of a set: a bit for each, the lowest of the first word
    /// for token 0. Tokens beyond the words are not in it.
    ///
    /// # Errors
    /// Those of `sample`, and [`Error::Grammar`] where the set has no token that is possible.
    pub fn sample_among(&mut self, logits: &[f32], allowed: &[u32]) -> Result<Sampled> {
        self.choose(logits, Some(allowed))
    }

    fn choose(&mut self, logits: &[f32], allowed: Option<&[u32]>) -> Result<Sampled> {
        let mut work = std::mem::take(&mut self.work);
        let sampled = work.choose(&self.choice(), logits, allowed, self.position);
        self.work = work;
        let sampled = sampled?;
        self.observe(sampled.id);
        Ok(sampled)
    }

    /// What the choice of the next token depends on beside its logits. Whoever makes it elsewhere
    /// tells the token with [`observe`](Self::observe).
    pub fn choice(&self) -> Choice<'_> {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            self.sampling;
        let penalties = (repetition_penalty, presence_penalty, frequency_penalty);
        let known: &[u32] = if penalties == (1.0, 0.0, 0.0) { &[] } else { &self.known };
        let Self { sampling, bias, counts, uniform, .. } = self;
        Choice { sampling, bias, known, counts, uniform: *uniform }
    }

    /// Counts a token as generated that was chosen elsewhere, by [`choice`](Self::choice): the random
    /// number of that choice is used up.
    pub fn observe(&mut self, id: u32) {
        if self.sampling.temperature != 0.0 {
            self.uniform = uniform(&mut self.rng);
        }
        self.know(id);
        if let Some(count) = self.counts.get_mut(id as usize) {
            *count = count.saturating_add(1);
        }
        self.position += 1;
    }
}

/// Uniform in [0, 1), from the upper 53 bits of one draw.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
