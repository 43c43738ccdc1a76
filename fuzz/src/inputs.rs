//! Files of a model folder, states, templates, replies and grammars.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use jamba_core::chat::{Chat, ChatSession, ChatTemplate, End, Message, ReplyEvent, ReplyParser};
use jamba_core::grammar::Grammar;
use jamba_core::memory;
use jamba_core::weights::Weights;
use jamba_core::{
    CancelToken, Checkpoint, Config, GenerateOptions, LanguageModel, Model, Result, Sampler,
    Sampling, Session, SessionOptions, Snapshot, Tokenizer, WeightFormat,
};
use jamba_cpu::CpuBackend;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tiny;

/// What a target does with its bytes.
pub type Target = fn(&[u8]);

/// Every target of this file, by the name of its corpus.
pub const TARGETS: [(&str, Target); 13] = [
    ("config", config),
    ("generation_config", generation_config),
    ("index", index),
    ("header", header),
    ("safetensors", safetensors),
    ("tokenizer", tokenizer),
    ("tokenizer_config", tokenizer_config),
    ("template", template),
    ("chat", chat),
    ("reply", reply),
    ("state", state),
    ("chat_state", chat_state),
    ("grammar", grammar),
];

/// A folder with some files of the model, and one of the target's.
fn folder(of: &[&str], name: &str, data: &[u8]) -> PathBuf {
    thread_local!(static FOLDER: TempDir = TempDir::new().unwrap());
    FOLDER.with(|folder| {
        let folder = folder.path().join(name);
        if !folder.is_dir() {
            fs::create_dir(&folder).unwrap();
            for file in of {
                fs::copy(tiny::folder().join(file), folder.join(file)).unwrap();
            }
        }
        fs::write(folder.join(name), data).unwrap();
        folder
    })
}

fn session(model: &Model<CpuBackend>) -> Session {
    model.session(SessionOptions { context: 64, chunk: 8, outputs: 8 }).unwrap()
}

/// The model as it should be, loaded once for each thread.
fn with_tiny<R>(f: impl FnOnce(&Model<CpuBackend>, &Tokenizer) -> R) -> R {
    thread_local!(static TINY: OnceCell<(Model<CpuBackend>, Tokenizer)> = const { OnceCell::new() });
    TINY.with(|tiny| {
        let (model, tokenizer) = tiny.get_or_init(|| {
            let folder = tiny::folder();
            let model = Model::load(&folder, CpuBackend::new()).unwrap();
            (model, Tokenizer::from_folder(&folder).unwrap())
        });
        f(model, tokenizer)
    })
}

/// A `config.json`, and everything that is computed from one alone.
pub fn config(data: &[u8]) {
    let Ok(config) = Config::from_folder(folder(&[], "config.json", data)) else { return };
    assert!(config.validate().is_ok());
    memory::sequence_bytes(&config, 1 << 40, 4);
    // The names of 2^18 experts would leave no time for other inputs.
    if config.num_experts.max(8) * config.num_hidden_layers <= 1 << 10 {
        for format in [WeightFormat::Stored, WeightFormat::Int4] {
            memory::weight_bytes(&config, format);
        }
        let mut elements = 0u64;
        let mut add = |more| elements = elements.checked_add(more).unwrap();
        Weights::layout(&config).for_each(|spec| add(spec.elements()));
    }
}

/// A `generation_config.json`.
pub fn generation_config(data: &[u8]) {
    let folder = folder(&["config.json"], "generation_config.json", data);
    let Ok(config) = Config::from_folder(&folder) else { return };
    let Ok(sampling) = Sampling::from_folder(&folder) else { return };
    let mut sampler = Sampler::new(sampling, config.vocab_size).unwrap();
    sampler.observe_prompt(&[1, 2, 3]);
    let logits: Vec<f32> = (0..config.vocab_size).map(|i| (i as f32).sin() * 9.0).collect();
    let sampled = sampler.sample(&logits).unwrap();
    assert!((sampled.id as usize) < config.vocab_size);
}

/// A `model.safetensors.index.json` over two shards, which are both the whole model.
pub fn index(data: &[u8]) {
    let folder = folder(&["config.json"], "model.safetensors.index.json", data);
    for shard in ["a.safetensors", "b.safetensors"] {
        if !folder.join(shard).exists() {
            fs::copy(tiny::folder().join("model.safetensors"), folder.join(shard)).unwrap();
        }
    }
    run(&folder).ok();
}

/// The JSON of a safetensors file, before as many bytes as it asks for, within reason.
pub fn header(data: &[u8]) {
    let end = |tensor: &Value| tensor["data_offsets"][1].as_u64();
    let ends = serde_json::from_slice::<Value>(data).ok();
    let ends = ends.as_ref().and_then(Value::as_object).into_iter().flatten();
    let bytes = ends.filter_map(|(_, tensor)| end(tensor)).max().unwrap_or(0).min(1 << 14);
    let mut file = (data.len() as u64).to_le_bytes().to_vec();
    file.extend(data);
    file.resize(file.len() + bytes as usize, 0x3c);
    run(&folder(&["config.json"], "model.safetensors", &file)).ok();
}

