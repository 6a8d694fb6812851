//! The scheduler and the Deployment controller: pods from Deployments.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::Cluster;
use crate::Error;
use crate::error::Context;
use crate::kube::{hash, kind, name, namespace_of};
use crate::pod::{Pod, PodBuilder};

/// Applies every `*.yaml` of a folder, in the order of their names, then starts the pods of its Deployments.
pub(super) fn folder(cluster: &Cluster, folder: &Path) -> Result<Vec<Arc<Pod>>, Error> {
    let entries = std::fs::read_dir(folder).during(|| format!("reading {}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "yaml" || e == "yml"));
    files.sort();
    let mut objects = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).during(|| format!("reading {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        objects.extend(cluster.apply(&name, &text)?.into_iter().map(|o| (name.clone().into_owned(), o)));
    }
    if objects.is_empty() {
        let reason = "no objects in any *.yaml".to_owned();
        return Err(Error::Manifest { file: folder.display().to_string(), reason });
    }
    let mut pods = Vec::new();
    for (file, object) in objects.iter().filter(|(_, o)| kind(o) == "Deployment") {
        let replicas = object["spec"]["replicas"].as_u64().unwrap_or(1);
        for _ in 0..replicas {
            let pod = describe(cluster, object).map_err(|reason| Error::Manifest { file: file.clone(), reason })?;
            pods.push(pod.start()?);
        }
    }
    Ok(pods)
}

/// One pod of a Deployment, named as the ReplicaSet controller names it.
fn describe<'c>(cluster: &'c Cluster, deployment: &Value) -> Result<PodBuilder<'c>, String> {
    let template = &deployment["spec"]["template"];
    let set = format!("{}-{:010x}", name(deployment), hash(&template.to_string()) & 0xff_ffff_ffff);
    let uid = crate::pod::new_uid().map_err(|e| e.to_string())?;
    let mut pod = cluster.pod(&format!("{set}-{}", &uid[..5])).owner("ReplicaSet", &set);
    pod = pod.namespace(namespace_of(deployment));
    let spec = &template["spec"];
    if let Some(account) = spec["serviceAccountName"].as_str() {
        pod = pod.service_account(account);
    }
    for (name, value) in pairs(&template["metadata"]["labels"]).chain([("pod-template-hash", &set[set.len() - 10..])]) {
        pod = pod.label(name, value);
    }
    for (name, value) in pairs(&template["metadata"]["annotations"]) {
        pod = pod.annotation(name, value);
    }
    if let Some(node) = spec["nodeSelector"]["kubernetes.io/hostname"].as_str() {
        let index = node.strip_prefix("node").and_then(|n| n.parse().ok());
        pod = pod.node(index.ok_or_else(|| format!("nodes are called node1, node2, ...; not {node}"))?);
    }
    let container = &spec["containers"][0];
    for port in container["ports"].as_array().into_iter().flatten() {
        let number = port["containerPort"].as_u64().and_then(|p| u16::try_from(p).ok());
        let number = number.ok_or_else(|| format!("{}: a containerPort is no port", name(deployment)))?;
        let name = port["name"].as_str().map_or_else(|| format!("port-{number}"), str::to_owned);
        pod = pod.port(&name, number);
    }
    for variable in container["env"].as_array().into_iter().flatten() {
        if let (Some(name), Some(value)) = (variable["name"].as_str(), variable["value"].as_str()) {
            pod = pod.env(name, value);
        }
    }
    Ok(pod.command(command(&template["metadata"]["labels"], container)?))
}

/// The container's arguments for `culvert-app`; an image of the Bookinfo sample stands for the same service of ours.
fn command(labels: &Value, container: &Value) -> Result<Vec<String>, String> {
    let words = |key: &str| -> Vec<String> {
        container[key].as_array().into_iter().flatten().filter_map(|w| w.as_str().map(str::to_owned)).collect()
    };
    let mut command = [words("command"), words("args")].concat();
    if command.first().is_some_and(|first| first.ends_with("culvert-app")) {
        command.remove(0);
    }
    if !command.is_empty() {
        return Ok(command);
    }
    let image = container["image"].as_str().unwrap_or_default();
    let (Some(app), true) = (labels["app"].as_str(), image.contains("bookinfo")) else {
        return Err(format!("the image {image} without arguments is nothing that the test cluster can run"));
    };
    let version = labels["version"].as_str().unwrap_or("v1");
    let port = container["ports"][0]["containerPort"].as_u64().unwrap_or(9080).to_string();
    Ok(["bookinfo", app, "--version", version, "--port", &port].map(str::to_owned).to_vec())
}

fn pairs(object: &Value) -> impl Iterator<Item = (&str, &str)> {
    object.as_object().into_iter().flatten().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?)))
}
