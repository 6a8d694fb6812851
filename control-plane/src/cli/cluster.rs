//! The edge to the cluster: the API server, and through it the mesh's own pods, their admin pages by a forwarded port and
//! the agents' answers by a command in their container.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use kube::api::{AttachParams, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::timeout;

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview};
use k8s_openapi::api::core::v1::Pod;

use super::args::Global;
use super::error::{AskError, CliError};
use crate::ingest::kubernetes::describe;

/// Longest answer of a pod that is read, in bytes: a proxy that knows 100,000 workloads answers about 80 MiB.
const MAX_ANSWER: usize = 256 << 20;
/// Longest complaint of a command, in bytes.
const MAX_COMPLAINT: usize = 4096;
/// Objects asked for at a time.
const PAGE: u32 = 500;
/// Most objects of a kind that are looked at.
const MAX_OBJECTS: usize = 500_000;

/// A way to the cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    url: String,
    origin: String,
    timeout: Duration,
}

impl Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads the credentials and asks the API server for its version, which is returned with it.
    ///
    /// # Errors
    /// There are no credentials, or the API server does not answer.
    pub async fn connect(global: &Global) -> Result<(Self, String), CliError> {
        let (mut config, origin) = credentials(global).await?;
        config.connect_timeout = Some(global.timeout);
        config.read_timeout = Some(global.timeout.saturating_mul(6));
        config.default_retry = false;
        let url = config.cluster_url.to_string();
        let client = Client::try_from(config)
            .map_err(|error| CliError::Kubeconfig { origin: origin.clone(), reason: describe(&error) })?;
        let cluster = Self { client, url, origin, timeout: global.timeout };
        let version = match timeout(cluster.timeout, cluster.client.apiserver_version()).await {
            Ok(Ok(version)) => version.git_version,
            // It answers, and may not tell its version to everybody.
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => "unknown".to_owned(),
            Ok(Err(kube::Error::Api(status))) if status.code == 401 => {
                return Err(CliError::Unknown { url: cluster.url, origin: cluster.origin, reason: status.message });
            }
            Ok(Err(error)) => return Err(cluster.unreachable(describe(&error))),
            Err(_) => return Err(cluster.unreachable(format!("no answer within {:?}", cluster.timeout))),
        };
        Ok((cluster, version))
    }

    fn unreachable(&self, reason: String) -> CliError {
        CliError::Unreachable { url: self.url.clone(), origin: self.origin.clone(), reason }
    }

    /// All objects of a kind, page by page, each reduced by `reduce` as it comes.
    ///
    /// # Errors
    /// As [`CliError`] has it.
    pub async fn list<K, T>(
        &self,
        what: &str,
        api: fn(Client, &str) -> Api<K>,
        namespace: &str,
        fields: &str,
        reduce: impl Fn(K) -> T,
    ) -> Result<Vec<T>, CliError>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        let api = api(self.client.clone(), namespace);
        let mut parameters = ListParams::default().limit(PAGE);
        if !fields.is_empty() {
            parameters = parameters.fields(fields);
        }
        let mut found = Vec::new();
        loop {
            let page = match timeout(self.timeout, api.list(&parameters)).await {
                Ok(Ok(page)) => page,
                Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                    return Err(CliError::Forbidden { what: what.to_owned(), reason: status.message });
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 401 => {
                    let (url, origin) = (self.url.clone(), self.origin.clone());
                    return Err(CliError::Unknown { url, origin, reason: status.message });
                }
                Ok(Err(kube::Error::Api(status))) => {
                    return Err(CliError::Api { what: what.to_owned(), reason: status.message });
                }
                Ok(Err(error)) => return Err(self.unreachable(describe(&error))),
                Err(_) => return Err(self.unreachable(format!("no answer within {:?}", self.timeout))),
            };
            found.extend(page.items.into_iter().map(&reduce));
            match page.metadata.continue_ {
                Some(next) if !next.is_empty() && found.len() < MAX_OBJECTS => {
                    parameters = parameters.continue_token(&next);
                }
                _ => return Ok(found),
            }
        }
    }

    /// One object of a namespace; none if there is none.
    ///
    /// # Errors
    /// What the API server says.
    pub async fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, String>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        answer(timeout(self.timeout, api.get_opt(name)).await, self.timeout)
    }

    /// One object without a namespace; none if there is none.
    ///
    /// # Errors
    /// What the API server says.
    pub async fn get_global<K>(&self, name: &str) -> Result<Option<K>, String>
    where
        K: Resource<Scope = k8s_openapi::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::all(self.client.clone());
        answer(timeout(self.timeout, api.get_opt(name)).await, self.timeout)
    }

    /// Whether this user may do something.
    ///
    /// # Errors
    /// What the API server says.
    pub async fn may(&self, attributes: ResourceAttributes) -> Result<bool, String> {
        let mut review = SelfSubjectAccessReview::default();
        review.spec.resource_attributes = Some(attributes);
        let api: Api<SelfSubjectAccessReview> = Api::all(self.client.clone());
        let parameters = kube::api::PostParams::default();
        let asked = api.create(&parameters, &review);
        let answered = answer(timeout(self.timeout, asked).await, self.timeout)?;
        Ok(answered.status.is_some_and(|status| status.allowed))
    }

    /// A page of what a pod serves on its loopback, as JSON.
    ///
    /// # Errors
    /// As [`AskError`] has it.
    pub async fn page<T: DeserializeOwned>(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
        path: &str,
    ) -> Result<T, AskError> {
        let asked = self.page_bytes(namespace, pod, port, path);
        let bytes = timeout(self.timeout, asked).await.map_err(|_| AskError::Timeout(self.timeout))??;
        serde_json::from_slice(&bytes).map_err(|error| AskError::Malformed(error.to_string()))
    }

    async fn page_bytes(&self, namespace: &str, pod: &str, port: u16, path: &str) -> Result<Bytes, AskError> {
        let broken = |error: &dyn std::error::Error| AskError::Connection(describe(error));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let forwarded = api.portforward(pod, &[port]).await;
        let mut forwarded = forwarded.map_err(|error| refused(&error, "pods/portforward"))?;
        let refusal = forwarded.take_error(port);
        let stream = forwarded.take_stream(port).ok_or_else(|| AskError::Connection("no stream".to_owned()))?;
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
            let request = Request::get(path)
                .header(header::HOST, "localhost")
                .header(header::CONNECTION, "close")
                .body(Empty::<Bytes>::new())
                .map_err(|error| broken(&error))?;
            let asked = async {
                let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
                let status = response.status();
                let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
                let body = body.map_err(|error| match error.is::<http_body_util::LengthLimitError>() {
                    true => AskError::TooLong(MAX_ANSWER),
                    false => AskError::Connection(error.to_string()),
                })?;
                if status.is_success() { Ok(body.to_bytes()) } else { Err(AskError::Status(status.to_string())) }
            };
            tokio::pin!(asked);
            tokio::select! {
                done = &mut asked => done,
                ended = connection => match ended {
                    // Everything has come; what is buffered is still to be read.
                    Ok(()) => asked.await,
                    Err(error) => Err(broken(&error)),
                },
            }
        };
        let said = async {
            match refusal {
                Some(refusal) => refusal.await,
                None => None,
            }
        };
        tokio::pin!(exchange, said);
        let done = tokio::select! {
            biased;
            done = &mut exchange => match done {
                // The kubelet says why a moment after it has closed the stream, or before.
                Err(AskError::Connection(reason)) => {
                    let why = timeout(Duration::from_millis(200), said).await.ok().flatten();
                    Err(AskError::Connection(why.unwrap_or(reason)))
                }
                done => done,
            },
            Some(why) = &mut said => Err(AskError::Connection(why)),
        };
        forwarded.abort();
        done
    }

    /// What a command in a pod's container prints.
    ///
    /// # Errors
    /// As [`AskError`] has it; a command that fails says why.
    pub async fn run(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> Result<Vec<u8>, AskError> {
        let ran = self.run_unbounded(namespace, pod, container, command);
        timeout(self.timeout, ran).await.map_err(|_| AskError::Timeout(self.timeout))?
    }

    async fn run_unbounded(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> Result<Vec<u8>, AskError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let parameters = AttachParams::default().container(container).stdin(false).stdout(true).stderr(true);
        let process = api.exec(pod, command.iter().copied(), &parameters).await;
        let mut process = process.map_err(|error| refused(&error, "pods/exec"))?;
        let (stdout, stderr, status) = (process.stdout(), process.stderr(), process.take_status());
        let (said, complained) = tokio::join!(read(stdout, MAX_ANSWER), read(stderr, MAX_COMPLAINT));
        if said.len() > MAX_ANSWER {
            process.abort();
            return Err(AskError::TooLong(MAX_ANSWER));
        }
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        match status {
            Some(status) if status.status.as_deref() == Some("Success") => Ok(said),
            Some(status) => {
                let complained = String::from_utf8_lossy(&complained).trim().to_owned();
                Err(AskError::Status(if complained.is_empty() {
                    status.message.unwrap_or_default()
                } else {
                    complained
                }))
            }
            None => Err(AskError::Connection("it ended without a word of the command's end".to_owned())),
        }
    }
}

