#![no_main]

libfuzzer_sys::fuzz_target!(
    init: jamba_fuzz::allow_caught_panics(),
    |data: &[u8]| jamba_fuzz::inputs::tokenizer(data)
);
