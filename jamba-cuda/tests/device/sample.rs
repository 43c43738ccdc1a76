//! Tokens chosen on the device are those that the host would choose.

use jamba_core::backend::Backend;
use jamba_core::{Choice, Sampler, Sampling};
use jamba_cuda::{CudaBackend, Precision};
use libtest_mimic::{Failed, Trial};

use crate::support::{check, guarded, text};

pub(crate) fn trials(precision: Precision) -> Vec<Trial> {
    let trial = |name, run: fn(CudaBackend) -> Result<(), Failed>| {
        Trial::test(format!("{precision:?}::sample::{name}"), move || guarded(precision, run))
    };
    vec![
        trial("greedy", greedy),
        trial("as_the_host", as_the_host),
        trial("equal_scores", equal_scores),
        trial("shares", shares),
        trial("not_finite", not_finite),
    ]
}

/// Whole steps of `1 / grain`, between -16 and 16.
fn values(rows: usize, cols: usize, grain: f32) -> Vec<f32> {
    let ids = text((rows * cols) as u64, rows * cols, (32.0 * grain) as usize);
    ids.into_iter().map(|id| id as f32 / grain - 16.0).collect()
}

/// Like logits: a few far above the many, which are normal.
fn logits(rows: usize, cols: usize, spread: f32) -> Vec<f32> {
    let sum = |v: &[f32]| v.iter().sum::<f32>() * spread / 18.5;
    values(4 * rows, cols, 32768.0).chunks_exact(4).map(sum).collect()
}

/// One of each kind, and of those that filter several.
fn options(cols: usize) -> Vec<Sampling> {
    let off = Sampling::default();
    let bias = (0..40).map(|i| (i * 7919 % cols as u32, i as f32 / 4.0 - 5.0));
    let bias = bias.chain([(0, 1.5), (0, f32::NEG_INFINITY), (1, 2.0), (1, -0.25)]).collect();
    vec![
        off.clone(),
        Sampling { temperature: 0.7, ..off.clone() },
        Sampling { min_p: 0.02, ..off.clone() },
        Sampling { top_k: 50, ..off.clone() },
        Sampling { top_k: cols / 2, temperature: 1.3, ..off.clone() },
        Sampling { top_p: 0.95, ..off.clone() },
        Sampling { top_p: 0.0, ..off.clone() },
        Sampling { top_k: 40, top_p: 0.9, temperature: 0.8, min_p: 0.05, ..off.clone() },
        Sampling { top_p: 0.999, temperature: 30.0, ..off.clone() },
        Sampling { top_p: 0.9, temperature: 1e-3, ..off.clone() },
        Sampling { logit_bias: bias, top_k: 100, ..off.clone() },
        Sampling { repetition_penalty: 1.4, frequency_penalty: 0.2, ..off.clone() },
        Sampling { presence_penalty: 3.0, repetition_penalty: 0.9, top_p: 0.8, ..off.clone() },
        Sampling { repetition_penalty: 1.2, ..Sampling::greedy() },
    ]
}

/// The token on the device, of a row for each choice; that of the host is the same, or it is where
/// the draw is less than `2^-44` a token from a boundary (sample.cu).
fn compare(b: &CudaBackend, rows: &[f32], samplers: &[Sampler]) -> Result<(), Failed> {
    let cols = rows.len() / samplers.len();
    let mut x = b.alloc(samplers.len(), cols)?;
    b.write(&mut x, rows)?;
    let choices: Vec<_> = samplers.iter().map(|sampler| Some(sampler.choice())).collect();
    let chosen = b.choose(&x, &choices)?;
    check(chosen.len() == samplers.len(), format!("{} rows", chosen.len()))?;
    check(b.choose(&x, &choices)? == chosen, "another the second time")?;
    let off = cols as f64 / (1u64 << 44) as f64;
    let near = |v: f64| [v, (v - off).max(0.0), (v + off).min(1.0 - off)];
    for ((row, choice), got) in rows.chunks_exact(cols).zip(choices.iter().flatten()).zip(chosen) {
        let got = got.ok_or(format!("none for {:?}", choice.sampling))?;
        let host = |uniform| Choice { uniform, ..*choice }.sample(row);
        let expected = near(choice.uniform).map(host);
        let same = expected.iter().flatten().find(|expected| expected.id == got.id);
        let same = same.ok_or(format!("{got:?}, not {expected:?} for {choice:?}"))?;
        let off = (got.logprob - same.logprob).abs();
        check(off <= 1e-5 * same.logprob.abs().max(1.0), format!("{got:?}, not {same:?}"))?;
    }
    Ok(())
}

fn greedy(b: CudaBackend) -> Result<(), Failed> {
    for (rows, cols) in [(1, 1), (3, 101), (5, 1024), (64, 65_536)] {
        let mut values = values(rows, cols, 32768.0);
        for (r, row) in values.chunks_exact_mut(cols).enumerate() {
            // The largest several times: the lowest of them is meant.
            let first = r * 7919 % cols;
            row[first..].iter_mut().step_by(97).for_each(|v| *v = 17.0);
        }
        compare(&b, &values, &vec![Sampler::new(Sampling::greedy(), cols)?; rows])?;
    }
    let none = b.alloc(3, 7)?;
    check(b.choose(&none, &[])?.is_empty(), "tokens of no rows")?;
    Ok(())
}

