use std::time::Duration;

use super::*;
use crate::ca::token::{AUDIENCE, Caller};

fn open(dir: &Path) -> Result<State, StateError> {
    State::open(dir, "cluster.local", SystemTime::now())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keys_are_made_once_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let first = open(&path).unwrap();
    assert_eq!((mode(&path.join("ca.pem")), mode(&path.join("token-key.pem"))), (0o600, 0o600));
    assert_eq!(mode(&path.join("root.pem")), 0o644);
    assert_eq!(fs::read_to_string(path.join("root.pem")).unwrap(), first.authority.roots_pem());
    assert!(!fs::read_to_string(path.join("root.pem")).unwrap().contains("PRIVATE"));
    let names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "nothing left over: {names:?}");

    let second = open(&path).unwrap();
    assert_eq!(first.authority.roots_pem(), second.authority.roots_pem());
    let caller = Caller { namespace: "a".to_owned(), service_account: "b".to_owned(), pod: None, node: None };
    let now = SystemTime::now();
    let token = first.token_key.mint(&caller, AUDIENCE, Duration::from_secs(60), now).unwrap();
    assert_eq!(second.token_key.verify(&token, AUDIENCE, now).unwrap(), caller);
    let alone = open_token_key(&path).unwrap();
    assert_eq!(alone.verify(&token, AUDIENCE, now).unwrap(), caller);
}

#[test]
fn processes_that_start_together_agree() {
    let dir = tempfile::tempdir().unwrap();
    let states: Vec<State> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| open(dir.path()).unwrap())).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    let roots: Vec<String> = states.iter().map(|state| state.authority.roots_pem()).collect();
    assert!(roots.iter().all(|root| *root == roots[0]));
    assert!(states.iter().all(|state| state.token_key.expose_pem() == states[0].token_key.expose_pem()));
}

#[test]
fn keys_that_others_may_read_are_refused() {
    for name in ["ca.pem", "token-key.pem"] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap();
        let path = dir.path().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, StateError::Exposed { mode: 0o640, .. }), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}

#[test]
fn broken_files_are_named_and_not_replaced() {
    for name in ["ca.pem", "token-key.pem"] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap();
        let path = dir.path().join(name);
        fs::write(&path, "broken").unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "broken");
    }
}

#[test]
fn an_authority_can_be_plugged_in() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let root = Authority::generate("example.org", now).unwrap();
    let intermediate = root.intermediate("cluster.local", now).unwrap();
    let plugged = dir.path().join("cacerts");
    fs::create_dir(&plugged).unwrap();
    let texts = [
        ("ca-cert.pem", intermediate.certificate_pem()),
        ("ca-key.pem", intermediate.key_pem().expose().to_owned()),
        ("root-cert.pem", root.roots_pem()),
    ];
    for (name, text) in &texts {
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(&error, StateError::Missing { path } if path.ends_with(name)), "{error}");
        fs::write(plugged.join(name), text).unwrap();
    }
    let state = open(dir.path()).unwrap();
    assert_eq!(state.authority.certificate_pem(), intermediate.certificate_pem());
    assert_eq!(fs::read_to_string(dir.path().join("root.pem")).unwrap(), root.roots_pem());
    assert!(!dir.path().join("ca.pem").exists());

    fs::write(plugged.join("root-cert.pem"), Authority::generate("example.org", now).unwrap().roots_pem()).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("do not verify under its roots"), "{error}");
}

#[test]
fn further_roots_are_handed_out() {
    let dir = tempfile::tempdir().unwrap();
    let next = Authority::generate("cluster.local", SystemTime::now()).unwrap();
    let own = open(dir.path()).unwrap().authority.roots_pem();
    fs::write(dir.path().join("more-roots.pem"), next.roots_pem()).unwrap();
    let state = open(dir.path()).unwrap();
    assert_eq!(state.authority.roots_pem(), own + &next.roots_pem());
    fs::write(dir.path().join("more-roots.pem"), "").unwrap();
    assert!(open(dir.path()).unwrap_err().to_string().contains("more-roots.pem"));
}
