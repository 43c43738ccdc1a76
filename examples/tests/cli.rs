//! The examples as a user runs them: what they print, and how they fail.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// The built example; `cargo test` builds all of them beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.is_file(), "{} is not built", path.display());
    let mut command = Command::new(path);
    command.current_dir(root()).stdin(Stdio::null());
    command
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[track_caller]
fn success(command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, err) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{status}: {err}");
    (out, err)
}

#[track_caller]
fn refused(command: &mut Command, parts: &[&str]) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let err = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{err}");
    assert!(stdout.is_empty());
    for part in parts {
        assert!(err.contains(part), "`{part}` is not in: {err}");
    }
}

#[test]
fn generate_tells_a_story() {
    let (out, err) = success(&mut example("generate"));
    assert!(out.starts_with("Once upon a time"), "{out}");
    assert!(out.len() > 500, "{out}");
    assert!(err.contains("256") && err.contains("end: length"), "{err}");
}

#[test]
fn generate_prints_json() {
    let args = ["--prompt", "The little dog", "--temperature", "0", "--max-tokens", "5", "--json"];
    let (out, _) = success(example("generate").args(args));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["prompt_ids"], serde_json::json!([1, 344, 425, 1175]));
    assert_eq!(json["ids"], serde_json::json!([310, 365, 1548, 319, 279]));
    assert_eq!(json["text"], " was so frightened that he");
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["logprobs"].as_array().unwrap().len(), 5);
    for timing in ["load_seconds", "prompt_tokens_per_second", "generated_tokens_per_second"] {
        assert!(json["timings"][timing].as_f64().unwrap() > 0.0, "{timing}");
    }
}

#[test]
fn generate_reads_what_is_piped_in_and_stops_before_a_stop_string() {
    let args = ["--temperature", "0", "--stop", " that he", "--no-stream"];
    let mut child = example("generate")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The little dog").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "The little dog was so frightened\n");
    assert!(String::from_utf8(output.stderr).unwrap().contains("end: stop"));
}

#[test]
fn generate_is_the_same_on_the_reference_and_in_small_chunks() {
    let text = |args: &[&str]| {
        let common = ["--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "12"];
        success(example("generate").args(common).args(args)).0
    };
    let expected = text(&[]);
    assert_eq!(text(&["--backend", "reference"]), expected);
    assert_eq!(text(&["--chunk", "2"]), expected);
}

#[cfg(feature = "structured")]
#[test]
fn generate_holds_the_text_to_a_form() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let run = || {
        let mut command = example("generate");
        command.args(["--no-echo", "--temperature", "2", "--seed", "4"]);
        command
    };
    let schema = file(
        "schema.json",
        r#"{"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 3}"#,
    );
    let (out, err) = success(run().arg("--json-schema").arg(&schema));
    let numbers: Vec<u32> = serde_json::from_str(&out).unwrap();
    assert!([2, 3].contains(&numbers.len()) && numbers.iter().all(|n| [1, 22].contains(n)));
    assert!(err.contains("end: grammar"), "{err}");
    let (out, _) = success(run().args(["--regex", "[xy]{7}"]));
    assert!(out.len() == 8 && out.trim_end().chars().all(|c| "xy".contains(c)), "{out}");
    let lark = file("sum.lark", "start: \"1\" (\"+\" \"1\"){2}\n");
    assert_eq!(success(run().arg("--grammar").arg(&lark)).0, "1+1+1\n");
    refused(run().args(["--regex", "a(b"]), &["grammar", "unclosed group"]);
    refused(run().arg("--json-schema").arg(&lark), &["sum.lark", "not valid JSON"]);
    refused(run().args(["--regex", "a", "--grammar", "b"]), &["--grammar"]);
}

