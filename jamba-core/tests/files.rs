//! Files that are not what they should be: no wait, no endless read, an error that names the file.
#![cfg(unix)]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use jamba_core::weights::Weights;
use jamba_core::{Checkpoint, Config, Sampling, Snapshot, Tokenizer};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

/// A folder with all files of the demo model, as links, but this one.
fn folder_without(name: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != name {
            let path = entry.path().canonicalize().unwrap();
            symlink(path, folder.path().join(entry.file_name())).unwrap();
        }
    }
    folder
}

/// The message of the error that reading `name` ends in, which must not take long.
fn refusal(name: &str, put: impl FnOnce(&Path)) -> String {
    let folder = folder_without(name);
    let path = folder.path().join(name);
    put(&path);
    let (send, receive) = mpsc::channel();
    let (at, name) = (folder.path().to_owned(), name.to_owned());
    std::thread::spawn(move || {
        let result = match &*name {
            "config.json" => Config::from_folder(&at).map(drop),
            "generation_config.json" => {
                Config::from_folder(&at).map(drop).and(Sampling::from_folder(&at).map(drop))
            }
            "tokenizer.json" | "tokenizer_config.json" => Tokenizer::from_folder(&at).map(drop),
            "state" => Snapshot::load(at.join("state")).map(drop),
            _ => Checkpoint::open(&at).map(drop),
        };
        let _ = send.send(result.expect_err("it was taken").to_string());
    });
    let message = receive.recv_timeout(Duration::from_secs(20)).expect("it took too long");
    let names_it = message.contains(path.to_str().unwrap()) || message.contains("saved state");
    assert!(names_it, "the file is not in: {message}");
    message
}

const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "state",
];

#[test]
fn a_pipe_is_not_waited_for() {
    for name in FILES.into_iter().filter(|name| !name.ends_with("index.json")) {
        let message = refusal(name, |path| {
            assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
        });
        assert!(message.contains("not a regular file"), "{message}");
    }
}

#[test]
fn a_folder_is_no_file() {
    for name in FILES.into_iter().filter(|name| !name.ends_with("index.json")) {
        let message = refusal(name, |path| std::fs::create_dir(path).unwrap());
        assert!(message.contains("it is a folder"), "{message}");
    }
}

#[test]
fn a_link_that_leads_nowhere() {
    for name in FILES.into_iter().filter(|name| !name.ends_with("index.json")) {
        let message = refusal(name, |path| symlink("../blobs/0123", path).unwrap());
        assert!(message.contains("a link to a file that is not there"), "{message}");
    }
}

#[test]
fn a_device_is_not_read() {
    for name in FILES.into_iter().filter(|name| !name.ends_with("index.json")) {
        let message = refusal(name, |path| symlink("/dev/zero", path).unwrap());
        assert!(message.contains("not a regular file"), "{message}");
    }
}

#[test]
fn a_huge_file_is_not_read() {
    for name in FILES.into_iter().filter(|name| name.ends_with(".json")) {
        if name == "model.safetensors.index.json" {
            continue;
        }
        let message = refusal(name, |path| {
            std::fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
        });
        assert!(message.contains("bytes"), "{message}");
    }
}

/// Neither one that is longer than its header says, nor one whose header says so much.
#[test]
fn a_huge_state_is_not_read() {
    let sparse = |header: &str, length: u64| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        refusal("state", |path| {
            std::fs::write(path, &bytes).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(bytes.len() as u64 + length).unwrap();
        })
    };
    let logits = |end: u64| {
        let elements = end / 4;
        format!(r#"{{"logits":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{end}]}}}}"#)
    };
    let message = sparse(&logits(8), 1 << 40);
    assert!(message.contains("its header says"), "{message}");
    let message = sparse("", 1 << 40);
    assert!(message.contains("EOF"), "{message}");
    if cfg!(target_os = "linux") {
        let message = sparse(&logits(1 << 42), 1 << 42);
        assert!(message.contains("are available"), "{message}");
    }
}

