//! The full-duplex socket over loopback: what arrives, how a line ends, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use data_encoding::HEXLOWER;
use tungstenite::Message;
use tungstenite::protocol::Role;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::testing::{DEADLINE, sockets};
use crate::toolbox::socket::{
    AGENT_MESSAGE_BYTES_MAX, Received, Socket, SocketEnd, TWILIO_MESSAGE_BYTES_MAX,
};

/// Twilio's end as we hold it, and ours of the agent's leg, put together.
fn two_ends() -> (Socket, Socket) {
    let (near, far) = sockets();
    (
        Socket::new(near, None, Vec::new(), Role::Server),
        Socket::new(Arc::new(far), None, Vec::new(), Role::Client),
    )
}

/// An end, and a bare socket that can send it anything.
fn end_and_bare_socket(role: Role) -> (Socket, TcpStream) {
    let (near, far) = sockets();
    (Socket::new(near, None, Vec::new(), role), far)
}

/// A message or an end, in one word and its content.
fn heard(end: &Socket) -> String {
    match end.read(DEADLINE) {
        Ok((Received::Text(text), _)) => format!("text {text}"),
        Ok((Received::Binary(bytes), _)) => format!("binary {}", HEXLOWER.encode(&bytes)),
        Err(SocketEnd::Quiet) => "quiet".to_owned(),
        Err(SocketEnd::Closed(code)) => format!("closed {code:?}"),
        Err(SocketEnd::Broken(why)) => format!("broken: {why}"),
        Err(SocketEnd::Nonsense(why)) => format!("nonsense: {why}"),
    }
}

fn say(end: &Socket, text: &str) {
    assert!(end.send(Message::text(text)).is_ok(), "{text} was not sent");
}

/// A frame as it comes off the wire: its first byte and its content, without a mask.
fn frame(socket: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    socket.read_exact(&mut head).unwrap();
    let mut mask = [0; 4];
    if head[1] & 0x80 != 0 {
        socket.read_exact(&mut mask).unwrap();
    }
    let length = usize::from(head[1] & 0x7F);
    assert!(length < 126, "only short frames are looked at");
    let mut content = vec![0; length];
    socket.read_exact(&mut content).unwrap();
    for (byte, key) in content.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    (head[0], content)
}

#[test]
fn text_and_binary_arrive_whole_in_both_directions() {
    let (server, client) = two_ends();
    for (from, to) in [(&server, &client), (&client, &server)] {
        say(from, "");
        say(from, "Grüß Gott");
        assert!(from.send(Message::binary(vec![0x00, 0xFF, 0x7F])).is_ok());
        let long = "x".repeat(TWILIO_MESSAGE_BYTES_MAX);
        say(from, &long);
        assert!(from.send(Message::binary(Vec::new())).is_ok());
        assert_eq!(heard(to), "text ");
        assert_eq!(heard(to), "text Grüß Gott");
        assert_eq!(heard(to), "binary 00ff7f");
        assert!(heard(to) == format!("text {long}"), "a message of the largest size");
        assert_eq!(heard(to), "binary ");
    }
}

#[test]
fn what_came_with_the_handshake_is_heard_first() {
    let (near, mut far) = sockets();
    let early = b"\x81\x02hi\x82\x01\x07\x81\x05wo".to_vec();
    let end = Socket::new(near, None, early, Role::Client);
    far.write_all(b"rld").unwrap();
    assert_eq!(heard(&end), "text hi");
    assert_eq!(heard(&end), "binary 07");
    assert_eq!(heard(&end), "text world");
}

#[test]
fn a_ping_is_answered_while_we_read_on() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x89\x04ping\x8a\x00\x89\x00\x81\x04next").unwrap();
    assert_eq!(heard(&end), "text next");
    assert_eq!(frame(&mut far), (0x8A, b"ping".to_vec()));
    assert_eq!(frame(&mut far), (0x8A, Vec::new()));
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    // "ü" is cut in the middle, and a ping stands between the pieces.
    for byte in b"\x01\x02H\xc3\x89\x00\x00\x01\xbc\x80\x01!\x02\x01\x01\x80\x01\x02" {
        far.write_all(&[*byte]).unwrap();
    }
    assert_eq!(heard(&end), "text Hü!");
    assert_eq!(heard(&end), "binary 0102");
}

#[test]
fn a_goodbye_arrives_with_its_code_and_is_answered() {
    let (server, client) = two_ends();
    say(&server, "last words");
    server.close(CloseCode::Policy, "no token");
    assert_eq!(heard(&client), "text last words");
    assert_eq!(heard(&client), "closed Some(1008)");
    assert_eq!(heard(&server), "closed Some(1008)", "the answer repeats the code");
    assert!(matches!(client.send(Message::text("x")), Err(SocketEnd::Closed(None))));
    assert!(matches!(server.send(Message::text("x")), Err(SocketEnd::Closed(None))));
    server.close(CloseCode::Normal, "a second time does nothing");
    client.close(CloseCode::Normal, "nor here");
}

