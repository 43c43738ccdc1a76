//! A conversation kept as state: every turn runs only what is new.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::message::{Chat, Message};
use super::reply::{ReplyEvent, ReplyParser};
use super::template::{ChatTemplate, End};
use crate::error::{Error, Result};
use crate::files::read_json;
use crate::generate::{CancelToken, FinishReason, GenerateOptions, Generator, Usage};
use crate::session::Session;
use crate::state::Replacement;
use crate::tokenizer::Tokenizer;

/// Checkpoints kept at the ends of prompts and replies, two for each turn.
const CHECKPOINTS: usize = 16;

/// What a turn did to the state before the reply began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens of the prompt that the state had.
    pub reused: usize,
    /// Those of them that had to be run again from a checkpoint before them, as the conversation
    /// was changed there.
    pub replayed: usize,
    /// Tokens of the prompt that are new.
    pub appended: usize,
}

/// A conversation on a [`Session`].
///
/// [`chat`](Self::chat) may be changed at will: the state follows at the next
/// [`reply`](Self::reply). The messages are rendered, the tokens that the state has in common with
/// them stay, the state is rewound to there, and the rest is appended. In a conversation that merely
/// goes on, that is the new message: what the model generated is in the state as it was generated,
/// whatever a tokenizer would make of its text.
///
/// ```
/// use jamba_core::chat::{ChatSession, ChatTemplate, Message, ReplyEvent};
/// use jamba_core::{CancelToken, GenerateOptions, LanguageModel, Model, SessionOptions, Tokenizer};
/// use jamba_cpu::CpuBackend;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
/// let model = Model::load(folder, CpuBackend::new())?;
/// let tokenizer = Tokenizer::from_folder(folder)?;
/// let template = ChatTemplate::from_folder(folder)?.unwrap_or(ChatTemplate::plain(folder)?);
/// let session = model.session(SessionOptions { context: 512, ..Default::default() })?;
/// let mut chat = ChatSession::new(session, tokenizer, template);
///
/// let options = GenerateOptions { max_tokens: 12, ..Default::default() };
/// for line in ["Once upon a time", "The fox said:"] {
///     chat.chat.messages.push(Message::user(line));
///     let mut reply = chat.reply(options.clone(), CancelToken::new())?;
///     for event in &mut reply {
///         print!("{}", event?.text().unwrap_or_default());
///     }
///     reply.finish()?;
/// }
/// # Ok::<(), jamba_core::Error>(())
/// ```
pub struct ChatSession {
    /// What is said, and with which tools.
    pub chat: Chat,
    session: Session,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    held: Held,
}

/// What the tokens of the session stand for.
#[derive(Clone, Default)]
struct Held {
    text: String,
    /// As in [`Rendered`](super::Rendered).
    cuts: Vec<usize>,
    /// So many first bytes of the text are so many first tokens; ascending.
    anchors: Vec<(usize, usize)>,
}

impl ChatSession {
    /// An empty conversation. Tokens that the session holds are forgotten by the first reply,
    /// unless it begins with them.
    pub fn new(session: Session, tokenizer: Tokenizer, template: ChatTemplate) -> Self {
        Self { chat: Chat::default(), session, tokenizer, template, held: Held::default() }
    }

