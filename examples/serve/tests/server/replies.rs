//! What is answered.

use futures_util::future::join_all;
use jamba_core::{LanguageModel, Model, SessionOptions, Tokenizer};
use jamba_cpu::CpuBackend;
use jamba_examples::demo_model;
use serde_json::{Value, json};

use crate::running::{CHAT, ENGINE, TEXT, alone, chat, demo, settings, start, with};

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_are_what_each_is_alone() {
    let server = demo().await;
    let animals = ["fox", "bear", "owl", "king", "little girl", "giant", "mouse", "wolf"];
    let prompts: Vec<(String, u64)> = (0..64)
        .map(|i| (format!("Once upon a time there was a {}", animals[i % 8]), i as u64))
        .collect();
    let expected = alone(&prompts, 24);
    let streams = prompts.iter().map(|(prompt, seed)| {
        let body = json!({
            "messages": [{ "role": "user", "content": prompt }],
            "max_completion_tokens": 24, "seed": seed, "stream": true,
        });
        let server = &server;
        async move {
            let chunks = server.chunks(CHAT, &body).await;
            let contents =
                chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
            contents.collect::<String>()
        }
    });
    let got = join_all(streams).await;
    assert_eq!(got, expected);
    server.ended(64).await;
    let stats = server.engine.stats();
    assert_eq!((stats.finished, stats.cancelled, stats.failed), (64, 0, 0));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_whole_and_streamed_are_the_same() {
    let server = demo().await;
    let body =
        with(chat("Once upon a time"), json!({ "n": 2, "logprobs": true, "top_logprobs": 2 }));
    let whole = server.json(CHAT, &body).await;
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "tales");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(whole["usage"]["prompt_tokens"], 5);
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    assert_eq!(whole["usage"]["total_tokens"], 21);
    let [a, b] = &whole["choices"].as_array().unwrap()[..] else { panic!("{whole}") };
    assert_ne!(a["message"]["content"], b["message"]["content"]);
    assert_eq!(
        (&a["finish_reason"], &a["message"]["role"]),
        (&json!("length"), &json!("assistant"))
    );
    let tokens = a["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert!(top[0]["logprob"].as_f64().unwrap() >= top[1]["logprob"].as_f64().unwrap());
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
    }

    let stream = with(body, json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let chunks = server.chunks(CHAT, &stream).await;
    for index in 0..2 {
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let of_choice: Vec<&Value> = chunks.iter().filter(of_choice).collect();
        let text: String = of_choice
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, whole["choices"][index]["message"]["content"]);
        assert_eq!(of_choice[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(of_choice.last().unwrap()["choices"][0]["finish_reason"], "length");
        let told = of_choice
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
        let told: Vec<&Value> = told.flatten().collect();
        assert_eq!(
            told,
            whole["choices"][index]["logprobs"]["content"]
                .as_array()
                .unwrap()
                .iter()
                .collect::<Vec<_>>()
        );
    }
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(16)));
    assert!(
        last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0,
        "{last}"
    );
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_of_texts_and_ids() {
    let server = demo().await;
    let greedy = json!({ "prompt": "The little dog", "max_tokens": 5, "temperature": 0 });
    let said = " was so frightened that he";
    let answer = server.json(TEXT, &greedy).await;
    assert_eq!(
        (&answer["object"], &answer["choices"][0]["text"]),
        (&json!("text_completion"), &json!(said))
    );
    let ids = with(greedy.clone(), json!({ "prompt": [1, 344, 425, 1175], "logprobs": 1 }));
    let answer = server.json(TEXT, &ids).await;
    assert_eq!(answer["choices"][0]["text"], said);
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(logprobs["text_offset"][0], 0);
    let several = with(
        greedy.clone(),
        json!({ "prompt": ["The little dog", "Once upon a time"], "n": 2, "echo": true }),
    );
    let answer = server.json(TEXT, &several).await;
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 4);
    assert_eq!(texts[0], format!("The little dog{said}"));
    assert!(
        texts[0] == texts[1] && texts[2] == texts[3] && texts[2].starts_with("Once upon a time")
    );
    // A prompt counts once, however many choices it has.
    assert_eq!(answer["usage"]["prompt_tokens"], 4 + 5);
    let stopped = with(greedy, json!({ "stop": [" that"], "stream": true }));
    let chunks = server.chunks(TEXT, &stopped).await;
    let text: String =
        chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, " was so frightened");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    server.end().await;
}

/// The demo model calls no tools (what is heard of calls: `reply.rs`): the template tells what it got.
#[tokio::test(flavor = "multi_thread")]
async fn tools_and_messages_reach_the_template() {
    let template = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.town }}{% endif %}\
        {% if m.role == 'bad' %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}\
        {% if tools %}{{ tools[0].function.name }}{% endif %}{{ enable_thinking }}";
    let server = start(settings(), ENGINE, Some(template)).await;
    let call = json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"town\": \"Ulm\"}" } });
    let body = json!({
        "messages": [{ "role": "assistant", "content": null, "tool_calls": [call] }],
        "tools": [{ "type": "function", "function": { "name": "weather" } }],
        "chat_template_kwargs": { "enable_thinking": false },
        "max_tokens": 1,
    });
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let tokens = |text: &str| tokenizer.encode_plain(text).unwrap().len();
    let answer = server.json(CHAT, &body).await;
    assert_eq!(answer["usage"]["prompt_tokens"], tokens("UlmweatherFalse"));
    let none = server.json(CHAT, &with(body.clone(), json!({ "tool_choice": "none" }))).await;
    assert_eq!(none["usage"]["prompt_tokens"], tokens("UlmFalse"));
    let named = json!({ "type": "function", "function": { "name": "forecast" } });
    for (choice, part) in [(json!("sometimes"), "required"), (named, "no such tool")] {
        let bad = with(body.clone(), json!({ "tool_choice": choice }));
        server.refuse(CHAT, &bad, 400, part).await;
    }
    let bad = with(body, json!({ "messages": [{ "role": "bad" }] }));
    server.refuse(CHAT, &bad, 400, "no bad").await;
    server.end().await;
}

