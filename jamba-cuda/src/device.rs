//! One card: its context, its one stream, memory on it, launches, and graphs of them.
#![allow(unsafe_code, reason = "calls into the CUDA driver")]

use std::cell::Cell;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr,
    DriverError, PinnedHostSlice, result,
};
use cudarc::nvrtc::Ptx;

use crate::error::{Error, Result};
use crate::libraries;
use crate::profile::{self, Work};

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

/// Bytes before and after a guarded allocation, and what they hold.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;

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

    /// The stream that launches of this thread go to, for calls of cuBLASLt.
    pub(crate) fn launch_stream(&self) -> sys::CUstream {
        CAPTURED_TO.get().unwrap_or(self.stream.cu_stream())
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
        let timed = cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream.record_event(Some(timed)).map_err(driver_error("recording an event"))
    }

    /// Memory of zeros.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<Buffer> {
        // An allocation of nothing is an error to the driver.
        let len = bytes.max(16);
        let guard = if self.guards.is_some() { GUARD } else { 0 };
        // SAFETY: every byte is written by a memset below, before anything can read it.
        let slice = unsafe { self.stream.alloc::<u8>(len.saturating_add(2 * guard)) };
        let slice = slice.map_err(|e| match (e.0, self.memory()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => {
                Error::OutOfMemory { bytes, free, total }
            }
            _ => driver_error("allocating memory")(e),
        })?;
        let ptr = slice.device_ptr(&self.stream).0 + guard as u64;
        static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
        let id = ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let mut buffer = Buffer { slice, ptr, bytes, id, guards: None };
        if let Some(overruns) = &self.guards {
            self.fill(buffer.ptr - GUARD as u64, GUARD_BYTE, len + 2 * GUARD)?;
            buffer.guards = Some((self.stream.clone(), overruns.clone()));
        }
        self.fill(buffer.ptr, 0, if guard > 0 { bytes } else { len })?;
        Ok(buffer)
    }

    fn fill(&self, ptr: u64, value: u8, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: called with ranges of allocations of this device only.
        let filled = unsafe { result::memset_d8_async(ptr, value, bytes, self.stream.cu_stream()) };
        filled.map_err(driver_error("filling memory"))
    }

    /// Makes what is not written yet conspicuous, where allocations are guarded: as f32 and as
    /// bf16 it is NaN.
    pub(crate) fn poison(&self, buffer: &mut Buffer) -> Result<()> {
        match self.guards {
            Some(_) if buffer.bytes > 0 => self.fill(buffer.ptr, 0xff, buffer.bytes),
            _ => Ok(()),
        }
    }

    /// Fills a range of bytes with zeros.
    pub(crate) fn zero(&self, buffer: &mut Buffer, range: Range<usize>) -> Result<()> {
        buffer.check(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.fill(buffer.ptr + range.start as u64, 0, range.len())
    }

    /// Copies to the device. The source may change as soon as this returns.
    pub(crate) fn upload(&self, dst: &mut Buffer, offset: usize, src: &[u8]) -> Result<()> {
        let range = offset..offset.saturating_add(src.len());
        dst.check(&range)?;
        if src.is_empty() {
            return Ok(());
        }
        let range = dst.within_slice(&range);
        let Some(mut view) = dst.slice.try_slice_mut(range.clone()) else {
            return Err(dst.beyond(&range));
        };
        self.stream.memcpy_htod(src, &mut view).map_err(driver_error("copying to the device"))
    }

    /// Copies from the device, after all work given so far.
    pub(crate) fn download(&self, src: &Buffer, offset: usize, dst: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(dst.len());
        src.check(&range)?;
        let range = src.within_slice(&range);
        let Some(view) = src.slice.try_slice(range.clone()) else { return Err(src.beyond(&range)) };
        if !dst.is_empty() {
            let copied = self.stream.memcpy_dtoh(&view, dst);
            copied.map_err(driver_error("copying from the device"))?;
        }
        self.synchronize()
    }

    /// Copies from the start of one buffer to that of another.
    pub(crate) fn copy(&self, src: &Buffer, dst: &mut Buffer, bytes: usize) -> Result<()> {
        src.check(&(0..bytes))?;
        dst.check(&(0..bytes))?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both buffers have so many bytes, as checked above, and are different ones.
        let copied =
            unsafe { result::memcpy_dtod_async(dst.ptr, src.ptr, bytes, self.stream.cu_stream()) };
        copied.map_err(driver_error("copying on the device"))
    }

    /// Copies `bytes` within a buffer, from one offset to another; the two must not overlap.
    pub(crate) fn copy_within(
        &self,
        buffer: &mut Buffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<()> {
        for start in [from, to] {
            buffer.check(&(start..start.saturating_add(bytes)))?;
        }
        if bytes == 0 || from == to {
            return Ok(());
        }
        self.bind()?;
        let (from, to) = (buffer.ptr + from as u64, buffer.ptr + to as u64);
        // SAFETY: both ranges lie within the buffer, as checked above.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(driver_error("copying on the device"))
    }

    /// Loads the machine code of a module.
    pub(crate) fn load(&self, cubin: Vec<u8>) -> Result<Arc<CudaModule>> {
        let _loading = may_load();
        self.ctx.load_module(Ptx::from_binary(cubin)).map_err(driver_error("loading a module"))
    }

    /// Launches a kernel whose one parameter is a struct with the layout of `A`.
    ///
    /// # Safety
    /// `A` must have the layout of the kernel's parameter, and what the kernel reads and writes
    /// through its pointers with this grid must be memory of this device, long enough.
    pub(crate) unsafe fn launch<A: Copy>(
        &self,
        kernel: &Kernel,
        grid: &Grid,
        args: &A,
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // What is timed runs by itself.
        let mut attributes = attributes(grid, kernel.overlaps && !profile::is_on());
        let config = grid.config(&mut attributes, self.launch_stream());
        profile::timed(self, kernel.name, grid.work, || {
            // SAFETY: the function and the stream are alive; the attributes are read, and the parameter,
            // which is as the caller says, copied by the driver before this returns.
            let launched = unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    kernel.function.cu_function(),
                    params.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            launched.result().map_err(driver_error(kernel.name))
        })
    }

    /// How many clusters of this grid run at a time.
    pub(crate) fn clusters(&self, kernel: &Kernel, grid: &Grid) -> Result<usize> {
        self.bind()?;
        let mut attributes = attributes(grid, false);
        let config = grid.config(&mut attributes, self.launch_stream());
        let (mut count, function) = (0, kernel.function.cu_function());
        // SAFETY: the function is alive; all is read before this returns, but `count`, which is
        // written.
        let asked = unsafe {
            sys::cuOccupancyMaxActiveClusters(&raw mut count, function, &raw const config)
        };
        asked.result().map_err(driver_error(kernel.name))?;
        Ok(count.max(0) as usize)
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

/// How a grid is launched: in its clusters, unless the kernel says itself what they are, and early.
fn attributes(grid: &Grid, overlaps: bool) -> Vec<sys::CUlaunchAttribute> {
    use sys::CUlaunchAttributeID as Id;

    let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
    let cluster = sys::CUlaunchAttributeValue { clusterDim: cluster };
    let early = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    let cluster = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster);
    let early = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, early);
    let has_clusters = grid.cluster > 1;
    [has_clusters.then_some(cluster), overlaps.then_some(early)].into_iter().flatten().collect()
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

/// Memory on the device, freed in stream order when dropped.
pub(crate) struct Buffer {
    slice: CudaSlice<u8>,
    ptr: u64,
    bytes: usize,
    id: u64,
    /// To look at the bytes around it.
    guards: Option<(Arc<CudaStream>, Overruns)>,
}

impl Buffer {
    /// Its address on the device.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Tells it from every other allocation, also from later ones at its address.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    fn beyond(&self, range: &Range<usize>) -> Error {
        Error::Range { range: range.clone(), allocated: self.bytes }
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.end > self.bytes { Err(self.beyond(range)) } else { Ok(()) }
    }

    fn within_slice(&self, range: &Range<usize>) -> Range<usize> {
        let guard = if self.guards.is_some() { GUARD } else { 0 };
        range.start + guard..range.end + guard
    }

    /// Whether the bytes around the allocation are as they were. A device that fails is not asked.
    fn is_intact(&self, stream: &Arc<CudaStream>) -> bool {
        let after = GUARD + self.bytes;
        [0..GUARD, after..after + GUARD].into_iter().all(|range| {
            let mut bytes = [GUARD_BYTE; GUARD];
            let Some(view) = self.slice.try_slice(range) else { return false };
            let read = stream.memcpy_dtoh(&view, &mut bytes).and_then(|()| stream.synchronize());
            read.is_err() || bytes == [GUARD_BYTE; GUARD]
        })
    }

    /// Its size as asked for.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some((stream, overruns)) = &self.guards
            && !self.is_intact(stream)
        {
            overruns.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Page-locked host memory of 32-bit words that is copied to the device again and again.
pub(crate) struct Staging {
    words: PinnedHostSlice<u32>,
    /// After the latest copy.
    copied: CudaEvent,
}

impl Staging {
    pub(crate) fn new(device: &Device, words: usize) -> Result<Self> {
        // SAFETY: u32 has no invalid values, and only what was written is ever copied.
        let words = unsafe { device.ctx.alloc_pinned::<u32>(words.max(1)) };
        let words = words.map_err(driver_error("allocating page-locked memory"))?;
        Ok(Self { words, copied: device.event()? })
    }

    /// Fills the first `len` words and copies them to the start of `dst`.
    pub(crate) fn upload(
        &mut self,
        device: &Device,
        dst: &mut Buffer,
        len: usize,
        fill: impl FnOnce(&mut [u32]),
    ) -> Result<()> {
        self.copied.synchronize().map_err(driver_error("waiting for a copy"))?;
        let words = self.words.as_mut_slice().map_err(driver_error("waiting for a copy"))?;
        if len > words.len() || 4 * len > dst.bytes {
            return Err(dst.beyond(&(0..4 * len)));
        }
        let words = &mut words[..len];
        fill(words);
        if len == 0 {
            return Ok(());
        }
        device.bind()?;
        // SAFETY: both sides have `len` words; the host side is neither written nor freed before
        // the event recorded next.
        let copied =
            unsafe { result::memcpy_htod_async(dst.ptr, words, device.stream.cu_stream()) };
        copied.map_err(driver_error("copying to the device"))?;
        self.copied.record(&device.stream).map_err(driver_error("recording an event"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that fails copies no more either.
        let _ = self.copied.synchronize();
    }
}

/// A function of a loaded module.
#[derive(Clone)]
pub(crate) struct Kernel {
    function: CudaFunction,
    name: &'static str,
    overlaps: bool,
}

impl Kernel {
    /// The function of this name, which uses up to `shared` bytes of dynamic shared memory.
    pub(crate) fn new(
        device: &Device,
        module: &Arc<CudaModule>,
        name: &'static str,
        shared: usize,
    ) -> Result<Self> {
        if shared > device.shared_limit {
            let allowed = "the card has less shared memory per block";
            return Err(Error::Size { op: name, what: "shared memory", got: shared, allowed });
        }
        device.bind()?;
        let function = module.load_function(name).map_err(driver_error(name))?;
        if shared > 48 << 10 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).map_err(driver_error(name))?;
        }
        Ok(Self { function, name, overlaps: false })
    }

    /// The same, begun while the kernel before it still runs, where the card can do that: every
    /// block of it calls `await_inputs` of common.cuh before it touches what kernels write.
    pub(crate) fn overlapping(self, device: &Device) -> Self {
        Self { overlaps: device.capability.0 >= 9, ..self }
    }
}

/// Blocks, how many along x are a cluster, threads of each, and bytes of dynamic shared memory.
pub(crate) struct Grid {
    blocks: [u32; 3],
    cluster: u32,
    threads: u32,
    shared: u32,
    work: Work,
}

impl Grid {
    /// Checks the limits of CUDA.
    pub(crate) fn new(
        op: &'static str,
        blocks: [usize; 3],
        threads: usize,
        shared: usize,
    ) -> Result<Self> {
        let limits = [i32::MAX as usize, u16::MAX as usize, u16::MAX as usize];
        for (got, limit) in blocks.into_iter().zip(limits) {
            if got > limit {
                let allowed = "CUDA allows 2^31 - 1 along x, 65535 along y and z";
                return Err(Error::Size { op, what: "grid", got, allowed });
            }
        }
        let blocks = blocks.map(|n| n as u32);
        let work = Work::default();
        let (threads, shared) = (threads as u32, shared as u32);
        Ok(Self { blocks, cluster: 1, threads, shared, work })
    }

    /// What the driver takes for it.
    fn config(
        &self,
        attributes: &mut [sys::CUlaunchAttribute],
        stream: sys::CUstream,
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.blocks[0],
            gridDimY: self.blocks[1],
            gridDimZ: self.blocks[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }

    /// In clusters of so many blocks along x, on cards that have them.
    pub(crate) fn clustered(self, blocks: usize) -> Self {
        Self { cluster: blocks as u32, ..self }
    }

    /// Tells what the launch moves and computes at least.
    pub(crate) fn doing(self, bytes: usize, operations: usize) -> Self {
        Self { work: Work { bytes: bytes as u64, operations: operations as u64 }, ..self }
    }
}
