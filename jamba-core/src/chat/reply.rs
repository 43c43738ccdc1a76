//! What a model answers, taken apart as it comes: text, reasoning, tool calls.

use serde_json::{Map, Value, json};

use crate::generate::Piece;
use crate::tokenizer::Tokenizer;

/// A function that the model calls.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Its name.
    pub name: String,
    /// Its arguments, by name.
    pub arguments: Map<String, Value>,
}

impl ToolCall {
    /// As templates have it in `tool_calls` of a message.
    pub fn to_value(&self) -> Value {
        let function = json!({ "name": self.name, "arguments": self.arguments });
        json!({ "type": "function", "function": function })
    }
}

/// A part of a reply. The [`raw`](Self::raw) texts of all parts together are the reply.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ReplyEvent {
    /// Text for the user.
    Text(String),
    /// What the model writes between `<think>` and `</think>`.
    Reasoning(String),
    /// A complete block of calls.
    ToolCalls {
        /// In the order in which they are written; at least one.
        calls: Vec<ToolCall>,
        /// The block with its tags.
        raw: String,
    },
    /// A block that should be tool calls and is not: text, and a reason to warn about.
    Malformed {
        /// The block with its tags.
        raw: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Tags, and white space around them: nothing to show.
    Markup(String),
}

impl ReplyEvent {
    /// The part as the model wrote it.
    pub fn raw(&self) -> &str {
        match self {
            Self::Text(raw) | Self::Reasoning(raw) | Self::Markup(raw) => raw,
            Self::ToolCalls { raw, .. } | Self::Malformed { raw, .. } => raw,
        }
    }

    /// The text that the user is to see, if any.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Malformed { raw: text, .. } => Some(text),
            _ => None,
        }
    }
}

/// Finds reasoning and tool calls in a text that comes in pieces, however it is cut.
///
/// It knows `<think>...</think>`, Jamba's `<tool_calls>[{...}, ...]</tool_calls>` and ChatML's
/// `<tool_call>{...}</tool_call>`. A call is an object with `name` and `arguments`: an object, or a
/// string with one. A tag inside of a JSON string is part of the string.
///
/// ```
/// use jamba_core::chat::{ReplyEvent, ReplyParser};
///
/// let mut parser = ReplyParser::default();
/// let reply = ["Let me ", "see.<tool", "_call>{\"name\": \"f\"", "}</tool_call>"];
/// let mut events: Vec<ReplyEvent> = reply.iter().flat_map(|text| parser.push(text)).collect();
/// events.extend(parser.finish());
/// let text: String = events.iter().filter_map(ReplyEvent::text).collect();
/// assert_eq!(text, "Let me see.");
/// let Some(ReplyEvent::ToolCalls { calls, .. }) = events.last() else { panic!("{events:?}") };
/// assert_eq!(calls[0].name, "f");
/// ```
#[derive(Clone, Debug)]
pub struct ReplyParser {
    state: State,
    /// What is not told yet.
    held: String,
    /// White space that comes next belongs to a tag.
    after_tag: bool,
    finds_calls: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Text,
    Reasoning,
    /// In the block of [`CALLS`] with this number; its closing tag is not in the first bytes.
    Calls {
        kind: usize,
        searched: usize,
    },
}

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
/// Opening and closing tags of blocks of calls.
const CALLS: [(&str, &str); 2] =
    [("<tool_call>", "</tool_call>"), ("<tool_calls>", "</tool_calls>")];

impl Default for ReplyParser {
    fn default() -> Self {
        Self { state: State::Text, held: String::new(), after_tag: false, finds_calls: true }
    }
}

impl ReplyParser {
    /// A parser for the reply to this prompt, which may end inside of `<think>`. Without tools
    /// (`has_tools`), what looks like a call is text.
    pub fn new(prompt: &str, has_tools: bool) -> Self {
        let in_reasoning = prompt.trim_end().ends_with(THINK);
        let state = if in_reasoning { State::Reasoning } else { State::Text };
        Self { state, after_tag: in_reasoning, finds_calls: has_tools, ..Self::default() }
    }

    /// Whether what comes next is reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Takes the next text and returns the parts that became certain. What may be the beginning of
    /// a tag is held back, white space before it too.
    pub fn push(&mut self, text: &str) -> Vec<ReplyEvent> {
        self.held.push_str(text);
        self.read(false)
    }

