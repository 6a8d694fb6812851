//! Labels that are told late.

use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::fresh::{Behind, settle};
use super::{Known, Origin};
use crate::cni::decide::Mode;
use crate::cni::knowledge::{Knowledge, KnownPod, PodName};

const POD: PodName<'_> = PodName { namespace: "shop", name: "web", uid: Some("u1") };
const PATIENCE: Duration = Duration::from_secs(2);

fn known(pod: Mode, namespace: Mode) -> Arc<Known> {
    let read = KnownPod { uids: vec!["u1".into()], mode: pod, ..KnownPod::default() };
    let knowledge = Knowledge {
        namespaces: [("shop".into(), namespace)].into(),
        pods: [("shop".into(), [("web".into(), read)].into())].into(),
    };
    Arc::new(Known { knowledge, origin: Origin::Source, running: Vec::new(), lists_pods: false })
}

#[tokio::test(start_paused = true)]
async fn pod_that_would_pass_waits_for_a_label_that_the_watch_has_not_told_yet() {
    let (publish, watched) = watch::channel(known(Mode::Unset, Mode::Unset));
    let late = async {
        tokio::time::sleep(PATIENCE / 2).await;
        publish.send(known(Mode::Unset, Mode::Ambient)).unwrap();
    };
    let (settled, ()) = tokio::join!(settle(&watched, POD, ready(Some(Mode::Ambient)), PATIENCE), late);
    assert_eq!(settled, Ok(()));
    for namespace in [Mode::Unset, Mode::None] {
        publish.send(known(Mode::Unset, namespace)).unwrap();
        let settled = settle(&watched, POD, ready(Some(Mode::Ambient)), PATIENCE).await;
        assert_eq!(settled, Err(Behind), "{namespace:?}, and the watch says nothing");
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_where_the_label_changes_nothing() {
    let asked = || async { panic!("the API server is asked") };
    for (pod, namespace) in [(Mode::None, Mode::Unset), (Mode::Ambient, Mode::Unset), (Mode::Unset, Mode::Ambient)] {
        let (_publish, watched) = watch::channel(known(pod, namespace));
        assert_eq!(settle(&watched, POD, asked(), PATIENCE).await, Ok(()), "{pod:?} {namespace:?}");
    }
    // It says the same, or does not answer.
    let (_publish, watched) = watch::channel(known(Mode::Unset, Mode::Unset));
    for says in [Some(Mode::Unset), Some(Mode::None), None] {
        assert_eq!(settle(&watched, POD, ready(says), PATIENCE).await, Ok(()), "{says:?}");
    }
}
