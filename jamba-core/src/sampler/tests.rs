use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand_chacha::rand_core::RngCore;

use super::choice::exp;
use super::*;

const OFF: f32 = f32::NEG_INFINITY;

/// The worked example: the expected numbers below are those of transformers 5.17's processors.
const LOGITS: [f32; 8] = [2.0, -1.0, 0.5, 3.0, 0.0, 1.5, -2.0, 2.5];

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(sampling, LOGITS.len()).unwrap()
}

/// Bias and penalties, as for the next token.
fn score(sampler: &mut Sampler) {
    let mut work = std::mem::take(&mut sampler.work);
    work.score(&sampler.choice(), &LOGITS);
    sampler.work = work;
}

/// Shares of 20,000 draws, each by a sampler of its own seed that saw `prompt`.
fn shares(sampling: &Sampling, prompt: &[u32]) -> [f64; 8] {
    let mut shares = [0.0; 8];
    for seed in 0..20_000 {
        let mut sampler = sampler(Sampling { seed, ..sampling.clone() });
        sampler.observe_prompt(prompt);
        shares[sampler.sample(&LOGITS).unwrap().id as usize] += 1.0 / 20_000.0;
    }
    shares
}

/// Equal within four standard deviations; a share of 0 exactly.
fn assert_shares(sampling: Sampling, prompt: &[u32], expected: [f64; 8]) {
    for (id, (got, p)) in shares(&sampling, prompt).into_iter().zip(expected).enumerate() {
        let allowed = 4.0 * (p * (1.0 - p) / 20_000.0).sqrt();
        assert!((got - p).abs() <= allowed, "{sampling:?}: token {id}: {got} for {p}");
    }
}

#[test]
fn distribution_of_each_filter() {
    let none = Sampling::default();
    let base = [0.156248, 0.007779, 0.034864, 0.424725, 0.021146, 0.094769, 0.002862, 0.257609];
    assert_shares(none.clone(), &[], base);
    assert_shares(
        Sampling { temperature: 0.5, ..none.clone() },
        &[],
        [0.086609, 0.000215, 0.004312, 0.639959, 0.001586, 0.031862, 2.9e-05, 0.235428],
    );
    let three = [0.186324, 0.0, 0.0, 0.50648, 0.0, 0.0, 0.0, 0.307196];
    assert_shares(Sampling { top_k: 3, ..none.clone() }, &[], three);
    assert_shares(Sampling { top_p: 0.8, ..none.clone() }, &[], three);
    assert_shares(
        Sampling { min_p: 0.2, ..none.clone() },
        &[],
        [0.167405, 0.0, 0.0, 0.455054, 0.0, 0.101536, 0.0, 0.276004],
    );
    // Forbidding a token renormalises the others.
    let without_3 = base.map(|p| p / (1.0 - base[3]));
    let without_3 = [&without_3[..3], &[0.0], &without_3[4..]].concat().try_into().unwrap();
    assert_shares(Sampling { logit_bias: vec![(3, OFF)], ..none }, &[], without_3);
}

#[test]
fn filters_in_order() {
    let sampling = Sampling {
        repetition_penalty: 1.3,
        temperature: 0.7,
        top_k: 5,
        top_p: 0.8,
        ..Sampling::default()
    };
    let prompt = [1, 3, 3, 6];
    let expected = [0.21764, 0.0, 0.0, 0.337782, 0.0, 0.0, 0.0, 0.444578];
    assert_shares(sampling.clone(), &prompt, expected);
    let two = [0.0, 0.0, 0.0, 0.431744, 0.0, 0.0, 0.0, 0.568256];
    assert_shares(Sampling { min_p: 0.55, ..sampling }, &prompt, two);
}