#[test]
fn what_crosses_our_goodbye_is_still_heard() {
    let (server, client) = two_ends();
    server.close(CloseCode::Normal, "goodbye");
    say(&client, "the mark came back");
    assert_eq!(heard(&server), "text the mark came back");
    assert_eq!(heard(&client), "closed Some(1000)");
}

#[test]
fn a_goodbye_may_lack_a_code_and_a_reason_may_be_long() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x88\x00").unwrap();
    assert_eq!(heard(&end), "closed None");
    assert_eq!(frame(&mut far).0, 0x88);

    let (end, mut far) = end_and_bare_socket(Role::Server);
    end.close(CloseCode::Policy, &"lång ".repeat(100));
    let (first, content) = frame(&mut far);
    assert_eq!((first, &content[..2]), (0x88, 1_008_u16.to_be_bytes().as_slice()));
    assert_eq!(content.len(), 122, "a control frame holds 125 bytes");
}

#[test]
fn a_message_that_is_too_long_is_nonsense_and_the_peer_is_told() {
    let (server, client) = two_ends();
    say(&client, &"x".repeat(TWILIO_MESSAGE_BYTES_MAX + 1));
    assert!(heard(&server).starts_with("nonsense: "));
    assert_eq!(heard(&client), "closed Some(1009)");

    // The announcement alone is enough: nobody waits for, or keeps room for, the rest.
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(&[0x82, 127]).unwrap();
    far.write_all(&(AGENT_MESSAGE_BYTES_MAX as u64 + 1).to_be_bytes()).unwrap();
    assert!(heard(&end).starts_with("nonsense: "));
    assert_eq!(told_off(&mut far), 1_009);

    // In pieces, each of them short enough.
    let (end, mut far) = end_and_bare_socket(Role::Client);
    let piece = vec![0; AGENT_MESSAGE_BYTES_MAX / 2 + 1];
    let writer = thread::spawn(move || {
        for first in [0x02, 0x80] {
            far.write_all(&[first, 127]).unwrap();
            far.write_all(&(piece.len() as u64).to_be_bytes()).unwrap();
            far.write_all(&piece).unwrap();
        }
        told_off(&mut far)
    });
    assert!(heard(&end).starts_with("nonsense: "));
    assert_eq!(writer.join().unwrap(), 1_009);
}

/// The code of the goodbye.
fn told_off(peer: &mut TcpStream) -> u16 {
    let (first, content) = frame(peer);
    assert_eq!(first, 0x88);
    u16::from_be_bytes(content[..2].try_into().unwrap())
}

#[test]
fn what_is_not_websocket_is_nonsense_and_the_peer_is_told() {
    let long_ping = [b"\x89\x7e\x00\x80".as_slice(), &[0; 128]].concat();
    let cases: [(&str, Role, &[u8]); 9] = [
        ("text that is not UTF-8", Role::Client, b"\x81\x02\xff\xff"),
        ("a compressed message nobody agreed on", Role::Client, b"\xc1\x02hi"),
        ("an unknown kind of frame", Role::Client, b"\x83\x00"),
        ("an unknown control frame", Role::Client, b"\x8b\x00"),
        ("a ping in pieces", Role::Client, b"\x09\x00"),
        ("a ping that is too long", Role::Client, &long_ping),
        ("a second piece without a first", Role::Client, b"\x80\x00"),
        ("a mask from where none may come", Role::Client, b"\x81\x82\0\0\0\0hi"),
        ("no mask from where one must come", Role::Server, b"\x81\x02hi"),
    ];
    for (case, role, bytes) in cases {
        let (end, mut far) = end_and_bare_socket(role);
        far.write_all(bytes).unwrap();
        let found = heard(&end);
        assert!(found.starts_with("nonsense: "), "{case}: {found}");
        let code = if case.ends_with("UTF-8") { 1_007 } else { 1_002 };
        assert_eq!(told_off(&mut far), code, "{case}");
    }
}

/// The reading thread answers pings, so it is the one that finds out.
#[test]
fn a_peer_that_takes_nothing_is_dead() {
    let (end, mut far) = end_and_bare_socket(Role::Server);
    end.socket.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let full = vec![0; 1_024 * 1_024];
    while (&*end.socket).write(&full).is_ok() {}
    far.write_all(b"\x89\x80\0\0\0\0").unwrap();
    assert_eq!(heard(&end), "broken: the peer takes nothing any more");
}

