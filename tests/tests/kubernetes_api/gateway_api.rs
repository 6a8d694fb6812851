//! Gateways and their classes, as far as they are needed: the kinds of Gateway API, without what it checks.

use serde_json::{Value, json};

use super::scene::Scene;

const GROUP: &str = "gateway.networking.k8s.io";
pub const GATEWAY_CLASSES: &str = "/apis/gateway.networking.k8s.io/v1/gatewayclasses";

impl Scene {
    /// Makes the kinds known.
    pub fn define_gateways(&self) {
        for (kind, plural, scope) in
            [("Gateway", "gateways", "Namespaced"), ("GatewayClass", "gatewayclasses", "Cluster")]
        {
            let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
            let condition = json!({
                "type": "object", "required": ["type", "status"], "x-kubernetes-preserve-unknown-fields": true,
                "properties": {"type": {"type": "string"}, "status": {"type": "string"}},
            });
            let conditions = json!({
                "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"], "items": condition,
            });
            let mut status = any.clone();
            status["properties"] = json!({ "conditions": conditions });
            let definition = json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": format!("{plural}.{GROUP}"),
                    // The group is Kubernetes' own.
                    "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
                },
                "spec": {
                    "group": GROUP, "scope": scope,
                    "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_lowercase()},
                    "versions": [{
                        "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": any, "status": status}}},
                    }],
                },
            });
            self.define_one(&definition);
        }
    }
}

/// Where the gateways of a namespace are.
pub fn gateways(namespace: &str) -> String {
    format!("/apis/{GROUP}/v1/namespaces/{namespace}/gateways")
}

/// A class of waypoints of the mesh.
pub fn gateway_class(name: &str) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "GatewayClass", "metadata": {"name": name},
        "spec": {"controllerName": "culvert.dev/mesh-controller"},
    })
}

/// A gateway that takes HBONE.
pub fn gateway(namespace: &str, name: &str, class: &str) -> Value {
    let listener = json!({"name": "mesh", "port": 15008, "protocol": "HBONE"});
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "Gateway", "metadata": {"name": name, "namespace": namespace},
        "spec": {"gatewayClassName": class, "listeners": [listener]},
    })
}