#[test]
fn generate_refuses_bad_input() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("latin1.txt");
    std::fs::write(&file, b"caf\xe9").unwrap();
    let file = file.to_str().unwrap();
    refused(example("generate").args(["--prompt-file", file]), &["latin1.txt", "UTF-8"]);
    refused(example("generate").args(["--prompt-file", "/no/file"]), &["/no/file"]);
    #[cfg(unix)]
    refused(example("generate").args(["--prompt-file", "/dev/zero"]), &["/dev/zero", "1 GiB"]);
    refused(example("generate").args(["--model", "/no/model"]), &["/no/model", "no such folder"]);
    refused(example("generate").args(["--top-p", "1.5"]), &["top_p", "1.5"]);
    refused(example("generate").args(["--temperature", "nan"]), &["temperature", "NaN"]);
    refused(example("generate").args(["--logit-bias", "5000=1"]), &["logit_bias", "5000"]);
    refused(example("generate").args(["--chunk", "0"]), &["--chunk"]);
    let empty = folder.path().to_str().unwrap();
    refused(example("generate").args(["--model", empty]), &[empty, "config.json"]);
}

#[test]
#[cfg(target_os = "linux")]
fn output_that_cannot_be_written_is_an_error() {
    for name in ["generate", "inspect"] {
        // What is said beside the results is not worth a failure.
        let (_, nobody) = std::io::pipe().unwrap();
        let output = example(name).stderr(nobody).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty(), "{name}");
        let full = std::fs::File::create("/dev/full").unwrap();
        let output = example(name).stdout(full).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && err.contains("error: stdout"), "{name}: {err}");
    }
}

#[test]
fn trace_writes_the_golden_names() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("trace.safetensors");
    let model = root().join("jamba-tests/golden/paper-block");
    let args = ["--ids", "1,2,3,4,5", "--decode", "6,7", "--chunk", "2", "--model"];
    success(example("trace").args(args).arg(&model).arg("--output").arg(&file));
    let (got, expected) = (std::fs::read(file).unwrap(), model.join("golden.safetensors"));
    let expected = std::fs::read(expected).unwrap();
    let (got, expected) =
        (SafeTensors::deserialize(&got).unwrap(), SafeTensors::deserialize(&expected).unwrap());
    let mut names: Vec<_> =
        expected.names().into_iter().filter(|name| !name.ends_with("_ids")).collect();
    let mut written = got.names();
    names.sort_unstable();
    written.sort_unstable();
    assert_eq!(written, names);
    assert_eq!(got.tensor("logits").unwrap().shape(), [5, 160]);
    assert_eq!(got.tensor("decode_logits").unwrap().shape(), [2, 160]);
    assert_eq!(got.tensor("state.4.k").unwrap().shape(), [2, 7, 16]);
    assert_eq!(got.tensor("state.0.conv").unwrap().shape(), [128, 4]);
}

#[test]
fn trace_takes_a_text() {
    let folder = TempDir::new().unwrap();
    let files = ["text", "ids"].map(|name| folder.path().join(name));
    let text = ["--prompt", "The little dog", "--output"];
    let (_, err) = success(example("trace").args(text).arg(&files[0]));
    assert!(err.contains("--ids 1,344,425,1175"), "{err}");
    let ids = ["--ids", "1,344,425,1175", "--output"];
    success(example("trace").args(ids).arg(&files[1]));
    let [a, b] = files.map(|file| std::fs::read(file).unwrap());
    assert!(a == b);
    let both = ["--prompt", "a", "--ids", "1", "--output", "/no/such"];
    refused(example("trace").args(both), &["--prompt", "--ids"]);
    refused(example("trace").args(["--output", "/no/such"]), &["--prompt"]);
}

#[test]
fn trace_refuses_bad_input() {
    let output = ["--output", "/no/such/folder/trace.safetensors"];
    refused(example("trace").args(["--ids", "1,2"]).args(output), &["/no/such/folder"]);
    refused(example("trace").args(["--ids", "1,x"]).args(output), &["`x` is not a token id"]);
    refused(example("trace").args(["--ids", ""]).args(output), &["prompt is empty"]);
    refused(example("trace").args(["--ids", "4096"]).args(output), &["4096", "vocabulary"]);
}

