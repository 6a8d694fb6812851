//! The plugin's place in a network configuration list: pure, text in, text out. It stands last, behind the plugin that
//! gives the pod its address (CNI specification 1.1, section 1), in a list of its own that begins as the node's CNI's does.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::VERSIONS;

/// The plugin's type: the name of its file in the runtime's folder of plugins.
pub const TYPE: &str = "ztunnel";

/// The configuration with the plugin. Runtimes take the first by name.
pub const FILE: &str = "00-culvert.conflist";

/// A configuration with the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chained {
    /// The list.
    pub text: Vec<u8>,
    /// The plugins in front of it.
    pub types: Vec<String>,
}

/// Why a configuration cannot be chained to.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// It is not JSON.
    #[error("it is not JSON: {0}")]
    Decode(#[from] serde_json::Error),
    /// It is no network configuration.
    #[error("it is no network configuration: {0}")]
    Shape(&'static str),
    /// Its version is one that the plugin does not speak.
    #[error("its cniVersion {0:?} is not one of {VERSIONS:?}; the node's CNI has to use one of them")]
    Version(String),
}

/// The list with the plugin as its last, configured with `own` (the field `culvert`).
///
/// A file with a single plugin becomes a list of two.
///
/// # Errors
/// When the text is no network configuration, or of a version that the plugin does not speak.
pub fn chained(text: &[u8], own: &Value) -> Result<Chained, ChainError> {
    let mut all = fields(text)?;
    let version = all.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    if !VERSIONS.contains(&version) {
        return Err(ChainError::Version(version.to_owned()));
    }
    if !all.contains_key("plugins") {
        all = into_list(all)?;
    }
    let plugins = plugins(&mut all)?;
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.is_empty() {
        return Err(ChainError::Shape("there is no other plugin in it"));
    }
    let types = plugins.iter().filter_map(kind).map(ToOwned::to_owned).collect();
    plugins.push(json!({ "type": TYPE, "culvert": own }));
    Ok(Chained { text: text_of(all)?, types })
}

/// The list without the plugin. `None`: it is not in it.
///
/// # Errors
/// When the text is no list of plugins.
pub fn unchained(text: &[u8]) -> Result<Option<Vec<u8>>, ChainError> {
    let mut all = fields(text)?;
    if !all.contains_key("plugins") {
        return Ok(None);
    }
    let plugins = plugins(&mut all)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.len() == before { Ok(None) } else { text_of(all).map(Some) }
}

/// The file that a runtime takes of those in its folder: the first by name of those that hold a configuration.
pub fn chosen<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let holds = |name: &&str| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        !name.starts_with('.') && matches!(ending, Some("conf" | "conflist" | "json"))
    };
    names.into_iter().filter(holds).min()
}

fn fields(text: &[u8]) -> Result<Map<String, Value>, ChainError> {
    match serde_json::from_slice(text)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(ChainError::Shape("it is not an object")),
    }
}

fn plugins(all: &mut Map<String, Value>) -> Result<&mut Vec<Value>, ChainError> {
    let plugins = all.get_mut("plugins").and_then(Value::as_array_mut);
    let plugins = plugins.ok_or(ChainError::Shape("plugins is not a list"))?;
    if plugins.iter().all(|plugin| plugin.get("type").is_some_and(Value::is_string)) {
        Ok(plugins)
    } else {
        Err(ChainError::Shape("a plugin has no type"))
    }
}

/// What holds for all plugins moves to the list.
fn into_list(mut single: Map<String, Value>) -> Result<Map<String, Value>, ChainError> {
    if !single.get("type").is_some_and(Value::is_string) {
        return Err(ChainError::Shape("it has neither plugins nor a type"));
    }
    let mut list = Map::new();
    for field in ["cniVersion", "name"] {
        let value = single.remove(field).ok_or(ChainError::Shape("cniVersion or name is missing"))?;
        list.insert(field.to_owned(), value);
    }
    list.insert(String::from("plugins"), Value::Array(vec![Value::Object(single)]));
    Ok(list)
}

fn kind(plugin: &Value) -> Option<&str> {
    plugin.get("type").and_then(Value::as_str)
}

fn is_ours(plugin: &Value) -> bool {
    kind(plugin) == Some(TYPE)
}

