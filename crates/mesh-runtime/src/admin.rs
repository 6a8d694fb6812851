//! The admin pages of a process: an index, `/logging`, `/quitquitquit`, and whatever the process adds, such as
//! `/config_dump`. Meant for a loopback address only.

use ::http::StatusCode;

use crate::http::{Reply, Router};
use crate::log::LogHandle;
use crate::signal::Requester;

/// The routes that every process has: `GET /` lists all routes, `GET /logging` shows the levels, `POST
/// /logging?level=debug` or `?level=target:debug` sets them, `POST /quitquitquit` asks the process to end (and drain).
///
/// The process adds its own to the returned router before [`finish`].
pub fn routes(log: &LogHandle, quit: Requester) -> Router {
    let mut router = Router::new();
    let shown = log.clone();
    router.get("/logging", "log levels in force", move |_| {
        let levels = shown.directives();
        async move { Reply::text(format!("{levels}\n")) }
    });
    let set = log.clone();
    router.post("/logging", "?level=debug or ?level=target:debug", move |request| {
        let level = request.parameter("level").unwrap_or_default();
        let reply = match set.set(&level) {
            Ok(()) => Reply::text(format!("{}\n", set.directives())),
            Err(error) => Reply::text(format!("{error}\n")).with_status(StatusCode::BAD_REQUEST),
        };
        async move { reply }
    });
    router.post("/quitquitquit", "drain and end the process", move |_| {
        quit.request();
        async { Reply::text("shutting down\n") }
    });
    router
}

/// Adds the index page, which lists every route that `router` has by now.
pub fn finish(mut router: Router) -> Router {
    let index = router.index();
    router.get("/", "this page", move |_| {
        let index = index.clone();
        async move { Reply::text(index) }
    });
    router
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tests::{get, post};

    fn pages() -> (Router, LogHandle, Requester) {
        let log = LogHandle::detached("info").unwrap();
        let quit = Requester::default();
        (finish(routes(&log, quit.clone())), log, quit)
    }

    #[tokio::test]
    async fn index_lists_the_routes() {
        let (router, ..) = pages();
        let (status, body) = get(&router, "/").await;
        assert_eq!(status, 200);
        assert!(body.contains("POST /logging") && body.contains("/quitquitquit"), "{body}");
        assert_eq!(get(&router, "/nothing").await.0, 404);
        assert_eq!(get(&router, "/quitquitquit").await.0, 405);
    }

    #[tokio::test]
    async fn log_levels_are_shown_and_set() {
        let (router, log, _) = pages();
        assert_eq!(get(&router, "/logging").await, (200, "info\n".into()));
        assert_eq!(post(&router, "/logging", "level=warn").await.0, 200);
        assert_eq!(post(&router, "/logging", "level=mesh_xds:debug").await.0, 200);
        assert_eq!(log.directives(), "mesh_xds=debug,warn");
        for bad in ["level=loud", "level=", "", "level=:debug"] {
            assert_eq!(post(&router, "/logging", bad).await.0, 400, "{bad}");
        }
        assert_eq!(log.directives(), "mesh_xds=debug,warn");
    }

    #[tokio::test]
    async fn quit_asks_the_process_to_end() {
        let (router, _, quit) = pages();
        assert_eq!(post(&router, "/quitquitquit", "").await.0, 200);
        quit.requested().await;
    }
}