/// Objects of all namespaces, or of a kind without.
pub fn all<K: Resource<DynamicType = ()>>(client: Client, _namespace: &str) -> Api<K> {
    Api::all(client)
}

/// Objects of one namespace.
pub fn inside<K>(client: Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    Api::namespaced(client, namespace)
}

/// At most a little more than `max` bytes; the rest is read and dropped, so that the other side can end.
async fn read(from: Option<impl AsyncRead + Unpin>, max: usize) -> Vec<u8> {
    let Some(mut from) = from else { return Vec::new() };
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    // A stream that breaks is told by the command's status, which is missing then.
    if (&mut from).take(limit).read_to_end(&mut bytes).await.is_ok() && bytes.len() <= max {
        return bytes;
    }
    let mut dropped = [0; 4096];
    let mut left = MAX_ANSWER;
    while let Ok(got @ 1..) = from.read(&mut dropped).await {
        left = left.saturating_sub(got);
        if left == 0 {
            break;
        }
    }
    bytes
}

fn answer<T>(answered: Result<kube::Result<T>, tokio::time::error::Elapsed>, patience: Duration) -> Result<T, String> {
    match answered {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(status.message),
        Ok(Err(error)) => Err(describe(&error)),
        Err(_) => Err(format!("no answer within {patience:?}")),
    }
}

