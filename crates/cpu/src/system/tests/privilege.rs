//! What needs which privilege: flags, I/O, and instructions that are refused.

use super::super::flags::popf_changes;
use super::*;

#[test]
fn popf_by_size_privilege_and_iopl() {
    // SDM vol. 2B, table 4-16, for protected mode.
    for size in [2usize, 4] {
        for cpl in [0u8, 1, 2, 3] {
            for iopl in 0..4u8 {
                let changes = popf_changes(size, cpl, iopl);
                assert_eq!(changes & fl::IOPL != 0, cpl == 0);
                assert_eq!(changes & fl::IF != 0, cpl <= iopl);
                assert_eq!(changes & (fl::AC | fl::ID) != 0, size > 2);
                assert_eq!(changes & (fl::VM | fl::RF | fl::VIF | fl::VIP), 0);
                assert_eq!(
                    changes & (fl::STATUS | fl::TF | fl::DF | fl::NT),
                    fl::STATUS | fl::TF | fl::DF | fl::NT
                );
            }
        }
    }
}

#[test]
fn popf_and_pushf() {
    let mut cpu = long(3);
    put_stack(&cpu, 8, &[u64::MAX]);
    assert_eq!(execute(&mut cpu, &[0x9d]), Step::Done);
    assert_eq!(cpu.rflags(), fl::STATUS | fl::TF | fl::DF | fl::NT | fl::AC | fl::ID | 2);
    let mut cpu = long(0);
    cpu.set_rflags(fl::RF | 2);
    assert_eq!(execute(&mut cpu, &[0x9c]), Step::Done);
    assert_eq!(stack(&cpu, 8), [2], "RF is not pushed");
    put_stack(&cpu, 8, &[fl::IF | fl::IOPL]);
    assert_eq!(execute(&mut cpu, &[0x9d]), Step::Done);
    assert_eq!(cpu.rflags(), fl::IF | fl::IOPL | 2);
}

#[test]
fn virtual_8086_mode_needs_iopl_3() {
    // CLI, STI, PUSHF, POPF, IRET, INT n.
    for bytes in [&[0xfa][..], &[0xfb], &[0x9c], &[0x9d], &[0xcf], &[0xcd, 0x30]] {
        assert_eq!(execute(&mut v86(2), bytes), gp(0), "{bytes:x?}");
    }
    for bytes in [&[0xfa][..], &[0xfb], &[0x9c], &[0x9d]] {
        assert_eq!(execute(&mut v86(3), bytes), Step::Done, "{bytes:x?}");
    }
    let mut cpu = v86(3);
    put_stack(&cpu, 2, &[0x1234, 0x100, fl::IF | fl::ZF]);
    assert_eq!(execute(&mut cpu, &[0xcf]), Step::Done);
    assert_eq!((cpu.rip, cpu.segs[seg::CS].base), (0x1234, 0x1000));
    assert_eq!(cpu.rflags(), fl::VM | fl::IOPL | fl::IF | fl::ZF | 2, "IOPL stays");
    // Protected mode's own.
    for bytes in [&[0x0f, 0x00, 0xc0][..], &[0x0f, 0x02, 0xc1], &[0x0f, 0x00, 0xd8]] {
        assert_eq!(execute(&mut v86(3), bytes), UD, "{bytes:x?}");
    }
}

#[test]
fn cli_and_sti_by_iopl() {
    for (cpl, iopl, wanted) in [(0, 0, Step::Done), (3, 0, gp(0)), (3, 2, gp(0)), (3, 3, Step::Done)] {
        let mut cpu = long(cpl);
        cpu.set_rflags(2 | iopl << 12);
        assert_eq!(execute(&mut cpu, &[0xfb]), wanted);
        assert_eq!(cpu.sti_shadow, wanted == Step::Done);
        cpu.sti_shadow = false;
        cpu.rip = CODE;
        assert_eq!(execute(&mut cpu, &[0xfb]), wanted);
        assert!(!cpu.sti_shadow, "no shadow if interrupts were on, or on a fault");
        assert_eq!(execute(&mut cpu, &[0xfa]), wanted);
        assert!(!cpu.flag(fl::IF));
    }
}

