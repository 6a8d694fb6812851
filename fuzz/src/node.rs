//! What agent, proxy and CNI plugin of one node say to each other.

use mesh_proto::node::{AgentMessage, Pod, PodRequest, PodResponse, ProxyMessage, pod_request};
use prost::Message as _;
use ztunnel::agent::maker::Kind;
use ztunnel::agent::pod::PodInfo;

/// Reads the input as each of the messages, and what it announces as a pod.
pub fn run(input: &[u8]) {
    if let Ok(request) = PodRequest::decode(input)
        && let Some(pod_request::Kind::Enrol(enrol)) = request.kind
    {
        pod(enrol.pod);
    }
    if let Ok(message) = ProxyMessage::decode(input)
        && let Some(mesh_proto::node::proxy_message::Kind::SocketRequest(request)) = message.kind
    {
        let _ = Kind::try_from(&request);
    }
    if let Ok(message) = AgentMessage::decode(input)
        && let Some(mesh_proto::node::agent_message::Kind::PodAdded(added)) = message.kind
    {
        pod(added.pod);
    }
    let _ = PodResponse::decode(input);
}

fn pod(wire: Option<Pod>) {
    let Ok(info) = PodInfo::try_from(wire) else { return };
    assert!(!info.addresses.is_empty());
    for text in [&info.uid, &info.name, &info.namespace, &info.service_account] {
        assert!(!text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()));
    }
    let again = PodInfo::try_from(Some(info.to_wire())).unwrap();
    assert_eq!(again.to_wire(), info.to_wire());
}
