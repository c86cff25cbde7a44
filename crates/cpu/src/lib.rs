//! The software CPU: x86-64 processors for hosts without hardware virtualization.
//!
//! Two engines live here. The interpreter runs everything, and is the reference; [`jit`] translates 64-bit code, and
//! leaves to the interpreter what is not worth it. An instruction goes one way through the interpreter:
//!
//! * [`decode`] turns bytes into [`op::Op`]s, once, and [`block`] keeps them by guest physical address;
//! * [`exec`] holds one module per family of the integer instruction set, each a table from mnemonic to handler;
//! * [`system`] is everything privileged: descriptors, control transfers, exceptions, MSRs, the paravirtual interface;
//! * [`native`] runs x87, SSE, AVX and the rarer integer instructions, re-encoded, on the host's own units;
//! * [`mmu`] is the only way to memory, [`fault`] the only way to an exception;
//! * [`run`] is the loop around them, [`vm`] what the machine sees; [`step`] lends the room to other back ends, one
//!   instruction at a time.
//!
//! The processor's state is [`cpu::Cpu`]; nothing in it is shared but guest memory and [`vm::Shared`].

pub(crate) mod alarm;
pub(crate) mod alu;
pub(crate) mod block;
pub(crate) mod cpu;
pub(crate) mod decode;
#[doc(hidden)]
pub mod drive;
pub(crate) mod exec;
pub(crate) mod fault;
pub(crate) mod jit;
pub(crate) mod mmu;
pub(crate) mod native;
pub(crate) mod op;
#[doc(hidden)]
pub mod oracle;
pub(crate) mod regs;
pub(crate) mod run;
mod step;
pub(crate) mod system;
pub(crate) mod vm;

pub use step::Interpreter;
pub use vm::{Engine, Software};
