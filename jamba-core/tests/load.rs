//! How far a load is, and what two loads of a folder share.

use std::path::{Path, PathBuf};

use jamba_core::random::RandomParams;
use jamba_core::{Config, Dtype, Model, Stage, WeightFormat};
use jamba_cpu::CpuBackend;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/jamba-tales-11m").canonicalize().unwrap()
}

#[test]
fn a_load_is_told_to_its_end() {
    for format in [WeightFormat::Stored, WeightFormat::Int8] {
        let mut told = Vec::new();
        let backend = CpuBackend::new().with_format(format);
        Model::load_with(demo(), backend, |progress| told.push(progress)).unwrap();
        let last = told.last().unwrap();
        let size = std::fs::metadata(demo().join("model.safetensors")).unwrap().len();
        // All tensors are part of the model: only the header is not.
        assert!(size - last.total < 100_000 && last.total < size, "{last:?} of {size}");
        assert_eq!((told[0].done, last.done), (0, last.total));
        let ascends =
            |w: &[jamba_core::Progress]| w[0].done < w[1].done && w[0].total == w[1].total;
        assert!(told.len() > 50 && told.windows(2).all(ascends));
        assert!(told.iter().all(|progress| progress.stage == Stage::Weights));
    }
    let (mut done, mut total) = (0, 0);
    let config = Config::from_folder(demo()).unwrap();
    let random = RandomParams { seed: 1, dtype: Dtype::F32 };
    let told = |progress: jamba_core::Progress| (done, total) = (progress.done, progress.total);
    Model::new_with(config, &random, CpuBackend::new(), told).unwrap();
    assert!(done == total && total > 40_000_000, "{done} of {total}");
}

/// Two maps of the weights' file, none of whose pages is a copy: the matrices of two models.
#[cfg(target_os = "linux")]
#[test]
fn two_loads_of_a_folder_share_its_pages() {
    use jamba_core::{LanguageModel, SessionOptions};

    let load = || Model::load(demo(), CpuBackend::new()).unwrap();
    let models = [load(), load()];
    let ids: Vec<u32> = (3..259).collect();
    let run = |model: &Model<CpuBackend>| {
        let options = SessionOptions { context: ids.len(), ..SessionOptions::default() };
        model.session(options).unwrap().append(&ids).unwrap().to_vec()
    };
    let [first, second] = [0, 1].map(|i| run(&models[i]));
    assert_eq!(first, second);
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let file = demo().join("model.safetensors");
    let mut found = 0;
    let mut lines = maps.lines();
    while let Some(line) = lines.next() {
        if !line.ends_with(file.to_str().unwrap()) {
            continue;
        }
        let entry: Vec<&str> = lines.by_ref().take_while(|l| !l.starts_with("VmFlags")).collect();
        let kb = |name: &str| -> u64 {
            let line = entry.iter().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
        };
        assert_eq!((kb("Private_Dirty"), kb("Anonymous")), (0, 0), "{entry:?}");
        // Another test may have the file mapped too.
        found += usize::from(kb("Rss") > 20_000);
    }
    assert!(found >= 2, "{found} maps");
}
