//! Agent with a source.
