//! Text that is held to schemas, regular expressions and grammars.

use jamba_core::grammar::{Grammar, GrammarState};
use jamba_core::{
    BeamOptions, Engine, EngineOptions, Error, FinishReason, GenerateOptions, Generator,
    LanguageModel, Model, Request, Sampler, Sampling, SessionOptions, Tokenizer, beam_search,
    generate,
};
use jamba_cpu::CpuBackend;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::{Map, Value, json};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");

fn demo() -> Tokenizer {
    Tokenizer::from_folder(DEMO).unwrap()
}

fn model() -> Model<CpuBackend> {
    Model::load(DEMO, CpuBackend::new()).unwrap()
}

/// A tokenizer as SentencePiece has it: words with their space, and a token for each byte.
fn sentence_piece() -> Tokenizer {
    let words =
        ["<s>", "</s>", "\u{2581}", "\u{2581}the", "{\"", "\":", "\u{2581}1", "a", "é", "狐"];
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let tokens = words.iter().map(|w| w.to_string()).chain(bytes);
    let vocab: Map<String, Value> = tokens.enumerate().map(|(i, t)| (t, json!(i))).collect();
    let special = |id: u32| {
        json!({"id": id, "content": words[id as usize], "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [special(0), special(1)],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

const EOS: u32 = 1;

/// What a model of no understanding writes: random logits. The text, and whether it ended.
fn babble(tokenizer: &Tokenizer, grammar: &Grammar, seed: u64, tokens: usize) -> (String, bool) {
    let vocab = tokenizer.vocab_size();
    let sampling = Sampling { seed, temperature: 2.0, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, vocab).unwrap();
    let mut random = seed | 1;
    let mut logits = vec![0.0; vocab];
    let (mut state, mut ids): (GrammarState, _) = (grammar.start(), Vec::new());
    while ids.len() < tokens && !state.is_complete() {
        for logit in &mut logits {
            random = random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            *logit = (random >> 40) as f32 / (1 << 22) as f32;
        }
        let allowed = state.mask(&[EOS]).unwrap().to_vec();
        let id = sampler.sample_among(&logits, &allowed).unwrap().id;
        if id == EOS {
            assert!(state.may_end().unwrap());
            return (tokenizer.decode(&ids).unwrap(), true);
        }
        state.push(id).unwrap();
        ids.push(id);
    }
    (tokenizer.decode(&ids).unwrap(), state.is_complete())
}

/// Random schemas of what has an end: their texts are bounded.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({ "type": "boolean" })),
        Just(json!({ "type": "null" })),
        (-500i64..500, 0i64..1000).prop_map(|(least, more)| {
            json!({ "type": "integer", "minimum": least, "maximum": least + more })
        }),
        (0u64..3, 0u64..5).prop_map(|(least, more)| {
            json!({ "type": "string", "minLength": least, "maxLength": least + more })
        }),
        proptest::collection::vec("[a-z \"\\\\\u{e9}\u{72d0}]{0,6}", 1..4)
            .prop_map(|words| json!({ "enum": words })),
        (-9i64..9).prop_map(|value| json!({ "const": { "x": value } })),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let members = proptest::collection::btree_map("[a-zA-Z_\u{fc}]{1,6}", inner.clone(), 0..4);
        prop_oneof![
            (members, any::<u8>()).prop_map(|(members, needed)| {
                let names = members.keys().enumerate();
                let required: Vec<_> =
                    names.filter(|(i, _)| needed >> (i % 8) & 1 == 1).map(|(_, name)| name).collect();
                json!({
                    "type": "object", "properties": members.clone(), "required": required,
                    "additionalProperties": false,
                })
            }),
            (inner.clone(), 0u64..3, 0u64..3).prop_map(|(items, least, more)| {
                json!({ "type": "array", "items": items, "minItems": least, "maxItems": least + more })
            }),
            proptest::collection::vec(inner, 1..3).prop_map(|any| json!({ "anyOf": any })),
        ]
    })
}

/// Whether a value is valid, for the keywords above.
fn is_valid(schema: &Value, value: &Value) -> bool {
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| is_valid(schema, value));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    if let Some(constant) = schema.get("const") {
        return constant == value;
    }
    let within = |least: &str, most: &str, size: i64| {
        schema[least].as_i64().is_none_or(|least| size >= least)
            && schema[most].as_i64().is_none_or(|most| size <= most)
    };
    match schema["type"].as_str().unwrap() {
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "integer" => value.as_i64().is_some_and(|v| within("minimum", "maximum", v)),
        "string" => value
            .as_str()
            .is_some_and(|text| within("minLength", "maxLength", text.chars().count() as i64)),
        "array" => value.as_array().is_some_and(|items| {
            within("minItems", "maxItems", items.len() as i64)
                && items.iter().all(|item| is_valid(&schema["items"], item))
        }),
        "object" => value.as_object().is_some_and(|fields| {
            let known = &schema["properties"];
            let mut required = schema["required"].as_array().unwrap().iter();
            required.all(|name| fields.contains_key(name.as_str().unwrap()))
                && fields.iter().all(|(name, value)| {
                    known.get(name).is_some_and(|schema| is_valid(schema, value))
                })
        }),
        other => panic!("{other}"),
    }
}

