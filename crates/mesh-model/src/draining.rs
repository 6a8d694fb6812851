//! Workloads that are being deleted and still serve. The discovery protocol knows healthy and unhealthy only: a control
//! plane says UNHEALTHY of them, and culvertd adds an extension, so that a service of which nobody else is left is served
//! until its last endpoint is gone, as kube-proxy does it (KEP-1669).

use mesh_proto::workload as wire;

/// Name of the extension.
pub const EXTENSION: &str = "culvert.dev/draining";

/// Type of its payload, as `google.protobuf.Any` names it. Another type is one of the future, and not read.
pub const PAYLOAD_TYPE: &str = "type.googleapis.com/culvert.discovery.v1.Draining";

/// Whether the extension is there.
pub(crate) fn is_said(extensions: &[wire::Extension]) -> bool {
    let payload = |one: &&wire::Extension| one.config.as_ref().is_some_and(|payload| payload.type_url == PAYLOAD_TYPE);
    extensions.iter().filter(payload).any(|one| one.name == EXTENSION)
}

#[cfg(test)]
mod tests {
    use crate::fixture::pod;
    use crate::workload::{Health, Workload};

    use super::*;

    fn health(status: wire::WorkloadStatus, extensions: &[(&str, Option<&str>)]) -> Health {
        let extension = |(name, type_url): &(&str, Option<&str>)| wire::Extension {
            name: (*name).into(),
            config: type_url.map(|type_url| prost_types::Any { type_url: type_url.into(), value: vec![0xff] }),
        };
        let extensions = extensions.iter().map(extension).collect();
        let wire = wire::Workload { status: status.into(), extensions, ..pod("a", &["10.0.0.1"]) };
        Workload::try_from(&wire).unwrap().health
    }

    #[test]
    fn only_what_is_unhealthy_can_be_draining() {
        use wire::WorkloadStatus::{Healthy, Unhealthy};
        let said = (EXTENSION, Some(PAYLOAD_TYPE));
        let future = (EXTENSION, Some("type.googleapis.com/culvert.discovery.v9.Draining"));
        let cases: [(_, &[_], _); 7] = [
            (Healthy, &[], Health::Healthy),
            (Healthy, &[said], Health::Healthy),
            (Unhealthy, &[], Health::Unhealthy),
            (Unhealthy, &[said], Health::Draining),
            (Unhealthy, &[("example.com/anything", Some(PAYLOAD_TYPE)), said, said], Health::Draining),
            (Unhealthy, &[("example.com/anything", Some(PAYLOAD_TYPE)), future], Health::Unhealthy),
            (Unhealthy, &[(EXTENSION, None)], Health::Unhealthy),
        ];
        for (status, extensions, expected) in cases {
            assert_eq!(health(status, extensions), expected, "{status:?} {extensions:?}");
        }
    }
}
