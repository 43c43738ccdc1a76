//! How long a tokenizer can make a text: a normalizer that writes ten letters for one, nine times over,
//! makes a gigabyte of a letter.

use serde_json::Value;

/// Bytes that a byte may become. Two of Unicode's decompositions, spaces written as `▁` and one put before
/// the text, all at their worst, make four thousand.
const MOST: u64 = 1 << 14;

/// Why this normalizer or decoder, as `tokenizer.json` has it, is not used, if it can make too much of a
/// text.
pub(super) fn excessive(what: &str, part: &Value) -> Option<String> {
    let factor = factor(part);
    (factor > MOST).then(|| {
        format!("its {what} can make a text {factor} times as long: {MOST} times are allowed")
    })
}

/// Bytes that a byte may become.
fn factor(part: &Value) -> u64 {
    let bytes = |field: &Value| field.as_str().map_or(0, str::len) as u64;
    match part["type"].as_str() {
        Some("Sequence") => {
            let parts = ["normalizers", "decoders"].iter().filter_map(|key| part[key].as_array());
            parts.flatten().map(factor).fold(1, u64::saturating_mul)
        }
        Some("Replace") => match bytes(&part["pattern"]["String"]) {
            // An expression may also match nothing, between any two letters.
            0 => 1 + bytes(&part["content"]),
            pattern => bytes(&part["content"]).div_ceil(pattern).max(1),
        },
        Some("Prepend") => 1 + bytes(&part["prepend"]),
        // The longest of Unicode's compatible decompositions.
        Some("NFKC" | "NFKD" | "Precompiled") => 18,
        Some("NFC" | "NFD" | "ByteLevel" | "BertNormalizer" | "Metaspace") => 3,
        _ => 1,
    }
}
