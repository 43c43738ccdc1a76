//! One card: its context, its one stream, memory on it, launches, and graphs of them.
#![allow(unsafe_code, reason = "calls into the CUDA driver")]

mod graph;
mod launch;
mod memory;

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};

pub(crate) use self::graph::{Graph, may_load};
pub(crate) use self::launch::{Grid, Kernel};
pub(crate) use self::memory::{Buffer, Staging};
use crate::error::{Error, Result};
use crate::libraries;

/// One card and the one stream on which everything of a backend happens, in order.
pub(crate) struct Device {
    ctx: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Where graphs are captured, one at a time: what other threads launch meanwhile goes to
    /// `stream`, and is in no graph.
    capturing: Mutex<Arc<CudaStream>>,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    shared_limit: usize,
    guards: Option<Overruns>,
}

/// How many allocations were written beyond, of those that were freed.
pub(crate) type Overruns = Arc<AtomicUsize>;

/// A [`DriverError`] while doing something.
pub(crate) fn driver_error(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| {
        let text = |s: Result<&std::ffi::CStr, DriverError>| {
            s.map_or("unknown".into(), |s| s.to_string_lossy().into_owned())
        };
        let (name, text) = (text(e.error_name()), text(e.error_string()));
        Error::Driver { what, code: e.0 as u32, name, text }
    }
}

impl Device {
    /// Opens the card of this number. Where `guards` are given, every allocation lies between
    /// bytes that nobody may write, and those that somebody did are counted when it is freed.
    pub(crate) fn open(ordinal: usize, guards: Option<Overruns>) -> Result<Self> {
        libraries::driver()?;
        let count = match CudaContext::device_count() {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            other => other.map_err(driver_error("cuInit"))?.max(0) as usize,
        };
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let ctx = CudaContext::new(ordinal).map_err(driver_error("opening the device"))?;
        // SAFETY: nothing is allocated yet, and all work of this context goes to one stream.
        unsafe { ctx.disable_event_tracking() };
        let new_stream = || ctx.new_stream().map_err(driver_error("making a stream"));
        let (stream, capturing) = (new_stream()?, Mutex::new(new_stream()?));
        let name = ctx.name().map_err(driver_error("cuDeviceGetName"))?;
        let attribute = |a| ctx.attribute(a).map_err(driver_error("cuDeviceGetAttribute"));
        let sms = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let capability = ctx.compute_capability().map_err(driver_error("compute capability"))?;
        let (multiprocessors, shared_limit) = (sms.max(1) as usize, shared.max(0) as usize);
        Ok(Self { ctx, stream, capturing, name, capability, multiprocessors, shared_limit, guards })
    }

    /// Whether there are guards around allocations.
    pub(crate) fn is_guarded(&self) -> bool {
        self.guards.is_some()
    }

    /// How many allocations were written beyond.
    pub(crate) fn overruns(&self) -> Overruns {
        self.guards.clone().unwrap_or_default()
    }

    /// Name of the card.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, (major, minor).
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Streaming multiprocessors.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block may have.
    pub(crate) fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        self.ctx.bind_to_thread().map_err(driver_error("cuCtxSetCurrent"))
    }

    /// Bytes free and in all.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.ctx.mem_get_info().map_err(driver_error("cuMemGetInfo"))
    }

    /// Waits for all work given so far.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(driver_error("waiting for the device"))
    }

    /// An event after the work given so far, with its time.
    pub(crate) fn event(&self) -> Result<CudaEvent> {
        let timed = CUevent_flags::CU_EVENT_DEFAULT;
        self.stream.record_event(Some(timed)).map_err(driver_error("recording an event"))
    }
}
