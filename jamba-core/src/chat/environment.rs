//! Jinja as transformers sets it up for chat templates.

use std::borrow::Cow;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::json::{Style, number};
use super::namespace::{Namespaces, SET};

/// Characters that no text of a render has: they go through the template unseen.
#[derive(Clone, Copy)]
pub(super) struct Marks {
    /// Inside of what is not to become a special token.
    pub(super) cut: char,
    /// Around what a generation block wrote.
    pub(super) generation: [char; 2],
}

impl Marks {
    fn all(self) -> [char; 3] {
        [self.cut, self.generation[0], self.generation[1]]
    }
}

/// Steps of a template: far more than a conversation takes, and an end for a template without one.
/// Data that a template makes costs fuel too, so that this bounds its memory: 256 MB.
const FUEL: u64 = 4 << 20;
/// As minijinja has it.
pub(super) const BYTES_PER_FUEL: usize = 64;

/// What does not depend on what is rendered.
pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(method);
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    // Python writes large and small floats with an exponent.
    env.set_formatter(|out, state, value| {
        if value.kind() == ValueKind::Number && !value.is_integer() {
            return out.write_str(&number(value, ["nan", "inf"])?).map_err(Error::from);
        }
        minijinja::escape_formatter(out, state, value)
    });
    // In Python, strings and dicts have a length and items too.
    env.add_test("sequence", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |value: Value| !value.is_none() && value.try_iter().is_ok());
    // What is no number is the default, not an error.
    env.add_filter("float", |value: Value, default: Option<Value>| {
        as_float(&value).map_or(default.unwrap_or(0.0.into()), Value::from)
    });
    env.add_filter("int", |value: Value, default: Option<Value>| {
        let whole = value.as_str().and_then(|text| text.trim().parse::<i64>().ok());
        let whole = whole.or_else(|| value.as_i64()).or_else(|| {
            let v = as_float(&value).filter(|v| v.is_finite())?;
            Some(v.trunc() as i64)
        });
        whole.map_or(default.unwrap_or(0.into()), Value::from)
    });
    env.add_function("raise_exception", |reason: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, reason))
    });
    env
}

fn as_float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// Adds what depends on the texts and on the time (`None`: now).
pub(super) fn prepare(
    env: &mut Environment<'_>,
    marks: Marks,
    now: Option<jiff::civil::DateTime>,
    namespaces: &Namespaces,
) {
    namespaces.add_to(env);
    env.add_filter(
        "tojson",
        move |state: &State, value: Value, given: Rest<Value>, named: Kwargs| {
            Style::new(&given, &named)?.dump(state, &value, &marks.all())
        },
    );
    let [open, close] = marks.generation;
    env.add_filter("generation", move |said: String| format!("{open}{said}{close}"));
    env.add_function("strftime_now", move |state: &State, format: String| {
        // A directive of a few bytes writes up to a few hundred.
        state.consume_fuel(format.len() as u64)?;
        let now = now.unwrap_or_else(|| jiff::ZonedDateTime::now().datetime());
        jiff::fmt::strtime::format(&format, now).map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"))
        })
    });
}

/// Methods of Python's strings, lists and dicts.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == SET {
        let reason = format!("can only assign to namespaces, not {}", value.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    match value.as_str().map(|text| string_method(state, text, name, args)) {
        Some(Ok(Some(result))) => Ok(result),
        Some(Err(error)) => Err(error),
        Some(Ok(None)) | None => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Methods of strings that minijinja-contrib does not have.
fn string_method(
    state: &State,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    use minijinja::value::from_args;
    let every = |holds: fn(char) -> bool| !text.is_empty() && text.chars().all(holds);
    Ok(Some(match name {
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if name == "index" { text.find(part) } else { text.rfind(part) };
            let Some(at) = found else {
                return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
            };
            text[..at].chars().count().into()
        }
        "isdigit" | "isdecimal" | "isnumeric" => every(char::is_numeric).into(),
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => text.to_lowercase().into(),
        "removeprefix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_prefix(part).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_suffix(part).unwrap_or(text).into()
        }
        "partition" | "rpartition" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if name == "partition" {
                text.split_once(part).unwrap_or((text, ""))
            } else {
                text.rsplit_once(part).unwrap_or(("", text))
            };
            let middle = if text.contains(part) { part } else { "" };
            Value::from((found.0.to_owned(), middle.to_owned(), found.1.to_owned()))
        }
        "rsplit" => {
            let (part, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            rsplit(state, text, part, most)?.into()
        }
        _ => return Ok(None),
    }))
}

