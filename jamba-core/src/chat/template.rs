//! A model's chat template: where it is found, and what it writes.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::{Environment, Value as Variable};
use serde_json::Value;

use super::environment::{MAX_WORDS, Marks, environment, prepare, translated};
use super::message::Chat;
use super::namespace::Namespaces;
use super::rendered::Rendered;
use crate::error::{Error, Result};
use crate::files::{read_file, read_json};
use crate::tokenizer::{Tokenizer, token_text};

/// How a rendered conversation ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// With what makes the assistant speak (transformers' `add_generation_prompt`).
    #[default]
    Reply,
    /// With the last message, which is complete.
    Message,
    /// Inside the last message, which is to be continued (`continue_final_message`).
    Continue,
}

/// Writes conversations as the text that a model was trained on, as transformers'
/// `apply_chat_template` does: the same Jinja environment, filters and functions. A clone shares it.
///
/// [The module](super) says what is not as in Python.
#[derive(Clone)]
pub struct ChatTemplate {
    inner: Arc<Inner>,
    guarded: Arc<[String]>,
    now: Option<jiff::civil::DateTime>,
}

struct Inner {
    env: Environment<'static>,
    path: PathBuf,
    /// By name, as they are written.
    sources: BTreeMap<String, String>,
    /// `bos_token` and the like.
    special: Vec<(String, String)>,
}

const DEFAULT: &str = "default";
/// Used where there are tools, if there is a template of this name.
const TOOL_USE: &str = "tool_use";

/// The special tokens that templates know by name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

const PLAIN: &str = "{{ bos_token }}\
    {% for message in messages %}\
    {% if message.content is string %}{{ message.content }}\
    {% else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}\
    {% if message.role != 'user' %}{{ '\n\n' }}{% endif %}{% endfor %}";

