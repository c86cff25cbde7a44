//! A processor over one MiB of memory, in each mode, with tables that the tests fill.

mod delivery;
mod hostile;
mod paging;
mod privilege;
mod registers;
mod state;
mod stretches;
mod transfers;

use std::sync::Arc;

use skep_hv::VmOptions;
use skep_hv::cpuid::{PolicyOptions, host, policy};
use skep_hv::state::Segment;
use skep_memory::{GuestMemory, RegionKind, RegionSpec};

use super::Tsc;
use super::mode::access;
use crate::cpu::{Cpu, Table, cr0, cr4, efer, fl, seg};
use crate::fault::{Exception, vector};
use crate::regs::at;
use crate::run::{DR6_BS, Step};
use crate::vm::{Mailbox, Shared};

/// Where things lie.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const LDT: u64 = 0x4000;
/// Tops of stacks: the program's, level 0's by the TSS, IST1's.
const STACK: u64 = 0x7000;
const INNER_STACK: u64 = 0x6000;
const IST1: u64 = 0x5ff0;
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x9000;
const PAGE_TABLES: u64 = 0x1_0000;

/// Selectors of the test GDT.
const CODE0: u16 = 0x08;
const DATA0: u16 = 0x10;
const CODE3: u16 = 0x18 | 3;
const DATA3: u16 = 0x20 | 3;
const CONFORMING: u16 = 0x28;
const ABSENT_CODE: u16 = 0x30;
const ABSENT_DATA: u16 = 0x38;
const READ_ONLY: u16 = 0x40;
const EXECUTE_ONLY: u16 = 0x48;
const TASK: u16 = 0x50;
/// A 32-bit code segment of level 3 in IA-32e mode; in protected mode a 16-bit one.
const OTHER_CODE3: u16 = 0x60 | 3;
const LOCAL: u16 = 0x70;
/// For the test to fill; 16 bytes.
const FREE: u16 = 0x80;
const GDT_LIMIT: u16 = 0x8f;

fn cpu() -> Box<Cpu> {
    cpu_with(1 << 20)
}

fn cpu_with(memory: u64) -> Box<Cpu> {
    let ram = RegionSpec { start: 0, size: memory, kind: RegionKind::Ram };
    let memory = GuestMemory::new(&[ram]).unwrap();
    let features = [("la57".to_owned(), true)].into();
    let cpuid =
        policy(&host(), &PolicyOptions { features, ..PolicyOptions::default() }).expect("la57 is our own");
    let shared = Shared::new(VmOptions { cpuid, tsc_hz: Some(1_000_000_000), ..VmOptions::default() });
    let tsc = Tsc::new(shared.tsc_hz);
    Cpu::new(0, memory, shared, Arc::new(Mailbox::new()), tsc).unwrap()
}

/// A descriptor of base 0 and 4 GiB.
fn flat(rights: u32) -> u64 {
    0x000f_0000_0000_ffff | u64::from(rights | access::G) << 40
}

fn system(kind: u32, base: u64, limit: u32) -> u64 {
    u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(kind | access::PRESENT) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

fn gate(kind: u32, dpl: u32, selector: u16, offset: u64, count: u64) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | count << 32
        | u64::from(kind | access::PRESENT | dpl << 5) << 40
        | (offset >> 16 & 0xffff) << 48
}

fn set_descriptor(cpu: &Cpu, selector: u16, raw: u64) {
    cpu.memory.write_u64(GDT + u64::from(selector & !7), raw).unwrap();
}

/// Writes the gate of a vector: eight bytes, or sixteen in IA-32e mode.
fn set_gate(cpu: &Cpu, vector: u8, raw: u64) {
    let size = if cpu.mode.long { 16 } else { 8 };
    cpu.memory.write_u64(IDT + u64::from(vector) * size, raw).unwrap();
}

/// Real mode with all segments at 0 and a stack.
fn real() -> Box<Cpu> {
    let mut cpu = cpu();
    for segment in &mut cpu.segs {
        segment.base = 0;
        segment.selector = 0;
    }
    cpu.idtr = Table { base: 0, limit: 0x3ff };
    cpu.rip = CODE;
    cpu.regs.set64(at::RSP, STACK);
    cpu.refresh_mode();
    cpu
}

