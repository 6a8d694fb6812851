//! The node proxy and its agent.
