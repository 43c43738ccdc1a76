//! Matrix products through cuBLASLt.
#![allow(unsafe_code, reason = "calls into cuBLASLt")]

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::libraries;
use crate::options::{Precision, element_bytes};
use crate::profile::{self, Work};

/// What NVIDIA recommends for Hopper; earlier cards do with less.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes whose algorithm is remembered.
const REMEMBERED: usize = 4096;

/// `out (rows, n) = x (rows, k) W (n, k)^T`, all row-major: `out` in f32, or rounded to bf16, x and W in
/// the precision of the backend, each with its elements from one row to the next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) ldx: u32,
    pub(crate) ldw: u32,
    pub(crate) ldo: u32,
    pub(crate) rounded: bool,
}

/// The library's handle, and the algorithm that it chose for each shape.
pub(crate) struct CublasLt {
    handle: Handle,
    workspace: Buffer,
    precision: Precision,
    plans: HashMap<(Product, u32), Plan>,
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: cuBLASLt handles may be used from any thread; the owner has it behind a lock.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt and destroyed once. A failure leaks it.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

struct Plan {
    desc: Desc,
    w: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

struct Desc(sys::cublasLtMatmulDesc_t);
struct Layout(sys::cublasLtMatrixLayout_t);
struct Preference(sys::cublasLtMatmulPreference_t);

// SAFETY: descriptors are plain memory of the library, used by whoever owns the plan.
unsafe impl Send for Plan {}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt and destroyed once. A failure leaks it.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn refused(what: impl Into<String>) -> impl FnOnce(CublasError) -> Error {
    let what = what.into();
    move |e| Error::CublasLt { what, status: e.to_string() }
}

impl CublasLt {
    pub(crate) fn new(device: &Device, precision: Precision) -> Result<Self> {
        libraries::cublaslt()?;
        device.bind()?;
        let handle = Handle(result::create_handle().map_err(refused("making a handle"))?);
        let workspace = device.alloc(WORKSPACE_BYTES)?;
        Ok(Self { handle, workspace, precision, plans: HashMap::new() })
    }

    /// Computes the product.
    ///
    /// # Safety
    /// `x`, `w` and `out` must be memory of this device of the sizes that `product` says.
    pub(crate) unsafe fn matmul(
        &mut self,
        device: &Device,
        product: Product,
        x: u64,
        w: u64,
        out: u64,
    ) -> Result<()> {
        if product.rows == 0 {
            return Ok(());
        }
        device.bind()?;
        let alignment = 1 << x.trailing_zeros().min(8);
        let key = (product, alignment);
        if !self.plans.contains_key(&key) {
            if self.plans.len() >= REMEMBERED {
                self.plans.clear();
            }
            let plan = self.plan(&product, alignment)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (one, zero) = (1f32, 0f32);
        let size = element_bytes(self.precision);
        let Product { rows, n, k, rounded, .. } = product;
        let result = if rounded { 2 } else { 4 };
        let work = Work {
            bytes: (size * k * (rows + n) + result * rows * n) as u64,
            operations: (2 * rows * n * k) as u64,
        };
        profile::timed(device, "cublasLt", work, || {
            // SAFETY: the descriptors were made for these operands, which are as the caller says; the
            // scalars are f32 as the descriptor says, and are read before this returns; the
            // workspace is used in the order of the stream alone.
            let done = unsafe {
                result::matmul(
                    self.handle.0,
                    plan.desc.0,
                    std::ptr::from_ref(&one).cast(),
                    std::ptr::from_ref(&zero).cast(),
                    w as *const c_void,
                    plan.w.0,
                    x as *const c_void,
                    plan.x.0,
                    out as *const c_void,
                    plan.out.0,
                    out as *mut c_void,
                    plan.out.0,
                    &plan.algorithm,
                    self.workspace.ptr() as *mut c_void,
                    WORKSPACE_BYTES,
                    device.launch_stream().cast(),
                )
            };
            done.map_err(refused(describe(&product)))
        })
    }

    /// In cuBLASLt's column-major terms: out^T (n, rows) = W (k, n)^T x^T (k, rows).
    fn plan(&self, p: &Product, alignment: u32) -> Result<Plan> {
        let fail = || refused(describe(p));
        let f32 = sys::cudaDataType::CUDA_R_32F;
        let operand = match self.precision {
            Precision::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Precision::F32 => f32,
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = Desc(result::create_matmul_desc(compute, f32).map_err(fail())?);
        // CUBLAS_OP_T of cublas_api.h, which the bindings of cuBLASLt lack.
        let transposed = 1i32;
        // SAFETY: the attribute is a cublasOperation_t, an enum in C, read before this returns.
        let set = unsafe {
            result::set_matmul_desc_attribute(
                desc.0,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )
        };
        set.map_err(fail())?;
        let layout = |element, rows: usize, cols: usize, ld: i64| {
            let layout = result::create_matrix_layout(element, rows as u64, cols as u64, ld);
            layout.map(Layout).map_err(fail())
        };
        let w = layout(operand, p.k, p.n, p.ldw.into())?;
        let x = layout(operand, p.k, p.rows, p.ldx.into())?;
        let result = if p.rounded { sys::cudaDataType::CUDA_R_16BF } else { f32 };
        let out = layout(result, p.n, p.rows, p.ldo.into())?;

        let preference = Preference(result::create_matmul_pref().map_err(fail())?);
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        preference
            .set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)
            .map_err(fail())?;
        preference
            .set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment)
            .map_err(fail())?;
        // SAFETY: all descriptors were created above and are alive.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.0,
                desc.0,
                w.0,
                x.0,
                out.0,
                out.0,
                preference.0,
            )
        };
        let algorithm = chosen.map_err(fail())?.algo;
        Ok(Plan { desc, w, x, out, algorithm })
    }
}

impl Preference {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let (value, size) = (std::ptr::from_ref(value).cast(), size_of::<T>());
        // SAFETY: the value has the type of the attribute (size_t for bytes of workspace, u32 for
        // alignments) and is read before the call returns.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, value, size) }
    }
}

fn describe(p: &Product) -> String {
    format!("product of ({}, {}) and ({}, {})^T", p.rows, p.k, p.n, p.k)
}
