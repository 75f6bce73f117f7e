//! How many there may be inside, and who has to make room.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Read as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::door::lobby::{Lobby, UNDECIDED_MAX};
use crate::testing::sockets;

#[test]
fn one_more_than_the_most_is_turned_away_until_somebody_leaves() {
    let lobby: &'static Lobby = Box::leak(Box::new(Lobby::for_at_most(|| 2)));
    let (near, _far) = sockets();
    let (first, second) = (lobby.enter(&near).unwrap(), lobby.enter(&near).unwrap());
    // Whoever has decided is inside all the same.
    first.is_decided();
    for _ in 0..3 {
        let error = lobby.enter(&near).err().unwrap();
        assert_eq!(error.to_string(), "2 connections are open");
    }
    drop(second);
    let third = lobby.enter(&near).unwrap();
    assert!(lobby.enter(&near).is_err());
    drop((first, third));
    assert!(lobby.enter(&near).is_ok());
}

#[test]
fn there_may_be_more_as_soon_as_the_account_allows_more_calls() {
    static MOST: AtomicUsize = AtomicUsize::new(1);
    let most = || MOST.load(Ordering::Relaxed);
    let lobby: &'static Lobby = Box::leak(Box::new(Lobby::for_at_most(most)));
    let (near, _far) = sockets();
    let _first = lobby.enter(&near).unwrap();
    assert!(lobby.enter(&near).is_err());
    MOST.store(2, Ordering::Relaxed);
    let _second = lobby.enter(&near).unwrap();
    assert_eq!(lobby.enter(&near).err().unwrap().to_string(), "2 connections are open");
}

#[test]
fn the_oldest_of_those_who_only_stand_there_makes_room() {
    let lobby: &'static Lobby = Box::leak(Box::new(Lobby::for_at_most(|| usize::MAX)));
    let enter = || {
        let (near, far) = sockets();
        (lobby.enter(&near).unwrap(), far)
    };
    let (decided, mut spared) = enter();
    decided.is_decided();
    let (_oldest, mut closed) = enter();
    let crowd: Vec<_> = (0..UNDECIDED_MAX).map(|_| enter()).collect();
    assert_eq!(closed.read(&mut [0]).unwrap(), 0, "the oldest is closed");
    for far in [&mut spared, &mut crowd[0].1.try_clone().unwrap()] {
        far.set_nonblocking(true).unwrap();
        assert!(far.read(&mut [0]).is_err(), "nobody else is");
    }
}
