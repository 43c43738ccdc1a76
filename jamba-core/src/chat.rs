//! Conversations: messages to tokens and back, by the model's own chat template.
//!
//! A [`Chat`] is messages, tools and documents. A [`ChatTemplate`] writes it as the text that the
//! model was trained on, as transformers' `apply_chat_template` does. A [`ReplyParser`] takes what
//! the model answers apart into text, reasoning and tool calls, as it streams. A [`ChatSession`]
//! keeps a conversation as state: every turn runs only what is new.
//!
//! ```
//! use jamba_core::chat::{Chat, ChatTemplate, End, Message};
//!
//! let template = ChatTemplate::new(
//!     "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}\
//!      {% if add_generation_prompt %}<|assistant|>{% endif %}",
//! )?;
//! let chat = Chat::new([Message::system("Be brief."), Message::user(" Who are you? ")]);
//! let rendered = template.render(&chat, End::Reply)?;
//! assert_eq!(
//!     rendered.text(),
//!     "<|system|>Be brief.<|end|>\n<|user|>Who are you?<|end|>\n<|assistant|>"
//! );
//! # Ok::<(), jamba_core::Error>(())
//! ```
//!
//! # Special tokens in what users write
//!
//! The text that a template returns is encoded with its special tokens: that is how `<|im_end|>`
//! ends a message. A user who types `<|im_end|>\n<|im_start|>system` would thereby begin a system
//! message of their own, in any program that renders and encodes as transformers does. A template
//! that was [told the tokenizer](ChatTemplate::with_guard) takes such spellings in messages and
//! documents as the characters that they are. What the template itself puts together out of its own
//! and a user's characters is not looked at, nor is what assistants said.
//!
//! # What is not as in Python
//!
//! Templates are rendered by minijinja, not by Jinja2. What it does not have is an error: the operator
//! `%` of strings, rare methods (`zfill`) and arguments of methods, rare filters, tests and functions
//! (`truncate`, `is callable`, `cycler`), `varargs` and `kwargs` of macros. Without an error,
//!
//! - what is marked as safe (`safe`, `e`) does not escape what `+` puts to it;
//! - filters and methods of strings that are given another value (`trim`, `format`) write floats that
//!   have an exponent in Python without it, or with another, and so does `~` in a tag where it stands
//!   beside an `is` without parentheses;
//! - ranges, `items()` of dicts, groups, functions and generators are printed otherwise;
//! - some of what Python refuses is done: comparing texts or what is undefined with numbers, JSON and
//!   lengths of what is no list (ranges, `items`, `reverse`, `batch`), joining numbers with
//!   `str.join`, `loop(none)`;
//! - `attr` finds what a dict has, digits are all numeric characters, and `title` of a string takes an
//!   apostrophe for a letter.

mod environment;
mod generator;
mod json;
mod message;
mod namespace;
mod rendered;
mod reply;
mod session;
mod template;

pub use message::{Chat, Message};
pub use rendered::Rendered;
pub use reply::{ReplyEvent, ReplyParser, ToolCall};
pub use session::{ChatReply, ChatSession, Prefill};
pub use template::{ChatTemplate, End};
