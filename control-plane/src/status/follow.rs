//! Objects that the leader follows by itself, as far as it writes about them.

use std::fmt::Debug;

use futures_util::stream::{Stream, StreamExt};
use kube::Api;
use kube::core::Resource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use serde::de::DeserializeOwned;

use crate::ingest::kubernetes::describe;

/// Objects of one page of a list.
const PAGE: u32 = 500;

/// Follows objects, for ever. A kind that does not exist is looked for again and again, as after any other error; what is
/// wrong is logged when it begins. `what` is for the log.
pub(super) fn follow<K>(what: &'static str, api: Api<K>, config: Config) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut is_in_trouble = false;
    watcher(api, config.page_size(PAGE)).default_backoff().filter_map(move |event| {
        let event = match event {
            // That a list begins is no success yet.
            Ok(Event::Init) => Some(Event::Init),
            Ok(event) => {
                is_in_trouble = false;
                Some(event)
            }
            Err(error) => {
                if !std::mem::replace(&mut is_in_trouble, true) {
                    tracing::warn!(what, error = describe(&error), "cannot be followed; trying again");
                }
                None
            }
        };
        std::future::ready(event)
    })
}
