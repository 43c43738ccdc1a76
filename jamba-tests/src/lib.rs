//! What any backend of jamba-core is held to.

pub mod compare;
pub mod golden;
pub mod tolerance;
