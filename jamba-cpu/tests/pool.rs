//! Whose threads a step runs on.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use jamba_core::{
    Engine, EngineOptions, GenerateOptions, LanguageModel, Limits, Model, Request, SessionOptions,
    WeightFormat,
};
use jamba_cpu::CpuBackend;
use rayon::prelude::*;

fn model() -> Model<CpuBackend> {
    model_on(CpuBackend::new())
}

fn model_on(backend: CpuBackend) -> Model<CpuBackend> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/paper-block");
    Model::load(folder, backend).unwrap()
}

/// Runs a test of this file again, in a process of its own with this variable set.
fn again(test: &str, variable: &str, value: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--nocapture", test]).env("JAMBA_TEST_AGAIN", "1");
    command.env(variable, value).output().unwrap()
}

/// Whether this is that process.
fn is_again() -> bool {
    std::env::var_os("JAMBA_TEST_AGAIN").is_some()
}

/// Where all pools have one thread, nobody waits for another.
#[test]
fn an_engine_on_one_thread() {
    let options = EngineOptions { slots: 4, context: 64, ..Default::default() };
    let texts = || {
        let engine = Engine::ids_only(&model(), options).unwrap();
        let streams: Vec<_> = (0..8u32)
            .map(|i| {
                let options =
                    GenerateOptions { max_tokens: 5, ignore_eos: true, ..Default::default() };
                engine.submit(Request::new(vec![5, 6 + i], options)).unwrap()
            })
            .collect();
        streams.into_iter().map(|s| s.collect_all().unwrap().ids).collect::<Vec<_>>()
    };
    if is_again() {
        assert_eq!(rayon::current_num_threads(), 1);
        // Tasks of the pool may wait for it too.
        let texts = rayon::scope(|_| texts());
        println!("it said: {texts:?}");
        return;
    }
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = send.send(again("an_engine_on_one_thread", "RAYON_NUM_THREADS", "1"));
    });
    let output = receive.recv_timeout(Duration::from_secs(60)).expect("it waits for itself");
    let expected = format!("it said: {:?}", texts());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains(&expected), "{expected}\n{output:?}");
}

/// Quantising is spread over the pool that loads, also one of one thread: the same weights.
#[test]
fn weights_are_quantised_in_any_pool() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/paper-block");
    for format in [WeightFormat::ExpertsInt8, WeightFormat::Int8, WeightFormat::Int4] {
        let run = || {
            let model = Model::load(&folder, CpuBackend::new().with_format(format)).unwrap();
            let mut session = model.session(SessionOptions::default()).unwrap();
            session.append(&[5, 6, 7, 8, 9]).unwrap().to_vec()
        };
        let expected = run();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(run), expected, "{format} by {threads}");
        }
    }
}

/// The environment chooses the instruction set; what the machine lacks is refused at loading.
#[test]
fn the_instruction_set_of_the_environment() {
    let test = "the_instruction_set_of_the_environment";
    if is_again() {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../jamba-tests/golden/paper-block");
        match Model::load(folder, CpuBackend::new()) {
            Ok(model) => println!("it is {}.", model.backend().isa()),
            Err(error) => println!("it is refused: {error}"),
        }
        return;
    }
    let said = |name: &str| {
        let output = again(test, "JAMBA_CPU_ISA", name);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let all: Vec<_> = CpuBackend::all().iter().map(CpuBackend::isa).collect();
    for name in ["amx", "avx512bf16", "avx512", "avx2", "portable", "neon"] {
        let said = said(name);
        if all.contains(&name) {
            assert!(said.contains(&format!("it is {name}.")), "{said}");
        } else {
            let refused = format!("JAMBA_CPU_ISA={name}: this machine has {}", all.join(", "));
            assert!(said.contains("it is refused: ") && said.contains(&refused), "{said}");
        }
    }
    assert!(said("").contains(&format!("it is {}.", all[0])));
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

/// Tasks run on the threads of the pool that was given, and on the one that runs the step: so an
/// engine, which has a thread of its own, keeps to it.
#[test]
fn an_engine_in_a_pool_of_ones_own() {
    let name = |index| format!("mine-{index}");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).thread_name(name).build().unwrap();
    let pool = Arc::new(pool);
    let model = model_on(CpuBackend::new().with_pool(pool));
    let limits = Limits { slots: 1, context: 8, tokens: 8, outputs: 1 };
    let runner = model.runner(limits).unwrap();
    let names = Mutex::new(HashSet::new());
    for _ in 0..50 {
        runner.for_each(8, &|_| {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            names.lock().unwrap().insert(name);
            std::thread::sleep(Duration::from_millis(1));
        });
    }
    let mut names = names.into_inner().unwrap();
    assert!(names.remove(std::thread::current().name().unwrap()));
    assert!(!names.is_empty() && names.iter().all(|name| name.starts_with("mine-")), "{names:?}");

    let options = EngineOptions { slots: 4, context: 64, ..Default::default() };
    let run = |model: &Model<CpuBackend>| {
        let engine = Engine::ids_only(model, options).unwrap();
        let options = GenerateOptions { max_tokens: 20, ignore_eos: true, ..Default::default() };
        engine.submit(Request::new(vec![5, 6], options)).unwrap().collect_all().unwrap().ids
    };
    assert_eq!(run(&model), run(&self::model()));
}
