//! What chat templates need to know of a tokenizer.

use std::ops::Range;

use super::{Tokenizer, guarded};
use crate::error::Result;

impl Tokenizer {
    /// The tokens that are looked for in a text before it is cut into pieces, special or not,
    /// spelled as there.
    pub(crate) fn added_tokens(&self) -> Vec<String> {
        let tokens = self.inner.tokenizer.get_added_tokens_decoder();
        tokens.into_values().map(|token| token.content).collect()
    }

    /// The spelling of a token that [`decode`](Self::decode) leaves out.
    pub(crate) fn special(&self, id: u32) -> Option<String> {
        self.token(id).filter(|_| self.is_silent(id))
    }

    /// [`encode_plain`](Self::encode_plain), with the bytes of `text` that each token is of.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(&self.inner.path, || self.inner.tokenizer.encode(text, false))?;
        let offsets = encoding.get_offsets().iter().map(|(from, to)| *from..*to);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }
}
