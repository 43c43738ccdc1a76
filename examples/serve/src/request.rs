//! Requests of OpenAI's API, and what the engine is to do for them.

use std::collections::BTreeMap;

use jamba_core::chat::{Chat, End, Message, ReplyParser};
use jamba_core::grammar::Grammar;
use jamba_core::{GenerateOptions, Request, Sampling, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{ApiError, Server};

/// Choices of a request at most, over all its prompts.
const CHOICES: usize = 64;
/// Priorities are from minus to plus this: no client gets ahead of more than 64 requests for each step.
const PRIORITY: i32 = 4;
/// Most probable tokens at most, as OpenAI has it.
const TOP: usize = 20;

/// What both kinds of requests have.
#[derive(Default, Deserialize)]
pub(crate) struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// The next five are extensions, under the names that other servers have them.
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    #[serde(default)]
    ignore_eos: bool,
    #[serde(default)]
    priority: i32,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    n: Option<usize>,
    seed: Option<i64>,
    stop: Option<OneOrMore<String>>,
    #[serde(default)]
    pub(crate) stream: bool,
    stream_options: Option<StreamOptions>,
    response_format: Option<Value>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::More(more) => more,
        }
    }
}

/// `POST /v1/chat/completions`.
#[derive(Deserialize)]
pub(crate) struct ChatRequest {
    messages: Vec<Value>,
    max_completion_tokens: Option<usize>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    documents: Option<Vec<Value>>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    /// Variables of the template, as other servers have it.
    chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(flatten)]
    pub(crate) common: Common,
}

/// `POST /v1/completions`.
#[derive(Deserialize)]
pub(crate) struct CompletionRequest {
    prompt: Option<Prompt>,
    logprobs: Option<usize>,
    #[serde(default)]
    echo: bool,
    suffix: Option<String>,
    best_of: Option<usize>,
    #[serde(flatten)]
    pub(crate) common: Common,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// What is to run: a request of the engine for each choice.
pub(crate) struct Work {
    pub(crate) choices: Vec<Job>,
    /// Choices that have a prompt in common.
    pub(crate) per_prompt: usize,
    /// Whether probabilities are told.
    pub(crate) logprobs: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// One choice.
pub(crate) struct Job {
    pub(crate) request: Request,
    /// Takes replies of chats apart.
    pub(crate) parser: Option<ReplyParser>,
    /// What comes before the reply: a text, and the tokens that are to be told with it.
    pub(crate) echo: (String, Vec<u32>),
}

impl Server {
    /// Whether the model is that of this server; a request that names none means it.
    pub(crate) fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.0.settings.name => Err(ApiError::no_model(name)),
            _ => Ok(()),
        }
    }