#[test]
fn a_draw_is_the_inverse_of_the_cumulative_distribution() {
    // Keystream of ChaCha8 with a zero key (draft-strombergson-chacha-test-vectors, TC1).
    let mut rng = ChaCha8Rng::from_seed([0; 32]);
    assert_eq!(
        rng.clone().next_u64(),
        u64::from_le_bytes([0x3e, 0, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6])
    );

    // No filter: in the order of ids. top_k: in the order of probability.
    let by_id: [(u32, f64); 8] = [
        (0, 0.156248),
        (1, 0.007779),
        (2, 0.034864),
        (3, 0.424725),
        (4, 0.021146),
        (5, 0.094769),
        (6, 0.002862),
        (7, 0.257609),
    ];
    let by_rank = [(3, 0.50648), (7, 0.307196), (0, 0.186324)];
    let expected = |table: &[(u32, f64)], u: f64| {
        let mut sum = 0.0;
        let passes = |(_, p): &&(u32, f64)| {
            sum += p;
            sum > u
        };
        table.iter().find(passes).unwrap().0
    };
    let mut all = sampler(Sampling::default());
    let mut three = sampler(Sampling { top_k: 3, ..Sampling::default() });
    for _ in 0..1000 {
        let u = uniform(&mut rng);
        assert_eq!(all.sample(&LOGITS).unwrap().id, expected(&by_id, u));
        assert_eq!(three.sample(&LOGITS).unwrap().id, expected(&by_rank, u));
    }
}

#[test]
fn penalties() {
    let mut s = sampler(Sampling { repetition_penalty: 1.3, ..Sampling::greedy() });
    s.observe_prompt(&[1, 3, 3, 6, 4_000_000]);
    score(&mut s);
    assert_eq!(s.work.scores, [2.0, -1.3, 0.5, 3.0 / 1.3, 0.0, 1.5, -2.6, 2.5]);
    // 2.5 is the largest now, and from then on penalised too.
    let ids: Vec<u32> = (0..4).map(|_| s.sample(&LOGITS).unwrap().id).collect();
    assert_eq!(ids, [7, 3, 3, 3]);
    score(&mut s);
    assert_eq!(s.work.scores, [2.0, -1.3, 0.5, 3.0 / 1.3, 0.0, 1.5, -2.6, 2.5 / 1.3]);

    // Presence once, frequency each time, and the prompt does not count.
    let mut s =
        sampler(Sampling { presence_penalty: 0.25, frequency_penalty: 0.5, ..Sampling::greedy() });
    s.observe_prompt(&[3, 3, 3, 7]);
    let ids: Vec<u32> = (0..4).map(|_| s.sample(&LOGITS).unwrap().id).collect();
    // 3.0; 2.25 < 2.5; 2.25 > 1.75; then 1.75, 1.75 < 2.0.
    assert_eq!(ids, [3, 7, 3, 0]);
    score(&mut s);
    assert_eq!(s.work.scores, [1.25, -1.0, 0.5, 1.75, 0.0, 1.5, -2.0, 1.75]);

    // The bias comes first: the repetition penalty sees the biased logit.
    let mut s = sampler(Sampling {
        logit_bias: vec![(3, -4.0), (0, 1.0), (0, 1.0)],
        repetition_penalty: 2.0,
        ..Sampling::greedy()
    });
    s.observe_prompt(&[0, 3]);
    score(&mut s);
    assert_eq!(s.work.scores, [2.0, -1.0, 0.5, -2.0, 0.0, 1.5, -2.0, 2.5]);
}

