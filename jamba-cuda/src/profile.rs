//! The time that each kernel takes.
#![allow(unsafe_code, reason = "makes the stream wait for a host function")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::{CudaEvent, result};

use crate::device::{Device, driver_error};
use crate::error::Result;

/// What the card waits before the first kernel, so that the host is ahead of it: else a short
/// kernel would be told with the time that the next takes to arrive.
const AHEAD: Duration = Duration::from_millis(20);

/// What a launch moves and computes at least, where its launcher tells it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    pub(crate) bytes: u64,
    pub(crate) operations: u64,
}

struct Timed {
    name: &'static str,
    work: Work,
    start: CudaEvent,
    end: CudaEvent,
}

thread_local! {
    /// The launches of this thread, where they are timed.
    static TIMED: RefCell<Option<Vec<Timed>>> = const { RefCell::new(None) };
}

/// All launches of one kernel.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct KernelTime {
    /// Its name in CUDA C++, or `cublasLt`.
    pub name: &'static str,
    /// How often it was launched.
    pub launches: usize,
    /// The time of all of them.
    pub seconds: f64,
    /// Bytes that they read and write at least; 0 where that is not told.
    pub bytes: f64,
    /// Operations, a multiply-add counting as two; 0 where that is not told.
    pub operations: f64,
}

/// Runs `work` with every kernel that this thread launches timed by events, one after the other and
/// without graphs: what took longest first.
///
/// # Errors
/// Those of `work`, and [`Error::Driver`](crate::Error::Driver).
pub fn profile(
    work: impl FnOnce() -> jamba_core::Result<()>,
) -> jamba_core::Result<Vec<KernelTime>> {
    TIMED.set(Some(Vec::new()));
    let worked = work();
    let timed = TIMED.take().unwrap_or_default();
    worked?;
    let mut kernels: Vec<KernelTime> = Vec::new();
    for Timed { name, work, start, end } in timed {
        let milliseconds = start.elapsed_ms(&end).map_err(driver_error("timing"))?;
        let at = kernels.iter().position(|kernel| kernel.name == name).unwrap_or_else(|| {
            let none = KernelTime { name, launches: 0, seconds: 0.0, bytes: 0.0, operations: 0.0 };
            kernels.push(none);
            kernels.len() - 1
        });
        let kernel = &mut kernels[at];
        kernel.launches += 1;
        kernel.seconds += f64::from(milliseconds) / 1e3;
        kernel.bytes += work.bytes as f64;
        kernel.operations += work.operations as f64;
    }
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(kernels)
}

/// Whether launches of this thread are timed.
pub(crate) fn is_on() -> bool {
    TIMED.with_borrow(Option::is_some)
}

/// Launches, and takes the time where that is asked for.
pub(crate) fn timed<T, E: From<crate::Error>>(
    device: &Device,
    name: &'static str,
    work: Work,
    launch: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let Some(is_first) = TIMED.with_borrow(|timed| timed.as_ref().map(Vec::is_empty)) else {
        return launch();
    };
    if is_first {
        device.bind()?;
        // SAFETY: the function takes no argument, and calls nothing of CUDA.
        let waits = unsafe {
            result::stream::launch_host_function(device.launch_stream(), wait, std::ptr::null_mut())
        };
        waits.map_err(driver_error("letting the host go ahead"))?;
    }
    let start = device.event()?;
    let launched = launch()?;
    let end = device.event()?;
    TIMED.with_borrow_mut(|timed| {
        if let Some(timed) = timed {
            timed.push(Timed { name, work, start, end });
        }
    });
    Ok(launched)
}

unsafe extern "C" fn wait(_: *mut c_void) {
    std::thread::sleep(AHEAD);
}
