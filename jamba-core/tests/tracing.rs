//! What subscribers hear of loads, steps and requests.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use jamba_core::{
    Engine, EngineOptions, GenerateOptions, LanguageModel, Model, Request, SessionOptions,
};
use jamba_cpu::CpuBackend;
use tracing_subscriber::fmt::format::FmtSpan;

/// Lines that a subscriber wrote.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// The lines since the last call.
    fn take(&self) -> Vec<String> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }
}

#[track_caller]
fn said(lines: &[String], parts: &[&str]) {
    let has = |line: &String| parts.iter().all(|part| line.contains(part));
    assert!(lines.iter().any(has), "no line has {parts:?}:\n{}", lines.join("\n"));
}

/// One test, as the engine's thread hears only of the one subscriber of the process.
#[test]
fn loads_steps_and_requests_are_spans() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .with_span_events(FmtSpan::CLOSE)
        .with_ansi(false)
        .with_writer(move || writer.clone());
    subscriber.init();

    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/reasoning-dense");
    let model = Model::load(folder, CpuBackend::new()).unwrap();
    let layers = format!("layers={}", model.config().num_hidden_layers);
    said(&lines.take(), &[" INFO load{backend=\"cpu\"", "format=stored", &layers, "bytes="]);

    let options = SessionOptions { context: 64, chunk: 8, ..SessionOptions::default() };
    let mut session = model.session(options).unwrap();
    session.append(&[3; 11]).unwrap();
    session.append(&[3]).unwrap();
    let steps = lines.take();
    said(&steps, &["DEBUG prefill{tokens=8 sequences=1}", "time.busy="]);
    said(&steps, &["DEBUG prefill{tokens=3 sequences=1}"]);
    said(&steps, &["DEBUG decode{sequences=1}"]);
    assert_eq!(steps.len(), 3, "{steps:?}");

    let options = EngineOptions { slots: 1, context: 32, ..EngineOptions::default() };
    let engine = Engine::ids_only(&model, options).unwrap();
    let request = |max_tokens| {
        let options = GenerateOptions { max_tokens, ignore_eos: true, ..Default::default() };
        Request { priority: 2, ..Request::new(vec![3; 20], options) }
    };
    engine.submit(request(4)).unwrap().collect_all().unwrap();
    engine.submit(request(4)).unwrap().collect_all().unwrap();
    let (first, second) =
        (engine.submit(request(12)).unwrap(), engine.submit(request(12)).unwrap());
    drop((second, first));
    engine.shutdown();
    let heard = lines.take();
    let requests: Vec<String> =
        heard.iter().filter(|line| line.contains(" request{")).cloned().collect();
    assert_eq!(requests.len(), 4, "{heard:?}");
    let asked = "INFO request{prompt_tokens=20 max_tokens=4 priority=2 cached_tokens=";
    for cached in ["0 ", "20 "] {
        let parts = [&format!("{asked}{cached}"), "queue_ms=", "generated_tokens=4"];
        let parts = [&parts[..], &["first_token_ms=", "finish_reason=Length"]].concat();
        said(&requests, &parts);
    }
    said(&requests, &["max_tokens=12", "finish_reason=Cancelled"]);
    said(&heard, &["DEBUG decode{sequences=1}"]);
}
