//! Answers of OpenAI's API: whole, or as server-sent events.

use std::convert::Infallible;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use jamba_core::chat::ToolCall;
use serde_json::{Value, json};

use crate::reply::{Heading, Part, Replies, TokenInfo, Usage, What};
use crate::request::{ChatRequest, CompletionRequest, Work};
use crate::{ApiError, Server};

/// The two kinds of answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Completion,
}

pub(crate) async fn chat(
    State(server): State<Server>,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    answer(server, Kind::Chat, move |server| server.chat_work(request)).await
}

pub(crate) async fn completions(
    State(server): State<Server>,
    body: Result<Json<CompletionRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let answer = answer(server, Kind::Completion, move |server| server.completion_work(request));
    answer.await.map_err(ApiError::of_completion)
}

async fn answer(
    server: Server,
    kind: Kind,
    work: impl FnOnce(&Server) -> Result<Work, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let id = format!(
        "{}-{:016x}",
        if kind == Kind::Chat { "chatcmpl" } else { "cmpl" },
        server.random()
    );
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let heading = Heading {
        id: id.into(),
        model: server.0.settings.name.as_str().into(),
        created: created.map_or(0, |age| age.as_secs()),
    };
    // Rendering and encoding a long conversation would hold up the other tasks.
    let worker = server.clone();
    let prepared = tokio::task::spawn_blocking(move || {
        let mut work = work(&worker)?;
        let replies = worker.start(&mut work)?;
        Ok::<_, ApiError>((work, replies))
    });
    let (work, replies) = prepared.await.map_err(|_| ApiError::ending())??;
    if work.stream {
        Ok(events(kind, heading, &work, replies))
    } else {
        whole(kind, &heading, &work, replies).await
    }
}

/// What a choice has come to.
#[derive(Default)]
struct Whole {
    text: String,
    reasoning: String,
    calls: Vec<Value>,
    tokens: Vec<TokenInfo>,
    reason: &'static str,
}

async fn whole(
    kind: Kind,
    heading: &Heading,
    work: &Work,
    mut replies: Replies,
) -> Result<Response, ApiError> {
    let mut choices: Vec<Whole> = work.choices.iter().map(|_| Whole::default()).collect();
    let mut usage = Usage::default();
    while let Some(part) = replies.next().await {
        let Part { index, what } = part?;
        let choice = &mut choices[index];
        match what {
            What::Text(text) => choice.text.push_str(&text),
            What::Reasoning(text) => choice.reasoning.push_str(&text),
            What::Call(number, call) => {
                choice.calls.push(call_value(heading, index, number, &call));
            }
            What::Token(token) => choice.tokens.push(token),
            What::End(reason, used) => {
                choice.reason = reason;
                usage.add(index, work.per_prompt, &used);
            }
        }
    }
    let choices = choices.into_iter().enumerate().map(|(index, choice)| {
        let Whole { text, reasoning, calls, tokens, reason } = choice;
        let mut value = json!({ "index": index, "finish_reason": reason, "logprobs": null });
        if work.logprobs {
            value["logprobs"] = logprobs(kind, &tokens, 0);
        }
        if kind == Kind::Completion {
            value["text"] = text.into();
            return value;
        }
        let mut message = json!({ "role": "assistant", "content": text, "refusal": null });
        if !reasoning.is_empty() {
            message["reasoning_content"] = reasoning.into();
        }
        if !calls.is_empty() {
            message["content"] = if text.is_empty() { Value::Null } else { text.into() };
            message["tool_calls"] = calls.into();
        }
        value["message"] = message;
        value
    });
    let mut body = frame(kind, heading, false);
    body["choices"] = choices.collect();
    body["usage"] = usage.to_value();
    Ok(Json(body).into_response())
}