fn text_of(all: Map<String, Value>) -> Result<Vec<u8>, ChainError> {
    let mut text = serde_json::to_vec_pretty(&Value::Object(all))?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Value {
        json!({ "agentSocket": "/run/culvert/cni.sock" })
    }

    fn list(plugins: &[&str]) -> Vec<u8> {
        let plugins: Vec<Value> = plugins.iter().map(|kind| json!({ "type": kind, "x": 1 })).collect();
        json!({ "cniVersion": "1.0.0", "name": "net", "disableCheck": true, "plugins": plugins }).to_string().into()
    }

    fn types(text: &[u8]) -> Vec<String> {
        let all: Value = serde_json::from_slice(text).unwrap();
        let plugins = all["plugins"].as_array().unwrap().iter();
        plugins.map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn plugin_comes_last_and_once_and_nothing_else_changes() {
        let with = chained(&list(&["bridge", "portmap"]), &own()).unwrap();
        assert_eq!(types(&with.text), ["bridge", "portmap", TYPE]);
        assert_eq!(with.types, ["bridge", "portmap"]);
        let all: Value = serde_json::from_slice(&with.text).unwrap();
        assert_eq!(all["disableCheck"], true);
        assert_eq!(all["plugins"][0]["x"], 1);
        assert_eq!(all["plugins"][2]["culvert"], own());
        assert_eq!(chained(&with.text, &own()).unwrap(), with, "it is there already");
        let moved = chained(&list(&["bridge", TYPE, "portmap", TYPE]), &own()).unwrap();
        assert_eq!(types(&moved.text), ["bridge", "portmap", TYPE]);
        let other = chained(&with.text, &json!({ "agentSocket": "/other" })).unwrap();
        assert_eq!(types(&other.text), ["bridge", "portmap", TYPE], "another configuration of its own");
    }

    #[test]
    fn taken_out_again_the_list_is_as_it_was() {
        let before = list(&["bridge", "portmap"]);
        let with = chained(&before, &own()).unwrap();
        let after = unchained(&with.text).unwrap().unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&after).unwrap(), serde_json::from_slice::<Value>(&before).unwrap());
        assert_eq!(unchained(&before).unwrap(), None);
        assert_eq!(unchained(br#"{"type": "bridge"}"#).unwrap(), None);
    }

    #[test]
    fn single_plugin_becomes_a_list() {
        let single = br#"{"cniVersion": "0.3.1", "name": "net", "type": "bridge", "isGateway": true}"#;
        let with = chained(single, &own()).unwrap();
        assert_eq!(types(&with.text), ["bridge", TYPE]);
        let all: Value = serde_json::from_slice(&with.text).unwrap();
        assert_eq!((&all["cniVersion"], &all["name"]), (&json!("0.3.1"), &json!("net")));
        assert_eq!(all["plugins"][0], json!({ "type": "bridge", "isGateway": true }));
    }

    #[test]
    fn what_is_no_configuration_is_left_alone() {
        for text in ["", "{", "[]", "3", r#"{"cniVersion": "1.0.0"}"#, r#"{"cniVersion": "1.0.0", "plugins": {}}"#] {
            assert!(chained(text.as_bytes(), &own()).is_err(), "{text}");
        }
        for plugins in [vec![], vec![TYPE]] {
            assert!(matches!(chained(&list(&plugins), &own()), Err(ChainError::Shape(_))), "{plugins:?}");
        }
        let version = br#"{"cniVersion": "9.0.0", "name": "n", "plugins": [{"type": "bridge"}]}"#;
        assert!(matches!(chained(version, &own()), Err(ChainError::Version(_))));
        let untyped = br#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"kind": "bridge"}]}"#;
        assert!(matches!(chained(untyped, &own()), Err(ChainError::Shape(_))));
        assert!(matches!(unchained(untyped), Err(ChainError::Shape(_))));
    }

    #[test]
    fn runtime_takes_the_first_file_by_name() {
        assert_eq!(chosen(["20-b.conflist", "10-a.conf", "05-x.txt", ".00-hidden.conf"]), Some("10-a.conf"));
        assert_eq!(chosen(["10-a.conf.culvert-original", "10-a.conflist"]), Some("10-a.conflist"));
        assert_eq!(chosen(["readme"]), None);
    }
}
