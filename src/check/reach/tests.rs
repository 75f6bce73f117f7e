use super::leads_nowhere_outside;

#[test]
fn what_twilio_cannot_reach() {
    for host in [
        "localhost",
        "LOCALHOST.",
        "pbx.localhost",
        "pbx",
        "printer.local",
        "pbx.home.arpa",
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.20",
        "169.254.7.7",
        "100.64.0.1",
        "100.127.255.255",
        "[::1]",
        "[fd00::1]",
        "[fe80::1]",
        "[::ffff:192.168.1.20]",
    ] {
        assert!(leads_nowhere_outside(host), "{host}");
    }
    for host in [
        "pbx.example",
        "localhost.example",
        "notlocal.example",
        "203.0.113.7",
        "172.32.0.1",
        "100.63.255.255",
        "100.128.0.1",
        "[2001:db8::7]",
    ] {
        assert!(!leads_nowhere_outside(host), "{host}");
    }
}
