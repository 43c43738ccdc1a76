//! Matrices as the copy engine of sm_90a takes them.
#![allow(unsafe_code, reason = "encodes tensor maps")]

use cudarc::driver::sys;

use crate::device::driver_error;
use crate::error::Result;

/// What a matrix consists of.
#[derive(Clone, Copy)]
pub(super) enum Element {
    Bf16,
    Byte,
}

/// Bytes of a row that are copied at a time: what hopper.cuh has in a row of a box.
const BOX_BYTES: usize = 128;

/// A CUtensorMap, as hopper.cuh has it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    /// A row-major matrix, `stride` bytes from one row to the next, of which `box_rows` rows are
    /// copied at a time. Address and stride are multiples of 16 bytes.
    pub(super) fn new(
        (ptr, element): (u64, Element),
        [rows, cols]: [usize; 2],
        stride: usize,
        box_rows: usize,
    ) -> Result<Self> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (data_type, bytes) = match element {
            Element::Bf16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
            Element::Byte => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        };
        let (dims, strides) = ([cols as u64, rows as u64], [stride as u64]);
        let of_box = [(BOX_BYTES / bytes) as u32, box_rows as u32];
        // SAFETY: all pointers are to values of this frame, of two dimensions and one stride; the
        // address is that of device memory, which is not read here.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                data_type,
                2,
                ptr as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                of_box.as_ptr(),
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
