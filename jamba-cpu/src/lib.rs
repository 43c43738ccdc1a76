//! CPU backends.
pub mod reference;
pub use reference::ReferenceBackend;