#[test]
fn greedy_and_ties() {
    let mut s = sampler(Sampling { top_k: 1, min_p: 1.0, ..Sampling::greedy() });
    assert_eq!(s.sample(&[1.0, 3.0, -0.0, 3.0, 3.0, 0.0, 0.0, 0.0]).unwrap().id, 1);
    // Of equal logits, top_k keeps those with the lowest ids.
    for seed in 0..100 {
        let mut s = sampler(Sampling { top_k: 3, seed, ..Sampling::default() });
        assert!(
            [1, 2, 4].contains(&s.sample(&[0.0, 1.0, 1.0, 0.0, 5.0, 1.0, 1.0, 1.0]).unwrap().id)
        );
        let mut s = sampler(Sampling { top_k: 1, seed, ..Sampling::default() });
        assert_eq!(s.sample(&[-0.0, 0.0, -1.0, 0.0, -0.0, -1.0, -1.0, -1.0]).unwrap().id, 0);
    }
    // One token is always left.
    let strict = Sampling { top_p: 0.0, min_p: 1.0, ..Sampling::default() };
    assert_eq!(sampler(strict).sample(&LOGITS).unwrap().id, 3);
    let cold = Sampling { temperature: f32::MIN_POSITIVE, ..Sampling::default() };
    assert_eq!(sampler(cold).sample(&LOGITS).unwrap().id, 3);
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let expected = [-1.856314, -4.856314, -3.356314, -0.856314, -3.856314, -2.356314];
    for (id, logprob) in expected.into_iter().enumerate() {
        assert!((log_prob(&LOGITS, id as u32) - logprob).abs() < 1e-6);
    }
    let mut s = sampler(Sampling { temperature: 0.1, top_k: 1, ..Sampling::default() });
    assert!((s.sample(&LOGITS).unwrap().logprob - -0.856314).abs() < 1e-6);

    assert_eq!(log_prob(&LOGITS, 8), f32::NEG_INFINITY);
    assert_eq!(log_prob(&[1e30, OFF], 0), 0.0);
    assert_eq!(log_prob(&[0.0, OFF], 1), f32::NEG_INFINITY);
    for logits in [[f32::NAN, 0.0], [0.0, f32::NAN], [f32::INFINITY, 0.0], [OFF, OFF]] {
        assert!(log_prob(&logits, 0).is_nan());
    }
    assert_eq!(log_prob(&[], 0), f32::NEG_INFINITY);
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let worst = (0..=87_000).map(|i| {
        let x = -i as f32 / 1000.0;
        let exact = f64::from(x).exp();
        (f64::from(exp(x)) - exact).abs() / exact
    });
    let worst = worst.fold(0.0, f64::max);
    assert!(worst < 2.0 * 2f64.powi(-23), "{worst:e}");
    assert_eq!([0.0, -87.01, OFF].map(exp), [1.0, 0.0, 0.0]);
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn what_cannot_be_sampled_is_an_error_and_changes_nothing() {
    for sampling in [Sampling::greedy(), Sampling::default()] {
        let mut s = sampler(sampling.clone());
        s.observe_prompt(&[1, 2]);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = LOGITS;
            logits[5] = bad;
            assert!(matches!(s.sample(&logits), Err(Error::NonFinite { position: 2 })));
        }
        assert!(matches!(s.sample(&[OFF; 8]), Err(Error::NonFinite { .. })));
        assert!(matches!(s.sample(&LOGITS[..7]), Err(Error::Shape { got: [1, 7], .. })));
        assert_eq!(s.sample(&LOGITS).unwrap(), sampler(sampling.clone()).sample(&LOGITS).unwrap());

        // What is masked is not drawn; masked and biased together leave nothing.
        let mut masked = [OFF; 8];
        masked[6] = -50.0;
        assert_eq!(s.sample(&masked).unwrap(), Sampled { id: 6, logprob: 0.0 });
        let mut s = sampler(Sampling { logit_bias: vec![(6, OFF)], ..sampling });
        assert!(matches!(s.sample(&masked), Err(Error::Option { option: "logit_bias", .. })));
    }
}

