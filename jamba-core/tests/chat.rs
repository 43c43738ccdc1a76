//! Chat templates write what transformers writes, and conversations keep their state.

use std::path::{Path, PathBuf};

use jamba_core::chat::{Chat, ChatTemplate, End, Message};
use jamba_core::{Error, Tokenizer};
use serde_json::Value;
use tempfile::TempDir;

#[path = "chat/session.rs"]
mod session;

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat")
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m")
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A model folder with these files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn templates_write_what_transformers_writes() {
    let (texts, errors) = compare(&here().join("golden.json"), &here().join("templates"));
    assert!(texts > 200 && errors > 20, "{texts} texts, {errors} errors");
}

/// Those of published models, which are not ours to pass on: `make_golden.py FOLDER` writes what
/// transformers makes of a folder of them.
#[test]
#[ignore = "needs a folder of templates, JAMBA_TEMPLATES"]
fn templates_of_others_write_what_transformers_writes() {
    let folder = PathBuf::from(std::env::var_os("JAMBA_TEMPLATES").expect("JAMBA_TEMPLATES"));
    let (texts, errors) = compare(&folder.join("golden.json"), &folder);
    println!("{texts} texts and {errors} errors are those of transformers");
    assert!(texts > 0);
}

/// Texts and errors of the templates of a folder, all of which must be those of a golden file.
fn compare(golden: &Path, templates: &Path) -> (usize, usize) {
    let golden = json(golden);
    let special = golden["special"].to_string();
    let model = folder(&[("tokenizer_config.json", &special)]);
    let (mut texts, mut errors, mut wrong) = (0, 0, String::new());
    for (name, rendered) in golden["rendered"].as_object().unwrap() {
        let path = templates.join(format!("{name}.jinja"));
        let template = ChatTemplate::from_file(&path, model.path()).unwrap();
        let template = template.at(golden["now"].as_str().unwrap()).unwrap();
        let guarded = template.clone().with_guard(&Tokenizer::from_folder(demo()).unwrap());
        for (conversation, expected) in rendered.as_object().unwrap() {
            let given = &golden["conversations"][conversation];
            let end = match given["end"].as_str() {
                Some("message") => End::Message,
                Some("continue") => End::Continue,
                _ => End::Reply,
            };
            let chat = Chat::from_value(given.clone()).unwrap();
            match (template.render(&chat, end), expected["text"].as_str()) {
                (Ok(got), Some(text)) => {
                    texts += 1;
                    if got.text() != text {
                        let (got, at) = (got.text(), common(got.text(), text));
                        wrong += &format!(
                            "\n{name}, {conversation}: after {:?}\n  expected {:?}\n  got      {:?}\n",
                            tail(&text[..at]),
                            head(&text[at..]),
                            head(&got[at..]),
                        );
                    } else if let Some(spans) = expected["generation"].as_array() {
                        let got: Vec<&str> =
                            got.generation().iter().map(|span| &got.text()[span.clone()]).collect();
                        let spans: Vec<&str> =
                            spans.iter().map(|span| span[0].as_str().unwrap()).collect();
                        assert_eq!(got, spans, "{name}, {conversation}");
                    }
                    // The demo model's special tokens occur in none of the texts.
                    assert_eq!(
                        guarded.render(&chat, end).unwrap(),
                        template.render(&chat, end).unwrap()
                    );
                }
                (Err(error), None) => {
                    errors += 1;
                    if expected["kind"] == "TemplateError" {
                        let raised = expected["error"].as_str().unwrap();
                        let Error::Template { line, reason, path: file } = &error else {
                            panic!("{name}, {conversation}: {error}")
                        };
                        assert_eq!((reason.as_str(), file), (raised, &path));
                        let source = std::fs::read_to_string(&path).unwrap();
                        let raising = source.lines().nth(line - 1).unwrap();
                        assert!(raising.contains("raise_exception"), "{name}:{line}: {raising}");
                    }
                }
                (Ok(got), None) => {
                    wrong += &format!("\n{name}, {conversation}: no error: {:?}\n", got.text());
                }
                (Err(error), Some(_)) => wrong += &format!("\n{name}, {conversation}: {error}\n"),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    (texts, errors)
}

fn common(a: &str, b: &str) -> usize {
    let differ = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    differ.map_or(a.len().min(b.len()), |((at, _), _)| at)
}

fn head(text: &str) -> String {
    text.chars().take(80).collect()
}

fn tail(text: &str) -> String {
    let skip = text.chars().count().saturating_sub(40);
    text.chars().skip(skip).collect()
}

fn said(template: &ChatTemplate) -> String {
    let chat = Chat::new([Message::user("x")]);
    template.render(&chat, End::Reply).unwrap().text().to_owned()
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let find = |files: &[(&str, &str)]| ChatTemplate::from_folder(folder(files).path()).unwrap();
    let config = (
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}config"}"#,
    );
    let jinja = ("chat_template.jinja", "{{ bos_token }}jinja");
    let legacy = ("chat_template.json", r#"{"chat_template": "json"}"#);
    assert!(find(&[]).is_none());
    assert!(find(&[("tokenizer_config.json", "{}")]).is_none());
    assert_eq!(said(&find(&[config]).unwrap()), "<s>config");
    assert_eq!(said(&find(&[config, legacy]).unwrap()), "<s>config");
    assert_eq!(said(&find(&[config, legacy, jinja]).unwrap()), "<s>jinja");
    assert_eq!(said(&find(&[legacy]).unwrap()), "json");

    let list = r#"{"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"}, {"name": "rag", "template": "rag"}]}"#;
    let template = find(&[("tokenizer_config.json", list)]).unwrap();
    assert_eq!(said(&template), "plain");
    let mut chat = Chat::new([Message::user("x")]);
    chat.tools = vec![serde_json::json!({}), serde_json::json!({})];
    assert_eq!(template.render(&chat, End::Reply).unwrap().text(), "2 tools");
    assert_eq!(template.render_named("rag", &chat, End::Reply).unwrap().text(), "rag");
    assert!(template.render_named("no such", &chat, End::Reply).is_err());
    let other = ("additional_chat_templates/rag.jinja", "another");
    let template = find(&[jinja, other]).unwrap();
    assert_eq!(template.render_named("rag", &chat, End::Reply).unwrap().text(), "another");
}

#[test]
fn models_without_a_template_get_what_was_said() {
    let model = folder(&[("tokenizer_config.json", r#"{"bos_token": "<s>"}"#)]);
    let call = serde_json::json!({"role": "assistant", "content": null, "tool_calls": []});
    let parts = serde_json::json!({"role": "user", "content": [
        {"type": "text", "text": "Two"}, {"type": "image"}, {"type": "text", "text": " parts."},
    ]});
    let messages = [call, parts].map(|value| Message::from_value(value).unwrap());
    let chat = Chat::new([Message::system("Be brief.")].into_iter().chain(messages));
    let rendered = ChatTemplate::plain(model.path()).unwrap().render(&chat, End::Reply).unwrap();
    assert_eq!(rendered.text(), "<s>Be brief.\n\n\n\nTwo parts.");
}

#[test]
fn errors_say_where() {
    let refused = |files: &[(&str, &str)]| {
        let folder = folder(files);
        ChatTemplate::from_folder(folder.path()).unwrap_err().to_string()
    };
    let error = refused(&[("chat_template.jinja", "a\n\n{% for x in %}")]);
    assert!(error.contains("chat_template.jinja:3: "), "{error}");
    let error =
        refused(&[("chat_template.jinja", "a\n{% generation %}\n{% if x %}\n{% endgeneration %}")]);
    assert!(error.contains("chat_template.jinja:4: "), "{error}");
    let error = refused(&[("tokenizer_config.json", r#"{"chat_template": 3}"#)]);
    assert!(error.contains("chat_template") && error.contains('3'), "{error}");
    let error = refused(&[("tokenizer_config.json", r#"{"chat_template": [{"name": "x"}]}"#)]);
    assert!(error.contains("`template`"), "{error}");

    let chat = Chat::new([Message::user("x")]);
    let render = |source: &str| {
        let template = ChatTemplate::new(source).unwrap();
        template.render(&chat, End::Reply).unwrap_err().to_string()
    };
    assert_eq!(
        render("\n{{ raise_exception('no ' ~ messages[0].role) }}"),
        "<template>:2: no user"
    );
    assert!(render("\n\n{{ nothing.at.all }}").starts_with("<template>:3: "));
    assert!(render("{{ messages | tojson(what=1) }}").contains("what"));
    let endless =
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
    assert!(render(endless).contains("fuel"));
    // Neither may a few characters ask for all of the machine's memory.
    for greedy in [
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ range(9999) | list | tojson(separators=['x' * 999999, '']) }}",
        "{% set n = namespace(x=range(9999) | list) %}{% for i in range(150) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson(indent=64) }}",
        "{{ ('x ' * 20000000).rsplit() | length }}",
        "{{ strftime_now('%255Y' * 9999999) }}",
        "{% set x = 'x' * 1000000 %}{{ range(9999) | map('replace', '', x) | join | length }}",
        "{% set x = 'x' * 1000000 %}{% set n = namespace(x=[]) %}{% for i in range(999) %}{% set n.x = n.x + [x] %}{% endfor %}{{ n.x | join(1.5) | length }}",
        "{% set n = namespace(x=['\t']) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{{ ('x\n' * 1000000) | indent(1000000) }}",
        "{{ ('\n' * 20000000).splitlines() | length }}",
    ] {
        let error = render(greedy);
        assert!(error.contains("fuel"), "{greedy}: {error}");
    }
    assert!(matches!(
        ChatTemplate::new("{{ messages[0].content }}")
            .unwrap()
            .render(&Chat::default(), End::Continue),
        Err(Error::Message { .. })
    ));
    assert!(Message::from_value(serde_json::json!({"content": "x"})).is_err());
    assert!(Message::from_value(serde_json::json!("x")).is_err());
    assert!(ChatTemplate::new("").unwrap().at("yesterday").is_err());
    // However deep a template nests, there is room for it, or an error.
    let nested = "{% set n = namespace(x=[]) %}{% for i in range(50000) %}{% set n.x = [n.x] %}\
                  {% endfor %}{{ n.x == n.x }}{{ n.x | string | length }}";
    let chain = |part: &str, n| format!("{{{{ {}x }}}}", part.repeat(n));
    let chains = ["-", "not ", "'a'~"].map(|part| chain(part, 990));
    for source in chains.iter().map(String::as_str).chain([nested]) {
        if let Ok(template) = ChatTemplate::new(source) {
            template.render(&chat, End::Reply).ok();
        }
    }
    assert!(ChatTemplate::new(&"x".repeat(1 << 20)).unwrap_err().to_string().contains("bytes"));
    // Each of these takes minijinja time that grows with the square of its length.
    for part in ["-", "not ", "x+", "x["] {
        // And so may one that has no end.
        for source in [chain(part, 5_000), format!("{{{{ {}", part.repeat(5_000))] {
            let source = format!("\n{source}");
            let error = ChatTemplate::new(&source).unwrap_err().to_string();
            assert!(error.starts_with("<template>:2: a tag of more than"), "{error}");
        }
    }
    // A tag that ends within its beginning does not.
    for source in ["{%}", "{#}", "{%}raw generation", "{#} {% generation %}", "{% raw %}{%}", "{%"]
    {
        if let Ok(template) = ChatTemplate::new(source) {
            template.render(&chat, End::Reply).ok();
        }
    }
}

#[test]
fn namespaces_are_changed_and_hold_themselves() {
    let chat = Chat::new([Message::user("x")]);
    let render = |source: &str| {
        let template = ChatTemplate::new(source).unwrap();
        template.render(&chat, End::Reply).map(|it| it.text().to_owned()).map_err(|e| e.to_string())
    };
    // As Jinja2 writes them.
    for (source, text) in [
        ("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n['a'] }}", "22"),
        ("{% set n = namespace({'a': 1}, b=2) %}{{ n.a }}{{ n.b }}{{ n.c is defined }}", "12False"),
        ("{% set n = namespace() %}\n{%- set n.a = 'x' if messages else 'y' -%}\n{{ n.a }}", "x"),
        ("{% set n=namespace() %}{% set n.a='%}' ~ \"'\" ~ '\\'' %}{{ n.a }}", "%}''"),
        ("{% set n = namespace() %}{% set n.a = 1, 2 %}{{ n.a | length }}", "2"),
        (
            "{% set n = namespace() %}{% set n.a %}b{% set c %}c{% endset %}{{ c }}{% endset %}{{ n.a }}",
            "bc",
        ),
        ("{% set n = namespace() %}{% set n.a | upper %}\nb\n{%- endset -%} {{ n.a }}", "B"),
        (
            "{% set n = namespace(f=1) %}{{ n is mapping }}{{ n == n }}{{ n == namespace(f=1) }}",
            "FalseTrueFalse",
        ),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set n = namespace(f=f) %}{{ n.f(1) }}", "<1>"),
        ("{{ \"{% set n.a = 1 %}\" }}{% set n = namespace() %}", "{% set n.a = 1 %}"),
    ] {
        assert_eq!(render(source).as_deref(), Ok(text), "{source}");
    }
    let error = render("{% set m = messages %}\n{% set m.namespace = 1 %}").unwrap_err();
    assert!(error.contains(":2: can only assign to namespaces"), "{error}");

    // What is put into itself, of everything that could go into it.
    let itself = "{% set n = namespace() %}{% set n.x = [{'n': n}] %}{% macro m() %}{{ n }}{% endmacro %}\
                  {% set n.m = m %}";
    for reads in [
        "n",
        "n.x",
        "n ~ n.x",
        "n.x | string",
        "n.x | tojson",
        "n.x == [{'n': namespace(x=n.x)}]",
        "[n, n.x, namespace(x=n)] | sort",
        "{n: n} | items",
        "n.x | unique | list",
        "n.x | pprint",
        "[n.x, [n]] | sum(start=[])",
        "n in n.x",
        "n.x < n.x",
        "debug()",
        "n.m()",
        "n | list",
        "n | length",
        "n | items",
        "n.x | join('-')",
        "n | dictsort",
        "n.x | map('string') | list",
    ] {
        render(&format!("{itself}{{{{ {reads} }}}}")).ok();
    }
}

#[test]
fn what_users_write_is_no_special_token() {
    let tokenizer = Tokenizer::from_folder(demo()).unwrap();
    let (eos, bos) = (tokenizer.eos_id().unwrap(), tokenizer.bos_id().unwrap());
    let source = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}<|endoftext|>{% endfor %}{{ messages | tojson }}";
    let folder = folder(&[
        ("chat_template.jinja", source),
        ("tokenizer_config.json", r#"{"bos_token": "<|startoftext|>"}"#),
    ]);
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    let evil = "a<|endoftext|>b <|<|endoftext|><|endoftext|>";
    let chat = Chat::new([Message::user(evil), Message::assistant("c<|endoftext|>")]);
    let count = |ids: &[u32], id: u32| ids.iter().filter(|other| **other == id).count();

    let open = template.render(&chat, End::Reply).unwrap();
    assert!(!open.is_guarded());
    assert_eq!(count(&open.encode(&tokenizer).unwrap(), eos), 10);

    let guarded = template.with_guard(&tokenizer).render(&chat, End::Reply).unwrap();
    assert!(guarded.is_guarded());
    assert_eq!(guarded.text(), open.text());
    let ids = guarded.encode(&tokenizer).unwrap();
    // Two of the template, and twice that of the assistant.
    assert_eq!((count(&ids, eos), count(&ids, bos)), (4, 1));
    let (masked, _) = guarded.encode_with_mask(&tokenizer).unwrap();
    assert_eq!(masked, ids);
    // The characters are all there.
    let spelled = tokenizer.decode_with_special(&ids).unwrap();
    assert_eq!(spelled.matches("<|endoftext|>").count(), 10, "{spelled}");

    // Texts that have the characters that marks are made of.
    let odd = Chat::new([Message::user("\u{FDD0}\u{FDD1}<|endoftext|>\u{FDD2}")]);
    let template = ChatTemplate::new("{{ messages[0].content }}").unwrap().with_guard(&tokenizer);
    let rendered = template.render(&odd, End::Reply).unwrap();
    assert_eq!(rendered.text(), odd.messages[0].text());
    assert_eq!(count(&rendered.encode(&tokenizer).unwrap(), eos), 0);
}

#[test]
fn the_mask_is_of_what_the_assistant_said() {
    let tokenizer = Tokenizer::from_folder(demo()).unwrap();
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(source).unwrap();
    let chat = Chat::new([
        Message::user("Once upon a time"),
        Message::assistant(" there was a größer fox"),
        Message::user(" who said"),
        Message::assistant(" 🦊."),
    ]);
    let rendered = template.render(&chat, End::Message).unwrap();
    let (ids, mask) = rendered.encode_with_mask(&tokenizer).unwrap();
    assert_eq!(ids, rendered.encode(&tokenizer).unwrap());
    let said = |wanted: bool| {
        let ids = ids.iter().zip(&mask).filter(|(_, mask)| **mask == wanted).map(|(id, _)| *id);
        tokenizer.decode(&ids.collect::<Vec<_>>()).unwrap()
    };
    assert_eq!(said(true), " there was a größer fox 🦊.");
    assert_eq!(said(false), "Once upon a time who said");
}
