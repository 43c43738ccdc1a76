//! Input that is not as it should be: every error names what is wrong, and nothing is lost.

use std::fs;
use std::path::{Path, PathBuf};

use jamba_core::{
    Error, GenerateOptions, Generator, LanguageModel, Model, Result, Session, SessionOptions,
    Tokenizer,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// A copy of a model folder, to be damaged.
fn copy(of: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    for entry in fs::read_dir(of).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    to
}

fn load(folder: &Path) -> Result<Model<CpuBackend>> {
    Model::load(folder, CpuBackend::new())
}

/// The message of the error that loading gives.
fn refusal(folder: &Path) -> String {
    match load(folder) {
        Ok(_) => panic!("{} was loaded", folder.display()),
        Err(e) => e.to_string(),
    }
}

#[track_caller]
fn names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// Header and data of a safetensors file.
fn open(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

fn save(path: &Path, header: &Value, data: &[u8]) {
    let header = header.to_string().into_bytes();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

#[test]
fn no_such_folder() {
    names(&refusal(Path::new("/nowhere/model")), &["/nowhere/model", "no such folder"]);
    let error = Tokenizer::from_folder("/nowhere/model").err().unwrap().to_string();
    names(&error, &["/nowhere/model"]);
}

#[test]
fn a_file_instead_of_a_folder() {
    let folder = copy(&golden("pure-mamba"));
    names(&refusal(&folder.path().join("config.json")), &["config.json", "this is a file"]);
}

#[test]
fn missing_files() {
    for (file, wanted) in [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors or model.safetensors.index.json"),
    ] {
        let folder = copy(&golden("pure-mamba"));
        fs::remove_file(folder.path().join(file)).unwrap();
        names(&refusal(folder.path()), &[folder.path().to_str().unwrap(), wanted]);
    }
    let error = Tokenizer::from_folder(golden("pure-mamba")).err().unwrap();
    names(&error.to_string(), &["pure-mamba", "tokenizer.json"]);
}

#[test]
fn files_of_another_format() {
    for (file, instead) in
        [("model.safetensors", "pytorch_model.bin"), ("tokenizer.json", "tokenizer.model")]
    {
        let folder = copy(&golden("pure-mamba"));
        let _ = fs::remove_file(folder.path().join(file));
        fs::write(folder.path().join(instead), "").unwrap();
        let message = match Tokenizer::from_folder(folder.path()) {
            Err(e) if file == "tokenizer.json" => e.to_string(),
            _ => refusal(folder.path()),
        };
        names(&message, &[file, instead, "converted"]);
    }
    let folder = copy(&golden("pure-mamba"));
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n";
    fs::write(folder.path().join("model.safetensors"), pointer).unwrap();
    names(&refusal(folder.path()), &["model.safetensors", "git lfs pull"]);
}

/// Fewer layers in the configuration than in the weights would run, and compute something else.
#[test]
fn weights_that_the_configuration_does_not_know() {
    let folder = copy(&golden("pure-mamba"));
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(3);
    fs::write(&path, config.to_string()).unwrap();
    names(&refusal(folder.path()), &["not part of the model", "model.layers.3."]);
}

/// A head that is said to be tied and is not: either choice would be wrong for somebody.
#[test]
fn a_tied_head_that_differs_from_the_embedding() {
    let tied = |change: &dyn Fn(&mut Vec<u8>)| {
        let folder = copy(&golden("reasoning-dense"));
        let path = folder.path().join("model.safetensors");
        let (mut header, mut data) = open(&path);
        let embed = header["model.embed_tokens.weight"].clone();
        let range = |i: usize| embed["data_offsets"][i].as_u64().unwrap() as usize;
        let mut head = data[range(0)..range(1)].to_vec();
        change(&mut head);
        let (start, end) = (data.len(), data.len() + head.len());
        data.extend(head);
        header["lm_head.weight"] = embed;
        header["lm_head.weight"]["data_offsets"] = json!([start, end]);
        save(&path, &header, &data);
        folder
    };
    load(tied(&|_| ()).path()).unwrap();
    names(
        &refusal(tied(&|head| head[5] ^= 1).path()),
        &["lm_head.weight", "not part of the model"],
    );
}

/// As in transformers.
#[test]
fn a_single_file_goes_before_an_index() {
    let folder = copy(&golden("pure-mamba"));
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    load(folder.path()).unwrap();
}

#[test]
fn invalid_json() {
    for (file, of) in [
        ("config.json", "pure-mamba"),
        ("generation_config.json", "pure-mamba"),
        ("model.safetensors.index.json", "sharded-bf16"),
    ] {
        let folder = copy(&golden(of));
        fs::write(folder.path().join(file), "{\"a\": 1,\n oops").unwrap();
        names(&refusal(folder.path()), &[file, "not valid JSON", "line 2"]);
    }
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("tokenizer.json"), "{\"model\": 5}").unwrap();
    let error = Tokenizer::from_folder(folder.path()).err().unwrap().to_string();
    names(&error, &["tokenizer.json"]);
}

#[test]
fn truncated_weights() {
    let folder = copy(&golden("pure-mamba"));
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for keep in [0, 5, 8, 100, 5_000, whole.len() - 1] {
        fs::write(&path, &whole[..keep]).unwrap();
        names(&refusal(folder.path()), &["model.safetensors", "not a valid safetensors file"]);
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    names(&refusal(folder.path()), &["model.safetensors", "not a valid safetensors file"]);
}

/// Any flipped bit of the header is an error, or leaves a model that can be loaded: no panic, no
/// unbounded allocation.
#[test]
fn flipped_bits_in_the_header() {
    let folder = copy(&golden("pure-mamba"));
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for bit in (0..64).chain((64..header * 8).step_by(37)) {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        if let Err(error) = load(folder.path()) {
            let message = error.to_string();
            assert!(message.contains("safetensors") || message.contains("tensor `"), "{message}");
            refused += 1;
        }
    }
    assert!(refused > 64, "only {refused} refused");
}

#[test]
fn an_index_that_does_not_fit() {
    let index = "model.safetensors.index.json";
    let edit = |change: &dyn Fn(&mut Value, &Path)| {
        let folder = copy(&golden("sharded-bf16"));
        let path = folder.path().join(index);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value, folder.path());
        fs::write(&path, value.to_string()).unwrap();
        refusal(folder.path())
    };
    let shard = "model-00002-of-00004.safetensors";
    let message = edit(&|_, folder| fs::remove_file(folder.join(shard)).unwrap());
    names(&message, &[index, shard, "not there"]);

    let message = edit(&|v, _| v["weight_map"]["no.such.tensor"] = json!(shard));
    names(&message, &[index, "no.such.tensor", shard]);

    let name = "model.embed_tokens.weight";
    let message = edit(&|v, _| drop(v["weight_map"].as_object_mut().unwrap().remove(name)));
    names(&message, &[name, "not in the checkpoint"]);

    let message = edit(&|v, _| v["weight_map"] = json!([1, 2]));
    names(&message, &[index, "weight_map"]);

    for place in [json!("../secret.safetensors"), json!("/etc/passwd"), json!(".."), json!(7)] {
        let message = edit(&|v, _| v["weight_map"][name] = place.clone());
        names(&message, &[index, name]);
    }
}

#[test]
fn a_tensor_that_is_missing_or_of_another_shape_or_dtype() {
    let name = "model.layers.1.mamba.x_proj.weight";
    let edit = |change: &dyn Fn(&mut Value)| {
        let folder = copy(&golden("pure-mamba"));
        let path = folder.path().join("model.safetensors");
        let (mut header, data) = open(&path);
        change(&mut header);
        save(&path, &header, &data);
        refusal(folder.path())
    };
    let message = edit(&|h| {
        let tensor = h.as_object_mut().unwrap().remove(name).unwrap();
        h["renamed"] = tensor;
    });
    names(&message, &[name, "model.safetensors", "not in the checkpoint"]);

    let message = edit(&|h| h[name]["shape"] = json!([128, 40]));
    names(&message, &[name, "model.safetensors", "[128, 40]", "[40, 128]"]);

    let message = edit(&|h| h[name]["dtype"] = json!("I32"));
    names(&message, &[name, "model.safetensors", "I32", "BF16"]);
}

#[test]
fn a_config_of_another_model() {
    let folder = copy(&golden("pure-mamba"));
    fs::copy(golden("odd-shapes").join("config.json"), folder.path().join("config.json")).unwrap();
    names(&refusal(folder.path()), &["model.embed_tokens.weight", "[160, 64]", "[101, 72]"]);
}

fn session(context: usize) -> Session {
    let model = load(&golden("paper-block")).unwrap();
    model.session(SessionOptions { context, chunk: 4, outputs: 2 }).unwrap()
}

/// Logits for some tokens in a session that never saw a mistake.
fn fresh(tokens: &[u32]) -> Vec<f32> {
    session(32).append(tokens).unwrap().to_vec()
}

#[test]
fn a_refused_append_leaves_the_session_as_it_was() {
    let mut session = session(8);
    session.append(&[1, 2, 3]).unwrap();

    let error = session.append(&[4, 5, 6, 7, 160]).unwrap_err();
    assert!(matches!(error, Error::Token { id: 160, index: 4, vocab_size: 160 }), "{error}");
    let error = session.append(&[4, 5, 6, 7, 8, 9]).unwrap_err();
    assert!(matches!(error, Error::Context { needed: 9, allocated: 8 }), "{error}");
    let error = session.append(&[]).unwrap_err();
    assert!(matches!(error, Error::EmptyPrompt), "{error}");

    assert_eq!(session.position(), 3);
    assert_eq!(session.append(&[4, 5]).unwrap(), fresh(&[1, 2, 3, 4, 5]));
    session.reset().unwrap();
    assert_eq!(session.append(&[9, 8]).unwrap(), fresh(&[9, 8]));
}

#[test]
fn an_empty_prompt_starts_from_bos_or_is_an_error() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m");
    let with_bos = copy(&demo);
    let tokenizer = Tokenizer::from_folder(&demo).unwrap();
    let options = SessionOptions::default();
    let mut session = load(with_bos.path()).unwrap().session(options).unwrap();
    let greedy = GenerateOptions { max_tokens: 1, ..GenerateOptions::default() };
    let mut generator = Generator::new(&mut session, &tokenizer, greedy.clone()).unwrap();
    generator.prompt(&[]).unwrap();
    assert_eq!(generator.usage().prompt_tokens, 1);

    let path = with_bos.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["bos_token_id"] = Value::Null;
    fs::write(&path, config.to_string()).unwrap();
    let mut session = load(with_bos.path()).unwrap().session(options).unwrap();
    let mut generator = Generator::new(&mut session, &tokenizer, greedy).unwrap();
    let error = generator.prompt(&[]).unwrap_err();
    assert!(matches!(error, Error::EmptyPrompt), "{error}");
}

#[test]
fn nan_in_the_weights_is_reported_and_not_sampled() {
    let folder = copy(&golden("pure-mamba"));
    let path = folder.path().join("model.safetensors");
    let (header, mut data) = open(&path);
    let at = header["model.layers.2.mamba.out_proj.weight"]["data_offsets"][0].as_u64().unwrap();
    data[at as usize..at as usize + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    save(&path, &header, &data);
    let mut session = load(folder.path()).unwrap().session(SessionOptions::default()).unwrap();
    let error = session.append(&[1, 2, 3]).unwrap_err();
    assert!(matches!(error, Error::NonFinite { position: 3 }), "{error}");
    names(&error.to_string(), &["not finite", "NaN"]);
}

#[test]
fn options_that_make_no_sense() {
    let model = load(&golden("paper-block")).unwrap();
    for (options, name) in [
        (SessionOptions { context: 0, ..SessionOptions::default() }, "context"),
        (SessionOptions { chunk: 0, ..SessionOptions::default() }, "chunk"),
        (SessionOptions { outputs: 0, ..SessionOptions::default() }, "outputs"),
    ] {
        let error = model.session(options).err().unwrap().to_string();
        names(&error, &[name, "0", "at least 1"]);
    }
}

/// A context that the machine has no memory for is an error, not the end of the process.
#[test]
fn a_context_that_does_not_fit_the_machine() {
    let folder = golden("paper-block");
    let models: [Box<dyn LanguageModel>; 2] = [
        Box::new(load(&folder).unwrap()),
        Box::new(Model::load(&folder, ReferenceBackend::new()).unwrap()),
    ];
    for model in models {
        for context in [usize::MAX, usize::MAX / 4, 1 << 50] {
            let options = SessionOptions { context, ..SessionOptions::default() };
            let error = model.session(options).err().unwrap();
            assert!(matches!(error, Error::Memory { .. }), "{error}");
        }
        let options = SessionOptions { context: 1 << 50, chunk: 1 << 45, outputs: 1 };
        names(&model.session(options).err().unwrap().to_string(), &["bytes", "smaller"]);
    }
}
