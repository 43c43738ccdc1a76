//! Values as Python's `json.dumps` writes them, which is what `tojson` is in chat templates, and as
//! its `str` does.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::environment::BYTES_PER_FUEL;
use super::generator::Generator;

/// How values are written.
pub(super) struct Style {
    is_python: bool,
    ensure_ascii: bool,
    /// What a level is indented by; `None`: everything in one line.
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    sort_keys: bool,
}

impl Style {
    /// The arguments of `tojson(value, ensure_ascii=False, indent=None, separators=None,
    /// sort_keys=False)`, by place or by name.
    pub(super) fn new(given: &[Value], named: &Kwargs) -> Result<Self, Error> {
        let argument = |index: usize, name: &str| -> Result<Value, Error> {
            let named: Option<Value> = named.get(name)?;
            Ok(named.or_else(|| given.get(index).cloned()).unwrap_or(Value::from(())))
        };
        let indent = argument(1, "indent")?;
        let indent = match indent.as_str() {
            Some(text) => Some(text.to_owned()),
            None if indent.is_none() => None,
            None => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
        };
        let separators = argument(2, "separators")?;
        let separators = if separators.is_none() {
            [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned)
        } else {
            let texts = separators.try_iter()?.map(|item| item.to_string());
            texts.collect::<Vec<_>>().try_into().map_err(|_| {
                Error::new(ErrorKind::InvalidOperation, "tojson: two separators are expected")
            })?
        };
        let style = Self {
            is_python: false,
            ensure_ascii: argument(0, "ensure_ascii")?.is_true(),
            indent,
            separators,
            sort_keys: argument(3, "sort_keys")?.is_true(),
        };
        named.assert_all_used()?;
        Ok(style)
    }

    /// As Python's `repr`.
    fn python() -> Self {
        let separators = [", ", ": "].map(str::to_owned);
        Self { is_python: true, ensure_ascii: false, indent: None, separators, sort_keys: false }
    }

    /// `value` in this style. `kept` are written as they are. The fuel of `state` pays for what is
    /// written.
    pub(super) fn dump(
        &self,
        state: &State,
        value: &Value,
        kept: &[char],
    ) -> Result<String, Error> {
        let mut out = String::new();
        Writer { style: self, kept, state, paid: 0, out: &mut out }.value(value, 0)?;
        Ok(out)
    }
}

/// `value` as Python's `str` writes it; a text is itself, not a copy. `kept` are written as they are.
pub(super) fn text(state: &State, value: Value, kept: &[char]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok("".into()),
        ValueKind::String => Ok(value),
        _ => Ok(Style::python().dump(state, &value, kept)?.into()),
    }
}

struct Writer<'a> {
    style: &'a Style,
    kept: &'a [char],
    state: &'a State<'a, 'a>,
    /// Bytes of `out` that fuel was taken for.
    paid: usize,
    out: &'a mut String,
}

/// Deeper values are refused: Python's recursion limit refuses them somewhat later.
const DEPTH: usize = 200;

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "nested too deeply"));
        }
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                let word = self.word(value)?;
                self.out.push_str(&word);
            }
            ValueKind::String if self.style.is_python => {
                self.python_string(value.as_str().unwrap_or_default());
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable
                if value.downcast_object_ref::<Generator>().is_none() =>
            {
                let items = value.try_iter()?.collect::<Vec<_>>();
                let is_tuple = self.style.is_python && value.is_tuple();
                let brackets = match (is_tuple, items.len()) {
                    (true, 1) => ["(", ",)"],
                    (true, _) => ["(", ")"],
                    (false, _) => ["[", "]"],
                };
                self.items(brackets, depth, &items, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Undefined if self.style.is_python => self.out.push_str("Undefined"),
            _ if self.style.is_python => self.out.push_str(&value.to_string()),
            kind => {
                let reason = format!("tojson: {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
        Ok(())
    }

    /// What is neither text nor holds something.
    fn word(&self, value: &Value) -> Result<String, Error> {
        let [none, yes, no, nan, infinity] = if self.style.is_python {
            ["None", "True", "False", "nan", "inf"]
        } else {
            ["null", "true", "false", "NaN", "Infinity"]
        };
        Ok(match value.kind() {
            ValueKind::None => none.into(),
            ValueKind::Bool => if value.is_true() { yes } else { no }.into(),
            _ => number(value, [nan, infinity])?,
        })
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            let name = match key.kind() {
                _ if self.style.is_python => key.clone(),
                ValueKind::None | ValueKind::Bool | ValueKind::Number => self.word(&key)?.into(),
                _ => key.to_string().into(),
            };
            entries.push((name, value.get_item(&key)?));
        }
        if self.style.sort_keys {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.items(["{", "}"], depth, &entries, |writer, (key, value)| {
            writer.value(key, depth + 1)?;
            writer.out.push_str(&writer.style.separators[1]);
            writer.value(value, depth + 1)
        })
    }

    fn items<T>(
        &mut self,
        brackets: [&str; 2],
        depth: usize,
        items: &[T],
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push_str(brackets[0]);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.style.separators[0]);
            }
            self.line(depth + 1);
            write(self, item)?;
            self.pay()?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push_str(brackets[1]);
        Ok(())
    }

    /// Takes fuel for an item and for what was written since: a short template can ask for a lot of
    /// both.
    fn pay(&mut self) -> Result<(), Error> {
        let fuel = (self.out.len() - self.paid) / BYTES_PER_FUEL;
        self.paid += fuel * BYTES_PER_FUEL;
        self.state.consume_fuel(fuel as u64 + 1)
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..' ' => self.escape(c),
                '\u{7f}'.. if self.style.ensure_ascii && !self.kept.contains(&c) => self.escape(c),
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn python_string(&mut self, text: &str) {
        let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
        self.out.push(quote);
        for c in text.chars() {
            match c {
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\\' => self.out.push_str("\\\\"),
                _ if c == quote => self.out.extend(['\\', c]),
                _ if self.kept.contains(&c) || is_printable(c) => self.out.push(c),
                '\0'..='\u{ff}' => self.out.push_str(&format!("\\x{:02x}", u32::from(c))),
                '\u{100}'..='\u{ffff}' => self.out.push_str(&format!("\\u{:04x}", u32::from(c))),
                _ => self.out.push_str(&format!("\\U{:08x}", u32::from(c))),
            }
        }
        self.out.push(quote);
    }

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// Python's `str.isprintable`. Rust escapes the same characters beyond ASCII, and at the beginning of
/// a text those that combine with the one before.
fn is_printable(c: char) -> bool {
    (' '..='~').contains(&c) || format!("x{c}").escape_debug().count() == 2
}

/// A number as Python's `repr` writes it, with these names for what is none and what is infinite.
fn number(value: &Value, [nan, infinity]: [&str; 2]) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let v = f64::try_from(value.clone())?;
    if v.is_nan() {
        return Ok(nan.into());
    }
    if v.is_infinite() {
        return Ok(format!("{}{infinity}", if v < 0.0 { "-" } else { "" }));
    }
    // The shortest digits that read back as the same number are the same in both languages.
    let scientific = format!("{v:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return Ok(format!("{v:?}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    Ok(format!("{digits}e{sign}{:02}", exponent.unsigned_abs()))
}
