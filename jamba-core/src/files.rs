//! Files of a model folder: regular ones of a sane size, or an error that says what is there instead.

use std::fs::{self, Metadata};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Bytes of a JSON file at most: ten times the largest of published models, the index of a
/// checkpoint of many shards.
const MAX_JSON: u64 = 64 << 20;

/// The error of a folder that lacks `wanted`, which says what is there instead.
pub(crate) fn missing(folder: &Path, wanted: &'static str) -> Error {
    let problem = |reason: &str| Error::Io {
        path: folder.to_owned(),
        source: std::io::Error::new(ErrorKind::NotFound, reason),
    };
    if folder.is_file() {
        return problem("this is a file: the folder that it is in is expected");
    }
    if !folder.is_dir() {
        return problem("no such folder");
    }
    let (folder, has) = (folder.to_owned(), |name: &str| folder.join(name).exists());
    let instead = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.model"];
    let instead = instead.into_iter().filter(|name| match *name {
        "tokenizer.model" => wanted.starts_with("tokenizer"),
        _ => wanted.starts_with("model"),
    });
    let found = instead.into_iter().find(|name| has(name));
    Error::Missing { folder: folder.clone(), wanted, found }
}

/// The JSON in `path`; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = read_file(path, MAX_JSON)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { path: path.to_owned(), source })?;
    Ok(Some(value))
}

/// The contents of a regular file of at most `max` bytes; `None` if there is nothing of this name.
pub(crate) fn read_file(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    let Some(metadata) = regular_file(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    if metadata.len() <= max {
        let file = fs::File::open(path).map_err(Error::io(path))?;
        file.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io(path))?;
    }
    if metadata.len() > max || bytes.len() as u64 > max {
        return Err(refused(
            path,
            &format!("it has more than {max} bytes, so it is not what it should be"),
        ));
    }
    Ok(Some(bytes))
}

/// What is known of a file; `None` if there is nothing of this name. What is no file, and a link
/// that leads nowhere, is an error: opening a pipe waits, and reading a device need not end.
pub(crate) fn regular_file(path: &Path) -> Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(Some(metadata)),
        Ok(metadata) if metadata.is_dir() => {
            Err(refused(path, "it is a folder, a file is expected"))
        }
        Ok(_) => Err(refused(path, "it is not a regular file")),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            match fs::symlink_metadata(path) {
                Ok(_) => Err(refused(path, "it is a link to a file that is not there")),
                Err(_) => Ok(None),
            }
        }
        Err(e) => Err(Error::io(path)(e)),
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::io(path)(std::io::Error::new(ErrorKind::InvalidInput, reason))
}
