//! Running a case.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use jamba_core::recording::Recording;
use jamba_core::trace::Detail;
use jamba_core::weights::ParamSpec;
use jamba_core::{
    Backend, Checkpoint, Error, HostTensor, LanguageModel, Layout, Model, Param, ParamSource,
    Quantized, SessionOptions, WeightFormat,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::instance::Instance;
use super::{Case, Failure, Passed, Support, cases};
use crate::compare::{Difference, all_differences, bit_equal, differences};
use crate::golden::Golden;
use crate::laws::{self, Law, Relation};
use crate::lockstep::models;
use crate::misfit;
use crate::oracle::OracleBackend;
use crate::precision::{Format, Numbers};
use crate::problem::{AnyProblem, BLOCKS};
use crate::random::Random;
use crate::tolerance::{Tolerance, tolerance};

/// Problems that a case tries unless told otherwise.
const CASES: u32 = 256;

/// Chunk lengths of golden prompts: single tokens, odd ones, a power of two, the whole prompt.
const CHUNKS: [usize; 5] = [1, 3, 7, 16, usize::MAX];

/// Why a run did not pass.
enum Trouble {
    /// The backend reported it.
    Backend(Error),
    /// The result is wrong.
    Wrong(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Backend(error)
    }
}

type Outcome = Result<(), Trouble>;

pub(super) fn check<B: Backend + Send + Sync + 'static>(
    case: &Case,
    backend: B,
    support: &Support,
) -> Result<Passed, Failure> {
    let check = Check { case, backend: Arc::new(backend), support };
    match case.group {
        "shape" => check.shape(),
        "lockstep" => check.runs(&support.numbers.formats, |format| check.lockstep(*format)),
        "golden" => check.runs(&CHUNKS[..], |chunk| check.golden(*chunk)),
        _ => check.instances(),
    }
}

struct Check<'a, B> {
    case: &'a Case,
    /// Models are made of it, one after the other.
    backend: Arc<B>,
    support: &'a Support,
}

impl<B: Backend + Send + Sync + 'static> Check<'_, B> {
    fn refused(&self) -> Option<&str> {
        let case = self.case.to_string();
        self.support.refused().find(|(name, _)| *name == case).map(|(_, reason)| reason)
    }

    /// Counts an outcome as passed, refused as declared, or failed.
    fn judge(
        &self,
        outcome: Outcome,
        refused: Option<&str>,
        passed: &mut Passed,
    ) -> Result<(), String> {
        match (outcome, refused) {
            (Ok(()), None) => passed.executed += 1,
            (Err(Trouble::Backend(Error::Unsupported { .. })), Some(_)) => passed.unsupported += 1,
            (Ok(()), Some(reason)) => {
                return Err(format!("declared as not supported ({reason}), yet it passes"));
            }
            (Err(Trouble::Backend(error)), None) => return Err(format!("error: {error}")),
            (Err(Trouble::Backend(error)), Some(reason)) => {
                return Err(format!(
                    "declared as not supported ({reason}): Error::Unsupported is due, not: {error}"
                ));
            }
            (Err(Trouble::Wrong(text)), None) => return Err(text),
            (Err(Trouble::Wrong(text)), Some(reason)) => {
                return Err(format!(
                    "declared as not supported ({reason}), yet it runs, and wrongly:\n{text}"
                ));
            }
        }
        Ok(())
    }

    /// All of a few runs; failures of all of them are reported.
    fn runs<T>(&self, all: &[T], run: impl Fn(&T) -> Outcome) -> Result<Passed, Failure> {
        let (mut passed, mut failures) = (Passed::default(), Vec::new());
        for one in all {
            failures.extend(self.judge(guard(|| run(one)), self.refused(), &mut passed).err());
        }
        if failures.is_empty() {
            assert_eq!(passed.executed + passed.unsupported, all.len(), "nothing is skipped");
            return Ok(passed);
        }
        Err(Failure(format!("{} fails:\n{}", self.title(), failures.join("\n"))))
    }

