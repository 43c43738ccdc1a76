//! What the server does, in Prometheus' text format.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use jamba_core::RequestUsage;

use crate::Server;

/// What the engine does not count.
#[derive(Default)]
pub(crate) struct Counts {
    /// Responses by the first digit of their status.
    responses: [AtomicU64; 6],
    requests: AtomicU64,
    /// Microseconds, of all requests together.
    queue: AtomicU64,
    first_token: AtomicU64,
}

impl Counts {
    pub(crate) fn count(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100);
        if let Some(responses) = self.responses.get(class) {
            responses.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn time(&self, usage: &RequestUsage) {
        let add = |counter: &AtomicU64, time: std::time::Duration| {
            counter.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        };
        self.requests.fetch_add(1, Ordering::Relaxed);
        add(&self.queue, usage.queue_time);
        add(&self.first_token, usage.first_token_time);
    }
}

pub(crate) async fn metrics(State(server): State<Server>) -> Response {
    let stats = server.0.engine.stats();
    let counts = &server.0.counts;
    let mut out = String::new();
    let mut tell = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = write!(
            out,
            "# HELP jamba_{name} {help}\n# TYPE jamba_{name} {kind}\njamba_{name} {value}\n"
        );
    };
    let (gauge, counter) = ("gauge", "counter");
    tell("requests_waiting", gauge, "Requests that wait for a slot.", stats.waiting as f64);
    tell("requests_running", gauge, "Requests that have a slot.", stats.running as f64);
    tell(
        "state_bytes",
        gauge,
        "Bytes that running requests count with.",
        stats.running_bytes as f64,
    );
    tell(
        "requests_finished_total",
        counter,
        "Requests that ended by themselves.",
        stats.finished as f64,
    );
    tell(
        "requests_cancelled_total",
        counter,
        "Requests that were cancelled.",
        stats.cancelled as f64,
    );
    tell("requests_failed_total", counter, "Requests that failed.", stats.failed as f64);
    tell("steps_total", counter, "Steps of the model.", stats.steps as f64);
    tell("prompt_tokens_total", counter, "Tokens of prompts run.", stats.prompt_tokens as f64);
    tell("generated_tokens_total", counter, "Tokens generated.", stats.generated_tokens as f64);
    let prefix = stats.prefix;
    tell(
        "prefix_hits_total",
        counter,
        "Prompts that began with a stored state.",
        prefix.hits as f64,
    );
    tell("prefix_misses_total", counter, "Prompts that did not.", prefix.misses as f64);
    tell(
        "prefix_tokens_total",
        counter,
        "Tokens of prompts not run, thanks to stored states.",
        prefix.hit_tokens as f64,
    );
    tell("prefix_states", gauge, "States stored.", prefix.states as f64);
    tell("prefix_bytes", gauge, "Bytes of the stored states.", prefix.bytes as f64);
    tell("prefix_evicted_total", counter, "States given up for newer ones.", prefix.evicted as f64);
    let seconds = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e6;
    let requests = counts.requests.load(Ordering::Relaxed) as f64;
    for (name, help, sum) in [
        ("queue_seconds", "From the submission to the slot.", &counts.queue),
        ("first_token_seconds", "From the submission to the first token.", &counts.first_token),
    ] {
        let sum = seconds(sum);
        let _ = write!(
            out,
            "# HELP jamba_{name} {help}\n# TYPE jamba_{name} summary\n\
             jamba_{name}_sum {sum}\njamba_{name}_count {requests}\n"
        );
    }
    out.push_str("# HELP jamba_http_responses_total Responses by class of status.\n");
    out.push_str("# TYPE jamba_http_responses_total counter\n");
    for (class, count) in counts.responses.iter().enumerate().skip(2) {
        let count = count.load(Ordering::Relaxed);
        let _ = writeln!(out, "jamba_http_responses_total{{class=\"{class}xx\"}} {count}");
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}
