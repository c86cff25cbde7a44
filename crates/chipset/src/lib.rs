//! The chipset: pure state machines.
