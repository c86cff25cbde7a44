//! Interrupts and exceptions: frames in every mode, and what happens when delivery itself fails.

use super::super::descriptor::system_type::{INTERRUPT_GATE, INTERRUPT_GATE16, TASK_GATE, TRAP_GATE};
use super::*;

const FLAGS: u64 = fl::IF | fl::TF | fl::NT | fl::RF | fl::CF | 2;

fn exception(vector: u8, error: Option<u32>) -> Exception {
    Exception { vector, error }
}

#[test]
fn real_mode() {
    let mut cpu = real();
    cpu.segs[seg::CS].selector = 0x100;
    cpu.segs[seg::CS].base = 0x1000;
    cpu.rip = 0x1234;
    cpu.set_rflags(fl::IF | fl::TF | fl::CF | 2);
    cpu.memory.write_u32(0x21 * 4, 0x0800_0042).unwrap();
    cpu.deliver_interrupt(0x21);
    assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::CS].base, cpu.rip), (0x800, 0x8000, 0x42));
    assert_eq!(stack(&cpu, 2), [0x1234, 0x100, fl::IF | fl::TF | fl::CF | 2]);
    assert_eq!(cpu.rflags(), fl::CF | 2);
    assert_eq!(cpu.regs.r64(at::RSP), STACK - 6);
    // An error code is not pushed.
    cpu.memory.write_u32(13 * 4, 0x0800_0050).unwrap();
    cpu.deliver_exception(exception(vector::GP, Some(0)));
    assert_eq!((cpu.regs.r64(at::RSP), cpu.rip), (STACK - 12, 0x50));
}

#[test]
fn real_mode_without_a_table_shuts_down() {
    let mut cpu = real();
    cpu.idtr.limit = 3;
    cpu.deliver_exception(exception(vector::UD, None));
    assert!(cpu.shutdown);
}

#[test]
fn real_mode_wraps_the_stack_and_leaves_the_rest_of_esp() {
    let mut cpu = real();
    cpu.regs.set64(at::RSP, 0x12_0002);
    cpu.memory.write_u32(0x21 * 4, 0x0800_0042).unwrap();
    cpu.deliver_interrupt(0x21);
    assert_eq!(cpu.regs.r64(at::RSP), 0x12_fffc);
    assert_eq!(cpu.memory.read_u16(0).unwrap(), 2, "flags at the top of the wrapped stack");
}

#[test]
fn protected_mode_same_level() {
    for (kind, flags_after) in [(INTERRUPT_GATE, fl::CF | 2), (TRAP_GATE, fl::CF | fl::IF | 2)] {
        let mut cpu = protected(0);
        set_gate(&cpu, 14, gate(kind, 0, CODE0, HANDLER, 0));
        cpu.set_rflags(FLAGS & !fl::RF);
        cpu.deliver_exception(exception(vector::PF, Some(2)));
        assert_eq!(stack(&cpu, 4), [2, CODE, u64::from(CODE0), FLAGS], "a fault's image has RF set");
        assert_eq!((cpu.rip, cpu.rflags(), cpu.segs[seg::CS].selector), (HANDLER, flags_after, CODE0));
    }
    // Traps and interrupts leave RF as it is.
    let mut cpu = protected(0);
    set_gate(&cpu, 1, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.dr7 |= super::super::debug::dr7::GD;
    cpu.deliver_exception(exception(vector::DB, None));
    assert_eq!(stack(&cpu, 4), [CODE, u64::from(CODE0), 2]);
    assert_eq!(cpu.dr7 & super::super::debug::dr7::GD, 0);
}

#[test]
fn protected_mode_to_an_inner_level() {
    let mut cpu = protected(3);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.set_rflags(FLAGS);
    cpu.deliver_interrupt(0x30);
    assert_eq!(stack(&cpu, 4), [CODE, u64::from(CODE3), FLAGS, STACK, u64::from(DATA3)]);
    assert_eq!(cpu.regs.r64(at::RSP), INNER_STACK - 20);
    assert_eq!((cpu.mode.cpl, cpu.segs[seg::SS].selector, cpu.segs[seg::CS].selector), (0, DATA0, CODE0));
    assert_eq!(cpu.segs[seg::DS].selector, DATA3, "data segments stay");
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut cpu = protected(3);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE16, 0, CODE0, 0xdead_9000, 0));
    cpu.deliver_interrupt(0x30);
    assert_eq!(stack(&cpu, 2), [CODE, u64::from(CODE3), 2, STACK, u64::from(DATA3)]);
    assert_eq!(cpu.rip, 0x9000);
}

