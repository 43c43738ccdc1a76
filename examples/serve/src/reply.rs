//! Streams of the engine as parts of answers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use futures_util::stream::SelectAll;
use jamba_core::chat::{ReplyEvent, ReplyParser, ToolCall};
use jamba_core::{CancelToken, FinishReason, Piece, RequestUsage, Scored, TokenLogProb};
use jamba_examples::note;
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
    /// Characters of the text that are its: none of a special token.
    pub(crate) chars: usize,
    /// None of the first of a prompt, and no others in its place.
    pub(crate) logprob: Option<f32>,
    pub(crate) top: Vec<(String, f32)>,
}

impl TokenInfo {
    /// As in `logprobs.content` of a chat.
    pub(crate) fn to_value(&self) -> Value {
        let of = |token: &str, logprob: Option<f32>| json!({ "token": token, "logprob": logprob, "bytes": token.as_bytes() });
        let top = self.top.iter().map(|(token, logprob)| of(token, Some(*logprob)));
        let top: Vec<Value> = top.collect();
        let mut value = of(&self.token, self.logprob);
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
    /// Tokens of the prompt that are to be told, when their probabilities are there.
    echo: Vec<u32>,
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
            let (text, echo) = std::mem::take(&mut job.echo);
            let ready = (!text.is_empty()).then_some(What::Text(text));
            choices.push(Choice {
                server: self.clone(),
                index,
                stream,
                parser: job.parser.take(),
                logprobs: work.logprobs,
                echo,
                calls: 0,
                ready: ready.into_iter().collect(),
                has_ended: false,
            });
        }
        Ok(Replies { choices, _running: running })
    }
}

impl Choice {
    /// The prompt was read: its tokens are told, if that was asked for.
    fn hear_prompt(&mut self) {
        let echo = std::mem::take(&mut self.echo);
        let scores = self.stream.prompt_logprobs().to_vec();
        if let Some(first) = echo.first() {
            self.hear_token(*first, None, &[]);
        }
        for Scored { id, logprob, top } in &scores[..scores.len().min(echo.len())] {
            self.hear_token(*id, Some(*logprob), top);
        }
    }

    fn hear_token(&mut self, id: u32, logprob: Option<f32>, top: &[TokenLogProb]) {
        let tokenizer = &self.server.0.tokenizer;
        let text = |id: u32| tokenizer.decode_with_special(&[id]).unwrap_or_default();
        let token = text(id);
        let chars = if tokenizer.is_special_token(&token) { 0 } else { token.chars().count() };
        let top = top.iter().map(|top| (text(top.id), top.logprob)).collect();
        self.ready.push_back(What::Token(TokenInfo { token, chars, logprob, top }));
    }

    fn hear(&mut self, piece: Piece) {
        if self.logprobs
            && let Some(id) = piece.id
        {
            self.hear_token(id, Some(piece.logprob), &piece.top);
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
                    if let ReplyEvent::Malformed { reason, .. } = &other {
                        note!("warning: a reply calls tools in vain: {reason}");
                    }
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
            let next = ready!(Pin::new(&mut self.stream).poll_next(context));
            self.hear_prompt();
            let result = match next {
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

    fn server() -> Server {
        let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
        let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
        let options = EngineOptions { slots: 1, context: 16, ..EngineOptions::default() };
        let engine = Engine::new(&model, &tokenizer, options).unwrap();
        let settings = Settings {
            name: "tales".into(),
            api_key: None,
            context: 16,
            max_tokens: 16,
            body: 1024,
            grace: std::time::Duration::ZERO,
        };
        let template = ChatTemplate::new("").unwrap();
        Server::new(engine, tokenizer, template, Sampling::greedy(), settings)
    }

    /// A choice that hears what the demo model would never say.
    fn told(pieces: &[&str]) -> (Vec<What>, Vec<What>) {
        let server = server();
        let request =
            Request::new(vec![1], GenerateOptions { max_tokens: 1, ..Default::default() });
        let stream = server.0.engine.submit(request).unwrap();
        let mut choice = Choice {
            server,
            index: 0,
            stream,
            parser: Some(ReplyParser::new("", true)),
            logprobs: false,
            echo: Vec::new(),
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

    /// Whatever a client says that it is.
    #[test]
    fn a_priority_is_a_small_number() {
        let server = server();
        for (asked, priority) in [(0, 0), (-3, -3), (5, 4), (i32::MAX, 4), (i32::MIN, -4)] {
            let request = json!({ "prompt": "x", "priority": asked });
            let request = serde_json::from_value(request).unwrap();
            let work = server.completion_work(request).unwrap();
            assert_eq!(work.choices[0].request.priority, priority);
        }
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
