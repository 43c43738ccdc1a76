//! States as values: whatever is done with a session, it is that of its tokens, bit by bit.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{
    Error, GenerateOptions, Generator, LanguageModel, Model, Rewound, Sampling, Session,
    SessionOptions, Snapshot, StatePart, Tokenizer, WeightFormat, generate_ids,
};
use jamba_cpu::{CpuBackend, ReferenceBackend};
use proptest::prelude::ProptestConfig;
use proptest::test_runner::{RngSeed, TestRunner};
use tempfile::TempDir;

mod play;

use play::{acts, play};

const CONTEXT: usize = 48;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden").join(name)
}

fn cpu(name: &str) -> Box<dyn LanguageModel> {
    Box::new(Model::load(golden(name), CpuBackend::new()).unwrap())
}

fn session(model: &dyn LanguageModel, chunk: usize) -> Session {
    model.session(SessionOptions { context: CONTEXT, chunk, outputs: 3 }).unwrap()
}

/// Everything that a session holds: logits and states, as bits.
fn contents(session: &Session) -> Vec<Vec<u32>> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let mut all = vec![bits(session.last_logits())];
    for (layer, kind) in Schedule::new(session.config()).iter().enumerate() {
        let parts = match kind.mixer {
            MixerKind::Mamba => [StatePart::Conv, StatePart::Ssm],
            MixerKind::Attention => [StatePart::Keys, StatePart::Values],
        };
        all.extend(parts.map(|part| bits(&session.read_state(layer, part).unwrap())));
    }
    all
}

