//! Streams of the engine as parts of answers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use futures_util::stream::SelectAll;
use jamba_core::chat::{ReplyEvent, ReplyParser, ToolCall};
use jamba_core::{CancelToken, FinishReason, Piece, RequestUsage};
use serde_json::{Value, json};

use crate::request::Work;
use crate::{ApiError, Running, Server};

/// A part of a choice.
pub(crate) struct Part {
    pub(crate) index: usize,
    pub(crate) what: What,
}

pub(crate) enum What {
    Text(String),
    Reasoning(String),
    /// A call, and its number in the reply.
    Call(usize, ToolCall),
    /// A token, whose text may come later.
    Token(TokenInfo),
    /// The last part.
    End(&'static str, RequestUsage),
}

/// A token and its probability.
pub(crate) struct TokenInfo {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(String, f32)>,
}

impl TokenInfo {
    /// As in `logprobs.content` of a chat.
    pub(crate) fn to_value(&self) -> Value {
        let of = |(token, logprob): &(String, f32)| json!({ "token": token, "logprob": logprob, "bytes": token.as_bytes() });
        let top: Vec<Value> = self.top.iter().map(of).collect();
        let mut value = of(&(self.token.clone(), self.logprob));
        value["top_logprobs"] = top.into();
        value
    }
}

/// All choices of a request. Dropping it cancels them.
pub(crate) struct Replies {
    choices: SelectAll<Choice>,
    _running: Vec<Running>,
}

impl Stream for Replies {
    type Item = Result<Part, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.choices).poll_next(context)
    }
}

struct Choice {
    server: Server,
    index: usize,
    stream: jamba_core::Stream,
    parser: Option<ReplyParser>,
    logprobs: bool,
    calls: usize,
    ready: VecDeque<What>,
    has_ended: bool,
}

impl Server {
    /// Submits all choices of a request, or none.
    pub(crate) fn start(&self, work: &mut Work) -> Result<Replies, ApiError> {
        let mut running = Vec::new();
        let mut choices = SelectAll::new();
        for (index, job) in work.choices.iter_mut().enumerate() {
            let stream = self.0.engine.submit(std::mem::take(&mut job.request))?;
            let cancel: CancelToken = stream.cancel_token();
            running.push(self.register(cancel));
            let echo = std::mem::take(&mut job.echo);
            let ready = (!echo.is_empty()).then_some(What::Text(echo));
            choices.push(Choice {
                server: self.clone(),
                index,
                stream,
                parser: job.parser.take(),
                logprobs: work.logprobs,
                calls: 0,
                ready: ready.into_iter().collect(),
                has_ended: false,
            });
        }
        Ok(Replies { choices, _running: running })
    }
}

impl Choice {
    fn hear(&mut self, piece: Piece) {
        if self.logprobs
            && let Some(id) = piece.id
        {
            let text =
                |id: u32| self.server.0.tokenizer.decode_with_special(&[id]).unwrap_or_default();
            let top = piece.top.iter().map(|top| (text(top.id), top.logprob)).collect();
            self.ready.push_back(What::Token(TokenInfo {
                token: text(id),
                logprob: piece.logprob,
                top,
            }));
        }
        match &mut self.parser {
            None if piece.text.is_empty() => {}
            None => self.ready.push_back(What::Text(piece.text)),
            Some(parser) => {
                let events = parser.push_piece(&piece, &self.server.0.tokenizer);
                self.tell(events);
            }
        }
    }

    fn tell(&mut self, events: Vec<ReplyEvent>) {
        for event in events {
            match event {
                ReplyEvent::Reasoning(text) => self.ready.push_back(What::Reasoning(text)),
                ReplyEvent::ToolCalls { calls, .. } => {
                    for call in calls {
                        self.ready.push_back(What::Call(self.calls, call));
                        self.calls += 1;
                    }
                }
                other => {
                    let text = other.text().map(|text| What::Text(text.to_owned()));
                    self.ready.extend(text);
                }
            }
        }
    }

    /// The engine has ended the request.
    fn end(&mut self) -> Result<(), ApiError> {
        self.has_ended = true;
        let events = self.parser.as_mut().map(ReplyParser::finish).unwrap_or_default();
        self.tell(events);
        let usage = self.stream.usage().unwrap_or_default();
        self.server.0.counts.time(&usage);
        let reason = match self.stream.finish_reason() {
            _ if self.calls > 0 => "tool_calls",
            Some(FinishReason::Length | FinishReason::Context) => "length",
            // Nobody else cancels a request that is still listened to.
            Some(FinishReason::Cancelled) => return Err(ApiError::ending()),
            _ => "stop",
        };
        self.ready.push_back(What::End(reason, usage));
        Ok(())
    }
}

