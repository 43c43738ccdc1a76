//! The chat example as a user runs it: what it says, keeps, takes back and saves.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

fn chat(args: &[&str]) -> Child {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let path = profile.join("examples/chat").with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.is_file(), "{} is not built", path.display());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let pipe = Stdio::piped;
    let mut command = Command::new(path);
    command.current_dir(root).args(args).stdin(pipe()).stdout(pipe()).stderr(pipe());
    command.spawn().unwrap()
}

/// Says these lines, and returns stdout and stderr.
#[track_caller]
fn talk(args: &[&str], lines: &[&str]) -> (String, String) {
    let mut child = chat(args);
    let input = lines.join("\n") + "\n";
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let texts = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{}", texts[1]);
    texts.into()
}

const SHORT: [&str; 4] = ["--max-tokens", "6", "--temperature", "0"];

/// Tokens kept, replayed and new of every turn.
fn prefills(err: &str) -> Vec<[usize; 3]> {
    let lines = err.lines().filter(|line| line.starts_with("[prompt:"));
    let numbers = |line: &str| {
        let words = line.split(|c: char| !c.is_ascii_digit());
        let all: Vec<usize> = words.filter_map(|word| word.parse().ok()).collect();
        [all[0], all[1], all[2]]
    };
    lines.map(numbers).collect()
}

#[test]
fn a_turn_reads_only_what_is_new() {
    let (_, err) = talk(&SHORT, &["Once upon a time", "The fox said", "", "A bear"]);
    let turns = prefills(&err);
    assert_eq!(turns.len(), 3, "{err}");
    // The beginning-of-text token and four words; six tokens of reply, and the next line.
    assert_eq!(turns[0], [0, 0, 5], "{err}");
    assert_eq!(turns[1][..2], [11, 0], "{err}");
    assert_eq!(turns[2][..2], [11 + turns[1][2] + 6, 0], "{err}");
    assert!(turns[1][2] <= 5 && turns[2][2] <= 5, "{err}");
}

#[test]
fn conversations_are_forked_taken_back_saved_and_loaded() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("chat.safetensors");
    let file = file.to_str().unwrap();
    let lines = [
        "Once upon a time",
        "/fork",
        "The fox",
        "/undo",
        "The bear",
        &format!("/save {file}"),
        "/switch 1",
        "The bear",
        "//quit",
    ];
    let (out, err) = talk(&SHORT, &lines);
    let (first, _) = talk(&SHORT, &lines[..1]);
    let (both, _) = talk(&SHORT, &["Once upon a time", "The bear"]);
    let second = both.strip_prefix(&first).unwrap();
    // The fork, after what was taken back, says what the first conversation says.
    assert!(out.starts_with(&first) && out.contains(&second.repeat(2)), "{out}{err}");
    assert!(err.contains("[conversation 2]") && err.contains("[taken back: The fox]"), "{err}");
    let turns = prefills(&err);
    assert_eq!(turns.len(), 5, "{err}");
    assert!(turns[2][1] <= 4 && turns[2][0] >= 11, "{err}");

    let (_, err) = talk(&SHORT, &[&format!("/load {file}"), "And then"]);
    let loaded = prefills(&err);
    assert!(loaded[0][0] > 15 && loaded[0][2] <= 5, "{err}");
}

#[test]
fn commands_that_are_wrong_are_told_and_the_conversation_goes_on() {
    let lines = [
        "/nothing",
        "/load /no/such/file",
        "/load",
        "/switch 7",
        "/undo",
        "/system Tell tales.",
        "/help",
        "Once upon a time",
        "/quit",
        "never said",
    ];
    let (out, err) = talk(&SHORT, &lines);
    assert_eq!(out.lines().count(), 1, "{out}");
    for part in [
        "there is no /nothing",
        "/no/such/file",
        "/load needs a file",
        "conversations 1 to 1",
        "nothing was said",
        "/fork   ",
    ] {
        assert!(err.contains(part), "`{part}` is not in: {err}");
    }
}

#[test]
fn a_template_can_be_given() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("template.jinja");
    std::fs::write(&file, "{{ bos_token }}{% if messages[0].content == 'no' %}\n{{ raise_exception('not that') }}{% endif %}Once upon a time")
        .unwrap();
    let args = [&SHORT[..], &["--template", file.to_str().unwrap()]].concat();
    let (out, err) = talk(&args, &["no", "yes"]);
    assert!(err.contains("template.jinja:2: not that"), "{err}");
    assert_eq!(out.lines().count(), 1, "{out}");
    std::fs::write(&file, "{% if").unwrap();
    let output = chat(&args).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_reply_and_not_the_program() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut child = chat(&["--max-tokens", "100000", "--context", "100001"]);
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    writeln!(input, "Once upon a time").unwrap();
    let mut bytes = [0; 64];
    assert!(output.read(&mut bytes).unwrap() > 0);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::INT).unwrap();
    writeln!(input, "/quit").unwrap();
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the reply was not ended");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    reader.join().unwrap();
    assert!(status.success(), "{status}");
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(err.contains("end: cancelled"), "{err}");
}
