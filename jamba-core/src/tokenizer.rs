//! Text to token ids and back, whole or one id at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::config::{Fields, missing, read_json};
use crate::error::{Error, Result};

#[cfg(test)]
mod tests;

/// The tokenizer of a model folder. A clone shares it.
///
/// A special token that is spelled out in a text (`<|endoftext|>`) becomes its id, as in
/// transformers: text that is not trusted should be searched for them first.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    path: PathBuf,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` if there is one, from a model folder.
    ///
    /// Of `tokenizer_config.json`, `add_bos_token`, `bos_token` and `eos_token` are used. A
    /// truncation or padding that `tokenizer.json` asks for is switched off: a text is encoded
    /// whole or not at all.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`], [`Error::Json`], [`Error::Config`] for a field of
    /// another type than expected, [`Error::Tokenizer`] for a tokenizer that cannot be used.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(missing(folder, "tokenizer.json"));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| refused(&path, e))?;
        tokenizer.with_padding(None).with_truncation(None).map_err(|e| refused(&path, e))?;

        let (mut bos_id, mut eos_id, mut add_bos) = (None, None, false);
        let config_path = folder.join("tokenizer_config.json");
        if let Some(config) = read_json(&config_path)? {
            add_bos = Fields::new(&config, "tokenizer_config.json")?
                .flag("add_bos_token")?
                .unwrap_or(false);
            let bos_token = token_text(&config, "bos_token")?;
            bos_id = bos_token.and_then(|token| tokenizer.token_to_id(token));
            eos_id =
                token_text(&config, "eos_token")?.and_then(|token| tokenizer.token_to_id(token));
            if let (true, Some(token), None) = (add_bos, bos_token, bos_id) {
                let reason = format!("bos_token `{token}` is not in the vocabulary");
                return Err(refused(&config_path, reason));
            }
        }
        Ok(Self { inner: Arc::new(Inner { tokenizer, path, bos_id, eos_id, add_bos }) })
    }

    /// Ids of `text`, with the special tokens that the tokenizer puts around a text.
    ///
    /// Where `tokenizer_config.json` has `add_bos_token: true`, the ids begin with the
    /// beginning-of-text token even if `tokenizer.json` does not put it there. (transformers'
    /// `LlamaTokenizerFast` rewrites the post-processor for it.)
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.ids(text, true)?;
        if let (true, Some(bos)) = (self.inner.add_bos, self.inner.bos_id)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids of `text` alone, nothing put around it: for what goes on from earlier text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.tokenizer.encode_fast(text, add_special);
        Ok(encoding.map_err(|e| refused(&self.inner.path, e))?.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens.
    ///
    /// Ids that are not in the vocabulary have no text (models pad it to a round number). Bytes
    /// that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, true)
    }

    /// [`decode`](Self::decode) with special tokens spelled out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, false)
    }

    fn text(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if ids.is_empty() {
            return Ok(String::new());
        }
        let text = self.inner.tokenizer.decode(ids, skip_special);
        text.map_err(|e| refused(&self.inner.path, e))
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// Tokens in the vocabulary, special ones included; at most the model's `vocab_size`.
    pub fn vocab_size(&self) -> usize {
        self.inner.tokenizer.get_vocab_size(true)
    }

    /// The beginning-of-text token of `tokenizer_config.json`.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos_id
    }

    /// The end-of-text token of `tokenizer_config.json`.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.eos_id
    }

    /// A [`Decoder`] for the ids that follow `before` (of which a few are looked at): its text is
    /// what they add to the text of `before`. `before` is empty at the beginning of a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decoder(&self, before: &[u32]) -> Result<Decoder> {
        let heard = before.iter().rev().filter(|id| !self.is_silent(**id));
        let mut ids: Vec<u32> = heard.copied().take(KEEP).collect();
        ids.reverse();
        let mut given = self.decode(&ids)?;
        let open = open_tail(&given);
        given.truncate(given.len() - open);
        let inherited = open / REPLACEMENT.len_utf8();
        Ok(Decoder { tokenizer: self.clone(), ids, given, fresh: 0, inherited })
    }

    /// Whether [`decode`](Self::decode) leaves this id out.
    fn is_silent(&self, id: u32) -> bool {
        let special =
            |token: &str| self.inner.tokenizer.get_added_vocabulary().is_special_token(token);
        self.token(id).is_none_or(|token| special(&token))
    }
}

fn refused(path: &Path, reason: impl ToString) -> Error {
    Error::Tokenizer { path: path.to_owned(), reason: reason.to_string() }
}

