//! Twilio's signature, against all the vectors that Twilio has published, and its form.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use crate::parties::twilio::{Form, caller, is_sid, signature_is_valid, url_with_and_without_port};
use crate::toolbox::failure::Secret;

/// Twilio's own example, in the tests of all its libraries.
const URL: &str = "https://mycompany.com/myapp.php?foo=1&bar=2";
const CALL: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675309"),
    ("Digits", "1234"),
    ("From", "+14158675309"),
    ("To", "+18005551212"),
];

const CALL_AND_REASONS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675309"),
    ("Digits", "1234"),
    ("From", "+14158675309"),
    ("To", "+18005551212"),
    ("Reason", "Participant"),
    ("ReasonConferenceEnded", "test"),
];

const CALL_OF_THE_DOCS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675310"),
    ("Digits", "1234"),
    ("From", "+14158675310"),
    ("To", "+18005551212"),
];

const CALL_OF_THE_OLDER_DOCS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+12349013030"),
    ("Digits", "1234"),
    ("From", "+12349013030"),
    ("To", "+18005551212"),
];

/// Row in the table of published vectors, URL, form, signature.
type Vector = (u32, &'static str, &'static [(&'static str, &'static str)], &'static str);

/// All of Twilio's published vectors for form posts, made with the Auth Token `12345`. Rows 9 to
/// 11 are missing on purpose: they sign a JSON body by its hash in the URL, and Twilio's voice
/// webhooks are form posts. Row 30 is one that must not verify: see below. Rows 40 and 41 are the
/// upgrade of the media stream, which has no form.
const VECTORS: [Vector; 38] = [
    (1, URL, CALL, "RSOYDt4T1cUTdK1PDd93/VVr8B8="),
    (2, "https://mycompany.com:443/myapp.php?foo=1&bar=2", CALL, "kvajT1Ptam85bY51eRf/AJRuM3w="),
    (3, "http://mycompany.com:80/myapp.php?foo=1&bar=2", CALL, "0ZXoZLH/DfblKGATFgpif+LLRf4="),
    (4, "http://mycompany.com/myapp.php?foo=1&bar=2", CALL, "OyGYPqTF6ztdbRNCvuQO/oPvqQ4="),
    (5, "http://mycompany.com:1234/myapp.php?foo=1&bar=2", CALL, "Zmvh+3yNM1Phv2jhDCwEM3q5ebU="),
    (6, "https://mycompany.com:1234/myapp.php?foo=1&bar=2", CALL, "CYn1h0gLBdNxDGkKJg6hYohgeD8="),
    (
        7,
        URL,
        &[
            ("Sid", "CA123"),
            ("SidAccount", "AC123"),
            ("Digits", "5678"),
            ("Digits", "1234"),
            ("Digits", "1234"),
        ],
        "IK+Dwps556ElfBT0I3Rgjkr1wJU=",
    ),
    (
        8,
        URL,
        &[
            ("MessagingBinding.Address", "+1325xxxxxxx"),
            ("MessagingBinding.Address", "+1415xxxxxxx"),
        ],
        "83O6e2vORAoJHUNzJjDWN1jz+BA=",
    ),
    (
        8,
        URL,
        &[
            ("MessagingBinding.Address", "+1415xxxxxxx"),
            ("MessagingBinding.Address", "+1325xxxxxxx"),
        ],
        "83O6e2vORAoJHUNzJjDWN1jz+BA=",
    ),
    (
        12,
        "https://user:pass@mycompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "CukzLTc1tT5dXEDIHm/tKBanW10=",
    ),
    (13, "https://user@mycompany.com/myapp.php?foo=1&bar=2", CALL, "2YRLlVAflCqxaNicjMpJcSTgzSs="),
    (
        14,
        "https://user:pass@mycompany.com:443/myapp.php?foo=1&bar=2",
        CALL,
        "ZQFR1PTIZXF2MXB8ZnKCvnnA+rI=",
    ),
    (
        15,
        "https://user@mycompany.com:443/myapp.php?foo=1&bar=2",
        CALL,
        "aZfj4hyX1MLZhSS6QIL18Vn2/RA=",
    ),
    (
        16,
        "https://mycompany.com/myapp.php?foo=1&bar=2&Body=It%27s+amazing",
        CALL,
        "TfZzewPq8wqrGlMfyAud8+/IvJ0=",
    ),
    (17, URL, &[], "zYQTYrRWXE7LtzbG4PfP7/bkkGo="),
    (18, "https://mycompany.com/myapp.php", CALL, "1xaxFBvyzXYvWplzNOSs28HWO94="),
    (
        19,
        "https://mycompany.com/myapp.php?foo=1&bar=2\
         &type=thiswontbeusedinthesignaturegeneratorandsoshouldbeignored",
        CALL,
        "hYkNsTBttoNGkyCS0p+wWmQoRTg=",
    ),
    (
        20,
        "https://mycompany.com/myapp.php?foo=hello%20world&bar=test%2Bvalue",
        CALL,
        "er2tvAP1Wx+iuTTE2BPgvEaN1cs=",
    ),
    (
        21,
        URL,
        &[
            ("Message", "Hello & goodbye! @#$%^*()"),
            ("From", "+1 (415) 867-5309"),
            ("Special", "unicode: ñáéíóú"),
        ],
        "dCPiR4WtQ6QFN6pJh81CtlCcWLQ=",
    ),
    (
        22,
        URL,
        &[("Digits", ""), ("CallSid", "CA1234567890ABCDE"), ("EmptyParam", "")],
        "9HHp/OqQMEwdrVebHDdA/+tqjX8=",
    ),
    (
        23,
        URL,
        &[("Digits", ""), ("CallSid", "CA1234567890ABCDE"), ("NullParam", "")],
        "L9lTTwIlxM1xGAtLRwhOSZggRhM=",
    ),
    (
        24,
        URL,
        &[("Zebra", "last"), ("Alpha", "first"), ("Beta", "second"), ("Gamma", "third")],
        "enveUe73ZTVLAekHxez3Qx6JuuQ=",
    ),
    (
        25,
        URL,
        &[("callSid", "lowercase"), ("CallSid", "uppercase"), ("CALLSID", "allcaps")],
        "jDK7WKT8wiNrwggd4ceTv4e1MJ4=",
    ),
    (26, "https://mycompany.com/webhook/España?año=2023", CALL, "G/Hx6mqqnjUNlPAoi2Sp9bGst0g="),
    (27, "https://mycompany.com:443//myapp.php?foo=1&bar=2", CALL, "A9lH3u16NjyiiM/+wylw5rirFUs="),
    (28, URL, CALL_AND_REASONS, "vOEb5UThFn24KEfnOFLQY2AE5FY="),
    (
        29,
        "http://mycompany.com/myapp.php?foo=1&bar=2",
        CALL_AND_REASONS,
        "n2xBNyzSW7rfYStDtOFiFMv7qNo=",
    ),
    (31, URL, &[("property", "value"), ("boolean", "true")], "NBdBDr/T/lgjI+tlgpXjKZQZs/k="),
    (32, "https://MyCompany.com/myapp.php?foo=1&bar=2", CALL, "g9IN/x4Cft2g517EjYvEvM/W7LU="),
    (33, "https://MyCompany.com:1234/myapp.php?foo=1&bar=2", CALL, "PCqOZm8cnu/L6+u5i5fuEd+Iac4="),
    (34, "http://MyCompany.com/myapp.php?foo=1&bar=2", CALL, "XY7AlKOKL6im4yWyX84gldUrtis="),
    (
        35,
        "http://username:password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "PJ08CxXr7KLPjEQCTc8LkUSMwSM=",
    ),
    (
        36,
        "http://Username:Password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "SkTSKyDJH9kUlhItI0slbgZ1UsI=",
    ),
    (
        37,
        "HTTP://username:password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "hy/l8pca+LFms4cvRdv8uiP6NGc=",
    ),
    (
        38,
        "https://example.com/myapp.php?foo=1&bar=2",
        CALL_OF_THE_DOCS,
        "L/OH5YylLD5NRKLltdqwSvS0BnU=",
    ),
    (39, URL, CALL_OF_THE_OLDER_DOCS, "0/KCTR6DLpKmkAf8muzZqo1nDgQ="),
    (40, "wss://mycompany.com/media-stream", &[], "N2Y//FHA042H22oVtTOPT1X3yoU="),
    (41, "wss://mycompany.com/media-stream/", &[], "B+WT+LSnUu+RWlK9v/62zQuXpec="),
];

/// The form goes over the wire first, as Twilio sends it: `+` becomes `%2B`, a blank becomes `+`.
fn verifies(token: &str, url: &str, form: &[(&str, &str)], signature: &str) -> bool {
    let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
    signature_is_valid(&Secret(token.to_owned()), url, &Form::parse(body.as_bytes()), signature)
}

fn signature_of_row(wanted: u32) -> &'static str {
    let row = VECTORS.iter().find(|(row, ..)| *row == wanted);
    row.map(|(_, _, _, signature)| *signature).unwrap()
}

