//! Tests of the crate through its public interface, over in-memory pipes and real TCP.

#[cfg(test)]
mod bounds;
#[cfg(test)]
mod budget;
#[cfg(test)]
mod copy;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod pool;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tunnel;
