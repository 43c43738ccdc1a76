//! Text to token ids and back, whole or one id at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;
use tokenizers::models::ModelWrapper;

use crate::error::{Error, Result, said};
use crate::fields::Fields;
use crate::files::{missing, read_file, read_json};

#[cfg(feature = "structured")]
mod bytes;
#[cfg(feature = "chat")]
mod chat;
mod decoder;
mod growth;
#[cfg(test)]
mod tests;

use decoder::Alphabet;
pub use decoder::Decoder;

/// Bytes of a `tokenizer.json` at most: several times the largest of published models.
const MAX_FILE: u64 = 256 << 20;

/// Ids at most, those that are not used included: there are tables with a place for each.
const MAX_IDS: usize = crate::config::MAX_VOCAB;

/// The tokenizer of a model folder. A clone shares it.
///
/// A special token that is spelled out in a text (`<|endoftext|>`) becomes its id, as in
/// transformers; [`encode_untrusted`](Self::encode_untrusted) is for text of which it must not.
///
/// ```
/// use jamba_core::Tokenizer;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let tokenizer = Tokenizer::from_folder(folder)?;
/// let ids = tokenizer.encode("The little fox")?;
/// assert_eq!(ids.first().copied(), tokenizer.bos_id());
/// assert_eq!(tokenizer.decode(&ids)?, "The little fox");
///
/// // As the ids come, one at a time.
/// let mut decoder = tokenizer.decoder(&[])?;
/// let mut text = String::new();
/// for id in ids {
///     text += &decoder.push(id)?;
/// }
/// text += &decoder.finish()?;
/// assert_eq!(text, "The little fox");
/// # Ok::<(), jamba_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// The same, to which special tokens are mere text. Made when it is first needed.
    untrusting: OnceLock<tokenizers::Tokenizer>,
    /// What grammars need to know. Made when it is first needed.
    #[cfg(feature = "structured")]
    tries: OnceLock<Arc<llguidance::ParserFactory>>,
    alphabet: Alphabet,
    /// The largest id, plus one.
    ids: usize,
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
    /// whole or not at all. So is the dropout of BPE, which makes encodings random in training:
    /// a text has one encoding. (transformers leaves it on.)
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`], [`Error::Json`], [`Error::Config`] for a field of
    /// another type than expected, [`Error::Tokenizer`] for a tokenizer that cannot be used. A
    /// file that makes the `tokenizers` crate panic is such an error too, here and later, unless
    /// the program was built to abort on panics; the panic's message goes where the program's
    /// panic hook sends it.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let bytes = read_file(&path, MAX_FILE)?.ok_or_else(|| missing(folder, "tokenizer.json"))?;
        let (tokenizer, ids) = guarded(&path, || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            tokenizer.with_padding(None).with_truncation(None)?;
            if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
                && bpe.dropout.is_some()
            {
                let mut bpe = bpe.clone();
                bpe.dropout = None;
                tokenizer.with_model(bpe);
            }
            let ids = tokenizer.get_vocab(true).into_values().max();
            Ok((tokenizer, ids.map_or(0, |id| id as usize + 1)))
        })?;
        if ids > MAX_IDS {
            let reason = format!("it has the id {}: ids below {MAX_IDS} are allowed", ids - 1);
            return Err(refused(&path, reason));
        }
        let normalizer = serde_json::to_value(tokenizer.get_normalizer());
        let decoder = serde_json::to_value(tokenizer.get_decoder());
        for (what, part) in [("normalizer", normalizer), ("decoder", decoder)] {
            let part = part.map_err(|error| refused(&path, error.to_string()))?;
            if let Some(reason) = growth::excessive(what, &part) {
                return Err(refused(&path, reason));
            }
        }
        let alphabet = Alphabet::new(tokenizer.get_decoder());

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
        let inner = Inner {
            tokenizer,
            untrusting: OnceLock::new(),
            #[cfg(feature = "structured")]
            tries: OnceLock::new(),
            alphabet,
            ids,
            path,
            bos_id,
            eos_id,
            add_bos,
        };
        Ok(Self { inner: Arc::new(inner) })
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
        let mut ids = self.ids(&self.inner.tokenizer, text, true)?;
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
        self.ids(&self.inner.tokenizer, text, false)
    }

    /// [`encode_plain`](Self::encode_plain) of a text from somebody who must not give orders: a
    /// special token that is spelled out in it (`<|im_start|>`) is encoded as the text that it is,
    /// and never becomes its id. Tokens that `tokenizer.json` adds without calling them special
    /// are found as ever.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_untrusted(&self, text: &str) -> Result<Vec<u32>> {
        let untrusting = self.inner.untrusting.get_or_init(|| {
            let mut tokenizer = self.inner.tokenizer.clone();
            tokenizer.set_encode_special_tokens(true);
            tokenizer
        });
        self.ids(untrusting, text, false)
    }

    fn ids(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        add_special: bool,
    ) -> Result<Vec<u32>> {
        guarded(&self.inner.path, || {
            Ok(tokenizer.encode_fast(text, add_special)?.get_ids().to_vec())
        })
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
        guarded(&self.inner.path, || self.inner.tokenizer.decode(ids, skip_special))
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// Whether this is the spelling of a special token, which [`decode`](Self::decode) leaves out.
    pub fn is_special_token(&self, token: &str) -> bool {
        self.inner.tokenizer.get_added_vocabulary().is_special_token(token)
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
        Decoder::new(self, before)
    }

    /// Refuses the tokenizer for a model whose vocabulary is smaller than its own: it is that of
    /// another model. (A model may have more ids than its tokenizer uses.)
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn check_vocab(&self, vocab_size: usize) -> Result<()> {
        let Inner { ids, path, .. } = &*self.inner;
        if *ids <= vocab_size {
            return Ok(());
        }
        let reason = format!(
            "its ids go up to {}, but the model's vocabulary has {vocab_size}: it belongs to \
             another model; take the tokenizer.json of the folder that the weights are from",
            ids - 1
        );
        Err(refused(path, reason))
    }

    /// Whether [`decode`](Self::decode) leaves this id out.
    fn is_silent(&self, id: u32) -> bool {
        self.token(id).is_none_or(|token| self.is_special_token(&token))
    }
}

/// What `work` returns, or the panic that it ended in, as an error that names the file to blame.
fn guarded<T>(path: &Path, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // What is left of an interrupted call is a cache that was not filled.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| refused(path, e)),
        Err(panic) => {
            let text = said(&*panic);
            Err(refused(path, format!("it made the tokenizers crate panic ({text})")))
        }
    }
}

fn refused(path: &Path, reason: impl ToString) -> Error {
    Error::Tokenizer { path: path.to_owned(), reason: reason.to_string() }
}

/// A token that is written as a string or as an object with `content`.
pub(crate) fn token_text<'a>(config: &'a Value, key: &'static str) -> Result<Option<&'a str>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.get("content").unwrap_or(value).as_str() {
            Some(token) => Ok(Some(token)),
            None => Err(Error::Config {
                file: "tokenizer_config.json",
                field: key,
                value: value.to_string(),
                allowed: "a string, or an object with `content`, is expected".into(),
            }),
        },
    }
}