#[test]
fn a_conforming_handler_keeps_the_level() {
    let mut cpu = protected(3);
    set_gate(&cpu, 0x30, gate(TRAP_GATE, 0, CONFORMING, HANDLER, 0));
    cpu.deliver_interrupt(0x30);
    assert_eq!((cpu.mode.cpl, cpu.segs[seg::CS].selector), (3, CONFORMING | 3));
    assert_eq!(cpu.regs.r64(at::RSP), STACK - 12);
}

#[test]
fn virtual_8086_mode() {
    let mut cpu = v86(3);
    for (n, register) in [seg::ES, seg::DS, seg::FS, seg::GS].into_iter().enumerate() {
        cpu.segs[register] = super::super::segments::v86_segment(0x100 + n as u16);
    }
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0));
    let flags = cpu.rflags();
    assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), Step::Done);
    assert_eq!(stack(&cpu, 4), [CODE + 2, 0, flags, STACK, 0, 0x100, 0x101, 0x102, 0x103]);
    assert_eq!((cpu.mode.cpl, cpu.mode.v86), (0, false));
    for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
        assert_ne!(cpu.segs[register].access & Segment::UNUSABLE, 0);
    }
    // And back.
    assert_eq!(execute(&mut cpu, &[0xcf]), Step::Done);
    assert!(cpu.mode.v86 && cpu.mode.cpl == 3);
    assert_eq!((cpu.rip, cpu.regs.r64(at::RSP), cpu.rflags()), (CODE + 2, STACK, flags));
    assert_eq!((cpu.segs[seg::GS].base, cpu.segs[seg::ES].selector), (0x1030, 0x100));
}

#[test]
fn virtual_8086_mode_needs_iopl_for_int_n_only() {
    let mut cpu = v86(0);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0));
    set_gate(&cpu, 3, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(0));
    assert_eq!(execute(&mut cpu, &[0xcc]), Step::Done);
    let mut cpu = v86(3);
    set_gate(&cpu, 3, gate(INTERRUPT_GATE, 3, CONFORMING, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &[0xcc]), gp(u32::from(CONFORMING)), "the handler must run at level 0");
}

#[test]
fn long_mode() {
    let mut cpu = long(0);
    set_gate(&cpu, 13, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.regs.set64(at::RSP, STACK - 3);
    cpu.deliver_exception(exception(vector::GP, Some(0x55)));
    let frame = [0x55, CODE, u64::from(CODE0), fl::RF | 2, STACK - 3, u64::from(DATA0)];
    assert_eq!(stack(&cpu, 8), frame);
    assert_eq!(cpu.regs.r64(at::RSP), STACK - 16 - 48, "aligned to 16 first");
    assert_eq!(cpu.segs[seg::SS].selector, DATA0);

    let mut cpu = long(3);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.deliver_interrupt(0x30);
    assert_eq!(stack(&cpu, 8), [CODE, u64::from(CODE3), 2, STACK, u64::from(DATA3)]);
    assert_eq!(cpu.regs.r64(at::RSP), INNER_STACK - 40);
    assert_eq!((cpu.mode.cpl, cpu.segs[seg::SS].selector), (0, 0), "SS is null");
    assert_ne!(cpu.segs[seg::SS].access & Segment::UNUSABLE, 0);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), Step::Done, "and IRETQ returns");
    assert_eq!((cpu.rip, cpu.mode.cpl, cpu.regs.r64(at::RSP)), (CODE, 3, STACK));
    assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector), (CODE3, DATA3));
}

#[test]
fn the_interrupt_stack_table_is_taken_at_every_level() {
    for cpl in [0, 3] {
        let mut cpu = long(cpl);
        set_gate(&cpu, 2, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 1));
        cpu.deliver_nmi();
        assert!(cpu.nmi_blocked);
        assert_eq!(cpu.regs.r64(at::RSP), IST1 - 40);
        assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), Step::Done);
        assert!(!cpu.nmi_blocked);
        assert_eq!((cpu.mode.cpl, cpu.regs.r64(at::RSP)), (cpl, STACK));
    }
}

