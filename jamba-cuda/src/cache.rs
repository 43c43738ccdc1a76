//! Compiled kernels on disk, so that only the first load of a model compiles them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"jambacu1";

/// A folder of cubins, each in a file named by the hash of all that it was made from. An entry
/// that cannot be read or whose checksum is wrong counts as absent; one that cannot be written
/// is not kept: a cache never fails.
pub(crate) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// The cubin kept under these parts of its key, or else what `make` returns, which is kept.
    pub(crate) fn get<E>(
        &self,
        stem: &str,
        key: &[&str],
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let Some(folder) = &self.folder else { return make() };
        let path = folder.join(format!("{stem}-{:032x}.cubin", key_hash(key)));
        if let Some(cubin) = fs::read(&path).ok().and_then(|entry| decode(&entry)) {
            return Ok(cubin);
        }
        let cubin = make()?;
        write(folder, &path, &encode(&cubin));
        Ok(cubin)
    }
}

/// Written beside its place and renamed into it, so that a reader sees all of it or nothing.
fn write(folder: &Path, path: &Path, entry: &[u8]) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!("{}-{number}.tmp", std::process::id()));
    let written = fs::create_dir_all(folder)
        .and_then(|()| fs::write(&temporary, entry))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
}

fn encode(cubin: &[u8]) -> Vec<u8> {
    [MAGIC, &fnv(FNV_BASIS, cubin).to_le_bytes()[..], cubin].concat()
}

fn decode(entry: &[u8]) -> Option<Vec<u8>> {
    let (sum, cubin) = entry.strip_prefix(MAGIC)?.split_first_chunk::<16>()?;
    (u128::from_le_bytes(*sum) == fnv(FNV_BASIS, cubin)).then(|| cubin.to_vec())
}

fn key_hash(key: &[&str]) -> u128 {
    // The length before each part, so that parts cannot run into each other.
    key.iter().fold(FNV_BASIS, |hash, part| {
        fnv(fnv(hash, &(part.len() as u64).to_le_bytes()), part.as_bytes())
    })
}

const FNV_BASIS: u128 = 0x6c62272e07bb014262b821756295c58d;
const FNV_PRIME: u128 = 0x0000000001000000000000000000013b;

/// FNV-1a of 128 bits: to tell files apart, not to withstand an attacker.
fn fnv(hash: u128, bytes: &[u8]) -> u128 {
    bytes.iter().fold(hash, |hash, b| (hash ^ u128::from(*b)).wrapping_mul(FNV_PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Never = std::convert::Infallible;

    fn get(cache: &Cache, key: &[&str], made: &mut usize) -> Vec<u8> {
        let make = || {
            *made += 1;
            Ok::<_, Never>(key.concat().into_bytes())
        };
        let Ok(cubin) = cache.get("scan", key, make);
        cubin
    }

    #[test]
    fn makes_once_and_rebuilds_what_is_corrupt() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path().join("new/folder")));
        let mut made = 0;
        for _ in 0..3 {
            assert_eq!(get(&cache, &["a", "bc"], &mut made), b"abc");
        }
        assert_eq!(made, 1);
        assert_eq!(get(&cache, &["ab", "c"], &mut made), b"abc");
        assert_eq!(made, 2, "the parts of a key must not run into each other");

        let entries = fs::read_dir(folder.path().join("new/folder")).unwrap();
        let paths: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        assert_eq!(paths.len(), 2, "{paths:?}");
        for damage in [&b""[..], b"jambacu1", b"jambacu1----------------abc"] {
            paths.iter().for_each(|path| fs::write(path, damage).unwrap());
            let before = made;
            assert_eq!(get(&cache, &["a", "bc"], &mut made), b"abc");
            assert_eq!(get(&cache, &["a", "bc"], &mut made), b"abc");
            assert_eq!(made, before + 1);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_failure() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut made = 0;
        for folder in [None, Some(file.path().join("below/a/file"))] {
            assert_eq!(get(&Cache::new(folder), &["a"], &mut made), b"a");
        }
        assert_eq!(made, 2);
    }
}
