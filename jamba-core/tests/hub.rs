//! Folders from a hub on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use jamba_core::hub::Hub;
use jamba_core::{Error, Progress, Stage};

#[allow(unreachable_pub, reason = "the file is of a crate of its own")]
#[path = "../../fuzz/src/hub.rs"]
mod fuzz;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What was asked: path and first byte.
type Asked = Arc<Mutex<Vec<(String, usize)>>>;

/// A hub that has one model, whose commit `main` is, and `v1`.
fn serve(files: BTreeMap<&'static str, Vec<u8>>) -> (String, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Asked::default();
    let told = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &files, &told);
        }
    });
    (url, asked)
}

fn answer(mut stream: TcpStream, files: &BTreeMap<&'static str, Vec<u8>>, asked: &Asked) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut range = (0, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some(bytes) = line.to_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = bytes.split_once('-').unwrap();
            range = (from.parse().unwrap(), to.parse::<usize>().ok());
        }
    }
    asked.lock().unwrap().push((path.clone(), range.0));
    let (head, body) =
        if ["main", "v1"].iter().any(|r| path == format!("/api/models/org/tiny/revision/{r}")) {
            let siblings: Vec<_> =
                files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let info = serde_json::json!({ "sha": SHA, "siblings": siblings }).to_string();
            ("200 OK\r\nContent-Type: application/json".to_owned(), info.into_bytes())
        } else if let Some(file) = path.strip_prefix(&format!("/org/tiny/resolve/{SHA}/")) {
            let bytes = &files[file];
            let to = range.1.map_or(bytes.len(), |to| bytes.len().min(to + 1));
            let head = format!(
                "206 Partial Content\r\nETag: \"etag-{}\"\r\nX-Repo-Commit: {SHA}\r\n\
             Content-Range: bytes {}-{}/{}",
                file.replace('.', "-"),
                range.0,
                to.saturating_sub(1),
                bytes.len()
            );
            (head, bytes[range.0..to].to_vec())
        } else {
            ("404 Not Found".to_owned(), Vec::new())
        };
    let length = body.len();
    let head = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
}

fn files() -> BTreeMap<&'static str, Vec<u8>> {
    let weights = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    BTreeMap::from([
        ("README.md", b"no part of it".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", weights),
        ("../out.json", b"{}".to_vec()),
    ])
}

fn hub(endpoint: String, cache: &Path) -> Hub {
    Hub { endpoint, cache: cache.to_owned(), token: None, offline: false }
}

fn refused(result: jamba_core::Result<std::path::PathBuf>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error}");
    error.to_string()
}

#[test]
fn a_folder_is_downloaded_once_and_then_had_offline() {
    let (url, asked) = serve(files());
    let cache = tempfile::tempdir().unwrap();
    let mut hub = hub(url, cache.path());
    let mut told = Vec::new();
    let folder = hub.folder("org/tiny", None, |progress: Progress| told.push(progress)).unwrap();
    for name in ["config.json", "model.safetensors"] {
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), files()[name]);
    }
    assert!(!folder.join("README.md").exists() && !folder.join("../out.json").exists());
    // The layout that Python's tools read.
    let root = cache.path().join("models--org--tiny");
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), SHA);
    assert!(root.join("snapshots").join(SHA).join("config.json").is_file());
    assert!(root.join("blobs/etag-config-json").is_file());
    let last = told.last().unwrap();
    assert_eq!(last.stage, Stage::Download { file: "model.safetensors".into() });
    assert_eq!((last.done, last.total), (400_000, 400_000));

    let before = asked.lock().unwrap().len();
    hub.folder("org/tiny", Some("main"), |_| panic!("nothing is left to do")).unwrap();
    assert_eq!(asked.lock().unwrap().len(), before + 1);
    hub.offline = true;
    for revision in [None, Some("main"), Some(SHA)] {
        let again = hub.folder("org/tiny", revision, |_| {}).unwrap();
        assert_eq!(std::fs::canonicalize(again).unwrap(), folder);
    }
    assert_eq!(asked.lock().unwrap().len(), before + 1);
    assert!(refused(hub.folder("org/tiny", Some("v2"), |_| {})).contains("HF_HUB_OFFLINE"));
}

