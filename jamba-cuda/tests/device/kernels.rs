//! Every kernel compiles for every architecture that there is a difference for. Needs NVRTC.

use jamba_core::Config;
use jamba_cuda::{Error, Precision, compile};
use libtest_mimic::Trial;

use crate::support::cache;

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
        ("jamba-reasoning-3b", preset("jamba-reasoning-3b")),
        ("jamba-tales-11m", preset("jamba-tales-11m")),
        ("odd", odd),
        ("wide", wide),
    ]
}

pub(crate) fn trials() -> Vec<Trial> {
    let probe = compile(&configs()[0].1, Precision::F32, "sm_80", &cache());
    let missing = matches!(probe, Err(Error::Missing { .. }));
    if let Err(reason @ Error::Missing { .. }) = probe {
        println!("kernels are not compiled: {reason}");
    }
    let mut trials = Vec::new();
    for arch in ARCHITECTURES {
        for precision in [Precision::F32, Precision::Bf16] {
            for (name, config) in configs() {
                let run = move || {
                    let compiled = compile(&config, precision, arch, &cache())?;
                    if compiled.len() < 11 || compiled.iter().any(|c| c.bytes < 1000) {
                        return Err(format!("too little was compiled: {compiled:?}").into());
                    }
                    Ok(())
                };
                let trial = Trial::test(format!("compile::{arch}::{precision:?}::{name}"), run);
                trials.push(trial.with_ignored_flag(missing));
            }
        }
    }
    trials
}
