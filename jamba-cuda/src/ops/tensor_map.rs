//! Matrices as the copy engine of sm_90a takes them.
#![allow(unsafe_code, reason = "encodes tensor maps")]

use cudarc::driver::sys;

use crate::device::driver_error;
use crate::error::Result;

/// Columns and rows that are copied at a time: 128 bytes of bf16, as hopper.cuh needs them.
const BOX: [u32; 2] = [64, 128];

/// A CUtensorMap, as hopper.cuh has it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    /// A row-major matrix of bf16, `ld` elements from one row to the next. Address and rows are
    /// multiples of 16 bytes.
    pub(super) fn new(ptr: u64, rows: usize, cols: usize, ld: u32) -> Result<Self> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (dims, strides) = ([cols as u64, rows as u64], [2 * u64::from(ld)]);
        // SAFETY: all pointers are to values of this frame, of two dimensions and one stride; the
        // address is that of device memory, which is not read here.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                ptr as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                BOX.as_ptr(),
                [1u32; 2].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(driver_error("cuTensorMapEncodeTiled"))?;
        Ok(Self(map.opaque))
    }
}