    pub(crate) fn chat_work(&self, request: ChatRequest) -> Result<Work, ApiError> {
        let ChatRequest { messages, tools, tool_choice, mut common, .. } = request;
        common.max_tokens = request.max_completion_tokens.or(common.max_tokens);
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "at least one message is needed"));
        }
        let choice = ToolChoice::new(tool_choice.as_ref())?;
        let top = match (request.logprobs.unwrap_or(false), request.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "`logprobs` must be true for it"));
            }
        };
        let messages = messages.into_iter().map(message).collect::<Result<_, ApiError>>()?;
        let chat = Chat {
            messages,
            tools: tools.filter(|_| choice != ToolChoice::None).unwrap_or_default(),
            documents: request.documents.unwrap_or_default(),
            variables: request.chat_template_kwargs.unwrap_or_default(),
        };
        let rendered = self.0.template.render(&chat, End::Reply)?;
        let prompt = rendered.encode(&self.0.tokenizer)?;
        let parser = ReplyParser::new(rendered.text(), !chat.tools.is_empty());
        let tokenizer = &self.0.tokenizer;
        let grammar = match choice.grammar(&chat.tools, rendered.text(), tokenizer)? {
            Some(grammar) => Some(grammar),
            None => format(common.response_format.as_ref(), tokenizer)?,
        };
        // What a model thinks before it answers is free.
        let grammar = match grammar {
            Some(grammar) if parser.is_reasoning() => Some(grammar.after("</think>")?),
            grammar => grammar,
        };
        self.work(common, vec![(prompt, String::new())], Some(parser), top, grammar)
    }

    pub(crate) fn completion_work(&self, request: CompletionRequest) -> Result<Work, ApiError> {
        let CompletionRequest { prompt, logprobs, echo, suffix, best_of, common } = request;
        if suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid("suffix", "there is no insertion of text"));
        }
        if best_of.is_some_and(|best_of| best_of != common.n.unwrap_or(1)) {
            return Err(ApiError::invalid("best_of", "it must be `n`"));
        }
        let tokenizer = &self.0.tokenizer;
        let of_text = |text: String| Ok((tokenizer.encode(&text)?, text));
        let of_ids = |ids: Vec<u32>| {
            let text = tokenizer.decode(&ids)?;
            Ok((ids, text))
        };
        let prompts: Result<Vec<(Vec<u32>, String)>, ApiError> = match prompt {
            None => of_text(String::new()).map(|prompt| vec![prompt]),
            Some(Prompt::Text(text)) => of_text(text).map(|prompt| vec![prompt]),
            Some(Prompt::Ids(ids)) => of_ids(ids).map(|prompt| vec![prompt]),
            Some(Prompt::Texts(texts)) => texts.into_iter().map(of_text).collect(),
            Some(Prompt::IdLists(lists)) => lists.into_iter().map(of_ids).collect(),
        };
        let mut prompts = prompts?;
        if !echo {
            prompts.iter_mut().for_each(|(_, text)| text.clear());
        }
        let grammar = format(common.response_format.as_ref(), tokenizer)?;
        let mut work = self.work(common, prompts, None, logprobs, grammar)?;
        if echo && logprobs.is_some() {
            for Job { request, echo, .. } in &mut work.choices {
                request.options.prompt_logprobs = logprobs;
                echo.1.clone_from(&request.prompt);
            }
        }
        Ok(work)
    }

    fn work(
        &self,
        common: Common,
        prompts: Vec<(Vec<u32>, String)>,
        parser: Option<ReplyParser>,
        logprobs: Option<usize>,
        grammar: Option<Grammar>,
    ) -> Result<Work, ApiError> {
        self.check_model(common.model.as_deref())?;
        let per_prompt = common.n.unwrap_or(1);
        if !(1..=CHOICES).contains(&per_prompt.saturating_mul(prompts.len())) {
            let message = format!("a request has 1 to {CHOICES} choices, all prompts together");
            return Err(ApiError::invalid("n", message));
        }
        if logprobs.is_some_and(|top| top > TOP) {
            return Err(ApiError::invalid("top_logprobs", format!("0 to {TOP} is allowed")));
        }
        let options = self.options(&common, logprobs.unwrap_or(0))?;
        let options = GenerateOptions { grammar, ..options };
        let priority = common.priority.clamp(-PRIORITY, PRIORITY);
        let choice = |(index, (prompt, echo)): (usize, (Vec<u32>, String))| {
            let options = options.clone();
            let parser = parser.clone();
            (0..per_prompt).map(move |of_prompt| {
                let mut options = options.clone();
                let number = (index * per_prompt + of_prompt) as u64;
                options.sampling.seed = options.sampling.seed.wrapping_add(number);
                let request = Request { priority, ..Request::new(prompt.clone(), options) };
                Job { request, parser: parser.clone(), echo: (echo.clone(), Vec::new()) }
            })
        };
        Ok(Work {
            choices: prompts.into_iter().enumerate().flat_map(choice).collect(),
            per_prompt,
            logprobs: logprobs.is_some(),
            stream: common.stream,
            include_usage: common.stream_options.is_some_and(|options| options.include_usage),
        })
    }

    fn options(&self, common: &Common, logprobs: usize) -> Result<GenerateOptions, ApiError> {
        let model = &self.0.sampling;
        let mut logit_bias = Vec::new();
        for (id, bias) in common.logit_bias.iter().flatten() {
            let id = id.parse().map_err(|_| {
                ApiError::invalid("logit_bias", format!("`{id}` is not a token id"))
            })?;
            logit_bias.push((id, *bias));
        }
        let sampling = Sampling {
            logit_bias,
            repetition_penalty: common.repetition_penalty.unwrap_or(model.repetition_penalty),
            presence_penalty: common.presence_penalty.unwrap_or(model.presence_penalty),
            frequency_penalty: common.frequency_penalty.unwrap_or(model.frequency_penalty),
            temperature: common.temperature.unwrap_or(model.temperature),
            // Elsewhere, -1 is off.
            top_k: common.top_k.map_or(model.top_k, |k| usize::try_from(k).unwrap_or(0)),
            top_p: common.top_p.unwrap_or(model.top_p),
            min_p: common.min_p.unwrap_or(model.min_p),
            seed: common.seed.map_or_else(|| self.random(), |seed| seed as u64),
        };
        let most = self.0.settings.max_tokens;
        let stop = common.stop.clone().map(OneOrMore::into_vec).unwrap_or_default();
        if stop.len() > 16 {
            return Err(ApiError::invalid("stop", "at most 16 stop strings"));
        }
        Ok(GenerateOptions {
            sampling,
            max_tokens: common.max_tokens.unwrap_or(most).min(most),
            stop,
            ignore_eos: common.ignore_eos,
            logprobs,
            ..GenerateOptions::default()
        })
    }
}

