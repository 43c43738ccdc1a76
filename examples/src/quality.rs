//! What another format of the weights does to a model's predictions.

use std::path::Path;

use jamba_core::{Batch, Error, LanguageModel, Limits, Outputs, Result, Runner};
use serde_json::Value;

/// A model beside the one it should be like, over the same tokens. Means over all tokens that
/// follow another one, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quality {
    /// Tokens predicted.
    pub tokens: usize,
    /// Mean negative log-probability of the text's tokens.
    pub loss: f64,
    /// The same of the model compared with.
    pub base_loss: f64,
    /// Mean Kullback-Leibler divergence, `sum p ln(p / q)` over the vocabulary, of the
    /// distribution q of the next token from that of the model compared with, p.
    pub kl: f64,
    /// How often both find the same token most probable, as a share.
    pub agreement: f64,
}

impl Quality {
    /// Runs both models over the same windows of a text, each from its beginning, in steps of
    /// `chunk` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] if no window has two tokens, or what the models report.
    pub fn measure(
        base: &dyn LanguageModel,
        model: &dyn LanguageModel,
        windows: &[Vec<u32>],
        chunk: usize,
    ) -> Result<Self> {
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        if longest < 2 {
            return Err(Error::EmptyPrompt);
        }
        // Each token takes a row of logits.
        let chunk = longest.min(chunk.max(1));
        let limits = Limits { slots: 1, context: longest, tokens: chunk, outputs: chunk };
        let mut runners = [base.runner(limits)?, model.runner(limits)?];
        let vocab_size = base.config().vocab_size;
        let mut sums = Self::default();
        for window in windows {
            for runner in &mut runners {
                runner.reset(0)?;
            }
            for start in (0..window.len().saturating_sub(1)).step_by(chunk) {
                let ids = &window[start..window.len().min(start + chunk)];
                let logits = |runner: &mut Box<dyn Runner>| {
                    runner.step(&Batch::single(0, start, ids, Outputs::All))?;
                    runner.logits()
                };
                let [base, model] = &mut runners;
                let (base, model) = (logits(base)?, logits(model)?);
                let rows = base.chunks_exact(vocab_size).zip(model.chunks_exact(vocab_size));
                // The last token of a window has none after it.
                for ((p, q), &next) in rows.zip(&window[start + 1..]) {
                    sums.add(p, q, next as usize);
                }
            }
        }
        let n = sums.tokens as f64;
        let Self { tokens, loss, base_loss, kl, agreement } = sums;
        Ok(Self {
            tokens,
            loss: loss / n,
            base_loss: base_loss / n,
            kl: kl / n,
            agreement: agreement / n,
        })
    }

    fn add(&mut self, base: &[f32], model: &[f32], next: usize) {
        let (p, q) = (log_softmax(base), log_softmax(model));
        self.tokens += 1;
        self.base_loss -= p[next];
        self.loss -= q[next];
        self.kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.agreement += f64::from(u8::from(best(base) == best(model)));
    }

    /// How much larger the loss is than that of the model compared with.
    pub fn delta(&self) -> f64 {
        self.loss - self.base_loss
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    logits.iter().map(|l| f64::from(l - max) - sum.ln()).collect()
}

/// The largest, of equal ones the first.
fn best(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// The held-out passages that the demo model comes with, as token ids.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`] for a folder without a usable `golden.json`.
pub fn held_out(demo_model: &Path) -> Result<Vec<Vec<u32>>> {
    let path = demo_model.join("golden.json");
    let text = std::fs::read_to_string(&path)
        .map_err(|source| Error::Io { path: path.clone(), source })?;
    let mut json: Value =
        serde_json::from_str(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
    let passages = json["nll"].as_array_mut().into_iter().flatten();
    passages
        .map(|passage| serde_json::from_value(passage["ids"].take()))
        .collect::<serde_json::Result<_>>()
        .map_err(|source| Error::Json { path, source })
}
