//! Tokens chosen by the backend are those that the host would choose.

use std::sync::Arc;

use jamba_core::{Backend, Sampler, Sampling};
use jamba_cpu::CpuBackend;

const VOCAB: usize = 1000;

fn logits(rows: usize) -> Vec<f32> {
    (0..rows * VOCAB).map(|i| (i * 7919 % 1009) as f32 / 200.0).collect()
}

fn samplers(rows: u64) -> Vec<Sampler> {
    let options = |row| match row % 4 {
        0 => Sampling::greedy(),
        1 => Sampling { temperature: 0.9, seed: row, ..Sampling::default() },
        2 => Sampling { temperature: 1.2, top_k: 40, top_p: 0.9, seed: row, ..Sampling::default() },
        _ => Sampling { repetition_penalty: 1.3, seed: row, ..Sampling::default() },
    };
    let sampler = |row| {
        let mut sampler = Sampler::new(options(row), VOCAB).unwrap();
        sampler.observe_prompt(&[1, 2, 3, row as u32]);
        sampler
    };
    (0..rows).map(sampler).collect()
}

#[test]
fn tokens_are_those_of_the_host_on_one_thread_and_on_several() {
    let (rows, values) = (13, logits(13));
    let samplers = samplers(rows as u64);
    let choices: Vec<_> = samplers.iter().map(|sampler| Some(sampler.choice())).collect();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let backend = CpuBackend::new().with_pool(Arc::new(pool));
        let mut x = backend.alloc(rows, VOCAB).unwrap();
        backend.write(&mut x, &values).unwrap();
        let chosen = backend.choose(&x, &choices).unwrap();
        for ((row, choice), got) in
            values.chunks_exact(VOCAB).zip(choices.iter().flatten()).zip(chosen)
        {
            assert_eq!(got, Some(choice.sample(row).unwrap()));
        }
    }
}

/// The host says why.
#[test]
fn a_row_without_a_choice_or_a_token_is_left_to_the_host() {
    let mut values = logits(5);
    values[VOCAB] = f32::NAN;
    values[2 * VOCAB..3 * VOCAB].fill(f32::NEG_INFINITY);
    values[3 * VOCAB + 7] = f32::NEG_INFINITY;
    let backend = CpuBackend::new();
    let mut x = backend.alloc(5, VOCAB).unwrap();
    backend.write(&mut x, &values).unwrap();
    let sampler = Sampler::new(Sampling::greedy(), VOCAB).unwrap();
    let choice = || Some(sampler.choice());
    let [a, b, c, d, e] = [choice(), choice(), choice(), choice(), choice()];
    let chosen = backend.choose(&x, &[a, b, c, d, None, e]).unwrap();
    assert_eq!(chosen[0], Some(choice().unwrap().sample(&values[..VOCAB]).unwrap()));
    assert_eq!(chosen[1..], [None; 5], "NaN, all and one -inf, no choice, and no row");
}
