//! The program as it is started: where it listens, what it warns of, how it ends.
#![cfg(unix)]

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A server that listens, and what it has said.
struct Started {
    child: Child,
    said: String,
    stderr: BufReader<ChildStderr>,
}

fn start(args: &[&str], key: &str) -> Started {
    let mut child = Command::new(env!("CARGO_BIN_EXE_jamba-serve"))
        .args(["--port", "0", "--slots", "1", "--context", "64"])
        .args(args)
        .env("JAMBA_API_KEY", key)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("http://") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "it ended: {said}");
    }
    Started { child, said, stderr }
}

impl Started {
    /// Asks for the end; everything that it said.
    fn end(mut self) -> String {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        while self.stderr.read_line(&mut self.said).unwrap() > 0 {}
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{}", self.said);
        self.said
    }
}

#[test]
fn it_listens_on_this_machine_and_ends_when_asked() {
    let said = start(&[], "").end();
    assert!(said.contains("http://127.0.0.1:") && said.contains("[ending"), "{said}");
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn whoever_can_be_reached_without_a_key_is_warned() {
    for (args, key, is_warned) in [
        (&["--host", "0.0.0.0"][..], "", true),
        (&["--host", "0.0.0.0", "--api-key", ""], "", true),
        (&["--host", "0.0.0.0"], "secret", false),
    ] {
        let started = start(args, key);
        // The end comes after the warning.
        let said = started.end();
        assert_eq!(said.contains("there is no --api-key"), is_warned, "{said}");
    }
}