/// The demo model has never seen JSON, nor a tool.
#[tokio::test(flavor = "multi_thread")]
async fn replies_are_held_to_a_format_and_to_tools() {
    let server = demo().await;
    let schema = json!({
        "type": "object",
        "properties": {
            "animal": { "enum": ["fox", "owl"] },
            "age": { "type": "integer", "minimum": 1, "maximum": 99 },
        },
        "required": ["animal", "age"],
        "additionalProperties": false,
    });
    let is_valid = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        assert!(["fox", "owl"].contains(&value["animal"].as_str().unwrap()), "{text}");
        assert!((1..100).contains(&value["age"].as_i64().unwrap()), "{text}");
        assert_eq!(value.as_object().unwrap().len(), 2, "{text}");
    };
    let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
    let hot = json!({ "temperature": 3, "n": 4, "seed": 1 });
    for heat in [json!({ "temperature": 0 }), hot] {
        let body = with(with(chat("A hero."), heat), json!({ "response_format": format }));
        let answer = server.json(CHAT, &with(body.clone(), json!({ "max_tokens": 256 }))).await;
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{answer}");
            is_valid(choice["message"]["content"].as_str().unwrap());
        }
        let cut = server.json(CHAT, &with(body, json!({ "max_tokens": 1 }))).await;
        assert_eq!(cut["choices"][0]["finish_reason"], "length");
    }
    let any = json!({ "response_format": { "type": "json_object" }, "max_tokens": 8 });
    let answer = server.json(CHAT, &with(chat("A hero."), any)).await;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text}");

    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": schema } });
    let tools = json!([tool("tame"), tool("feed")]);
    let named = json!({ "type": "function", "function": { "name": "feed" } });
    for (choice, names) in [(json!("required"), &["tame", "feed"][..]), (named, &["feed"][..])] {
        let fields = json!({ "tools": tools, "tool_choice": choice, "max_tokens": 256 });
        let body = with(with(chat("A hero."), json!({ "temperature": 2, "seed": 3 })), fields);
        let answer = server.json(CHAT, &body).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
        let calls = &answer["choices"][0]["message"]["tool_calls"];
        assert_eq!(calls.as_array().unwrap().len(), 1);
        assert!(names.contains(&calls[0]["function"]["name"].as_str().unwrap()), "{calls}");
        is_valid(calls[0]["function"]["arguments"].as_str().unwrap());
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_scored() {
    let server = demo().await;
    let text = "The little dog was so frightened";
    let body = json!({ "prompt": text, "echo": true, "logprobs": 2, "max_tokens": 0 });
    let answer = server.json(TEXT, &body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &answer["usage"]["completion_tokens"]), (&json!(text), &json!(0)));
    let tokenizer = Tokenizer::from_folder(demo_model()).unwrap();
    let model = Model::load(demo_model(), CpuBackend::new()).unwrap();
    let ids = tokenizer.encode(text).unwrap();
    let options = SessionOptions { context: 64, outputs: 64, ..SessionOptions::default() };
    let scores = model.session(options).unwrap().score(&ids[..1], &ids[1..], 2).unwrap();
    let logprobs = &choice["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), ids.len(), "{name}");
    }
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
    for (i, scored) in scores.iter().enumerate() {
        let told = list("token_logprobs")[i + 1].as_f64().unwrap();
        assert!((told - f64::from(scored.logprob)).abs() < 1e-6, "{told} {scored:?}");
        assert_eq!(list("top_logprobs")[i + 1].as_object().unwrap().len(), 2);
        let (token, offset) = (&list("tokens")[i + 1], &list("text_offset")[i + 1]);
        let at = &text[offset.as_u64().unwrap() as usize..];
        assert!(at.starts_with(token.as_str().unwrap()), "{token} is not at {offset}");
    }
    // And what is generated comes after it, whole and streamed.
    let body = with(body, json!({ "max_tokens": 3, "temperature": 0, "n": 2 }));
    let whole = server.json(TEXT, &body).await;
    let chunks = server.chunks(TEXT, &with(body, json!({ "stream": true }))).await;
    for index in 0..2 {
        let logprobs = &whole["choices"][index]["logprobs"];
        for name in ["tokens", "token_logprobs", "text_offset"] {
            let parts = chunks.iter().map(|chunk| &chunk["choices"][0]);
            let parts = parts.filter(|part| part["index"] == index);
            let parts = parts.filter_map(|part| part["logprobs"][name].as_array());
            assert_eq!(json!(parts.flatten().collect::<Vec<_>>()), logprobs[name]);
            assert_eq!(logprobs[name].as_array().unwrap().len(), ids.len() + 3);
        }
        let spoken = logprobs["tokens"].as_array().unwrap().iter().skip(1);
        let spoken: String = spoken.map(|token| token.as_str().unwrap()).collect();
        assert_eq!(spoken, whole["choices"][index]["text"]);
    }
    server.end().await;
}
