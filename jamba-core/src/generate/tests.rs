use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::backend::Limits;
use crate::testing::{Heard, Script};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
const EOS: u32 = 2;

fn tokenizer() -> &'static Tokenizer {
    static DEMO_TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    DEMO_TOKENIZER.get_or_init(|| Tokenizer::from_folder(DEMO).unwrap())
}

fn session_of(
    context: usize,
    say: impl Fn(usize) -> Option<u32> + Send + Sync + 'static,
) -> (Session, Heard) {
    let limits = Limits { slots: 1, context, tokens: 4, outputs: 1 };
    Script { say: Some(Arc::new(say)), ..Script::new(limits) }.session()
}

/// The tokens of each step.
fn steps(heard: &Heard) -> Vec<Vec<u32>> {
    heard.lock().unwrap().iter().map(|(_, tokens)| tokens.clone()).collect()
}

/// Says these ids after the first `prompt` tokens, then ends the text for ever.
fn says(prompt: usize, ids: &[u32]) -> (Session, Heard) {
    let ids = ids.to_vec();
    let say = move |position: usize| ids.get(position.checked_sub(prompt)?).copied();
    session_of(100, move |position| say(position).or(Some(EOS)))
}

fn plain(text: &str) -> Vec<u32> {
    tokenizer().encode_plain(text).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { sampling: Sampling::greedy(), max_tokens, ..GenerateOptions::default() }
}

fn stopping(stop: &[&str]) -> GenerateOptions {
    GenerateOptions { stop: stop.iter().map(|s| s.to_string()).collect(), ..greedy(50) }
}

/// Generates `ids` after a prompt of one token.
fn played(ids: &[u32], options: GenerateOptions) -> Generation {
    generate_ids(&mut says(1, ids).0, tokenizer(), &[1], options).unwrap()
}

fn texts(generator: &mut Generator<'_>) -> Vec<String> {
    generator.map(|piece| piece.unwrap().text).collect()
}

#[test]
fn end_of_text() {
    let ids = plain(" there was a fox");
    let (mut session, heard) = says(5, &ids);
    let all = generate(&mut session, tokenizer(), "Once upon a time", greedy(50)).unwrap();
    assert_eq!(all.prompt_ids, [1, 2740, 789, 262, 534]);
    assert_eq!(all.ids, [&ids[..], &[EOS]].concat());
    assert_eq!(all.text, " there was a fox");
    assert_eq!(all.finish_reason, FinishReason::Eos);
    assert_eq!((all.usage.prompt_tokens, all.usage.generated_tokens), (5, ids.len() + 1));
    let expected = -(1.0 + 4095.0 * (-9.0f64).exp()).ln() as f32;
    assert!(all.logprobs.iter().all(|p| (p - expected).abs() < 1e-6));
    assert_eq!(all.logprobs.len(), all.ids.len());

    // The prompt in chunks of four, then every token: the session holds what was returned.
    let heard = steps(&heard);
    assert_eq!(heard[..2], [vec![1, 2740, 789, 262], vec![534]]);
    assert_eq!(heard[2..].concat(), all.ids);
    assert_eq!(session.position(), 5 + all.ids.len());
}

#[test]
fn ignoring_the_end_of_text() {
    let all = played(&[EOS, 36, EOS], GenerateOptions { ignore_eos: true, ..greedy(5) });
    assert_eq!(all.ids, [EOS, 36, EOS, EOS, EOS]);
    assert_eq!((all.text.as_str(), all.finish_reason), ("A", FinishReason::Length));
}

#[test]
fn budget() {
    let ids = plain("The old woman opened the door");
    for n in 0..ids.len() {
        let all = played(&ids, greedy(n));
        assert_eq!(all.ids, ids[..n]);
        assert_eq!(all.text, tokenizer().decode(&ids[..n]).unwrap());
        assert_eq!(all.finish_reason, FinishReason::Length);
    }
    let (mut session, heard) = says(1, &ids);
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(0)).unwrap();
    generator.prompt(&[1]).unwrap();
    assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
    assert!(generator.next().is_none());
    assert_eq!(generator.pending(), None);
    assert_eq!(steps(&heard), [[1]]);
}

#[test]
fn context_full() {
    for context in 3..6 {
        let (mut session, _) = session_of(context, |_| Some(36));
        let all = generate_ids(&mut session, tokenizer(), &[1, 40, 41], greedy(50)).unwrap();
        // The last token is not run, so it needs no room.
        assert_eq!(all.text, "A".repeat(context - 3 + 1));
        assert_eq!(all.finish_reason, FinishReason::Context);
        assert_eq!(session.position(), context);
    }
}

