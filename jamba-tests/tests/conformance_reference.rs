//! The reference backend: everything, and nothing changes by a bit however a prompt is run.

use jamba_cpu::ReferenceBackend;
use jamba_tests::Support;

jamba_tests::conformance!(ReferenceBackend, Support::default().chunking_exact().batch_exact());
