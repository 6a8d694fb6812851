//! The test applications: subcommands of `culvert-app`.
