//! What a backend says of itself.

use std::sync::Arc;

use crate::conformance::Instance;
use crate::precision::{Format, Numbers, Precision};

/// What numbers a backend holds, and what it does not do and why. By default: activations in f32,
/// weights as they are stored, everything supported. Whether laws are held to the bit is said by
/// [`Backend::is_chunk_invariant`](jamba_core::Backend::is_chunk_invariant).
///
/// ```
/// use jamba_tests::{Format, Precision, Support};
///
/// let support = Support::default()
///     .precision(Precision::Bf16)
///     .weights(&[Format::Bf16])
///     .without("problem::attention", "no kernel yet");
/// # let _ = support;
/// ```
#[derive(Clone)]
pub struct Support {
    pub(super) numbers: Numbers,
    without: Vec<(String, String)>,
    except: Vec<Except>,
    pub(super) regressions: Vec<String>,
    pub(super) seed: u64,
    pub(super) cases: Option<u32>,
    pub(super) shrink: u32,
}

#[derive(Clone)]
struct Except {
    case: String,
    reason: String,
    refused: Arc<dyn Fn(&Instance) -> bool + Send + Sync>,
}

impl Default for Support {
    fn default() -> Self {
        let lines = include_str!("../../regressions.txt").lines();
        let lines = lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self {
            numbers: Precision::F32.into(),
            without: Vec::new(),
            except: Vec::new(),
            regressions: lines.map(str::to_owned).collect(),
            seed: 0x6a61_6d62_6131,
            cases: None,
            shrink: 200,
        }
    }
}

impl Support {
    /// The precision in which the backend keeps activations; it decides the tolerances.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.numbers.precision = precision;
        self
    }

    /// The formats in which the backend keeps matrices as they are: those that the weights of
    /// problems have. The first of them decides what `golden` cases are compared with, transformers
    /// or the oracle on dequantised weights, and their tolerance.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn weights(mut self, formats: &[Format]) -> Self {
        assert!(!formats.is_empty(), "weights have some format");
        self.numbers.formats = formats.to_vec();
        self
    }

    /// Says that a case is not supported. The case still runs, and passes only if the backend
    /// refuses all of it with [`Error::Unsupported`](jamba_core::Error::Unsupported).
    #[must_use]
    pub fn without(mut self, case: &str, reason: &str) -> Self {
        self.without.push((case.into(), reason.into()));
        self
    }

    /// Says that some problems of a case are not supported: those for which `refused` is true
    /// must be refused with [`Error::Unsupported`](jamba_core::Error::Unsupported), and only
    /// those. For cases of `problem`, `fused` and `law`.
    #[must_use]
    pub fn except(
        mut self,
        case: &str,
        reason: &str,
        refused: impl Fn(&Instance) -> bool + Send + Sync + 'static,
    ) -> Self {
        let (case, reason) = (case.into(), reason.into());
        self.except.push(Except { case, reason, refused: Arc::new(refused) });
        self
    }

    /// Adds lines, each an [`Instance`], that are run before all others: those that failed once.
    #[must_use]
    pub fn regressions(mut self, lines: &str) -> Self {
        self.regressions.extend(lines.lines().map(str::to_owned));
        self
    }

    /// Another seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How many problems a case tries, as `PROPTEST_CASES` says where it is set.
    #[must_use]
    pub fn cases(mut self, cases: u32) -> Self {
        self.cases = Some(cases);
        self
    }

    /// How many smaller problems are tried once one fails.
    #[must_use]
    pub fn shrink(mut self, tries: u32) -> Self {
        self.shrink = tries;
        self
    }

    pub(super) fn refused(&self) -> impl Iterator<Item = (&str, &str)> {
        self.without.iter().map(|(case, reason)| (&**case, &**reason))
    }

    pub(super) fn excepted(&self) -> impl Iterator<Item = (&str, &str)> {
        self.except.iter().map(|e| (&*e.case, &*e.reason))
    }

    /// The reason why a problem of a case is refused.
    pub(super) fn refusal(&self, case: &str, instance: &Instance) -> Option<&str> {
        let of = |e: &&Except| e.case == case && (e.refused)(instance);
        self.except.iter().find(of).map(|e| &*e.reason)
    }
}