fn any_interleaving(model: &dyn LanguageModel, cases: u32) {
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(7),
        ..ProptestConfig::default()
    };
    let strategy = (1usize..9, acts(9, None));
    TestRunner::new(config)
        .run(&strategy, |(chunk, acts)| {
            let mut known = HashMap::new();
            play(
                session(model, chunk),
                &acts,
                |_| (),
                |s, act, ()| {
                    let fresh = known.entry(s.tokens().to_vec()).or_insert_with_key(|ids| {
                        let mut fresh = session(model, CONTEXT);
                        if !ids.is_empty() {
                            fresh.append(ids).unwrap();
                        }
                        contents(&fresh)
                    });
                    assert!(contents(s) == *fresh, "{act:?}: {:?}", s.tokens());
                },
            );
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_interleaving_equals_a_fresh_run_on_the_cpu() {
    for name in ["paper-block", "odd-shapes", "pure-attention", "pure-mamba", "sharded-bf16"] {
        any_interleaving(&*cpu(name), 40);
    }
}

#[test]
fn any_interleaving_equals_a_fresh_run_on_the_reference() {
    let model = Model::load(golden("reasoning-dense"), ReferenceBackend::new()).unwrap();
    any_interleaving(&model, 12);
}

#[test]
fn a_rewind_says_what_it_cost() {
    let model = cpu("paper-block");
    let mut s = session(&*model, 16);
    let ids: Vec<u32> = (3..43).collect();
    s.append(&ids[..20]).unwrap();
    assert_eq!(s.rewind(3).unwrap(), Rewound { checkpoint: None, replayed: 17 });
    assert_eq!(s.mark().unwrap(), 17);
    s.append(&ids[17..40]).unwrap();
    assert_eq!(s.rewind_to(20).unwrap(), Rewound { checkpoint: Some(17), replayed: 3 });
    assert_eq!(s.rewind_to(17).unwrap(), Rewound { checkpoint: Some(17), replayed: 0 });
    assert_eq!(s.rewind_to(10).unwrap(), Rewound { checkpoint: None, replayed: 10 });
    assert_eq!(s.checkpoints().count(), 0);

    s.checkpoint_every(8);
    s.append(&ids[10..40]).unwrap();
    assert_eq!(s.checkpoints().collect::<Vec<_>>(), [16, 24, 32, 40]);
    assert_eq!(s.rewind(1).unwrap(), Rewound { checkpoint: Some(32), replayed: 7 });
    assert!(s.unmark(32) && !s.unmark(32));
    assert_eq!(s.rewind(0).unwrap(), Rewound { checkpoint: Some(39), replayed: 0 });
    assert_eq!(s.rewind(6).unwrap(), Rewound { checkpoint: Some(24), replayed: 9 });
    let message = s.rewind(34).unwrap_err().to_string();
    assert!(message.contains("33 tokens"), "{message}");
    assert!(matches!(s.rewind_to(34), Err(Error::Rewind { position: 34, held: 33 })));

    // Only keys and values: no state to come from a checkpoint.
    let mut s = session(&*cpu("pure-attention"), 16);
    s.append(&ids[..20]).unwrap();
    assert_eq!(s.rewind(5).unwrap(), Rewound { checkpoint: Some(14), replayed: 1 });
}

#[test]
fn snapshots_of_a_lineage_share_their_positions() {
    let model = cpu("pure-attention");
    let mut s = session(&*model, 16);
    s.append(&[5; 30]).unwrap();
    let first = s.snapshot().unwrap();
    s.append(&[6; 2]).unwrap();
    let second = s.snapshot().unwrap();
    let mut fork = s.fork().unwrap();
    fork.append(&[7; 4]).unwrap();
    let third = fork.snapshot().unwrap();
    // 4 layers of 2 * kv_width f32, and 160 logits and the tokens and steps of each.
    let kv = jamba_core::memory::kv_bytes_per_token(model.config(), 4);
    let (shared, all) = (first.bytes(), second.bytes() + third.bytes());
    assert!(first.bytes() > 30 * kv && first.bytes() < 30 * kv + 2_000, "{shared}");
    assert!(second.bytes() - first.bytes() < 2 * kv + 100, "{all}");
    assert!(third.bytes() - second.bytes() < 4 * kv + 100, "{all}");
    drop((first, second));
    assert_eq!(third.position(), 36);
    s.restore(&third).unwrap();
    assert_eq!(contents(&s), contents(&fork));
}

fn damaged(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    let to = path.with_extension("damaged");
    std::fs::write(&to, bytes).unwrap();
    to
}

#[test]
fn a_bad_file_changes_nothing() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("state.safetensors");
    let model = cpu("paper-block");
    let mut s = session(&*model, 16);
    s.append(&[4, 5, 6, 7]).unwrap();
    s.save(&path).unwrap();
    s.append(&[8, 9]).unwrap();
    let before = contents(&s);
    let len = std::fs::metadata(&path).unwrap().len() as usize;
    let mut refused = |path: &Path, part: &str| {
        let message = s.load(path).unwrap_err().to_string();
        assert!(message.contains(part), "`{part}` is not in: {message}");
        assert!(contents(&s) == before && s.position() == 6);
    };
    for cut in [0, 7, 100, len / 2, len - 1] {
        refused(&damaged(&path, |bytes| bytes.truncate(cut)), "not a usable state");
    }
    refused(&damaged(&path, |bytes| bytes[len / 2] ^= 1), "checksum");
    refused(&damaged(&path, |bytes| bytes.push(0)), "not a usable state");
    refused(&golden("paper-block").join("model.safetensors"), "its format is `pt`");
    refused(&folder.path().join("none"), "No such file");

    // Another model, by its configuration or by its weights only.
    let mut other = session(&*cpu("pure-mamba"), 16);
    let message = other.load(&path).unwrap_err().to_string();
    assert!(message.contains("num_hidden_layers is 8, this model's is 4"), "{message}");
    let copy = TempDir::new().unwrap();
    std::fs::copy(golden("paper-block").join("config.json"), copy.path().join("config.json"))
        .unwrap();
    let weights = golden("paper-block").join("model.safetensors");
    let mut bytes = std::fs::read(weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
    let other = Model::load(copy.path(), CpuBackend::new()).unwrap();
    let message = session(&other, 16).load(&path).unwrap_err().to_string();
    assert!(message.contains("fingerprint"), "{message}");

    // One that has no room, and one on another backend, which goes on.
    let options = SessionOptions { context: 3, chunk: 3, outputs: 1 };
    let error = model.session(options).unwrap().load(&path).unwrap_err();
    assert!(matches!(error, Error::Context { needed: 4, allocated: 3 }), "{error}");
    let reference = Model::load(golden("paper-block"), ReferenceBackend::new()).unwrap();
    let mut s = session(&reference, 16);
    s.load(&path).unwrap();
    s.append(&[8]).unwrap();
    assert_eq!(s.tokens(), [4, 5, 6, 7, 8]);

    // The same model in another format would go on with other numbers.
    for format in [WeightFormat::ExpertsInt8, WeightFormat::Int8, WeightFormat::Int4] {
        let quantised =
            Model::load(golden("paper-block"), CpuBackend::new().with_format(format)).unwrap();
        assert_eq!(quantised.fingerprint(), model.fingerprint());
        let message = session(&quantised, 16).load(&path).unwrap_err().to_string();
        for part in ["weight_format", "stored", format.name()] {
            assert!(message.contains(part), "{message}");
        }
        let mut s = session(&quantised, 16);
        s.append(&[4, 5]).unwrap();
        let own = folder.path().join("own.safetensors");
        s.save(&own).unwrap();
        session(&quantised, 16).load(&own).unwrap();
        let message = session(&*model, 16).load(&own).unwrap_err().to_string();
        assert!(message.contains("weight_format"), "{message}");
    }
    let left = std::fs::read_dir(folder.path()).unwrap();
    assert!(left.into_iter().all(|e| !e.unwrap().path().to_string_lossy().ends_with(".tmp")));
}

#[test]
fn a_failed_save_leaves_what_was_there() {
    let folder = TempDir::new().unwrap();
    let mut s = session(&*cpu("pure-mamba"), 16);
    s.append(&[4, 5]).unwrap();
    let error = s.save(folder.path().join("no/such/folder.safetensors")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let path = folder.path().join("state.safetensors");
    s.save(&path).unwrap();
    s.append(&[6]).unwrap();
    s.save(&path).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap().tokens(), [4, 5, 6]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    // A folder stays one, even if it is empty.
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    let message = s.save(folder.path().join("folder")).unwrap_err().to_string();
    assert!(message.contains("it is a folder"), "{message}");
    assert!(s.save("").is_err() && s.save("..").is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// A renaming would put a file in the place of a link, or of a device.
#[cfg(unix)]
#[test]
fn only_a_file_is_replaced() {
    let folder = TempDir::new().unwrap();
    let [file, link, socket] = ["file", "link", "socket"].map(|name| folder.path().join(name));
    let mut s = session(&*cpu("pure-mamba"), 16);
    s.append(&[4, 5]).unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let message = s.save(&link).unwrap_err().to_string();
    assert!(message.contains("a link to a file that is not there"), "{message}");
    s.save(&file).unwrap();
    s.append(&[6]).unwrap();
    s.save(&link).unwrap();
    assert_eq!(Snapshot::load(&file).unwrap().tokens(), [4, 5, 6]);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let message = s.save(&socket).unwrap_err().to_string();
    assert!(message.contains("it is not a regular file"), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

/// Of a disk that is full: this test runs itself again with a limit on the size of files.
#[cfg(unix)]
#[test]
fn a_save_without_room_leaves_the_file_that_was_there() {
    const FOLDER: &str = "JAMBA_TEST_FULL";
    let Some(folder) = std::env::var_os(FOLDER) else {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("state.safetensors");
        let mut s = session(&*cpu("pure-mamba"), 16);
        s.append(&[4, 5]).unwrap();
        s.save(&path).unwrap();
        let shell = "trap '' XFSZ; ulimit -f 1; exec \"$0\" --exact --nocapture \"$1\"";
        let name = "a_save_without_room_leaves_the_file_that_was_there";
        let mut command = std::process::Command::new("sh");
        command.args(["-c", shell]).arg(std::env::current_exe().unwrap()).arg(name);
        let output = command.env(FOLDER, folder.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("it has no room: "), "{text}");
        assert_eq!(Snapshot::load(&path).unwrap().tokens(), [4, 5]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        return;
    };
    let mut s = session(&*cpu("pure-mamba"), 16);
    s.append(&[6; 40]).unwrap();
    let error = s.save(Path::new(&folder).join("state.safetensors")).unwrap_err();
    println!("it has no room: {error}");
}

#[test]
fn slots_are_gathered_all_at_once() {
    let model = cpu("paper-block");
    let limits = jamba_core::Limits { slots: 5, context: 8, tokens: 40, outputs: 5 };
    let plans = [[1, 2, 0, 4, 3], [0, 0, 0, 0, 0], [4, 3, 2, 1, 0], [1, 0, 1, 0, 4]];
    for sources in plans {
        let mut runner = model.runner(limits).unwrap();
        let mut batch = jamba_core::Batch::new();
        for slot in 0..5u32 {
            let ids = [10 + slot, 20, 30 + slot];
            batch.push(slot as usize, 0, &ids, jamba_core::Outputs::Last);
        }
        runner.step(&batch).unwrap();
        let read = |runner: &dyn jamba_core::Runner, slot| {
            let ssm = runner.read_state(0, StatePart::Ssm, slot, 0..3).unwrap();
            [ssm, runner.read_state(4, StatePart::Keys, slot, 0..3).unwrap()]
        };
        let before: Vec<_> = (0..5).map(|slot| read(&*runner, slot)).collect();
        runner.gather(&sources, 3).unwrap();
        for (slot, source) in sources.iter().enumerate() {
            assert!(read(&*runner, slot) == before[*source], "{sources:?}: {slot}");
        }
        assert!(runner.gather(&[5], 3).is_err());
        assert!(runner.copy_slot(0, 1, 9).is_err());
    }
}

/// A runner does not take the caller's word for where a sequence is.
#[test]
fn a_step_at_another_position_is_refused() {
    use jamba_core::{Batch, Limits, Outputs, Runner};
    let limits = Limits { slots: 3, context: 16, tokens: 16, outputs: 3 };
    let single =
        |slot, position, tokens: &[u32]| Batch::single(slot, position, tokens, Outputs::Last);
    let refused = |runner: &mut dyn Runner, batch: &Batch, part: &str| {
        let error = runner.step(batch).unwrap_err();
        assert!(matches!(error, Error::Batch { what: "position", .. }), "{error}");
        assert!(error.to_string().contains(part), "`{part}` is not in: {error}");
    };
    for name in ["paper-block", "pure-mamba"] {
        let model = cpu(name);
        let mut runner = model.runner(limits).unwrap();
        let runner = &mut *runner;
        refused(runner, &single(0, 1, &[5]), "slot 0 holds 0 tokens");
        runner.step(&single(0, 0, &[5, 6, 7])).unwrap();
        let logits = runner.logits().unwrap();
        for position in [0, 2, 4] {
            refused(runner, &single(0, position, &[8]), "slot 0 holds 3 tokens");
        }
        // One run that is wrong refuses the batch, and changes nothing.
        let mut batch = single(0, 3, &[8]);
        batch.push(1, 2, &[8], Outputs::Last);
        refused(runner, &batch, "slot 1 holds 0 tokens");
        assert_eq!(runner.logits().unwrap(), logits);
        // Copies and written states say where they are.
        assert!(runner.copy_slot(0, 1, 2).is_err() && runner.copy_slot(2, 1, 3).is_err());
        runner.copy_slot(0, 1, 3).unwrap();
        runner.step(&single(1, 3, &[8])).unwrap();
        let expected = runner.logits().unwrap();
        let ssm = runner.read_state(0, StatePart::Ssm, 0, 0..3).unwrap();
        let conv = runner.read_state(0, StatePart::Conv, 0, 0..3).unwrap();
        runner.write_state(0, StatePart::Ssm, 0, 0..2, &ssm).unwrap();
        refused(runner, &single(0, 3, &[8]), "slot 0 holds 2 tokens");
        runner.write_state(0, StatePart::Ssm, 0, 0..3, &ssm).unwrap();
        runner.write_state(0, StatePart::Conv, 0, 0..3, &conv).unwrap();
        runner.step(&single(0, 3, &[8])).unwrap();
        assert_eq!(runner.logits().unwrap(), expected);
        runner.reset(0).unwrap();
        refused(runner, &single(0, 4, &[8]), "slot 0 holds 0 tokens");
        runner.step(&single(0, 0, &[5])).unwrap();
    }
    // Keys and values are there for every earlier position: a run may overwrite the later ones.
    let model = cpu("pure-attention");
    let mut runner = model.runner(limits).unwrap();
    let runner = &mut *runner;
    runner.step(&single(0, 0, &[5, 6, 7])).unwrap();
    runner.step(&single(0, 2, &[7])).unwrap();
    let expected = runner.logits().unwrap();
    runner.step(&single(1, 0, &[5, 6, 7])).unwrap();
    assert_eq!(runner.logits().unwrap(), expected);
    refused(runner, &single(0, 4, &[8]), "slot 0 holds 3 tokens");
    let keys = runner.read_state(0, StatePart::Keys, 0, 0..1).unwrap();
    let beyond = runner.write_state(0, StatePart::Keys, 0, 5..6, &keys).unwrap_err();
    assert!(beyond.to_string().contains("slot 0 has keys and values of 3"), "{beyond}");
    assert!(runner.write_state(0, StatePart::Keys, 9, 0..1, &keys).is_err());
}

/// A part that a layer does not have, or that is not there, is named; nothing panics.
#[test]
fn a_part_of_the_state_that_is_not_there() {
    let reference = Model::load(golden("paper-block"), ReferenceBackend::default()).unwrap();
    for model in [&*cpu("paper-block"), &reference as &dyn LanguageModel] {
        let mut s = session(model, 16);
        s.append(&[5, 6, 7]).unwrap();
        for (layer, part, text) in [
            (0, StatePart::Keys, "no Keys state in layer 0: it is a Mamba layer"),
            (4, StatePart::Ssm, "no Ssm state in layer 4: it is an attention layer"),
            (8, StatePart::Conv, "no Conv state in layer 8: the model has 8 layers"),
        ] {
            let message = s.read_state(layer, part).unwrap_err().to_string();
            assert!(message.contains(text), "`{text}` is not in: {message}");
        }
    }
}

#[test]
fn generators_go_on_from_forks_and_rewinds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m");
    let model = Model::load(&folder, CpuBackend::new()).unwrap();
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let ids = tokenizer.encode("Once upon a time there was a fox").unwrap();
    let options = |max_tokens| GenerateOptions {
        sampling: Sampling { temperature: 1.0, seed: 5, ..Sampling::default() },
        max_tokens,
        ..GenerateOptions::default()
    };
    let resumed = |session: &mut Session| {
        let mut generator = Generator::new(session, &tokenizer, options(9)).unwrap();
        generator.resume().unwrap();
        assert!(matches!(generator.resume(), Err(Error::LatePrompt)));
        generator.map(|piece| piece.unwrap().text).collect::<String>()
    };
    let mut s = session(&model, 16);
    let expected = generate_ids(&mut s, &tokenizer, &ids, options(9)).unwrap().text;
    assert_eq!(s.position(), ids.len() + 9);
    s.rewind(9).unwrap();
    let mut fork = s.fork().unwrap();
    assert_eq!(resumed(&mut fork), expected);
    assert_eq!(resumed(&mut s), expected);

    let mut empty = session(&model, 16);
    let mut generator = Generator::new(&mut empty, &tokenizer, options(9)).unwrap();
    assert!(matches!(generator.resume(), Err(Error::EmptyPrompt)));
}