impl ChatTemplate {
    /// The template of a model folder; `None` if it has none.
    ///
    /// It is in `chat_template.jinja` (with others in `additional_chat_templates/`), in the field
    /// `chat_template` of `tokenizer_config.json` (one, or a list of named ones), or in
    /// `chat_template.json`, in this order. `tokenizer_config.json` tells the special tokens.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], [`Error::Config`] for a field of another type,
    /// [`Error::Template`] with file and line for a template that cannot be parsed.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let config = folder.join("tokenizer_config.json");
        let tokenizer_config = read_json(&config)?.unwrap_or_default();
        let special = special_tokens(&tokenizer_config)?;
        let jinja = folder.join("chat_template.jinja");
        if jinja.exists() {
            let mut sources = additional(&folder.join("additional_chat_templates"))?;
            sources.insert(DEFAULT.into(), read(&jinja)?);
            return Self::build(jinja, sources, special).map(Some);
        }
        let (legacy, file) = (folder.join("chat_template.json"), "chat_template.json");
        let legacy_config = read_json(&legacy)?.unwrap_or_default();
        let files =
            [(config, "tokenizer_config.json", tokenizer_config), (legacy, file, legacy_config)];
        for (path, file, value) in files {
            let sources = named(&value, file)?;
            if !sources.is_empty() {
                return Self::build(path, sources, special).map(Some);
            }
        }
        Ok(None)
    }

    /// The template in a file: Jinja, or JSON with a field `chat_template`. The special tokens are
    /// those of the model folder.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_file(path: impl AsRef<Path>, model: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let config = read_json(&model.as_ref().join("tokenizer_config.json"))?.unwrap_or_default();
        let special = special_tokens(&config)?;
        let sources = if path.extension().is_some_and(|extension| extension == "json") {
            named(&read_json(&path)?.unwrap_or_default(), "chat_template.json")?
        } else {
            BTreeMap::from([(DEFAULT.into(), read(&path)?)])
        };
        if sources.is_empty() {
            let reason = "there is no such file, or it has no field `chat_template`".into();
            return Err(Error::Template { path, line: 0, reason });
        }
        Self::build(path, sources, special)
    }

    /// A template that knows no special tokens.
    ///
    /// # Errors
    /// [`Error::Template`].
    pub fn new(source: &str) -> Result<Self> {
        let sources = BTreeMap::from([(DEFAULT.into(), source.to_owned())]);
        Self::build("<template>".into(), sources, Vec::new())
    }

    /// For models without a template, which go on with a text rather than answer: what is said,
    /// one after the other, with an empty line after what is not the user's.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder), for its `tokenizer_config.json`.
    pub fn plain(model: impl AsRef<Path>) -> Result<Self> {
        let config = read_json(&model.as_ref().join("tokenizer_config.json"))?.unwrap_or_default();
        let sources = BTreeMap::from([(DEFAULT.into(), PLAIN.to_owned())]);
        Self::build("<plain>".into(), sources, special_tokens(&config)?)
    }

    fn build(
        path: PathBuf,
        sources: BTreeMap<String, String>,
        special: Vec<(String, String)>,
    ) -> Result<Self> {
        let env = with_room(&path, || {
            let mut env = environment();
            for (name, source) in &sources {
                if source.len() > MAX_TEMPLATE {
                    let reason = format!("it has more than {MAX_TEMPLATE} bytes");
                    return Err(Error::Template { path: path.clone(), line: 0, reason });
                }
                let parsed = translated(source).map_err(|line| {
                    let reason = format!("a tag of more than {MAX_WORDS} words and signs");
                    Error::Template { path: path.clone(), line, reason }
                })?;
                env.add_template_owned(name.clone(), parsed).map_err(|e| refused(&path, &e))?;
            }
            Ok(env)
        })?;
        let inner = Arc::new(Inner { env, path, sources, special });
        Ok(Self { inner, guarded: Arc::new([]), now: None })
    }

    /// The same, but what messages and documents spell like a special or added token of the
    /// tokenizer is not to become one: see [the module](super).
    pub fn with_guard(mut self, tokenizer: &Tokenizer) -> Self {
        let tokens = tokenizer.added_tokens().into_iter();
        // A single character has no inside; it is left as it is.
        self.guarded = tokens.filter(|token| token.chars().nth(1).is_some()).collect();
        self
    }

    /// The same at a fixed local date and time (`2024-07-26T13:05:09`), which templates get from
    /// `strftime_now`: a prompt that names the date changes every day.
    ///
    /// # Errors
    /// [`Error::Option`] for another format.
    pub fn at(mut self, now: &str) -> Result<Self> {
        self.now = Some(now.parse().map_err(|_| Error::Option {
            option: "now",
            value: now.into(),
            allowed: "a date and time like 2024-07-26T13:05:09 is expected",
        })?);
        Ok(self)
    }

    /// The templates, by name: `default`, and others (`tool_use`, which is used where there are
    /// tools).
    pub fn sources(&self) -> impl Iterator<Item = (&str, &str)> {
        self.inner.sources.iter().map(|(name, source)| (&**name, &**source))
    }

    /// Writes a conversation with the template `default`, or `tool_use` for one with tools.
    ///
    /// # Errors
    /// [`Error::Template`], with the line, also for what the template raises about the messages
    /// (`raise_exception`); [`Error::Message`] for a last message that cannot be
    /// [continued](End::Continue).
    pub fn render(&self, chat: &Chat, end: End) -> Result<Rendered> {
        let names = [TOOL_USE, DEFAULT];
        let names = if chat.tools.is_empty() { &names[1..] } else { &names };
        let known = |name: &&&str| self.inner.sources.contains_key(**name);
        let any = self.inner.sources.keys().next().map_or(DEFAULT, String::as_str);
        self.render_named(names.iter().find(known).unwrap_or(&any), chat, end)
    }

    /// [`render`](Self::render) with the template of this name.
    ///
    /// # Errors
    /// As `render`.
    pub fn render_named(&self, name: &str, chat: &Chat, end: End) -> Result<Rendered> {
        with_room(&self.inner.path, || self.write(name, chat, end))
    }

    fn write(&self, name: &str, chat: &Chat, end: End) -> Result<Rendered> {
        let source = self.inner.sources.get(name).map_or("", String::as_str);
        let mut value = chat.to_value();
        let tag = if end == End::Continue { Some(open_end(&mut value, source)?) } else { None };
        let marks = marks(&value, source)?;

        let variables = |of: &Value| convert(of, None);
        let or_none = |list: &Value| match list.as_array() {
            Some(items) if !items.is_empty() => variables(list),
            _ => Variable::from(()),
        };
        let guard = (!self.guarded.is_empty()).then_some((&*self.guarded, marks.cut));
        let mut context: Vec<(String, Variable)> = Vec::new();
        for (name, token) in &self.inner.special {
            context.push((name.clone(), token.into()));
        }
        context.push(("messages".into(), messages(&value["messages"], guard)));
        context.push(("tools".into(), or_none(&value["tools"])));
        let documents = value["documents"].as_array().filter(|list| !list.is_empty());
        let documents = documents.map(|_| convert(&value["documents"], guard));
        context.push(("documents".into(), documents.unwrap_or(Variable::from(()))));
        context.push(("add_generation_prompt".into(), (end == End::Reply).into()));
        for (name, variable) in &chat.variables {
            context.retain(|(other, _)| other != name);
            context.push((name.clone(), variables(variable)));
        }

        let namespaces = Namespaces::default();
        let mut env = self.inner.env.clone();
        prepare(&mut env, marks, self.now, &namespaces);
        let template = env.get_template(name);
        let rendered = template.and_then(|it| it.render(Variable::from_pairs(context)));
        namespaces.clear();
        let mut text = rendered.map_err(|e| refused(&self.inner.path, &e))?;
        if let Some((tag, said)) = tag {
            cut_at(&mut text, &tag, &said, marks)?;
        }
        Ok(unmarked(&text, marks))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate({})", self.inner.path.display())
    }
}