#[test]
fn a_line_that_ends_without_a_goodbye_is_broken() {
    let beginnings: [&[u8]; 4] = [b"", b"\x81", b"\x81\x05he", b"\x01\x02he"];
    for bytes in beginnings {
        let (end, mut far) = end_and_bare_socket(Role::Client);
        far.write_all(bytes).unwrap();
        drop(far);
        assert_eq!(heard(&end), "broken: no goodbye", "after {bytes:?}");
    }
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x81\x02hi").unwrap();
    drop(far);
    assert_eq!(heard(&end), "text hi", "what was whole is heard before the end");
    assert_eq!(heard(&end), "broken: no goodbye");
}

#[test]
fn our_own_shut_wakes_the_reader() {
    let (server, _client) = two_ends();
    thread::scope(|scope| {
        let reader = scope.spawn(|| heard(&server));
        server.shut();
        assert!(reader.join().unwrap().starts_with("broken: "));
    });
}

#[test]
fn a_quiet_line_is_still_a_good_line() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    let patience = Duration::from_millis(1);
    assert!(matches!(end.read(Duration::ZERO), Err(SocketEnd::Quiet)));
    assert!(matches!(end.read(patience), Err(SocketEnd::Quiet)));
    far.write_all(b"\x81\x05he").unwrap();
    assert!(matches!(end.read(patience), Err(SocketEnd::Quiet)), "half a message is none");
    far.write_all(b"llo").unwrap();
    assert_eq!(heard(&end), "text hello");
    assert!(matches!(end.read(patience), Err(SocketEnd::Quiet)), "patience can be lost again");
    say(&end, "are you there?");
    assert_eq!(frame(&mut far), (0x81, b"are you there?".to_vec()));
}

#[test]
fn one_thread_sends_while_another_waits_for_the_answer() {
    const ROUNDS: usize = 200;
    let (server, client) = two_ends();
    thread::scope(|scope| {
        let reader = scope.spawn(|| (0..ROUNDS).map(|_| heard(&server)).collect::<Vec<_>>());
        for round in 0..ROUNDS {
            // The reader waits, or is about to: no answer comes before this question.
            say(&server, &format!("question {round}"));
            assert_eq!(heard(&client), format!("text question {round}"));
            say(&client, &format!("answer {round}"));
        }
        let answers = reader.join().unwrap();
        let wanted: Vec<String> = (0..ROUNDS).map(|round| format!("text answer {round}")).collect();
        assert!(answers == wanted, "{answers:?}");
    });
}

#[test]
fn two_thousand_messages_each_way_at_once_arrive_in_order() {
    const MESSAGES: usize = 2_000;
    let (server, client) = two_ends();
    let send_all = |end: &Socket, name: &str| {
        for number in 0..MESSAGES {
            say(end, &format!("{name} {number}"));
        }
    };
    let first_wrong = |end: &Socket, name: &str| {
        let mut all = (0..MESSAGES).map(|number| (format!("text {name} {number}"), heard(end)));
        all.find(|(wanted, found)| wanted != found)
    };
    thread::scope(|scope| {
        let readers = [
            scope.spawn(|| first_wrong(&server, "up")),
            scope.spawn(|| first_wrong(&client, "down")),
        ];
        scope.spawn(|| send_all(&server, "down"));
        scope.spawn(|| send_all(&client, "up"));
        for reader in readers {
            assert_eq!(reader.join().unwrap(), None);
        }
    });
    server.close(CloseCode::Normal, "that was all");
    assert_eq!(heard(&client), "closed Some(1000)");
}

#[test]
fn several_threads_may_send_on_one_line() {
    const THREADS: usize = 4;
    const EACH: usize = 100;
    let (server, client) = two_ends();
    thread::scope(|scope| {
        for name in 0..THREADS {
            let server = &server;
            scope.spawn(move || {
                for number in 0..EACH {
                    say(server, &format!("{name} {number}"));
                }
            });
        }
        let mut next = [0; THREADS];
        for _ in 0..THREADS * EACH {
            let found = heard(&client);
            let (name, number) =
                found.trim_start_matches("text ").split_once(' ').unwrap_or_default();
            let place = name.parse::<usize>().unwrap();
            assert_eq!(number, next[place].to_string(), "whole, and in order for each: {found}");
            next[place] += 1;
        }
    });
}

#[test]
fn the_end_of_a_line_reads_as_a_sentence() {
    let cases = [
        (SocketEnd::Quiet, "nothing came for too long"),
        (SocketEnd::Closed(Some(1008)), "closed with code 1008"),
        (SocketEnd::Closed(None), "closed"),
        (SocketEnd::Broken("no goodbye".to_owned()), "the connection broke: no goodbye"),
        (SocketEnd::Nonsense("too long".to_owned()), "nonsense on the connection: too long"),
    ];
    for (end, wanted) in cases {
        assert_eq!(end.to_string(), wanted);
    }
}
