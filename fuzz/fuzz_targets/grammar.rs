#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| jamba_fuzz::inputs::grammar(data));
