//! The server over HTTP, on the demo model.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use jamba_core::chat::ChatTemplate;
use jamba_core::{
    Engine, EngineOptions, GenerateOptions, LanguageModel, Model, Sampling, SessionOptions,
    Tokenizer, generate,
};
use jamba_cpu::CpuBackend;
use jamba_examples::demo_model;
use jamba_serve::{Server, Settings};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A server on a free port, until it is ended.
struct Running {
    url: String,
    client: Client,
    engine: Engine,
    end: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

const ENGINE: EngineOptions = EngineOptions {
    slots: 8,
    context: 512,
    step_tokens: 256,
    queue: 256,
    prefix_cache: 64 << 20,
    memory: None,
};

fn settings() -> Settings {
    Settings {
        name: "tales".into(),
        api_key: None,
        context: ENGINE.context,
        max_tokens: 256,
        body: 1 << 20,
        grace: Duration::from_secs(5),
    }
}

async fn start(settings: Settings, options: EngineOptions, template: Option<&str>) -> Running {
    let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let template = match template {
        Some(source) => ChatTemplate::new(source).unwrap(),
        None => ChatTemplate::plain(demo_model()).unwrap(),
    };
    let engine = Engine::new(&model, &tokenizer, options).unwrap();
    let sampling = Sampling::from_folder(demo_model()).unwrap();
    let server = Server::new(engine.clone(), tokenizer, template, sampling, settings);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (end, ended) = oneshot::channel();
    let task = tokio::spawn(server.run(listener, async move { drop(ended.await) }));
    Running { url, client: Client::new(), engine, end: Some(end), task }
}

async fn demo() -> Running {
    start(settings(), ENGINE, None).await
}

impl Running {
    async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let body = reqwest::Body::from(body.to_string());
        let request = self.client.post(format!("{}{path}", self.url)).body(body);
        request.header("content-type", "application/json").send().await.unwrap()
    }

    async fn json(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let value: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{value}");
        value
    }

    #[track_caller]
    fn refused(response: (StatusCode, Value), status: u16, part: &str) {
        let (got, body) = response;
        assert_eq!(got.as_u16(), status, "{body}");
        let error = &body["error"];
        assert!(error["message"].as_str().unwrap().contains(part), "`{part}` is not in {body}");
        assert!(
            error["type"].is_string()
                && error.get("param").is_some()
                && error.get("code").is_some()
        );
    }

    async fn refuse(&self, path: &str, body: &Value, status: u16, part: &str) {
        let response = self.post(path, body).await;
        let got = response.status();
        Self::refused((got, response.json().await.unwrap()), status, part);
    }

    /// The chunks of a streamed answer.
    async fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert!(
            response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream")
        );
        let text = response.text().await.unwrap();
        let data: Vec<&str> =
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.last(), Some(&"[DONE]"), "{text}");
        data[..data.len() - 1].iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    async fn get(&self, path: &str) -> String {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.text().await.unwrap()
    }

    async fn end(mut self) {
        self.end.take().unwrap().send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }

    /// Waits until so many requests are counted as ended, which is a step after they end.
    async fn ended(&self, requests: u64) {
        for _ in 0..500 {
            let stats = self.engine.stats();
            if stats.finished + stats.cancelled + stats.failed >= requests {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not ended: {:?}", self.engine.stats());
    }

    /// Waits until the engine runs nothing.
    async fn idle(&self) {
        for _ in 0..500 {
            let stats = self.engine.stats();
            if stats.running + stats.waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the engine still runs: {:?}", self.engine.stats());
    }
}

/// What a prompt gives without engine and server.
fn alone(prompts: &[(String, u64)], max_tokens: usize) -> Vec<String> {
    let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let run = |(prompt, seed): &(String, u64)| {
        let options = SessionOptions { context: ENGINE.context, ..SessionOptions::default() };
        let mut session = model.session(options).unwrap();
        let sampling = Sampling { seed: *seed, ..Sampling::from_folder(demo_model()).unwrap() };
        let options = GenerateOptions { sampling, max_tokens, ..GenerateOptions::default() };
        generate(&mut session, &tokenizer, prompt, options).unwrap().text
    };
    prompts.iter().map(run).collect()
}

fn chat(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "seed": 1 })
}