fn refused(path: &Path, error: &minijinja::Error) -> Error {
    let file = match error.name() {
        None | Some(DEFAULT) => String::new(),
        Some(name) => format!(" ({name})"),
    };
    let reason = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    let reason = match std::error::Error::source(error) {
        Some(source) => format!("{reason}: {source}"),
        None => reason,
    };
    let path = PathBuf::from(format!("{}{file}", path.display()));
    Error::Template { path, line: error.line().unwrap_or(0), reason }
}

/// Bytes of a template at most: several times the largest of published models.
const MAX_TEMPLATE: usize = 64 << 10;

/// Bytes of stack, of which only those that are used take memory.
const STACK: usize = 512 << 20;

/// Runs `work` where there is room for it: parser, printer and `drop` call themselves for each level
/// that a template nests, which costs it a byte of its source or a step.
fn with_room<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("jamba-template".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work).map_err(Error::io(path))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn read(path: &Path) -> Result<String> {
    let missing = || Error::io(path)(std::io::ErrorKind::NotFound.into());
    let bytes = read_file(path, MAX_TEMPLATE as u64)?.ok_or_else(missing)?;
    String::from_utf8(bytes).map_err(|e| Error::io(path)(std::io::Error::other(e)))
}

/// Templates beside the first, by the names of their files.
fn additional(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    if !folder.is_dir() {
        return Ok(sources);
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_stem().and_then(|stem| stem.to_str());
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == "jinja")) {
            sources.insert(name.to_owned(), read(&path)?);
        }
    }
    Ok(sources)
}

/// The templates in the field `chat_template`: a string, or a list of `{name, template}`.
fn named(config: &Value, file: &'static str) -> Result<BTreeMap<String, String>> {
    let refused = |value: &Value| Error::Config {
        file,
        field: "chat_template",
        value: value.to_string(),
        allowed: "a string, or a list of objects with `name` and `template`, is expected".into(),
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => Ok(BTreeMap::from([(DEFAULT.into(), source.clone())])),
        Some(Value::Array(items)) => {
            let of = |item: &Value| {
                let field = |name: &str| item.get(name)?.as_str().map(str::to_owned);
                field("name").zip(field("template")).ok_or_else(|| refused(item))
            };
            items.iter().map(of).collect()
        }
        Some(other) => Err(refused(other)),
    }
}

fn special_tokens(config: &Value) -> Result<Vec<(String, String)>> {
    let mut special = Vec::new();
    for name in SPECIAL {
        if let Some(token) = token_text(config, name)? {
            special.push((name.to_owned(), token.to_owned()));
        }
    }
    Ok(special)
}

/// What is put into a text, and where: tokens that are not to become such, and the mark that goes
/// into them.
type Guard<'a> = Option<(&'a [String], char)>;

/// JSON as the template sees it.
fn convert(value: &Value, guard: Guard<'_>) -> Variable {
    match value {
        Value::Null => Variable::from(()),
        Value::Bool(v) => (*v).into(),
        Value::Number(v) => match (v.as_i64(), v.as_u64()) {
            (Some(v), _) => v.into(),
            (None, Some(v)) => v.into(),
            (None, None) => v.as_f64().unwrap_or(f64::NAN).into(),
        },
        Value::String(text) => guarded(text, guard).into(),
        Value::Array(items) => {
            items.iter().map(|item| convert(item, guard)).collect::<Vec<_>>().into()
        }
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| (key.clone(), convert(value, guard)));
            Variable::from_pairs(fields)
        }
    }
}

/// Messages, of which those that the model did not say are guarded.
fn messages(list: &Value, guard: Guard<'_>) -> Variable {
    let message = |message: &Value| {
        let is_said = message["role"] == "assistant";
        convert(message, guard.filter(|_| !is_said))
    };
    list.as_array().into_iter().flatten().map(message).collect::<Vec<_>>().into()
}