/// A token that is written as a string or as an object with `content`.
fn token_text<'a>(config: &'a Value, key: &'static str) -> Result<Option<&'a str>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.get("content").unwrap_or(value).as_str() {
            Some(token) => Ok(Some(token)),
            None => Err(Error::Config {
                field: key,
                value: value.to_string(),
                allowed: "a string, or an object with `content`, is expected".into(),
            }),
        },
    }
}

/// Ids to text, one at a time: each push returns the text that became certain.
///
/// A character whose bytes are split over several tokens is returned whole, with the last of them;
/// bytes that cannot become one are returned as U+FFFD. The pieces and [`finish`](Self::finish)
/// together are the text that [`Tokenizer::decode`] gives for all ids at once. (With one exception:
/// a byte-fallback tokenizer turns a whole run of byte tokens into U+FFFD where one is wrong, even
/// those returned already.)
///
/// Text is found by decoding the last few ids and taking off what was there before, so that a
/// decoder that treats the first token in another way than the others (it drops a leading space)
/// is followed. A push costs the same however long the text is.
#[derive(Clone)]
pub struct Decoder {
    tokenizer: Tokenizer,
    /// The window: the last ids that have text.
    ids: Vec<u32>,
    /// Text of the window that was returned already, or that belongs to the ids before.
    given: String,
    /// Ids at the end of the window, pushed since it last began at the end of a character.
    fresh: usize,
    /// How many U+FFFD the ids before end in, until it is known what becomes of them.
    inherited: usize,
}

const REPLACEMENT: char = '\u{FFFD}';
/// One character is at most four bytes, each of which may be a token of its own.
const OPEN: usize = 3;
/// Ids kept where a window that never ends in a whole character is cut. The open tail is at most
/// three U+FFFD, each of them at most three bytes.
const KEEP: usize = 12;
/// Fresh ids at which such a window is cut.
const LIMIT: usize = 32;

impl Decoder {
    /// Takes the next id and returns the text that became certain, possibly none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.tokenizer.is_silent(id) {
            return Ok(String::new());
        }
        self.ids.push(id);
        self.fresh += 1;
        let text = self.tokenizer.decode(&self.ids)?;
        let Some(tail) = text.strip_prefix(self.given.as_str()) else {
            return self.restart(&text);
        };
        let open = open_tail(tail);
        let piece = tail[..tail.len() - open].to_owned();
        if open == 0 && !piece.is_empty() {
            self.cut(self.fresh, 0)?;
            self.fresh = 0;
        } else if self.fresh > LIMIT {
            self.cut(KEEP, open)?;
            self.fresh = KEEP;
        } else {
            self.given.push_str(&piece);
        }
        Ok(self.own(piece))
    }

    /// Returns what was held back, with U+FFFD for a character that was never completed, and
    /// makes the decoder ready for a new text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        let tail = match text.strip_prefix(self.given.as_str()) {
            Some(tail) => tail.to_owned(),
            None => self.tokenizer.decode(&self.ids[self.ids.len() - self.fresh..])?,
        };
        let tail = self.own(tail);
        self.ids.clear();
        self.given.clear();
        (self.fresh, self.inherited) = (0, 0);
        Ok(tail)
    }

    /// Keeps the last `keep` ids as the window; the last `open` bytes of its text are not given.
    fn cut(&mut self, keep: usize, open: usize) -> Result<()> {
        self.ids.drain(..self.ids.len() - keep);
        self.given = self.tokenizer.decode(&self.ids)?;
        let end = self.given.floor_char_boundary(self.given.len().saturating_sub(open));
        self.given.truncate(end);
        Ok(())
    }

    /// The text of the window has changed where it was given already. A byte-fallback decoder does
    /// this while a run of byte tokens, of which some were given, has an open character.
    fn restart(&mut self, text: &str) -> Result<String> {
        if text.ends_with(REPLACEMENT) && self.fresh <= OPEN {
            return Ok(String::new());
        }
        self.ids.drain(..self.ids.len() - self.fresh);
        self.given = self.tokenizer.decode(&self.ids)?;
        self.given.truncate(self.given.len() - open_tail(&self.given));
        Ok(self.own(self.given.clone()))
    }

    /// Takes off the U+FFFD that the ids before end in, if they did not become a character.
    fn own(&mut self, mut piece: String) -> String {
        if !piece.is_empty() && self.inherited > 0 {
            let theirs = piece.chars().take(self.inherited).take_while(|c| *c == REPLACEMENT);
            let theirs = theirs.count() * REPLACEMENT.len_utf8();
            piece.drain(..theirs);
            self.inherited = 0;
        }
        piece
    }
}

/// Bytes of the U+FFFD at the end of `text` that further ids may still turn into a character.
fn open_tail(text: &str) -> usize {
    let trailing = text.chars().rev().take(OPEN).take_while(|c| *c == REPLACEMENT);
    trailing.map(char::len_utf8).sum()
}
