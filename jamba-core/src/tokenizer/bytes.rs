//! The bytes that each token adds to a text: what grammars are matched with.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use super::decoder::Alphabet;
use super::{Tokenizer, guarded, refused};
use crate::error::Result;

impl Tokenizer {
    /// Ids of the vocabulary run from 0 to this, exclusive.
    pub(crate) fn ids_end(&self) -> usize {
        self.inner.ids
    }

    /// Whether the two are of one file, as far as can be told without comparing vocabularies.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
            || (self.inner.path == other.inner.path && self.inner.ids == other.inner.ids)
    }

    /// What compiles grammars for this vocabulary. The end of a text is a token of its own, the one
    /// after the vocabulary: which tokens stand for it is the model's affair.
    pub(crate) fn parser_factory(&self) -> Result<Arc<ParserFactory>> {
        if let Some(made) = self.inner.tries.get() {
            return Ok(made.clone());
        }
        let mut words = self.words()?;
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], &b"<[end of text]>"[..]].concat());
        let made = guarded(&self.inner.path, || {
            let end = words.len() as u32 - 1;
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
            let mut tokenizer = self.inner.tokenizer.clone();
            tokenizer.set_encode_special_tokens(true);
            let is_byte_level = self.inner.alphabet == Alphabet::Level;
            let env: TokEnv = Arc::new(Env { tokenizer, is_byte_level, trie });
            let slices = SlicedBiasComputer::json_slices();
            let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(Arc::new(factory))
        })?;
        Ok(self.inner.tries.get_or_init(|| made).clone())
    }

    /// The bytes of each token in a text; special ones have their spelling behind a marker.
    fn words(&self) -> Result<Vec<Vec<u8>>> {
        let anchor = (0..self.inner.ids as u32).find(|&id| {
            let letter = |text: &str| text.trim().chars().eq(['a']);
            !self.is_silent(id) && self.token(id).is_some_and(|token| letter(&token))
        });
        let anchor: Vec<u32> = anchor.into_iter().collect();
        let before = self.decode(&anchor)?;
        let word = |id: u32| {
            let Some(token) = self.token(id) else { return Ok(Vec::new()) };
            if self.is_silent(id) {
                return Ok([&[TokTrie::SPECIAL_TOKEN_MARKER], token.as_bytes()].concat());
            }
            if let Some(bytes) = self.inner.alphabet.bytes(&token) {
                return Ok(bytes);
            }
            // What is text may look different at the beginning of one.
            let both = self.decode(&[&anchor[..], &[id]].concat())?;
            let text = both.strip_prefix(&before).map(str::to_owned);
            // A part of a character that no byte is known of.
            let text = text.filter(|text| !text.contains(char::REPLACEMENT_CHARACTER));
            Ok(text.unwrap_or_default().into_bytes())
        };
        let words = (0..self.inner.ids as u32).map(word).collect::<Result<Vec<_>>>()?;
        if words.iter().all(|word| word.len() != 1) {
            let reason = "no token of it is a single character, as grammars need them";
            return Err(refused(&self.inner.path, reason));
        }
        Ok(words)
    }
}

struct Env {
    tokenizer: tokenizers::Tokenizer,
    is_byte_level: bool,
    trie: TokTrie,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let ids = self.tokenizer.encode_fast(text, false).ok();
            let ids = ids.map(|encoding| encoding.get_ids().to_vec());
            // A tokenizer that normalises what it reads has other bytes.
            let same = ids.filter(|ids| self.trie.decode_raw(ids) == text.as_bytes());
            same.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }

    /// What can only go on in one way is written in the tokens of the tokenizer, not in any that have
    /// its bytes: the model has seen no others. A SentencePiece tokenizer puts a space before what it
    /// is given, so it cannot be asked.
    fn tokenize_is_canonical(&self) -> bool {
        self.is_byte_level
    }
}