#[test]
fn errors_of_a_software_interrupt_are_not_external() {
    for mut cpu in [protected(3), long(3)] {
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(0x30 << 3 | 2), "the gate's privilege level");
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0) & !(1 << 47));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), raised(vector::NP, 0x30 << 3 | 2));
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, DATA0, HANDLER, 0));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(u32::from(DATA0)), "no code segment");
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, 0, HANDLER, 0));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(0), "a null selector");
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, ABSENT_CODE, HANDLER, 0));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), raised(vector::NP, u32::from(ABSENT_CODE)));
        set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, 0xff8, HANDLER, 0));
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(0xff8), "beyond the GDT");
        cpu.idtr.limit = 0x30 * 8;
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), gp(0x30 << 3 | 2), "beyond the IDT");
        assert_eq!((cpu.rip, cpu.regs.r64(at::RSP), cpu.mode.cpl), (CODE, STACK, 3), "nothing has changed");
    }
}

#[test]
fn inner_stacks_that_are_none() {
    let mut cpu = protected(3);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0));
    for (ss, error) in [
        (0, raised(vector::TS, 0)),
        (DATA3, raised(vector::TS, u32::from(DATA3 & !3))),
        (CODE0, raised(vector::TS, u32::from(CODE0))),
        (READ_ONLY, raised(vector::TS, u32::from(READ_ONLY))),
        (ABSENT_DATA, raised(vector::SS, u32::from(ABSENT_DATA))),
        (0xff8, raised(vector::TS, 0xff8)),
    ] {
        cpu.memory.write_u32(TSS + 8, u32::from(ss)).unwrap();
        assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), error, "{ss:#x}");
    }
    cpu.tr.limit = 8;
    assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), raised(vector::TS, u32::from(TASK)));

    let mut cpu = long(3);
    set_gate(&cpu, 0x30, gate(INTERRUPT_GATE, 3, CODE0, HANDLER, 0));
    cpu.memory.write_u64(TSS + 4, 1 << 60).unwrap();
    assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), raised(vector::SS, 0));
    cpu.memory.write_u64(TSS + 4, 0x7000_0000).unwrap();
    assert_eq!(execute(&mut cpu, &[0xcd, 0x30]), raised(vector::PF, 2), "a push of level 0");
    assert_eq!(cpu.cr2, 0x7000_0000 - 8);
}

