//! A server on the demo model, and a client of it.

use std::time::Duration;

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
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) client: Client,
    pub(crate) engine: Engine,
    pub(crate) end: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<std::io::Result<()>>,
}

pub(crate) const ENGINE: EngineOptions = EngineOptions {
    slots: 8,
    context: 512,
    step_tokens: 256,
    queue: 256,
    prefix_cache: 64 << 20,
    memory: None,
};

pub(crate) fn settings() -> Settings {
    Settings {
        name: "tales".into(),
        api_key: None,
        context: ENGINE.context,
        max_tokens: 256,
        body: 1 << 20,
        grace: Duration::from_secs(5),
    }
}

pub(crate) async fn start(
    settings: Settings,
    options: EngineOptions,
    template: Option<&str>,
) -> Running {
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

pub(crate) async fn demo() -> Running {
    start(settings(), ENGINE, None).await
}

impl Running {
    pub(crate) async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let body = reqwest::Body::from(body.to_string());
        let request = self.client.post(format!("{}{path}", self.url)).body(body);
        request.header("content-type", "application/json").send().await.unwrap()
    }

    pub(crate) async fn json(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let value: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{value}");
        value
    }

    #[track_caller]
    pub(crate) fn refused(response: (StatusCode, Value), status: u16, part: &str) {
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

    pub(crate) async fn refuse(&self, path: &str, body: &Value, status: u16, part: &str) {
        let response = self.post(path, body).await;
        let got = response.status();
        Self::refused((got, response.json().await.unwrap()), status, part);
    }

    /// The chunks of a streamed answer.
    pub(crate) async fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
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

    pub(crate) async fn get(&self, path: &str) -> String {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.text().await.unwrap()
    }

    pub(crate) async fn end(mut self) {
        self.end.take().unwrap().send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }

    /// Waits until so many requests are counted as ended, which is a step after they end.
    pub(crate) async fn ended(&self, requests: u64) {
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
    pub(crate) async fn idle(&self) {
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
pub(crate) fn alone(prompts: &[(String, u64)], max_tokens: usize) -> Vec<String> {
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

pub(crate) fn chat(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 8, "seed": 1 })
}

pub(crate) fn with(mut body: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const TEXT: &str = "/v1/completions";
