//! A kernel that fails, so that what follows can be tested.
#![allow(unsafe_code, reason = "launches a kernel")]

use crate::backend::CudaBackend;
use crate::device::Grid;
use crate::error::Result;
use crate::kernels::Unit;

const SOURCE: &str = r#"extern "C" __global__ void fail(const u32 unused) { asm("trap;"); }"#;

impl CudaBackend {
    /// Launches a kernel that fails. No device of this process can be used afterwards.
    #[doc(hidden)]
    pub fn trap(&self) -> Result<()> {
        let unit = Unit { stem: "trap", source: SOURCE, defines: Vec::new() };
        let kernel = self.loader.module(&unit)?.kernel("fail")?;
        let grid = Grid::new("trap", [1, 1, 1], 1, 0)?;
        // SAFETY: the kernel takes a u32 and touches no memory.
        unsafe { self.device.launch(&kernel, &grid, &0u32) }
    }
}