impl Stream for Choice {
    type Item = Result<Part, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(what) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(Part { index: self.index, what })));
            }
            if self.has_ended {
                return Poll::Ready(None);
            }
            let result = match ready!(Pin::new(&mut self.stream).poll_next(context)) {
                Some(Ok(piece)) => {
                    self.hear(piece);
                    Ok(())
                }
                Some(Err(error)) => {
                    self.has_ended = true;
                    Err(error.into())
                }
                None => self.end(),
            };
            if let Err(error) = result {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}

/// Tokens of all choices together; those of a prompt count once.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
}

impl Usage {
    pub(crate) fn add(&mut self, index: usize, per_prompt: usize, usage: &RequestUsage) {
        if index.is_multiple_of(per_prompt) {
            self.prompt += usage.prompt_tokens;
            self.cached += usage.cached_tokens;
        }
        self.completion += usage.generated_tokens;
    }

    pub(crate) fn to_value(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// What answers have in common.
#[derive(Clone)]
pub(crate) struct Heading {
    pub(crate) id: Arc<str>,
    pub(crate) model: Arc<str>,
    pub(crate) created: u64,
}

#[cfg(test)]
mod tests {
    use jamba_core::chat::ChatTemplate;
    use jamba_core::{Engine, EngineOptions, GenerateOptions, Model, Request, Sampling, Tokenizer};
    use jamba_cpu::CpuBackend;
    use jamba_examples::demo_model;

    use super::*;
    use crate::Settings;

    /// A choice that hears what the demo model would never say.
    fn told(pieces: &[&str]) -> (Vec<What>, Vec<What>) {
        let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
        let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
        let options = EngineOptions { slots: 1, context: 16, ..EngineOptions::default() };
        let engine = Engine::new(&model, &tokenizer, options).unwrap();
        let request =
            Request::new(vec![1], GenerateOptions { max_tokens: 1, ..Default::default() });
        let stream = engine.submit(request).unwrap();
        let settings = Settings {
            name: "tales".into(),
            api_key: None,
            context: 16,
            max_tokens: 16,
            body: 1024,
            grace: std::time::Duration::ZERO,
        };
        let template = ChatTemplate::new("").unwrap();
        let server = Server::new(engine, tokenizer, template, Sampling::greedy(), settings);
        let mut choice = Choice {
            server,
            index: 0,
            stream,
            parser: Some(ReplyParser::new("", true)),
            logprobs: false,
            calls: 0,
            ready: VecDeque::new(),
            has_ended: false,
        };
        for text in pieces {
            let text = (*text).to_owned();
            choice.hear(Piece { id: None, logprob: 0.0, top: Vec::new(), text });
        }
        let before = choice.ready.drain(..).collect();
        choice.end().unwrap();
        (before, choice.ready.into())
    }

    #[test]
    fn calls_are_told_as_they_are_complete() {
        let pieces = [
            "<think>Hm.</thi",
            "nk>\nSo.\n<tool_c",
            "all>{\"name\":\"f\",\"argum",
            "ents\":{\"x\":1}}</tool_call>",
        ];
        let (before, end) = told(&pieces);
        let [What::Reasoning(a), What::Text(text), What::Call(0, call)] = &before[..] else {
            panic!("{} parts", before.len())
        };
        assert_eq!((a.as_str(), text.as_str()), ("Hm.", "So."));
        assert_eq!((call.name.as_str(), &call.arguments["x"]), ("f", &json!(1)));
        assert!(matches!(end[..], [What::End("tool_calls", _)]));
    }

    #[test]
    fn what_is_no_call_is_text() {
        let (before, end) = told(&["<tool_call>{\"name\":1}</tool_call>", " <tool_call>{\"na"]);
        assert!(
            matches!(&before[..], [What::Text(text)] if text == "<tool_call>{\"name\":1}</tool_call>")
        );
        let [What::Text(text), What::End(reason, _)] = &end[..] else {
            panic!("{} parts", end.len())
        };
        assert_eq!((text.as_str(), *reason), ("<tool_call>{\"na", "stop"));
    }
}