/// A whole `model.safetensors`, which is run where it can be loaded: its values may be anything.
pub fn safetensors(data: &[u8]) {
    run(&folder(&["config.json"], "model.safetensors", data)).ok();
}

/// Opens a checkpoint, loads it as a model and runs it.
fn run(folder: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(folder)?;
    for name in checkpoint.names() {
        checkpoint.tensor(name, &[16, 8]).map(|tensor| drop(tensor.to_f32())).ok();
    }
    let model = Model::load(folder, CpuBackend::new())?;
    let mut session = session(&model);
    session.append(&[5, 6, 7, 8, 9, 10, 11, 12, 13, 14])?;
    let logits = session.append(&[15])?.to_vec();
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { temperature, top_p: 0.9, ..Sampling::default() };
        Sampler::new(sampling, logits.len())?.sample(&logits).ok();
    }
    Ok(())
}

const TEXT: &str = " The fox's 1st <|im_start|>ü\u{301} 🦊\r\n\n\tNaïve<tool_call>\0 ﬁ ½ end";

/// A `tokenizer.json`, and texts through it.
pub fn tokenizer(data: &[u8]) {
    let folder = folder(&["tokenizer_config.json"], "tokenizer.json", data);
    let Ok(tokenizer) = Tokenizer::from_folder(&folder) else { return };
    use_tokenizer(&tokenizer).ok();
}

