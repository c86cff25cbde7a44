//! Shows what is translated, to who develops the translator: `SKEP_JIT_DUMP` names the file that it is written to.

use std::fs::File;
use std::io::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

use super::translate::Decoded;

static FILE: LazyLock<Option<Mutex<File>>> = LazyLock::new(|| {
    let path = std::env::var_os("SKEP_JIT_DUMP")?;
    File::create(path).ok().map(Mutex::new)
});

/// Writes down a block: where it lies for the guest and for the host, its instructions, and its code in hexadecimal.
pub(super) fn block(linear: u64, host: u64, insns: &[Decoded], code: &[u8]) {
    let Some(file) = FILE.as_ref() else { return };
    let mut text = format!("block {linear:#x} at {host:#x}: {} instructions\n", insns.len());
    for d in insns {
        let base = d.insn.memory_base();
        text += &format!(
            "  +{:#x} code+{:#x} {:?} {:?} {base:?}\n",
            d.at,
            d.code_at,
            d.info.class,
            d.insn.code()
        );
    }
    text += "  code ";
    code.iter().for_each(|byte| text += &format!("{byte:02x}"));
    text.push('\n');
    // Who wants to see it sees that it is missing.
    let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes());
}
