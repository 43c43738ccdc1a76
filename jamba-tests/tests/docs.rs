//! `docs/adding-a-backend.md` shows code that is compiled, and the table as it is.

use jamba_tests::tolerance;

const DOC: &str = include_str!("../../docs/adding-a-backend.md");
const BACKEND: &str = include_str!("minimal_backend.rs");

/// The Rust blocks, without those that are compiled as doctests.
fn blocks() -> impl Iterator<Item = &'static str> {
    DOC.split("```rust,ignore\n").skip(1).filter_map(|rest| rest.split("\n```").next())
}

#[test]
fn every_block_is_of_the_backend_that_is_tested() {
    for block in blocks() {
        assert!(BACKEND.contains(block), "not in minimal_backend.rs:\n{block}");
    }
    assert!(blocks().count() >= 8);
}

#[test]
fn every_part_of_the_backend_is_shown() {
    for part in BACKEND.split("// part: ").skip(1).filter(|part| !part.starts_with("end")) {
        let (name, code) = part.split_once('\n').expect("code after the name");
        assert!(DOC.contains(code.trim_end()), "part {name} is not shown as it is");
    }
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
    let code = BACKEND.lines().map(str::trim);
    // Blank lines, comments and closing braces are not code.
    let code = code.filter(|line| !line.starts_with("//") && line.contains(char::is_alphabetic));
    let lines = code.count();
    assert!(lines < 200, "{lines}");
}