/// What `response_format` holds a reply to.
fn format(format: Option<&Value>, tokenizer: &Tokenizer) -> Result<Option<Grammar>, ApiError> {
    let invalid = |message: &str| Err(ApiError::invalid("response_format", message));
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::json_object(tokenizer)?)),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => invalid("`json_schema` must have a `schema`"),
            schema => Ok(Some(Grammar::json_schema(tokenizer, schema)?)),
        },
        _ => invalid("`type` must be `text`, `json_object` or `json_schema`"),
    }
}

/// Whether the model calls tools.
#[derive(PartialEq)]
enum ToolChoice {
    None,
    Auto,
    /// It must: this one, or any.
    Must(Option<String>),
}

impl ToolChoice {
    fn new(choice: Option<&Value>) -> Result<Self, ApiError> {
        let Some(choice) = choice.filter(|choice| !choice.is_null()) else { return Ok(Self::Auto) };
        match (choice.as_str(), choice["function"]["name"].as_str()) {
            (Some("auto"), _) => Ok(Self::Auto),
            (Some("none"), _) => Ok(Self::None),
            (Some("required"), _) => Ok(Self::Must(None)),
            (None, Some(name)) => Ok(Self::Must(Some(name.to_owned()))),
            _ => {
                let message = "it must be `none`, `auto`, `required` or name a function";
                Err(ApiError::invalid("tool_choice", message))
            }
        }
    }

    /// Holds a reply to one call, in the tags that the prompt speaks of.
    fn grammar(
        &self,
        tools: &[Value],
        prompt: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Grammar>, ApiError> {
        let Self::Must(wanted) = self else { return Ok(None) };
        let functions = tools.iter().map(|tool| &tool["function"]);
        let functions = functions.filter(|function| {
            wanted.as_deref().is_none_or(|wanted| function["name"].as_str() == Some(wanted))
        });
        let calls: Vec<Value> = functions
            .map(|function| {
                let arguments = function.get("parameters").filter(|schema| !schema.is_null());
                let arguments = arguments.cloned().unwrap_or_else(|| json!({ "type": "object" }));
                json!({
                    "type": "object",
                    "properties": { "name": { "const": function["name"] }, "arguments": arguments },
                    "required": ["name", "arguments"],
                    "additionalProperties": false,
                })
            })
            .collect();
        if calls.is_empty() {
            return Err(ApiError::invalid("tool_choice", "there is no such tool in `tools`"));
        }
        let schema = json!({ "anyOf": calls, "x-guidance": { "whitespace_flexible": false } });
        let is_jamba =
            ["<tool_calls>", "<tool_definitions>"].iter().any(|tag| prompt.contains(tag));
        let [open, before, after, close] = match is_jamba {
            true => ["<tool_calls>", "[", "]", "</tool_calls>"],
            false => ["<tool_call>", "\n", "\n", "</tool_call>"],
        };
        // A tag that is a special token is named, another one is a text.
        let tag = |tag: &str| match tokenizer.is_special_token(tag) {
            true => tag.to_owned(),
            false => Value::from(tag).to_string(),
        };
        let (open, close) = (tag(open), tag(close));
        let (before, after) = (Value::from(before), Value::from(after));
        let lark = format!("start: {open} {before} body {after} {close}\nbody: %json {schema}\n");
        Ok(Some(Grammar::lark(tokenizer, &lark)?))
    }
}

/// A message as templates have it: arguments of calls are objects there, and text in the API.
fn message(mut value: Value) -> Result<Message, ApiError> {
    let calls = value.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        if let Some(Ok(parsed)) = arguments.as_str().map(serde_json::from_str::<Value>)
            && parsed.is_object()
        {
            *arguments = parsed;
        }
    }
    if value.get("tool_calls").is_some_and(Value::is_null)
        && let Some(fields) = value.as_object_mut()
    {
        fields.remove("tool_calls");
    }
    Ok(Message::from_value(value)?)
}