fn with(mut body: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_are_what_each_is_alone() {
    let server = demo().await;
    let animals = ["fox", "bear", "owl", "king", "little girl", "giant", "mouse", "wolf"];
    let prompts: Vec<(String, u64)> = (0..64)
        .map(|i| (format!("Once upon a time there was a {}", animals[i % 8]), i as u64))
        .collect();
    let expected = alone(&prompts, 24);
    let streams = prompts.iter().map(|(prompt, seed)| {
        let body = json!({
            "messages": [{ "role": "user", "content": prompt }],
            "max_completion_tokens": 24, "seed": seed, "stream": true,
        });
        let server = &server;
        async move {
            let chunks = server.chunks(CHAT, &body).await;
            let contents =
                chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
            contents.collect::<String>()
        }
    });
    let got = join_all(streams).await;
    assert_eq!(got, expected);
    server.ended(64).await;
    let stats = server.engine.stats();
    assert_eq!((stats.finished, stats.cancelled, stats.failed), (64, 0, 0));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_whole_and_streamed_are_the_same() {
    let server = demo().await;
    let body =
        with(chat("Once upon a time"), json!({ "n": 2, "logprobs": true, "top_logprobs": 2 }));
    let whole = server.json(CHAT, &body).await;
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "tales");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(whole["usage"]["prompt_tokens"], 5);
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    assert_eq!(whole["usage"]["total_tokens"], 21);
    let [a, b] = &whole["choices"].as_array().unwrap()[..] else { panic!("{whole}") };
    assert_ne!(a["message"]["content"], b["message"]["content"]);
    assert_eq!(
        (&a["finish_reason"], &a["message"]["role"]),
        (&json!("length"), &json!("assistant"))
    );
    let tokens = a["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert!(top[0]["logprob"].as_f64().unwrap() >= top[1]["logprob"].as_f64().unwrap());
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
    }

    let stream = with(body, json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let chunks = server.chunks(CHAT, &stream).await;
    for index in 0..2 {
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let of_choice: Vec<&Value> = chunks.iter().filter(of_choice).collect();
        let text: String = of_choice
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, whole["choices"][index]["message"]["content"]);
        assert_eq!(of_choice[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(of_choice.last().unwrap()["choices"][0]["finish_reason"], "length");
        let told = of_choice
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
        let told: Vec<&Value> = told.flatten().collect();
        assert_eq!(
            told,
            whole["choices"][index]["logprobs"]["content"]
                .as_array()
                .unwrap()
                .iter()
                .collect::<Vec<_>>()
        );
    }
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(16)));
    assert!(
        last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0,
        "{last}"
    );
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_of_texts_and_ids() {
    let server = demo().await;
    let greedy = json!({ "prompt": "The little dog", "max_tokens": 5, "temperature": 0 });
    let said = " was so frightened that he";
    let answer = server.json(TEXT, &greedy).await;
    assert_eq!(
        (&answer["object"], &answer["choices"][0]["text"]),
        (&json!("text_completion"), &json!(said))
    );
    let ids = with(greedy.clone(), json!({ "prompt": [1, 344, 425, 1175], "logprobs": 1 }));
    let answer = server.json(TEXT, &ids).await;
    assert_eq!(answer["choices"][0]["text"], said);
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(logprobs["text_offset"][0], 0);
    let several = with(
        greedy.clone(),
        json!({ "prompt": ["The little dog", "Once upon a time"], "n": 2, "echo": true }),
    );
    let answer = server.json(TEXT, &several).await;
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 4);
    assert_eq!(texts[0], format!("The little dog{said}"));
    assert!(
        texts[0] == texts[1] && texts[2] == texts[3] && texts[2].starts_with("Once upon a time")
    );
    // A prompt counts once, however many choices it has.
    assert_eq!(answer["usage"]["prompt_tokens"], 4 + 5);
    let stopped = with(greedy, json!({ "stop": [" that"], "stream": true }));
    let chunks = server.chunks(TEXT, &stopped).await;
    let text: String =
        chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, " was so frightened");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    server.end().await;
}

