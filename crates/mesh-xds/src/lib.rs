//! Delta discovery.
