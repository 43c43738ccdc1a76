use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::json;

use super::*;

const REPLACEMENT: char = '\u{FFFD}';

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");

fn demo() -> Tokenizer {
    Tokenizer::from_folder(DEMO).unwrap()
}

fn golden() -> Value {
    read_json(&Path::new(DEMO).join("golden.json")).unwrap().unwrap()
}

fn ids_of(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A tokenizer folder with these two files.
fn folder(tokenizer: &Value, config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

const WORDS: [&str; 10] = [
    "<s>",
    "</s>",
    "\u{2581}",
    "\u{2581}\u{2581}",
    "\u{2581}the",
    "\u{2581}fox",
    "a",
    "é",
    "!",
    "狐",
];
const BYTE: u32 = WORDS.len() as u32;

/// Ten words and the 256 bytes, with the decoder of Llama or of older SentencePiece conversions.
fn sentence_piece(decoder: Value) -> Tokenizer {
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let tokens = WORDS.iter().map(|w| w.to_string()).chain(bytes);
    let vocab: serde_json::Map<String, Value> =
        tokens.enumerate().map(|(i, token)| (token, json!(i))).collect();
    let special = |id: u32| {
        json!({"id": id, "content": WORDS[id as usize], "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [special(0), special(1)], "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
    });
    Tokenizer::from_folder(folder(&tokenizer, &json!({})).path()).unwrap()
}

fn llama() -> Tokenizer {
    sentence_piece(json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]}))
}

fn metaspace() -> Tokenizer {
    sentence_piece(
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
        "split": true}),
    )
}

fn bytes_of(text: &str) -> Vec<u32> {
    text.bytes().map(|b| BYTE + u32::from(b)).collect()
}

/// Every piece, the last from `finish`.
fn stream(decoder: &mut Decoder, ids: &[u32]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    pieces.push(decoder.finish().unwrap());
    pieces
}

#[test]
fn follows_transformers() {
    let (tokenizer, golden) = (demo(), golden());
    for case in golden["greedy"].as_array().unwrap() {
        let prompt = ids_of(&case["prompt_ids"]);
        let ids = ids_of(&case["ids"]);
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap()).unwrap(), prompt);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(stream(&mut tokenizer.decoder(&prompt).unwrap(), &ids).concat(), text);
    }
    for case in golden["nll"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids_of(&case["ids"]));
    }
}

#[test]
fn special_tokens() {
    let tokenizer = demo();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.id("<|endoftext|>"), Some(2));
    assert_eq!(tokenizer.id("no such token"), None);
    assert_eq!(
        (tokenizer.token(2).as_deref(), tokenizer.token(4096)),
        (Some("<|endoftext|>"), None)
    );

    let plain = tokenizer.encode_plain("The fox").unwrap();
    let mut ids = tokenizer.encode("The fox").unwrap();
    assert_eq!(ids, [&[1], &plain[..]].concat());
    ids.extend([2, 1_000_000]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "The fox");
    assert_eq!(tokenizer.decode_with_special(&ids).unwrap(), "<|startoftext|>The fox<|endoftext|>");
    assert_eq!(stream(&mut tokenizer.decoder(&[]).unwrap(), &ids).concat(), "The fox");
    assert_eq!(tokenizer.encode("").unwrap(), [1]);
    assert_eq!(tokenizer.decode(&[]).unwrap(), "");
}

#[test]
fn bos_is_added_once() {
    let mut tokenizer = read_json(&Path::new(DEMO).join("tokenizer.json")).unwrap().unwrap();
    let config = json!({"add_bos_token": true, "bos_token": {"content": "<|startoftext|>"}});
    let first = |tokenizer: &Value, config: &Value| {
        let tokenizer = Tokenizer::from_folder(folder(tokenizer, config).path()).unwrap();
        tokenizer.encode("The fox").unwrap()[..2].to_vec()
    };
    let with_processor = first(&tokenizer, &config);
    assert_eq!(with_processor[0], 1);
    assert_ne!(with_processor[1], 1);

    tokenizer["post_processor"] = Value::Null;
    assert_eq!(first(&tokenizer, &config), with_processor);
    assert_ne!(first(&tokenizer, &json!({"bos_token": "<|startoftext|>"}))[0], 1);
    assert_ne!(first(&tokenizer, &json!({"add_bos_token": true, "bos_token": null}))[0], 1);
}

#[test]
fn nothing_is_truncated_or_padded() {
    let mut tokenizer = read_json(&Path::new(DEMO).join("tokenizer.json")).unwrap().unwrap();
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 3,
        "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"});
    let tokenizer = Tokenizer::from_folder(folder(&tokenizer, &json!({})).path()).unwrap();
    let text = "The little dog was so frightened";
    assert_eq!(tokenizer.encode(text).unwrap(), demo().encode(text).unwrap());
}