    /// [`push`](Self::push) of a generated piece. Tags that are special tokens have no text there:
    /// they are spelled out.
    pub fn push_piece(&mut self, piece: &Piece, tokenizer: &Tokenizer) -> Vec<ReplyEvent> {
        self.held.push_str(&piece.text);
        let special = piece.id.and_then(|id| tokenizer.special(id));
        self.held.push_str(special.filter(|token| is_tag(token)).as_deref().unwrap_or_default());
        self.read(false)
    }

    /// Returns the rest: nothing more comes. A block that is not closed is
    /// [malformed](ReplyEvent::Malformed).
    pub fn finish(&mut self) -> Vec<ReplyEvent> {
        self.read(true)
    }

    fn read(&mut self, end: bool) -> Vec<ReplyEvent> {
        let mut events = Vec::new();
        loop {
            let before = (self.held.len(), self.state);
            self.read_one(end, &mut events);
            if self.held.is_empty() || before == (self.held.len(), self.state) {
                return events;
            }
        }
    }

    /// Up to the next tag, or to the end of what is certain.
    fn read_one(&mut self, end: bool, events: &mut Vec<ReplyEvent>) {
        if let State::Calls { kind, searched } = self.state {
            self.read_calls(kind, searched, end, events);
            return;
        }
        if self.after_tag {
            let space = self.held.len() - self.held.trim_start().len();
            if space == self.held.len() && !end {
                return;
            }
            self.after_tag = false;
            self.tell(space, ReplyEvent::Markup, events);
        }
        let said = if self.state == State::Text { ReplyEvent::Text } else { ReplyEvent::Reasoning };
        let found = self.tags().filter_map(|tag| Some((self.held.find(tag)?, tag)));
        let Some((at, tag)) = found.min() else {
            let certain = if end { self.held.len() } else { self.certain() };
            self.tell(certain, said, events);
            return;
        };
        let text = self.held[..at].trim_end().len();
        self.tell(text, said, events);
        match CALLS.iter().position(|(open, _)| *open == tag) {
            Some(kind) => {
                self.tell(at - text, ReplyEvent::Markup, events);
                self.state = State::Calls { kind, searched: 0 };
            }
            None => {
                self.tell(at - text + tag.len(), ReplyEvent::Markup, events);
                self.state = if tag == THINK { State::Reasoning } else { State::Text };
                self.after_tag = true;
            }
        }
    }

    fn read_calls(&mut self, kind: usize, from: usize, end: bool, events: &mut Vec<ReplyEvent>) {
        let (open, close) = CALLS[kind];
        let mut from = from.max(open.len());
        while let Some(at) = self.held[from.min(self.held.len())..].find(close) {
            let at = from + at;
            let calls = parse(&self.held[open.len()..at]);
            from = at + close.len();
            match calls {
                Ok(calls) => self.tell(from, |raw| ReplyEvent::ToolCalls { calls, raw }, events),
                // The tag is inside of a string.
                Err(Refusal::Incomplete) => continue,
                Err(Refusal::Malformed(reason)) => {
                    self.tell(from, |raw| ReplyEvent::Malformed { raw, reason }, events);
                }
            }
            self.state = State::Text;
            self.after_tag = true;
            return;
        }
        if end {
            let reason = format!("`{open}` is not closed");
            self.tell(self.held.len(), |raw| ReplyEvent::Malformed { raw, reason }, events);
            self.state = State::Text;
            return;
        }
        // The closing tag may have begun at the end.
        let searched = self.held.len().saturating_sub(close.len() - 1).max(from);
        let searched = self.held.floor_char_boundary(searched.min(self.held.len()));
        self.state = State::Calls { kind, searched };
    }

    /// Tells the first bytes of what is held.
    fn tell(
        &mut self,
        bytes: usize,
        event: impl FnOnce(String) -> ReplyEvent,
        events: &mut Vec<ReplyEvent>,
    ) {
        if bytes > 0 {
            events.push(event(self.held.drain(..bytes).collect()));
        }
    }

    /// The tags that mean something here.
    fn tags(&self) -> impl Iterator<Item = &'static str> + use<> {
        let in_text = self.state == State::Text;
        let calls = CALLS.iter().map(|(open, _)| *open);
        let calls = calls.filter({
            let finds_calls = self.finds_calls;
            move |_| in_text && finds_calls
        });
        [if in_text { THINK } else { THINK_END }].into_iter().chain(calls)
    }

    /// Bytes that are no beginning of a tag, nor white space before one.
    fn certain(&self) -> usize {
        let longest = self.tags().map(str::len).max().unwrap_or(0);
        let from = self.held.floor_char_boundary(self.held.len().saturating_sub(longest));
        let mut starts = self.held[from..].char_indices().map(|(at, _)| from + at);
        let begins = |at: &usize| self.tags().any(|tag| tag.starts_with(&self.held[*at..]));
        let tag = starts.find(begins).unwrap_or(self.held.len());
        self.held[..tag].trim_end().len()
    }
}

