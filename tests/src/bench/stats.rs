//! Figures of several runs: median, spread, ratio. Pure.

use serde::{Deserialize, Serialize};

/// What several runs gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All, in the order in which they were taken.
    pub runs: Vec<f64>,
}

impl Summary {
    /// Of these runs; none if there are none, or one is not a number.
    pub fn of(runs: Vec<f64>) -> Option<Self> {
        if runs.iter().any(|run| !run.is_finite()) {
            return None;
        }
        let mut sorted = runs.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Self { median, min, max, runs })
    }
}

/// Which way a figure is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// `mesh` in units of `plain`, by their medians; none where `plain` is 0 or missing.
pub fn ratio(plain: Option<&Summary>, mesh: Option<&Summary>) -> Option<f64> {
    let (plain, mesh) = (plain?.median, mesh?.median);
    (plain != 0.0).then(|| mesh / plain)
}

/// How much `now` differs from `earlier`, as a share of `earlier`: 0.1 is a tenth more. None where `earlier` is 0 and
/// `now` is not.
pub fn change(earlier: f64, now: f64) -> Option<f64> {
    if earlier == now {
        return Some(0.0);
    }
    (earlier != 0.0).then(|| (now - earlier) / earlier.abs())
}

/// Whether `now` is worse than `earlier` by more than the share `tolerance`.
pub fn worse(better: Better, earlier: f64, now: f64, tolerance: f64) -> bool {
    match better {
        Better::Higher => now < earlier * (1.0 - tolerance),
        Better::Lower => now > earlier * (1.0 + tolerance),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers_of_runs() {
        let odd = Summary::of(vec![5.0, 1.0, 9.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (5.0, 1.0, 9.0));
        assert_eq!(odd.runs, [5.0, 1.0, 9.0], "in the order taken");
        assert_eq!(Summary::of(vec![4.0, 1.0, 2.0, 100.0]).unwrap().median, 3.0);
        assert_eq!(Summary::of(vec![7.0]).unwrap().median, 7.0);
        assert_eq!(Summary::of(vec![]), None);
        assert_eq!(Summary::of(vec![1.0, f64::NAN]), None);
    }

    #[test]
    fn ratios_need_both_sides() {
        let of = |value| Summary::of(vec![value]);
        assert_eq!(ratio(of(4.0).as_ref(), of(1.0).as_ref()), Some(0.25));
        assert_eq!(ratio(of(0.0).as_ref(), of(1.0).as_ref()), None);
        assert_eq!(ratio(None, of(1.0).as_ref()), None);
    }

    #[test]
    fn changes_are_shares_of_what_was() {
        assert_eq!(change(2.0, 3.0), Some(0.5));
        assert_eq!(change(-2.0, -3.0), Some(-0.5));
        assert_eq!(change(0.0, 0.0), Some(0.0));
        assert_eq!(change(0.0, 1.0), None);
    }

    #[test]
    fn worse_goes_by_the_figures_direction_and_the_tolerance() {
        assert!(worse(Better::Higher, 0.5, 0.44, 0.1));
        assert!(!worse(Better::Higher, 0.5, 0.46, 0.1));
        assert!(!worse(Better::Higher, 0.5, 0.9, 0.1));
        assert!(worse(Better::Lower, 2.0, 2.3, 0.1));
        assert!(!worse(Better::Lower, 2.0, 2.1, 0.1));
        assert!(!worse(Better::Lower, 2.0, 1.0, 0.0));
        assert!(!worse(Better::Lower, 2.0, 2.0, 0.0));
    }
}
