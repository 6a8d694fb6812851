//! Validation, as a table: a manifest, and the mistakes that must be found in it.

use super::{DataplaneMode, Document, Object, Outcome, Phase, ServiceAddresses, TargetPort, parse};

fn one(text: &str) -> Outcome {
    let mut documents = parse(text);
    assert_eq!(documents.len(), 1, "{documents:?}");
    documents.remove(0).outcome
}

fn accepted(text: &str) -> Object {
    match one(text) {
        Outcome::Object(object) => object,
        other => panic!("not accepted: {other:?}"),
    }
}

/// `field: message` of every mistake, in order.
fn mistakes(text: &str) -> Vec<String> {
    match one(text) {
        Outcome::Refused { problems, .. } => {
            assert!(problems.iter().all(|problem| !problem.fix.is_empty()), "a mistake without a fix: {problems:?}");
            problems.iter().map(|problem| format!("{}: {}", problem.field, problem.message)).collect()
        }
        other => panic!("not refused: {other:?}"),
    }
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: reviews-v1-6d4b-x
  namespace: bookinfo
  uid: 6b2f
  creationTimestamp: 2026-01-02T03:04:05Z
  labels: {app: reviews, version: v1, pod-template-hash: 6d4b}
  annotations: {ambient.istio.io/redirection: enabled}
  ownerReferences:
    - {apiVersion: apps/v1, kind: ReplicaSet, name: reviews-v1-6d4b, uid: r1, controller: true}
spec:
  serviceAccountName: bookinfo-reviews
  nodeName: node-1
  containers:
    - name: reviews
      image: culvert.dev/samples/bookinfo-reviews:v1
      ports: [{name: http, containerPort: 9080}]
status:
  phase: Running
  podIP: 10.244.1.5
  podIPs: [{ip: 10.244.1.5}, {ip: 'fd00::5'}]
  conditions: [{type: Ready, status: 'True'}]
";

#[test]
fn a_pod_is_read() {
    let Object::Pod(pod) = accepted(POD) else { panic!("not a pod") };
    assert_eq!(pod.name.to_string(), "bookinfo/reviews-v1-6d4b-x");
    assert_eq!((pod.uid.as_ref(), pod.node.as_ref()), ("6b2f", "node-1"));
    assert_eq!(pod.service_account.as_ref(), "bookinfo-reviews");
    assert_eq!(pod.addresses, ["10.244.1.5".parse::<std::net::IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
    assert!(pod.captured && pod.ready && !pod.host_network && !pod.terminating);
    assert_eq!((pod.phase, pod.mode), (Phase::Running, DataplaneMode::Unset));
    assert_eq!(pod.ports[0].port, 9080);
    assert_eq!(pod.owner.as_ref().unwrap().name, "reviews-v1-6d4b");
    assert_eq!(pod.created.unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), 1_767_323_045);
}

#[test]
fn a_service_is_read() {
    let Object::Service(service) = accepted(
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [
          {name: http, port: 80, targetPort: web}, {name: metrics, port: 9090},
          {name: dns, port: 53, protocol: UDP}]}}",
    ) else {
        panic!("not a service")
    };
    assert_eq!(service.name.to_string(), "default/web");
    assert_eq!(service.addresses, ServiceAddresses::Allocate);
    let targets: Vec<_> = service.ports.iter().map(|port| (port.port, port.target.clone())).collect();
    assert_eq!(targets, [(80, TargetPort::Named("web".to_owned())), (9090, TargetPort::Number(9090))]);
}

