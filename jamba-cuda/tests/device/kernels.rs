//! Every kernel compiles for every architecture that there is a difference for. Needs NVRTC.

use std::path::{Path, PathBuf};

use jamba_core::{Config, WeightFormat};
use jamba_cuda::{Error, KernelCache, Precision, compile};
use libtest_mimic::{Failed, Trial};

use crate::support::{cache, check};

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

/// Published sizes, and the edges of what the kernels are made for.
fn configs() -> Vec<(&'static str, Config)> {
    let preset = |name| Config::preset(name).expect("a preset");
    let mut odd = preset("jamba-tales-11m");
    odd.mamba_d_state = 6;
    odd.mamba_d_conv = 1;
    odd.head_dim = 12;
    let mut wide = preset("jamba-tales-11m");
    wide.mamba_d_state = 256;
    wide.mamba_d_conv = 65;
    wide.head_dim = 256;
    vec![
        ("jamba-v0.1", preset("jamba-v0.1")),
        ("jamba-1.5-large", preset("jamba-1.5-large")),
        ("jamba-reasoning-3b", preset("jamba-reasoning-3b")),
        ("jamba-tales-11m", preset("jamba-tales-11m")),
        ("odd", odd),
        ("wide", wide),
    ]
}

pub(crate) fn trials() -> Vec<Trial> {
    let probe = compile(&configs()[0].1, Precision::F32, WeightFormat::Stored, "sm_80", &cache());
    let missing = matches!(probe, Err(Error::Missing { .. }));
    if let Err(reason @ Error::Missing { .. }) = probe {
        println!("kernels are not compiled: {reason}");
    }
    let mut trials = Vec::new();
    for arch in ARCHITECTURES {
        for precision in [Precision::F32, Precision::Bf16] {
            for (name, config) in configs() {
                let run = move || {
                    // Of all formats, for each of which some sources are specialised.
                    let all = WeightFormat::ALL
                        .map(|format| compile(&config, precision, format, arch, &cache()));
                    let compiled: Vec<_> = all.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
                    if compiled.len() < 48 || compiled.iter().any(|c| c.bytes < 1000) {
                        return Err(format!("too little was compiled: {compiled:?}").into());
                    }
                    Ok(())
                };
                let trial = Trial::test(format!("compile::{arch}::{precision:?}::{name}"), run);
                trials.push(trial.with_ignored_flag(missing));
            }
        }
    }
    trials.push(Trial::test("compile::cached", cached).with_ignored_flag(missing));
    trials
}

/// What is in the folder: names and contents, sorted.
fn kept(folder: &Path) -> std::io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let paths = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), std::fs::read(path)?))).collect()
}

/// What is kept is used again; what is damaged is made anew; another architecture, precision or
/// size has files of its own, and does not find those.
fn cached() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let cache = KernelCache::Folder(folder.path().to_owned());
    let (mut config, stored) = (Config::preset("jamba-tales-11m")?, WeightFormat::Stored);
    let all = compile(&config, Precision::F32, stored, "sm_80", &cache)?;
    let first = kept(folder.path())?;
    check(first.len() == all.len(), format!("{} files of {} kernels", first.len(), all.len()))?;
    let times = || -> std::io::Result<Vec<_>> {
        first.iter().map(|(path, _)| path.metadata()?.modified()).collect()
    };
    let before = times()?;
    compile(&config, Precision::F32, stored, "sm_80", &cache)?;
    check(times()? == before, "what is there was compiled again")?;
    let (damaged, whole) = &first[0];
    std::fs::write(damaged, &whole[..whole.len() - 1])?;
    compile(&config, Precision::F32, stored, "sm_80", &cache)?;
    check(kept(folder.path())? == first, "a damaged file was left")?;

    config.mamba_d_conv += 1;
    compile(&config, Precision::F32, stored, "sm_80", &cache)?;
    let sized = kept(folder.path())?.len() - first.len();
    check(sized == 1, format!("{sized} files more for another size"))?;
    compile(&config, Precision::F32, stored, "sm_90a", &cache)?;
    let both = kept(folder.path())?;
    check(both.len() == first.len() + sized + all.len(), "architectures share files")?;
    check(first.iter().all(|file| both.contains(file)), "files of one replaced those of another")
}
