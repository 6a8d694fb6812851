//! Objects as the API server sends them: read without what nobody here needs, which in a real cluster is most of them.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;
use kube::core::DynamicResourceScope;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::api::{Kind, ObjectId};

/// Fields that are passed over while an object is read, by the field that they are in. No validation reads them.
const SKIPPED: [(&str, &str); 9] = [
    ("metadata", "managedFields"),
    ("annotations", "kubectl.kubernetes.io/last-applied-configuration"),
    // A node names every image on its disk.
    ("status", "images"),
    ("status", "containerStatuses"),
    ("status", "initContainerStatuses"),
    ("status", "ephemeralContainerStatuses"),
    ("spec", "volumes"),
    ("spec", "tolerations"),
    ("spec", "affinity"),
];
/// How deep fields are that may be passed over: `metadata.annotations.<key>`.
const SKIPPED_DEPTH: u8 = 2;

/// An object: the few fields by which it is told from others, and the whole of it.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    /// Only what the watcher looks at: name, namespace, version; and the unique id.
    meta: ObjectMeta,
    /// The object.
    pub(super) value: Value,
}

impl Raw {
    /// What it is called, as one of `kind`; none for an object without a name.
    pub(super) fn id(&self, kind: Kind) -> Option<ObjectId> {
        let name: Arc<str> = self.meta.name.as_deref()?.into();
        let namespace = if kind.is_cluster_scoped() { "" } else { self.meta.namespace.as_deref().unwrap_or_default() };
        Some(ObjectId { kind, namespace: namespace.into(), name })
    }

    /// Kubernetes' unique id of this very object; empty when it has none.
    pub(super) fn uid(&self) -> &str {
        self.meta.uid.as_deref().unwrap_or_default()
    }

    /// Which version of the object this is; opaque.
    pub(super) fn version(&self) -> &str {
        self.meta.resource_version.as_deref().unwrap_or_default()
    }
}

impl<'de> serde::Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Part { name: "", depth: 0 }.deserialize(deserializer)?;
        let metadata = value.get("metadata").ok_or_else(|| D::Error::missing_field("metadata"))?;
        let text = |key: &str| metadata.get(key).and_then(Value::as_str).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { meta, value })
    }
}

impl kube::Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// A part of an object, while it is read.
#[derive(Clone, Copy)]
struct Part<'a> {
    /// The field that it is the value of.
    name: &'a str,
    /// How many fields it is inside of.
    depth: u8,
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            if self.depth > SKIPPED_DEPTH {
                map.insert(key, fields.next_value()?);
            } else if SKIPPED.contains(&(self.name, &key)) {
                fields.next_value::<IgnoredAny>()?;
            } else {
                let value = fields.next_value_seed(Part { name: &key, depth: self.depth + 1 })?;
                map.insert(key, value);
            }
        }
        Ok(Value::Object(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_reads_is_not_kept() {
        let text = json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "resourceVersion": "17",
                "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "ambient.istio.io/redirection": "enabled"},
            },
            "spec": {"volumes": [{"name": "v"}], "containers": [{"name": "a", "volumes": 1, "ports": [{"containerPort": 1.5}]}]},
            "status": {"phase": "Running", "podIP": null, "containerStatuses": [{"ready": true}]},
        });
        let raw: Raw = serde_json::from_str(&text.to_string()).unwrap();
        assert_eq!(raw.version(), "17");
        assert_eq!(raw.id(Kind::Pod).unwrap().to_string(), "Pod shop/web-1");
        assert_eq!(
            raw.value,
            json!({
                "metadata": {
                    "name": "web-1", "namespace": "shop", "resourceVersion": "17",
                    "annotations": {"ambient.istio.io/redirection": "enabled"},
                },
                "spec": {"containers": [{"name": "a", "volumes": 1, "ports": [{"containerPort": 1.5}]}]},
                "status": {"phase": "Running", "podIP": null},
            })
        );
    }

    #[test]
    fn an_odd_object_is_still_an_object() {
        let raw: Raw =
            serde_json::from_str(r#"{"metadata": {"name": 7}, "spec": "text", "status": [1, -2, true]}"#).unwrap();
        assert_eq!(raw.id(Kind::Pod), None);
        assert!(serde_json::from_str::<Raw>("[]").is_err() && serde_json::from_str::<Raw>("{}").is_err());
    }
}