/// Name, manifest, mistakes.
const MISTAKES: &[(&str, &str, &[&str])] = &[
    ("no name", "{apiVersion: v1, kind: Namespace, metadata: {labels: {a: b}}}", &["metadata.name: is missing"]),
    ("no kind", "{apiVersion: v1, metadata: {name: a}}", &["kind: is missing"]),
    (
        "old version",
        "{apiVersion: apps/v1beta1, kind: Deployment, metadata: {name: a}}",
        &["apiVersion: \"apps/v1beta1\" is not read for Deployment"],
    ),
    (
        "typo in a mode",
        "{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: {istio.io/dataplane-mode: ambeint}}}",
        &["metadata.labels[istio.io/dataplane-mode]: \"ambeint\" is not a mode"],
    ),
    (
        "bad names",
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: A_b, namespace: x.y}}",
        &[
            "metadata.namespace: \"x.y\" is not a namespace name",
            "metadata.name: \"A_b\" is not a name for a ServiceAccount",
        ],
    ),
    (
        "namespaced namespace",
        "{apiVersion: v1, kind: Namespace, metadata: {name: a, namespace: b}}",
        &["metadata.namespace: a Namespace lives outside namespaces"],
    ),
    (
        "label that is none",
        "{apiVersion: v1, kind: Node, metadata: {name: a, labels: {zone: '-x'}}}",
        &["metadata.labels[zone]: \"-x\" is not a label value"],
    ),
    (
        "misspelt field",
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selecter: {app: web}, ports: [{port: 80}]}}",
        &["spec.selecter: is not a field of this kind"],
    ),
    (
        "wrong type",
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: eighty}]}}",
        &["spec.ports[0].port: invalid type: string \"eighty\", expected i32"],
    ),
    (
        "service ports",
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [
               {port: 80, name: a}, {port: 80, name: a}, {port: 70000, name: b}, {port: 81, name: c, protocol: tcp},
               {port: 82, targetPort: '8080', name: d}, {port: 83}]}}",
        &[
            "spec.ports[1].name: \"a\" is used twice",
            "spec.ports[1].port: TCP port 80 is there twice",
            "spec.ports[2].port: 70000 is not a port",
            "spec.ports[3].protocol: \"tcp\" is not a protocol",
            "spec.ports[4].targetPort: \"8080\" is neither a port number nor a port name",
            "spec.ports[5].name: is missing",
        ],
    ),
    (
        "service addresses",
        "{apiVersion: v1, kind: Service, metadata: {name: 1web}, spec: {clusterIP: 127.0.0.1, ports: [{port: 80}]}}",
        &[
            "metadata.name: \"1web\" is not a name for a Service",
            "spec.clusterIP: 127.0.0.1 cannot be reached from another node",
        ],
    ),
    (
        "service without ports",
        "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}}}",
        &["spec.ports: is empty"],
    ),
    (
        "deployment that does not select its pods",
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: {selector: {matchLabels: {app: a}},
              template: {metadata: {labels: {app: b}}, spec: {containers: [{name: a}]}}}}",
        &["spec.selector.matchLabels[app]: \"a\" is not among the labels of the template"],
    ),
    (
        "pod without containers, with a bad address and phase",
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: []},
              status: {podIP: 10.0.0.256, phase: Sleeping}}",
        &[
            "status.podIP: \"10.0.0.256\" is not an IP address",
            "spec.containers: is empty",
            "status.phase: \"Sleeping\" is not a phase",
        ],
    ),
    (
        "slice of the wrong family",
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: a}, addressType: IPv6,
              endpoints: [{addresses: [10.0.0.1]}, {addresses: []}], ports: [{port: 0}]}",
        &[
            "endpoints[0].addresses[0]: 10.0.0.1 is not of the slice's addressType",
            "endpoints[1].addresses: is empty",
            "ports[0].port: 0 is not a port",
        ],
    ),
];

#[test]
fn mistakes_are_found_with_their_field() {
    for (name, text, expected) in MISTAKES {
        let mut found = mistakes(text);
        let mut expected = expected.to_vec();
        found.sort();
        expected.sort_unstable();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn a_misspelt_field_gets_a_suggestion() {
    let Outcome::Refused { problems, .. } =
        one("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: None, selectr: {app: web}}}")
    else {
        panic!("accepted")
    };
    assert_eq!(problems[0].fix, "did you mean selector?");
}

#[test]
fn what_kubernetes_writes_itself_is_no_mistake() {
    // Empty values, times with fractions, quantities, managed fields: all come back from `kubectl get -o yaml`.
    accepted(
        "
apiVersion: v1
kind: Pod
metadata:
  name: a
  creationTimestamp: null
  deletionTimestamp: 2026-01-02T03:04:05.123Z
  managedFields: [{manager: kubectl, operation: Apply, fieldsType: FieldsV1, fieldsV1: {'f:spec': {'f:x': {}}}}]
spec:
  containers: [{name: a, resources: {limits: {cpu: 500m, memory: 1Gi}}, livenessProbe: {httpGet: {path: /, port: http}}}]
  volumes: [{name: tmp, emptyDir: {}}]
status: {}
",
    );
}

#[test]
fn foreign_kinds_are_ignored_but_never_those_of_a_mesh() {
    assert!(matches!(one("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}"), Outcome::Ignored { .. }));
    assert!(matches!(
        one("{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: a}}"),
        Outcome::Ignored { .. }
    ));
    for kind in ["security.istio.io/v1, kind: RequestAuthentication", "networking.istio.io/v1, kind: Gateway"] {
        let outcome = one(&format!("{{apiVersion: {kind}, metadata: {{name: a}}}}"));
        assert!(matches!(outcome, Outcome::Unsupported { .. }), "{outcome:?}");
    }
}

#[test]
fn documents_are_independent() {
    let documents = parse(
        "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkey: [1, 2\n---\n\
         apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n\
         - {apiVersion: v1, kind: Namespace, metadata: {name: c}}\n---\n",
    );
    let summary: Vec<_> = documents
        .iter()
        .map(|Document { line, outcome }| match outcome {
            Outcome::Object(object) => format!("{line} {}", object.id()),
            Outcome::Refused { label, .. } => format!("{line} refused {label}"),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(summary, ["2 Namespace a", "6 refused document at line 6", "8 Namespace b", "8 Namespace c"]);
}

#[test]
fn hostile_text_is_refused_in_bounded_time() {
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e]\n\
                g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n";
    assert!(matches!(one(bomb), Outcome::Refused { id: None, .. }));
    let deep = "[".repeat(10_000);
    assert!(matches!(one(&deep), Outcome::Refused { id: None, .. }));
    let keys: String = (0..1000).map(|number| format!("f{number}: x, ")).collect();
    let Outcome::Refused { problems, .. } =
        one(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: a}}, spec: {{{keys}}}}}"))
    else {
        panic!("accepted")
    };
    assert!(problems.len() < 50, "{} mistakes", problems.len());
}

