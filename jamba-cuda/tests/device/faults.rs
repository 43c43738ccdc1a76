//! What goes wrong is an error that says what to do, on a machine with a card and without.

use std::cell::{Cell, RefCell};
use std::process::Command;
use std::sync::Arc;

use jamba_core::backend::Backend;
use jamba_core::random::RandomParams;
use jamba_core::weights::ParamSpec;
use jamba_core::{
    Batch, Config, Dtype, Limits, Model, ModelRunner, Outputs, Param, ParamSource, Runner,
};
use jamba_cuda::{CudaBackend, CudaOptions, Error, KernelCache, Precision, Tensor};
use libtest_mimic::{Failed, Trial};

use crate::support::{cache, check, guarded, open, random, small};

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |name, run: fn() -> Result<(), Failed>| Trial::test(format!("faults::{name}"), run);
    vec![
        trial("no_such_device", no_such_device),
        trial("what_does_not_fit", what_does_not_fit),
        trial("weights_that_do_not_fit", weights_that_do_not_fit),
        trial("out_of_memory", out_of_memory),
        trial("guards_see_what_is_written_beyond", guards),
        trial("others_go_on", others_go_on),
        trial("damaged_cache", damaged_cache),
        trial("a_kernel_that_fails", a_kernel_that_fails),
    ]
}

/// What takes the whole card: not beside others.
pub(crate) fn alone() -> Vec<Trial> {
    vec![Trial::test("faults::out_of_memory_in_the_middle", out_of_memory_in_the_middle)]
}

pub(crate) fn anywhere() -> Vec<Trial> {
    vec![Trial::test("faults::opening_never_panics", || {
        for ordinal in [0, 1, 99, usize::MAX] {
            match CudaBackend::with_options(options(ordinal)) {
                Ok(_) => {}
                Err(error) => {
                    let message = jamba_core::Error::from(error).to_string();
                    check(message.starts_with("cuda: ") && message.len() > 40, message)?;
                }
            }
        }
        Ok(())
    })]
}

fn options(ordinal: usize) -> CudaOptions {
    CudaOptions { ordinal, cache: cache(), ..CudaOptions::default() }
}

fn no_such_device() -> Result<(), Failed> {
    match CudaBackend::new(99) {
        Err(Error::NoDevice { ordinal: 99, count }) => check(count > 0, "it counts none"),
        other => Err(format!("{:?}", other.err()).into()),
    }
}

fn what_does_not_fit() -> Result<(), Failed> {
    let backend = open(Precision::Bf16)?;
    let config = Config::preset("jamba-tales-11m")?;
    let limits = Limits { slots: 1 << 12, context: 1 << 20, tokens: 16, outputs: 1 };
    let plan = backend.plan(&config, &limits)?;
    check(plan.check().is_err(), plan.to_string())?;
    let model = random(config, 1, backend)?;
    match ModelRunner::new(model.clone(), limits).err() {
        Some(error) => check(error.to_string().contains("GiB are free"), error.to_string())?,
        None => return Err("a KV cache of terabytes was allocated".into()),
    }
    let small = Limits { slots: 1, context: 64, tokens: 16, outputs: 1 };
    ModelRunner::new(model, small)?;
    Ok(())
}

/// A source that nobody may ask.
struct Untouched;

impl ParamSource for Untouched {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let what = format!("loading {} before the plan was checked", spec.name);
        Err(jamba_core::Error::Unsupported { backend: "test", what })
    }
}

/// Refused with the plan, before the first parameter is read.
fn weights_that_do_not_fit() -> Result<(), Failed> {
    let config = Config::preset("jamba-1.5-large")?;
    let error = Model::new(config, &Untouched, open(Precision::Bf16)?).err().ok_or("it fits")?;
    let message = error.to_string();
    let is_plan =
        ["does not fit", "weights 74", "GiB are free"].iter().all(|s| message.contains(s));
    check(is_plan, message)
}