#[test]
fn errors_name_the_file() {
    let empty = tempfile::tempdir().unwrap();
    let error = |folder: &Path| Tokenizer::from_folder(folder).err().unwrap();
    assert!(matches!(error(empty.path()), Error::Missing { wanted: "tokenizer.json", .. }));
    assert!(matches!(error(&empty.path().join("absent")), Error::Io { .. }));

    let broken = folder(&json!({"model": 3}), &json!({}));
    assert!(error(broken.path()).to_string().contains("tokenizer.json: "));

    let tokenizer = read_json(&Path::new(DEMO).join("tokenizer.json")).unwrap().unwrap();
    let config = folder(&tokenizer, &json!({"bos_token": 7}));
    assert!(matches!(error(config.path()), Error::Config { field: "bos_token", .. }));
    let config = folder(&tokenizer, &json!({"add_bos_token": "yes"}));
    assert!(matches!(error(config.path()), Error::Config { field: "add_bos_token", .. }));
    let config = folder(&tokenizer, &json!({"add_bos_token": true, "bos_token": "<s>"}));
    assert!(error(config.path()).to_string().contains("`<s>` is not in the vocabulary"));
}

#[test]
fn a_leading_space_is_dropped_at_the_beginning_of_a_text_only() {
    let ids = [0, 4, 5, 2, 5, 0, 3, 4, 1];
    for (tokenizer, whole) in [(llama(), "the fox  fox   the"), (metaspace(), "the fox  fox   the")]
    {
        assert_eq!(tokenizer.decode(&ids).unwrap(), whole);
        let pieces = stream(&mut tokenizer.decoder(&[]).unwrap(), &ids);
        assert_eq!(pieces, ["", "the", " fox", " ", " fox", "", "  ", " the", "", ""]);

        let mut decoder = tokenizer.decoder(&[0, 6]).unwrap();
        assert_eq!(stream(&mut decoder, &[4, 8]), [" the", "!", ""]);
        // After `finish` a new text begins.
        assert_eq!(stream(&mut decoder, &[4, 8]), ["the", "!", ""]);
    }
}

#[test]
fn a_character_is_never_split() {
    let fox = bytes_of("🦊");
    for tokenizer in [llama(), demo()] {
        let fox = if tokenizer.vocab_size() == 4096 {
            tokenizer.encode_plain("🦊").unwrap()
        } else {
            fox.clone()
        };
        assert_eq!(fox.len(), 4);
        let mut decoder = tokenizer.decoder(&[]).unwrap();
        // The second fox belongs to the run of bytes of the first.
        for _ in 0..3 {
            let pieces: Vec<_> = fox.iter().map(|&id| decoder.push(id).unwrap()).collect();
            assert_eq!(pieces, ["", "", "", "🦊"]);
        }
        assert_eq!(decoder.finish().unwrap(), "");
        // The ids before may end within a character.
        let pieces = stream(&mut tokenizer.decoder(&fox[..3]).unwrap(), &fox[3..]);
        assert_eq!(pieces, ["🦊", ""]);
        // A character that is never completed.
        let pieces = stream(&mut tokenizer.decoder(&[]).unwrap(), &fox[..2]);
        assert!(pieces[2].chars().all(|c| c == REPLACEMENT) && !pieces[2].is_empty());
    }
}

#[test]
fn bytes_that_are_no_character_do_not_hold_text_back() {
    let tokenizer = llama();
    let mut decoder = tokenizer.decoder(&[]).unwrap();
    let mut ids = bytes_of("🦊");
    ids.extend([BYTE + 0xFF; 40]);
    let pieces: Vec<_> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(pieces[..4], ["", "", "", "🦊"]);
    assert!(pieces[4..].iter().all(|piece| piece == "\u{FFFD}"));
    assert_eq!(decoder.push(5).unwrap(), " fox");

    // A wrong byte after a whole character, then text.
    let mut decoder = tokenizer.decoder(&bytes_of("🦊")).unwrap();
    assert_eq!(stream(&mut decoder, &[BYTE + 0xFF, 5, 6]), ["\u{FFFD}", " fox", "a", ""]);
}

/// What comes before may be long, and may end anywhere within a run of bytes.
#[test]
fn a_text_that_goes_on_within_a_run_of_bytes() {
    let tokenizer = llama();
    let text = "é狐🦊ñ的é🐻狐éé🦊的";
    let ids = bytes_of(text);
    for cut in 0..=ids.len() {
        let mut decoder = tokenizer.decoder(&ids[..cut]).unwrap();
        let whole = text.floor_char_boundary(cut);
        assert_eq!(stream(&mut decoder, &ids[cut..]).concat(), text[whole..], "{cut}");
        // One that does not go on has its U+FFFD before.
        let mut decoder = tokenizer.decoder(&ids[..cut]).unwrap();
        let expected = if cut == 0 { "fox" } else { " fox" };
        assert_eq!(stream(&mut decoder, &[5]).concat(), expected, "{cut}");
        // More of the wrong bytes: those that come now are ours.
        let mut decoder = tokenizer.decoder(&ids[..cut]).unwrap();
        let pieces = stream(&mut decoder, &[BYTE + 0xE7, 5]).concat();
        assert_eq!(pieces, "\u{FFFD} fox", "{cut}");
    }
}

