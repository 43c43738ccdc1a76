//! Logits to a token.

use std::cmp::Ordering;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::config::{Fields, read_json};
use crate::error::{Error, Result};

#[cfg(test)]
mod tests;

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

    /// Whether the choice is that of the logits as they are ([`greedy`]).
    pub fn is_plain_greedy(&self) -> bool {
        let Self { logit_bias, repetition_penalty, presence_penalty, frequency_penalty, .. } = self;
        self.temperature == 0.0
            && logit_bias.is_empty()
            && (*repetition_penalty, *presence_penalty, *frequency_penalty) == (1.0, 0.0, 0.0)
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
#[derive(Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// `(vocab_size)`: how many times each token was generated.
    counts: Vec<u32>,
    /// `(vocab_size)`: whether a token is in `known`.
    is_known: Vec<bool>,
    /// Tokens of the prompt and generated ones, each once.
    known: Vec<u32>,
    /// Tokens seen, with repetitions.
    position: usize,
    /// `(vocab_size)`: logits after bias and penalties.
    scores: Vec<f32>,
    /// `(vocab_size)`: probabilities divided by the largest.
    weights: Vec<f32>,
    /// Of blocks of scores.
    maxima: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    score: f32,
    /// Probability divided by that of the most probable token.
    weight: f64,
}

impl Candidate {
    /// The more probable first, of equals the lower id: a total order, as no score is NaN.
    fn rank(&self, other: &Self) -> Ordering {
        let by_score = other.score.partial_cmp(&self.score).unwrap_or(Ordering::Equal);
        by_score.then(self.id.cmp(&other.id))
    }
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
        Ok(Self {
            sampling,
            rng: ChaCha8Rng::from_seed(key),
            counts: vec![0; vocab_size],
            is_known: vec![false; vocab_size],
            known: Vec::new(),
            position: 0,
            scores: Vec::with_capacity(vocab_size),
            weights: Vec::new(),
            maxima: Vec::new(),
            candidates: Vec::new(),
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
        let vocab_size = self.counts.len();
        if logits.len() != vocab_size {
            return Err(Error::Shape {
                op: "sample",
                what: "logits",
                expected: [1, vocab_size],
                got: [1, logits.len()],
            });
        }
        // All are looked at, so that the loop can be vectorised.
        let unusable = logits.iter().fold(false, |any, v| any | v.is_nan() | (*v == f32::INFINITY));
        if unusable || max(logits) == f32::NEG_INFINITY {
            return Err(Error::NonFinite { position: self.position });
        }
        self.score(logits);
        if let Some(allowed) = allowed {
            self.forbid_all_but(allowed)?;
        }
        let best = max(&self.scores);
        if best == f32::NEG_INFINITY {
            return Err(Error::Option {
                option: "logit_bias",
                value: "-inf for every token that the model allows".into(),
                allowed: "it must leave a token to choose",
            });
        }
        let best = self.scores.iter().position(|score| *score == best).unwrap_or(0);
        let id = if self.sampling.temperature == 0.0 { best as u32 } else { self.draw(best) };
        self.observe(id);
        Ok(Sampled { id, logprob: log_prob(logits, id) })
    }

    fn forbid_all_but(&mut self, allowed: &[u32]) -> Result<()> {
        let was_possible = max(&self.scores) > f32::NEG_INFINITY;
        let words = allowed.iter().copied().chain(std::iter::repeat(0));
        for (scores, word) in self.scores.chunks_mut(u32::BITS as usize).zip(words) {
            for (bit, score) in scores.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        if was_possible && max(&self.scores) == f32::NEG_INFINITY {
            let reason = "no token that the model and the options allow follows it".into();
            return Err(Error::Grammar { reason });
        }
        Ok(())
    }

    /// Counts a token as generated that was chosen elsewhere.
    pub(crate) fn observe(&mut self, id: u32) {
        self.know(id);
        if let Some(count) = self.counts.get_mut(id as usize) {
            *count = count.saturating_add(1);
        }
        self.position += 1;
    }

    /// Fills `scores`: logits after bias and penalties. A possible token stays possible unless its
    /// bias is `-inf`.
    fn score(&mut self, logits: &[f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            self.sampling;
        let scores = &mut self.scores;
        scores.clear();
        scores.extend_from_slice(logits);
        for &(id, bias) in &self.sampling.logit_bias {
            let score = &mut scores[id as usize];
            *score = bounded(f64::from(*score) + f64::from(bias));
        }
        if repetition_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0 {
            return;
        }
        for &id in &self.known {
            let mut score = f64::from(scores[id as usize]);
            if score > 0.0 {
                score /= f64::from(repetition_penalty);
            } else {
                score *= f64::from(repetition_penalty);
            }
            let count = self.counts[id as usize];
            if count > 0 {
                score -= f64::from(presence_penalty);
                score -= f64::from(frequency_penalty) * f64::from(count);
            }
            scores[id as usize] = bounded(score);
        }
    }

    /// Filters and draws. `best` is the index of the largest score.
    fn draw(&mut self, best: usize) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let max = self.scores[best];
        let limited = top_k > 0 && top_k < self.scores.len();
        let floor = if limited { self.at_most_kth(top_k) } else { f32::NEG_INFINITY };
        let candidates = &mut self.candidates;
        candidates.clear();
        let mut total = 0.0;
        if limited {
            for (id, &score) in (0..).zip(&self.scores) {
                if score >= floor && score > f32::NEG_INFINITY {
                    let weight = f64::from(exp((score - max) / temperature));
                    candidates.push(Candidate { id, score, weight });
                }
            }
        } else {
            self.weights.clear();
            self.weights.extend(self.scores.iter().map(|score| exp((score - max) / temperature)));
            total = sum(&self.weights, |weight| weight);
            let least = least(total, top_p, self.weights.len());
            for ((id, &score), &weight) in (0..).zip(&self.scores).zip(&self.weights) {
                let weight = f64::from(weight);
                if weight >= least && weight > 0.0 {
                    candidates.push(Candidate { id, score, weight });
                }
            }
        }
        // Candidates are in the order of their ids, or ranked if a filter ranks them. A draw sums
        // them in that order, so it depends on nothing but the scores.
        if limited {
            if top_k < candidates.len() {
                candidates.select_nth_unstable_by(top_k - 1, Candidate::rank);
                candidates.truncate(top_k);
            }
            candidates.sort_unstable_by(Candidate::rank);
            total = candidates.iter().map(|c| c.weight).sum();
        }
        if top_p < 1.0 {
            let least = least(total, top_p, candidates.len());
            candidates.retain(|c| c.weight >= least);
            candidates.sort_unstable_by(Candidate::rank);
            let enough = total * f64::from(top_p);
            let mut sum = 0.0;
            let reached = candidates.iter().position(|c| {
                sum += c.weight;
                sum >= enough
            });
            candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
        }
        if min_p > 0.0 {
            candidates.retain(|c| c.weight >= f64::from(min_p));
        }

        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut rest = uniform(&mut self.rng) * total;
        let drawn = candidates.iter().find(|c| {
            rest -= c.weight;
            rest < 0.0
        });
        // Rounding may leave a rest at the end: the best token is always a candidate.
        drawn.map_or(best as u32, |c| c.id)
    }

    /// A number that at least `k` scores reach, found without sorting them: the k-th largest of
    /// the maxima of blocks of scores.
    fn at_most_kth(&mut self, k: usize) -> f32 {
        const BLOCK: usize = 64;
        self.maxima.clear();
        self.maxima.extend(self.scores.chunks(BLOCK).map(max));
        if k > self.maxima.len() {
            return f32::NEG_INFINITY;
        }
        let falling = |a: &f32, b: &f32| b.partial_cmp(a).unwrap_or(Ordering::Equal);
        *self.maxima.select_nth_unstable_by(k - 1, falling).1
    }
}

/// All of `count` weights that are below this sum to less than the `1 - top_p` of `total` that may be
/// left out: only the few others need sorting.
fn least(total: f64, top_p: f32, count: usize) -> f64 {
    total * (1.0 - f64::from(top_p)) / count as f64
}

/// `e^x` for x of at most 0, within 2 units in the last place, and 1 for 0; 0 below -87; NaN stays.
///
/// Plain arithmetic, which the compiler makes vectors of, and the same bits on every machine. It is
/// `2^n e^r` with n = round(x / ln 2) and the Taylor series of `e^r` to r^7.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// A number so large that adding it leaves no bits for a fraction.
    const WHOLE: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    // ln 2 in two parts, the first exact in its products with n.
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.0 / 5040.0;
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + term;
    }
    // The last bits of `shifted` are n.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// Sum of `f` of all values, in f64, always in the same order.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0; 16];
    let (parts, rest) = values.as_chunks::<16>();
    for part in parts {
        let terms = part.map(&f);
        lanes.iter_mut().zip(terms).for_each(|(lane, term)| *lane += f64::from(term));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, v)| *lane += f64::from(f(*v)));
    lanes.iter().sum()
}

