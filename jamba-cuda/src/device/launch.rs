//! Kernels and how they are launched.
#![allow(unsafe_code, reason = "calls into the CUDA driver")]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction_attribute};
use cudarc::driver::{CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::{Device, driver_error, may_load};
use crate::error::{Error, Result};
use crate::profile::{self, Work};

impl Device {
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
