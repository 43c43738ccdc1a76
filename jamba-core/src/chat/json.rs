//! Values as Python's `json.dumps` writes them, which is what `tojson` is in chat templates.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::environment::BYTES_PER_FUEL;

/// How `json.dumps` is to write.
pub(super) struct Style {
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
            ensure_ascii: argument(0, "ensure_ascii")?.is_true(),
            indent,
            separators,
            sort_keys: argument(3, "sort_keys")?.is_true(),
        };
        named.assert_all_used()?;
        Ok(style)
    }

    /// `value` as JSON. `kept` are written as they are. The fuel of `state` pays for what is written.
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
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value, ["NaN", "Infinity"])?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.items(['[', ']'], depth, &items, |writer, item| {
                    writer.value(item, depth + 1)
                })?;
            }
            ValueKind::Map => self.map(value, depth)?,
            kind => {
                let reason = format!("tojson: {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            let name = match key.kind() {
                ValueKind::None => "null".into(),
                ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
                ValueKind::Number => number(&key, ["NaN", "Infinity"])?,
                _ => key.to_string(),
            };
            entries.push((name, value.get_item(&key)?));
        }
        if self.style.sort_keys {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.items(['{', '}'], depth, &entries, |writer, (key, value)| {
            writer.string(key);
            writer.out.push_str(&writer.style.separators[1]);
            writer.value(value, depth + 1)
        })
    }

    fn items<T>(
        &mut self,
        brackets: [char; 2],
        depth: usize,
        items: &[T],
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(brackets[0]);
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
        self.out.push(brackets[1]);
        Ok(())
    }

    /// Takes fuel for what was written since: a short template can ask for a lot of indentation.
    fn pay(&mut self) -> Result<(), Error> {
        let fuel = (self.out.len() - self.paid) / BYTES_PER_FUEL;
        self.paid += fuel * BYTES_PER_FUEL;
        self.state.consume_fuel(fuel as u64)
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

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A number as Python's `repr` writes it, with these names for what is none and what is infinite.
pub(super) fn number(value: &Value, [nan, infinity]: [&str; 2]) -> Result<String, Error> {
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
