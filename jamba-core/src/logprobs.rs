//! How probable tokens are under the model: of each step, and of a given text.

use std::cmp::Ordering;

use crate::sampler::log_prob;

/// A token and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogProb {
    /// Its id.
    pub id: u32,
    /// Log-softmax of the logits at `id`, as [`log_prob`] gives it.
    pub logprob: f32,
}

/// A token of a given text.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability after the tokens before it.
    pub logprob: f32,
    /// The most probable tokens in its place, as many as were asked for, most probable first.
    pub top: Vec<TokenLogProb>,
}

/// The `n` most probable tokens, most probable first, of equal ones the lower id first.
pub fn top_log_probs(logits: &[f32], n: usize) -> Vec<TokenLogProb> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let rank = |a: &(u32, f32), b: &(u32, f32)| {
        b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
    };
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    if n < all.len() {
        all.select_nth_unstable_by(n - 1, rank);
        all.truncate(n);
    }
    all.sort_unstable_by(rank);
    // Differences of logits are differences of logarithms: one sum does for all.
    let best = log_prob(logits, all[0].0);
    let of = |(id, logit): (u32, f32)| TokenLogProb { id, logprob: best - (all[0].1 - logit) };
    all.iter().copied().map(of).collect()
}

pub(crate) fn scored(logits: &[f32], id: u32, top: usize) -> Scored {
    Scored { id, logprob: log_prob(logits, id), top: top_log_probs(logits, top) }
}

/// `exp` of the mean negative logarithm of the probabilities; 1 for no tokens.
///
/// ```
/// use jamba_core::{LanguageModel, Model, SessionOptions, Tokenizer, perplexity};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let ids = Tokenizer::from_folder(folder)?.encode("Once upon a time, there was a little girl.")?;
/// let options = SessionOptions { context: 32, outputs: 32, ..Default::default() };
/// let scored = model.session(options)?.score(&ids[..1], &ids[1..], 0)?;
/// assert!(perplexity(&scored) < 20.0);
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub fn perplexity(tokens: &[Scored]) -> f64 {
    let nll: f64 = tokens.iter().map(|token| -f64::from(token.logprob)).sum();
    (nll / tokens.len().max(1) as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_probable_in_order() {
        let logits = [0.5, 2.0, -1.0, 2.0, 1.0];
        let top = top_log_probs(&logits, 3);
        assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [1, 3, 4]);
        let all = top_log_probs(&logits, 9);
        assert_eq!(all.len(), 5);
        assert!((all.iter().map(|t| t.logprob.exp()).sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(all.iter().all(|t| (t.logprob - log_prob(&logits, t.id)).abs() < 1e-6));
        assert!(top_log_probs(&logits, 0).is_empty());
    }

    #[test]
    fn perplexity_of_a_coin() {
        let logits = [1.0, 1.0];
        let tokens = [scored(&logits, 0, 0), scored(&logits, 1, 0)];
        assert!((perplexity(&tokens) - 2.0).abs() < 1e-6);
        assert_eq!(perplexity(&[]), 1.0);
    }
}
