//! The reference backend: everything, and nothing changes by a bit however a prompt is run.

use jamba_cpu::ReferenceBackend;

jamba_tests::conformance!(ReferenceBackend::new());

/// Weights in a format that quantises: the oracle gets what the format makes of them.
macro_rules! quantised {
    ($($name:ident: $format:ident),*) => {
        $(mod $name {
            use jamba_cpu::ReferenceBackend;
            use jamba_tests::{Format, Support};

            const FORMAT: Format = Format::$format;

            jamba_tests::conformance!(
                ReferenceBackend::new().with_format(FORMAT.weight_format()),
                Support::default().weights(&[FORMAT]).cases(24)
            );
        })*
    };
}

quantised!(experts_int8: ExpertsInt8, int8: Int8, int4: Int4);
