//! `docs/adding-a-backend.md` shows code that is compiled, and the table as it is.

use jamba_tests::tolerance;

const DOC: &str = include_str!("../../docs/adding-a-backend.md");
const BACKEND: &str = include_str!("minimal_backend.rs");

/// The Rust blocks of the backend: those that are not compiled as doctests.
fn blocks() -> impl Iterator<Item = &'static str> {
    DOC.split("```rust,ignore\n").skip(1).filter_map(|rest| rest.split("\n```").next())
}

/// In order, but for its first line, which says what it is.
#[test]
fn the_whole_backend_is_shown() {
    let lines = |code: &'static str| code.lines().filter(|line| !line.is_empty());
    let shown: Vec<_> = blocks().skip(1).flat_map(lines).collect();
    let tested: Vec<_> = lines(BACKEND).skip(1).collect();
    let run = blocks().next().map(|first| lines(first).collect::<Vec<_>>());
    assert_eq!(run.as_deref(), tested.last().map(std::slice::from_ref));
    assert_eq!(shown, tested[..tested.len() - 1]);
}

/// Rewrites the table with `JAMBA_UPDATE=1`.
#[test]
fn the_table_is_current() {
    let (before, rest) = DOC.split_once("<!-- tolerances").expect("the mark before the table");
    let (mark, rest) = rest.split_once("-->\n").expect("the end of the mark");
    let (shown, after) = rest.split_once("<!-- end -->").expect("the mark after the table");
    let table = tolerance::markdown();
    if std::env::var_os("JAMBA_UPDATE").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/adding-a-backend.md");
        let text = format!("{before}<!-- tolerances{mark}-->\n{table}<!-- end -->{after}");
        std::fs::write(path, text).expect("docs can be written");
        return;
    }
    assert_eq!(shown, table, "run it with JAMBA_UPDATE=1");
}

#[test]
fn the_backend_is_as_short_as_the_docs_say() {
    let lines = BACKEND.lines().count();
    assert!(DOC.contains("under 200 lines") && lines < 200, "{lines}");
}
