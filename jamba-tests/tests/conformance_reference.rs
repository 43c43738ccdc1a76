//! The reference backend: everything, and nothing changes by a bit however a prompt is run.

use jamba_cpu::ReferenceBackend;

jamba_tests::conformance!(ReferenceBackend::new());
