//! Graphs of launches.
#![allow(unsafe_code, reason = "calls into the CUDA driver")]

use std::cell::Cell;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaGraph, CudaStream, DriverError, result};

use super::{Device, driver_error};
use crate::error::{Error, Result};

impl Device {
    /// The stream that launches of this thread go to, for calls of cuBLASLt.
    pub(crate) fn launch_stream(&self) -> sys::CUstream {
        CAPTURED_TO.get().unwrap_or(self.stream.cu_stream())
    }

    /// What `work` launches on this thread, as a graph; none of it runs. It must neither allocate
    /// nor copy, nor wait for the device. `None` where what another thread did meanwhile spoilt it,
    /// as the driver allows any of its own work to.
    pub(crate) fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Graph>, E> {
        let _nothing_is_loaded = LOADING.write().unwrap_or_else(PoisonError::into_inner);
        let stream = self.capturing.lock().unwrap_or_else(PoisonError::into_inner);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(driver_error("beginning a graph"))?;
        let worked = {
            let _captured = Captured::to(&stream);
            work()
        };
        // Ended even where the work failed: the stream is needed for the next.
        match stream.end_capture(sys::CUgraphInstantiate_flags(0)) {
            // Then every launch of the work failed too.
            Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)) => Ok(None),
            ended => {
                worked?;
                Ok(ended.map_err(driver_error("making a graph"))?.map(Graph))
            }
        }
    }

    /// Runs a graph after all work given so far.
    pub(crate) fn replay(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: the graph and the stream are alive; what its kernels read and write is there, as
        // whoever replays it sees to.
        let launched =
            unsafe { result::graph::launch(graph.0.cu_graph_exec(), self.stream.cu_stream()) };
        launched.map_err(driver_error("launching a graph"))
    }
}

/// The driver loads code when it is first needed, that of cuBLASLt too, and may wait for the whole
/// context to do so, which fails while any thread captures.
static LOADING: RwLock<()> = RwLock::new(());

/// To be held by whoever may make the driver load code, and taken before any other lock.
pub(crate) fn may_load() -> Option<RwLockReadGuard<'static, ()>> {
    // A capture has it to itself.
    let is_captured = CAPTURED_TO.get().is_some();
    (!is_captured).then(|| LOADING.read().unwrap_or_else(PoisonError::into_inner))
}

thread_local! {
    /// The stream that this thread captures to.
    static CAPTURED_TO: Cell<Option<sys::CUstream>> = const { Cell::new(None) };
}

/// While it lives, launches of this thread are captured.
struct Captured;

impl Captured {
    fn to(stream: &CudaStream) -> Self {
        CAPTURED_TO.set(Some(stream.cu_stream()));
        Self
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        CAPTURED_TO.set(None);
    }
}

/// Launches that were captured.
pub(crate) struct Graph(CudaGraph);

// SAFETY: graphs may be used from any thread by one at a time, and the owner has it exclusively.
unsafe impl Send for Graph {}