/// The demo model calls no tools (what is heard of calls: `reply.rs`): the template tells what it got.
#[tokio::test(flavor = "multi_thread")]
async fn tools_and_messages_reach_the_template() {
    let template = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.town }}{% endif %}\
        {% if m.role == 'bad' %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}\
        {% if tools %}{{ tools[0].function.name }}{% endif %}{{ enable_thinking }}";
    let server = start(settings(), ENGINE, Some(template)).await;
    let call = json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"town\": \"Ulm\"}" } });
    let body = json!({
        "messages": [{ "role": "assistant", "content": null, "tool_calls": [call] }],
        "tools": [{ "type": "function", "function": { "name": "weather" } }],
        "chat_template_kwargs": { "enable_thinking": false },
        "max_tokens": 1,
    });
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let tokens = |text: &str| tokenizer.encode_plain(text).unwrap().len();
    let answer = server.json(CHAT, &body).await;
    assert_eq!(answer["usage"]["prompt_tokens"], tokens("UlmweatherFalse"));
    let none = server.json(CHAT, &with(body.clone(), json!({ "tool_choice": "none" }))).await;
    assert_eq!(none["usage"]["prompt_tokens"], tokens("UlmFalse"));
    let named = json!({ "type": "function", "function": { "name": "forecast" } });
    for (choice, part) in [(json!("sometimes"), "required"), (named, "no such tool")] {
        let bad = with(body.clone(), json!({ "tool_choice": choice }));
        server.refuse(CHAT, &bad, 400, part).await;
    }
    let bad = with(body, json!({ "messages": [{ "role": "bad" }] }));
    server.refuse(CHAT, &bad, 400, "no bad").await;
    server.end().await;
}

