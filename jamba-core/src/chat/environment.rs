//! Jinja as transformers sets it up for chat templates.

use std::borrow::Cow;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

use super::generator::{self, each};
use super::json::{Style, text};
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
    env.add_filter("list", |state: &State, value: Value| filters::list(state, each(value)?));
    env.add_filter("indent", indent);
    generator::add_to(&mut env);
    env.add_function(EACH, each);
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

/// Jinja's `indent(width=4, first=False, blank=False)`, of the lines that Python sees.
fn indent(state: &State, said: Value, given: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        let named: Option<Value> = named.get(name)?;
        Ok(named.or_else(|| given.get(index).cloned()).unwrap_or(Value::UNDEFINED))
    };
    let width = argument(0, "width")?;
    let (first, blank) = (argument(1, "first")?.is_true(), argument(2, "blank")?.is_true());
    named.assert_all_used()?;
    let Some(said) = said.as_str() else {
        let reason = format!("indent: {} is not a string", said.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    };
    // As Jinja does, so that a last line may be empty.
    let said = format!("{said}\n");
    let lines = lines(state, &said)?;
    let columns = match width.as_str() {
        Some(text) => text.len(),
        None if width.is_undefined() => 4,
        None => usize::try_from(i64::try_from(width.clone())?).unwrap_or(0),
    };
    let bytes = columns.saturating_mul(lines.len()).saturating_add(said.len());
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)?;
    let indention = width.as_str().map_or_else(|| " ".repeat(columns), str::to_owned);
    let mut out = String::with_capacity(bytes);
    for (index, line) in lines.iter().enumerate() {
        out.push_str(if index > 0 { "\n" } else { "" });
        let is_indented = if index == 0 { first } else { blank || !line.is_empty() };
        out.push_str(if is_indented { &indention } else { "" });
        out.push_str(line);
    }
    Ok(out)
}

/// Python's `str.splitlines`.
fn lines<'a>(state: &State, text: &'a str) -> Result<Vec<&'a str>, Error> {
    let is_end = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}')
            || matches!(c, '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        // A part takes more memory than the byte that ends it.
        state.consume_fuel(1)?;
        lines.push(&rest[..at]);
        let end = &rest[at..];
        let after = end.strip_prefix("\r\n").or_else(|| end.strip_prefix(is_end));
        rest = after.unwrap_or_default();
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    Ok(lines)
}

/// What a filter that minijinja has is called with.
pub(super) fn arguments(value: Value, given: Rest<Value>, named: Kwargs) -> Vec<Value> {
    let has_names = named.args().next().is_some();
    let named = has_names.then(|| named.into());
    std::iter::once(value).chain(given.0).chain(named).collect()
}

