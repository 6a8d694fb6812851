//! The programs' log records.

use std::os::fd::AsFd as _;

use ztunnel_ebpf as abi;

use super::error::{CaptureError, at};
use super::{NodeCapture, sys};

impl NodeCapture {
    /// Shows the log records of the programs, if they were loaded with logging, at level debug. Ends only with an
    /// error.
    ///
    /// # Errors
    /// When there is no ring buffer, or it cannot be watched.
    pub async fn forward_logs(&self) -> Result<std::convert::Infallible, CaptureError> {
        let pin = self.node_folder().join(abi::PROGRAM_CONNECT4);
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        let logger = aya_log::EbpfLogger::init_from_id_with_logger(link.program_id, Forward)
            .map_err(|error| CaptureError::NotInForce(error.to_string()))?;
        let mut logger = sys::watch(logger).map_err(at(&pin))?;
        loop {
            let mut ready = logger.readable_mut().await.map_err(at(&pin))?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

/// Takes the programs' records, which come by the `log` crate.
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        tracing::enabled!(target: "ebpf", tracing::Level::DEBUG)
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "ebpf", "{}", record.args());
    }

    fn flush(&self) {}
}
