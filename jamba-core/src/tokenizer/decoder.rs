//! Ids to text, one at a time.

use tokenizers::DecoderWrapper;

use super::Tokenizer;
use crate::error::Result;

/// Ids to text, one at a time: each push returns the text that became certain.
///
/// A character whose bytes are split over several tokens is returned whole, with the last of them;
/// bytes that cannot become one are returned as U+FFFD, and nothing else is. The pieces and
/// [`finish`](Self::finish) together are the text that [`Tokenizer::decode`] gives for all ids at
/// once. (With one exception: a byte-fallback tokenizer turns a whole run of byte tokens into U+FFFD
/// where one is wrong, even those that make up a character.)
///
/// Nothing is decoded twice but the last character or token, which what follows may depend on (a
/// leading space is dropped at the beginning of a text only), so a push costs the same however long
/// the text is.
#[derive(Clone)]
pub struct Decoder {
    tokenizer: Tokenizer,
    /// The last ids whose text is whole; none at the beginning of a text.
    anchor: Vec<u32>,
    /// The ids after them, whose text is not.
    open: Vec<u32>,
    /// Their bytes, where tokens stand for bytes: the beginning of a character.
    bytes: Vec<u8>,
    /// How many of `bytes` are of ids that were there before.
    inherited: usize,
}

/// How tokens stand for bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// Every character of a token is a byte (GPT-2).
    Level,
    /// Bytes have tokens of their own, `<0xE7>`; the others are text (SentencePiece).
    Fallback,
    /// They do not, as far as is known.
    Text,
}

const REPLACEMENT: char = '\u{FFFD}';
/// A character has at most four bytes: so many tokens may be missing one.
const OPEN: usize = 3;

impl Alphabet {
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Self::Level,
            Some(DecoderWrapper::ByteFallback(_)) => Self::Fallback,
            Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
                [one] => Self::new(Some(one)),
                all if all.iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_))) => {
                    Self::Fallback
                }
                _ => Self::Text,
            },
            _ => Self::Text,
        }
    }

    /// The bytes that a token stands for; `None` for one that is text.
    pub(super) fn bytes(self, token: &str) -> Option<Vec<u8>> {
        match self {
            Self::Level => {
                let bytes = token.chars().map(level_byte).collect::<Option<Vec<u8>>>();
                Some(bytes.unwrap_or_else(|| token.as_bytes().to_vec()))
            }
            Self::Fallback => {
                let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
                let byte = u8::from_str_radix(digits, 16).ok();
                byte.filter(|_| digits.len() == 2).map(|byte| vec![byte])
            }
            Self::Text => None,
        }
    }
}

/// The byte that a character of a byte-level token stands for: printable ones for themselves, those
/// from U+0100 on for the others in order.
fn level_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// How many bytes at the end of `bytes` are the beginning of a character.
fn open_bytes(bytes: &[u8]) -> usize {
    let beginning = |n: &usize| {
        let tail = &bytes[bytes.len() - n..];
        std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
    };
    (1..=bytes.len().min(OPEN)).rev().find(beginning).unwrap_or(0)
}

impl Decoder {
    pub(super) fn new(tokenizer: &Tokenizer, before: &[u32]) -> Result<Self> {
        let mut decoder = Self {
            tokenizer: tokenizer.clone(),
            anchor: Vec::new(),
            open: Vec::new(),
            bytes: Vec::new(),
            inherited: 0,
        };
        // As many ids as an unfinished character and the one before it can have.
        let heard = before.iter().rev().copied().filter(|id| !tokenizer.is_silent(*id));
        let mut last: Vec<u32> = heard.take(2 * OPEN + 1).collect();
        last.reverse();
        let bytes: Vec<_> = last.iter().map(|id| decoder.bytes_of(*id)).collect();
        let run = bytes.iter().rev().take_while(|bytes| bytes.is_some()).count();
        let all =
            bytes[last.len() - run..].iter().flatten().flatten().copied().collect::<Vec<u8>>();
        let inherited = open_bytes(&all);
        decoder.bytes = all[all.len() - inherited..].to_vec();
        decoder.inherited = inherited;
        if tokenizer.inner.alphabet == Alphabet::Fallback {
            // A byte is a token here.
            let whole = &all[..all.len() - inherited];
            let is_character = |n: &usize| {
                let end = whole.len().checked_sub(*n).map(|start| &whole[start..]);
                end.and_then(|end| std::str::from_utf8(end).ok())
                    .is_some_and(|text| text.chars().count() == 1)
            };
            let unit = (1..=OPEN + 1).find(is_character).unwrap_or(1);
            let (rest, open) = last.split_at(last.len() - inherited);
            decoder.open = open.to_vec();
            decoder.anchor = rest[rest.len().saturating_sub(unit)..].to_vec();
        } else {
            decoder.anchor = last.last().copied().into_iter().collect();
        }
        Ok(decoder)
    }

