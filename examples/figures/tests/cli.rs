//! The figures as a user makes them, of a model that takes no time.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// The built example; `cargo test` builds all of them beside the tests.
fn figures() -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples/figures").with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.is_file(), "{} is not built", path.display());
    let mut command = Command::new(path);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    command
}

#[track_caller]
fn success(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// The words of the line that begins with this one.
fn row<'a>(out: &'a str, first: &str) -> Vec<&'a str> {
    let rows = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.into_iter().find(|row| row.first() == Some(&first)).unwrap_or_default()
}

#[test]
fn throughput_of_two_models_is_drawn_beside_one_another() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures.json");
    let args = [
        "--presets",
        "jamba-tales-11m,jamba-tales-11m",
        "--only",
        "batch,context",
        "--prompt",
        "20",
        "--chunk",
        "16",
        "--batches",
        "2,1",
        "--contexts",
        "8,32,1000000000001",
        "--generate",
        "2",
    ];
    let output = folder.path().join("drawn");
    let mut command = figures();
    let out = success(command.args(args).arg("--output").arg(&output).arg("--json").arg(&json));
    assert!(out.contains("ratio") && out.contains("experts-int8, on cpu"), "{out}");
    assert_eq!(row(&out, "1000000000001").join(" "), "1000000000001 does not fit does not fit");
    let tables = &out[out.find("Throughput").unwrap()..];
    for first in ["1", "2", "best", "8", "32"] {
        let [_, a, b, ratio] = row(tables, first)[..] else { panic!("{first}: {out}") };
        let [a, b, ratio] = [a, b, ratio].map(|number| number.parse::<f64>().unwrap());
        assert!((a / b - ratio).abs() < 0.02 * ratio + 0.01, "{first}: {out}");
    }
    for name in ["batch.svg", "context.svg"] {
        let svg = std::fs::read_to_string(output.join(name)).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("jamba-tales-11m"), "{name}: {svg}");
    }
    assert!(!output.join("memory.svg").exists());
    let json: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let point = &json["batch"][1]["points"][1];
    assert_eq!((&point["batch"], &point["context"]), (&2.into(), &20.into()));
    let [prompt, step, all] =
        [&point["prompt"]["seconds"], &point["step"]["seconds"], &point["tokens_per_second"]]
            .map(|number| number.as_f64().unwrap());
    let expected = 2.0 * 512.0 / (2.0 * prompt + 512.0 * step);
    assert!((all / expected - 1.0).abs() < 1e-9, "{point}");
}

#[test]
fn memory_is_that_of_the_paper() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--only", "memory", "--presets", "jamba-v0.1", "--output"];
    let out = success(figures().args(args).arg(folder.path()));
    // Weights, the KV cache at 256K, then the sum at 4K, 32K, 256K and 1M: a million tokens fit.
    let expected = ["experts-int8", "51.5", "4.0", "51.6", "52.0", "55.5", "67.5"];
    assert_eq!(row(&out, "jamba-v0.1").get(1..8), Some(&expected[..]), "{out}");
    let svg = std::fs::read_to_string(folder.path().join("memory.svg")).unwrap();
    for part in ["mixtral-8x7b, int8", "llama-2-70b", "80 GiB", "1M"] {
        assert!(svg.contains(part), "`{part}` is not in: {svg}");
    }
}

#[test]
fn bad_input_is_refused() {
    let refused = |args: &[&str], part: &str| {
        let Output { status, stdout, stderr } = figures().args(args).output().unwrap();
        let err = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(2), "{err}");
        assert!(stdout.is_empty(), "something was measured before: {err}");
        assert!(err.contains(part), "`{part}` is not in: {err}");
    };
    refused(&["--presets", "gpt-2"], "llama-2-70b");
    refused(&["--batches", "0"], "--batches");
    refused(&["--only", "speed"], "memory");
    refused(&["--only", "memory", "--output", "/dev/null/figures"], "/dev/null");
    let presets = "jamba-tales-11m,jamba-tales-11m";
    let json = "/dev/null/figures.json";
    let folder = tempfile::tempdir().unwrap();
    let output = ["--output", folder.path().to_str().unwrap(), "--json", json];
    let args = [&["--presets", presets, "--only", "batch"][..], &output].concat();
    refused(&args, json);
}
