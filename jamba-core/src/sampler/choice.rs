//! What a choice depends on beside the logits, and the choice on the host.

use std::cell::Cell;
use std::cmp::Ordering;

use super::{Sampled, Sampling};
use crate::error::{Error, Result};

/// What the choice of a token depends on beside its logits, so that whoever has the logits can make
/// it: [`sample`](Self::sample), and [`Backend::choose`](crate::Backend::choose) where they are.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The options.
    pub sampling: &'a Sampling,
    /// `logit_bias` by ascending id; several for a token in their order.
    pub bias: &'a [(u32, f32)],
    /// Tokens of the prompt and generated ones, each once, in any order; none where nothing is
    /// penalised.
    pub known: &'a [u32],
    /// `(vocab_size)`: how many times each token was generated.
    pub counts: &'a [u32],
    /// In [0, 1): the share of the summed probabilities, in the order that the filters leave, at
    /// which the draw falls. 0 if greedy.
    pub uniform: f64,
}

impl Choice<'_> {
    /// The token that `logits` (`vocab_size` values) give: this defines what a backend chooses.
    ///
    /// Weights are `e^((score - best) / temperature)` in f32, sums f64. They are summed by
    /// ascending id, or, where `top_k` or `top_p` filters, by falling score and then by id. The
    /// draw is the first token with which the sum exceeds [`uniform`](Self::uniform) of the total.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`](super::Sampler::sample), at position 0.
    pub fn sample(&self, logits: &[f32]) -> Result<Sampled> {
        thread_local! {
            static WORK: Cell<Work> = Cell::default();
        }
        let mut work = WORK.take();
        let sampled = work.choose(self, logits, None, 0);
        WORK.set(work);
        sampled
    }
}

/// What the choice on the host needs room for.
#[derive(Clone, Default)]
pub(super) struct Work {
    /// `(vocab_size)`: logits after bias and penalties.
    pub(super) scores: Vec<f32>,
    /// `(vocab_size)`: probabilities divided by the largest.
    weights: Vec<f32>,
    /// Of blocks of scores.
    maxima: Vec<f32>,
    pub(super) candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) id: u32,
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

impl Work {
    /// Chooses among the tokens of a set, or all. `position` is what an error tells.
    pub(super) fn choose(
        &mut self,
        choice: &Choice<'_>,
        logits: &[f32],
        allowed: Option<&[u32]>,
        position: usize,
    ) -> Result<Sampled> {
        let vocab_size = choice.counts.len();
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
            return Err(Error::NonFinite { position });
        }
        self.score(choice, logits);
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
        let is_greedy = choice.sampling.temperature == 0.0;
        let id = if is_greedy { best as u32 } else { self.draw(choice, best) };
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

    /// Fills `scores`: logits after bias and penalties. A possible token stays possible unless its
    /// bias is `-inf`.
    pub(super) fn score(&mut self, choice: &Choice<'_>, logits: &[f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            *choice.sampling;
        let scores = &mut self.scores;
        scores.clear();
        scores.extend_from_slice(logits);
        for &(id, bias) in choice.bias {
            let score = &mut scores[id as usize];
            *score = bounded(f64::from(*score) + f64::from(bias));
        }
        for &id in choice.known {
            let mut score = f64::from(scores[id as usize]);
            if score > 0.0 {
                score /= f64::from(repetition_penalty);
            } else {
                score *= f64::from(repetition_penalty);
            }
            let count = choice.counts[id as usize];
            if count > 0 {
                score -= f64::from(presence_penalty);
                score -= f64::from(frequency_penalty) * f64::from(count);
            }
            scores[id as usize] = bounded(score);
        }
    }

    /// Filters and draws. `best` is the index of the largest score.
    fn draw(&mut self, choice: &Choice<'_>, best: usize) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = *choice.sampling;
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
        let mut rest = choice.uniform * total;
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
pub(super) fn exp(x: f32) -> f32 {
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

/// Log-softmax of `logits` at `id`, summed in f64: the natural logarithm of the probability of
/// that token. `-inf` where `id` is beyond the logits; NaN where a logit is NaN or `+inf` or all are
/// `-inf`.
pub fn log_prob(logits: &[f32], id: u32) -> f32 {
    let Some(&logit) = logits.get(id as usize) else { return f32::NEG_INFINITY };
    let max = max(logits);
    let sum = sum(logits, |v| exp(v - max));
    (f64::from(logit) - f64::from(max) - sum.ln()) as f32
}