    /// The session that holds the state.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Brings the state to the end of the conversation, and begins the assistant's reply, whose
    /// parts are then iterated over. Nothing is added to the conversation before
    /// [`ChatReply::finish`].
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::Context`] for a conversation that does not fit: the
    /// state is as before. What [`Session::rewind_to`] and [`Session::append`] report: the next
    /// reply begins with what is left of the state.
    pub fn reply(
        &mut self,
        options: GenerateOptions,
        cancel: CancelToken,
    ) -> Result<ChatReply<'_>> {
        let rendered = self.template.render(&self.chat, End::Reply)?;
        let held = self.session.tokens();
        let is_held = |(bytes, tokens): &&(usize, usize)| {
            let cuts = &self.held.cuts[..self.held.cuts.partition_point(|cut| cut < bytes)];
            *tokens <= held.len() && rendered.begins_with(&self.held.text[..*bytes], cuts)
        };
        let (bytes, tokens) = self.held.anchors.iter().rfind(is_held).copied().unwrap_or((0, 0));
        let mut ids = held[..tokens].to_vec();
        ids.extend(rendered.encode_from(&self.tokenizer, bytes)?);
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let allocated = self.session.context();
        if ids.len() > allocated {
            return Err(Error::Context { needed: ids.len(), allocated });
        }

        let common = held.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        self.held.anchors.retain(|anchor| anchor.1 <= tokens);
        let rewound = self.session.rewind_to(common)?;
        let appended = ids.len() - common;
        let mut done = 0;
        if appended > 0 {
            self.mark()?;
            done = self.session.append_while(&ids[common..], || !cancel.is_cancelled())?;
        }
        let prefill = Prefill { reused: common, replayed: rewound.replayed, appended: done };
        let has_tools = !self.chat.tools.is_empty();
        let parser = ReplyParser::new(rendered.text(), has_tools);
        if done == appended {
            self.mark()?;
            let anchors = std::mem::take(&mut self.held.anchors);
            self.held = Held { text: rendered.text, cuts: rendered.cuts, anchors };
            self.held.anchors.push((self.held.text.len(), ids.len()));
        }
        let Self { chat, session, tokenizer, held, .. } = self;
        let generator = if done == appended {
            let mut generator = Generator::new(session, tokenizer, options)?.with_cancel(cancel);
            generator.resume()?;
            Some(generator)
        } else {
            None
        };
        Ok(ChatReply {
            generator,
            tokenizer,
            parser,
            ready: VecDeque::new(),
            prefill,
            said: Said::default(),
            chat,
            held,
        })
    }

    /// A checkpoint here, in the place of the oldest if there are enough.
    fn mark(&mut self) -> Result<()> {
        if self.session.position() > 0 {
            self.session.mark()?;
        }
        while self.session.checkpoints().len() > CHECKPOINTS {
            let Some(oldest) = self.session.checkpoints().next() else { break };
            self.session.unmark(oldest);
        }
        Ok(())
    }

    /// Takes back the last message of the user and all that followed, and returns it. The state
    /// follows at the next reply.
    pub fn undo(&mut self) -> Option<Message> {
        let last = self.chat.messages.iter().rposition(|message| message.role() == "user")?;
        self.chat.messages.drain(last..).next()
    }

    /// Another conversation, which goes on independently from the same state.
    ///
    /// # Errors
    /// As [`Session::fork`].
    pub fn fork(&mut self) -> Result<Self> {
        Ok(Self {
            chat: self.chat.clone(),
            session: self.session.fork()?,
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            held: self.held.clone(),
        })
    }

    /// Writes the state to `path` ([`Session::save`]) and the messages to the same with `.json`
    /// behind it. Files that were there are replaced when both are written.
    ///
    /// # Errors
    /// As [`Session::save`].
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let Held { text, cuts, anchors } = &self.held;
        let file = json!({
            "chat": self.chat.to_value(), "text": text, "cuts": cuts, "anchors": anchors,
        });
        let messages =
            Replacement::write(&beside(path), |path| std::fs::write(path, format!("{file:#}\n")))?;
        self.session.save(path)?;
        messages.put()
    }

    /// Goes on with a conversation that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], [`Error::StateFile`] for a file that is not what `save`
    /// writes, and those of [`Session::load`]: the conversation is as before.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let beside = beside(path);
        let refused =
            |reason: &str| Error::StateFile { path: beside.clone(), reason: reason.into() };
        let mut file = read_json(&beside)?.ok_or_else(|| refused("there is no such file"))?;
        let chat = file.get_mut("chat").map(Value::take).unwrap_or_default();
        let chat = Chat::from_value(chat)?;
        let number = |value: &Value| value.as_u64().and_then(|v| usize::try_from(v).ok());
        let read = || {
            let text = file["text"].as_str()?.to_owned();
            let cuts = file["cuts"].as_array()?.iter().map(number).collect::<Option<Vec<_>>>()?;
            let anchor = |pair: &Value| number(pair.get(0)?).zip(number(pair.get(1)?));
            let anchors = file["anchors"].as_array()?.iter().map(anchor);
            let anchors = anchors.collect::<Option<Vec<_>>>()?;
            let fits = anchors.iter().all(|(bytes, _)| text.is_char_boundary(*bytes));
            (fits && cuts.is_sorted() && anchors.is_sorted()).then_some(Held {
                text,
                cuts,
                anchors,
            })
        };
        let held = read().ok_or_else(|| refused("it is not what a saved chat has"))?;
        self.session.load(path)?;
        self.chat = chat;
        self.held = held;
        Ok(())
    }
}

/// The file of the messages that belong to a state.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// A reply as it comes: an iterator of its parts. An error is the last item.
pub struct ChatReply<'a> {
    /// `None` where reading the prompt was cancelled.
    generator: Option<Generator<'a>>,
    tokenizer: &'a Tokenizer,
    parser: ReplyParser,
    ready: VecDeque<ReplyEvent>,
    prefill: Prefill,
    said: Said,
    chat: &'a mut Chat,
    held: &'a mut Held,
}

/// What was told so far.
#[derive(Default)]
struct Said {
    raw: String,
    text: String,
    reasoning: String,
    calls: Vec<Value>,
}

impl Said {
    fn hear(&mut self, event: &ReplyEvent) {
        self.raw.push_str(event.raw());
        self.text.push_str(event.text().unwrap_or_default());
        match event {
            ReplyEvent::Reasoning(text) => self.reasoning.push_str(text),
            ReplyEvent::ToolCalls { calls, .. } => {
                self.calls.extend(calls.iter().map(super::ToolCall::to_value));
            }
            _ => {}
        }
    }

    fn message(&self) -> Message {
        let mut message = Message::assistant(self.text.clone());
        if !self.reasoning.is_empty() {
            message = message.with("reasoning_content", self.reasoning.clone());
        }
        if !self.calls.is_empty() {
            message = message.with("tool_calls", self.calls.clone());
        }
        message
    }
}

impl ChatReply<'_> {
    /// What was done before the reply began.
    pub fn prefill(&self) -> Prefill {
        self.prefill
    }

    /// Why the reply ended; `None` before that, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match &self.generator {
            Some(generator) => generator.finish_reason(),
            None => Some(FinishReason::Cancelled),
        }
    }

    /// What was generated, and in what time; the prompt is told by [`prefill`](Self::prefill).
    pub fn usage(&self) -> Usage {
        self.generator.as_ref().map(Generator::usage).unwrap_or_default()
    }

    /// Ends the reply, wherever it is, and adds it to the conversation: `content`, and where there
    /// is any `reasoning_content` and `tool_calls`. Nothing is added where it was cancelled before
    /// anything was said.
    ///
    /// # Errors
    /// As [`Session::append`], of the last token.
    pub fn finish(mut self) -> Result<Option<Message>> {
        for event in self.parser.finish() {
            self.said.hear(&event);
        }
        let is_cancelled = matches!(self.finish_reason(), None | Some(FinishReason::Cancelled));
        if self.said.raw.is_empty() && is_cancelled {
            return Ok(None);
        }
        if let Some(generator) = self.generator.take() {
            let (reason, last) = (generator.finish_reason(), generator.pending());
            let session = generator.into_session();
            // What ends a reply is written by the template; of other replies, the last token is
            // part of what was said.
            let fits = session.position() < session.context();
            let is_whole = match (reason, last) {
                (Some(FinishReason::Eos), _) => true,
                (Some(FinishReason::Stop) | None, _) => false,
                (Some(_), Some(last)) if fits => session.append(&[last]).map(|_| true)?,
                (Some(_), _) => false,
            };
            if is_whole {
                self.held.text.push_str(&self.said.raw);
                self.held.anchors.push((self.held.text.len(), session.position()));
            }
        }
        let message = self.said.message();
        self.chat.messages.push(message.clone());
        Ok(Some(message))
    }
}

impl Iterator for ChatReply<'_> {
    type Item = Result<ReplyEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            match self.generator.as_mut()?.next() {
                Some(Ok(piece)) => {
                    self.ready.extend(self.parser.push_piece(&piece, self.tokenizer))
                }
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    self.ready.extend(self.parser.finish());
                    break;
                }
            }
        }
        let event = self.ready.pop_front()?;
        self.said.hear(&event);
        Some(Ok(event))
    }
}
