//! What fuzzing found worth keeping of bodies of requests, replayed: see `fuzz/`.
#![allow(unreachable_pub, reason = "the files included are of a crate of their own")]

use std::path::Path;

#[path = "../../../fuzz/src/server.rs"]
mod server;
#[path = "../../../fuzz/src/tiny.rs"]
mod tiny;

#[test]
fn every_body_is_answered() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/server");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!files.is_empty());
    for path in files {
        println!("{}", path.display());
        server::body(&std::fs::read(path).unwrap());
    }
}