/// Rows of different options beside each other, over several tokens.
fn as_the_host(b: CudaBackend) -> Result<(), Failed> {
    for (cols, spread) in [(7, 1.0), (1000, 3.0), (65_536, 0.1), (65_536, 1.0), (151_937, 4.0)] {
        let mut samplers = Vec::new();
        for (seed, sampling) in options(cols).into_iter().enumerate() {
            let mut sampler = Sampler::new(Sampling { seed: seed as u64, ..sampling }, cols)?;
            sampler.observe_prompt(&text(seed as u64, 300, cols));
            text(seed as u64, 20, cols).iter().for_each(|id| sampler.observe(*id));
            samplers.push(sampler);
        }
        for step in 0..4 {
            let values = logits(samplers.len() + step, cols, spread);
            compare(&b, &values[step * cols..], &samplers)?;
            samplers.iter_mut().for_each(|sampler| sampler.observe(step as u32));
        }
    }
    Ok(())
}

/// Few different values, or one: only ids tell the candidates apart.
fn equal_scores(b: CudaBackend) -> Result<(), Failed> {
    for (cols, grain) in [(3000, 0.04), (65_536, 0.04), (65_536, 0.5), (65_536, 4.0)] {
        let mut samplers = Vec::new();
        for (seed, sampling) in options(cols).into_iter().enumerate() {
            samplers.push(Sampler::new(Sampling { seed: seed as u64, ..sampling }, cols)?);
        }
        let mut values = values(samplers.len(), cols, grain);
        // Zeros of both signs are equal.
        values.iter_mut().skip(1).step_by(3).filter(|v| **v == 0.0).for_each(|v| *v = -0.0);
        compare(&b, &values, &samplers)?;
    }
    Ok(())
}

/// Of 4,096 draws from eight tokens, each has its share within four standard deviations.
fn shares(b: CudaBackend) -> Result<(), Failed> {
    const ROWS: usize = 4096;
    let row = [2.0, -1.0, 0.5, 3.0, 0.0, 1.5, -2.0, 2.5];
    let mut x = b.alloc(ROWS, row.len())?;
    b.write(&mut x, &row.repeat(ROWS))?;
    // transformers' processors, as in jamba-core's tests.
    let base = [0.156248, 0.007779, 0.034864, 0.424725, 0.021146, 0.094769, 0.002862, 0.257609];
    let three = [0.186324, 0.0, 0.0, 0.50648, 0.0, 0.0, 0.0, 0.307196];
    let min_p = [0.167405, 0.0, 0.0, 0.455054, 0.0, 0.101536, 0.0, 0.276004];
    let off = Sampling::default();
    for (sampling, expected) in [
        (off.clone(), base),
        (Sampling { top_k: 3, ..off.clone() }, three),
        (Sampling { top_p: 0.8, ..off.clone() }, three),
        (Sampling { min_p: 0.2, ..off }, min_p),
    ] {
        let sampler = |seed| Sampler::new(Sampling { seed, ..sampling.clone() }, row.len());
        let samplers = (0..ROWS as u64).map(sampler).collect::<Result<Vec<_>, _>>()?;
        let choices: Vec<_> = samplers.iter().map(|sampler| Some(sampler.choice())).collect();
        let mut counts = [0.0; 8];
        for chosen in b.choose(&x, &choices)? {
            counts[chosen.ok_or("none")?.id as usize] += 1.0 / ROWS as f64;
        }
        for (id, (got, p)) in counts.into_iter().zip(expected).enumerate() {
            let allowed = 4.0 * (p * (1.0 - p) / ROWS as f64).sqrt();
            check((got - p).abs() <= allowed, format!("{sampling:?}: token {id}: {got} for {p}"))?;
        }
    }
    Ok(())
}

/// One value that is not finite leaves its row to the host, and no other; so does a bias that leaves
/// no token.
fn not_finite(b: CudaBackend) -> Result<(), Failed> {
    let (rows, cols) = (4, 5000);
    let mut x = b.alloc(rows, cols)?;
    let samplers = [Sampling::greedy(), Sampling { top_p: 0.5, ..Sampling::default() }]
        .map(|sampling| Sampler::new(sampling, cols));
    for sampler in samplers {
        let sampler = sampler?;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1023, 4999] {
                let mut values = values(rows, cols, 32768.0);
                values[2 * cols + at] = bad;
                b.write(&mut x, &values)?;
                let chosen = b.choose(&x, &vec![Some(sampler.choice()); rows])?;
                let is_some: Vec<bool> = chosen.iter().map(Option::is_some).collect();
                check(is_some == [true, true, false, true], format!("{bad} at {at}: {is_some:?}"))?;
            }
        }
    }
    let logit_bias = (0..cols as u32).map(|id| (id, f32::NEG_INFINITY)).collect();
    let nothing = Sampler::new(Sampling { logit_bias, ..Sampling::default() }, cols)?;
    let all = Sampler::new(Sampling::default(), cols)?;
    b.write(&mut x, &values(rows, cols, 32768.0))?;
    let choices = [None, Some(nothing.choice()), Some(all.choice()), None];
    let chosen = b.choose(&x, &choices)?;
    let is_some: Vec<bool> = chosen.iter().map(Option::is_some).collect();
    check(is_some == [false, false, true, false], format!("{is_some:?}"))?;
    // The row that is chosen is the row of its choice.
    let row = &values(rows, cols, 32768.0)[2 * cols..3 * cols];
    check(chosen[2] == Some(all.choice().sample(row)?), "of another row")
}
