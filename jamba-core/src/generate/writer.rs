//! Logits of one sequence to pieces of text.

use super::stops::Stops;
use super::{FinishReason, GenerateOptions, Hold, Piece};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::logprobs::{TokenLogProb, top_log_probs};
use crate::sampler::{Choice, Sampled, Sampler};
use crate::tokenizer::{Decoder, Tokenizer};

/// What a generation is apart from the model that it runs: sampling, text, and when to end.
pub(crate) struct Writer {
    tokenizer: Option<Tokenizer>,
    sampler: Sampler,
    /// None where only ids are wanted.
    decoder: Option<Decoder>,
    stops: Stops,
    /// Tokens to generate still.
    rest: usize,
    /// Tokens that end the text.
    eos_ids: Vec<u32>,
    logprobs: usize,
    hold: Hold,
}

impl Writer {
    pub(crate) fn new(
        tokenizer: Option<&Tokenizer>,
        config: &Config,
        options: GenerateOptions,
    ) -> Result<Self> {
        match (tokenizer, options.stop.first()) {
            (Some(tokenizer), _) => tokenizer.check_vocab(config.vocab_size)?,
            (None, Some(stop)) => {
                let allowed = "a stop string needs a tokenizer to be found in the text";
                return Err(Error::Option { option: "stop", value: format!("{stop:?}"), allowed });
            }
            (None, None) => {}
        }
        #[cfg(feature = "structured")]
        let hold = Hold::new(options.grammar.as_ref(), tokenizer, config)?;
        #[cfg(not(feature = "structured"))]
        let hold = Hold::default();
        let GenerateOptions { sampling, max_tokens, stop, ignore_eos, logprobs, .. } = options;
        Ok(Self {
            tokenizer: tokenizer.cloned(),
            sampler: Sampler::new(sampling, config.vocab_size)?,
            decoder: None,
            stops: Stops::new(stop)?,
            rest: max_tokens,
            eos_ids: if ignore_eos { Vec::new() } else { config.eos_token_ids.clone() },
            logprobs,
            hold,
        })
    }

    /// Tells all tokens so far, the last `new` of which were not told before.
    pub(crate) fn prompt(&mut self, ids: &[u32], new: usize) -> Result<()> {
        self.sampler.observe_prompt(&ids[ids.len() - new..]);
        self.decoder =
            self.tokenizer.as_ref().map(|tokenizer| tokenizer.decoder(ids)).transpose()?;
        Ok(())
    }

    /// Whether no token is left to generate.
    pub(crate) fn is_done(&self) -> bool {
        self.rest == 0
    }

    /// How the backend may choose the next token, where nothing else is asked of the logits. (What
    /// a grammar allows is masked on the host.)
    pub(crate) fn choice(&self) -> Option<Choice<'_>> {
        (self.logprobs == 0 && !self.hold.is_there()).then(|| self.sampler.choice())
    }

    /// Chooses the next token, and says whether it is the last and why. `is_full` says that the
    /// sequence has no room for it.
    pub(crate) fn write(
        &mut self,
        logits: &[f32],
        is_full: bool,
    ) -> Result<(Piece, Option<FinishReason>)> {
        let sampled = match self.hold.mask(&self.eos_ids)? {
            Some(allowed) => self.sampler.sample_among(logits, allowed)?,
            None => self.sampler.sample(logits)?,
        };
        self.push(sampled, top_log_probs(logits, self.logprobs), is_full)
    }

    /// [`write`](Self::write) with the token that the backend chose by [`choice`](Self::choice).
    pub(crate) fn write_chosen(
        &mut self,
        chosen: Sampled,
        is_full: bool,
    ) -> Result<(Piece, Option<FinishReason>)> {
        self.sampler.observe(chosen.id);
        self.push(chosen, Vec::new(), is_full)
    }

    fn push(
        &mut self,
        Sampled { id, logprob }: Sampled,
        top: Vec<TokenLogProb>,
        is_full: bool,
    ) -> Result<(Piece, Option<FinishReason>)> {
        self.rest = self.rest.saturating_sub(1);
        let is_complete = self.hold.push(id, &self.eos_ids)?;
        let eos = self.eos_ids.contains(&id);
        let decoded = match &mut self.decoder {
            Some(decoder) if !eos => decoder.push(id)?,
            _ => String::new(),
        };
        let (mut text, stopped) = self.stops.push(&decoded);
        let mut reason = if stopped {
            Some(FinishReason::Stop)
        } else if eos {
            Some(FinishReason::Eos)
        } else if is_complete {
            Some(FinishReason::Grammar)
        } else if self.is_done() {
            Some(FinishReason::Length)
        } else if is_full {
            Some(FinishReason::Context)
        } else {
            None
        };
        if reason.is_some() && !stopped {
            let (rest, stopped) = self.flush()?;
            text.push_str(&rest);
            reason = if stopped { Some(FinishReason::Stop) } else { reason };
        }
        Ok((Piece { id: Some(id), logprob, top, text }, reason))
    }

    /// The text that is held back, of a text that ends without another token.
    pub(crate) fn rest(&mut self) -> Result<Option<Piece>> {
        let (text, _) = self.flush()?;
        let piece = Piece { id: None, logprob: 0.0, top: Vec::new(), text };
        Ok((!piece.text.is_empty()).then_some(piece))
    }

    /// The text held back, and whether a stop string ends it.
    fn flush(&mut self) -> Result<(String, bool)> {
        let decoded = self.decoder.as_mut().map(Decoder::finish).transpose()?;
        let (mut text, stopped) = self.stops.push(&decoded.unwrap_or_default());
        text.push_str(&self.stops.rest());
        Ok((text, stopped))
    }
}