fn is_tag(token: &str) -> bool {
    [THINK, THINK_END].contains(&token)
        || CALLS.iter().any(|(open, close)| [*open, *close].contains(&token))
}

enum Refusal {
    /// The JSON is not at its end.
    Incomplete,
    Malformed(String),
}

/// The calls in a block: an object, or a list of objects.
fn parse(json: &str) -> Result<Vec<ToolCall>, Refusal> {
    let value: Value = serde_json::from_str(json).map_err(|error| {
        if error.is_eof() { Refusal::Incomplete } else { Refusal::Malformed(error.to_string()) }
    })?;
    let calls = match value {
        Value::Array(calls) if !calls.is_empty() => calls,
        other => vec![other],
    };
    calls.into_iter().map(call).collect::<Result<_, String>>().map_err(Refusal::Malformed)
}

fn call(value: Value) -> Result<ToolCall, String> {
    let Value::Object(mut fields) = value else { return Err("a call must be an object".into()) };
    let name = match fields.remove("name") {
        Some(Value::String(name)) if !name.is_empty() => name,
        _ => return Err("a call must have a string `name`".into()),
    };
    let arguments = fields.remove("arguments").or_else(|| fields.remove("parameters"));
    let arguments = match arguments {
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other.unwrap_or(Value::Null),
    };
    match arguments {
        Value::Null => Ok(ToolCall { name, arguments: Map::new() }),
        Value::Object(arguments) => Ok(ToolCall { name, arguments }),
        _ => Err(format!("the arguments of `{name}` must be an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All events, with neighbours of a kind put together.
    fn events(pieces: &[&str]) -> Vec<ReplyEvent> {
        let mut parser = ReplyParser::default();
        let mut all = Vec::new();
        let mut rest = Vec::new();
        for piece in pieces {
            rest.extend(parser.push(piece));
        }
        rest.extend(parser.finish());
        for event in rest {
            match (all.last_mut(), event) {
                (Some(ReplyEvent::Text(a)), ReplyEvent::Text(b))
                | (Some(ReplyEvent::Reasoning(a)), ReplyEvent::Reasoning(b))
                | (Some(ReplyEvent::Markup(a)), ReplyEvent::Markup(b)) => a.push_str(&b),
                (_, event) => all.push(event),
            }
        }
        all
    }

    fn text(text: &str) -> ReplyEvent {
        ReplyEvent::Text(text.into())
    }

    fn markup(text: &str) -> ReplyEvent {
        ReplyEvent::Markup(text.into())
    }

    fn calls(raw: &str, names: &[&str]) -> ReplyEvent {
        let calls = names.iter().map(|name| ToolCall {
            name: (*name).into(),
            arguments: json!({ "x": 1 }).as_object().unwrap().clone(),
        });
        ReplyEvent::ToolCalls { calls: calls.collect(), raw: raw.into() }
    }

    const REPLY: &str = concat!(
        "<think>\nWhat is ü? <tool_call> \n</think>\n\nLet me see.\n",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n",
        "<tool_calls>[{\"name\":\"g\",\"arguments\":\"{\\\"x\\\":1}\"}, ",
        "{\"name\":\"h\",\"arguments\":{\"x\":1}}]</tool_calls> Done < 1 ",
    );

    #[test]
    fn a_reply_is_taken_apart() {
        let expected = [
            markup("<think>\n"),
            ReplyEvent::Reasoning("What is ü? <tool_call>".into()),
            markup(" \n</think>\n\n"),
            text("Let me see."),
            markup("\n"),
            calls(
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>",
                &["f"],
            ),
            markup("\n"),
            calls(
                concat!(
                    "<tool_calls>[{\"name\":\"g\",\"arguments\":\"{\\\"x\\\":1}\"}, ",
                    "{\"name\":\"h\",\"arguments\":{\"x\":1}}]</tool_calls>"
                ),
                &["g", "h"],
            ),
            markup(" "),
            text("Done < 1 "),
        ];
        assert_eq!(events(&[REPLY]), expected);
        let characters: Vec<String> = REPLY.chars().map(String::from).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        assert_eq!(events(&characters), expected);
    }

    #[test]
    fn text_is_told_as_soon_as_it_is_certain() {
        let mut parser = ReplyParser::default();
        assert_eq!(parser.push("Hello"), [text("Hello")]);
        assert_eq!(parser.push(" wor"), [text(" wor")]);
        assert_eq!(parser.push("ld <tool"), [text("ld")]);
        assert_eq!(parser.push("s>"), [text(" <tools>")]);
        assert_eq!(parser.push(" <th"), []);
        assert_eq!(parser.finish(), [text(" <th")]);
    }

    #[test]
    fn a_closing_tag_in_a_string_does_not_close() {
        let raw = "<tool_call>{\"name\":\"f\",\"arguments\":{\"x\":\"</tool_call>\"}}</tool_call>";
        let found = events(&[raw]);
        let ReplyEvent::ToolCalls { calls, .. } = &found[0] else { panic!("{found:?}") };
        assert_eq!(calls[0].arguments["x"], "</tool_call>");
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn what_is_no_call_is_text_with_a_reason() {
        for (raw, part) in [
            ("<tool_call>{\"name\": 1}</tool_call>", "`name`"),
            ("<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>", "object"),
            ("<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}</tool_call>", "object"),
            ("<tool_call>f(1)</tool_call>", "expected"),
            ("<tool_calls>[]</tool_calls>", "object"),
            ("<tool_calls>[{\"name\": \"f\"}", "not closed"),
            ("<tool_call>", "not closed"),
        ] {
            let found = events(&[raw]);
            let [ReplyEvent::Malformed { raw: told, reason }] = &found[..] else {
                panic!("{raw}: {found:?}")
            };
            assert_eq!(told, raw);
            assert!(reason.contains(part), "{raw}: {reason}");
            assert_eq!(found[0].text(), Some(raw));
        }
        assert_eq!(events(&["<tool_call>x</tool_call> and"])[1..], [markup(" "), text("and")]);
    }

    #[test]
    fn the_prompt_may_begin_the_reasoning_and_tools_may_be_off() {
        let mut parser = ReplyParser::new("<|im_start|>assistant\n<think>\n", true);
        let reply = [parser.push("Hm.</think>Yes"), parser.finish()].concat();
        let reasoning = ReplyEvent::Reasoning("Hm.".into());
        assert_eq!(reply, [reasoning, markup("</think>"), text("Yes")]);
        let mut parser = ReplyParser::new("<|im_start|>assistant\n", false);
        let reply = [parser.push("<tool_call>{}</tool_call>"), parser.finish()].concat();
        assert_eq!(reply, [text("<tool_call>{}</tool_call>")]);
    }

    /// Replies made of everything that matters to the parser.
    fn replies() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("<think>"),
            Just("</think>"),
            Just("<tool_call>"),
            Just("</tool_call>"),
            Just("<tool_calls>"),
            Just("</tool_calls>"),
            Just("{\"name\":\"f\",\"arguments\":{}}"),
            Just("[{\"name\":\"f\",\"arguments\":{\"x\":\"</tool_calls>\"}}]"),
            Just("{\"name\":\"</tool_call>"),
            Just("[1,"),
            Just("\""),
            Just("<"),
            Just("</"),
            Just("tool_call"),
            Just(" "),
            Just("\n"),
            Just("\u{2003}"),
            Just("größer"),
            Just("🦊"),
            Just("x"),
        ];
        proptest::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn every_split_tells_the_same(reply in replies(), seed in any::<u64>()) {
            let whole = events(&[&reply]);
            let mut random = seed;
            let mut pieces = vec![];
            let mut from = 0;
            for (at, _) in reply.char_indices().skip(1) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if random >> 62 == 0 || seed % 5 == 0 {
                    pieces.push(&reply[from..at]);
                    from = at;
                }
            }
            pieces.push(&reply[from..]);
            prop_assert_eq!(&events(&pieces), &whole);
            let raw: String = whole.iter().map(ReplyEvent::raw).collect();
            prop_assert_eq!(raw, reply);
        }

        #[test]
        fn any_text_comes_out_as_it_went_in(reply in "\\PC*", prefix in replies()) {
            let reply = prefix + &reply;
            let raw: String = events(&[&reply]).iter().map(ReplyEvent::raw).collect();
            prop_assert_eq!(raw, reply);
        }
    }

    #[test]
    fn every_split_in_two() {
        let whole = events(&[REPLY]);
        for at in (0..=REPLY.len()).filter(|at| REPLY.is_char_boundary(*at)) {
            assert_eq!(events(&[&REPLY[..at], &REPLY[at..]]), whole, "{at}");
        }
    }
}
