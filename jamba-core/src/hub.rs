//! Model folders from the Hugging Face Hub, in the cache that Python's tools use too.
//!
//! ```no_run
//! use jamba_core::Model;
//! use jamba_core::hub::Hub;
//! use jamba_cpu::CpuBackend;
//!
//! let folder = Hub::from_env()?.folder("ai21labs/AI21-Jamba-Reasoning-3B", None, |_| {})?;
//! let model = Model::load(folder, CpuBackend::new())?;
//! # Ok::<(), jamba_core::Error>(())
//! ```

use std::env;
use std::fs;
use std::path::PathBuf;

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Result};
use crate::progress::{Progress, Stage};

/// How often a download that breaks off is taken up again.
const RETRIES: usize = 5;

/// Where models come from, and where they are kept.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Address of the hub.
    pub endpoint: String,
    /// Folder of the cache, laid out as Python's `huggingface_hub` does: `models--ORG--NAME` with
    /// `blobs`, `refs` and `snapshots`.
    pub cache: PathBuf,
    /// What is sent to have models that are not for everybody.
    pub token: Option<String>,
    /// Whether only what is in the cache is taken, and nothing is asked of the hub.
    pub offline: bool,
}

impl Hub {
    /// As the environment says, under the names that Python's tools use: `HF_ENDPOINT`;
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `huggingface` in `XDG_CACHE_HOME` or
    /// `~/.cache`; `HF_TOKEN`, or the file `token` beside the cache; `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`Error::Hub`] where nothing says which folder is the cache.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let home = || Some(env::home_dir()?.join(".cache"));
        let shared = || Some(path("XDG_CACHE_HOME").or_else(home)?.join("huggingface"));
        let within = || Some(path("HF_HOME").or_else(shared)?.join("hub"));
        let cache = path("HF_HUB_CACHE").or_else(within).ok_or_else(|| Error::Hub {
            id: "cache".into(),
            reason: "there is no home folder for it: set HF_HUB_CACHE".into(),
        })?;
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Ok(Self {
            endpoint: text("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()),
            token: text("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            cache,
            offline: ["1", "on", "yes", "true"].contains(&offline.as_str()),
        })
    }

    /// Whether a name is one of the hub, `ORG/NAME`.
    pub fn is_id(id: &str) -> bool {
        let is_name = |name: &str| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !name.is_empty() && name.chars().all(is_plain) && !name.starts_with('.')
        };
        id.split_once('/').is_some_and(|(org, name)| is_name(org) && is_name(name))
    }

    /// The folder of a model: what the cache lacks of it is downloaded. `revision` is a branch, a
    /// tag or a commit, `main` if it is `None`. A download that was interrupted goes on where it
    /// ended, also in a later call. `progress` is called with [`Stage::Download`].
    ///
    /// Of the files, those that a model is made of are taken: configuration, tokenizer, template,
    /// safetensors.
    ///
    /// # Errors
    /// [`Error::Hub`]; `offline`, where the cache lacks the revision.
    pub fn folder(
        &self,
        id: &str,
        revision: Option<&str>,
        mut progress: impl FnMut(Progress),
    ) -> Result<PathBuf> {
        let failed = |reason: String| Error::Hub { id: id.into(), reason };
        let revision = revision.unwrap_or("main");
        if !Self::is_id(id) {
            return Err(failed("a name of the hub is ORG/NAME".into()));
        }
        if revision.is_empty() || revision.split('/').any(|part| part.starts_with('.')) {
            return Err(failed(format!("`{revision}` is no revision")));
        }
        let repo = |revision: &str| {
            Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned())
        };
        let cache = Cache::new(self.cache.clone());
        let snapshot = |commit: &str| cache.repo(repo(revision)).pointer_path(commit);
        if self.offline {
            let named = cache.repo(repo(revision)).get("config.json");
            let named = named.and_then(|file| Some(file.parent()?.to_owned()));
            let folder = named.unwrap_or_else(|| snapshot(revision));
            if folder.join("config.json").is_file() {
                return Ok(folder);
            }
            let cache = self.cache.display();
            let reason = format!("HF_HUB_OFFLINE is set, and {cache} has no revision `{revision}`");
            return Err(failed(reason));
        }
        let api = self.api().map_err(|e| failed(e.to_string()))?;
        let info = api.repo(repo(revision)).info().map_err(|e| {
            failed(format!("{e} (HF_HUB_OFFLINE=1 takes what the cache has, HF_TOKEN is sent)"))
        })?;
        if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(failed("the hub names no commit".into()));
        }
        let folder = snapshot(&info.sha);
        // By the commit, so that all files are of one, also if the branch moves meanwhile.
        let files = api.repo(repo(&info.sha));
        for file in info.siblings.iter().map(|file| &file.rfilename).filter(|file| is_part(file)) {
            if folder.join(file).is_file() {
                continue;
            }
            let told = Told { file, done: 0, total: 0, progress: &mut progress };
            files.download_with_progress(file, told).map_err(|e| failed(format!("{file}: {e}")))?;
        }
        if !folder.join("config.json").is_file() {
            return Err(failed("it has no config.json".into()));
        }
        // Last, so that whoever is offline finds whole folders only.
        let named = cache.repo(repo(revision)).create_ref(&info.sha);
        named.map_err(Error::io(&self.cache))?;
        fs::canonicalize(&folder).map_err(Error::io(&folder))
    }

    fn api(&self) -> Result<Api, hf_hub::api::sync::ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_owned())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .build()
    }
}

/// Whether a file is one that a model is made of.
fn is_part(file: &str) -> bool {
    let weights = file.starts_with("model") && file.ends_with(".safetensors");
    let is_plain = !file.contains(['/', '\\']) && !file.starts_with('.');
    is_plain && (weights || file.ends_with(".json") || file.ends_with(".jinja"))
}

/// Tells what hf-hub tells.
struct Told<'a> {
    file: &'a str,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Told<'_> {
    fn tell(&mut self) {
        let Self { done, total, .. } = *self;
        let stage = Stage::Download { file: self.file.to_owned() };
        (self.progress)(Progress { stage, done, total });
    }
}

impl hf_hub::api::Progress for Told<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size as u64);
        self.tell();
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.tell();
    }

    fn finish(&mut self) {}
}
