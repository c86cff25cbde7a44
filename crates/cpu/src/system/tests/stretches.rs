//! Ranges that a kernel has mapped in one piece, as walks find them and as translated code reads them.

use super::*;
use crate::jit::Jit;

const LARGE: u64 = 2 << 20;
const MEMORY: u64 = 8 * LARGE;
/// Linear address of all memory, for the kernel alone.
const DIRECT: u64 = 1 << 30;
const DIRECT_TABLE: u64 = PAGE_TABLES + 0x3000;
/// Present, writable, accessed, dirty, global; and a large page.
const PAGE: u64 = 0x163;
const LARGE_PAGE: u64 = PAGE | 0x80;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const GLOBAL: u64 = 0x100;

/// A kernel with eight large pages of memory, all of it mapped at [`DIRECT`] too.
fn kernel() -> Box<Cpu> {
    let mut cpu = long_with(0, MEMORY);
    cpu.cr4 |= cr4::PGE;
    cpu.refresh_mode();
    cpu.jit = Some(Box::new(Jit::new().unwrap()));
    cpu.memory.write_u64(PAGE_TABLES + 0x1008, DIRECT_TABLE | 7).unwrap();
    (0..8).for_each(|page| map(&cpu, page, page * LARGE | LARGE_PAGE));
    cpu
}

/// Puts an entry into the table of [`DIRECT`].
fn map(cpu: &Cpu, page: u64, entry: u64) {
    cpu.memory.write_u64(DIRECT_TABLE + 8 * page, entry).unwrap();
}

/// An address in a large page of [`DIRECT`].
fn within(page: u64) -> u64 {
    DIRECT + page * LARGE + 0x12_3450
}

/// Which large pages are read as a stretch, after a read of the third.
fn found(cpu: &mut Cpu) -> Vec<u64> {
    assert_eq!(cpu.read::<u64>(within(3)), Ok(0));
    let right = |&page: &u64| {
        let at = cpu.tlb.read_in_stretch(within(page));
        let memory = cpu.memory.page(0).unwrap().host.as_ptr();
        at.inspect(|&at| assert_eq!(at, memory.wrapping_add((within(page) - DIRECT) as usize))).is_some()
    };
    (0..10).filter(right).collect()
}

#[test]
fn a_stretch_reaches_as_far_as_like_pages_of_memory() {
    assert_eq!(found(&mut kernel()), [0, 1, 2, 3, 4, 5, 6, 7]);
    let with = |page: u64, entry: u64| {
        let mut cpu = kernel();
        map(&cpu, page, entry);
        found(&mut cpu)
    };
    let five = 5 * LARGE | LARGE_PAGE;
    for entry in [0, five & !1, five & !ACCESSED, five & !GLOBAL, five | USER, five + LARGE, five | 1 << 13] {
        assert_eq!(with(5, entry), [0, 1, 2, 3, 4], "{entry:#x}");
    }
    assert_eq!(with(1, 0), [2, 3, 4, 5, 6, 7]);
    assert_eq!(with(5, five & !2), [0, 1, 2, 3, 4, 5, 6, 7], "it is only read");
    // What lies behind the end of memory is no memory.
    assert_eq!(with(8, 8 * LARGE | LARGE_PAGE), [0, 1, 2, 3, 4, 5, 6, 7]);
    // Nor is there a stretch without global pages, or around one of the user's.
    let three = 3 * LARGE | LARGE_PAGE;
    assert!(with(3, three & !GLOBAL).is_empty() && with(3, three | USER).is_empty());
}

