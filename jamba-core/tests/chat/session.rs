//! Conversations as state: what is run in each turn, and that it is what a fresh session would give.

use jamba_core::chat::{ChatSession, ChatTemplate, Message, Prefill, ReplyEvent};
use jamba_core::{
    CancelToken, Error, FinishReason, GenerateOptions, LanguageModel, Model, Sampling,
    SessionOptions, Tokenizer,
};
use jamba_cpu::CpuBackend;
use tempfile::TempDir;

use super::demo;

const CONTEXT: usize = 512;

/// A template in which a message of the user takes some tokens more than its text.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\
    {% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}<|endoftext|>\n\
    {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

fn session(context: usize) -> (ChatSession, Tokenizer) {
    let model = Model::load(demo(), CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(demo()).unwrap();
    let options = SessionOptions { context, chunk: 8, outputs: 1 };
    let session = model.session(options).unwrap();
    let template = ChatTemplate::new(TEMPLATE).unwrap();
    (ChatSession::new(session, tokenizer.clone(), template), tokenizer)
}

fn options(max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling { temperature: 0.9, seed: 7, ..Sampling::default() };
    GenerateOptions { sampling, max_tokens, ..GenerateOptions::default() }
}

/// A turn: what was run before the reply, and the reply.
fn say(chat: &mut ChatSession, text: &str) -> (Prefill, String) {
    chat.chat.messages.push(Message::user(text));
    answer(chat, options(9))
}

fn answer(chat: &mut ChatSession, options: GenerateOptions) -> (Prefill, String) {
    let mut reply = chat.reply(options, CancelToken::new()).unwrap();
    let events: Vec<ReplyEvent> = (&mut reply).map(Result::unwrap).collect();
    let prefill = reply.prefill();
    reply.finish().unwrap();
    (prefill, events.iter().filter_map(ReplyEvent::text).collect())
}

#[test]
fn a_turn_runs_only_what_is_new() {
    let (mut chat, tokenizer) = session(CONTEXT);
    let mut position = 0;
    for (turn, text) in ["Once upon a time", "And then?", "größer 🦊"].iter().enumerate() {
        let (prefill, reply) = say(&mut chat, text);
        let end = if turn == 0 { "" } else { "<|endoftext|>\n" };
        let new = tokenizer.encode_plain(&format!("{end}user:{text}<|endoftext|>\nassistant:"));
        let new = new.unwrap().len();
        assert_eq!(prefill, Prefill { reused: position, replayed: 0, appended: new }, "{turn}");
        assert_eq!(chat.chat.messages.last().unwrap().text(), reply);
        assert_eq!(chat.chat.messages.len(), 2 * (turn + 1));
        position = chat.session().position();
    }
    let text = tokenizer.decode_with_special(chat.session().tokens()).unwrap();
    let rendered = chat.template().render(&chat.chat, jamba_core::chat::End::Message).unwrap();
    assert_eq!(format!("{text}<|endoftext|>\n"), rendered.text());
}

#[test]
fn what_is_taken_back_is_not_run_again() {
    let (mut chat, _) = session(CONTEXT);
    say(&mut chat, "Once upon a time there was a fox");
    let before = chat.session().position();
    let (_, second) = say(&mut chat, "What did it say to the bear in the wood?");
    let (_, third) = say(&mut chat, "And the bear?");
    assert_eq!(chat.undo().unwrap().text(), "And the bear?");
    assert_eq!(chat.undo().unwrap().text(), "What did it say to the bear in the wood?");
    assert_eq!(chat.chat.messages.len(), 2);
    let (prefill, _) = say(&mut chat, "Where did it live?");
    assert!(prefill.reused >= before && prefill.replayed <= 8, "{before}: {prefill:?}");

    // The same again gives the same again.
    chat.undo();
    assert_eq!(say(&mut chat, "What did it say to the bear in the wood?").1, second);
    assert_eq!(say(&mut chat, "And the bear?").1, third);
    // Another reply to the same prompt runs nothing at all.
    chat.chat.messages.pop();
    let (prefill, again) = answer(&mut chat, options(9));
    assert_eq!((prefill.replayed, prefill.appended), (0, 0));
    assert_eq!(again, third);
    chat.chat.messages.clear();
    assert!(chat.undo().is_none());
}

#[test]
fn a_changed_conversation_is_as_if_it_had_never_been_another() {
    let (mut chat, _) = session(CONTEXT);
    say(&mut chat, "Once upon a time");
    say(&mut chat, "And then?");
    chat.chat.messages.insert(0, Message::system("Tell tales."));
    chat.chat.messages.truncate(1);
    chat.chat.messages.push(Message::user("A fox"));
    let (prefill, changed) = answer(&mut chat, options(20));
    assert!(prefill.reused <= 1, "{prefill:?}");
    let (mut fresh, _) = session(CONTEXT);
    fresh.chat.messages = chat.chat.messages[..2].to_vec();
    assert_eq!(answer(&mut fresh, options(20)).1, changed);
    assert_eq!(fresh.session().tokens(), chat.session().tokens());
}

#[test]
fn a_reply_that_the_template_writes_otherwise_is_read_as_it_is_written() {
    let (mut chat, tokenizer) = session(CONTEXT);
    say(&mut chat, "Once upon a time");
    let prompt = tokenizer.encode_plain("user:Once upon a time<|endoftext|>\nassistant:").unwrap();
    chat.chat.messages[1] = Message::assistant("Something else.");
    let (prefill, _) = say(&mut chat, "And?");
    assert!(prefill.reused >= prompt.len() && prefill.replayed == 0, "{prefill:?}");
    let text = tokenizer.decode_with_special(chat.session().tokens()).unwrap();
    assert!(text.contains("assistant:Something else.<|endoftext|>\nuser:And?"), "{text}");
}

#[test]
fn forks_and_files_go_on_from_where_they_were() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("chat.safetensors");
    let (mut chat, _) = session(CONTEXT);
    say(&mut chat, "Once upon a time");
    chat.save(&path).unwrap();
    let mut fork = chat.fork().unwrap();
    let (prefill, expected) = say(&mut chat, "And then?");
    assert_eq!(say(&mut fork, "Why?").0.reused, prefill.reused);
    fork.undo();
    assert_eq!(say(&mut fork, "And then?").1, expected);

    let (mut loaded, _) = session(CONTEXT);
    loaded.load(&path).unwrap();
    assert_eq!(loaded.chat.messages, chat.chat.messages[..2]);
    assert_eq!(say(&mut loaded, "And then?"), (prefill, expected));

    let position = loaded.session().position();
    assert!(matches!(loaded.load("/no/such/file"), Err(Error::StateFile { .. })));
    std::fs::write(folder.path().join("chat.safetensors.json"), "{\"text\": 1}").unwrap();
    assert!(matches!(loaded.load(&path), Err(Error::StateFile { .. })));
    assert_eq!((loaded.session().position(), loaded.chat.messages.len()), (position, 4));
}

#[test]
fn cancelling_leaves_a_conversation_that_goes_on() {
    let (mut chat, tokenizer) = session(CONTEXT);
    // While the prompt is read.
    let cancel = CancelToken::new();
    cancel.cancel();
    chat.chat.messages.push(Message::user("Once upon a time there was a fox who lived in a wood"));
    let mut reply = chat.reply(options(9), cancel).unwrap();
    assert!(reply.next().is_none());
    assert_eq!(reply.finish_reason(), Some(FinishReason::Cancelled));
    assert_eq!(reply.finish().unwrap(), None);
    assert_eq!(chat.chat.messages.len(), 1);

    // While it answers: what was said is said.
    let cancel = CancelToken::new();
    let mut reply = chat.reply(options(50), cancel.clone()).unwrap();
    let mut events = Vec::new();
    for event in &mut reply {
        events.push(event.unwrap());
        if events.len() == 3 {
            cancel.cancel();
        }
    }
    assert_eq!(reply.finish_reason(), Some(FinishReason::Cancelled));
    let told: String = events.iter().filter_map(ReplyEvent::text).collect();
    let message = reply.finish().unwrap().unwrap();
    assert!(message.text().starts_with(&told), "{told:?}, {message:?}");
    let position = chat.session().position();
    let (prefill, _) = say(&mut chat, "And then?");
    assert_eq!((prefill.reused, prefill.replayed), (position, 0));
    let text = tokenizer.decode_with_special(chat.session().tokens()).unwrap();
    assert!(text.contains(&format!("{}<|endoftext|>\nuser:And then?", message.text())), "{text}");
}

#[test]
fn a_conversation_that_does_not_fit_is_refused_and_one_that_is_full_ends() {
    let (mut chat, _) = session(40);
    say(&mut chat, "Once");
    let position = chat.session().position();
    chat.chat.messages.push(Message::user("upon a time ".repeat(20)));
    let refused = chat.reply(options(9), CancelToken::new()).err().unwrap();
    assert!(matches!(refused, Error::Context { needed: 41.., allocated: 40 }), "{refused}");
    assert_eq!(chat.session().position(), position);
    chat.undo();
    chat.chat.messages.push(Message::user("And?"));
    let mut reply = chat.reply(options(99), CancelToken::new()).unwrap();
    assert!(reply.all(|event| event.is_ok()));
    assert_eq!(reply.finish_reason(), Some(FinishReason::Context));
    assert!(reply.finish().unwrap().is_some());
    let (mut empty, _) = session(40);
    assert!(empty.reply(options(1), CancelToken::new()).is_ok(), "the generation prompt alone");
}

#[test]
fn a_reply_ends_before_a_stop_string_and_the_state_with_it() {
    let (mut chat, tokenizer) = session(CONTEXT);
    chat.chat.messages.push(Message::user("Once upon a time"));
    let stop = GenerateOptions { stop: vec!["e ".into()], ..options(30) };
    let (_, said) = answer(&mut chat, stop);
    assert!(!said.is_empty() && !said.contains("e "), "{said}");
    say(&mut chat, "And then?");
    let text = tokenizer.decode_with_special(chat.session().tokens()).unwrap();
    assert!(text.contains(&format!("assistant:{said}<|endoftext|>\nuser:And then?")), "{text}");
}