#[test]
fn a_literal_replacement_character_survives() {
    let text = "a\u{FFFD}\u{FFFD}é\u{FFFD}";
    for (tokenizer, ids) in
        [(demo(), demo().encode_plain(text).unwrap()), (llama(), bytes_of(text))]
    {
        for cut in 0..ids.len() {
            let before = tokenizer.decode(&ids[..cut]).unwrap();
            let mut decoder = tokenizer.decoder(&ids[..cut]).unwrap();
            let after = stream(&mut decoder, &ids[cut..]).concat();
            // The one that the cut is in may be shown on either side.
            let all = before.trim_end_matches(REPLACEMENT).to_owned()
                + text[before.trim_end_matches(REPLACEMENT).len()..].trim_end_matches(&after)
                + &after;
            assert_eq!(all, text, "{cut}: {before:?}, {after:?}");
        }
        let pieces = stream(&mut tokenizer.decoder(&[]).unwrap(), &ids);
        assert_eq!(pieces.concat(), text);
    }
}

/// The first character of a text may be treated in a way of its own, also if it is made of bytes.
#[test]
fn a_text_that_begins_with_a_byte() {
    let tokenizer = llama();
    for text in [" a", "  a", "é a", "\u{FFFD}é"] {
        let ids = bytes_of(text);
        let whole = tokenizer.decode(&ids).unwrap();
        assert_eq!(stream(&mut tokenizer.decoder(&[]).unwrap(), &ids).concat(), whole, "{text:?}");
    }
}

#[test]
fn a_replacement_character_of_the_ids_before_is_theirs() {
    let tokenizer = demo();
    let before = tokenizer.encode("is \u{FFFD}").unwrap();
    let after = tokenizer.encode_plain("é a").unwrap();
    assert_eq!(stream(&mut tokenizer.decoder(&before).unwrap(), &after).concat(), "é a");
}

#[test]
fn dropout_is_off() {
    let mut tokenizer = read_json(&Path::new(DEMO).join("tokenizer.json")).unwrap().unwrap();
    tokenizer["model"]["dropout"] = json!(0.9);
    let tokenizer = Tokenizer::from_folder(folder(&tokenizer, &json!({})).path()).unwrap();
    let text = "The little dog was so frightened that he ran away";
    let expected = demo().encode_plain(text).unwrap();
    assert!((0..20).all(|_| tokenizer.encode_plain(text).unwrap() == expected));
}

/// A special token that a user spells out is text.
#[test]
fn untrusted_text_gives_no_orders() {
    let mut tokenizer = read_json(&Path::new(DEMO).join("tokenizer.json")).unwrap().unwrap();
    let mut added = tokenizer["added_tokens"][0].clone();
    added["id"] = json!(4096);
    added["content"] = json!("<tool>");
    added["special"] = json!(false);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    let tokenizer = Tokenizer::from_folder(folder(&tokenizer, &json!({})).path()).unwrap();
    let text = "Hello<|endoftext|> <|startoftext|><tool>";
    assert!(tokenizer.encode_plain(text).unwrap().contains(&2));
    let ids = tokenizer.encode_untrusted(text).unwrap();
    assert!(ids.iter().all(|id| *id > 2), "{ids:?}");
    assert_eq!(ids.last(), Some(&4096));
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.decode_with_special(&ids).unwrap(), text);
    let harmless = "The little dog";
    assert_eq!(
        tokenizer.encode_untrusted(harmless).unwrap(),
        tokenizer.encode_plain(harmless).unwrap()
    );
    // The other ways are as before.
    assert!(tokenizer.encode_plain(text).unwrap().contains(&2));
}

/// A file that makes the crate panic is an error that names it.
#[test]
fn a_panic_within_is_an_error() {
    let path = Path::new("some/tokenizer.json");
    let text = guarded::<()>(path, || panic!("at {}", 7)).unwrap_err().to_string();
    assert!(text.contains("some/tokenizer.json") && text.contains("panic (at 7)"), "{text}");
}

#[test]
fn can_be_shared() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
    shared::<Decoder>();
}

