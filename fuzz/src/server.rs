//! Bodies of requests.

use std::cell::OnceCell;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use jamba_core::chat::ChatTemplate;
use jamba_core::{Engine, EngineOptions, Model, Sampling, Tokenizer};
use jamba_cpu::CpuBackend;
use jamba_serve::{Server, Settings};
use tokio::runtime::{Builder, Runtime};
use tower_service::Service;

use crate::tiny;

fn server() -> Router {
    const SOURCE: &str =
        include_str!("../../jamba-core/tests/chat/templates/chatml-reasoning.jinja");
    let model = Model::load(tiny::folder(), CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(tiny::folder()).unwrap();
    let options = EngineOptions { slots: 4, context: 256, ..EngineOptions::default() };
    let engine = Engine::new(&model, &tokenizer, options).unwrap();
    let settings = Settings {
        name: "tiny".into(),
        api_key: None,
        context: 256,
        max_tokens: 4,
        body: 1 << 16,
        grace: Duration::from_secs(1),
    };
    let template = ChatTemplate::new(SOURCE).unwrap();
    Server::new(engine, tokenizer, template, Sampling::greedy(), settings).router()
}

/// A body for the path that the first byte says: it is answered, and never with a fault of the
/// server's.
pub fn body(data: &[u8]) {
    thread_local!(static SERVER: OnceCell<(Router, Runtime)> = const { OnceCell::new() });
    let Some((&path, body)) = data.split_first() else { return };
    let path = ["/v1/chat/completions", "/v1/completions"][usize::from(path & 1)];
    SERVER.with(|made| {
        let make = || (server(), Builder::new_current_thread().enable_all().build().unwrap());
        let (router, runtime) = made.get_or_init(make);
        let request = Request::post(path).header("content-type", "application/json");
        let request = request.body(Body::from(body.to_vec())).unwrap();
        runtime.block_on(async {
            let response = router.clone().call(request).await.unwrap();
            let status = response.status();
            let answer = to_bytes(response.into_body(), 1 << 24).await.unwrap();
            assert!(!status.is_server_error(), "{status}: {}", String::from_utf8_lossy(&answer));
        });
    });
}
