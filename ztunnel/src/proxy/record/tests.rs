//! The record of a connection: metrics and access log.
