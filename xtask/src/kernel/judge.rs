//! What a console says about a run. The script in the virtual machine writes a line before and after each part.

/// What every line of the script begins with.
pub const MARK: &str = "culvert-vm:";
/// What a kernel says when it is broken, whether or not it goes on.
const COMPLAINTS: [&str; 5] = ["BUG: ", "Oops: ", "general protection fault", "WARNING: CPU", "KASAN: "];

/// Lines that are shown of what a failed test wrote, and of all of them.
const QUOTED: usize = 8;
const QUOTED_ALL: usize = 48;

/// Reads a console line by line.
#[derive(Default)]
pub struct Judge {
    part: Option<String>,
    passed: usize,
    failed: Vec<String>,
    complaints: Vec<String>,
    ended: bool,
    total: usize,
    failed_tests: Vec<String>,
    quotes: Vec<String>,
    quoting: usize,
}

/// Something to tell at once.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// A part is over, or has begun.
    Part(String),
    /// The kernel does not go on.
    Fallen,
}

impl Judge {
    /// Takes the next line.
    pub fn read(&mut self, line: &str) -> Option<News> {
        if line.contains("Kernel panic") {
            return Some(News::Fallen);
        }
        if let Some(complaint) = COMPLAINTS.iter().find(|words| line.contains(**words)) {
            self.complaints.push(line.get(line.find(complaint)?..)?.to_owned());
        }
        // libtest repeats what a failed test wrote below this line.
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.failed_tests.push(test.to_owned());
            self.quoting = QUOTED;
        }
        if self.quoting > 0 && self.quotes.len() < QUOTED_ALL && !line.is_empty() && !line.contains(MARK) {
            self.quoting -= 1;
            self.quotes.push(line.chars().take(400).collect());
        }
        // `test result: ok. 23 passed; 0 failed; ...`
        if let Some((_, rest)) = line.split_once("test result: ") {
            let words: Vec<&str> = rest.split_whitespace().collect();
            let passed = words.windows(2).find(|pair| pair[1].starts_with("passed")).map(|pair| pair[0]);
            self.passed += passed.and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
        }
        // A line of the kernel may stand before it.
        let (_, said) = line.split_once(MARK)?;
        let words: Vec<&str> = said.split_whitespace().collect();
        match words.as_slice() {
            ["booted", release] => Some(News::Part(format!("{release} is up"))),
            ["start", part] => {
                self.part = Some((*part).to_owned());
                self.passed = 0;
                None
            }
            ["done", part, status, seconds] => {
                self.part = None;
                self.quoting = 0;
                let passed = std::mem::take(&mut self.passed);
                self.total += passed;
                // A part that runs no test tests nothing.
                let good = *status == "0" && passed > 0;
                if !good {
                    self.failed.push((*part).to_owned());
                }
                let verdict = if good { "passed" } else { "FAILED" };
                Some(News::Part(format!("{part}: {verdict}, {passed} tests good, {seconds} s")))
            }
            ["end"] => {
                self.ended = true;
                None
            }
            // Everything else is for people.
            _ => Some(News::Part(said.trim().to_owned())),
        }
    }

    /// Whether all parts were run.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The beginning of what each failed test wrote.
    pub fn quotes(&self) -> &[String] {
        &self.quotes
    }

    /// What was going on last.
    pub fn during(&self) -> &str {
        match &self.part {
            Some(part) => part,
            None if self.total == 0 => "the boot",
            None => "the time between two parts",
        }
    }

    /// How many tests passed.
    pub fn total(&self) -> usize {
        self.total
    }

    /// What to say at the end, when the machine is gone.
    ///
    /// # Errors
    /// What was not as it should be.
    pub fn verdict(&self) -> Result<(), String> {
        if !self.ended {
            return Err(format!("the machine ended early, during {}", self.during()));
        }
        if !self.complaints.is_empty() {
            return Err(format!("the kernel complained: {}", self.complaints.join("; ")));
        }
        if !self.failed.is_empty() {
            let tests: Vec<String> = self.failed_tests.iter().map(|test| format!("\n  {test}")).collect();
            return Err(format!("failed: {}{}", self.failed.join(", "), tests.concat()));
        }
        if self.total == 0 {
            return Err(String::from("no test ran"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Result<usize, String> {
        let mut judge = Judge::default();
        for line in lines {
            judge.read(line);
        }
        judge.verdict().map(|()| judge.total())
    }

    #[test]
    fn good_only_with_tests_that_passed_and_an_end() {
        let result = "test result: ok. 3 passed; 0 failed; 0 ignored";
        let good = ["culvert-vm: start a", result, "culvert-vm: done a 0 4", "culvert-vm: end"];
        assert_eq!(read(&good), Ok(3));
        assert!(read(&good[..3]).unwrap_err().contains("ended early"));
        assert!(read(&["culvert-vm: start a", "culvert-vm: done a 0 4", "culvert-vm: end"]).is_err());
        assert!(read(&["culvert-vm: start a", result, "culvert-vm: done a 101 4", "culvert-vm: end"]).is_err());
        assert!(read(&["culvert-vm: end"]).is_err());
        assert!(read(&good[..1]).unwrap_err().contains("during a"));
    }

    #[test]
    fn a_kernel_that_complains_fails_the_run_and_failures_are_quoted() {
        let result = "test result: ok. 1 passed; 0 failed";
        let bad = ["culvert-vm: start a", result, "[ 3.1] BUG: bad page", "culvert-vm: done a 0 1", "culvert-vm: end"];
        let mut judge = Judge::default();
        for line in
            ["---- a stdout ----", "", "thread 'a' panicked at x.rs:1:1:", "why", "culvert-vm: done a 101 1", "x"]
        {
            judge.read(line);
        }
        assert_eq!(judge.quotes(), ["---- a stdout ----", "thread 'a' panicked at x.rs:1:1:", "why"]);
        assert!(read(&bad).unwrap_err().contains("BUG: bad page"));
        assert_eq!(Judge::default().read("[1.4] Kernel panic - not syncing"), Some(News::Fallen));
    }
}