#[test]
fn twilios_published_signatures_are_accepted() {
    for (row, url, form, signature) in VECTORS {
        assert!(verifies("12345", url, form, signature), "row {row}");
        let mut backwards = form.to_vec();
        backwards.reverse();
        assert!(verifies("12345", url, &backwards, signature), "row {row}, form in another order");
    }
}

#[test]
fn a_signature_is_accepted_with_and_without_the_port() {
    let with_port = |port: u32| format!("https://mycompany.com:{port}/myapp.php?foo=1&bar=2");
    let plain_with_port = |port: u32| format!("http://mycompany.com:{port}/myapp.php?foo=1&bar=2");
    let plain = "http://mycompany.com/myapp.php?foo=1&bar=2".to_owned();
    let cases = [
        (1, with_port(443), CALL),
        (1, with_port(1_234), CALL),
        (2, URL.to_owned(), CALL),
        (3, plain.clone(), CALL),
        (4, plain_with_port(80), CALL),
        (4, plain_with_port(1_234), CALL),
        (29, plain_with_port(1_234), CALL_AND_REASONS),
        (40, "wss://mycompany.com:443/media-stream".to_owned(), &[]),
    ];
    for (row, url, form) in cases {
        assert!(verifies("12345", &url, form, signature_of_row(row)), "row {row} for {url}");
    }
}

