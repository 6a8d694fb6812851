//! What the wire means.