#[test]
fn small_pages_may_fill_a_large_one() {
    const TABLE: u64 = PAGE_TABLES + 0x4000;
    let with = |change: &dyn Fn(u64) -> u64| {
        let mut cpu = kernel();
        for i in 0..512 {
            cpu.memory.write_u64(TABLE + 8 * i, change(i) | 4 * LARGE + (i << 12)).unwrap();
        }
        map(&cpu, 4, TABLE | 0x63);
        found(&mut cpu)
    };
    assert_eq!(with(&|_| PAGE), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(with(&|i| if i == 511 { 0 } else { PAGE }), [0, 1, 2, 3]);
    assert_eq!(with(&|i| if i == 17 { PAGE | USER } else { PAGE }), [0, 1, 2, 3]);
    assert_eq!(with(&|i| if i == 0 { PAGE | 1 << 13 } else { PAGE }), [0, 1, 2, 3]);
}

/// A block that reads what RDI points to, and near by, and by way of it and RBX.
const BLOCK: [u8; 21] = [
    0x48, 0x8b, 0x07, // mov rax, [rdi]
    0x48, 0x8b, 0x4f, 0x08, // mov rcx, [rdi+8]
    0x48, 0x8b, 0x14, 0x1f, // mov rdx, [rdi+rbx]
    0x48, 0x01, 0xdf, // add rdi, rbx
    0x48, 0x8b, 0x77, 0x08, // mov rsi, [rdi+8]
    0x90, // nop
    0xeb, 0xe9, // jmp to itself
];

/// Runs it, and says what it has read.
fn run(cpu: &mut Cpu, rdi: u64, rbx: u64) -> [u64; 4] {
    cpu.rip = CODE;
    cpu.regs.set64(at::RDI, rdi);
    cpu.regs.set64(at::RBX, rbx);
    assert!(cpu.run_one_block());
    [at::RAX, at::RCX, at::RDX, at::RSI].map(|register| cpu.regs.r64(register))
}

/// Every word of memory that the tests read is the number of its large page, with that of the word in it.
fn numbered() -> Box<Cpu> {
    let mut cpu = kernel();
    cpu.memory.write(CODE, &BLOCK).unwrap();
    for page in 0..8 {
        for word in 0..16 {
            let at = page * LARGE + 0x12_3450 + 8 * word;
            cpu.memory.write_u64(at, page << 8 | word).unwrap();
        }
    }
    cpu.jit.as_mut().unwrap().set_alone(64);
    cpu
}

#[test]
fn translated_code_reads_what_is_mapped_now() {
    let mut cpu = numbered();
    cpu.read::<u64>(within(3)).unwrap();
    assert_eq!(run(&mut cpu, within(4), 16), [0x400, 0x401, 0x402, 0x403]);
    // The next ones have never been walked to: what is known of them is the stretch.
    map(&cpu, 5, 0);
    map(&cpu, 6, LARGE | LARGE_PAGE);
    assert_eq!(run(&mut cpu, within(5), 8), [0x500, 0x501, 0x501, 0x502]);
    assert_eq!(run(&mut cpu, within(6), LARGE), [0x600, 0x601, 0x700, 0x701]);
    // INVLPG [RDI].
    let forget = |cpu: &mut Cpu, linear: u64| {
        cpu.rip = 0xb000;
        cpu.regs.set64(at::RDI, linear);
        assert_eq!(execute(cpu, &[0x0f, 0x01, 0x3f]), Step::Done);
    };
    forget(&mut cpu, within(6) + 0x2000);
    assert_eq!(run(&mut cpu, within(6), LARGE), [0x100, 0x101, 0x700, 0x701]);
    assert_eq!(run(&mut cpu, within(5), 8), [0x500, 0x501, 0x501, 0x502], "it was not forgotten");
    forget(&mut cpu, within(5));
    let before = cpu.regs.r64(at::RAX);
    assert_eq!(run(&mut cpu, within(5), 8)[0], before, "it is not there");
    assert_eq!((cpu.rip, cpu.cr2), (CODE, within(5)));
    // All translations go with CR4.PGE.
    map(&cpu, 4, 2 * LARGE | LARGE_PAGE);
    assert_eq!(run(&mut cpu, within(4), 16), [0x400, 0x401, 0x402, 0x403]);
    for pge in [0, cr4::PGE] {
        cpu.rip = 0xb000;
        cpu.regs.set64(at::RAX, cpu.cr4 & !cr4::PGE | pge);
        assert_eq!(execute(&mut cpu, &[0x0f, 0x22, 0xe0]), Step::Done);
    }
    assert_eq!(run(&mut cpu, within(4), 16), [0x200, 0x201, 0x202, 0x203]);
}

#[test]
fn a_read_elsewhere_than_in_the_stretch_is_right_too() {
    let mut cpu = numbered();
    cpu.read::<u64>(within(3)).unwrap();
    assert_eq!(run(&mut cpu, within(3), 8), [0x300, 0x301, 0x301, 0x302]);
    // The same code, by the identity mapping of the first large page; out of the stretch, and into it.
    let low = within(0) - DIRECT;
    assert_eq!(run(&mut cpu, low, 8), [0, 1, 1, 2]);
    assert_eq!(run(&mut cpu, within(2), low.wrapping_sub(within(2))), [0x200, 0x201, 0, 1]);
    assert_eq!(run(&mut cpu, low, within(6) - low), [0, 1, 0x600, 0x601]);
    // Near its ends, and behind them.
    let end = DIRECT + MEMORY;
    for (at, value) in [(MEMORY - 24, 7), (MEMORY - 16, 8), (MEMORY - 8, 9), (0, 0x55)] {
        cpu.memory.write_u64(at, value).unwrap();
    }
    assert_eq!(run(&mut cpu, end - 24, 8), [7, 8, 8, 9]);
    assert_eq!(run(&mut cpu, DIRECT, end - 16 - DIRECT), [0x55, 0, 8, 9]);
}

/// MOV RAX, [RDI]; MOVZX ECX, BYTE [RDI+8]; AND ECX, 3; SHL RCX, 2; SUB RAX, RCX; MOV RDX, [RAX+RCX*2+8]; NOP; a jump to itself.
const CHASE: [u8; 27] = [
    0x48, 0x8b, 0x07, 0x0f, 0xb6, 0x4f, 0x08, 0x83, 0xe1, 0x03, 0x48, 0xc1, 0xe1, 0x02, 0x48, 0x29, 0xc8,
    0x48, 0x8b, 0x54, 0x48, 0x08, 0x90, 0x90, 0x90, 0xeb, 0xe5,
];

#[test]
fn what_registers_will_point_to_is_foreseen() {
    let mut cpu = numbered();
    cpu.memory.write(CODE, &CHASE).unwrap();
    cpu.memory.write_u64(0x12_3450, within(5)).unwrap();
    cpu.memory.write_u64(0x12_3458, 0xf2).unwrap();
    cpu.read::<u64>(within(3)).unwrap();
    map(&cpu, 5, 0);
    let [rax, rcx, rdx, _] = run(&mut cpu, within(0), 0);
    // That page was never walked to, and cannot be any more.
    assert_eq!((rax, rcx, rdx), (within(5) - 8, 8, 0x502));
}

#[test]
fn nothing_is_known_of_an_address_with_another_scale() {
    let mut cpu = numbered();
    // MOV RAX, [RDI+RBX]; MOV RCX, [RDI+RBX*8]; a jump to itself.
    cpu.memory.write(CODE, &[0x48, 0x8b, 0x04, 0x1f, 0x48, 0x8b, 0x0c, 0xdf, 0xeb, 0xf6]).unwrap();
    cpu.read::<u64>(within(3)).unwrap();
    assert_eq!(run(&mut cpu, within(6), 8)[..2], [0x601, 0x608]);
    // The first read is in the stretch again, the second is where nothing is.
    assert_eq!(run(&mut cpu, within(2) - DIRECT, DIRECT)[0], 0x200);
    assert_eq!((cpu.rip, cpu.cr2), (CODE + 4, within(2) + 7 * DIRECT));
}

/// MOV RAX, [RDI]; LEA RDI, [RDI+RBX*8]; MOV RCX, [RDI]; MOV RAX, RBP; MOV RSI, [RAX]; MUL RBX; MOV RDX, [RAX+8]; a jump to itself.
const CHANGES: [u8; 25] = [
    0x48, 0x8b, 0x07, 0x48, 0x8d, 0x3c, 0xdf, 0x48, 0x8b, 0x0f, 0x48, 0x89, 0xe8, 0x48, 0x8b, 0x30, 0x48,
    0xf7, 0xe3, 0x48, 0x8b, 0x50, 0x08, 0xeb, 0xe7,
];

#[test]
fn nothing_is_known_of_an_address_whose_registers_have_changed() {
    let mut cpu = numbered();
    cpu.memory.write(CODE, &CHANGES).unwrap();
    cpu.read::<u64>(within(3)).unwrap();
    cpu.regs.set64(at::RBP, within(5));
    assert_eq!(run(&mut cpu, within(6), 1), [within(5), 0x601, 0x501, 0x500]);
    // By MUL.
    let [_, rcx, _, rsi] = run(&mut cpu, within(6), 2);
    assert_eq!((rcx, rsi), (0x602, 0x500));
    assert_eq!((cpu.rip, cpu.cr2), (CODE + 19, 2 * within(5) + 8));
    // By LEA.
    let away = (within(0) - DIRECT + 24).wrapping_sub(within(6)) as i64 / 8;
    assert_eq!(run(&mut cpu, within(6), away as u64)[1], 3);
}