/// What is wrong, URL, form, signature.
type Wrong<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str);

#[test]
fn a_wrong_signature_is_refused() {
    let row_1 = signature_of_row(1);
    let not_row_1 = format!("NOT{row_1}");
    let cases: [Wrong; 20] = [
        ("row 30: names in the wrong order", URL, CALL_AND_REASONS, "95+Bu0JVPi0r/SsESZCVf0dWAjw="),
        ("NOT and row 1", URL, CALL, &not_row_1),
        ("empty, or no header at all", URL, CALL, ""),
        ("row 1 for row 32", "https://MyCompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1 for row 33", "https://MyCompany.com:1234/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1 for row 34", "http://MyCompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("the docs' first sample", URL, CALL, "Np1nax6uFoY6qpfT5l9jWwJeit0="),
        ("the docs' second sample", URL, CALL, "hqeF3G9Hrnv6/R0jOhoYDD2PPUs="),
        ("row 1 without its form", URL, &[], row_1),
        ("row 17 with a form", URL, CALL, signature_of_row(17)),
        ("row 1 with one value changed", URL, CALL_OF_THE_DOCS, row_1),
        ("row 1 with one more field", URL, CALL_AND_REASONS, row_1),
        ("row 1 for http", "http://mycompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1, query turned round", "https://mycompany.com/myapp.php?bar=2&foo=1", CALL, row_1),
        ("row 1 for another path", "https://mycompany.com/myapp.php/?foo=1&bar=2", CALL, row_1),
        (
            "row 5 for another port",
            "http://mycompany.com:1235/myapp.php?foo=1&bar=2",
            CALL,
            signature_of_row(5),
        ),
        ("row 40 for https", "https://mycompany.com/media-stream", &[], signature_of_row(40)),
        ("row 1, cut short", URL, CALL, &row_1[..24]),
        ("row 1 without its padding", URL, CALL, row_1.trim_end_matches('=')),
        ("not base64", URL, CALL, "é/Ω not base64 at all ="),
    ];
    for (why, url, form, signature) in cases {
        assert!(!verifies("12345", url, form, signature), "{why}");
    }
    for token in ["", "12346", "123456", "1234"] {
        assert!(!verifies(token, URL, CALL, row_1), "row 1 with the token {token:?}");
    }
    let urlsafe = row_1.replace('/', "_");
    assert!(!verifies("12345", URL, CALL, &urlsafe), "base64 of the other alphabet");
}

#[test]
fn a_url_is_tried_with_and_without_its_port() {
    let cases = [
        ("https://h/p", "https://h/p", "https://h:443/p"),
        ("http://h/p", "http://h/p", "http://h:80/p"),
        ("wss://h/p", "wss://h/p", "wss://h:443/p"),
        ("https://h:8443/p?a=1:2", "https://h/p?a=1:2", "https://h:8443/p?a=1:2"),
        ("https://h", "https://h", "https://h:443"),
        ("https://h:8443", "https://h", "https://h:8443"),
        ("https://h?to=sip:x@y:5060", "https://h?to=sip:x@y:5060", "https://h:443?to=sip:x@y:5060"),
        ("https://u:p@h/p@q:1", "https://u:p@h/p@q:1", "https://u:p@h:443/p@q:1"),
        ("https://u:1@h:2/p", "https://u:1@h/p", "https://u:1@h:2/p"),
        ("https://[::1]/p", "https://[::1]/p", "https://[::1]:443/p"),
        ("https://[::1]:8443/p", "https://[::1]/p", "https://[::1]:8443/p"),
        ("/p", "/p", "/p"),
        ("", "", ""),
    ];
    for (url, without, with) in cases {
        assert_eq!(url_with_and_without_port(url), [without, with], "{url}");
    }
}

#[test]
fn a_form_is_decoded_whatever_is_in_it() {
    let body = "CallSid=CA1&From=%2B4930123456&CallerName=J%C3%BCrgen+M%C3%BCller&FromCity=&\
                StirVerstat=NULL&New.Field_7=x%26y%3Dz&&Bare&=nameless&CallSid=CA2&Bad=%ff%zz";
    let form = Form::parse(body.as_bytes());
    let cases = [
        ("CallSid", "CA1"),
        ("From", "+4930123456"),
        ("CallerName", "Jürgen Müller"),
        ("FromCity", ""),
        ("New.Field_7", "x&y=z"),
        ("Bare", ""),
        ("", "nameless"),
        ("Bad", "\u{fffd}%zz"),
        ("callsid", ""),
        ("Absent", ""),
    ];
    for (name, value) in cases {
        assert_eq!(form.get(name), value, "{name}");
    }
    assert_eq!(form.0.len(), 10, "a field that comes twice is kept twice: {:?}", form.0);
    for body in [b"".as_slice(), b"&&&", b"\xff\xfe"] {
        assert_eq!(Form::parse(body).get("CallSid"), "");
    }
}

#[test]
fn a_call_id_has_twilios_shape_and_not_a_character_more_or_less() {
    let digits = "1234567890abcdefABCDEF1234567890";
    assert!(is_sid("CA", &format!("CA{digits}")) && is_sid("PN", &format!("PN{digits}")));
    for bad in ["", "CA", "CA1", digits, "../../etc/passwd", &"a".repeat(34)] {
        assert!(!is_sid("CA", bad), "{bad:?}");
    }
    let cut = &digits[1..];
    for bad in [
        format!("CA{digits}0"),
        format!("CA{cut}"),
        format!("ca{digits}"),
        format!("PN{digits}"),
        format!("CA{cut}g"),
        format!("CA{cut}/"),
        format!("CA+{cut}"),
        format!(" CA{digits}"),
        format!("CA{}ä", &digits[2..]),
    ] {
        assert!(!is_sid("CA", &bad), "{bad:?}");
    }
}

#[test]
fn a_withheld_number_is_a_word_however_it_is_written() {
    for (number, word) in [
        ("+266696687", "anonymous"),
        ("+7378742833", "restricted"),
        ("+86282452253", "unavailable"),
        ("+8656696", "unknown"),
        ("+2562533", "blocked"),
        ("+7748283", "private"),
    ] {
        assert_eq!(caller(number), word);
    }
    for as_it_is in
        ["", "anonymous", "266696687", "+2666966870", "+17378742833", "+4930123456", "client:anna"]
    {
        assert_eq!(caller(as_it_is), as_it_is);
    }
}
