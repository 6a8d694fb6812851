//! Which waypoint stands before an object. The object's own label wins over its namespace's.

use mesh_proto::workload as wire;

use super::{Index, Options};
use crate::api::{Name, WaypointBinding, WaypointRef};

/// The port of HBONE.
const HBONE_PORT: u32 = 15008;

impl Index {
    /// The waypoint of an object of `namespace` with its own binding. It need not exist: traffic to an object that is
    /// bound to a waypoint that is not there is refused, not let through.
    pub(super) fn waypoint(&self, namespace: &str, own: &WaypointBinding) -> Option<wire::GatewayAddress> {
        let binding = match own {
            WaypointBinding::Unset => self.namespaces.waypoint(namespace),
            WaypointBinding::Off | WaypointBinding::Waypoint(_) => own,
        };
        match binding {
            WaypointBinding::Unset | WaypointBinding::Off => None,
            WaypointBinding::Waypoint(waypoint) => Some(address(&self.options, namespace, waypoint)),
        }
    }
}

fn address(options: &Options, namespace: &str, waypoint: &WaypointRef) -> wire::GatewayAddress {
    let service = Name::new(waypoint.namespace.as_deref().unwrap_or(namespace), waypoint.name.as_str());
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: service.namespace.to_string(),
            hostname: options.cluster_hostname(&service),
        })),
        hbone_mtls_port: HBONE_PORT,
    }
}