#[test]
fn options_that_make_no_sense() {
    let refused = |sampling: Sampling| match sampling.validate(8) {
        Err(Error::Option { option, .. }) => option,
        other => panic!("{sampling:?}: {other:?}"),
    };
    let d = Sampling::default();
    for bad in [f32::NAN, f32::INFINITY, OFF, -0.1] {
        assert_eq!(refused(Sampling { temperature: bad, ..d.clone() }), "temperature");
        assert_eq!(refused(Sampling { top_p: bad, ..d.clone() }), "top_p");
        assert_eq!(refused(Sampling { min_p: bad, ..d.clone() }), "min_p");
        assert_eq!(
            refused(Sampling { repetition_penalty: bad, ..d.clone() }),
            "repetition_penalty"
        );
    }
    assert_eq!(refused(Sampling { repetition_penalty: 0.0, ..d.clone() }), "repetition_penalty");
    assert_eq!(refused(Sampling { top_p: 1.1, ..d.clone() }), "top_p");
    assert_eq!(refused(Sampling { min_p: 1.1, ..d.clone() }), "min_p");
    for bad in [f32::NAN, f32::INFINITY] {
        assert_eq!(refused(Sampling { presence_penalty: bad, ..d.clone() }), "presence_penalty");
        assert_eq!(refused(Sampling { frequency_penalty: bad, ..d.clone() }), "frequency_penalty");
        assert_eq!(refused(Sampling { logit_bias: vec![(0, bad)], ..d.clone() }), "logit_bias");
    }
    assert_eq!(refused(Sampling { logit_bias: vec![(8, 1.0)], ..d.clone() }), "logit_bias");
    Sampling { top_k: 1000, presence_penalty: -2.0, logit_bias: vec![(7, OFF)], ..d }
        .validate(8)
        .unwrap();
}