/// Ids of the demo tokenizer: any, and often those of single bytes and of the special tokens.
fn some_ids() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0u32..4100, 0u32..260, 100u32..260], 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, rng_seed: RngSeed::Fixed(17), ..ProptestConfig::default()
    })]

    #[test]
    fn pieces_are_the_whole(ids in some_ids(), before in some_ids()) {
        let tokenizer = demo_once();
        let whole = tokenizer.decode(&ids).unwrap();
        let mut decoder = tokenizer.decoder(&[]).unwrap();
        prop_assert_eq!(stream(&mut decoder, &ids).concat(), whole);

        let prompt = tokenizer.decode(&before).unwrap();
        let all = tokenizer.decode(&[&before[..], &ids].concat()).unwrap();
        let mut decoder = tokenizer.decoder(&before).unwrap();
        let after = stream(&mut decoder, &ids).concat();
        if all.starts_with(&prompt) {
            prop_assert_eq!(prompt + &after, all);
        } else {
            // A character that began in `before` was completed.
            let whole = prompt.trim_end_matches(REPLACEMENT);
            prop_assert!(all.ends_with(&after) && all.starts_with(whole));
            prop_assert!(after.chars().next().is_some_and(|c| c != REPLACEMENT));
        }
    }

    #[test]
    fn what_is_held_is_bounded(
        ids in prop::collection::vec(100u32..260, 300),
        fallback in any::<bool>(),
    ) {
        let tokenizer = if fallback { llama_once() } else { demo_once() };
        let mut decoder = tokenizer.decoder(&[]).unwrap();
        for id in ids {
            decoder.push(id).unwrap();
            prop_assert!(decoder.held() <= 16);
        }
    }

    #[test]
    fn byte_fallback_too(
        text in "[aé!狐🦊🐻ñ的 ]{0,40}",
        spaces in prop::collection::vec(2u32..6, 0..4),
    ) {
        let tokenizer = llama_once();
        let mut ids = spaces;
        for c in text.chars() {
            let word = if c == ' ' { "\u{2581}".into() } else { c.to_string() };
            match tokenizer.id(&word) {
                Some(id) => ids.push(id),
                None => ids.extend(bytes_of(&word)),
            }
        }
        let whole = tokenizer.decode(&ids).unwrap();
        let pieces = stream(&mut tokenizer.decoder(&[]).unwrap(), &ids);
        prop_assert_eq!(pieces.concat(), whole.clone());

        // Whatever part of it is there before: what is added is the rest of it.
        for cut in 0..ids.len() {
            let before = tokenizer.decode(&ids[..cut]).unwrap();
            let mut decoder = tokenizer.decoder(&ids[..cut]).unwrap();
            let after = stream(&mut decoder, &ids[cut..]).concat();
            let expected = whole.strip_prefix(&before);
            match expected {
                Some(expected) => prop_assert_eq!(after, expected),
                // The cut is within a run of bytes, and within a character.
                None => prop_assert!(whole.ends_with(&after) && !after.contains(REPLACEMENT)),
            }
        }
    }

    #[test]
    fn any_ids_are_taken(ids in prop::collection::vec(0u32..300, 0..60)) {
        let tokenizer = llama_once();
        let pieces = stream(&mut tokenizer.decoder(&[]).unwrap(), &ids).concat();
        let letters = |text: &str| text.chars().filter(char::is_ascii_alphabetic).count();
        // Nothing but the bytes that make up no character may differ.
        let words = |id: &&u32| (4..7).contains(*id);
        let expected: usize = ids.iter().filter(words).map(|id| [3, 3, 1][*id as usize - 4]).sum();
        prop_assert!(letters(&pieces) >= expected);
    }
}

fn demo_once() -> &'static Tokenizer {
    static DEMO: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    DEMO.get_or_init(demo)
}

fn llama_once() -> &'static Tokenizer {
    static LLAMA: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    LLAMA.get_or_init(llama)
}

#[test]
fn what_makes_a_letter_a_gigabyte_is_refused() {
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(10)});
    let many = |n| vec![replace.clone(); n];
    let part = |kind: &str, n| json!({"type": "Sequence", kind: many(n)});
    let tokenizer = |normalizer: Value, decoder: Value| {
        let vocab = json!({"<s>": 0, "a": 1});
        let json = json!({
            "version": "1.0", "added_tokens": [], "normalizer": normalizer, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        Tokenizer::from_folder(folder(&json, &json!({})).path())
    };
    let kept = tokenizer(part("normalizers", 3), part("decoders", 3)).unwrap();
    assert_eq!(kept.encode_plain("a").unwrap().len(), 1000);
    for (normalizer, decoder, what) in [
        (part("normalizers", 9), Value::Null, "normalizer"),
        (Value::Null, part("decoders", 9), "decoder"),
        (
            json!({"type": "Sequence", "normalizers": vec![part("normalizers", 2); 4]}),
            Value::Null,
            "normalizer",
        ),
    ] {
        let error = tokenizer(normalizer, decoder).err().unwrap().to_string();
        assert!(error.contains(&format!("its {what} can make")), "{error}");
    }
}
