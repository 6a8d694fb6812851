//! Validation, as a table: a manifest, and the mistakes that must be found in it.

use serde_json::{Value, json};

use super::{
    DataplaneMode, Document, EntryAddress, Kind, Object, Outcome, Phase, Resolution, ServiceAddresses, TargetPort,
    parse,
};

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
    // As Kubernetes names services from 1.36 on, and with addresses of load balancers for one machine.
    let Object::Service(service) = accepted(
        "{apiVersion: v1, kind: Service, metadata: {name: 1web}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]},
          status: {loadBalancer: {ingress: [{ip: 127.0.0.1}, {ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: Proxy}, {ip: '169.254.1.1'}]}}}",
    ) else {
        panic!("not a service")
    };
    assert_eq!(service.addresses, ServiceAddresses::Given(vec!["10.96.0.1".parse().unwrap()]));
    assert_eq!(service.ingress, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
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
        "{apiVersion: v1, kind: Service, metadata: {name: web.1}, spec: {clusterIP: 127.0.0.1, ports: [{port: 80}]}}",
        &[
            "metadata.name: \"web.1\" is not a name for a Service",
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

fn entry(kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: {kind}, metadata: {{name: e, namespace: ns}}, spec: {{{spec}}}}}"
    )
}

#[test]
fn mistakes_of_entries_are_found() {
    let ports = "ports: [{number: 80, name: http, protocol: HTTP}]";
    let hosts = "hosts: [a.example.com]";
    let endpoint = |endpoint: &str| format!("{hosts}, {ports}, resolution: STATIC, endpoints: [{{{endpoint}}}]");
    let port = |port: &str| format!("{hosts}, ports: [{{number: 80, name: http}}, {{{port}}}]");
    for (spec, field) in [
        (ports.to_owned(), "spec.hosts"),
        (format!("hosts: [web], {ports}"), "spec.hosts[0]"),
        (format!("hosts: ['*'], {ports}"), "spec.hosts[0]"),
        (format!("hosts: [a.*.com], {ports}"), "spec.hosts[0]"),
        (format!("hosts: [192.0.2.1], {ports}"), "spec.hosts[0]"),
        (format!("hosts: [a.example.com, A.example.com], {ports}"), "spec.hosts[1]"),
        (format!("{hosts}, {ports}, addresses: [0.0.0.0/0]"), "spec.addresses[0]"),
        (format!("{hosts}, {ports}, addresses: [0.0.0.1/8]"), "spec.addresses[0]"),
        (format!("{hosts}, {ports}, addresses: [10.0.0.0/+8]"), "spec.addresses[0]"),
        (format!("{hosts}, {ports}, addresses: [127.0.0.1]"), "spec.addresses[0]"),
        (format!("{hosts}, {ports}, addresses: [240.240.7.7]"), "spec.addresses[0]"),
        (format!("{hosts}, {ports}, addresses: ['::1/129']"), "spec.addresses[0]"),
        (hosts.to_owned(), "spec.ports"),
        (port("number: 0, name: b"), "spec.ports[1].number"),
        (port("number: 80, name: b"), "spec.ports[1].number"),
        (port("number: 81, name: http"), "spec.ports[1].name"),
        (port("number: 81"), "spec.ports[1].name"),
        (port("number: 81, name: a_b"), "spec.ports[1].name"),
        (port("number: 81, name: b, protocol: SMTP"), "spec.ports[1].protocol"),
        (port("number: 81, name: b, targetPort: 65536"), "spec.ports[1].targetPort"),
        (format!("{hosts}, {ports}, location: MARS"), "spec.location"),
        (format!("{hosts}, {ports}, resolution: MAYBE"), "spec.resolution"),
        (format!("{hosts}, {ports}, resolution: STATIC"), "spec.endpoints"),
        (format!("{hosts}, {ports}, endpoints: [{{address: 192.0.2.1}}]"), "spec.endpoints"),
        (endpoint("address: a.example.com"), "spec.endpoints[0].address"),
        (endpoint("address: 192.0.2.300"), "spec.endpoints[0].address"),
        (endpoint("address: 127.0.0.1"), "spec.endpoints[0].address"),
        (endpoint("address: 'unix:///run/x'"), "spec.endpoints[0].address"),
        (endpoint("ports: {http: 80}"), "spec.endpoints[0].address"),
        (endpoint("address: 192.0.2.1, ports: {http: 65536}"), "spec.endpoints[0].ports[http]"),
        (endpoint("address: 192.0.2.1, network: far"), "spec.endpoints[0].network"),
        (endpoint("address: 192.0.2.1, weight: -1"), "spec.endpoints[0].weight"),
        (endpoint("address: 192.0.2.1, serviceAccount: 'a b'"), "spec.endpoints[0].serviceAccount"),
        (endpoint("address: 192.0.2.1, adress: 192.0.2.2"), "spec.endpoints[0].adress"),
        (endpoint("address: 192.0.2.1}, {address: 192.0.2.1, ports: {http: 81}"), "spec.endpoints[1].address"),
        (endpoint("address: 192.0.2.1") + ", workloadSelector: {labels: {a: b}}", "spec.workloadSelector"),
        (format!("{hosts}, {ports}, resolution: STATIC, workloadSelector: {{}}"), "spec.workloadSelector.labels"),
        (format!("{hosts}, {ports}, workloadSelector: {{labels: {{a: b}}}}"), "spec.workloadSelector"),
        (format!("{hosts}, {ports}, exportTo: [other]"), "spec.exportTo"),
        (format!("{hosts}, {ports}, exportTo: ['~']"), "spec.exportTo"),
        (format!("{hosts}, {ports}, exprotTo: ['.']"), "spec.exprotTo"),
    ] {
        let found = mistakes(&entry("ServiceEntry", &spec));
        assert!(found.iter().any(|mistake| mistake.starts_with(&format!("{field}: "))), "{spec}: {found:?}");
    }
    for (spec, field) in [
        ("ports: {http: 80}", "spec.address"),
        ("address: 192.0.2.1, ports: {http: 0}", "spec.ports[http]"),
        ("address: 192.0.2.1, labels: {'a b': c}", "spec.labels[a b]"),
        ("address: 192.0.2.1, serviceAcount: sa", "spec.serviceAcount"),
    ] {
        let found = mistakes(&entry("WorkloadEntry", spec));
        assert!(found.iter().any(|mistake| mistake.starts_with(&format!("{field}: "))), "{spec}: {found:?}");
    }
}