#[test]
fn inspect_prints_table_1_and_checks_weights() {
    let (out, _) = success(example("inspect").args(["--preset", "Jamba-v0.1"]));
    for part in ["51.57 B total, 12.11 B active", "MMMMAMMM   .E.E.E.E"] {
        assert!(out.contains(part), "`{part}` is not in: {out}");
    }
    // The paper's, which says 6.7B, 7.2B, 46.7B (12.9B active) and 52B (12B).
    for (model, row) in [
        ("Llama-2 7B", ["6.74 B", "6.74 B", "128.00 GiB"]),
        ("Mistral 7B", ["7.24 B", "7.24 B", "32.00 GiB"]),
        ("Mixtral 8x7B", ["46.70 B", "12.88 B", "32.00 GiB"]),
        ("Jamba-v0.1", ["51.57 B", "12.11 B", "4.00 GiB"]),
    ] {
        let line = out.lines().find(|line| line.starts_with(&format!("  {model}"))).unwrap();
        assert!(row.iter().all(|part| line.contains(part)), "{line}");
    }
    let row = out.lines().find(|line| line.trim_start().starts_with("262,144")).unwrap();
    assert!(row.contains("4.00 GiB"), "{row}");
    for (format, size) in [("experts-int8", "51.48 GiB"), ("int4", "27.34 GiB")] {
        let row = out.lines().find(|line| line.trim_start().starts_with(format)).unwrap();
        assert!(row.contains(size), "{row}");
    }
    let (out, _) = success(example("inspect").args(["--context", "777"]));
    assert!(out.contains("complete") && out.contains("777"), "{out}");
    let memory = ["--preset", "jamba-v0.1", "--memory", "80"];
    let (out, _) = success(example("inspect").args(memory));
    // 80 - 51.48 GiB, of 4 GiB and 16.6 MiB each; stored weights alone are more.
    let fit = out.split("Sequences that fit 80 GiB").nth(1).unwrap();
    let row = fit.lines().find(|line| line.trim_start().starts_with("262,144")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["262,144", "0", "7", "7", "13"]);
    refused(example("inspect").args(["--preset", "gpt-2"]), &["gpt-2", "jamba-v0.1"]);
}

/// What stands in the way of the weights is named, and what a file says does not reach the terminal.
#[test]
#[cfg(unix)]
fn inspect_of_odd_folders() {
    let model = root().join("jamba-tests/golden/pure-mamba");
    let copy = || {
        let folder = TempDir::new().unwrap();
        let to = folder.path().join("config.json");
        std::fs::copy(model.join("config.json"), to).unwrap();
        folder
    };
    let (out, _) = success(example("inspect").arg("--model").arg(copy().path()));
    assert!(out.contains("No weights here"), "{out}");
    let folder = copy();
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    refused(example("inspect").arg("--model").arg(folder.path()), &["model.safetensors", "folder"]);
    let folder = copy();
    std::os::unix::fs::symlink("/no/blob", folder.path().join("model.safetensors")).unwrap();
    let parts = ["model.safetensors", "a link to a file that is not there"];
    refused(example("inspect").arg("--model").arg(folder.path()), &parts);

    let folder = copy();
    let mut bytes = std::fs::read(model.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let len = bytes.len() - 8 - header;
    let foreign = serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": [len, len + 4]});
    json["\u{1b}[31mred\u{9b}"] = foreign;
    let header = [json.to_string().into_bytes(), bytes.split_off(8 + header), vec![0; 4]];
    let len = (header[0].len() as u64).to_le_bytes().to_vec();
    let file = [len, header.concat()].concat();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let (out, _) = success(example("inspect").arg("--model").arg(folder.path()));
    assert!(out.contains("\\u{1b}[31mred\\u{9b}"), "{out}");
    assert!(!out.contains(['\u{1b}', '\u{9b}']), "{out}");
    let refused = example("generate").arg("--model").arg(folder.path()).output().unwrap();
    let err = String::from_utf8(refused.stderr).unwrap();
    assert!(err.contains("red") && !err.contains(['\u{1b}', '\u{9b}']), "{err}");
}

#[test]
fn batch_gives_the_same_texts_with_any_number_of_slots() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("prompts.txt");
    std::fs::write(&file, "A fox\n\nAn owl said\nOnce upon a time\n").unwrap();
    let texts = |slots: &str| {
        let args = ["--max-tokens", "9", "--slots", slots];
        success(example("batch").arg(&file).args(args))
    };
    let (one, err) = texts("1");
    assert_eq!(one.lines().filter(|line| line.starts_with("An owl said")).count(), 1, "{one}");
    assert!(err.contains("3 prompts through 1 slots") && err.contains("/s"), "{err}");
    assert_eq!(texts("3").0, one);
}