/// `text` with a mark after the first character of everything that is spelled like a token.
fn guarded(text: &str, guard: Guard<'_>) -> String {
    let Some((tokens, mark)) = guard else { return text.to_owned() };
    let inside = |(at, token): (usize, &str)| at + token.chars().next().map_or(0, char::len_utf8);
    let found = |token: &String| -> Vec<usize> {
        // Also those that overlap: every occurrence is looked at from its own start.
        let starts = text.char_indices().map(|(at, _)| at);
        let starts = starts.filter(|at| text[*at..].starts_with(token.as_str()));
        starts.map(|at| inside((at, token))).collect()
    };
    let mut cuts: Vec<usize> =
        tokens.iter().filter(|token| text.contains(token.as_str())).flat_map(found).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut out = String::with_capacity(text.len() + 4 * cuts.len());
    let mut from = 0;
    for cut in cuts {
        out.push_str(&text[from..cut]);
        out.push(mark);
        from = cut;
    }
    out.push_str(&text[from..]);
    out
}

/// Noncharacters that occur in none of the texts.
fn marks(value: &Value, source: &str) -> Result<Marks> {
    fn collect(value: &Value, used: &mut HashSet<char>) {
        let mut note = |text: &str| used.extend(text.chars().filter(|c| is_noncharacter(*c)));
        match value {
            Value::String(text) => note(text),
            Value::Array(items) => items.iter().for_each(|item| collect(item, used)),
            Value::Object(fields) => {
                fields.keys().for_each(|key| note(key));
                fields.values().for_each(|value| collect(value, used));
            }
            _ => {}
        }
    }
    let mut used: HashSet<char> = source.chars().filter(|c| is_noncharacter(*c)).collect();
    collect(value, &mut used);
    let mut free = ('\u{FDD0}'..='\u{FDEF}').filter(|c| !used.contains(c));
    match (free.next(), free.next(), free.next()) {
        (Some(cut), Some(open), Some(close)) => Ok(Marks { cut, generation: [open, close] }),
        _ => Err(Error::Message {
            reason: "the texts use up the noncharacters U+FDD0 to U+FDEF".into(),
        }),
    }
}

fn is_noncharacter(c: char) -> bool {
    ('\u{FDD0}'..='\u{FDEF}').contains(&c)
}

/// The text without marks, and where they were.
fn unmarked(marked: &str, marks: Marks) -> Rendered {
    let mut rendered =
        Rendered { text: String::with_capacity(marked.len()), ..Rendered::default() };
    let mut open = Vec::new();
    for c in marked.chars() {
        let at = rendered.text.len();
        if c == marks.cut {
            rendered.cuts.push(at);
        } else if c == marks.generation[0] {
            open.push(at);
        } else if c == marks.generation[1] {
            if let Some(start) = open.pop() {
                rendered.generation.push(start..at);
            }
        } else {
            rendered.text.push(c);
        }
    }
    // A message that is continued is cut inside its block.
    let end = rendered.text.len();
    rendered.generation.extend(open.into_iter().map(|start| start..end));
    rendered
}

/// Puts transformers' tag at the end of the last message, where the text is cut off later. Returns
/// the tag, and what was said before it.
fn open_end(chat: &mut Value, source: &str) -> Result<(String, String)> {
    const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
    let refuse = |reason: &str| Err(Error::Message { reason: reason.into() });
    if !source.contains("content") {
        return refuse("the template does not use `content`, so no message can be continued");
    }
    let last = chat["messages"].as_array_mut().and_then(|messages| messages.last_mut());
    let said = match last.and_then(|message| message.get_mut("content")) {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => {
            let text = |part: &mut Value| matches!(part.get("text"), Some(Value::String(_)));
            let part =
                parts.iter_mut().rev().find_map(|part| if text(part) { Some(part) } else { None });
            match part.and_then(|part| part.get_mut("text")) {
                Some(Value::String(text)) => Some(text),
                _ => None,
            }
        }
        _ => None,
    };
    let Some(said) = said else {
        return refuse("the last message has no text that could be continued");
    };
    let before = said.clone();
    said.push_str(TAG);
    Ok((TAG.into(), before))
}

/// Cuts the text where the tag is. What a template trims of the message, it would have trimmed of
/// what is before the tag.
fn cut_at(text: &mut String, tag: &str, said: &str, marks: Marks) -> Result<()> {
    let plain = text.replace(marks.cut, "");
    let found = text.rfind(tag.trim_end()).filter(|_| plain.contains(said.trim()));
    let Some(at) = found else {
        let reason =
            "the template does not write the last message as it is: it cannot be continued";
        return Err(Error::Message { reason: reason.into() });
    };
    let is_whole = text[at..].starts_with(tag);
    text.truncate(at);
    if !is_whole {
        let end = text.trim_end().len();
        text.truncate(end);
    }
    Ok(())
}