fn check_valid(schema: &Value, text: &str) -> Result<(), TestCaseError> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| TestCaseError::fail(format!("{text:?}: {error}")))?;
    prop_assert!(is_valid(schema, &value), "{text} for {schema}");
    Ok(())
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(8), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(96))]

    /// Both kinds of vocabularies: bytes as letters, and words beside bytes.
    #[test]
    fn whatever_is_written_is_valid(schema in schema(), seed in any::<u64>()) {
        for tokenizer in [demo(), sentence_piece()] {
            let grammar = Grammar::json_schema(&tokenizer, &schema).unwrap();
            let (text, has_ended) = babble(&tokenizer, &grammar, seed, 4000);
            prop_assert!(has_ended, "{text:?}");
            check_valid(&schema, &text)?;
        }
    }
}

/// The demo model knows nothing of JSON, and is hot.
#[test]
fn a_model_is_held_to_its_schema() {
    let (model, tokenizer) = (model(), demo());
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "kind": { "enum": ["fox", "owl"] },
            "friends": { "type": "array", "items": { "type": "string", "maxLength": 5 }, "maxItems": 2 },
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    });
    let grammar = Some(Grammar::json_schema(&tokenizer, &schema).unwrap());
    let options = |seed, temperature| GenerateOptions {
        sampling: Sampling { seed, temperature, ..Sampling::default() },
        max_tokens: 400,
        grammar: grammar.clone(),
        ..GenerateOptions::default()
    };
    let prompt = tokenizer.encode("A hero:\n").unwrap();
    let context = prompt.len() + 400;
    let limits = EngineOptions { slots: 3, context, ..EngineOptions::default() };
    let engine = Engine::new(&model, &tokenizer, limits).unwrap();
    // Greedy ones share their steps with others, and some have no grammar.
    let cases: Vec<_> = (0..9).map(|seed| (seed, if seed % 3 == 0 { 0.0 } else { 3.0 })).collect();
    let free = GenerateOptions { grammar: None, max_tokens: 30, ..options(1, 0.0) };
    let beside = engine.submit(Request::new(prompt.clone(), free.clone())).unwrap();
    let streams: Vec<_> = cases
        .iter()
        .map(|&(seed, heat)| {
            engine.submit(Request::new(prompt.clone(), options(seed, heat))).unwrap()
        })
        .collect();
    let mut session = model.session(SessionOptions { context, ..Default::default() }).unwrap();
    for (stream, (seed, heat)) in streams.into_iter().zip(cases) {
        let told = stream.collect_all().unwrap();
        session.reset().unwrap();
        let alone = generate(&mut session, &tokenizer, "A hero:\n", options(seed, heat)).unwrap();
        assert_eq!((&told.ids, &told.text), (&alone.ids, &alone.text));
        assert_eq!(alone.finish_reason, FinishReason::Grammar, "{}", alone.text);
        let value = serde_json::from_str(&alone.text).unwrap();
        assert!(is_valid(&schema, &value), "{}", alone.text);
    }
    session.reset().unwrap();
    let alone = generate(&mut session, &tokenizer, "A hero:\n", free).unwrap();
    assert_eq!(beside.collect_all().unwrap().ids, alone.ids);
}