/// The guards of the other trials would see it.
fn guards() -> Result<(), Failed> {
    let backend = open(Precision::F32)?;
    let overruns = backend.overruns();
    let mut x = backend.alloc(3, 5)?;
    backend.write(&mut x, &[1.0; 15])?;
    backend.overrun(&mut x)?;
    check(backend.read(jamba_core::Cols { tensor: &x, cols: 0..5 })? == [1.0; 15], "other values")?;
    drop(x);
    let seen = overruns();
    let expected = usize::from(std::env::var_os("JAMBA_UNGUARDED").is_none());
    check(seen == expected, format!("{seen} overruns were seen"))
}

fn out_of_memory() -> Result<(), Failed> {
    let backend = open(Precision::Bf16)?;
    let message = match backend.alloc(1 << 20, 1 << 20) {
        Err(error) => error.to_string(),
        Ok(_) => return Err("4 TiB were allocated".into()),
    };
    check(message.contains("out of device memory"), message)?;
    check(backend.alloc(1 << 62, 1 << 62).is_err(), "more than addresses were allocated")?;
    let mut x = backend.alloc(1, 2)?;
    backend.write(&mut x, &[1.0, 2.0])?;
    let read = backend.read(jamba_core::Cols { tensor: &x, cols: 0..2 })?;
    check(read == [1.0, 2.0], "the backend does not survive it")
}

/// All memory of the card but what is too little for anything.
fn all_memory(backend: &CudaBackend) -> Vec<Tensor> {
    let mut taken = Vec::new();
    for rows in [1 << 18, 1 << 14, 1 << 10, 1] {
        // Of 4 KiB a row.
        while let Ok(tensor) = backend.alloc(rows, 1024) {
            taken.push(tensor);
        }
    }
    taken
}

/// Parameters, before one of which all memory of the card is taken, as if by another process.
struct Thief<'a> {
    backend: &'a CudaBackend,
    parameters: Cell<usize>,
    taken: RefCell<Vec<Tensor>>,
}

impl ParamSource for Thief<'_> {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        self.parameters.set(self.parameters.get() + 1);
        if self.parameters.get() == 20 {
            *self.taken.borrow_mut() = all_memory(self.backend);
        }
        RandomParams { seed: 1, dtype: Dtype::Bf16 }.param(spec)
    }
}

/// Memory that was there when the plan was checked, and is not when it is taken: the load fails,
/// what it had is free again, and the card goes on.
fn out_of_memory_in_the_middle() -> Result<(), Failed> {
    let backend = Arc::new(open(Precision::Bf16)?);
    let config = Config::preset("jamba-tales-11m")?;
    let limits = Limits { slots: 1, context: 64, tokens: 16, outputs: 1 };
    let parts = (Cell::new(0), RefCell::default());
    let thief = Thief { backend: &backend, parameters: parts.0, taken: parts.1 };
    let error = Model::new(config.clone(), &thief, backend.clone()).err().ok_or("it is loaded")?;
    let (parameters, message) = (thief.parameters.get(), error.to_string());
    check(parameters >= 20, format!("it ended at parameter {parameters}: {message}"))?;
    check(message.contains("out of device memory"), message)?;
    drop(thief);

    let source = RandomParams { seed: 1, dtype: Dtype::Bf16 };
    let model = Model::new(config.clone(), &source, backend.clone())?;
    let taken = all_memory(&backend);
    check(taken.len() > 3, "nothing was taken")?;
    let error = ModelRunner::new(model.clone(), limits).err().ok_or("a runner was made")?;
    check(error.to_string().contains("does not fit"), error.to_string())?;
    // Without the plan before it.
    check(backend.new_state(&config, &limits).is_err(), "a state was made")?;
    drop(taken);
    let mut runner = ModelRunner::new(model, limits)?;
    runner.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
    check(runner.logits()?.iter().all(|v| v.is_finite()), "no logits after it")
}