    /// All operands that do not fit; failures of all of them are reported.
    fn shape(&self) -> Result<Passed, Failure> {
        let mut passed = Passed::default();
        let outcome = guard(|| {
            let found = misfit::run(&self.case.name, &*self.backend)?;
            assert!(found.tried > 0, "nothing is skipped");
            // Counted as one by `judge`.
            passed.executed = found.tried - 1;
            match found.wrong.is_empty() {
                true => Ok(()),
                false => Err(Trouble::Wrong(format!("  {}", found.wrong.join("\n  ")))),
            }
        });
        match self.judge(outcome, self.refused(), &mut passed) {
            Ok(()) => Ok(passed),
            Err(text) => Err(Failure(format!("{} fails:\n{text}", self.title()))),
        }
    }

    fn title(&self) -> String {
        format!("{} of the {} backend", self.case, self.backend.name())
    }

    /// The regressions, then as many random problems as are due.
    fn instances(&self) -> Result<Passed, Failure> {
        let passed = RefCell::new(Passed::default());
        let run = |instance: &Instance| -> Result<(), String> {
            let case = self.case.to_string();
            let refused = self.refused().or_else(|| self.support.refusal(&case, instance));
            let outcome = guard(|| self.instance(instance));
            self.judge(outcome, refused, &mut passed.borrow_mut())
        };
        let failed = |instance: &Instance, text: &str, origin: &str| {
            Failure(format!(
                "{} fails:\n{text}\nreplay:     JAMBA_CASE='{instance}' cargo test {}\n\
                 origin:     {origin}\nregression: add the line in quotes to regressions.txt, \
                 or to Support::regressions",
                self.title(),
                self.case,
            ))
        };
        if let Ok(line) = std::env::var("JAMBA_CASE") {
            let instance: Instance =
                line.parse().map_err(|error| Failure(format!("JAMBA_CASE: {error}: {line}")))?;
            if !instance.belongs_to(self.case) {
                // `cargo test problem::linear` asks for `problem::linear_x` too.
                let asked = |case: &Case| instance.belongs_to(case);
                let is_by_name = |case: Case| self.case.to_string().contains(&case.to_string());
                if cases().into_iter().find(asked).is_some_and(is_by_name) {
                    println!("{} not run: JAMBA_CASE is of another case", self.case);
                    return Ok(Passed::default());
                }
                return Err(Failure(format!("JAMBA_CASE is not of {}: {line}", self.case)));
            }
            run(&instance).map_err(|text| failed(&instance, &text, "JAMBA_CASE"))?;
            return Ok(passed.into_inner());
        }
        let mut due = 0;
        for line in &self.support.regressions {
            let instance: Instance =
                line.parse().map_err(|error| Failure(format!("regression: {error}: {line}")))?;
            if instance.belongs_to(self.case) {
                due += 1;
                run(&instance).map_err(|text| failed(&instance, &text, "a regression"))?;
            }
        }
        let seed = self.support.seed;
        for (what, strategy, cases) in self.strategies() {
            due += cases as usize;
            let config = Config {
                cases,
                max_shrink_iters: self.support.shrink,
                failure_persistence: None,
                ..Config::default()
            };
            let mut random = Random::new(seed, &format!("{}/{what}", self.case));
            let bytes: Vec<u8> = (0..32).map(|_| random.below(256) as u8).collect();
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
            let count = Cell::new(0);
            let tried = TestRunner::new_with_rng(config, rng).run(&strategy, |instance| {
                count.set(count.get() + 1);
                run(&instance).map_err(TestCaseError::fail)
            });
            match tried {
                Ok(()) => {}
                Err(TestError::Fail(_, instance)) => {
                    let text = run(&instance).err().unwrap_or_else(|| "not every time".into());
                    let origin =
                        format!("seed {seed:#x}, {what}, found within {} tries", count.get());
                    return Err(failed(&instance, &text, &origin));
                }
                Err(TestError::Abort(reason)) => return Err(Failure(reason.to_string())),
            }
        }
        let passed = passed.into_inner();
        assert_eq!(passed.executed + passed.unsupported, due, "nothing is skipped");
        println!("{}: seed {seed:#x}", self.case);
        Ok(passed)
    }

