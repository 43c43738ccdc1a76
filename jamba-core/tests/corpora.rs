//! What fuzzing found worth keeping, replayed: see `fuzz/`.
#![allow(unreachable_pub, reason = "the files included are of a crate of their own")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[path = "../../fuzz/src/inputs.rs"]
mod inputs;
#[path = "../../fuzz/src/tiny.rs"]
mod tiny;

/// The files of a corpus, by name.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn every_input_ends_in_ok_or_err() {
    for (target, run) in inputs::TARGETS {
        let files = corpus(target);
        assert!(!files.is_empty(), "{target} has no corpus");
        for (path, data) in files {
            let began = Instant::now();
            run(&data);
            let took = began.elapsed();
            assert!(took < Duration::from_secs(10), "{} took {took:?}", path.display());
        }
    }
}
