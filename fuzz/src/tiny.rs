//! A model of 14 KB, for targets to load and damage: `make_tiny.py` wrote it.

use std::path::{Path, PathBuf};

/// Where it is, also for the crates whose tests include these files.
pub fn folder() -> PathBuf {
    let roots = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    roots.map(|root| root.join("fuzz/tiny")).find(|folder| folder.is_dir()).unwrap()
}
