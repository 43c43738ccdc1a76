//! NVRTC: CUDA C++ to the machine code of one architecture.
#![allow(unsafe_code, reason = "calls into NVRTC")]

use std::ffi::{CStr, CString};

use cudarc::nvrtc::result;
use cudarc::nvrtc::sys;

use crate::error::{Error, Result};
use crate::libraries;

/// What a compiler run is made of: together they decide its result.
pub(crate) struct Source<'a> {
    pub(crate) stem: &'static str,
    pub(crate) text: &'a str,
    pub(crate) arch: &'a str,
    pub(crate) flags: &'a [String],
}

/// Version of the compiler, (major, minor).
pub(crate) fn version() -> Result<(i32, i32)> {
    libraries::nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to integers of this frame.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    status.result().map(|()| (major, minor)).map_err(|e| Error::Compile {
        stem: "version",
        arch: String::new(),
        status: e.to_string(),
        log: String::new(),
    })
}

/// Compiles to a cubin.
pub(crate) fn compile(source: &Source<'_>) -> Result<Vec<u8>> {
    libraries::nvrtc()?;
    let fail = |e: result::NvrtcError, log: String| Error::Compile {
        stem: source.stem,
        arch: source.arch.into(),
        status: e.to_string(),
        log,
    };
    let invalid =
        |_| fail(result::NvrtcError(sys::nvrtcResult::NVRTC_ERROR_INVALID_INPUT), "".into());
    let text = CString::new(source.text).map_err(invalid)?;
    let name = CString::new(format!("{}.cu", source.stem)).map_err(invalid)?;
    let program = result::create_program(&text, Some(&name)).map_err(|e| fail(e, "".into()))?;
    let program = Program(program);
    // SAFETY: the program was created above and lives until the end of this function.
    let compiled = unsafe { result::compile_program(program.0, source.flags) };
    compiled.map_err(|e| fail(e, program.log()))?;
    program.cubin().map_err(|e| fail(e, program.log()))
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives as long as self.
        let log = unsafe { result::get_program_log(self.0) };
        let bytes: Vec<u8> = log.unwrap_or_default().into_iter().map(|c| c as u8).collect();
        CStr::from_bytes_until_nul(&bytes).map_or(String::new(), |s| s.to_string_lossy().into())
    }

    fn cubin(&self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program lives as long as self; the pointer is to an integer of this frame.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result()?;
        let mut cubin = vec![0u8; size];
        // SAFETY: as above, and the buffer has the size that NVRTC asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result()?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created by NVRTC and is destroyed once. A failure leaks it.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}