/// A `tokenizer_config.json`, which templates read too.
pub fn tokenizer_config(data: &[u8]) {
    let folder = folder(&["tokenizer.json"], "tokenizer_config.json", data);
    if let Ok(tokenizer) = Tokenizer::from_folder(&folder) {
        use_tokenizer(&tokenizer).unwrap();
    }
    if let Ok(Some(template)) = ChatTemplate::from_folder(&folder) {
        template.render(&Chat::new([Message::user("Hello")]), End::Reply).ok();
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) -> Result<()> {
    let mut ids = tokenizer.encode(TEXT)?;
    tokenizer.encode_untrusted(TEXT)?;
    ids.extend((0..40).chain([u32::MAX]));
    tokenizer.decode(&ids)?;
    tokenizer.decode_with_special(&ids)?;
    let mut decoder = tokenizer.decoder(&ids[..4])?;
    ids.iter().try_for_each(|id| decoder.push(*id).map(drop))?;
    decoder.finish()?;
    let template =
        ChatTemplate::new("{% generation %}{{ messages[0].content }}{% endgeneration %}")?;
    let template = template.with_guard(tokenizer);
    let rendered = template.render(&Chat::new([Message::user(TEXT)]), End::Reply)?;
    let (ids, mask) = rendered.encode_with_mask(tokenizer)?;
    assert_eq!(ids.len(), mask.len());
    write(&Grammar::regex(tokenizer, "[a-z ]{3,8}")?)
}

/// A `chat_template.jinja`, with conversations of every kind.
pub fn template(data: &[u8]) {
    let folder = folder(&["tokenizer_config.json"], "chat_template.jinja", data);
    let Ok(Some(template)) = ChatTemplate::from_folder(&folder) else { return };
    let template = template.at("2024-07-26T13:05:09").unwrap();
    let call =
        json!([{ "function": { "name": "f", "arguments": { "x": [1, 2.5, null, "é\n"] } } }]);
    let mut chat = Chat::new([
        Message::system("Be brief."),
        Message::user("Hi <|im_start|>"),
        Message::assistant("").with("tool_calls", call),
        Message::tool("5"),
        Message::assistant("Hm.</think>Well"),
    ]);
    with_tiny(|_, tokenizer| {
        template.render(&chat, End::Continue).ok();
        chat.tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
        let guarded = template.with_guard(tokenizer);
        if let Ok(rendered) = guarded.render(&chat, End::Reply)
            && rendered.text().len() < 1 << 16
        {
            rendered.encode_with_mask(tokenizer).unwrap();
        }
    });
}

/// A conversation as JSON, in a template that uses all of it.
pub fn chat(data: &[u8]) {
    const SOURCE: &str =
        include_str!("../../jamba-core/tests/chat/templates/chatml-reasoning.jinja");
    thread_local!(static TEMPLATE: ChatTemplate = ChatTemplate::new(SOURCE).unwrap());
    let Ok(value) = serde_json::from_slice(data) else { return };
    let Ok(chat) = Chat::from_value(value) else { return };
    assert_eq!(Chat::from_value(chat.to_value()).unwrap(), chat);
    with_tiny(|_, tokenizer| {
        let template = TEMPLATE.with(|template| template.clone().with_guard(tokenizer));
        for end in [End::Reply, End::Message, End::Continue] {
            if let Ok(rendered) = template.render(&chat, end) {
                let ids = rendered.encode(tokenizer).unwrap();
                assert_eq!(rendered.encode_with_mask(tokenizer).unwrap().0, ids);
            }
        }
    });
}

/// A reply as it streams, cut up as the first byte says: the cuts make no difference.
pub fn reply(data: &[u8]) {
    let Some((&seed, data)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(data) else { return };
    let prompt = if seed & 1 == 0 { "" } else { "<think>\n" };
    let parser = ReplyParser::new(prompt, seed & 2 == 0);
    let read = |mut parser: ReplyParser, longest: usize| {
        let mut events: Vec<ReplyEvent> = Vec::new();
        let (mut from, mut random) = (0, u32::from(seed) | 1);
        while from < text.len() {
            random = random.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let length = 1 + (random >> 16) as usize % longest;
            let to = text.ceil_char_boundary((from + length).min(text.len()));
            events.extend(parser.push(&text[from..to]));
            from = to;
        }
        events.extend(parser.finish());
        let raw: String = events.iter().map(ReplyEvent::raw).collect();
        assert_eq!(raw, text);
        let told: String = events.iter().filter_map(ReplyEvent::text).collect();
        let calls: Vec<ReplyEvent> =
            events.into_iter().filter(|e| matches!(e, ReplyEvent::ToolCalls { .. })).collect();
        (told, calls)
    };
    assert_eq!(read(parser.clone(), 1 + usize::from(seed >> 4)), read(parser, usize::MAX >> 1));
}

/// A state file. Where only the checksum is wrong, it is mended: what it guards is looked at too.
pub fn state(data: &[u8]) {
    let folder = folder(&[], "state", data);
    let path = folder.join("state");
    if let Err(error) = Snapshot::load(&path) {
        let Some(mended) = mend(data, &error.to_string()) else { return };
        fs::write(&path, mended).unwrap();
    }
    let Ok(snapshot) = Snapshot::load(&path) else { return };
    with_tiny(|model, _| {
        let mut session = session(model);
        if session.restore(&snapshot).is_ok() {
            assert_eq!(session.tokens(), snapshot.tokens());
            session.append(&[7, 8]).ok();
            session.rewind(1).ok();
            session.save(&path).ok();
        }
    });
}

/// The file with the checksum that the error says its contents have.
fn mend(data: &[u8], error: &str) -> Option<Vec<u8>> {
    let mut quoted = error.split('`').skip(1).step_by(2);
    let (stated, found) = (quoted.next()?, quoted.next()?);
    if (stated.len(), found.len()) != (32, 32) {
        return None;
    }
    let at = data.windows(stated.len()).position(|window| window == stated.as_bytes())?;
    let mut mended = data.to_vec();
    mended[at..at + found.len()].copy_from_slice(found.as_bytes());
    Some(mended)
}

/// The messages beside the state of a saved conversation.
pub fn chat_state(data: &[u8]) {
    const SOURCE: &str =
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}";
    let folder = folder(&[], "chat.json", data);
    let path = folder.join("chat");
    with_tiny(|model, tokenizer| {
        if !path.exists() {
            let mut session = session(model);
            session.append(&[5, 6, 7, 8]).unwrap();
            session.save(&path).unwrap();
        }
        let template = ChatTemplate::new(SOURCE).unwrap();
        let mut chat = ChatSession::new(session(model), tokenizer.clone(), template);
        if chat.load(&path).is_ok() {
            let options = GenerateOptions { max_tokens: 2, ..GenerateOptions::default() };
            chat.chat.messages.push(Message::user("x"));
            if let Ok(reply) = chat.reply(options, CancelToken::new()) {
                reply.finish().ok();
            }
            chat.undo();
            chat.save(path.with_file_name("again")).ok();
        }
    });
}

/// A grammar, of the kind that the first byte says, and a text by it.
pub fn grammar(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let Ok(source) = std::str::from_utf8(data) else { return };
    with_tiny(|_, tokenizer| {
        let grammar = match kind % 3 {
            0 => match serde_json::from_str(source) {
                Ok(schema) => Grammar::json_schema(tokenizer, &schema),
                Err(_) => return,
            },
            1 => Grammar::regex(tokenizer, source),
            _ => Grammar::lark(tokenizer, source),
        };
        grammar.and_then(|grammar| write(&grammar)).ok();
    });
}

/// A few tokens that a grammar allows.
fn write(grammar: &Grammar) -> Result<()> {
    let mut state = grammar.start();
    for step in 0..8 {
        if state.is_complete() {
            break;
        }
        let mask = state.mask(&[1])?.to_vec();
        let allowed =
            (0..32 * mask.len() as u32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1);
        let allowed: Vec<u32> = allowed.filter(|id| *id != 1).collect();
        let Some(id) = allowed.get(step * 7 % allowed.len().max(1)) else { break };
        state.push(*id)?;
    }
    Ok(())
}
