//! How probable a given text is.

use super::Session;
use crate::error::{Error, Result};
use crate::logprobs::{Scored, scored};

impl Session {
    /// Appends `prompt` and then `continuation`, and returns how probable each token of the
    /// continuation is, with the `top` most probable tokens in its place. Without a prompt it
    /// follows the tokens that the session has.
    ///
    /// Runs [`SessionOptions::outputs`](crate::SessionOptions::outputs) tokens of the continuation
    /// in a step.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] where there is no token before the continuation, or none in it. As
    /// [`append`](Self::append).
    pub fn score(
        &mut self,
        prompt: &[u32],
        continuation: &[u32],
        top: usize,
    ) -> Result<Vec<Scored>> {
        let all = [prompt, continuation].concat();
        self.check(&all)?;
        if continuation.is_empty() || (prompt.is_empty() && self.last_logits().is_empty()) {
            return Err(Error::EmptyPrompt);
        }
        if !prompt.is_empty() {
            self.append(prompt)?;
        }
        let mut scores = vec![scored(self.last_logits(), continuation[0], top)];
        scores.reserve(continuation.len() - 1);
        self.append_each(continuation, |i, logits| {
            if let Some(&next) = continuation.get(i + 1) {
                scores.push(scored(logits, next, top));
            }
        })?;
        Ok(scores)
    }
}