/// Adds what depends on the texts and on the time (`None`: now).
pub(super) fn prepare(
    env: &mut Environment<'_>,
    marks: Marks,
    now: Option<jiff::civil::DateTime>,
    namespaces: &Namespaces,
) {
    let joined = Value::from_function(filters::join);
    namespaces.add_to(env);
    let kept = marks.all();
    // Python writes floats, and texts in lists, in another way.
    let string = move |state: &State, value: Value| text(state, value, &kept);
    env.set_formatter(move |out, state, value| {
        let written = string(state, value.clone())?;
        out.write_str(written.as_str().unwrap_or_default()).map_err(Error::from)
    });
    env.add_filter("string", string);
    env.add_function(TEXT, string);
    env.add_filter(
        "join",
        move |state: &mut State, value: Value, given: Rest<Value>, named: Kwargs| {
            let mut value = each(value)?;
            if given.len() < 2 && !named.has("attribute") {
                let texts = value.try_iter()?.map(|item| string(state, item));
                value = texts.collect::<Result<Vec<_>, _>>()?.into();
            }
            joined.call(state, &arguments(value, given, named))
        },
    );
    env.add_filter(
        "tojson",
        move |state: &State, value: Value, given: Rest<Value>, named: Kwargs| {
            Style::new(&given, &named)?.dump(state, &value, &kept)
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
    let args = match name {
        "split" | "rsplit" => &by_place(args, ["sep", "maxsplit"])?,
        _ => args,
    };
    match value.as_str().map(|text| string_method(state, text, name, args)) {
        Some(Ok(Some(result))) => Ok(result),
        Some(Err(error)) => Err(error),
        Some(Ok(None)) | None => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Arguments with those that are given by name where they are expected.
fn by_place<const N: usize>(args: &[Value], names: [&str; N]) -> Result<Vec<Value>, Error> {
    let (given, named): (&[Value], Kwargs) = minijinja::value::from_args(args)?;
    let mut args = given.to_vec();
    for name in names.iter().skip(given.len()) {
        args.push(named.get::<Option<Value>>(name)?.unwrap_or(Value::from(())));
    }
    named.assert_all_used()?;
    while args.pop_if(|last| last.is_none()).is_some() {}
    Ok(args)
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
        "splitlines" if args.is_empty() => {
            lines(state, text)?.into_iter().map(Value::from).collect()
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
/// [`SET`]; what `{% for %}` goes over passes through [`EACH`], and what `~` puts together through
/// [`TEXT`]. No line moves.
///
/// # Errors
/// The line of a tag of more than [`MAX_WORDS`].
pub(super) fn translated(source: &str) -> Result<String, usize> {
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
        let found = end_of_tag(&rest[at + 2..], end);
        let words = &rest[at + 2..][..found.unwrap_or(rest.len() - at - 2)];
        if end != "#}" && tokens(words).nth(MAX_WORDS).is_some() {
            let before = source.len() - rest.len() + at;
            return Err(1 + source[..before].matches('\n').count());
        }
        let Some(length) = found.map(|inner| inner + 2) else { break };
        let (tag, after) = rest[at..].split_at(length + end.len());
        out.push_str(&rest[..at]);
        rest = after;
        let inner = tag[2..length].trim_start_matches(['-', '+']);
        let inner = inner.trim_end_matches(['-', '+']).trim();
        let texts = if end == "#}" { None } else { concatenation(inner) };
        let tag = texts.as_ref().map_or(tag.into(), |texts| tag.replacen(inner, texts, 1).into());
        let (tag, inner): (Cow<'_, str>, _) = (tag, texts.as_deref().unwrap_or(inner));
        match inner {
            _ if end != "%}" => out.push_str(&tag),
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
                out.push_str(if trims { &tag } else { &tag[..length] });
                out.push_str(if trims { "" } else { "+%}" });
                // As it is, up to its end.
                let raw_end = end_of_raw(rest);
                out.push_str(&rest[..raw_end]);
                rest = &rest[raw_end..];
            }
            _ if inner.starts_with("for") => match checked_loop(inner) {
                Some(checked) => out.push_str(&tag.replacen(inner, &checked, 1)),
                None => out.push_str(&tag),
            },
            _ => match Assignment::parse(inner).and_then(|set| set.translated(&mut sets)) {
                Some(set) => out.push_str(&tag.replacen(inner, &set, 1)),
                None => out.push_str(&tag),
            },
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Words, strings and signs of a tag at most, many times what published models have: minijinja looks for
/// constants in every part of an expression anew, in time that grows with the square of its depth.
pub(super) const MAX_WORDS: usize = 2000;

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

/// The function that refuses what Python cannot iterate over.
const EACH: &str = "__iter";

/// `for x in y if z` with [`EACH`] around `y`.
fn checked_loop(tag: &str) -> Option<String> {
    let over = keyword(tag, "in")? + "in".len();
    let (head, rest) = tag.split_at(over);
    let ends = [keyword(rest, "if"), keyword(rest, "recursive"), Some(rest.len())];
    let (over, tail) = rest.split_at(ends.into_iter().flatten().min()?);
    // Twice: what it goes over may be a tuple without parentheses.
    (!over.trim().is_empty()).then(|| format!("{head} {EACH}(({over})) {tail}"))
}

/// Where a word is, outside of strings and brackets.
fn keyword(tag: &str, word: &str) -> Option<usize> {
    let mut depth = 0;
    let found = tokens(tag).find(|(_, token)| {
        match *token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        depth == 0 && *token == word
    });
    found.map(|(at, _)| at)
}

/// The function that writes as Python does.
const TEXT: &str = "__str";

/// A tag with [`TEXT`] around what `~` puts together, unless nothing is.
fn concatenation(tag: &str) -> Option<String> {
    let first = tokens(tag).next()?.1;
    if !tag.contains('~') || ["include", "import", "from", "extends"].contains(&first) {
        return None;
    }
    let after = |at: usize| tag.len() - tag[at..].trim_start().len();
    // Where an operand starts, whether there is a `~` before it, and whether there is a test, the
    // argument of which may be an operand; for every open bracket.
    let mut open = vec![(0, false, false)];
    let mut wrapped = Vec::new();
    for (at, token) in tokens(tag).chain([(tag.len(), "")]) {
        let (start, is_joined, is_tested) = open.last_mut()?;
        let operand = tag[*start..at].trim_end();
        match token {
            "(" | "[" | "{" => {
                open.push((after(at + 1), false, false));
                continue;
            }
            // A sign, not a difference.
            "-" | "+" if operand.is_empty() || operand.ends_with(['*', '/', '%']) => continue,
            "is" => *is_tested = true,
            "~" | "-" | "+" | "<" | ">" | "!" | "not" | "in" => {}
            ")" | "]" | "}" | "" | "," | ":" | "=" | "and" | "or" | "if" | "elif" | "else"
            | "do" | "recursive" => {
                *is_tested = false;
            }
            _ => continue,
        }
        if *is_tested && (*is_joined || token == "~") {
            return None;
        }
        let is_text = end_of_string(operand) == Some(operand.len());
        if (*is_joined || token == "~") && !operand.is_empty() && !is_text {
            wrapped.push((*start, format!("{TEXT}(")));
            wrapped.push((*start + operand.len(), ")".to_owned()));
        }
        (*start, *is_joined) = (after(at + token.len()), token == "~");
        if matches!(token, ")" | "]" | "}") {
            open.pop();
        }
    }
    wrapped.sort_by_key(|(at, _)| *at);
    let mut out = String::with_capacity(tag.len() + wrapped.len() * TEXT.len());
    let mut from = 0;
    for (at, put) in wrapped {
        out.push_str(&tag[from..at]);
        out.push_str(&put);
        from = at;
    }
    out.push_str(&tag[from..]);
    Some(out)
}

/// Words, strings and signs of one character, and where they are.
fn tokens(tag: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = tag[from..].trim_start();
        let at = tag.len() - rest.len();
        let first = rest.chars().next()?;
        let mut length = match first {
            '"' | '\'' => end_of_string(rest).unwrap_or(rest.len()),
            // An attribute may be named as a keyword is.
            '.' => 1 + rest[1..].find(|c| !is_word(c)).unwrap_or(rest.len() - 1),
            _ if is_word(first) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            _ => first.len_utf8(),
        };
        // The sign of an exponent.
        let is_number = rest.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit())
            && rest[..length].ends_with(['e', 'E']);
        if is_number && rest[length..].starts_with(['-', '+']) {
            length += 1;
        }
        from = at + length;
        Some((at, &rest[..length]))
    })
}

/// Bytes of the string that `text` begins with.
fn end_of_string(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let is_end = *c == quote && !escaped;
        escaped = *c == '\\' && !escaped;
        is_end
    });
    end.map(|(at, _)| at + 1)
}

/// Where a tag ends: not inside of a string or of braces of it.
fn end_of_tag(tag: &str, end: &str) -> Option<usize> {
    let (mut quote, mut escaped, mut braces) = (None, false, 0_usize);
    for (at, c) in tag.char_indices() {
        match quote {
            None if braces == 0 && tag[at..].starts_with(end) => return Some(at),
            None if c == '{' && end != "#}" => braces += 1,
            None if c == '}' => braces = braces.saturating_sub(1),
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