fn tables(cpu: &mut Cpu, long: bool) {
    let size = if long { access::L } else { access::DB };
    let code = access::CODE_SEGMENT;
    let data = access::DATA | access::DB;
    let three = 3 << access::DPL_SHIFT;
    for (selector, raw) in [
        (CODE0, flat(code | size)),
        (DATA0, flat(data)),
        (CODE3, flat(code | size | three)),
        (DATA3, flat(data | three)),
        (CONFORMING, flat(code | size | access::EC)),
        (ABSENT_CODE, flat((code | size) & !access::PRESENT)),
        (ABSENT_DATA, flat(data & !access::PRESENT)),
        (READ_ONLY, flat(data & !access::RW)),
        (EXECUTE_ONLY, flat((code | size) & !access::RW)),
        (TASK, system(super::descriptor::system_type::TSS, TSS, 0x2067)),
        (OTHER_CODE3, flat(code | three | if long { access::DB } else { 0 })),
        (LOCAL, system(super::descriptor::system_type::LDT, LDT, 0xff)),
    ] {
        set_descriptor(cpu, selector, raw);
    }
    cpu.gdtr = Table { base: GDT, limit: GDT_LIMIT };
    cpu.idtr = Table { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
    if long {
        cpu.memory.write_u64(TSS + 4, INNER_STACK).unwrap();
        cpu.memory.write_u64(TSS + 36, IST1).unwrap();
    } else {
        cpu.memory.write_u32(TSS + 4, INNER_STACK as u32).unwrap();
        cpu.memory.write_u32(TSS + 8, u32::from(DATA0)).unwrap();
    }
    cpu.memory.write_u16(TSS + 0x66, 0x68).unwrap();
    cpu.tr = Segment { selector: TASK, base: TSS, limit: 0x2067, access: 0x8b };
    cpu.ldtr = Segment { selector: 0, base: 0, limit: 0, access: Segment::UNUSABLE };
}

fn load_flat(cpu: &mut Cpu, cpl: u8, long: bool) {
    let rights = u32::from(cpl) << access::DPL_SHIFT | access::G;
    let size = if long { access::L } else { access::DB };
    let (code, data) = if cpl == 3 { (CODE3, DATA3) } else { (CODE0, DATA0) };
    for segment in &mut cpu.segs {
        *segment =
            Segment { selector: data, base: 0, limit: u32::MAX, access: access::DATA | access::DB | rights };
    }
    cpu.segs[seg::CS] =
        Segment { selector: code, base: 0, limit: u32::MAX, access: access::CODE_SEGMENT | size | rights };
    cpu.rip = CODE;
    cpu.regs.set64(at::RSP, STACK);
    cpu.set_rflags(2);
    cpu.refresh_mode();
}

/// 32-bit protected mode without paging.
fn protected(cpl: u8) -> Box<Cpu> {
    let mut cpu = cpu();
    cpu.cr0 = cr0::PE | cr0::ET;
    tables(&mut cpu, false);
    load_flat(&mut cpu, cpl, false);
    cpu
}

/// Virtual-8086 mode with all segments at 0.
fn v86(iopl: u64) -> Box<Cpu> {
    let mut cpu = protected(3);
    cpu.set_rflags(2 | fl::VM | iopl << 12);
    cpu.segs = [super::segments::v86_segment(0); 6];
    cpu.refresh_mode();
    cpu
}

/// 64-bit mode; the first two MiB identity-mapped for every level.
fn long(cpl: u8) -> Box<Cpu> {
    long_with(cpl, 1 << 20)
}

fn long_with(cpl: u8, memory: u64) -> Box<Cpu> {
    let mut cpu = cpu_with(memory);
    tables(&mut cpu, true);
    for (table, entry) in
        [(0, (PAGE_TABLES + 0x1000) | 7), (0x1000, (PAGE_TABLES + 0x2000) | 7), (0x2000, 0x87)]
    {
        cpu.memory.write_u64(PAGE_TABLES + table, entry).unwrap();
    }
    cpu.cr3 = PAGE_TABLES;
    cpu.cr4 = cr4::PAE;
    cpu.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::ET;
    load_flat(&mut cpu, cpl, true);
    cpu
}

/// Executes one instruction at CS:RIP; RIP stays if it raises something.
fn execute(cpu: &mut Cpu, bytes: &[u8]) -> Step {
    let base = if cpu.is_64bit() { 0 } else { cpu.segs[seg::CS].base };
    cpu.memory.write(base + cpu.rip, bytes).unwrap();
    cpu.step()
}

fn raised(vector: u8, error: u32) -> Step {
    Step::Raised(Exception { vector, error: Some(error) })
}

fn gp(error: u32) -> Step {
    raised(vector::GP, error)
}

const UD: Step = Step::Raised(Exception { vector: vector::UD, error: None });

/// What lies on the stack, `size` bytes each, upwards.
fn stack<const N: usize>(cpu: &Cpu, size: usize) -> [u64; N] {
    let sp = cpu.regs.r64(at::RSP);
    std::array::from_fn(|i| {
        let mut bytes = [0; 8];
        cpu.memory.read(sp + (i * size) as u64, &mut bytes[..size]).unwrap();
        u64::from_le_bytes(bytes)
    })
}

/// Puts values at RSP, the first lowest.
fn put_stack(cpu: &Cpu, size: usize, values: &[u64]) {
    let sp = cpu.regs.r64(at::RSP);
    for (i, value) in values.iter().enumerate() {
        cpu.memory.write(sp + (i * size) as u64, &value.to_le_bytes()[..size]).unwrap();
    }
}