fn policy(kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: p, namespace: ns}}, spec: {{{spec}}}}}"
    )
}

#[test]
fn mistakes_of_policies_are_found() {
    let rule = |rule: &str| format!("rules: [{{{rule}}}]");
    let source = |source: &str| rule(&format!("from: [{{source: {{{source}}}}}]"));
    let found = |spec: String| mistakes(&policy("AuthorizationPolicy", &spec));
    for (spec, field) in [
        ("action: ALOW".to_owned(), "spec.action"),
        ("action: CUSTOM".to_owned(), "spec.action"),
        ("action: AUDIT".to_owned(), "spec.action"),
        ("actoin: DENY".to_owned(), "spec.actoin"),
        ("selector: {matchLabels: {app: 'a b'}}".to_owned(), "spec.selector.matchLabels[app]"),
        ("selector: {matchExpressions: [{key: a}]}".to_owned(), "spec.selector.matchExpressions"),
        ("selector: {}, targetRefs: [{kind: Service, name: a}]".to_owned(), "spec.selector"),
        ("targetRefs: [{kind: Pod, name: a}]".to_owned(), "spec.targetRefs[0]"),
        ("targetRef: {kind: Service, name: a, namespace: other}".to_owned(), "spec.targetRef.namespace"),
        (rule("from: []"), "spec.rules[0].from"),
        (rule("from: [{}]"), "spec.rules[0].from[0].source"),
        (rule("to: [{operation: {}}]"), "spec.rules[0].to[0].operation"),
        (rule("form: [{source: {namespaces: [a]}}]"), "spec.rules[0].form"),
        (rule("to: [{operation: {ports: ['0']}}]"), "spec.rules[0].to[0].operation.ports[0]"),
        (rule("to: [{operation: {ports: ['+80']}}]"), "spec.rules[0].to[0].operation.ports[0]"),
        (rule("to: [{operation: {ports: ['65616']}}]"), "spec.rules[0].to[0].operation.ports[0]"),
        (rule("to: [{operation: {ports: [80]}}]"), "spec.rules[0].to[0].operation.ports[0]"),
        (rule("when: [{key: source.mood, values: [good]}]"), "spec.rules[0].when[0].key"),
        (rule("when: [{key: source.ip}]"), "spec.rules[0].when[0]"),
        (rule("when: [{key: source.ip, notValues: [nowhere]}]"), "spec.rules[0].when[0].notValues[0]"),
        (source("ipBlocks: [10.0.0.0/33]"), "spec.rules[0].from[0].source.ipBlocks[0]"),
        (source("notIpBlocks: [10.0.0.0/+8]"), "spec.rules[0].from[0].source.notIpBlocks[0]"),
        (source("principals: ['']"), "spec.rules[0].from[0].source.principals"),
        (source("principals: [], namespaces: [a]"), "spec.rules[0].from[0].source.principals"),
        (source("principals: [a*b]"), "spec.rules[0].from[0].source.principals[0]"),
        (source("notNamespaces: ['*a*']"), "spec.rules[0].from[0].source.notNamespaces[0]"),
        (source("serviceAccounts: ['ns/*']"), "spec.rules[0].from[0].source.serviceAccounts[0]"),
        (source("serviceAccounts: [a], namespaces: [b]"), "spec.rules[0].from[0].source.serviceAccounts"),
        (source("principal: [a]"), "spec.rules[0].from[0].source.principal"),
    ] {
        let found = found(spec.clone());
        assert!(found.iter().any(|mistake| mistake.starts_with(&format!("{field}: "))), "{spec}: {found:?}");
    }
    let Outcome::Refused { problems, .. } = one(&policy("AuthorizationPolicy", &source("principal: [a]"))) else {
        panic!()
    };
    assert_eq!(problems[0].fix, "did you mean principals?");
    for (spec, field) in [
        ("mtls: {mode: STRIKT}", "spec.mtls.mode"),
        ("mtls: STRICT", "spec.mtls"),
        ("portLevelMtls: {80: {mode: STRICT}}", "spec.portLevelMtls"),
        ("selector: {matchLabels: {a: b}}, portLevelMtls: {web: {mode: STRICT}}", "spec.portLevelMtls[web]"),
        ("selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: MAYBE}}", "spec.portLevelMtls[80].mode"),
    ] {
        let found = mistakes(&policy("PeerAuthentication", spec));
        assert!(found.iter().any(|mistake| mistake.starts_with(&format!("{field}: "))), "{spec}: {found:?}");
    }
}

#[test]
fn older_versions_of_a_kind_are_read() {
    let text = policy("AuthorizationPolicy", "rules: [{}]");
    for version in ["v1", "v1beta1"] {
        accepted(&text.replace("/v1", &format!("/{version}")));
    }
    assert_eq!(mistakes(&text.replace("/v1", "/v2"))[0].split(':').next(), Some("apiVersion"));
}