#[test]
fn a_prompt_that_cannot_be_taken_changes_nothing() {
    let (mut session, heard) = session_of(6, |_| Some(36));
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(1)).unwrap();
    let long = [36; 7];
    assert!(matches!(generator.prompt(&long), Err(Error::Context { needed: 7, allocated: 6 })));
    let unknown = [36, 36, 36, 36, 36, 4096];
    assert!(matches!(generator.prompt(&unknown), Err(Error::Token { id: 4096, index: 5, .. })));
    assert!(heard.lock().unwrap().is_empty());
    // It can be given another; two follow one another; after the first token it is too late.
    generator.prompt(&[1, 40]).unwrap();
    generator.prompt(&[41]).unwrap();
    assert!(matches!(generator.prompt(&[]), Err(Error::EmptyPrompt)));
    assert_eq!(generator.next().unwrap().unwrap().id, Some(36));
    assert!(matches!(generator.prompt(&[36]), Err(Error::LatePrompt)));
    assert!(generator.next().is_none());
    assert_eq!(generator.usage().prompt_tokens, 3);
    assert_eq!(steps(&heard), [vec![1, 40], vec![41]]);

    let invalid = |options| Generator::new(&mut says(1, &[]).0, tokenizer(), options).err();
    assert!(matches!(invalid(stopping(&["a", ""])), Some(Error::Option { option: "stop", .. })));
    let sampling = Sampling { top_p: 2.0, ..Sampling::default() };
    let options = GenerateOptions { sampling, ..greedy(1) };
    assert!(matches!(invalid(options), Some(Error::Option { option: "top_p", .. })));
}

#[test]
fn without_a_prompt() {
    let (mut session, heard) = says(1, &plain("Once"));
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    assert_eq!(texts(&mut generator).concat(), "Once");
    assert_eq!(steps(&heard)[0], [1]);
    // Nothing stands in for a prompt within a text.
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    assert!(matches!(generator.next(), Some(Err(Error::EmptyPrompt))));
    assert!(generator.next().is_none());

    let (mut session, _) = says(1, &[]);
    let all = generate(&mut session, tokenizer(), "", greedy(0)).unwrap();
    assert_eq!(all.prompt_ids, [1]);
}

#[test]
fn the_next_turn_begins_with_the_pending_token() {
    let ids = [plain("One"), vec![EOS], plain("Two")].concat();
    let (mut session, heard) = says(1, &ids);
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator.prompt(&[1]).unwrap();
    assert_eq!(generator.pending(), None);
    assert_eq!(texts(&mut generator).concat(), "One");
    let pending = generator.pending().unwrap();
    assert_eq!(pending, EOS);

    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator.prompt(&[pending]).unwrap();
    assert_eq!(texts(&mut generator).concat(), "Two");
    assert_eq!(steps(&heard).concat(), [&[1], &ids[..]].concat());

    // In a session that holds tokens, a text is encoded without a beginning-of-text token.
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(0)).unwrap();
    generator.prompt_text("The").unwrap();
    assert_eq!(steps(&heard).last().unwrap(), &plain("The"));
}

#[test]
fn characters_split_over_tokens() {
    let ids = plain("a🦊é");
    assert!(ids.len() >= 6);
    let (mut session, _) = says(1, &ids);
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator.prompt(&[1]).unwrap();
    let pieces = texts(&mut generator);
    assert_eq!(pieces.iter().filter(|t| !t.is_empty()).collect::<Vec<_>>(), ["a", "🦊", "é"]);
    // Cut off within a character.
    assert_eq!(played(&ids, greedy(3)).text, "a\u{FFFD}");
    // Cancelled there: what is held back comes in a piece of its own.
    let cancel = CancelToken::new();
    let (mut session, _) = says(1, &ids);
    let generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    let mut generator = generator.with_cancel(cancel.clone());
    generator.prompt(&[1]).unwrap();
    assert_eq!(generator.by_ref().take(3).map(|p| p.unwrap().text).collect::<String>(), "a");
    cancel.cancel();
    let text = "\u{FFFD}".to_owned();
    assert_eq!(
        generator.next().unwrap().unwrap(),
        Piece { id: None, logprob: 0.0, top: Vec::new(), text }
    );
    assert!(generator.next().is_none());
    assert_eq!(generator.finish_reason(), Some(FinishReason::Cancelled));
    assert_eq!(generator.pending(), Some(ids[2]));
}

