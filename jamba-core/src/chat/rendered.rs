//! What a template wrote, and its tokens.

use std::ops::Range;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// The text of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    pub(super) text: String,
    /// Byte offsets inside of what would be special tokens had a user not written them.
    pub(super) cuts: Vec<usize>,
    /// Byte ranges of `{% generation %}` blocks.
    pub(super) generation: Vec<Range<usize>>,
}

impl Rendered {
    /// The text, special tokens spelled out.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Byte ranges of the text that the template marks with `{% generation %}` as what the
    /// assistant said.
    pub fn generation(&self) -> &[Range<usize>] {
        &self.generation
    }

    /// Whether a user wrote what would be special tokens, and a
    /// [guard](super::ChatTemplate::with_guard) keeps them from being such.
    pub fn is_guarded(&self) -> bool {
        !self.cuts.is_empty()
    }

    /// Token ids: special tokens that the template wrote are such, those that a guard keeps apart
    /// are encoded as the characters that they are spelled with. Nothing is put around the text,
    /// as templates write the beginning-of-text token themselves.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        self.encode_from(tokenizer, 0)
    }

    /// [`encode`](Self::encode) of the text from a byte offset on.
    pub(super) fn encode_from(&self, tokenizer: &Tokenizer, start: usize) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for part in self.parts(start) {
            ids.extend(tokenizer.encode_plain(&self.text[part])?);
        }
        Ok(ids)
    }

    /// [`encode`](Self::encode), and which of the tokens have part in what the assistant said
    /// ([`generation`](Self::generation)): those to train on.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_with_mask(&self, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for part in self.parts(0) {
            let start = part.start;
            for (id, range) in tokenizer.encode_with_offsets(&self.text[part])? {
                let (from, to) = (start + range.start, start + range.end);
                let meets = |said: &Range<usize>| from < said.end && said.start < to;
                ids.push(id);
                mask.push(self.generation.iter().any(meets));
            }
        }
        Ok((ids, mask))
    }

    /// Ranges that are encoded each for itself.
    fn parts(&self, start: usize) -> impl Iterator<Item = Range<usize>> {
        let inner = self.cuts.iter().copied().filter(move |cut| *cut > start);
        let ends = inner.chain([self.text.len()]);
        let mut from = start;
        ends.map(move |to| std::mem::replace(&mut from, to)..to).filter(|part| !part.is_empty())
    }

    /// Whether `before` is how this begins, in text and in what is guarded.
    pub(super) fn begins_with(&self, text: &str, cuts: &[usize]) -> bool {
        let inside = self.cuts.partition_point(|cut| *cut < text.len());
        self.text.starts_with(text) && self.cuts[..inside] == *cuts
    }
}