/// The demo model has never seen JSON, nor a tool.
#[tokio::test(flavor = "multi_thread")]
async fn replies_are_held_to_a_format_and_to_tools() {
    let server = demo().await;
    let schema = json!({
        "type": "object",
        "properties": {
            "animal": { "enum": ["fox", "owl"] },
            "age": { "type": "integer", "minimum": 1, "maximum": 99 },
        },
        "required": ["animal", "age"],
        "additionalProperties": false,
    });
    let is_valid = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        assert!(["fox", "owl"].contains(&value["animal"].as_str().unwrap()), "{text}");
        assert!((1..100).contains(&value["age"].as_i64().unwrap()), "{text}");
        assert_eq!(value.as_object().unwrap().len(), 2, "{text}");
    };
    let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
    let hot = json!({ "temperature": 3, "n": 4, "seed": 1 });
    for heat in [json!({ "temperature": 0 }), hot] {
        let body = with(with(chat("A hero."), heat), json!({ "response_format": format }));
        let answer = server.json(CHAT, &with(body.clone(), json!({ "max_tokens": 256 }))).await;
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{answer}");
            is_valid(choice["message"]["content"].as_str().unwrap());
        }
        let cut = server.json(CHAT, &with(body, json!({ "max_tokens": 1 }))).await;
        assert_eq!(cut["choices"][0]["finish_reason"], "length");
    }
    let any = json!({ "response_format": { "type": "json_object" }, "max_tokens": 8 });
    let answer = server.json(CHAT, &with(chat("A hero."), any)).await;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text}");

    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": schema } });
    let tools = json!([tool("tame"), tool("feed")]);
    let named = json!({ "type": "function", "function": { "name": "feed" } });
    for (choice, names) in [(json!("required"), &["tame", "feed"][..]), (named, &["feed"][..])] {
        let fields = json!({ "tools": tools, "tool_choice": choice, "max_tokens": 256 });
        let body = with(with(chat("A hero."), json!({ "temperature": 2, "seed": 3 })), fields);
        let answer = server.json(CHAT, &body).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
        let calls = &answer["choices"][0]["message"]["tool_calls"];
        assert_eq!(calls.as_array().unwrap().len(), 1);
        assert!(names.contains(&calls[0]["function"]["name"].as_str().unwrap()), "{calls}");
        is_valid(calls[0]["function"]["arguments"].as_str().unwrap());
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_in_openais_shape() {
    let server = demo().await;
    let ok = chat("x");
    for (fields, part) in [
        (json!({ "messages": [] }), "message"),
        (json!({ "messages": "x" }), "messages"),
        (json!({ "messages": [{ "content": "x" }] }), "role"),
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "top_p": 2 }), "top_p"),
        (json!({ "n": 0 }), "choices"),
        (json!({ "n": 1000 }), "choices"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "99999": 1 } }), "vocab"),
        (json!({ "top_logprobs": 3 }), "logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "20"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "response_format": { "type": "yaml" } }), "json_schema"),
        (json!({ "response_format": { "type": "json_schema" } }), "schema"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": {
                "name": "x", "schema": { "type": "fish" } } } }),
            "fish",
        ),
        (json!({ "messages": [{ "role": "user", "content": "word ".repeat(600) }] }), "context"),
    ] {
        let part = if part == "logit_bias" { "token id" } else { part };
        server.refuse(CHAT, &with(ok.clone(), fields), 400, part).await;
    }
    server.refuse(CHAT, &with(ok.clone(), json!({ "model": "gpt" })), 404, "gpt").await;
    server.refuse("/v1/nothing", &ok, 404, "path").await;
    server.refuse("/health", &ok, 405, "method").await;
    server.refuse(TEXT, &json!({ "prompt": [99999] }), 400, "99999").await;
    server.refuse(TEXT, &json!({ "prompt": "x", "suffix": "y" }), 400, "insertion").await;
    server
        .refuse(CHAT, &with(ok, json!({ "user": "x".repeat(2 << 20) })), 413, "length limit")
        .await;
    let response =
        server.client.post(format!("{}{CHAT}", server.url)).body("{}").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    assert!(response.json::<Value>().await.unwrap()["error"]["message"].is_string());
    let request =
        server.client.get(format!("{}/health", server.url)).header("host", "evil.example");
    assert_eq!(request.send().await.unwrap().status(), StatusCode::FORBIDDEN);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_asked_for() {
    let keyed = Settings { api_key: Some("secret".into()), ..settings() };
    let server = start(keyed, ENGINE, None).await;
    for path in ["/v1/models", "/metrics"] {
        let url = format!("{}{path}", server.url);
        for given in [
            None,
            Some("Bearer wrong!"),
            Some("Bearer secre"),
            Some("secret"),
            Some("Bearer secret2"),
        ] {
            let mut request = server.client.get(&url);
            if let Some(given) = given {
                request = request.header("authorization", given);
            }
            let response = request.send().await.unwrap();
            assert!(response.headers().contains_key("www-authenticate"));
            Running::refused((response.status(), response.json().await.unwrap()), 401, "API key");
        }
        let response = server.client.get(&url).bearer_auth("secret").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    }
    assert!(server.get("/health").await.contains("ok"));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    let options = EngineOptions { slots: 1, queue: 1, ..ENGINE };
    let server = start(settings(), options, None).await;
    let long = with(
        chat("Once upon a time"),
        json!({ "max_tokens": 250, "stream": true, "ignore_eos": true }),
    );
    let first = server.post(CHAT, &long).await;
    let mut seen = Vec::new();
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let response = server.post(CHAT, &long).await;
        seen.push(response.status().as_u16());
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            assert_eq!(response.headers()["retry-after"], "1");
            Running::refused((response.status(), response.json().await.unwrap()), 429, "queue");
        } else {
            waiting.push(response);
        }
    }
    assert!(seen.contains(&429), "{seen:?}");
    drop((first, waiting));
    server.idle().await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_goes_away_is_not_generated_for() {
    let server = demo().await;
    let long = with(
        chat("Once upon a time"),
        json!({ "max_tokens": 250, "stream": true, "ignore_eos": true, "n": 4 }),
    );
    let response = server.post(CHAT, &long).await;
    let mut bytes = response.bytes_stream();
    assert!(bytes.next().await.unwrap().is_ok());
    drop(bytes);
    server.ended(4).await;
    let stats = server.engine.stats();
    assert_eq!(stats.cancelled, 4, "{stats:?}");
    assert!(stats.generated_tokens < 4 * 250, "{stats:?}");

    // The same of one that waits for the whole.
    let body = with(long, json!({ "stream": false }));
    let waited = tokio::time::timeout(Duration::from_millis(100), server.post(CHAT, &body)).await;
    assert!(waited.is_err());
    server.ended(8).await;
    assert_eq!(server.engine.stats().cancelled, 8);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_lets_streams_end_or_ends_them() {
    let server = demo().await;
    let body = with(
        chat("Once upon a time"),
        json!({ "max_tokens": 40, "stream": true, "ignore_eos": true }),
    );
    let response = server.post(CHAT, &body).await;
    let ended = tokio::spawn(server.end());
    let text = response.text().await.unwrap();
    assert!(
        text.contains("\"finish_reason\":\"length\"") && text.ends_with("[DONE]\n\n"),
        "{text}"
    );
    ended.await.unwrap();

    let hasty = Settings { grace: Duration::from_millis(50), ..settings() };
    let options = EngineOptions { context: 4096, slots: 1, ..ENGINE };
    let server = start(Settings { max_tokens: 4000, ..hasty }, options, None).await;
    let endless = with(body, json!({ "max_tokens": 4000 }));
    let response = server.post(CHAT, &endless).await;
    let ended = tokio::spawn(server.end());
    let text = response.text().await.unwrap();
    assert!(text.contains("shut down") && text.ends_with("[DONE]\n\n"), "{text}");
    ended.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_is_and_does_is_told() {
    let server = demo().await;
    let models: Value = serde_json::from_str(&server.get("/v1/models").await).unwrap();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tales")));
    assert!(server.get("/v1/models/tales").await.contains("max_model_len"));
    let page = server.get("/").await;
    assert!(page.contains("<!doctype html>"));
    for outside in ["http://", "https://", "//cdn", "@import", "src=\""] {
        assert!(!page.contains(outside), "{outside}");
    }
    server.json(CHAT, &chat("Once upon a time")).await;
    server.ended(1).await;
    let metrics = server.get("/metrics").await;
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {metrics}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert_metrics(&metrics);
    assert_eq!(value("jamba_generated_tokens_total"), 8.0);
    assert_eq!(value("jamba_prefix_hits_total"), 0.0);
    assert_eq!(value("jamba_prompt_tokens_total"), 5.0);
    assert_eq!(value("jamba_first_token_seconds_count"), 1.0);
    assert!(value("jamba_first_token_seconds_sum") > 0.0);
    assert!(value("jamba_http_responses_total{class=\"2xx\"}") >= 4.0);
    server.json(CHAT, &chat("Once upon a time")).await;
    let metrics = server.get("/metrics").await;
    assert!(metrics.contains("\njamba_prefix_hits_total 1\n"), "{metrics}");
    assert!(metrics.contains("\njamba_prefix_tokens_total 5\n"), "{metrics}");
    server.engine.shutdown();
    let url = format!("{}/health", server.url);
    let response = server.client.get(url).send().await.unwrap();
    Running::refused((response.status(), response.json().await.unwrap()), 503, "stopped");
    server.end().await;
}

/// Every line is one of Prometheus' text format, and every sample is of the metric before it.
fn assert_metrics(text: &str) {
    let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let mut metric = "";
    let mut described = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["#", "HELP", name, first, ..] => {
                assert!(is_name(name) && !first.is_empty(), "{line}");
                (metric, described) = (name, described + 1);
            }
            ["#", "TYPE", name, kind] => {
                assert!(name == metric, "{line}");
                assert!(["counter", "gauge", "summary"].contains(&kind), "{line}");
            }
            [sample, value] => {
                let (name, labels) = sample.split_once('{').unwrap_or((sample, "a=\"\"}"));
                let part = name.strip_prefix(metric).unwrap_or_else(|| panic!("{line}"));
                assert!(["", "_sum", "_count"].contains(&part) && value.parse::<f64>().is_ok());
                let label = labels.strip_suffix("\"}").and_then(|label| label.split_once("=\""));
                assert!(label.is_some_and(|(name, _)| is_name(name)), "{line}");
            }
            _ => panic!("{line}"),
        }
    }
    assert!(described > 15 && text.ends_with('\n'), "{text}");
}