    /// What is to be tried: problems by name, and how many of each.
    fn strategies(&self) -> Vec<(String, BoxedStrategy<Instance>, u32)> {
        let asked = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
        let cases = asked.or(self.support.cases).unwrap_or(CASES).max(1);
        let of = |name: &str| {
            AnyProblem::strategy_of(name, &self.support.numbers).expect("a problem of this name")
        };
        let name = self.case.name.clone();
        if self.case.group == "law" {
            let law = Law::ALL.iter().find(|(law, _)| **law == name).expect("one of them").1;
            let target = |target: &&'static str| {
                let law = name.clone();
                let strategy = (of(target), any::<u32>()).prop_map(move |(problem, plan)| {
                    Instance::Law { law: law.clone(), plan, problem }
                });
                (target.to_string(), strategy.boxed(), cases.div_ceil(6))
            };
            return law.targets().iter().map(target).collect();
        }
        // A block costs as much as ten operators.
        let share = match (self.case.group, BLOCKS.contains(&&*name)) {
            ("problem", false) => 1,
            ("problem", true) => 2,
            _ => 6,
        };
        let strategy = of(&name).prop_map(Instance::Problem).boxed();
        vec![(name, strategy, cases.div_ceil(share))]
    }

    fn instance(&self, instance: &Instance) -> Outcome {
        let (b, format) = (&self.backend, instance.problem().format());
        match instance {
            Instance::Problem(problem) if self.case.group == "fused" => {
                let (got, expected) = (problem.run(&**b)?, problem.run_composed(&**b)?);
                self.close(&got, &expected, ("fused", format), "against its composition")
            }
            Instance::Problem(problem) => {
                let got = problem.run(&**b)?;
                let expected = problem.run(&OracleBackend)?;
                self.close(&got, &expected, (problem.name(), format), "against the oracle")
            }
            Instance::Law { law, plan, problem } => {
                let law = Law::ALL.iter().find(|(name, _)| name == law);
                let law = law.ok_or_else(|| Trouble::Wrong("there is no such law".into()))?.1;
                self.law(laws::run(law, problem, *plan, &**b)?, format)
            }
        }
    }

    fn law(&self, comparisons: Vec<laws::Comparison>, format: Format) -> Outcome {
        let claimed = self.backend.is_chunk_invariant();
        for laws::Comparison { what, got, expected, relation } in comparisons {
            let exact = relation == Relation::Bits || (relation == Relation::Same && claimed);
            match relation {
                Relation::Different if bit_equal(&got, &expected) => {
                    return Err(Trouble::Wrong(format!(
                        "{what}: it should be another, and is not"
                    )));
                }
                Relation::Different => {}
                Relation::Broken => return Err(Trouble::Wrong(what.into())),
                _ if exact && bit_equal(&got, &expected) => {}
                _ if exact => {
                    let off = all_differences(&got, &expected).into_iter();
                    let off = off.filter(|d| d.element > 0.0 || d.fault.is_some());
                    let off: String = off.map(|d| format!("  {d}\n")).collect();
                    return Err(Trouble::Wrong(format!("{what}: not the same bits\n{off}")));
                }
                _ => self.close(&got, &expected, ("law", format), what)?,
            }
        }
        Ok(())
    }

    fn close(
        &self,
        got: &Recording,
        expected: &Recording,
        (row, format): (&str, Format),
        what: &str,
    ) -> Outcome {
        let tolerance = tolerance(row, self.support.numbers.precision, format);
        off(&all_differences(got, expected), (row, tolerance), what)
    }

    fn lockstep(&self, format: Format) -> Outcome {
        let model = models::named(&self.case.name, format, self.support.numbers.precision);
        let tolerance = tolerance("lockstep", self.support.numbers.precision, format);
        let report = model.run(self.backend.clone())?;
        let all = report.steps.iter().flat_map(|step| &step.errors);
        all.for_each(|e| measured("lockstep", e.largest, e.rms));
        let beyond = report.beyond(tolerance);
        if beyond.is_empty() {
            return Ok(());
        }
        let mut text = format!("against the oracle, weights in {format}, {}\n", bounds(tolerance));
        for (step, e) in beyond {
            let fault = e.fault.as_ref().map(|f| format!(": {f}")).unwrap_or_default();
            text += &format!(
                "  {} ({}) {:8} element {:.2e}, rms {:.2e}{fault}\n",
                step.name, step.kind, e.tensor, e.largest, e.rms
            );
        }
        Err(Trouble::Wrong(format!("{text}\n{report}")))
    }

    fn golden(&self, chunk: usize) -> Outcome {
        let golden = Golden::load(&self.case.name.replace('_', "-"));
        assert!(golden.expected.tensors.len() > 30, "too few golden tensors");
        let model = Model::load(&golden.folder, self.backend.clone())?;
        let tokens = golden.input_ids.len() + golden.decode_ids.len();
        let options = SessionOptions { context: tokens, chunk: tokens, outputs: tokens };
        let mut session = model.session(options)?;
        let (prompt, decode) = (&golden.input_ids, &golden.decode_ids);
        // Another prompt first: what it leaves must not be seen.
        session.append(decode)?;
        let recording = Recording::new(&mut session, prompt, chunk, decode, Detail::Operators)?;
        let chunk = chunk.min(prompt.len());
        let Numbers { precision, formats } = &self.support.numbers;
        let tolerance = tolerance("golden", *precision, formats[0]);
        let (expected, whose) = match formats[0].weight_format() {
            WeightFormat::Stored => (golden.expected, "transformers"),
            format => {
                let checkpoint = Dequantised(Checkpoint::open(&golden.folder)?, format);
                let config = model.config().clone();
                let mut oracle =
                    Model::new(config, &checkpoint, OracleBackend)?.session(options)?;
                let detail = Detail::Operators;
                let expected = Recording::new(&mut oracle, prompt, chunk, decode, detail)?;
                (expected, "the oracle on dequantised weights")
            }
        };
        let what = format!("against {whose}, prompt in chunks of {chunk}");
        off(&differences(&recording, &expected), ("golden", tolerance), &what)
    }
}

