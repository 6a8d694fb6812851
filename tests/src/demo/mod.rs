//! The demo: Bookinfo on two nodes, watched.
