//! The map layout shared by the programs and the agent.
#![no_std]