/// A tokenizer is parsed by a crate that trusts it: whatever it does, it is an error or works.
#[test]
fn hostile_tokenizers() {
    let text = std::fs::read_to_string(demo().join("tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        change(&mut json);
        json.to_string()
    };
    let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
    let regex = serde_json::json!({"type": "Split", "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated", "invert": false});
    let precompiled = |map: &str| {
        let map = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": map});
        with(&|json| json["normalizer"] = map.clone())
    };
    let files = [
        String::new(),
        "null".into(),
        "{}".into(),
        deep(100_000),
        text[..text.len() / 2].to_owned(),
        with(&|json| json["model"] = serde_json::json!({"type": "Unigram", "vocab": []})),
        with(&|json| json["model"]["vocab"] = serde_json::json!({})),
        with(&|json| json["model"]["merges"] = serde_json::json!([["a"]])),
        with(&|json| json["model"]["vocab"]["a"] = serde_json::json!(u32::MAX)),
        with(&|json| json["added_tokens"][0]["content"] = serde_json::json!("")),
        with(&|json| json["added_tokens"][0]["id"] = serde_json::json!(u32::MAX)),
        with(&|json| json["pre_tokenizer"] = regex.clone()),
        with(&|json| {
            json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
            "special_tokens": {}})
        }),
        with(&|json| {
            json["decoder"] = serde_json::json!({"type": "CTC", "pad_token": "",
            "word_delimiter_token": "", "cleanup": true})
        }),
        with(&|json| {
            json["decoder"] = serde_json::json!({"type": "Strip", "content": " ",
            "start": 9_000_000_000u64, "stop": 9_000_000_000u64})
        }),
        precompiled(""),
        precompiled("AAAA"),
        precompiled("/////wAAAAA="),
        precompiled("AAQAAAAAAAD/////"),
    ];
    let mut refused = 0;
    for file in &files {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), file).unwrap();
        let tokenizer = match Tokenizer::from_folder(folder.path()) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
                refused += 1;
                continue;
            }
        };
        for text in ["", "The fox", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "é狐\0\u{FFFD}"] {
            let encoded = tokenizer.encode(text).and_then(|ids| tokenizer.decode(&ids));
            if let Err(error) = encoded.and(tokenizer.encode_untrusted(text)) {
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
            }
        }
        let mut decoder = tokenizer.decoder(&[1, 2, 3]).unwrap();
        for id in (0..300).chain([4095, 4096, u32::MAX]) {
            if let Err(error) = decoder.push(id) {
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
            }
        }
    }
    assert!(refused >= 8, "{refused}");
    // Tables with a place for every id are made for grammars and for masks.
    let folder = TempDir::new().unwrap();
    let file = with(&|json| json["model"]["vocab"]["fox"] = serde_json::json!(u32::MAX - 1));
    std::fs::write(folder.path().join("tokenizer.json"), file).unwrap();
    let message = Tokenizer::from_folder(folder.path()).err().unwrap().to_string();
    assert!(message.contains("the id 4294967294"), "{message}");
}

/// Reading what a mapped file has lost would end the process.
#[test]
fn a_file_that_is_cut_off_after_it_was_opened() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::copy(demo().join("model.safetensors"), &path).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let name = "model.final_layernorm.weight";
    checkpoint.tensor(name, &[256]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    let message = checkpoint.tensor(name, &[256]).err().unwrap().to_string();
    assert!(message.contains("cut off at 100000 bytes"), "{message}");
}

/// Nor is a tied head looked for in what the file no longer has.
#[test]
fn a_head_that_is_cut_off_after_it_was_opened() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut config = Config::from_folder(demo()).unwrap();
    config.tie_word_embeddings = true;
    let layout = Weights::layout(&config);
    let embedding = vec![0u8; 4 * config.vocab_size * config.hidden_size];
    let shape = vec![config.vocab_size, config.hidden_size];
    let view = |name| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), &embedding);
        (name, view.unwrap())
    };
    let tensors = [view("model.embed_tokens.weight"), view("lm_head.weight")];
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.unused(&layout).is_empty());
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    assert_eq!(checkpoint.unused(&layout), ["lm_head.weight"]);
}