/// A checkpoint with the values that its weights have in a format.
struct Dequantised(Checkpoint, WeightFormat);

impl ParamSource for Dequantised {
    fn param(&self, spec: &ParamSpec) -> jamba_core::Result<Param> {
        let param = self.0.param(spec)?;
        let Layout::Packed(packing) = self.1.layout(spec.role) else { return Ok(param) };
        let values = Quantized::new(&param, packing)?.dequantize();
        Ok(Param::new(param.name, param.role, HostTensor::from_f32(param.shape, values)))
    }
}

fn bounds(tolerance: &Tolerance) -> String {
    let Tolerance { element, rms, reason } = tolerance;
    format!("tolerance: element {element:.1e}, rms {rms:.1e} ({reason})")
}

/// All that is beyond the tolerance, at once.
fn off(differences: &[Difference], (row, tolerance): (&str, &Tolerance), what: &str) -> Outcome {
    let off = differences.iter().filter(|d| !d.within(tolerance));
    let lines: String = off.map(|d| format!("  {d}\n")).collect();
    let largest = |f: fn(&Difference) -> f64| differences.iter().map(f).fold(0.0, f64::max);
    measured(row, largest(|d| d.element), largest(|d| d.rms));
    if lines.is_empty() {
        return Ok(());
    }
    Err(Trouble::Wrong(format!("{what}, {}\n{lines}", bounds(tolerance))))
}

/// With `JAMBA_MEASURE` set, prints what the bounds of the table are chosen by.
fn measured(row: &str, element: f64, rms: f64) {
    if std::env::var_os("JAMBA_MEASURE").is_some() {
        println!("measured {row} {element:.2e} {rms:.2e}");
    }
}

/// Runs `f`; a panic of the backend is a wrong result.
fn guard(f: impl FnOnce() -> Outcome) -> Outcome {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Trouble::Wrong(format!("it panics: {}", text.unwrap_or("without a message"))))
    })
}
