//! A server with OpenAI's API on an [`Engine`].
//!
//! A request goes one way: `request` reads it, `Server::start` submits it, `reply` turns the
//! engine's streams into parts of the answer, `answer` sends them at once or as they come.

// Requests are what anybody sends: errors are values, as in the libraries.
#![cfg_attr(
    not(test),
    deny(
        clippy::dbg_macro,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stderr,
        clippy::print_stdout,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use jamba_core::chat::ChatTemplate;
use jamba_core::{CancelToken, Engine, Error, Sampling, Tokenizer};
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;

mod answer;
mod error;
mod metrics;
mod reply;
mod request;

pub use error::ApiError;

/// What a server allows.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What requests call the model.
    pub name: String,
    /// Key that requests must have; none, or an empty one: no key.
    pub api_key: Option<String>,
    /// Tokens of a request at most, as the engine has it.
    pub context: usize,
    /// Tokens of a reply at most.
    pub max_tokens: usize,
    /// Bytes of a body at most.
    pub body: usize,
    /// How long running requests may go on after the end was asked for.
    pub grace: Duration,
}

/// An engine behind HTTP. A clone is the same server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    sampling: Sampling,
    settings: Settings,
    /// Seconds since 1970 at which it was made.
    created: u64,
    requests: AtomicU64,
    counts: metrics::Counts,
    /// What runs, by number: to be cancelled where it does not end in time.
    running: Mutex<HashMap<u64, CancelToken>>,
    /// Only requests that name this machine are answered: a page of another site whose name was
    /// made to lead here is none of them.
    local_only: std::sync::OnceLock<bool>,
}

/// A request that runs, until it is dropped.
struct Running {
    server: Server,
    number: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.running().remove(&self.number);
    }
}

impl Server {
    /// A server that runs requests on `engine`, with `sampling` where they do not say otherwise.
    pub fn new(
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        mut settings: Settings,
    ) -> Self {
        settings.api_key.take_if(|key| key.is_empty());
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self(Arc::new(Inner {
            template: template.with_guard(&tokenizer),
            engine,
            tokenizer,
            sampling,
            settings,
            created: created.map_or(0, |age| age.as_secs()),
            requests: AtomicU64::new(0),
            counts: metrics::Counts::default(),
            running: Mutex::default(),
            local_only: std::sync::OnceLock::new(),
        }))
    }

    /// Whether anybody who reaches it can use it: there is no key.
    pub fn is_open(&self) -> bool {
        self.0.settings.api_key.is_none()
    }

    /// Answers requests until `end` is ready, then ends those that run within the
    /// [grace](Settings::grace), and the engine.
    ///
    /// # Errors
    /// What the system says of the listener.
    pub async fn run(
        self,
        listener: TcpListener,
        end: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        // Another site's page does not know the key.
        let local_only = listener.local_addr()?.ip().is_loopback() && self.is_open();
        let _ = self.0.local_only.set(local_only);
        let (ended, mut has_ended) = tokio::sync::watch::channel(false);
        let app = self.router();
        let serving = axum::serve(listener, app).with_graceful_shutdown(async move {
            end.await;
            let _ = ended.send(true);
        });
        let cancelling = async {
            // The sender is dropped only when serving is over.
            if has_ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(self.0.settings.grace).await;
            self.running().values().for_each(CancelToken::cancel);
            // Time to send what was cancelled; a client that reads nothing is not waited for.
            tokio::time::sleep(Duration::from_secs(2)).await;
        };
        tokio::select! {
            served = std::future::IntoFuture::into_future(serving) => served?,
            () = cancelling => {}
        }
        let engine = self.0.engine.clone();
        let _ = tokio::task::spawn_blocking(move || engine.shutdown()).await;
        Ok(())
    }

    /// What [`run`](Self::run) serves, for a program that listens by itself. There, requests from
    /// any host are answered.
    pub fn router(&self) -> Router {
        let open = Router::new()
            .route("/", get(|| async { Html(include_str!("page.html")) }))
            .route("/health", get(health));
        let keyed = Router::new()
            .route("/metrics", get(metrics::metrics))
            .route("/v1/models", get(models))
            .route("/v1/models/{name}", get(model))
            .route("/v1/chat/completions", post(answer::chat))
            .route("/v1/completions", post(answer::completions))
            .route_layer(middleware::from_fn_with_state(self.clone(), check_key));
        open.merge(keyed)
            .fallback(|| async { ApiError::not_found("there is no such path") })
            .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
            .layer(DefaultBodyLimit::max(self.0.settings.body))
            .layer(middleware::from_fn_with_state(self.clone(), check_host))
            .layer(middleware::from_fn_with_state(self.clone(), count))
            .with_state(self.clone())
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u64, CancelToken>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a new request can be cancelled by.
    fn register(&self, cancel: CancelToken) -> Running {
        let number = self.0.requests.fetch_add(1, Ordering::Relaxed);
        self.running().insert(number, cancel);
        Running { server: self.clone(), number }
    }

    /// A number that is another for every request, in this process and the next.
    fn random(&self) -> u64 {
        RandomState::new().hash_one(self.0.requests.fetch_add(1, Ordering::Relaxed))
    }

    fn model(&self) -> serde_json::Value {
        let Settings { name, context, .. } = &self.0.settings;
        json!({
            "id": name,
            "object": "model",
            "created": self.0.created,
            "owned_by": "jamba-serve",
            "max_model_len": context,
        })
    }
}

async fn health(State(server): State<Server>) -> Result<Response, ApiError> {
    if !server.0.engine.is_running() {
        return Err(Error::EngineStopped.into());
    }
    Ok(axum::Json(json!({ "status": "ok" })).into_response())
}

async fn models(State(server): State<Server>) -> Response {
    axum::Json(json!({ "object": "list", "data": [server.model()] })).into_response()
}

async fn model(
    State(server): State<Server>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Response, ApiError> {
    server.check_model(Some(&name))?;
    Ok(axum::Json(server.model()).into_response())
}

async fn count(State(server): State<Server>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    server.0.counts.count(response.status());
    response
}

async fn check_key(State(server): State<Server>, request: Request, next: Next) -> Response {
    if let Some(key) = &server.0.settings.api_key {
        let given = request.headers().get(header::AUTHORIZATION);
        let given = given.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        // The time it takes tells the length of the key, and nothing else.
        let same = given.is_some_and(|given| given.as_bytes().ct_eq(key.as_bytes()).into());
        if !same {
            return ApiError::unauthorized().into_response();
        }
    }
    next.run(request).await
}

async fn check_host(State(server): State<Server>, request: Request, next: Next) -> Response {
    let local_only = server.0.local_only.get().is_some_and(|local| *local);
    if local_only && !names_this_machine(request.headers()) {
        return ApiError::forbidden("the Host of a request must be this machine").into_response();
    }
    next.run(request).await
}

fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else {
        return false;
    };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
