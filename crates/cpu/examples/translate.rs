//! Measures how long it takes to translate a program's code. See `docs/performance.md`.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use skep_cpu::drive::Translating;

const HELP: &str = "translate FILE [ROUNDS [MIB]]
  FILE    an ELF program for x86-64
  ROUNDS  how often, each time by a new processor (default 5)
  MIB     of its code at most (default 4)";

/// The first executable segment of an ELF file.
fn code(file: &[u8]) -> Option<&[u8]> {
    let word = |at: usize, len: usize| {
        let bytes = file.get(at..at + len)?;
        Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte)))
    };
    let (at, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
    let is_code = |&at: &usize| word(at, 4) == Some(1) && word(at + 4, 4).is_some_and(|flags| flags & 1 != 0);
    let header = (0..count).map(|n| at + n * size).find(is_code)?;
    let (offset, len) = (word(header + 8, 8)?, word(header + 32, 8)?);
    file.get(offset..offset + len).filter(|_| file.starts_with(b"\x7fELF\x02"))
}

/// Where control may arrive: behind what it never goes past, and where it goes directly.
fn targets(code: &[u8]) -> BTreeSet<u64> {
    let mut starts = BTreeSet::new();
    let mut begins = true;
    for insn in &mut Decoder::new(64, code, DecoderOptions::NONE) {
        let padding =
            matches!(insn.code(), Code::Nopw | Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64 | Code::Int3);
        if begins && !padding {
            starts.insert(insn.ip());
            begins = false;
        }
        begins |= matches!(
            insn.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
        );
        if insn.op0_kind() == OpKind::NearBranch64 && insn.near_branch_target() < code.len() as u64 {
            starts.insert(insn.near_branch_target());
        }
    }
    starts
}

/// Where the translator's blocks begin, in the order of their addresses: each is translated once, in order to see where it
/// ends.
fn blocks(code: &[u8]) -> Option<Vec<u64>> {
    let mut open = targets(code);
    let mut all = Vec::new();
    let mut translating = Translating::new(code)?;
    while let Some(at) = open.pop_first() {
        let before = translating.stats().instructions;
        if !translating.translate(at) {
            continue;
        }
        let count = translating.stats().instructions - before;
        if count == 0 {
            continue;
        }
        all.push(at);
        let mut decoder = Decoder::with_ip(64, &code[at as usize..], at, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        (0..count).for_each(|_| decoder.decode_out(&mut insn));
        let goes_on = !matches!(
            insn.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
        );
        if goes_on && decoder.can_decode() {
            open.insert(decoder.ip());
        }
    }
    Some(all)
}

/// The processor time that this thread has had.
fn processor_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(file) = arguments.next() else {
        eprintln!("{HELP}");
        return ExitCode::from(4);
    };
    let mut number = |default| arguments.next().map_or(Some(default), |text| text.parse().ok());
    let (Some(rounds), Some(mib)) = (number(5), number(4)) else {
        eprintln!("{HELP}");
        return ExitCode::from(4);
    };
    match std::fs::read(&file).ok().and_then(|file| measure(code(&file)?, rounds, mib << 20)) {
        Some(()) => ExitCode::SUCCESS,
        None => {
            eprintln!("{file} is no program that can be translated here");
            ExitCode::FAILURE
        }
    }
}

fn measure(code: &[u8], rounds: usize, most: usize) -> Option<()> {
    let code = &code[..code.len().min(most)];
    let blocks = blocks(code)?;
    let mut least = f64::INFINITY;
    for _ in 0..rounds {
        let mut translating = Translating::new(code)?;
        let begun = processor_time()?;
        for &at in &blocks {
            translating.translate(at);
        }
        let time = processor_time()? - begun;
        let made = translating.stats();
        let each = time.as_nanos() as f64 / made.instructions.max(1) as f64;
        least = least.min(each);
        println!(
            "{} blocks, {} instructions, {} bytes in {time:.1?}: {each:.0} ns per instruction",
            made.blocks, made.instructions, made.bytes
        );
    }
    println!("least: {least:.0} ns per instruction");
    Some(())
}
