//! Prints the times of `docs/state.md`: reading, writing and copying states of the published
//! models' sizes.

use std::time::Instant;

use jamba_core::schedule::{MixerKind, Schedule};
use jamba_core::{Backend, Config, Limits, StatePart, memory};
use jamba_cpu::CpuBackend;

fn main() {
    for name in ["jamba-tales-11m", "jamba-reasoning-3b", "jamba-v0.1", "jamba-1.5-large"] {
        let config = Config::preset(name).unwrap();
        let limits = Limits { slots: 2, context: 4096, tokens: 1, outputs: 1 };
        let backend = CpuBackend::new();
        let mut state = backend.new_state(&config, &limits).unwrap();
        let time = |f: &mut dyn FnMut()| {
            f();
            let start = Instant::now();
            f();
            start.elapsed()
        };
        let parts = |mamba: bool| {
            let of = move |(layer, mixer): (usize, MixerKind)| match mixer {
                MixerKind::Mamba if mamba => {
                    vec![(layer, StatePart::Conv), (layer, StatePart::Ssm)]
                }
                MixerKind::Attention if !mamba => {
                    vec![(layer, StatePart::Keys), (layer, StatePart::Values)]
                }
                _ => vec![],
            };
            let schedule = Schedule::new(&config);
            schedule.iter().map(|kind| kind.mixer).enumerate().flat_map(of).collect::<Vec<_>>()
        };
        for (what, mamba, positions) in [("mamba", true, 0), ("4,096 positions", false, 4096)] {
            let mut values = Vec::new();
            let read = time(&mut || {
                values.clear();
                for (layer, part) in parts(mamba) {
                    values.push(backend.read_state(&state, layer, part, 0, 0..positions).unwrap());
                }
            });
            let write = time(&mut || {
                for ((layer, part), values) in parts(mamba).into_iter().zip(&values) {
                    backend.write_state(&mut state, layer, part, 1, 0..positions, values).unwrap();
                }
            });
            let bytes = 4 * values.iter().map(Vec::len).sum::<usize>();
            println!("{name}, {what}: {bytes} bytes, read {read:.1?}, write {write:.1?}");
        }
        let copy = time(&mut || backend.copy_slot(&config, &mut state, 0, 1, 4096).unwrap());
        println!("{name}, slot to slot with 4,096 positions: {copy:.1?}");
        println!(
            "{name}: {} KV bytes a token, {} Mamba bytes",
            memory::kv_bytes_per_token(&config, 4),
            memory::mamba_state_bytes(&config, 4)
        );
    }
}