#[test]
fn a_fault_in_delivery_is_external_or_a_double_fault() {
    // An external interrupt without a gate: #GP with EXT.
    let mut cpu = long(0);
    set_gate(&cpu, 13, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.deliver_interrupt(0x30);
    assert_eq!(stack(&cpu, 8), [0x30 << 3 | 3, CODE, u64::from(CODE0)]);

    // #GP without a gate: #DF with error code 0 and RIP at the instruction.
    let mut cpu = long(0);
    set_gate(&cpu, 8, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 1));
    cpu.deliver_exception(exception(vector::GP, Some(7)));
    assert_eq!(stack(&cpu, 8), [0, CODE, u64::from(CODE0)]);
    assert!(!cpu.shutdown);

    // #UD without a gate is #GP: a benign exception first.
    let mut cpu = long(0);
    set_gate(&cpu, 13, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.deliver_exception(exception(vector::UD, None));
    assert_eq!(stack(&cpu, 8), [6 << 3 | 3, CODE]);

    // No #DF either.
    let mut cpu = long(0);
    cpu.deliver_exception(exception(vector::GP, Some(7)));
    assert!(cpu.shutdown);
    assert_eq!((cpu.rip, cpu.regs.r64(at::RSP)), (CODE, STACK));
}

#[test]
fn a_page_fault_in_delivery_sets_cr2_anew() {
    let mut cpu = long(0);
    set_gate(&cpu, 14, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    set_gate(&cpu, 8, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 1));
    cpu.cr2 = 0x1234;
    cpu.regs.set64(at::RSP, 0x50_0000);
    cpu.deliver_exception(exception(vector::PF, Some(0)));
    assert_eq!(cpu.cr2, 0x50_0000 - 8, "the push");
    assert_eq!(stack(&cpu, 8), [0, CODE, u64::from(CODE0)], "#DF on its own stack");
}

#[test]
fn task_gates_stop_the_machine_with_words() {
    let mut cpu = protected(0);
    set_gate(&cpu, 8, gate(TASK_GATE, 0, TASK, 0, 0));
    cpu.deliver_exception(exception(vector::DF, Some(0)));
    assert!(matches!(cpu.raised, crate::fault::Raised::Failed(_)));
}

#[test]
fn into_and_int1() {
    let mut cpu = protected(0);
    set_gate(&cpu, 4, gate(TRAP_GATE, 0, CODE0, HANDLER, 0));
    set_gate(&cpu, 1, gate(TRAP_GATE, 0, CODE0, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &[0xce]), Step::Done);
    assert_eq!(cpu.rip, CODE + 1);
    cpu.set_rflags(fl::OF | 2);
    assert_eq!(execute(&mut cpu, &[0xce]), Step::Done);
    assert_eq!((cpu.rip, stack(&cpu, 4)), (HANDLER, [CODE + 2, u64::from(CODE0), fl::OF | 2]));
    let mut cpu = protected(3);
    set_gate(&cpu, 1, gate(TRAP_GATE, 0, CODE0, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &[0xf1]), Step::Done, "no privilege is asked of INT1");
    assert_eq!(execute(&mut cpu, &[0xcd, 1]), Step::Done, "level 0 by now");
}

#[test]
fn alignment_is_not_checked_where_the_processor_reads_its_tables() {
    // The stack pointers of a 64-bit TSS stand at addresses that 8 does not divide.
    let mut cpu = long(3);
    cpu.cr0 |= cr0::AM;
    cpu.set_rflags(fl::AC | 2);
    cpu.refresh_mode();
    set_gate(&cpu, vector::UD, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    cpu.deliver_exception(exception(vector::UD, None));
    assert_eq!((cpu.rip, cpu.mode.cpl), (HANDLER, 0));
}

#[test]
fn a_delivery_that_faults_for_ever_ends() {
    // Level 3 handles its own #AC, on a misaligned stack.
    let mut cpu = protected(3);
    cpu.cr0 |= cr0::AM;
    cpu.set_rflags(fl::AC | 2);
    cpu.regs.set64(at::RSP, STACK - 1);
    cpu.refresh_mode();
    set_gate(&cpu, vector::AC, gate(INTERRUPT_GATE, 3, CODE3, HANDLER, 0));
    cpu.look = false;
    cpu.deliver_exception(exception(vector::AC, Some(0)));
    assert!(cpu.look && !cpu.shutdown);
    assert_eq!((cpu.rip, cpu.regs.r64(at::RSP)), (CODE, STACK - 1));
}

/// Executes one instruction under TF: the trap that waits then, and how far RIP has come.
fn stepped(cpu: &mut Cpu, bytes: &[u8]) -> (u64, u64) {
    let before = cpu.rip;
    cpu.memory.write(before, bytes).unwrap();
    cpu.set_rflags(fl::TF | 2);
    cpu.step_and_deliver();
    (std::mem::take(&mut cpu.debug_trap), cpu.rip.wrapping_sub(before))
}

#[test]
fn a_single_step_is_one_element_of_a_repeated_string_instruction() {
    let mut cpu = long(0);
    cpu.regs.set64(at::RCX, 3);
    cpu.regs.set64(at::RDI, 0x5000);
    let stos = [0xf3, 0xaa];
    for (left, distance) in [(2, 0), (1, 0), (0, 2)] {
        assert_eq!(stepped(&mut cpu, &stos), (DR6_BS, distance));
        assert_eq!((cpu.regs.r64(at::RCX), cpu.regs.r64(at::RDI)), (left, 0x5003 - left));
    }
}

#[test]
fn software_interrupts_are_not_single_stepped() {
    for bytes in [&[0xcd, 0x21][..], &[0xcc], &[0xf1]] {
        let mut cpu = long(0);
        for vector in [0x21, vector::BP, vector::DB] {
            set_gate(&cpu, vector, gate(INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
        }
        assert_eq!(stepped(&mut cpu, bytes), (0, HANDLER - CODE), "{bytes:02x?}");
    }
    let mut cpu = long(0);
    assert_eq!(stepped(&mut cpu, &[0x90]), (DR6_BS, 1));
}

#[test]
fn syscall_and_sysret_trap_by_the_flags_that_they_leave() {
    for (mask, trap) in [(fl::TF, 0), (0, DR6_BS)] {
        let mut cpu = long(3);
        cpu.efer |= efer::SCE;
        cpu.msrs.star = u64::from(CODE0) << 32;
        cpu.msrs.lstar = HANDLER;
        cpu.msrs.fmask = mask;
        assert_eq!(stepped(&mut cpu, &[0x0f, 0x05]), (trap, HANDLER - CODE));
    }
    // From code that is not stepped to code that is.
    let mut cpu = long(0);
    cpu.efer |= efer::SCE;
    cpu.msrs.star = u64::from(DATA0 | 3) << 48;
    cpu.regs.set64(at::RCX, 0x9000);
    cpu.regs.set64(at::R11, fl::TF | 2);
    assert_eq!(execute(&mut cpu, &[0x48, 0x0f, 0x07]), Step::Done);
    assert_eq!((cpu.debug_trap, cpu.look, cpu.rip), (DR6_BS, true, 0x9000));
}