#[test]
fn stop_strings() {
    let text = "Hello 🦊 wörld";
    let by_byte = single_bytes(text);
    assert_eq!(tokenizer().decode(&by_byte).unwrap(), text);
    let cases: [(&[&str], &str, FinishReason); 9] = [
        (&[" 🦊"], "Hello", FinishReason::Stop),
        (&["ö"], "Hello 🦊 w", FinishReason::Stop),
        (&["lo 🦊 wö"], "Hel", FinishReason::Stop),
        (&["lo 🦊 wo", "d"], "Hello 🦊 wörl", FinishReason::Stop),
        // The first to be completed, not the first to begin; of two, the longer.
        (&["Hello 🦊", "ell"], "H", FinishReason::Stop),
        (&["lo", "ello"], "H", FinishReason::Stop),
        (&["H"], "", FinishReason::Stop),
        // A beginning that is none is shown.
        (&["world", "Help", "d!"], text, FinishReason::Eos),
        (&[], text, FinishReason::Eos),
    ];
    for (stop, expected, reason) in cases {
        for ids in [plain(text), by_byte.clone()] {
            let all = played(&ids, stopping(stop));
            assert_eq!((all.text.as_str(), all.finish_reason), (expected, reason), "{stop:?}");
        }
    }
    // What may be the beginning of a stop string is held back, then shown with the last piece.
    let (mut session, _) = says(1, &single_bytes("xabab"));
    let options = GenerateOptions { max_tokens: 5, ..stopping(&["abac"]) };
    let mut generator = Generator::new(&mut session, tokenizer(), options).unwrap();
    generator.prompt(&[1]).unwrap();
    assert_eq!(texts(&mut generator), ["x", "", "", "", "abab"]);
    let (mut session, _) = says(1, &single_bytes("abab"));
    let mut generator = Generator::new(&mut session, tokenizer(), stopping(&["abac"])).unwrap();
    generator.prompt(&[1]).unwrap();
    assert_eq!(texts(&mut generator), ["", "", "", "ab", "ab"]);
}

/// A token for every byte, by the byte-level alphabet of GPT-2.
fn single_bytes(text: &str) -> Vec<u32> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255).filter(|b| !printable(b)).collect();
    let letter = |b: u8| match others.iter().position(|o| *o == b) {
        Some(i) => char::from_u32(256 + i as u32).unwrap(),
        None => char::from(b),
    };
    text.bytes().map(|b| tokenizer().id(&letter(b).to_string()).unwrap()).collect()
}

#[test]
fn cancelling_a_prompt() {
    let cancel = CancelToken::new();
    let seen = cancel.clone();
    let (mut session, heard) = session_of(100, move |position| {
        if position == 8 {
            seen.cancel();
        }
        Some(36)
    });
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator = generator.with_cancel(cancel);
    generator.prompt(&[40; 20]).unwrap();
    assert_eq!(generator.finish_reason(), Some(FinishReason::Cancelled));
    assert_eq!(generator.usage().prompt_tokens, 8);
    assert!(generator.next().is_none());
    assert_eq!(heard.lock().unwrap().len(), 2);
    assert_eq!(session.position(), 8);
}

#[test]
fn cancelling_a_generation() {
    let cancel = CancelToken::new();
    let seen = cancel.clone();
    let (mut session, _) = session_of(100, move |position| {
        if position == 4 {
            seen.cancel();
        }
        Some(36)
    });
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator = generator.with_cancel(cancel);
    generator.prompt(&[1]).unwrap();
    assert_eq!(texts(&mut generator), ["A"; 4]);
    assert_eq!(generator.finish_reason(), Some(FinishReason::Cancelled));
    assert_eq!(generator.pending(), Some(36));
    assert_eq!(session.position(), 4);
}

#[test]
fn logits_that_are_no_numbers() {
    let (mut session, _) = session_of(100, |position| (position < 3).then_some(36));
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    generator.prompt(&[1]).unwrap();
    assert_eq!(generator.by_ref().take(2).map(|p| p.unwrap().text).collect::<String>(), "AA");
    assert!(matches!(generator.next(), Some(Err(Error::NonFinite { position: 3 }))));
    assert!(generator.next().is_none());
    assert_eq!((generator.finish_reason(), generator.pending()), (None, None));

    let (mut session, _) = session_of(100, |_| None);
    let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
    assert!(matches!(generator.prompt(&[1]), Err(Error::NonFinite { position: 1 })));
    assert!(generator.next().is_none());
}

