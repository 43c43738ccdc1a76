//! Text held to a form: a JSON schema, a regular expression or a grammar, through llguidance.
//!
//! A [`Grammar`] is compiled once for a tokenizer and may be given to any number of generations
//! ([`GenerateOptions::grammar`](crate::GenerateOptions)), also of an [`Engine`](crate::Engine).
//! Before each token, those that cannot go on are left out of the choice; probabilities among the
//! others stay as they are.
//!
//! ```
//! use jamba_core::grammar::Grammar;
//! use jamba_core::{GenerateOptions, LanguageModel, Model, SessionOptions, Tokenizer, generate};
//! use jamba_cpu::CpuBackend;
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
//! let model = Model::load(folder, CpuBackend::new())?;
//! let tokenizer = Tokenizer::from_folder(folder)?;
//! let schema = serde_json::json!({
//!     "type": "object",
//!     "properties": {
//!         "animal": { "enum": ["fox", "owl", "bear"] },
//!         "friends": { "type": "integer", "minimum": 1, "maximum": 9 },
//!     },
//!     "required": ["animal", "friends"],
//!     "additionalProperties": false,
//! });
//! let grammar = Some(Grammar::json_schema(&tokenizer, &schema)?);
//!
//! let mut session = model.session(SessionOptions { context: 128, ..Default::default() })?;
//! let options = GenerateOptions { grammar, ..Default::default() };
//! let text = generate(&mut session, &tokenizer, "The hero of my story:\n", options)?.text;
//! let hero: serde_json::Value = serde_json::from_str(&text).expect("JSON");
//! assert!(hero["friends"].as_u64() >= Some(1));
//! # Ok::<(), jamba_core::Error>(())
//! ```
//!
//! In a model's own words, a grammar says what may come, not what is likely: a prompt that asks for
//! JSON with these fields makes better use of the model.

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};
use toktrie::SimpleVob;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// White space between the parts of JSON: none, a space, or a new line and its indentation. Without
/// a bound, a model may find it likely for ever.
const WHITE_SPACE: &str = r"( |\n[ \t]{0,64})";

/// What a text must follow, compiled for a tokenizer. A clone shares it.
#[derive(Clone)]
pub struct Grammar(Arc<Inner>);

struct Inner {
    tokenizer: Tokenizer,
    source: GrammarWithLexer,
    /// Before the first token.
    matcher: Matcher,
}

