//! Two tensors side by side.

use std::fmt;

use jamba_core::recording::{Recorded, Recording};

use crate::tolerance::Tolerance;

/// How far one tensor is from another.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Name of the tensor.
    pub name: String,
    /// Largest `|got - expected|`, as a share of the largest `|expected|`.
    pub element: f64,
    /// Root mean square of `got - expected`, as a share of that of `expected`.
    pub rms: f64,
    /// Index of the element that is farthest off.
    pub worst: usize,
    /// What keeps the two from being compared at all, if anything.
    pub fault: Option<String>,
}

impl Difference {
    /// Compares element by element.
    pub fn new(name: &str, got: &Recorded, expected: &Recorded) -> Self {
        let mut difference =
            Self { name: name.into(), element: 0.0, rms: 0.0, worst: 0, fault: None };
        if got.shape != expected.shape {
            let fault = format!("shape {:?} instead of {:?}", got.shape, expected.shape);
            return Self { fault: Some(fault), ..difference };
        }
        for (what, values) in [("element", &got.values), ("expected element", &expected.values)] {
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                let fault = format!("{what} {i} is {}", values[i]);
                return Self { fault: Some(fault), worst: i, ..difference };
            }
        }
        let (mut largest, mut square, mut error_square) = (0f64, 0f64, 0f64);
        let mut worst = 0f64;
        for (i, (&got, &expected)) in got.values.iter().zip(&expected.values).enumerate() {
            let (expected, error) = (f64::from(expected), f64::from(got) - f64::from(expected));
            largest = largest.max(expected.abs());
            square += expected * expected;
            error_square += error * error;
            if error.abs() > worst {
                worst = error.abs();
                difference.worst = i;
            }
        }
        difference.element = share(worst, largest);
        difference.rms = share(error_square.sqrt(), square.sqrt());
        difference
    }

    /// A tensor that is not there.
    pub fn missing(name: &str) -> Self {
        let fault = Some("missing".into());
        Self { name: name.into(), element: 0.0, rms: 0.0, worst: 0, fault }
    }

    /// Whether it is within the tolerance.
    pub fn within(&self, tolerance: &Tolerance) -> bool {
        self.fault.is_none() && self.element <= tolerance.element && self.rms <= tolerance.rms
    }
}

fn share(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            Some(fault) => write!(f, "{:32} {fault}", self.name),
            None => write!(
                f,
                "{:32} element {:.2e} (at {}), rms {:.2e}",
                self.name, self.element, self.worst, self.rms
            ),
        }
    }
}

/// As [`differences`], and no tensor in `got` that is not in `expected`.
pub fn all_differences(got: &Recording, expected: &Recording) -> Vec<Difference> {
    let unexpected = got.tensors.keys().filter(|name| !expected.tensors.contains_key(*name));
    let unexpected = unexpected
        .map(|name| Difference { fault: Some("not expected".into()), ..Difference::missing(name) });
    differences(got, expected).into_iter().chain(unexpected).collect()
}

/// Whether both have the same tensors, bit by bit.
pub fn bit_equal(got: &Recording, expected: &Recording) -> bool {
    let bits = |t: &Recorded| t.values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    got.tensors.len() == expected.tensors.len()
        && got.tensors.iter().zip(&expected.tensors).all(|((a, got), (b, expected))| {
            a == b && got.shape == expected.shape && bits(got) == bits(expected)
        })
}

/// Every tensor of `expected` against the one of the same name in `got`.
pub fn differences(got: &Recording, expected: &Recording) -> Vec<Difference> {
    expected
        .tensors
        .iter()
        .map(|(name, expected)| match got.tensors.get(name) {
            Some(got) => Difference::new(name, got, expected),
            None => Difference::missing(name),
        })
        .collect()
}