fn events(kind: Kind, heading: Heading, work: &Work, replies: Replies) -> Response {
    let (per_prompt, include_usage) = (work.per_prompt, work.include_usage);
    let choices = work.choices.len();
    let first = (0..choices).filter(move |_| kind == Kind::Chat).map({
        let heading = heading.clone();
        move |index| {
            let delta = json!({ "role": "assistant", "content": "" });
            chunk(kind, &heading, json!({ "index": index, "delta": delta, "finish_reason": null }))
        }
    });
    let mut usage = Usage::default();
    // Characters told so far of each choice, which completions count from.
    let mut offsets = vec![0; choices];
    let mut failed = false;
    let ending = heading.clone();
    let parts = replies.map(Some).chain(stream::iter([None])).flat_map(move |part| {
        let told = match part {
            _ if failed => Vec::new(),
            Some(Ok(Part { index, what })) => {
                if let What::End(_, used) = &what {
                    usage.add(index, per_prompt, used);
                }
                vec![chunk(kind, &heading, delta(kind, &heading, index, what, &mut offsets[index]))]
            }
            Some(Err(error)) => {
                failed = true;
                vec![error.body()]
            }
            None if include_usage => {
                let mut last = frame(kind, &ending, true);
                last["choices"] = json!([]);
                last["usage"] = usage.to_value();
                vec![last]
            }
            None => Vec::new(),
        };
        stream::iter(told)
    });
    let sent =
        stream::iter(first).chain(parts).map(|value| Event::default().data(value.to_string()));
    let sent = sent.chain(stream::iter([Event::default().data("[DONE]")]));
    Sse::new(sent.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}

/// A choice of a chunk.
fn delta(kind: Kind, heading: &Heading, index: usize, what: What, offset: &mut usize) -> Value {
    let mut choice = json!({ "index": index, "finish_reason": null, "logprobs": null });
    let mut delta = json!({});
    match what {
        What::Text(text) if kind == Kind::Completion => choice["text"] = text.into(),
        What::Text(text) => delta["content"] = text.into(),
        What::Reasoning(text) => delta["reasoning_content"] = text.into(),
        What::Call(number, call) => {
            let mut call = call_value(heading, index, number, &call);
            call["index"] = number.into();
            delta["tool_calls"] = json!([call]);
        }
        What::Token(token) => {
            choice["logprobs"] = logprobs(kind, std::slice::from_ref(&token), *offset);
            *offset += token.chars;
        }
        What::End(reason, _) => choice["finish_reason"] = reason.into(),
    }
    match kind {
        Kind::Chat => choice["delta"] = delta,
        Kind::Completion if choice.get("text").is_none() => choice["text"] = "".into(),
        Kind::Completion => {}
    }
    choice
}

fn call_value(heading: &Heading, index: usize, number: usize, call: &ToolCall) -> Value {
    // Nine characters, as some templates demand, and others everywhere.
    let id = heading.id.rsplit('-').next().unwrap_or_default();
    let id = format!("{}{:01x}{:02x}", &id[id.len() - 6..], index % 16, number % 256);
    let arguments = Value::Object(call.arguments.clone()).to_string();
    json!({ "id": id, "type": "function", "function": { "name": call.name, "arguments": arguments } })
}

fn logprobs(kind: Kind, tokens: &[TokenInfo], offset: usize) -> Value {
    if kind == Kind::Chat {
        let content: Vec<Value> = tokens.iter().map(TokenInfo::to_value).collect();
        return json!({ "content": content, "refusal": null });
    }
    let top = |token: &TokenInfo| {
        token.logprob?;
        let top = token.top.iter().map(|(text, logprob)| (text.clone(), json!(logprob)));
        Some(Value::Object(top.collect()))
    };
    let mut at = offset;
    let offsets = tokens.iter().map(|token| {
        let offset = at;
        at += token.chars;
        offset
    });
    json!({
        "text_offset": offsets.collect::<Vec<_>>(),
        "tokens": tokens.iter().map(|token| &token.token).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
    })
}

/// A chunk with one choice.
fn chunk(kind: Kind, heading: &Heading, choice: Value) -> Value {
    let mut chunk = frame(kind, heading, true);
    chunk["choices"] = json!([choice]);
    chunk
}

fn frame(kind: Kind, heading: &Heading, is_chunk: bool) -> Value {
    let object = match (kind, is_chunk) {
        (Kind::Chat, false) => "chat.completion",
        (Kind::Chat, true) => "chat.completion.chunk",
        (Kind::Completion, _) => "text_completion",
    };
    let Heading { id, model, created } = heading;
    json!({ "id": &**id, "object": object, "created": created, "model": &**model })
}