impl Grammar {
    /// JSON that is valid by this schema ([what llguidance supports][json] of JSON Schema).
    ///
    /// Members of an object come in the order of the schema. Between the parts of the text there may
    /// be a space, or a new line with its indentation; `x-guidance` in the schema may say otherwise.
    ///
    /// [json]: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
    ///
    /// # Errors
    /// [`Error::Grammar`] for a schema that is none, that nothing satisfies, or that uses a keyword
    /// that cannot be held to, with its name; [`Error::Tokenizer`].
    pub fn json_schema(tokenizer: &Tokenizer, schema: &Value) -> Result<Self> {
        let mut schema = schema.clone();
        if let Some(fields) = schema.as_object_mut() {
            let options = json!({ "whitespace_pattern": WHITE_SPACE });
            fields.entry("x-guidance").or_insert(options);
        }
        Self::new(tokenizer, GrammarWithLexer::from_json_schema(schema))
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn json_object(tokenizer: &Tokenizer) -> Result<Self> {
        Self::json_schema(tokenizer, &json!({ "type": "object" }))
    }

    /// A text that the whole of this regular expression matches (the syntax of the crate `regex`,
    /// without anchors and look-around; `.` is any character but the end of a line).
    ///
    /// # Errors
    /// [`Error::Grammar`] with what is wrong with it; [`Error::Tokenizer`].
    pub fn regex(tokenizer: &Tokenizer, regex: &str) -> Result<Self> {
        Self::new(tokenizer, GrammarWithLexer::from_regex(regex))
    }

    /// A text of this context-free grammar, in [llguidance's variant of Lark][syntax]. It begins with
    /// the rule `start`; `<name>` is the special token of that spelling, `%json {...}` a JSON schema
    /// within.
    ///
    /// [syntax]: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
    ///
    /// # Errors
    /// [`Error::Grammar`] with line and column of what is wrong; [`Error::Tokenizer`].
    pub fn lark(tokenizer: &Tokenizer, grammar: &str) -> Result<Self> {
        Self::new(tokenizer, GrammarWithLexer::from_lark(grammar.to_owned()))
    }

    fn new(tokenizer: &Tokenizer, source: GrammarWithLexer) -> Result<Self> {
        Self::compile(tokenizer, source.clone(), TopLevelGrammar::from_grammar(source))
    }

    fn compile(
        tokenizer: &Tokenizer,
        source: GrammarWithLexer,
        whole: TopLevelGrammar,
    ) -> Result<Self> {
        let factory = tokenizer.parser_factory()?;
        let parser = factory.create_parser(whole).map_err(refused)?;
        let matcher = Matcher::new(Ok(parser));
        Ok(Self(Arc::new(Inner { tokenizer: tokenizer.clone(), source, matcher })))
    }

    /// The same after any text up to the first `tag`: for models whose reply begins with reasoning
    /// (`</think>`). The tag may be a special token. Up to two line ends may follow it.
    ///
    /// # Errors
    /// [`Error::Grammar`] for an empty tag.
    pub fn after(&self, tag: &str) -> Result<Self> {
        if tag.is_empty() {
            return Err(Error::Grammar { reason: "there is nothing to wait for".into() });
        }
        let Inner { tokenizer, source, .. } = &*self.0;
        let before = if tokenizer.is_special_token(tag) {
            format!("start: TEXT {tag} ENDS @body\nTEXT: /(.|\\n)*/\n")
        } else {
            // Serialised JSON strings are strings of Lark.
            let tag = Value::from(tag);
            format!("start: text ENDS @body\ntext[suffix={tag}]: /(.|\\n)*/\n")
        };
        let before = GrammarWithLexer::from_lark(format!("{before}ENDS: /\\n{{0,2}}/\n"));
        let body = GrammarWithLexer { name: Some("body".into()), ..source.clone() };
        let whole = TopLevelGrammar { grammars: vec![before, body], max_tokens: None };
        Self::compile(tokenizer, source.clone(), whole)
    }

    /// The beginning of a text, for a loop of one's own: with [`Sampler::sample_among`].
    ///
    /// [`Sampler::sample_among`]: crate::Sampler::sample_among
    pub fn start(&self) -> GrammarState {
        let end = self.0.tokenizer.ids_end();
        GrammarState { matcher: self.0.matcher.clone(), end, mask: SimpleVob::new() }
    }

    /// [`start`](Self::start) for the model of `config`, whose text `tokenizer` writes.
    pub(crate) fn start_for(
        &self,
        tokenizer: Option<&Tokenizer>,
        config: &Config,
    ) -> Result<GrammarState> {
        let own = &self.0.tokenizer;
        own.check_vocab(config.vocab_size)?;
        if tokenizer.is_some_and(|tokenizer| !tokenizer.is_same(own)) {
            let reason = "it was compiled for another tokenizer than that of the generation".into();
            return Err(Error::Grammar { reason });
        }
        Ok(self.start())
    }
}

/// The same if one is a clone of the other.
impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GrammarWithLexer { json_schema, lark_grammar, .. } = &self.0.source;
        let mut debug = f.debug_struct("Grammar");
        match json_schema {
            Some(schema) => debug.field("json_schema", schema),
            None => debug.field("lark", lark_grammar),
        };
        debug.finish()
    }
}

/// How far a text has come in a [`Grammar`]. A clone goes its own way, as the state of a forked
/// session does.
#[derive(Clone)]
pub struct GrammarState {
    matcher: Matcher,
    /// Ids of the vocabulary end here; that of the end of a text follows.
    end: usize,
    mask: SimpleVob,
}

impl GrammarState {
    /// The tokens that may come next, a bit for each, the lowest of the first word for token 0;
    /// where the text may end here, `eos_ids` among them. None is allowed where the text is
    /// [complete](Self::is_complete) and there are no `eos_ids`.
    ///
    /// # Errors
    /// [`Error::Grammar`] where it has become too complex, or no token leads on.
    pub fn mask(&mut self, eos_ids: &[u32]) -> Result<&[u32]> {
        let mut mask = self.matcher.compute_mask_or_eos().map_err(refused)?;
        let ends = mask.is_allowed(self.end as u32);
        mask.disallow_token(self.end as u32);
        let within = eos_ids.iter().filter(|id| (**id as usize) < self.end);
        within.filter(|_| ends).for_each(|id| mask.allow_token(*id));
        self.mask = mask;
        Ok(self.mask.as_slice())
    }

    /// Takes the next token of the text.
    ///
    /// # Errors
    /// [`Error::Grammar`] for one that may not come here: nothing can follow then.
    pub fn push(&mut self, id: u32) -> Result<()> {
        self.matcher.consume_token(id).map_err(refused)
    }

    /// Takes back the last tokens that were pushed.
    ///
    /// # Errors
    /// [`Error::Grammar`] for more than there are.
    pub fn rewind(&mut self, tokens: usize) -> Result<()> {
        self.matcher.rollback(tokens).map_err(refused)
    }

    /// Whether the text may end here.
    ///
    /// # Errors
    /// [`Error::Grammar`] after an error.
    pub fn may_end(&mut self) -> Result<bool> {
        self.matcher.is_accepting().map_err(refused)
    }

    /// Whether nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarState").finish_non_exhaustive()
    }
}

fn refused(error: impl fmt::Display) -> Error {
    let reason = error.to_string();
    let reason = reason.strip_suffix("\n<non-verbose/>").unwrap_or(&reason).trim().to_owned();
    Error::Grammar { reason }
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Grammar>();
    shared::<GrammarState>();
};
