//! Levels, and the form of a line.

use std::sync::{Arc, Mutex};

use super::*;

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn captured(log: impl FnOnce()) -> String {
    let out = Captured::default();
    let make = out.clone();
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(move || make.clone())
        .event_format(format::Text)
        .fmt_fields(format::Fields);
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
    String::from_utf8(out.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn a_line_is_time_level_target_message_fields() {
    let line = captured(|| {
        let span = tracing::info_span!("connection", id = 7);
        let _inside = span.enter();
        tracing::event!(target: ACCESS, tracing::Level::INFO, src.addr = %"10.0.0.1:1", bytes_sent = 5, error = "no", "connection complete");
    });
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(time.len() >= 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
    assert_eq!(rest, "info access connection complete src.addr=10.0.0.1:1 bytes_sent=5 error=\"no\" id=7\n");
}

#[test]
fn values_cannot_make_lines() {
    let line = captured(|| tracing::warn!(name = %"a\nb\u{1b}[2Jc", other = "x\ny", "first\r\nsecond"));
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    assert!(!line.contains('\u{1b}') && !line.contains('\r'), "{line:?}");
    assert!(line.contains("a\\nb"), "{line}");
}

#[test]
fn levels_are_parsed_and_set() {
    let log = LogHandle::detached("warn,h2=off,mesh_xds::client=trace").unwrap();
    assert_eq!(log.directives(), "mesh_xds::client=trace,h2=off,warn");
    log.set("debug").unwrap();
    log.set("h2:info,mesh_hbone:debug").unwrap();
    assert_eq!(log.directives(), "mesh_xds::client=trace,mesh_hbone=debug,h2=info,debug");
    for bad in ["", "loud", "h2:", ":info", "a b:info", "info,x"] {
        assert!(matches!(log.set(bad), Err(LogError::Level(_))), "{bad}");
        assert!(LogHandle::detached(bad).is_err(), "{bad}");
    }
    assert_eq!(log.directives(), "mesh_xds::client=trace,mesh_hbone=debug,h2=info,debug");
    let many: Vec<String> = (0..=MAX_TARGETS).map(|n| format!("t{n}:info")).collect();
    assert!(matches!(log.set(&many.join(",")), Err(LogError::TooManyTargets)));
}

// The only test of this crate that sets the process's subscriber.
#[test]
fn reload_takes_effect() {
    let log = init("info", Format::Json).unwrap();
    assert!(!tracing::enabled!(target: "reloaded", tracing::Level::DEBUG));
    log.set("reloaded:debug").unwrap();
    assert!(tracing::enabled!(target: "reloaded", tracing::Level::DEBUG));
    assert!(!tracing::enabled!(target: "other", tracing::Level::DEBUG));
    assert!(matches!(init("info", Format::Text), Err(LogError::AlreadySet)));
    log.flush(Duration::from_secs(1));
}

#[test]
fn formats() {
    assert_eq!("json".parse::<Format>().unwrap(), Format::Json);
    assert_eq!("text".parse::<Format>().unwrap(), Format::Text);
    assert!("xml".parse::<Format>().is_err());
}