#[test]
fn a_named_revision_is_downloaded() {
    let (url, asked) = serve(files());
    let cache = tempfile::tempdir().unwrap();
    let mut hub = hub(url, cache.path());
    let folder = hub.folder("org/tiny", Some("v1"), |_| {}).unwrap();
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}");
    assert!(asked.lock().unwrap().iter().any(|(path, _)| path.ends_with("/revision/v1")));
    let refs = cache.path().join("models--org--tiny/refs");
    assert_eq!(std::fs::read_to_string(refs.join("v1")).unwrap(), SHA);
    hub.offline = true;
    assert_eq!(hub.folder("org/tiny", Some("v1"), |_| {}).unwrap(), folder);
    assert!(refused(hub.folder("org/tiny", None, |_| {})).contains("`main`"));
}

/// In a process of its own, which this test is too.
#[test]
fn the_environment_says_where() {
    const CHILD: &str = "JAMBA_TEST_HUB";
    if std::env::var_os(CHILD).is_some() {
        let Hub { endpoint, cache, token, offline } = Hub::from_env().unwrap();
        println!("[{endpoint} {} {token:?} {offline}]", cache.display());
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    std::fs::write(format!("{home}/token"), "hf_secret\n").unwrap();
    for (set, expected) in [
        (
            vec![("HOME", home)],
            format!("[https://huggingface.co {home}/.cache/huggingface/hub None false]"),
        ),
        (
            vec![("HF_HOME", home), ("HF_HUB_OFFLINE", "1")],
            format!("[https://huggingface.co {home}/hub Some(\"hf_secret\") true]"),
        ),
        (
            vec![
                ("HF_HOME", home),
                ("HF_HUB_CACHE", "/c"),
                ("HF_TOKEN", "t"),
                ("HF_ENDPOINT", "http://e"),
            ],
            "[http://e /c Some(\"t\") false]".into(),
        ),
        (
            vec![
                ("HOME", home),
                ("XDG_CACHE_HOME", "/x"),
                ("HF_HUB_OFFLINE", "0"),
                ("HF_TOKEN", ""),
            ],
            "[https://huggingface.co /x/huggingface/hub None false]".into(),
        ),
    ] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_environment_says_where", "--nocapture"])
            .env_clear()
            .env(CHILD, "1")
            .envs(set)
            .output()
            .unwrap();
        let out = String::from_utf8(child.stdout).unwrap();
        assert!(child.status.success() && out.contains(&expected), "{expected} is not in {out}");
    }
}

#[test]
fn an_interrupted_download_goes_on() {
    let (url, asked) = serve(files());
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let half = &files()["model.safetensors"][..150_000];
    std::fs::write(blobs.join("etag-model-safetensors.part"), half).unwrap();
    let folder = hub(url, cache.path()).folder("org/tiny", None, |_| {}).unwrap();
    let whole = std::fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(whole, files()["model.safetensors"]);
    assert!(asked.lock().unwrap().iter().any(|(_, from)| *from == 150_000));
}

#[test]
fn what_is_not_there_is_said() {
    let (url, _) = serve(files());
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(url, cache.path());
    assert!(refused(hub.folder("org/other", None, |_| {})).contains("404"));
    assert!(refused(hub.folder("org/tiny", Some("v2"), |_| {})).contains("404"));
    for id in ["tiny", "a/b/c", "../x", "org/..", "org/", "/x", "o rg/x"] {
        assert!(refused(hub.folder(id, None, |_| {})).contains("ORG/NAME"), "{id}");
    }
    assert!(refused(hub.folder("org/tiny", Some("../x"), |_| {})).contains("revision"));
}

/// What fuzzing found worth keeping, replayed: see `fuzz/`.
#[test]
fn no_name_leads_out_of_the_cache() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/hub");
    let files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!files.is_empty());
    for path in files {
        println!("{}", path.display());
        fuzz::names(&std::fs::read(path).unwrap());
    }
}