#[test]
fn generation_config() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/jamba-tales-11m");
    let expected = Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() };
    assert_eq!(Sampling::from_folder(demo).unwrap(), expected);

    let folder = tempfile::tempdir().unwrap();
    let read = |text: &str| {
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        Sampling::from_folder(folder.path())
    };
    let all = r#"{"do_sample": true, "temperature": 0.5, "top_k": 40, "top_p": 0.75, "min_p": 0.25,
        "repetition_penalty": 1.5, "max_length": 20}"#;
    let expected = Sampling {
        temperature: 0.5,
        top_k: 40,
        top_p: 0.75,
        min_p: 0.25,
        repetition_penalty: 1.5,
        ..Sampling::default()
    };
    assert_eq!(read(all).unwrap(), expected);
    assert_eq!(read(r#"{"top_k": null}"#).unwrap(), Sampling::greedy());
    assert_eq!(read(r#"{"do_sample": false, "temperature": 0.5}"#).unwrap(), Sampling::greedy());
    assert!(matches!(read("{"), Err(Error::Json { .. })));
    assert!(matches!(read(r#"{"top_k": -1}"#), Err(Error::Config { field: "top_k", .. })));
    assert!(matches!(read(r#"{"top_p": 2}"#), Err(Error::Option { option: "top_p", .. })));
    assert_eq!(Sampling::from_folder(folder.path().join("none")).unwrap(), Sampling::greedy());
}

/// Softmax, sort everything, cut: top-p as one would write it first.
fn nucleus(logits: &[f32], top_p: f64) -> Vec<u32> {
    let mut p: Vec<(f64, u32)> =
        (0..logits.len() as u32).map(|id| (f64::from(log_prob(logits, id)).exp(), id)).collect();
    p.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut sum = 0.0;
    let within = p.iter().take_while(|(p, _)| {
        sum += p;
        sum - p < top_p
    });
    within.map(|(_, id)| *id).collect()
}

/// `top_k` of a vocabulary that has blocks, with many equal logits.
fn many_logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec((-20i16..20).prop_map(|v| f32::from(v) / 4.0), 1..2000)
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, rng_seed: RngSeed::Fixed(29), ..ProptestConfig::default()
    })]

    #[test]
    fn top_p_is_the_smallest_set(
        logits in prop::collection::vec(-12.0f32..12.0, 1..300),
        top_p in 0.0f32..0.999,
    ) {
        let mut s = Sampler::new(Sampling { top_p, ..Sampling::default() }, logits.len()).unwrap();
        s.sample(&logits).unwrap();
        let kept: Vec<u32> = s.work.candidates.iter().map(|c| c.id).collect();
        let expected = nucleus(&logits, f64::from(top_p));
        // One more or fewer where the sum meets top_p within rounding.
        let common = kept.len().min(expected.len()).max(1);
        prop_assert!(kept.len().abs_diff(expected.len().max(1)) <= 1);
        prop_assert_eq!(&kept[..common.min(expected.len())], &expected[..common.min(expected.len())]);
    }

    #[test]
    fn top_k_is_the_first_of_all_ranked(logits in many_logits(), top_k in 1usize..60) {
        let mut s = Sampler::new(Sampling { top_k, ..Sampling::default() }, logits.len()).unwrap();
        s.sample(&logits).unwrap();
        let kept: Vec<u32> = s.work.candidates.iter().map(|c| c.id).collect();
        let mut expected: Vec<u32> = (0..logits.len() as u32).collect();
        expected.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        expected.truncate(top_k);
        if top_k >= logits.len() {
            expected.sort_unstable();
        }
        prop_assert_eq!(kept, expected);
    }

    #[test]
    fn any_valid_options_choose_a_possible_token(
        logits in prop::collection::vec(
            prop_oneof![4 => -30.0f32..30.0, 1 => Just(OFF), 1 => Just(f32::MAX), 1 => Just(f32::MIN)],
            1..80,
        ),
        (temperature, top_k, top_p, min_p) in (0.0f32..2.0, 0usize..90, 0.0f32..=1.0, 0.0f32..=1.0),
        (repetition_penalty, presence_penalty, frequency_penalty) in
            (prop_oneof![1e-38f32..2.0, Just(3e38f32)], -3e38f32..3e38, -3e38f32..3e38),
        (bias, seed) in (prop_oneof![-9.0f32..9.0, Just(f32::MAX), Just(OFF)], any::<u64>()),
    ) {
        let sampling = Sampling {
            logit_bias: vec![(0, bias), (0, bias)],
            repetition_penalty, presence_penalty, frequency_penalty,
            temperature, top_k, top_p, min_p, seed,
        };
        let mut s = Sampler::new(sampling.clone(), logits.len()).unwrap();
        let mut again = Sampler::new(sampling, logits.len()).unwrap();
        s.observe_prompt(&[0, 1, 2]);
        again.observe_prompt(&[0, 1, 2]);
        for _ in 0..8 {
            match s.sample(&logits) {
                Ok(sampled) => {
                    prop_assert!(logits[sampled.id as usize] > OFF);
                    prop_assert!(sampled.logprob <= 0.0);
                    prop_assert!(s.work.scores.iter().all(|v| *v < f32::INFINITY));
                    prop_assert_eq!(again.sample(&logits).unwrap(), sampled);
                }
                Err(Error::NonFinite { .. }) => prop_assert!(logits.iter().all(|v| *v == OFF)),
                Err(Error::Option { option: "logit_bias", .. }) => {
                    prop_assert!(bias == OFF && logits[1..].iter().all(|v| *v == OFF));
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_choice_that_is_made_elsewhere_is_the_same() {
    let bias = vec![(5, 0.5), (2, 1.0), (5, 0.25)];
    let penalised =
        Sampling { repetition_penalty: 1.2, frequency_penalty: 0.3, ..Sampling::default() };
    let all = [
        Sampling::greedy(),
        Sampling { top_k: 4, top_p: 0.9, logit_bias: bias, ..Sampling::default() },
        Sampling { min_p: 0.1, seed: 7, ..penalised },
    ];
    for sampling in all {
        let (mut here, mut elsewhere) = (sampler(sampling.clone()), sampler(sampling));
        here.observe_prompt(&[1, 2]);
        elsewhere.observe_prompt(&[1, 2]);
        for _ in 0..50 {
            let expected = here.sample(&LOGITS).unwrap();
            // A choice that is not told has no effect, nor one that fails.
            assert!(elsewhere.sample(&[f32::NAN; 8]).is_err());
            elsewhere.choice().sample(&LOGITS).unwrap();
            let chosen = elsewhere.choice().sample(&LOGITS).unwrap();
            elsewhere.observe(chosen.id);
            assert_eq!(chosen, expected);
        }
    }
    let greedy = sampler(Sampling::greedy());
    let choice = greedy.choice();
    assert_eq!((choice.known.len(), choice.bias.len(), choice.uniform), (0, 0, 0.0));
}