#[test]
fn regular_expressions_and_grammars() {
    for tokenizer in [demo(), sentence_piece()] {
        let regex = Grammar::regex(&tokenizer, "[0-9]{3}-(the|[a-c]é)+;").unwrap();
        // Sums of numbers, in parentheses or not.
        let lark = "start: sum\nsum: item (\"+\" item)*\nitem: /[0-9]{1,2}/ | \"(\" sum \")\"\n";
        let lark = Grammar::lark(&tokenizer, lark).unwrap();
        for seed in 0..20 {
            let (text, has_ended) = babble(&tokenizer, &regex, seed, 2000);
            assert!(has_ended, "{text}");
            let (number, rest) = text.split_at(3);
            assert!(number.bytes().all(|b| b.is_ascii_digit()), "{text}");
            let mut rest = rest.strip_prefix('-').unwrap().strip_suffix(';').unwrap();
            assert!(!rest.is_empty());
            while !rest.is_empty() {
                let parts = ["the", "aé", "bé", "cé"].iter();
                rest = parts.filter_map(|part| rest.strip_prefix(part)).next().expect(&text);
            }

            let (text, has_ended) = babble(&tokenizer, &lark, seed, 200);
            let depth = text.bytes().try_fold(0i32, |depth, b| match b {
                b'(' => Some(depth + 1),
                b')' => Some(depth - 1).filter(|depth| *depth >= 0),
                _ => Some(depth),
            });
            assert!(text.bytes().all(|b| b.is_ascii_digit() || b"+()".contains(&b)), "{text}");
            assert!(depth.is_some_and(|depth| depth == 0 || !has_ended), "{text}");
            assert!(!text.contains("()") && !text.contains("++") && !text.contains(")("), "{text}");
        }
    }
}

#[test]
fn what_follows_a_tag_is_held() {
    let tokenizer = demo();
    let digits = Grammar::regex(&tokenizer, "[0-9]{2}").unwrap();
    for tag in ["</think>", "<|endoftext|>"] {
        let after = digits.after(tag).unwrap();
        let mut state = after.start();
        for id in tokenizer.encode_plain("Let me <think: ").unwrap() {
            state.push(id).unwrap();
        }
        assert!(!state.may_end().unwrap());
        for id in tokenizer.encode_plain(&format!("{tag}\n")).unwrap() {
            state.push(id).unwrap();
        }
        assert!(state.clone().push(tokenizer.encode_plain("x").unwrap()[0]).is_err());
        for digit in ["4", "2"] {
            let id = tokenizer.encode_plain(digit).unwrap();
            state.push(id[0]).unwrap();
        }
        assert!(state.is_complete());
    }
    assert!(matches!(digits.after(""), Err(Error::Grammar { .. })));
}

#[test]
fn states_fork_and_rewind() {
    let tokenizer = demo();
    let grammar = Grammar::regex(&tokenizer, "(ab|cd){3}").unwrap();
    let id = |text: &str| tokenizer.encode_plain(text).unwrap();
    let mut state = grammar.start();
    let fresh = state.mask(&[EOS]).unwrap().to_vec();
    id("ab").into_iter().for_each(|id| state.push(id).unwrap());
    let between = state.mask(&[EOS]).unwrap().to_vec();
    let mut fork = state.clone();
    let letters: Vec<u32> = ["c", "d"].iter().flat_map(|letter| id(letter)).collect();
    letters.iter().for_each(|id| fork.push(*id).unwrap());
    assert_eq!(state.mask(&[EOS]).unwrap(), between);
    fork.rewind(letters.len()).unwrap();
    assert_eq!(fork.mask(&[EOS]).unwrap(), between);
    fork.rewind(id("ab").len()).unwrap();
    assert_eq!(fork.mask(&[EOS]).unwrap(), fresh);
    assert!(matches!(fork.rewind(1), Err(Error::Grammar { .. })));
    assert!(state.push(id("x")[0]).is_err());
}

