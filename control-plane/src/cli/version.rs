//! `culvert version`. Pure.

use serde::Serialize;

use super::facts::{Asked, Component};
use super::text::{Style, Table};

/// This program's version.
pub const CLIENT: &str = env!("CARGO_PKG_VERSION");

/// What `culvert version -o json` prints.
#[derive(Debug, Serialize)]
pub struct Versions {
    /// Of this program.
    pub client: &'static str,
    /// Of the API server; none if it cannot be reached.
    pub kubernetes: Option<String>,
    /// Of each pod of the mesh, by component and node.
    pub components: Vec<Version>,
    /// Why the cluster's are not known; none if they are.
    pub error: Option<String>,
}

/// The version of one pod of the mesh.
#[derive(Debug, Serialize)]
pub struct Version {
    /// `culvertd`, `agent` or `proxy`.
    pub component: Component,
    /// Its pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The image that it runs.
    pub image: String,
    /// Its version; none if it does not say.
    pub version: Option<String>,
    /// Why it does not; none if it does.
    pub error: Option<String>,
}

impl Version {
    /// Of an answer.
    pub fn of(asked: Asked<String>) -> Self {
        let part = asked.part;
        let (version, error) = match asked.answer {
            Ok(version) if version.is_empty() => (None, Some("its version is too old to say which it is".to_owned())),
            Ok(version) => (Some(version), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self { component: part.component, pod: part.pod, node: part.node, image: part.image, version, error }
    }
}

impl Versions {
    /// For people.
    pub fn text(&self, style: Style) -> String {
        let mut text = format!("client      {}\n", self.client);
        if let Some(kubernetes) = &self.kubernetes {
            text += &format!("Kubernetes  {}\n", super::text::clean(kubernetes));
        }
        if let Some(error) = &self.error {
            text += &format!("{} {}\n", style.mark(super::text::Verdict::Failed), super::text::clean(error));
        }
        if self.components.is_empty() {
            if self.error.is_none() {
                text += "no part of the mesh runs in this namespace; --namespace names another\n";
            }
            return text;
        }
        let mut table = Table::new(&["COMPONENT", "NODE", "POD", "VERSION", "IMAGE"]);
        for one in &self.components {
            let version = match (&one.version, &one.error) {
                (Some(version), _) => version.clone(),
                (None, Some(error)) => format!("unknown: {error}"),
                (None, None) => "unknown".to_owned(),
            };
            table.row([one.component.as_str().into(), one.node.clone(), one.pod.clone(), version, one.image.clone()]);
        }
        text + "\n" + &table.render(style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::error::AskError;
    use crate::cli::testing::part;

    #[test]
    fn a_part_that_does_not_answer_is_a_line() {
        let answers =
            [Ok("0.1.0".to_owned()), Ok(String::new()), Err(AskError::NotRunning("ImagePullBackOff".to_owned()))];
        let asked = answers.into_iter().map(|answer| Asked { part: part(Component::Proxy, "n", "p"), answer });
        let components = asked.map(Version::of).collect();
        let versions = Versions { client: "9.9", kubernetes: Some("v1".into()), components, error: None };
        let text = versions.text(Style::default());
        assert!(text.contains("proxy      n     p    0.1.0"), "{text}");
        assert!(text.contains("unknown: it does not run: ImagePullBackOff"), "{text}");
        let json = serde_json::to_value(&versions).unwrap();
        assert_eq!(json["components"][0]["version"], "0.1.0");
        assert!(json["components"][1]["version"].is_null() && json["components"][1]["error"].is_string(), "{json}");
    }
}