/// OpenAI's way to have a text scored: nothing is generated.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_scored() {
    let server = demo().await;
    let text = "The little dog was so frightened";
    let body = json!({ "prompt": text, "echo": true, "logprobs": 2, "max_tokens": 0 });
    let answer = server.json(TEXT, &body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &answer["usage"]["completion_tokens"]), (&json!(text), &json!(0)));
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
    let ids = tokenizer.encode(text).unwrap();
    let options = SessionOptions { context: 64, outputs: 64, ..SessionOptions::default() };
    let scores = model.session(options).unwrap().score(&ids[..1], &ids[1..], 2).unwrap();
    let logprobs = &choice["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), ids.len(), "{name}");
    }
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
    for (i, scored) in scores.iter().enumerate() {
        let told = list("token_logprobs")[i + 1].as_f64().unwrap();
        assert!((told - f64::from(scored.logprob)).abs() < 1e-6, "{told} {scored:?}");
        assert_eq!(list("top_logprobs")[i + 1].as_object().unwrap().len(), 2);
        let (token, offset) = (&list("tokens")[i + 1], &list("text_offset")[i + 1]);
        let at = &text[offset.as_u64().unwrap() as usize..];
        assert!(at.starts_with(token.as_str().unwrap()), "{token} is not at {offset}");
    }
    // And what is generated comes after it, whole and streamed.
    let body = with(body, json!({ "max_tokens": 3, "temperature": 0, "n": 2 }));
    let whole = server.json(TEXT, &body).await;
    let chunks = server.chunks(TEXT, &with(body, json!({ "stream": true }))).await;
    for index in 0..2 {
        let logprobs = &whole["choices"][index]["logprobs"];
        for name in ["tokens", "token_logprobs", "text_offset"] {
            let parts = chunks.iter().map(|chunk| &chunk["choices"][0]);
            let parts = parts.filter(|part| part["index"] == index);
            let parts = parts.filter_map(|part| part["logprobs"][name].as_array());
            assert_eq!(json!(parts.flatten().collect::<Vec<_>>()), logprobs[name]);
            assert_eq!(logprobs[name].as_array().unwrap().len(), ids.len() + 3);
        }
        let spoken = logprobs["tokens"].as_array().unwrap().iter().skip(1);
        let spoken: String = spoken.map(|token| token.as_str().unwrap()).collect();
        assert_eq!(spoken, whole["choices"][index]["text"]);
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_more_than_there_is() {
    // Tokens of a reply.
    let server = start(Settings { max_tokens: 6, ..settings() }, ENGINE, None).await;
    let long = with(chat("Once upon a time"), json!({ "max_tokens": 200, "ignore_eos": true }));
    let answer = server.json(CHAT, &long).await;
    assert_eq!(answer["usage"]["completion_tokens"], 6);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let bytes = server.engine.bytes(8, 6);
    server.end().await;

    // Memory of the states.
    let options = EngineOptions { memory: Some(bytes), ..ENGINE };
    let server = start(Settings { max_tokens: 6, ..settings() }, options, None).await;
    server.json(CHAT, &long).await;
    let longer = "Once upon a time there was a fox who had a hen for a friend.";
    let longer = with(chat(longer), json!({ "max_tokens": 6 }));
    server.refuse(CHAT, &longer, 400, "bytes").await;
    server.end().await;
}