/// A score computed in f64, where nothing overflows, cut to what f32 holds; `-inf` stays.
fn bounded(score: f64) -> f32 {
    if score == f64::NEG_INFINITY {
        f32::NEG_INFINITY
    } else {
        (score as f32).clamp(f32::MIN, f32::MAX)
    }
}

/// Uniform in [0, 1), from the upper 53 bits of one draw.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The largest; NaN is passed over, `-inf` for none.
fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // Each lane has a maximum of its own, so that the loop can be vectorised.
    let mut lanes = [f32::NEG_INFINITY; 16];
    for part in values.chunks(lanes.len()) {
        for (lane, v) in lanes.iter_mut().zip(part) {
            *lane = larger(*lane, *v);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// The most probable token by the logits as they are, of equal ones that with the lowest id: what
/// [`Sampling::greedy`] chooses. `None` where a logit is not finite, or where there is none.
pub fn greedy(logits: &[f32]) -> Option<Sampled> {
    if !logits.iter().all(|v| v.is_finite()) {
        return None;
    }
    let best = max(logits);
    let id = logits.iter().position(|v| *v == best)? as u32;
    Some(Sampled { id, logprob: log_prob(logits, id) })
}

/// Log-softmax of `logits` at `id`, summed in f64: the natural logarithm of the probability of
/// that token. `-inf` where `id` is beyond the logits; NaN where a logit is NaN or `+inf` or all are
/// `-inf`.
pub fn log_prob(logits: &[f32], id: u32) -> f32 {
    let Some(&logit) = logits.get(id as usize) else { return f32::NEG_INFINITY };
    let max = max(logits);
    let sum = sum(logits, |v| exp(v - max));
    (f64::from(logit) - f64::from(max) - sum.ln()) as f32
}