#[test]
fn entries_are_read_as_they_are_written() {
    let text = entry(
        "ServiceEntry",
        "hosts: [A.example.com, '*.example.org'], addresses: [10.1.2.3/8, 'fd00::1/8', 10.1.1.1], \
        ports: [{number: 80, name: http, protocol: http}, {number: 53, name: dns, protocol: UDP}, {number: 443, name: tls, protocol: TLS, targetPort: 8443}], \
        location: MESH_EXTERNAL, resolution: DNS_ROUND_ROBIN, exportTo: [ns], endpoints: [{address: b.example.org, weight: 0}]",
    );
    for version in ["v1", "v1beta1", "v1alpha3"] {
        let Object::ServiceEntry(read) = accepted(&text.replace("/v1", &format!("/{version}"))) else { panic!() };
        assert_eq!(read.hosts, ["a.example.com".into(), "*.example.org".into()]);
        assert_eq!((read.addresses.len(), read.is_private, read.resolution), (3, true, Resolution::Dns));
        let ports: Vec<_> =
            read.ports.iter().map(|port| (port.name.as_str(), port.port, port.target.clone())).collect();
        assert_eq!(ports, [("http", 80, TargetPort::Number(80)), ("tls", 443, TargetPort::Number(8443))]);
        assert_eq!(read.endpoints[0].address, EntryAddress::Host("b.example.org".to_owned()));
        assert_eq!(read.endpoints[0].weight, None);
    }
    let twice = "hosts: [a.example.com], ports: [{number: 80, name: http}], resolution: STATIC, \
                 endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2}, {address: 192.0.2.1}]";
    let Object::ServiceEntry(read) = accepted(&entry("ServiceEntry", twice)) else { panic!() };
    assert_eq!(read.endpoints.len(), 2);
    let labelled = entry("WorkloadEntry", "address: 'fd00::7', labels: {a: spec, b: spec}")
        .replace("namespace: ns}", "namespace: ns, labels: {a: own}}");
    let Object::WorkloadEntry(read) = accepted(&labelled) else { panic!() };
    let labels: Vec<_> = read.endpoint.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!((labels, read.healthy), (vec!["a=own".to_owned(), "b=spec".to_owned()], true));
}

/// What the API server would drop of an object, nobody here could read.
#[test]
fn the_definitions_of_entries_have_the_fields_that_are_read() {
    let text = include_str!("../../../manifests/crds/networking.istio.io.yaml");
    let keys = |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let fields = |spec: Value| keys(&spec);
    let definitions: Vec<Value> = text.split("\n---\n").map(|text| serde_saphyr::from_str(text).unwrap()).collect();
    let endpoint = fields(serde_json::to_value(super::workload_entry::Spec::default()).unwrap());
    let entry = fields(serde_json::to_value(super::service_entry::Spec::default()).unwrap());
    for (definition, kind, known) in
        [(&definitions[0], Kind::ServiceEntry, &entry), (&definitions[1], Kind::WorkloadEntry, &endpoint)]
    {
        assert_eq!(
            (&definition["spec"]["names"]["kind"], &definition["spec"]["group"]),
            (&json!(kind.as_str()), &json!(kind.group()))
        );
        assert_eq!(definition["metadata"]["name"], json!(format!("{}.{}", kind.plural(), kind.group())));
        let versions = definition["spec"]["versions"].as_array().unwrap();
        assert_eq!(versions.len(), 3);
        for version in versions {
            assert!(kind.reads_version(version["name"].as_str().unwrap()));
            let properties = &version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
            let mut defined = keys(properties);
            defined.sort();
            let mut known = known.clone();
            known.sort();
            assert_eq!(defined, known, "{kind} {}", version["name"]);
            if kind == Kind::ServiceEntry {
                let mut defined = keys(&properties["endpoints"]["items"]["properties"]);
                defined.sort();
                let mut known = endpoint.clone();
                known.sort();
                assert_eq!(defined, known);
            }
        }
    }
}