/// A runner that is refused, or fails to be made, leaves the others as they were.
fn others_go_on() -> Result<(), Failed> {
    guarded(Precision::Bf16, |backend| {
        let model = random(small(), 4, backend)?;
        let limits = Limits { slots: 1, context: 64, tokens: 16, outputs: 1 };
        let mut runner = ModelRunner::new(model.clone(), limits)?;
        runner.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
        let too_many = Limits { slots: 1 << 20, context: 1 << 20, ..limits };
        check(ModelRunner::new(model.clone(), too_many).is_err(), "it was made")?;
        let beyond = Batch::single(0, 3, &[1; 17], Outputs::Last);
        check(runner.step(&beyond).is_err(), "a step of too many tokens was run")?;
        runner.step(&Batch::single(0, 3, &[4], Outputs::Last))?;
        let after = runner.logits()?;
        let mut alone = ModelRunner::new(model, limits)?;
        alone.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
        alone.step(&Batch::single(0, 3, &[4], Outputs::Last))?;
        check(alone.logits()? == after, "the runner was changed")
    })
}

fn damaged_cache() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let open_here = || {
        let cache = KernelCache::Folder(folder.path().to_owned());
        CudaBackend::with_options(CudaOptions { cache, ..CudaOptions::default() })
    };
    open_here()?;
    let kept = || -> std::io::Result<Vec<_>> {
        let entries = std::fs::read_dir(folder.path())?;
        entries.map(|entry| entry.and_then(|entry| std::fs::read(entry.path()))).collect()
    };
    let (whole, mut is_first) = (kept()?, true);
    for entry in std::fs::read_dir(folder.path())? {
        // Cut in the middle, as by a full disk, or something else.
        let (path, bytes) = (entry?.path(), b"not a cubin");
        let half = std::fs::read(&path)?.len() / 2;
        match std::mem::take(&mut is_first) {
            true => std::fs::File::options().write(true).open(path)?.set_len(half as u64)?,
            false => std::fs::write(path, bytes)?,
        }
    }
    open_here()?;
    check(kept()?.len() == whole.len(), "other files")?;
    check(kept()? == whole, "what was damaged is not made anew")?;
    // Without a cache nothing is written.
    let off = CudaOptions { cache: KernelCache::Off, ..CudaOptions::default() };
    CudaBackend::with_options(off)?;
    check(kept()? == whole, "files were written")
}

/// Set in the process that is to see a kernel fail: no other could use the device after it.
pub(crate) const TRAP: &str = "JAMBA_CUDA_TRAP";

fn a_kernel_that_fails() -> Result<(), Failed> {
    let child = Command::new(std::env::current_exe()?).env(TRAP, "1").output()?;
    let said = String::from_utf8_lossy(&child.stdout).into_owned()
        + &String::from_utf8_lossy(&child.stderr);
    check(child.status.success() && !said.contains("panicked"), format!("{}: {said}", child.status))
}

/// The process of [`a_kernel_that_fails`]: every call after it is an error, and nothing panics,
/// not even while all is dropped.
pub(crate) fn after_a_trap() -> Result<(), Failed> {
    let backend = open(Precision::Bf16)?;
    let config = Config::preset("jamba-tales-11m")?;
    let limits = Limits { slots: 1, context: 64, tokens: 16, outputs: 1 };
    let model = random(config, 1, backend)?;
    let mut runner = ModelRunner::new(model.clone(), limits)?;
    runner.step(&Batch::single(0, 0, &[1, 2, 3], Outputs::Last))?;
    // A graph among what is dropped.
    for at in 3..6 {
        runner.step(&Batch::single(0, at, &[4], Outputs::Last))?;
    }
    let logits = runner.logits()?;
    let backend = model.backend();
    backend.trap()?;
    let error = backend.synchronize().err().ok_or("the failure is not told")?;
    check(matches!(error, Error::Driver { .. }), format!("{error:?}"))?;
    check(runner.step(&Batch::single(0, 6, &[4], Outputs::Last)).is_err(), "a step works")?;
    check(runner.step(&Batch::single(0, 6, &[4, 5], Outputs::Last)).is_err(), "another works")?;
    check(ModelRunner::new(model.clone(), limits).is_err(), "a runner is made")?;
    check(runner.logits().is_err(), "logits can be read")?;
    check(backend.alloc(1, 1).is_err(), "memory is allocated")?;
    check(open(Precision::F32).is_err(), "the device can be opened anew")?;
    check(logits.iter().all(|v| v.is_finite()), "logits read before are lost")
}
