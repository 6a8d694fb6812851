//! A mistake in an object, as its author needs to see it.

use std::fmt;

use serde::Serialize;

/// One mistake: where it is, what is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Problem {
    /// Path of the field in the object, such as `spec.ports[0].targetPort`; empty when the whole object is meant.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What makes it right.
    pub fix: String,
}

impl Problem {
    /// A problem at `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into(), fix: fix.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        if !self.fix.is_empty() {
            write!(f, "; {}", self.fix)?;
        }
        Ok(())
    }
}

/// Collects the mistakes of one object, so that its author sees them all at once. Bounded: an object made of nothing
/// but mistakes does not fill the log.
#[derive(Debug, Default)]
pub struct Problems {
    list: Vec<Problem>,
    omitted: usize,
}

/// Mistakes reported for one object; further ones are only counted.
const MAX_PROBLEMS: usize = 20;

impl Problems {
    /// Notes a mistake.
    pub fn add(&mut self, field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) {
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(Problem::new(field, message, fix));
        } else {
            self.omitted += 1;
        }
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The validated value if nothing was noted, else the list.
    ///
    /// # Errors
    /// The mistakes, in the order in which they were found.
    pub fn finish<T>(self, value: T) -> Result<T, Vec<Problem>> {
        if self.list.is_empty() { Ok(value) } else { Err(self.into_list()) }
    }

    /// The mistakes, in the order in which they were found.
    pub fn into_list(self) -> Vec<Problem> {
        let mut list = self.list;
        if self.omitted > 0 {
            list.push(Problem::new("", format!("{} more mistakes are not shown", self.omitted), ""));
        }
        list
    }
}