#[test]
fn the_text_may_end_only_where_the_grammar_does() {
    let tokenizer = demo();
    let grammar = Grammar::regex(&tokenizer, "a*").unwrap();
    let mut state = grammar.start();
    let has = |mask: &[u32], id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
    let eos = tokenizer.eos_id().unwrap();
    assert!(has(state.mask(&[eos]).unwrap(), eos));
    assert!(!has(state.mask(&[]).unwrap(), eos));
    let mut state = Grammar::regex(&tokenizer, "a+").unwrap().start();
    assert!(!has(state.mask(&[eos]).unwrap(), eos));

    // With nothing but the end left, and no token for it, the text ends by itself.
    let model = model();
    let mut session = model.session(SessionOptions { context: 64, ..Default::default() }).unwrap();
    let grammar = Some(Grammar::regex(&tokenizer, "ab").unwrap());
    let options = GenerateOptions { grammar, ignore_eos: true, ..GenerateOptions::default() };
    let done = generate(&mut session, &tokenizer, "A", options).unwrap();
    assert_eq!((done.text.as_str(), done.finish_reason), ("ab", FinishReason::Grammar));
}

#[test]
fn beams_follow_a_grammar() {
    let (model, tokenizer) = (model(), demo());
    let schema = json!({ "type": "array", "items": { "enum": ["fox", "owl", "bear"] },
        "minItems": 1, "maxItems": 2, "x-guidance": { "whitespace_flexible": false } });
    let grammar = Some(Grammar::json_schema(&tokenizer, &schema).unwrap());
    let prompt = tokenizer.encode("The animals: ").unwrap();
    let options = BeamOptions { beams: 4, max_tokens: 60, grammar, ..BeamOptions::default() };
    let found = beam_search(&model, &prompt, &options).unwrap();
    assert_eq!(found.len(), 4);
    for (index, hypothesis) in found.iter().enumerate() {
        let text = tokenizer.decode(&hypothesis.ids).unwrap();
        let value = serde_json::from_str(&text).unwrap();
        assert!(is_valid(&schema, &value), "{text}");
        assert!(found[..index].iter().all(|other| other.ids != hypothesis.ids));
    }
}

#[test]
fn what_is_wrong_is_said() {
    let tokenizer = demo();
    let said = |result: jamba_core::Result<Grammar>| result.unwrap_err().to_string();
    for (message, part) in [
        (said(Grammar::regex(&tokenizer, "a(b")), "unclosed group"),
        (said(Grammar::lark(&tokenizer, "start: nowhere\n")), "nowhere"),
        (said(Grammar::lark(&tokenizer, "start: \"a\nb\n")), "1"),
        (said(Grammar::json_schema(&tokenizer, &json!({ "type": "fish" }))), "fish"),
        (said(Grammar::json_schema(&tokenizer, &json!({ "not": {} }))), "not"),
        (said(Grammar::json_schema(&tokenizer, &json!(7))), "grammar: "),
    ] {
        assert!(message.starts_with("grammar: ") && message.contains(part), "{message}");
        assert!(message.len() < 500 && !message.contains("<state>"), "{message}");
    }

    let other = Some(Grammar::regex(&sentence_piece(), "a").unwrap());
    let model = model();
    let mut session = model.session(SessionOptions::default()).unwrap();
    let options = GenerateOptions { grammar: other, ..GenerateOptions::default() };
    let refused = Generator::new(&mut session, &tokenizer, options.clone()).err().unwrap();
    assert!(matches!(refused, Error::Grammar { .. }), "{refused}");
    let engine = Engine::new(&model, &tokenizer, EngineOptions::default()).unwrap();
    let refused = engine.submit(Request::new(vec![1], options)).err().unwrap();
    assert!(matches!(refused, Error::Grammar { .. }), "{refused}");
    // Where a bias forbids what the grammar needs, nothing is written.
    let bias = tokenizer.encode_plain("a").unwrap()[0];
    let sampling = Sampling { logit_bias: vec![(bias, f32::NEG_INFINITY)], ..Sampling::default() };
    let grammar = Some(Grammar::regex(&tokenizer, "a").unwrap());
    let options = GenerateOptions { sampling, grammar, ..GenerateOptions::default() };
    let failed = generate(&mut session, &tokenizer, "A", options).unwrap_err();
    assert!(matches!(failed, Error::Grammar { .. }), "{failed}");
}