    fn bytes_of(&self, id: u32) -> Option<Vec<u8>> {
        self.tokenizer.inner.alphabet.bytes(&self.tokenizer.token(id)?)
    }

    /// Ids and bytes that it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.anchor.len() + self.open.len() + self.bytes.len()
    }

    /// Takes the next id and returns the text that became certain, possibly none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.tokenizer.is_silent(id) {
            return Ok(String::new());
        }
        match self.bytes_of(id) {
            Some(bytes) => self.push_bytes(id, &bytes),
            None => self.push_text(id),
        }
    }

    /// Whole characters, and U+FFFD for what cannot become one.
    fn push_bytes(&mut self, id: u32, bytes: &[u8]) -> Result<String> {
        self.open.push(id);
        self.bytes.extend_from_slice(bytes);
        let keep = open_bytes(&self.bytes);
        let whole: Vec<u8> = self.bytes.drain(..self.bytes.len() - keep).collect();
        if whole.is_empty() {
            return Ok(String::new());
        }
        let mut text = String::new();
        let mut at = 0;
        for chunk in whole.utf8_chunks() {
            text.push_str(chunk.valid());
            at += chunk.valid().len();
            text.push_str(&self.replaced(chunk.invalid().len(), at));
            at += chunk.invalid().len();
        }
        self.inherited = self.inherited.saturating_sub(at);
        // Of byte-level tokens, what is open needs no ids.
        let fallback = self.tokenizer.inner.alphabet == Alphabet::Fallback;
        let open = self.open.split_off(self.open.len() - if fallback { keep } else { 0 });
        let ids = std::mem::replace(&mut self.open, open);
        if fallback && self.anchor.is_empty() && text.as_bytes() == whole {
            // The beginning of a text may be treated in a way of its own.
            text = self.tokenizer.decode(&ids)?;
        }
        self.anchor = ids;
        Ok(text)
    }

    /// U+FFFD for `count` bytes from `at` on that are no character, as the tokenizer gives them: one
    /// for all, or for each. The text before has those of the bytes that it began with.
    fn replaced(&self, count: usize, at: usize) -> String {
        let theirs = self.inherited.saturating_sub(at).min(count);
        let ours = match self.tokenizer.inner.alphabet {
            Alphabet::Fallback => count - theirs,
            _ => usize::from(count > 0 && theirs == 0),
        };
        REPLACEMENT.to_string().repeat(ours)
    }

    /// What a token adds that is text; bytes before it will be no character any more.
    fn push_text(&mut self, id: u32) -> Result<String> {
        let mut piece = self.replaced(self.bytes.len(), 0);
        if !self.bytes.is_empty() {
            self.anchor = std::mem::take(&mut self.open);
            self.bytes.clear();
            self.inherited = 0;
        }
        self.open.push(id);
        let text = self.text_of_open()?;
        let held = self.tokenizer.inner.alphabet == Alphabet::Text
            && text.ends_with(REPLACEMENT)
            && self.open.len() <= OPEN;
        if !held {
            piece.push_str(&text);
            self.anchor = std::mem::take(&mut self.open);
        }
        Ok(piece)
    }

    /// What the open ids add to the text before them.
    fn text_of_open(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.anchor)?;
        let all = self.tokenizer.decode(&[&self.anchor[..], &self.open].concat())?;
        match all.strip_prefix(&before) {
            Some(added) => Ok(added.to_owned()),
            None => self.tokenizer.decode(&self.open),
        }
    }

    /// Returns what was held back, with U+FFFD for a character that was never completed, and
    /// makes the decoder ready for a new text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn finish(&mut self) -> Result<String> {
        let text = if self.tokenizer.inner.alphabet == Alphabet::Text {
            self.text_of_open()?
        } else {
            self.replaced(self.bytes.len(), 0)
        };
        self.anchor.clear();
        self.open.clear();
        self.bytes.clear();
        self.inherited = 0;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_gpt_2() {
        let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let others: Vec<u8> = (0..=255).filter(|b| !printable(b)).collect();
        for byte in 0..=255u8 {
            let letter = match others.iter().position(|other| *other == byte) {
                Some(i) => char::from_u32(0x100 + i as u32).unwrap(),
                None => char::from(byte),
            };
            assert_eq!(level_byte(letter), Some(byte));
        }
        assert!([' ', '\u{AD}', '\u{144}', '狐'].iter().all(|c| level_byte(*c).is_none()));
    }

    #[test]
    fn beginnings_of_characters() {
        for (bytes, open) in [
            (&b"abc"[..], 0),
            (b"", 0),
            (b"a\xF0\x9F\xA6", 3),
            (b"\xF0\x9F\xA6\x8A", 0),
            (b"\xE7\x8B", 2),
            (b"\xE7", 1),
            (b"\x80\x80\x80", 0),
            (b"\xE7\xE7", 1),
            (b"\xE0\x80", 0),
            (b"\xFF", 0),
        ] {
            assert_eq!(open_bytes(bytes), open, "{bytes:x?}");
        }
    }
}
