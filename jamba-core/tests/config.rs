//! `config.json` as it occurs, as it could occur, and as it must be refused; and the schedule
//! that a configuration describes.

use std::path::{Path, PathBuf};

use jamba_core::schedule::{FeedForwardKind, LayerKind, MixerKind, Schedule};
use jamba_core::{Config, Dtype, Error};
use serde_json::{Value, json};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests").join(path)
}

fn read(path: &str) -> String {
    let path = data(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parse(path: &str) -> Config {
    Config::from_json(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The published 52B, with `changes` made to its keys; a change to `null` is a null, not absence.
fn v0_1_with(changes: Value) -> Result<Config, Error> {
    let mut value: Value = serde_json::from_str(&read("configs/v0_1.json")).unwrap();
    let (Value::Object(keys), Value::Object(changes)) = (&mut value, changes) else {
        panic!("objects are expected")
    };
    keys.extend(changes);
    Config::from_json(&value.to_string())
}

fn v0_1_without(key: &str) -> Result<Config, Error> {
    let mut value: Value = serde_json::from_str(&read("configs/v0_1.json")).unwrap();
    value.as_object_mut().unwrap().remove(key).expect("the key is there");
    Config::from_json(&value.to_string())
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data(folder)).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

// ---- files as they occur ------------------------------------------------------------------

/// The sizes in which the files differ.
fn sizes(c: &Config) -> [usize; 14] {
    [
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.attn_layer_period,
        c.attn_layer_offset,
        c.expert_layer_period,
        c.expert_layer_offset,
        c.num_experts,
        c.num_experts_per_tok,
        c.mamba_dt_rank,
        c.vocab_size,
    ]
}

#[test]
fn published_files_parse() {
    let mini = [32, 4096, 14336, 32, 8, 128, 8, 4, 2, 1, 16, 2, 256, 65536];
    let large = [72, 8192, 24576, 64, 8, 128, 8, 4, 2, 1, 16, 2, 512, 65536];
    let dense_9b = [32, 4096, 14336, 32, 8, 128, 8, 4, 2, 1, 1, 1, 256, 65536];
    let dense_3b = [28, 2560, 8192, 20, 1, 128, 14, 7, 2, 1, 1, 1, 160, 65536];
    let tiny = [8, 128, 14336, 2, 1, 64, 4, 2, 2, 1, 4, 2, 8, 65536];
    let files = [
        ("v0_1.json", mini, false, vec![2]),
        ("v0_1_first_release.json", mini, false, vec![2]),
        ("large_398b.json", large, false, vec![2]),
        ("dense_9b.json", dense_9b, false, vec![2]),
        ("reasoning_3b.json", dense_3b, true, vec![2, 519]),
        ("transformers_5_style.json", dense_3b, true, vec![2, 519]),
        ("tiny_random.json", tiny, false, vec![2]),
    ];
    for (file, expected, tied, eos) in &files {
        let config = parse(&format!("configs/{file}"));
        assert_eq!(sizes(&config), *expected, "{file}");
        assert_eq!(config.tie_word_embeddings, *tied, "{file}");
        assert_eq!(config.eos_token_ids, *eos, "{file}");
        assert_eq!(config.bos_token_id, Some(1), "{file}");
        assert_eq!(
            (config.mamba_d_state, config.mamba_d_conv, config.mamba_expand),
            (16, 4, 2),
            "{file}"
        );
        assert_eq!((config.mamba_conv_bias, config.mamba_proj_bias), (true, false), "{file}");
        assert_eq!(config.rms_norm_eps, 1e-6, "{file}");
        assert_eq!(config.max_position_embeddings, Some(262_144), "{file}");
        assert_eq!(config.dtype, Some(Dtype::Bf16), "{file}");
    }
    let mut all: Vec<_> = files.iter().map(|(file, ..)| file.to_string()).collect();
    all.push("bnb_4bit.json".into());
    all.sort();
    let found: Vec<_> =
        names_in("configs").into_iter().filter(|name| name.ends_with(".json")).collect();
    assert_eq!(found, all, "every file has its row");
}

#[test]
fn golden_files_parse() {
    let models = [
        ("odd-shapes", [5, 72, 100, 6, 3, 12, 3, 2, 3, 0, 5, 3, 5, 101]),
        ("paper-block", [8, 64, 32, 4, 2, 16, 8, 4, 2, 1, 16, 2, 8, 160]),
        ("pure-attention", [4, 64, 32, 4, 2, 16, 1, 0, 2, 1, 4, 2, 8, 160]),
        ("pure-mamba", [4, 64, 32, 4, 2, 16, 5, 4, 2, 1, 1, 2, 8, 160]),
        ("reasoning-dense", [7, 64, 32, 4, 1, 16, 7, 3, 2, 1, 1, 2, 8, 160]),
        ("sharded-bf16", [8, 64, 32, 4, 2, 16, 8, 4, 2, 1, 16, 2, 8, 160]),
        ("top1-every-layer", [4, 64, 32, 4, 2, 16, 2, 1, 1, 0, 4, 1, 8, 160]),
    ];
    for (name, expected) in models {
        let path = format!("golden/{name}");
        let config = Config::from_folder(data(&path)).unwrap();
        assert_eq!(config, parse(&format!("{path}/config.json")));
        assert_eq!(sizes(&config), expected, "{name}");
        assert_eq!(config.tie_word_embeddings, name == "reasoning-dense", "{name}");
        let dtype = if name == "sharded-bf16" { Dtype::Bf16 } else { Dtype::F32 };
        assert_eq!(config.dtype, Some(dtype), "{name}");
        let (d_state, d_conv) = if name == "odd-shapes" { (8, 3) } else { (16, 4) };
        assert_eq!((config.mamba_d_state, config.mamba_d_conv), (d_state, d_conv), "{name}");
        let biases = (config.mamba_conv_bias, config.mamba_proj_bias);
        assert_eq!(biases, if name == "odd-shapes" { (false, true) } else { (true, false) });
    }
    let names = models.map(|(name, _)| name.to_string());
    assert_eq!(names_in("golden"), names, "every folder has its row");
}

#[test]
fn a_quantised_checkpoint_is_refused() {
    let error = Config::from_json(&read("configs/bnb_4bit.json")).unwrap_err();
    assert!(
        matches!(&error, Error::Config { field: "quantization_config.quant_method", value, .. }
            if value == "\"bitsandbytes\""),
        "{error}"
    );
    assert!(error.to_string().contains("F32, F16 or BF16"), "{error}");
}

// ---- what may be left out, and how it may be written --------------------------------------

#[test]
fn unknown_keys_are_ignored() {
    let config =
        v0_1_with(json!({"router_jitter": 1e99, "auto_map": null, "later": {"a": [1]}})).unwrap();
    assert_eq!(config, parse("configs/v0_1.json"));
}

#[test]
fn the_least_file_has_the_defaults_of_transformers() {
    let least = json!({
        "vocab_size": 65536,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    });
    let config = Config::from_json(&least.to_string()).unwrap();
    let published = parse("configs/v0_1.json");
    // Neither decides what is computed, so neither is made up.
    assert_eq!((config.max_position_embeddings, config.dtype), (None, None));
    let (max_position_embeddings, dtype) = (published.max_position_embeddings, published.dtype);
    assert_eq!(with_labels(config, max_position_embeddings, dtype), published);
}

fn with_labels(mut config: Config, context: Option<usize>, dtype: Option<Dtype>) -> Config {
    config.max_position_embeddings = context;
    config.dtype = dtype;
    config
}

#[test]
fn key_value_heads_may_be_null_or_absent() {
    let kv_heads = |config: Result<Config, Error>| config.unwrap().num_key_value_heads;
    assert_eq!(kv_heads(v0_1_with(json!({"num_key_value_heads": null}))), 32);
    assert_eq!(kv_heads(v0_1_without("num_key_value_heads")), 8);
    assert_eq!(kv_heads(v0_1_with(json!({"num_key_value_heads": 4}))), 4);
}

#[test]
fn dt_rank_may_be_auto_null_or_absent() {
    let rank = |config: Result<Config, Error>| config.unwrap().mamba_dt_rank;
    assert_eq!(rank(v0_1_with(json!({"mamba_dt_rank": 7}))), 7);
    assert_eq!(rank(v0_1_with(json!({"mamba_dt_rank": "auto"}))), 256);
    assert_eq!(rank(v0_1_with(json!({"mamba_dt_rank": null}))), 256);
    assert_eq!(rank(v0_1_without("mamba_dt_rank")), 256);
    let odd = json!({"mamba_dt_rank": "auto", "hidden_size": 72, "num_attention_heads": 8});
    assert_eq!(rank(v0_1_with(odd)), 5, "72 / 16, rounded up");
}

#[test]
fn head_dim_may_be_given() {
    let given = json!({"head_dim": 96, "num_attention_heads": 24});
    let config = v0_1_with(given).unwrap();
    assert_eq!((config.head_dim, config.q_width(), config.kv_width()), (96, 24 * 96, 8 * 96));
    assert_eq!(v0_1_with(json!({"head_dim": null})).unwrap().head_dim, 128);
}

#[test]
fn dtype_has_two_names_and_the_new_one_wins() {
    let dtype = |changes| v0_1_with(changes).unwrap().dtype;
    assert_eq!(dtype(json!({"torch_dtype": "float16"})), Some(Dtype::F16));
    assert_eq!(dtype(json!({"torch_dtype": "float16", "dtype": "float32"})), Some(Dtype::F32));
    assert_eq!(dtype(json!({"torch_dtype": "float16", "dtype": null})), Some(Dtype::F16));
    assert_eq!(dtype(json!({"torch_dtype": null})), None);
}

#[test]
fn context_has_two_names() {
    let context = |changes| v0_1_with(changes).unwrap().max_position_embeddings;
    assert_eq!(context(json!({"max_position_embeddings": null, "n_ctx": 512})), Some(512));
    assert_eq!(context(json!({"n_ctx": 512})), Some(262_144));
    assert_eq!(v0_1_without("max_position_embeddings").unwrap().max_position_embeddings, None);
}

#[test]
fn special_tokens_may_be_one_many_or_none() {
    let eos = |config: Result<Config, Error>| config.unwrap().eos_token_ids;
    assert_eq!(eos(v0_1_with(json!({"eos_token_id": 7}))), [7]);
    assert_eq!(eos(v0_1_with(json!({"eos_token_id": [7, 65535]}))), [7, 65535]);
    assert_eq!(eos(v0_1_with(json!({"eos_token_id": []}))), [0; 0]);
    assert_eq!(eos(v0_1_with(json!({"eos_token_id": null}))), [0; 0]);
    assert_eq!(eos(v0_1_without("eos_token_id")), [2]);
    assert_eq!(v0_1_with(json!({"bos_token_id": null})).unwrap().bos_token_id, None);
    assert_eq!(v0_1_without("bos_token_id").unwrap().bos_token_id, Some(1));
}

#[test]
fn sizes_of_experts_do_not_matter_without_experts() {
    for num_experts in [0, 1] {
        let changes = json!({"num_experts": num_experts, "num_experts_per_tok": 0});
        assert_eq!(v0_1_with(changes).unwrap().num_experts, num_experts);
    }
}

// ---- folders ------------------------------------------------------------------------------

fn folder(config: &str, generation: Option<&str>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    if let Some(text) = generation {
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
    }
    folder
}

#[test]
fn generation_config_replaces_the_eos_tokens() {
    let text = read("configs/v0_1.json");
    let eos = |generation| {
        let folder = folder(&text, generation);
        Config::from_folder(folder.path()).map(|config| config.eos_token_ids)
    };
    assert_eq!(eos(None).unwrap(), [2]);
    assert_eq!(eos(Some(r#"{"eos_token_id": [2, 519]}"#)).unwrap(), [2, 519]);
    assert_eq!(eos(Some(r#"{"eos_token_id": 9}"#)).unwrap(), [9]);
    assert_eq!(eos(Some(r#"{"eos_token_id": null}"#)).unwrap(), [2]);
    assert_eq!(eos(Some(r#"{"temperature": 0.5}"#)).unwrap(), [2]);

    let beyond = eos(Some(r#"{"eos_token_id": 65536}"#)).unwrap_err();
    let file = "generation_config.json";
    assert_message_of(file, &beyond, "eos_token_id", "65536", "below vocab_size (65536)");
    let list = eos(Some("[2]")).unwrap_err();
    assert_message_of(file, &list, "the whole", "a list", "a JSON object");
    let broken = eos(Some("{")).unwrap_err();
    assert!(broken.to_string().contains("generation_config.json"), "{broken}");
}

#[test]
fn a_folder_without_a_config_is_an_error() {
    let empty = tempfile::tempdir().unwrap();
    let error = Config::from_folder(empty.path()).unwrap_err();
    assert!(matches!(error, Error::Missing { wanted: "config.json", .. }), "{error}");

    let error = Config::from_folder(empty.path().join("nowhere")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(error.to_string().contains("nowhere"), "{error}");

    let file = empty.path().join("model.safetensors");
    std::fs::write(&file, "").unwrap();
    let error = Config::from_folder(&file).unwrap_err();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}

#[test]
fn text_that_is_not_json_is_an_error() {
    let nan = read("configs/v0_1.json").replace("1e-06", "NaN");
    let cut = &read("configs/v0_1.json")[..200];
    let deep = "[".repeat(100_000);
    for text in [nan.as_str(), cut, deep.as_str(), "", "{\"hidden_size\": 1,}", "\u{feff}{}"] {
        let error = Config::from_json(text).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{error}");
        assert!(error.to_string().contains("config.json"), "{error}");

        let folder = folder(text, None);
        let error = Config::from_folder(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), b"{\"\xff\": 1}").unwrap();
    assert!(matches!(Config::from_folder(folder.path()), Err(Error::Json { .. })));
}

// ---- refusals -----------------------------------------------------------------------------

/// An [`Error::Config`] about `field` whose message has its name, its value and what is allowed.
#[track_caller]
fn assert_message(error: &Error, field: &str, value: &str, allowed: &str) {
    assert_message_of("config.json", error, field, value, allowed);
}

#[track_caller]
fn assert_message_of(file: &str, error: &Error, field: &str, value: &str, allowed: &str) {
    let message = error.to_string();
    assert!(matches!(error, Error::Config { .. }), "{message}");
    let start = format!("`{field}` of {file} is {value}, but ");
    assert!(message.starts_with(&start), "{message:?} does not start with {start:?}");
    assert!(message.contains(allowed), "{message:?} does not contain {allowed:?}");
}

#[test]
fn values_that_cannot_be_run_are_refused() {
    let k = "num_experts_per_tok";
    let rows = [
        // Rules between fields.
        (json!({"attn_layer_offset": 8}), "attn_layer_offset", "8", "below attn_layer_period (8)"),
        (
            json!({"expert_layer_offset": 3}),
            "expert_layer_offset",
            "3",
            "below expert_layer_period (2)",
        ),
        (json!({"num_key_value_heads": 5}), "num_key_value_heads", "5", "num_attention_heads (32)"),
        (
            json!({"num_key_value_heads": 64}),
            "num_key_value_heads",
            "64",
            "divide num_attention_heads (32)",
        ),
        (
            json!({"num_attention_heads": 48}),
            "num_attention_heads",
            "48",
            "divide hidden_size (4096) where head_dim is not given",
        ),
        (json!({k: 17}), k, "17", "1 to num_experts (16)"),
        (json!({k: 0}), k, "0", "1 to num_experts (16)"),
        (json!({"eos_token_id": 65536}), "eos_token_id", "65536", "below vocab_size (65536)"),
        (json!({"eos_token_id": [2, 70000]}), "eos_token_id", "70000", "below vocab_size (65536)"),
        (json!({"bos_token_id": 65536}), "bos_token_id", "65536", "below vocab_size (65536)"),
        (
            json!({"num_attention_heads": 1 << 14, "head_dim": 128}),
            "num_attention_heads",
            "16384",
            "times head_dim (128) it must not pass 1048576",
        ),
        (
            json!({"num_key_value_heads": 1 << 14, "head_dim": 128}),
            "num_key_value_heads",
            "16384",
            "times head_dim (128) it must not pass 1048576",
        ),
        (
            json!({"mamba_expand": 1024}),
            "mamba_expand",
            "1024",
            "times hidden_size (4096) it must not pass 1048576",
        ),
        (
            json!({"num_experts": 4096, "num_hidden_layers": 4096}),
            "num_experts",
            "4096",
            "times num_hidden_layers (4096) it must not pass 262144",
        ),
        // What would compute something else than the model it came from.
        (json!({"model_type": "llama"}), "model_type", "\"llama\"", "only \"jamba\""),
        (json!({"model_type": 3}), "model_type", "3", "only \"jamba\""),
        (json!({"hidden_act": "gelu"}), "hidden_act", "\"gelu\"", "only \"silu\""),
        (json!({"sliding_window": 4096}), "sliding_window", "4096", "only null"),
        (
            json!({"mamba_inner_layernorms": false}),
            "mamba_inner_layernorms",
            "false",
            "only true is supported",
        ),
        (
            json!({"quantization_config": {}}),
            "quantization_config.quant_method",
            "missing",
            "not supported",
        ),
        // JSON of another type.
        (json!({"hidden_size": "4096"}), "hidden_size", "\"4096\"", "a whole number"),
        (json!({"hidden_size": [4096]}), "hidden_size", "[4096]", "a whole number"),
        (json!({"num_hidden_layers": true}), "num_hidden_layers", "true", "a whole number"),
        (json!({"mamba_d_state": {"a": 1}}), "mamba_d_state", "{\"a\":1}", "a whole number"),
        (json!({"mamba_dt_rank": "all"}), "mamba_dt_rank", "\"all\"", "a whole number or \"auto\""),
        (json!({"mamba_dt_rank": -1}), "mamba_dt_rank", "-1", "a whole number or \"auto\""),
        (json!({"mamba_conv_bias": 1}), "mamba_conv_bias", "1", "true or false"),
        (json!({"mamba_proj_bias": "no"}), "mamba_proj_bias", "\"no\"", "true or false"),
        (json!({"tie_word_embeddings": 0}), "tie_word_embeddings", "0", "true or false"),
        (json!({"mamba_inner_layernorms": 0}), "mamba_inner_layernorms", "0", "true or false"),
        (json!({"rms_norm_eps": "1e-6"}), "rms_norm_eps", "\"1e-6\"", "a number"),
        (json!({"bos_token_id": [1]}), "bos_token_id", "[1]", "a token id"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id", "\"</s>\"", "a token id or a list"),
        (json!({"eos_token_id": [2, -1]}), "eos_token_id", "[2,-1]", "a token id or a list"),
        (json!({"torch_dtype": "int8"}), "torch_dtype", "\"int8\"", "float32, float16 or bfloat16"),
        (json!({"dtype": 16}), "dtype", "16", "float32, float16 or bfloat16"),
        // Numbers that are no sizes.
        (json!({"hidden_size": -4096}), "hidden_size", "-4096", "a whole number"),
        (json!({"hidden_size": 4096.0}), "hidden_size", "4096.0", "a whole number"),
        (json!({"hidden_size": 1e30}), "hidden_size", "1e+30", "a whole number"),
        (json!({"attn_layer_offset": -1}), "attn_layer_offset", "-1", "a whole number"),
        (json!({"num_experts": -1}), "num_experts", "-1", "a whole number"),
        (json!({"max_position_embeddings": -1}), "max_position_embeddings", "-1", "a whole number"),
        (json!({"bos_token_id": 4_294_967_297u64}), "bos_token_id", "4294967297", "a token id"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps", "0", "positive and finite"),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps", "-0.000001", "positive and finite"),
        (json!({"rms_norm_eps": 1e-60}), "rms_norm_eps", "0", "positive and finite"),
        (json!({"rms_norm_eps": 1e300}), "rms_norm_eps", "inf", "positive and finite"),
    ];
    for (changes, field, value, allowed) in rows {
        match v0_1_with(changes.clone()) {
            Ok(_) => panic!("{changes} was accepted"),
            Err(error) => assert_message(&error, field, value, allowed),
        }
    }
}

#[test]
fn sizes_have_bounds() {
    let width = 1 << 20;
    let rows = [
        ("vocab_size", 1 << 24),
        ("hidden_size", width),
        ("intermediate_size", width),
        ("num_hidden_layers", 4096),
        ("num_attention_heads", width),
        ("num_key_value_heads", width),
        ("head_dim", width),
        ("attn_layer_period", width),
        ("expert_layer_period", width),
        ("mamba_d_state", 4096),
        ("mamba_d_conv", 4096),
        ("mamba_expand", 4096),
        ("mamba_dt_rank", width),
    ];
    for (field, max) in rows {
        for value in [0, max as u64 + 1, u64::MAX] {
            // With a head_dim of its own the number of heads need not divide hidden_size.
            let mut changes = json!({"head_dim": 1});
            changes[field] = value.into();
            let error = v0_1_with(changes).unwrap_err();
            assert_message(&error, field, &value.to_string(), &format!("1 to {max} is allowed"));
        }
    }
    for value in [4097, u64::MAX] {
        let error = v0_1_with(json!({"num_experts": value})).unwrap_err();
        assert_message(&error, "num_experts", &value.to_string(), "0 to 4096 is allowed");
    }
    let error = v0_1_with(json!({"num_attention_heads": 0})).unwrap_err();
    assert_message(&error, "num_attention_heads", "0", "divide hidden_size (4096)");
}

#[test]
fn absent_sizes_are_those_of_v0_1_but_null_is_refused() {
    let v0_1 = parse("configs/v0_1.json");
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ];
    for field in sizes {
        assert_eq!(v0_1_without(field).unwrap(), v0_1, "{field}");
        let error = v0_1_with(json!({field: null})).unwrap_err();
        assert_message(&error, field, "null", "a whole number is expected");
    }
}

#[test]
fn other_top_levels_are_refused() {
    let rows = [
        ("[]", "a list"),
        ("null", "null"),
        ("3", "a number"),
        ("\"jamba\"", "a string"),
        ("true", "a boolean"),
    ];
    for (text, kind) in rows {
        let error = Config::from_json(text).unwrap_err();
        assert_message(&error, "the whole", kind, "a JSON object is expected");
    }
}

#[test]
fn long_values_are_cut_in_messages() {
    let error = v0_1_with(json!({"hidden_size": "é".repeat(10_000)})).unwrap_err();
    assert!(error.to_string().len() < 300, "{error}");
    let error = v0_1_with(json!({"hidden_size": vec![1; 10_000]})).unwrap_err();
    assert!(error.to_string().len() < 300, "{error}");
}

#[test]
fn a_changed_config_is_checked_again() {
    let valid = parse("configs/v0_1.json");
    type Change = fn(&mut Config);
    let changes: [(&str, Change); 5] = [
        ("attn_layer_offset", |c| c.attn_layer_offset = 8),
        ("head_dim", |c| c.head_dim = 0),
        ("rms_norm_eps", |c| c.rms_norm_eps = f32::NAN),
        ("eos_token_id", |c| c.eos_token_ids.push(u32::MAX)),
        ("bos_token_id", |c| c.bos_token_id = Some(65_536)),
    ];
    for (name, change) in changes {
        let mut config = valid.clone();
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert!(matches!(error, Error::Config { field, .. } if field == name), "{error}");
    }
}

// ---- the schedule -------------------------------------------------------------------------

fn layers_where(config: &Config, is: impl Fn(LayerKind) -> bool) -> Vec<usize> {
    let schedule = Schedule::new(config);
    assert_eq!(schedule.iter().len(), config.num_hidden_layers);
    schedule.iter().enumerate().filter(|&(_, kind)| is(kind)).map(|(i, _)| i).collect()
}

fn attention(config: &Config) -> Vec<usize> {
    layers_where(config, |kind| kind.mixer == MixerKind::Attention)
}

fn moe(config: &Config) -> Vec<usize> {
    layers_where(config, |kind| kind.feed_forward == FeedForwardKind::Moe)
}

#[test]
fn periods_and_offsets_give_the_layers() {
    let odd_to = |n| (1..n).step_by(2).collect::<Vec<_>>();
    let rows = [
        ("configs/v0_1.json", vec![4, 12, 20, 28], odd_to(32)),
        ("configs/large_398b.json", (4..72).step_by(8).collect(), odd_to(72)),
        ("configs/dense_9b.json", vec![4, 12, 20, 28], vec![]),
        ("configs/reasoning_3b.json", vec![7, 21], vec![]),
        ("configs/tiny_random.json", vec![2, 6], odd_to(8)),
        ("golden/odd-shapes/config.json", vec![2], vec![0, 3]),
        ("golden/paper-block/config.json", vec![4], odd_to(8)),
        ("golden/pure-attention/config.json", vec![0, 1, 2, 3], vec![1, 3]),
        ("golden/pure-mamba/config.json", vec![], vec![]),
        ("golden/reasoning-dense/config.json", vec![3], vec![]),
        ("golden/top1-every-layer/config.json", vec![1, 3], vec![0, 1, 2, 3]),
    ];
    for (path, attention_layers, moe_layers) in rows {
        let config = parse(path);
        assert_eq!(attention(&config), attention_layers, "{path}");
        assert_eq!(moe(&config), moe_layers, "{path}");

        let schedule = Schedule::new(&config);
        assert_eq!(schedule.attention_layers(), attention_layers.len(), "{path}");
        assert_eq!(schedule.mamba_layers(), config.num_hidden_layers - attention_layers.len());
        assert_eq!(schedule.moe_layers(), moe_layers.len(), "{path}");
    }
}

#[test]
fn fewer_than_two_experts_are_dense() {
    for num_experts in [0, 1] {
        assert_eq!(moe(&v0_1_with(json!({"num_experts": num_experts})).unwrap()), [0; 0]);
    }
    let two = v0_1_with(json!({"num_experts": 2})).unwrap();
    assert_eq!(moe(&two), (1..32).step_by(2).collect::<Vec<_>>());
}

#[test]
fn a_period_beyond_the_layers_gives_none() {
    let changes = json!({
        "attn_layer_period": 1000, "attn_layer_offset": 999,
        "expert_layer_period": 1000, "expert_layer_offset": 31,
    });
    let config = v0_1_with(changes).unwrap();
    assert_eq!((attention(&config), moe(&config)), (vec![], vec![31]));
}
