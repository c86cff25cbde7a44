//! Machines on a scripted hypervisor.
#![allow(clippy::unwrap_used, reason = "in a test, that is the message")]

mod devices;
mod host;
mod lifecycle;
mod serial;
mod support;