/// The text of a turn is what it adds to the turns before it, wherever a token of theirs ended.
#[test]
fn a_text_goes_on_within_a_character() {
    let ids = plain("a🦊 b");
    let fox = ids.len() - 3;
    for cut in 1..fox {
        let (mut session, _) = says(1, &ids);
        let mut text = String::new();
        let mut generator = Generator::new(&mut session, tokenizer(), greedy(cut)).unwrap();
        generator.prompt(&[1]).unwrap();
        let first = texts(&mut generator).concat();
        let pending = generator.pending().unwrap();
        text.push_str(first.trim_end_matches('\u{FFFD}'));
        let mut generator = Generator::new(&mut session, tokenizer(), greedy(50)).unwrap();
        generator.prompt(&[pending]).unwrap();
        text.push_str(&texts(&mut generator).concat());
        assert_eq!(text, "a🦊 b", "{cut}");
    }
}

#[test]
fn ids_without_a_tokenizer() {
    let (mut session, _) = says(1, &[40, 41, EOS]);
    let mut generator = Generator::ids_only(&mut session, greedy(50)).unwrap();
    assert!(matches!(generator.prompt_text("a"), Err(Error::NoTokenizer)));
    generator.prompt(&[1]).unwrap();
    let pieces: Vec<Piece> = generator.by_ref().map(|piece| piece.unwrap()).collect();
    assert_eq!(pieces.iter().filter_map(|p| p.id).collect::<Vec<_>>(), [40, 41, EOS]);
    assert!(pieces.iter().all(|piece| piece.text.is_empty() && piece.logprob < 0.0));
    assert_eq!(generator.finish_reason(), Some(FinishReason::Eos));
    let error = Generator::ids_only(&mut session, stopping(&["x"])).err().unwrap();
    assert!(matches!(error, Error::Option { option: "stop", .. }), "{error}");
}

#[test]
fn the_tokenizer_of_another_model() {
    let limits = Limits { slots: 1, context: 9, tokens: 4, outputs: 1 };
    let mut script = Script::new(limits);
    script.config.vocab_size = 4095;
    let (mut session, _) = script.session();
    let error = Generator::new(&mut session, tokenizer(), greedy(1)).err().unwrap().to_string();
    for part in ["tokenizer.json", "4095", "another model"] {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn a_seed_is_a_text() {
    let run = |seed| {
        let (mut session, _) = session_of(100, |position| Some(36 + position as u32 % 5));
        let sampling = Sampling { temperature: 3.0, seed, ..Sampling::default() };
        let options = GenerateOptions { sampling, ..greedy(40) };
        generate(&mut session, tokenizer(), "Once", options).unwrap().ids
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn reasons_have_names() {
    use FinishReason::*;
    let names = [Eos, Stop, Length, Context, Cancelled].map(|r| r.to_string());
    assert_eq!(names, ["eos", "stop", "length", "context", "cancelled"]);
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, rng_seed: RngSeed::Fixed(41), ..ProptestConfig::default()
    })]

    /// However a text is cut, the same of it is shown; nothing that cannot be a beginning is held.
    #[test]
    fn stops_do_not_depend_on_the_cut(
        text in "[abé]{0,24}",
        strings in prop::collection::vec("[abé]{1,4}", 0..4),
        cuts in prop::collection::vec(0usize..25, 0..6),
    ) {
        let shown = |pieces: &[&str]| {
            let mut stops = Stops::new(strings.clone()).unwrap();
            let mut shown = String::new();
            for piece in pieces {
                let (text, stopped) = stops.push(piece);
                shown += &text;
                if stopped {
                    return (shown, true);
                }
                let held = stops.held.len();
                assert!(strings.iter().any(|s| held < s.len()) || held == 0);
            }
            (shown + &stops.rest(), false)
        };
        let mut cuts: Vec<usize> = cuts.iter().map(|&c| text.floor_char_boundary(c)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let expected = text.char_indices().map(|(i, c)| i + c.len_utf8()).find_map(|end| {
            let ends = strings.iter().filter(|s| text[..end].ends_with(s.as_str()));
            ends.map(String::len).max().map(|len| &text[..end - len])
        });
        let expected = (expected.unwrap_or(&text).to_owned(), expected.is_some());
        prop_assert_eq!(shown(&[&text]), expected.clone());
        prop_assert_eq!(shown(&pieces), expected);
    }
}