#[test]
fn io_by_iopl_and_bitmap() {
    let mut cpu = long(3);
    cpu.regs.set64(at::RDX, 0x3f8);
    let map = TSS + 0x68 + 0x3f8 / 8;
    cpu.memory.write_u16(map, 0xffff).unwrap();
    assert_eq!(execute(&mut cpu, &[0xec]), gp(0));
    cpu.memory.write_u16(map, 0xfffe).unwrap();
    assert_eq!(execute(&mut cpu, &[0xec]), Step::Done, "IN AL, DX");
    assert_eq!(cpu.regs.get::<u8>(at::RAX), 0xff, "nothing answers");
    assert_eq!(execute(&mut cpu, &[0xed]), gp(0), "four ports");
    cpu.memory.write_u16(map, 0xfff0).unwrap();
    assert_eq!(execute(&mut cpu, &[0xed]), Step::Done);
    cpu.regs.set64(at::RDX, 0x3ff);
    cpu.memory.write_u16(map, 0xfe7f).unwrap();
    assert_eq!(execute(&mut cpu, &[0x66, 0xed]), Step::Done, "two bytes of the map");
    cpu.tr.limit = 0x68 + 0x7f;
    assert_eq!(execute(&mut cpu, &[0xec]), gp(0), "the map ends");
    cpu.set_rflags(fl::IOPL | 2);
    assert_eq!(execute(&mut cpu, &[0xec]), Step::Done);
    let mut cpu = v86(3);
    cpu.memory.write_u16(TSS + 0x68, 0xffff).unwrap();
    assert_eq!(execute(&mut cpu, &[0xe4, 0]), gp(0), "virtual-8086 mode always asks the map");
    assert_eq!(execute(&mut real(), &[0xe6, 0x80]), Step::Done);
}

#[test]
fn privileged_instructions() {
    let privileged: [&[u8]; 12] = [
        &[0xf4],
        &[0x0f, 0x06],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        &[0x0f, 0x20, 0xc0],
        &[0x0f, 0x21, 0xc0],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x01, 0xf0],
        &[0x0f, 0x01, 0x14, 0x25, 0, 0xa0, 0, 0],
        &[0x0f, 0x01, 0x1c, 0x25, 0, 0xa0, 0, 0],
        &[0x0f, 0x00, 0xd0],
    ];
    for bytes in privileged {
        assert_eq!(execute(&mut long(3), bytes), gp(0), "{bytes:x?}");
    }
    let mut cpu = long(0);
    assert_eq!(execute(&mut cpu, &[0xf4]), Step::Done);
    assert!(cpu.halted);
    assert_eq!(execute(&mut long(3), &[0x0f, 0x01, 0xca]), UD, "CLAC");
}

#[test]
fn refused_everywhere() {
    // UD2, UD1, MONITOR, MWAIT, RSM, VMLAUNCH.
    for bytes in [
        &[0x0f, 0x0b][..],
        &[0x0f, 0xb9, 0xc0],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0xaa],
        &[0x0f, 0x01, 0xc2],
    ] {
        for mut cpu in [long(0), long(3), protected(0), real()] {
            assert_eq!(execute(&mut cpu, bytes), UD, "{bytes:x?}");
        }
    }
}

#[test]
fn cache_instructions_fault_as_reads_do() {
    let mut cpu = long(0);
    // CLFLUSH [0xa000], CLFLUSH [0x500000], PREFETCHT0 [0x500000], MFENCE, WBINVD.
    assert_eq!(execute(&mut cpu, &[0x0f, 0xae, 0x3c, 0x25, 0, 0xa0, 0, 0]), Step::Done);
    assert_eq!(execute(&mut cpu, &[0x0f, 0xae, 0x3c, 0x25, 0, 0, 0x50, 0]), raised(vector::PF, 0));
    assert_eq!(execute(&mut cpu, &[0x0f, 0x18, 0x0c, 0x25, 0, 0, 0x50, 0]), Step::Done);
    assert_eq!(execute(&mut cpu, &[0x0f, 0xae, 0xf0]), Step::Done);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x09]), Step::Done);
}

#[test]
fn alignment_checks_are_level_3s() {
    for (cpl, wanted) in [(3, raised(vector::AC, 0)), (0, Step::Done)] {
        let mut cpu = long(cpl);
        cpu.cr0 |= cr0::AM;
        cpu.set_rflags(fl::AC | 2);
        cpu.refresh_mode();
        let load = [0x8b, 0x04, 0x25, 0x02, 0xa0, 0, 0];
        assert_eq!(execute(&mut cpu, &load), wanted);
        let aligned = [0x8b, 0x04, 0x25, 0x04, 0xa0, 0, 0];
        assert_eq!(execute(&mut cpu, &aligned), Step::Done);
    }
}
