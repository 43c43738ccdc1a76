//! Random weights of any shape: to measure and to compare backends without a checkpoint.

use half::{bf16, f16};

use crate::checkpoint::ParamSource;
use crate::error::Result;
use crate::tensor::{Dtype, HostTensor, Param, Role};
use crate::weights::ParamSpec;

/// Parameters drawn at random, each from the seed and its own name, in magnitudes as trained
/// models have them: activations stay near one from layer to layer, A is that of Mamba's
/// initialisation, dt lies between 0.001 and 0.1 where its input is zero.
#[derive(Clone, Copy, Debug)]
pub struct RandomParams {
    /// Seed; the same one gives the same parameters everywhere.
    pub seed: u64,
    /// Dtype of matrices. Vectors, convolution taps and A are f32.
    pub dtype: Dtype,
}

impl ParamSource for RandomParams {
    fn param(&self, spec: &ParamSpec) -> Result<Param> {
        let mut random = Random::new(self.seed, &spec.name);
        let n = spec.shape.iter().product();
        let cols = spec.shape.last().copied().unwrap_or(1);
        let fan_in = (cols as f32).sqrt().recip();
        let mut vector = |f: &dyn Fn(&mut Random, usize) -> f32| {
            let values = (0..n).map(|i| f(&mut random, i)).collect();
            HostTensor::from_f32(spec.shape.clone(), values)
        };
        let tensor = match spec.role {
            Role::Vector
                if spec.name.ends_with("layernorm.weight") || spec.name.ends_with(".D") =>
            {
                vector(&|r, _| 1.0 + 0.1 * r.normal())
            }
            Role::Vector if spec.name.ends_with("dt_proj.bias") => vector(&|r, _| {
                // The inverse of softplus, of dt uniform in its logarithm.
                let dt = (r.uniform() * (0.1f32 / 0.001).ln() + 0.001f32.ln()).exp();
                dt.exp_m1().ln()
            }),
            Role::Vector => vector(&|r, _| 0.1 * r.normal()),
            Role::Conv => vector(&|r, _| fan_in * r.normal()),
            Role::A => vector(&|r, i| -((i % cols + 1) as f32) * (1.0 + 0.1 * r.normal())),
            Role::Embedding => self.matrix(&random, spec, 1.0),
            Role::Head
            | Role::Linear
            | Role::Selection
            | Role::Router
            | Role::Experts
            | Role::Mlp => self.matrix(&random, spec, fan_in),
        };
        Ok(Param::new(spec.name.clone(), spec.role, tensor))
    }
}

impl RandomParams {
    fn matrix(&self, random: &Random, spec: &ParamSpec, scale: f32) -> HostTensor {
        let n = spec.shape.iter().product();
        let halves = |bits: fn(f32) -> u16| {
            let values = filled(n, random, |r| bits(scale * r.normal()));
            HostTensor::from_halves(self.dtype, spec.shape.clone(), values)
        };
        match self.dtype {
            Dtype::F16 => halves(|v| f16::from_f32(v).to_bits()),
            Dtype::Bf16 => halves(|v| bf16::from_f32(v).to_bits()),
            Dtype::F32 => {
                let values = filled(n, random, |r| scale * r.normal());
                HostTensor::from_f32(spec.shape.clone(), values)
            }
        }
    }
}

/// `n` values, one draw each, from `random` on. Parts of a large matrix are drawn by threads of
/// their own: billions of weights should not take minutes.
fn filled<T: Copy + Default + Send>(
    n: usize,
    random: &Random,
    draw: impl Fn(&mut Random) -> T + Sync,
) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let part = n.div_ceil(threads).max(1 << 16);
    let mut values = vec![T::default(); n];
    std::thread::scope(|scope| {
        for (i, values) in values.chunks_mut(part).enumerate() {
            let draw = &draw;
            let mut fill = move || {
                let mut random = random.skip(i * part);
                values.iter_mut().for_each(|v| *v = draw(&mut random));
            };
            if n <= part { fill() } else { drop(scope.spawn(fill)) }
        }
    });
    values
}

/// By which the counter of [`Random`] grows.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64: a counter through a mixing function, fast enough for billions of weights.
struct Random {
    state: u64,
}

impl Random {
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, so that each parameter has a sequence of its own.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self { state: hash ^ seed.wrapping_mul(STEP) }
    }

    /// This generator after `n` draws.
    fn skip(&self, n: usize) -> Self {
        Self { state: self.state.wrapping_add(STEP.wrapping_mul(n as u64)) }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Mean 0, deviation 1, at most 3.5: the sum of four bytes.
    fn normal(&mut self) -> f32 {
        let bytes = (self.next() >> 32) as u32;
        let sum: u32 = bytes.to_le_bytes().iter().map(|&b| u32::from(b)).sum();
        (sum as f32 - 510.0) / 147.8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::weights::Weights;

    #[test]
    fn a_parameter_depends_on_seed_and_name_only() {
        let config = Config::preset("jamba-tales-11m").unwrap();
        let layout = Weights::layout(&config);
        let params = |seed| {
            let source = RandomParams { seed, dtype: Dtype::Bf16 };
            let mut all = Vec::new();
            layout.for_each(|spec| all.push(source.param(spec).unwrap().to_f32()));
            all
        };
        let (a, b, c) = (params(1), params(1), params(2));
        assert_eq!(a, b);
        assert!(a.iter().zip(&c).all(|(a, c)| a != c));
        assert!(a.iter().flatten().all(|v| v.is_finite()));
    }

    #[test]
    fn parts_drawn_by_threads_are_those_drawn_by_one() {
        let random = Random::new(3, "w");
        let n = (1 << 18) + 5;
        let mut one = random.skip(0);
        let expected: Vec<u64> = (0..n).map(|_| one.next()).collect();
        assert_eq!(filled(n, &random, Random::next), expected);
    }

    #[test]
    fn normal_has_mean_zero_and_deviation_one() {
        let mut random = Random::new(7, "x");
        let values: Vec<f64> = (0..100_000).map(|_| f64::from(random.normal())).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let square = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((square - 1.0).abs() < 0.02, "{square}");
    }
}