/// Why a subresource of a pod cannot be used.
fn refused(error: &kube::Error, resource: &'static str) -> AskError {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            AskError::Forbidden { resource, reason: status.message.clone() }
        }
        kube::Error::Api(status) => AskError::Connection(status.message.clone()),
        // The API server's answer to an upgrade is only known by its code.
        error => match describe(error) {
            text if text.contains("403") => AskError::Forbidden { resource, reason: "403 Forbidden".to_owned() },
            text => AskError::Connection(text),
        },
    }
}

/// The configuration, and where it comes from.
async fn credentials(global: &Global) -> Result<(kube::Config, String), CliError> {
    let options = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
    let (file, origin) = match &global.kubeconfig {
        Some(path) => (Kubeconfig::read_from(path), path.display().to_string()),
        None => (Kubeconfig::read(), default_origin()),
    };
    let wrong = |error: &kube::config::KubeconfigError| CliError::Kubeconfig {
        origin: origin.clone(),
        reason: describe(error),
    };
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            let is_asked_for = global.kubeconfig.is_some() || global.context.is_some();
            return match kube::Config::incluster() {
                Ok(config) if !is_asked_for => Ok((config, "of this pod's service account".to_owned())),
                _ => Err(wrong(&error)),
            };
        }
    };
    let config = kube::Config::from_custom_kubeconfig(file, &options).await.map_err(|error| wrong(&error))?;
    Ok((config, origin))
}

fn default_origin() -> String {
    match std::env::var("KUBECONFIG") {
        Ok(files) if !files.is_empty() => files,
        _ => std::env::home_dir()
            .unwrap_or_else(|| PathBuf::from("~"))
            .join(Path::new(".kube/config"))
            .display()
            .to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_answer_is_cut() {
        assert_eq!(read(Some(&b"abc"[..]), 3).await, b"abc");
        assert_eq!(read(Some(&b"abcdef"[..]), 3).await, b"abcd", "one more than allowed, so that it shows");
        assert_eq!(read(None::<&[u8]>, 3).await, b"");
    }

    #[tokio::test]
    async fn the_kubeconfig_is_named_where_nothing_answers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{port}'}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
        );
        std::fs::write(&path, text).unwrap();
        let mut global = Global {
            kubeconfig: Some(path.clone()),
            context: None,
            namespace: "n".into(),
            output: super::super::args::Output::Table,
            timeout: Duration::from_secs(5),
        };
        let error = Cluster::connect(&global).await.unwrap_err();
        assert!(matches!(error, CliError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        global.context = Some("other".into());
        let error = Cluster::connect(&global).await.unwrap_err();
        assert!(matches!(error, CliError::Kubeconfig { .. }) && error.to_string().contains("other"), "{error}");
    }
}