#[test]
fn batch_reads_json_lines() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let lines = "{\"prompt\": \"A fox\", \"max_tokens\": 2}\n{\"prompt\": \"An owl\"}\n";
    std::fs::write(&file, lines).unwrap();
    let args = ["--json", "--max-tokens", "4", "--ignore-eos"];
    let (out, _) = success(example("batch").arg(&file).args(args));
    let json: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(json[0]["ids"].as_array().unwrap().len(), 2);
    assert_eq!(json[1]["usage"]["generated_tokens"], 4);
    std::fs::write(&file, "{\"text\": 1}\n").unwrap();
    refused(example("batch").arg(&file), &["string `prompt`"]);
    refused(example("batch").arg("/no/file"), &["/no/file"]);
}

#[test]
fn batch_names_the_line_that_is_wrong() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("prompts.jsonl");
    for (line, part) in [
        (r#"not json"#, "objects"),
        (r#"{"text": "A"}"#, "`prompt`"),
        (r#"{"prompt": "A", "max_tokens": -1}"#, "`max_tokens`"),
        (r#"{"prompt": "A", "seed": "x"}"#, "`seed`"),
        (r#"{"prompt": "A", "priority": 99999999999}"#, "`priority`"),
        (r#"{"prompt": "A", "temperature": 3}"#, "an object has"),
    ] {
        std::fs::write(&file, format!("{{\"prompt\": \"B\"}}\n\n{line}\n")).unwrap();
        refused(example("batch").arg(&file), &["line 3", part]);
    }
    std::fs::write(&file, "A\n").unwrap();
    let most = usize::MAX.to_string();
    refused(example("batch").arg(&file).args(["--max-tokens", &most]), &["bytes for states"]);
}

#[test]
fn fork_goes_on_from_a_state_of_any_length() {
    let folder = TempDir::new().unwrap();
    let state = folder.path().join("state.safetensors");
    let fork = |prompt: &str| {
        let mut command = example("fork");
        command.args(["--max-tokens", "4", "--forks", "1", "--temperature", "0", "--state"]);
        success(command.arg(&state).args(["--prompt", prompt]))
    };
    let (first, _) = fork("Once upon a time there was a fox who lived in the forest");
    let (second, err) = fork("A");
    assert_eq!(first, second);
    assert!(err.contains("of the state"), "{err}");
    refused(example("fork").args(["--prompt", "A", "--rewind", "100"]), &["rewind", "100"]);
}

#[test]
fn fork_says_what_rewinding_cost() {
    let folder = TempDir::new().unwrap();
    let state = folder.path().join("state.safetensors");
    let args = ["--forks", "2", "--max-tokens", "4", "--state"];
    let (out, err) = success(example("fork").args(args).arg(&state));
    assert_eq!(out.matches("Once upon a time there was a fox who").count(), 2, "{out}");
    assert!(out.contains("Once upon a time there was a bear that"), "{out}");
    assert!(err.contains("2 tokens taken back"), "{err}");
    assert_eq!(success(example("fork").args(args).arg(&state)).0, out, "from the file");
    refused(example("fork").args(["--rewind", "99"]), &["rewind"]);
}

#[test]
fn perplexity_of_a_file() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "Once upon a time there was a fox who lived in a wood. ".repeat(5))
        .unwrap();
    let (whole, _) = success(example("perplexity").arg(&file).arg("--json"));
    let whole: Value = serde_json::from_str(&whole).unwrap();
    let perplexity = whole["perplexity"].as_f64().unwrap();
    assert!(perplexity > 1.0 && perplexity < 100.0, "{whole}");
    assert!((whole["mean_nll"].as_f64().unwrap().exp() - perplexity).abs() < 1e-9);
    let args = ["--window", "20", "--overlap", "8"];
    let (out, err) = success(example("perplexity").arg(&file).args(args));
    assert!(out.starts_with("mean nll") && err.lines().count() > 3, "{out}{err}");
    refused(example("perplexity").arg(&file).args(["--overlap", "0"]), &["overlap"]);
    refused(example("perplexity").arg("/no/file"), &["/no/file"]);
}

#[test]
fn bench_says_how_much_of_the_machine_is_used() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("bench.json");
    let args = ["--prompt", "40", "--chunk", "16", "--generate", "2", "--batch", "1,3"];
    let (out, _) = success(example("bench").args(args).args(["--runs", "1", "--json"]).arg(&path));
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(out.contains("reads") && out.contains("prefill") && out.contains("decode"), "{out}");
    let phases = json["phases"].as_array().unwrap();
    let of =
        |key: &str| phases.iter().map(|phase| phase[key].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(of("batch"), [1.0, 1.0, 3.0]);
    assert_eq!(of("tokens"), [40.0, 1.0, 3.0]);
    for key in ["tokens_per_second", "gb_per_second", "tflop_per_second", "limit_seconds"] {
        assert!(of(key).into_iter().all(|v| v > 0.0), "{key}: {phases:?}");
    }
    // Weights may lie in caches, which are faster than the memory that the limit is of.
    assert!(of("share_of_limit").into_iter().all(|v| v > 0.0 && v.is_finite()), "{phases:?}");
    assert!(json["machine"]["read_gb_per_second"].as_f64().unwrap() > 0.0);

    let args = ["--prompt", "0", "--context", "9", "--generate", "0", "--endure", "5", "--json"];
    let (out, _) = success(example("bench").args(args).arg(&path));
    assert!(out.contains("first ") && out.contains("last "), "{out}");
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(
        (&json["endured"][0]["steps"], &json["endured"][0]["past"]),
        (&5.into(), &12.into())
    );
    assert!(json["endured"][0]["last_seconds"].as_f64().unwrap() > 0.0, "{json}");

    let random =
        ["--preset", "jamba-tales-11m", "--layers", "2", "--prompt", "0", "--generate", "0"];
    let (out, _) = success(example("bench").args(random).args(["--quant", "int4"]));
    assert!(out.contains("weights int4, on cpu"), "{out}");
    assert!(out.contains("2 of 8 layers of jamba-tales-11m"), "{out}");
    refused(example("bench").args(["--preset", "gpt-2"]), &["gpt-2", "jamba-v0.1"]);
    refused(example("bench").args(["--top-k", "-1"]), &["--top-k", "-1"]);
    // Before anything is measured, and a file that is there is kept.
    let nowhere = folder.path().join("none").join("bench.json");
    refused(example("bench").arg("--json").arg(nowhere), &["none"]);
    let kept = std::fs::read(&path).unwrap();
    refused(example("bench").args(["--model", "nowhere", "--json"]).arg(&path), &["nowhere"]);
    assert_eq!(std::fs::read(&path).unwrap(), kept);
}

#[test]
fn quality_of_all_formats() {
    let (out, _) = success(example("quality").args(["--tokens", "64"]));
    for part in ["63 tokens", "stored", "experts-int8", "int8", "int4", "100.00 %"] {
        assert!(out.contains(part), "`{part}` is not in: {out}");
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "The fox said to the owl that it was late. ".repeat(9)).unwrap();
    let args = ["--quant", "int4", "--window", "40", "--json"];
    let (out, _) = success(example("quality").arg(&file).args(args));
    let json: Value = serde_json::from_str(&out).unwrap();
    let formats = json["formats"].as_array().unwrap();
    assert_eq!((formats.len(), &formats[1]["format"]), (2, &Value::from("int4")));
    assert!(formats[1]["kl"].as_f64().unwrap() > 0.0, "{json}");
    assert!(formats[1]["bytes"].as_u64() < formats[0]["bytes"].as_u64(), "{json}");
    let other = ["--backend", "cpu", "--base", "cpu-f32", "--quant", "stored", "--chunk", "7"];
    let (out, _) = success(example("quality").args(["--tokens", "30"]).args(other));
    assert_eq!(out.matches("stored").count(), 2, "{out}");
    refused(example("quality").args(["--quant", "q4"]), &["q4", "int4"]);
    refused(example("quality").args(["--window", "1"]), &["window"]);
}

#[test]
fn generate_with_quantised_weights() {
    let args = ["--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "4"];
    let text = |format| success(example("generate").args(args).args(["--quant", format])).0;
    assert!(text("int4").starts_with("Once upon a time"));
    assert_eq!(text("experts-int8"), text("stored"));
}
