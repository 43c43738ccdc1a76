//! Where a text ends early.

use crate::error::{Error, Result};

/// Finds stop strings in a text that comes in pieces.
pub(super) struct Stops {
    strings: Vec<String>,
    /// The longest end of the text that may be the beginning of a stop string.
    pub(super) held: String,
}

impl Stops {
    pub(super) fn new(strings: Vec<String>) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            let allowed = "a stop string must have at least one character";
            return Err(Error::Option { option: "stop", value: "\"\"".into(), allowed });
        }
        Ok(Self { strings, held: String::new() })
    }

    /// Takes the next text and returns what can be shown, and whether a stop string ends it.
    ///
    /// Of several stop strings, that counts which is completed first (of those that end together,
    /// the one that begins first), so that it does not matter how the text is cut into pieces.
    pub(super) fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.strings.iter().filter_map(|s| Some((self.held.find(s)?, s.len())));
        if let Some((start, _)) = found.min_by_key(|(start, len)| (start + len, *start)) {
            self.held.truncate(start);
            return (self.rest(), true);
        }
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.floor_char_boundary(self.held.len().saturating_sub(longest));
        let mut starts = self.held[from..].char_indices().map(|(at, _)| from + at);
        let keep = starts.find(|&at| self.strings.iter().any(|s| s.starts_with(&self.held[at..])));
        let keep = keep.unwrap_or(self.held.len());
        (self.held.drain(..keep).collect(), false)
    }

    /// What is held, which is then no longer.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
