//! Whom it answers, whom it refuses, and how it begins and ends.

use std::time::Duration;

use futures_util::StreamExt;
use jamba_core::EngineOptions;
use jamba_serve::Settings;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::running::{CHAT, ENGINE, Running, TEXT, chat, demo, settings, start, with};

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
    // They name the field of the request that they are about.
    for (path, fields, param) in [
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "word ".repeat(600) }] }),
            "messages",
        ),
        (TEXT, json!({ "prompt": "word ".repeat(600) }), "prompt"),
        (CHAT, json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (TEXT, json!({ "prompt": "x", "logprobs": 21 }), "logprobs"),
    ] {
        let body = if path == CHAT { with(ok.clone(), fields) } else { fields };
        let error: Value = server.post(path, &body).await.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
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
