//! One run of a case as one line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::conformance::Case;
use crate::problem::AnyProblem;

/// What one run of a case of `problem`, `fused` or `law` is of: displayed as one line of JSON,
/// parsed from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Instance {
    /// A law on a problem.
    Law {
        /// Name of the law.
        law: String,
        /// Decides where prompts are cut and the like.
        plan: u32,
        /// What it is tried on.
        problem: AnyProblem,
    },
    /// A problem, against the oracle or against its composition.
    Problem(AnyProblem),
}

impl Instance {
    /// The problem.
    pub fn problem(&self) -> &AnyProblem {
        match self {
            Self::Law { problem, .. } | Self::Problem(problem) => problem,
        }
    }

    pub(super) fn belongs_to(&self, case: &Case) -> bool {
        match self {
            Self::Law { law, .. } => case.group == "law" && case.name == *law,
            Self::Problem(problem) => {
                ["problem", "fused"].contains(&case.group) && case.name == problem.name()
            }
        }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Instance {
    type Err = serde_json::Error;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let instance: Self = serde_json::from_str(line)?;
        instance.problem().check().map_err(serde::de::Error::custom)?;
        Ok(instance)
    }
}
