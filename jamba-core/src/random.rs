//! Random weights of any shape: to measure and to compare backends without a checkpoint.
//!
//! Matrices are descriptions ([`Draw`]) until they are read: a model may be larger than the memory
//! of the host, and a device can draw the same values by itself.

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
            Role::Embedding => self.matrix(random, spec, 1.0),
            Role::Head
            | Role::Linear
            | Role::Selection
            | Role::Router
            | Role::Experts
            | Role::Mlp => self.matrix(random, spec, fan_in),
        };
        Ok(Param::new(spec.name.clone(), spec.role, tensor))
    }
}

impl RandomParams {
    fn matrix(&self, random: Random, spec: &ParamSpec, scale: f32) -> HostTensor {
        let draw = Draw { state: random.state, scale };
        HostTensor::drawn(self.dtype, spec.shape.clone(), draw)
    }
}

/// Normal values, of which any can be drawn without those before it, on a device too. Number i is
///
/// ```text
/// z = state + (i + 1) * 0x9e3779b97f4a7c15              SplitMix64, modulo 2^64
/// z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
/// z = (z ^ (z >> 27)) * 0x94d049bb133111eb
/// z = z ^ (z >> 31)
/// value = (sum of the upper four bytes of z - 510) / 147.8 * scale
/// ```
///
/// in f32, each operation rounded, and then rounded to the dtype of the tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// The generator before the first value.
    pub state: u64,
    /// Standard deviation.
    pub scale: f32,
}

impl Draw {
    /// By which the generator grows with each value.
    pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// The values after the first `n`.
    pub fn skip(self, n: usize) -> Self {
        Self { state: self.state.wrapping_add(Self::STEP.wrapping_mul(n as u64)), ..self }
    }

    /// The first values, one for each of `to`.
    pub(crate) fn fill<T: Send>(self, to: &mut [T], form: impl Fn(f32) -> T + Sync) {
        fill(to, &Random { state: self.state }, |r| form(self.scale * r.normal()));
    }
}

/// One draw each, from `random` on. Parts of a large matrix are drawn by threads of their own:
/// billions of weights should not take minutes.
fn fill<T: Send>(to: &mut [T], random: &Random, draw: impl Fn(&mut Random) -> T + Sync) {
    const LEAST: usize = 1 << 16;
    let threads = || std::thread::available_parallelism().map_or(1, |n| n.get());
    // To ask for the threads takes longer than a few values.
    let n = to.len();
    let part = if n <= LEAST { LEAST } else { n.div_ceil(threads()).max(LEAST) };
    std::thread::scope(|scope| {
        for (i, values) in to.chunks_mut(part).enumerate() {
            let draw = &draw;
            let mut fill = move || {
                let mut random = random.skip(i * part);
                values.iter_mut().for_each(|v| *v = draw(&mut random));
            };
            if n <= part { fill() } else { drop(scope.spawn(fill)) }
        }
    });
}

const STEP: u64 = Draw::STEP;

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
        let mut filled = vec![0; n];
        fill(&mut filled, &random, Random::next);
        assert_eq!(filled, expected);
    }

    #[test]
    fn any_part_can_be_drawn_by_itself() {
        let draw = Draw { state: 5, scale: 0.3 };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let tensor = |shape| HostTensor::drawn(dtype, shape, draw);
            let all = tensor(vec![7, 11]);
            let part = all.read(30..41).into_owned();
            assert_eq!(part, all.bytes()[30 * dtype.size()..41 * dtype.size()]);
            assert_eq!(part, *all.read(30..41), "from what was drawn");
            let mut values = [0.0; 11];
            tensor(vec![7, 11]).read_f32(30, &mut values);
            assert_eq!(values, all.to_f32()[30..41]);
            let after = HostTensor::drawn(dtype, vec![47], draw.skip(30));
            assert_eq!(*after.to_f32(), all.to_f32()[30..]);
        }
    }

    #[test]
    fn a_parameter_takes_no_memory_until_it_is_read() {
        let config = Config::preset("jamba-1.5-large").unwrap();
        let source = RandomParams { seed: 1, dtype: Dtype::F32 };
        let (mut parts, mut elements) = (Vec::new(), 0);
        Weights::layout(&config).for_each(|spec| {
            if !matches!(spec.role, Role::Vector | Role::Conv | Role::A) {
                elements += spec.elements();
                parts.extend(source.param(spec).unwrap().parts);
            }
        });
        let len = |part: &HostTensor| part.shape().iter().product::<usize>();
        let drawn = parts.iter().all(|p| p.read(len(p) - 9..len(p)).iter().any(|b| *b != 0));
        assert!(drawn && elements > 398_000_000_000, "{elements}");
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