/// `str.rsplit`: at most `most` times, from the end; without a separator at whitespace.
fn rsplit(
    state: &State,
    text: &str,
    separator: Option<&str>,
    most: usize,
) -> Result<Vec<String>, Error> {
    let mut rest = text;
    let mut parts = Vec::new();
    while parts.len() < most {
        // A part takes more memory than the byte that ends it.
        state.consume_fuel(1)?;
        let split = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => {
                rest = rest.trim();
                rest.rsplit_once(char::is_whitespace)
            }
        };
        let Some((before, part)) = split else { break };
        parts.push(part.to_owned());
        rest = before;
    }
    if separator.is_none() {
        rest = if parts.is_empty() { rest.trim() } else { rest.trim_end() };
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest.to_owned());
    }
    parts.reverse();
    Ok(parts)
}

/// Writes in minijinja's way what it does in another than Jinja2. `{% generation %}` becomes a
/// filter over the block; the newline after `{% raw %}` stays; `{% set a.b = c %}` becomes a call of
/// [`SET`]. No line moves.
pub(super) fn translated(source: &str) -> Cow<'_, str> {
    if !["generation", "raw", "namespace"].iter().any(|word| source.contains(word)) {
        return source.into();
    }
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    // For every `{% set %}` that is open, what follows its end.
    let mut sets: Vec<String> = Vec::new();
    while let Some(at) = ["{%", "{#", "{{"].into_iter().filter_map(|tag| rest.find(tag)).min() {
        let end = match rest.as_bytes()[at + 1] {
            b'%' => "%}",
            b'#' => "#}",
            _ => "}}",
        };
        // Behind the opening: in `{%}` there is no end.
        let Some(length) = end_of_tag(&rest[at + 2..], end).map(|inner| inner + 2) else { break };
        let (tag, after) = rest[at..].split_at(length + end.len());
        out.push_str(&rest[..at]);
        rest = after;
        let inner = tag[2..length].trim_start_matches(['-', '+']);
        let inner = inner.trim_end_matches(['-', '+']).trim();
        match inner {
            _ if end != "%}" => out.push_str(tag),
            "generation" => out.push_str(&tag.replacen("generation", "filter generation", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endfilter", 1)),
            "endset" => {
                let close = tag.find("endset").map_or(0, |at| at + "endset".len());
                out.push_str(&tag[..close]);
                out.push_str(&sets.pop().unwrap_or_default());
                out.push_str(&tag[close..]);
            }
            "raw" => {
                let trims = tag.ends_with("-%}") || tag.ends_with("+%}");
                out.push_str(if trims { tag } else { &tag[..length] });
                out.push_str(if trims { "" } else { "+%}" });
                // As it is, up to its end.
                let raw_end = end_of_raw(rest);
                out.push_str(&rest[..raw_end]);
                rest = &rest[raw_end..];
            }
            _ => match Assignment::parse(inner).and_then(|set| set.translated(&mut sets)) {
                Some(set) => out.push_str(&tag.replacen(inner, &set, 1)),
                None => out.push_str(tag),
            },
        }
    }
    out.push_str(rest);
    out.into()
}

/// A `{% set %}` tag.
struct Assignment<'a> {
    name: &'a str,
    attribute: Option<&'a str>,
    /// From the `=` or the `|` on; empty for a block.
    rest: &'a str,
}

impl<'a> Assignment<'a> {
    fn parse(tag: &'a str) -> Option<Self> {
        let tag = tag.strip_prefix("set")?;
        let target = tag.trim_start();
        let is_name =
            |text: &str| !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_');
        let (target, rest) = target.split_at(target.find(['=', '|']).unwrap_or(target.len()));
        let (name, attribute) = match target.split_once('.') {
            Some((name, attribute)) => (name.trim(), Some(attribute.trim())),
            None => (target.trim(), None),
        };
        let is_whole = tag.starts_with(char::is_whitespace) && is_name(name);
        (is_whole && attribute.is_none_or(is_name)).then_some(Self { name, attribute, rest })
    }

    /// The tag in minijinja's way, unless it is. What follows the end of one with a block goes onto
    /// `sets`.
    fn translated(&self, sets: &mut Vec<String>) -> Option<String> {
        let Self { name, attribute, rest } = self;
        let call = |value: &str| Some(format!("do {name}.{SET}('{}', {value})", (*attribute)?));
        if let Some(value) = rest.strip_prefix('=') {
            return call(&format!("({value})"));
        }
        sets.push(call(BLOCK).map_or(String::new(), |call| format!(" %}}{{% {call}")));
        attribute.map(|_| format!("set {BLOCK} {rest}"))
    }
}

/// The variable that has the text of a block until it is an attribute.
const BLOCK: &str = "__block";

/// Where a tag ends: not inside of a string of it.
fn end_of_tag(tag: &str, end: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in tag.char_indices() {
        match quote {
            None if tag[at..].starts_with(end) => return Some(at),
            None => quote = Some(c).filter(|c| matches!(c, '"' | '\'') && end != "#}"),
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) => quote = Some(open).filter(|open| *open != c),
        }
    }
    None
}

/// Where `{% endraw %}` begins.
fn end_of_raw(source: &str) -> usize {
    let ends = source.match_indices("{%").find(|(at, _)| {
        source[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw")
    });
    ends.map_or(source.len(), |(at, _)| at)
}
