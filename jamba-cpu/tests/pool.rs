//! Whose threads a step runs on.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use jamba_core::{
    Engine, EngineOptions, GenerateOptions, LanguageModel, Model, Request, SessionOptions,
};
use jamba_cpu::CpuBackend;
use rayon::prelude::*;

fn model() -> Model<CpuBackend> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/paper-block");
    Model::load(folder, CpuBackend::new()).unwrap()
}

/// Every thread of rayon's global pool waits for the engine: that must not be what it runs on.
#[test]
fn rayon_tasks_may_wait_for_an_engine() {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let options = EngineOptions { slots: 4, context: 64, ..Default::default() };
        let engine = Engine::ids_only(&model(), options).unwrap();
        let lengths: Vec<usize> = (0..64u32)
            .into_par_iter()
            .map(|i| {
                let options =
                    GenerateOptions { max_tokens: 5, ignore_eos: true, ..Default::default() };
                let stream = engine.submit(Request::new(vec![5, 6 + i], options)).unwrap();
                stream.collect_all().unwrap().ids.len()
            })
            .collect();
        let _ = send.send(lengths);
    });
    let lengths = receive.recv_timeout(Duration::from_secs(60)).expect("it waits for itself");
    assert_eq!(lengths, [5; 64]);
}

/// A session within a pool uses that, and gives the same as without, also on one thread.
#[test]
fn a_session_in_any_pool() {
    let model = model();
    let run = || {
        let mut session = model.session(SessionOptions::default()).unwrap();
        session.append(&[5, 6, 7, 8, 9]).unwrap().to_vec()
    };
    let expected = run();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(run), expected);
    }
}
