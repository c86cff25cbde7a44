//! Far transfers, returns, system calls, segment loads.

use super::super::descriptor::system_type::{CALL_GATE, CALL_GATE16};
use super::super::msr::index as msr;
use super::*;

fn far_pointer(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}

#[test]
fn far_jumps_check_privilege() {
    for (cpl, selector, wanted) in [
        (0, CODE0, Step::Done),
        (3, CODE3, Step::Done),
        (3, CODE3 & !3, Step::Done),
        (0, CODE0 | 3, gp(CODE0.into())),
        (0, CODE3, gp((CODE3 & !3).into())),
        (3, CODE0, gp(CODE0.into())),
        (3, CONFORMING, Step::Done),
        (0, CONFORMING | 3, Step::Done),
        (0, DATA0, gp(DATA0.into())),
        (0, 0, gp(0)),
        (0, 3, gp(0)),
        (0, 0xff8, gp(0xff8)),
        (0, 0xc, gp(0xc)),
        (0, ABSENT_CODE, raised(vector::NP, ABSENT_CODE.into())),
    ] {
        let mut cpu = protected(cpl);
        let found = execute(&mut cpu, &far_pointer(0xea, selector, HANDLER as u32));
        assert_eq!(found, wanted, "{cpl} {selector:#x}");
        if wanted == Step::Done {
            assert_eq!((cpu.rip, cpu.segs[seg::CS].selector), (HANDLER, selector & !3 | u16::from(cpl)));
            assert_eq!(cpu.mode.cpl, cpl);
        } else {
            assert_eq!((cpu.rip, cpu.segs[seg::CS].selector & 3), (CODE, cpl.into()));
        }
    }
}

#[test]
fn far_offsets_are_checked_against_the_new_limit() {
    let mut cpu = protected(0);
    // Byte-granular, 64 KiB.
    set_descriptor(&cpu, FREE, 0x0040_9b00_0000_ffff);
    assert_eq!(execute(&mut cpu, &far_pointer(0xea, FREE, 0x1_0000)), gp(0));
    assert_eq!(execute(&mut cpu, &far_pointer(0xea, FREE, 0xffff)), Step::Done);
    assert_eq!(cpu.segs[seg::CS].limit, 0xffff);
}

#[test]
fn loading_marks_a_descriptor_accessed() {
    let mut cpu = protected(0);
    set_descriptor(&cpu, FREE, flat(access::DATA | access::DB) & !(1 << 40));
    cpu.regs.set64(at::RAX, FREE.into());
    assert_eq!(execute(&mut cpu, &[0x8e, 0xd8]), Step::Done);
    assert_eq!(cpu.memory.read_u64(GDT + u64::from(FREE)).unwrap(), flat(access::DATA | access::DB));
    assert_ne!(cpu.segs[seg::DS].access & access::ACCESSED, 0);
}

#[test]
fn calls_through_gates_take_parameters_along() {
    for (kind, size) in [(CALL_GATE, 4usize), (CALL_GATE16, 2)] {
        let mut cpu = protected(3);
        set_descriptor(&cpu, FREE, gate(kind, 3, CODE0, HANDLER, 2));
        put_stack(&cpu, size, &[0x1111, 0x2222]);
        assert_eq!(execute(&mut cpu, &far_pointer(0x9a, FREE, 0xffff_ffff)), Step::Done);
        assert_eq!((cpu.rip, cpu.mode.cpl), (HANDLER, 0));
        assert_eq!(stack(&cpu, size), [CODE + 7, CODE3.into(), 0x1111, 0x2222, STACK, DATA3.into()]);
        assert_eq!(cpu.regs.r64(at::RSP), INNER_STACK - 6 * size as u64);
        // RETF 2 * size releases them on both stacks.
        let ret: &[u8] = if size == 4 { &[0xca, 8, 0] } else { &[0x66, 0xca, 4, 0] };
        assert_eq!(execute(&mut cpu, ret), Step::Done);
        assert_eq!((cpu.rip, cpu.mode.cpl, cpu.regs.r64(at::RSP)), (CODE + 7, 3, STACK + 2 * size as u64));
    }
}

#[test]
fn call_gates_are_privileged() {
    let mut cpu = protected(3);
    let call = far_pointer(0x9a, FREE, 0);
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 0, CODE0, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &call), gp(FREE.into()), "the gate's level");
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 3, CODE0, HANDLER, 0) & !(1 << 47));
    assert_eq!(execute(&mut cpu, &call), raised(vector::NP, FREE.into()));
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 3, DATA0, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &call), gp(DATA0.into()));
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 3, CODE0, HANDLER, 0));
    assert_eq!(
        execute(&mut cpu, &far_pointer(0xea, FREE, 0)),
        gp(CODE0.into()),
        "a jump does not change levels"
    );
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 3, CONFORMING, HANDLER, 0));
    assert_eq!(execute(&mut cpu, &call), Step::Done);
    assert_eq!((cpu.mode.cpl, cpu.segs[seg::CS].selector), (3, CONFORMING | 3));
}

#[test]
fn long_mode_call_gates_are_16_bytes() {
    let mut cpu = long(3);
    set_descriptor(&cpu, FREE, gate(CALL_GATE, 3, CODE0, HANDLER, 0));
    // CALL m16:32 through a pointer at 0xa000.
    cpu.memory.write_u32(0xa000, 0).unwrap();
    cpu.memory.write_u16(0xa004, FREE).unwrap();
    let call = [0xff, 0x1c, 0x25, 0, 0xa0, 0, 0];
    assert_eq!(execute(&mut cpu, &call), Step::Done);
    assert_eq!((cpu.rip, cpu.mode.cpl, cpu.segs[seg::SS].selector), (HANDLER, 0, 0));
    assert_eq!(stack(&cpu, 8), [CODE + 7, CODE3.into(), STACK, DATA3.into()]);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcb]), Step::Done, "RETFQ");
    assert_eq!((cpu.rip, cpu.mode.cpl, cpu.regs.r64(at::RSP)), (CODE + 7, 3, STACK));
    // The upper half has a type field of its own.
    cpu.memory.write_u64(GDT + u64::from(FREE) + 8, 1 << 40).unwrap();
    assert_eq!(execute(&mut cpu, &call), gp(FREE.into()));
}

#[test]
fn segment_loads_fault_as_the_manual_says() {
    let ds = |cpl, selector| {
        let mut cpu = protected(cpl);
        cpu.regs.set64(at::RAX, u64::from(selector));
        execute(&mut cpu, &[0x8e, 0xd8])
    };
    let ss = |cpl, selector| {
        let mut cpu = protected(cpl);
        cpu.regs.set64(at::RAX, u64::from(selector));
        let step = execute(&mut cpu, &[0x8e, 0xd0]);
        assert_eq!(cpu.mov_ss_shadow, step == Step::Done);
        step
    };
    assert_eq!(ds(0, 0u16), Step::Done);
    assert_eq!(ds(0, DATA0), Step::Done);
    assert_eq!(ds(3, DATA0), gp(DATA0.into()));
    assert_eq!(ds(0, DATA0 | 3), gp(DATA0.into()), "RPL counts");
    assert_eq!(ds(0, DATA3), Step::Done);
    assert_eq!(ds(3, CONFORMING), Step::Done);
    assert_eq!(ds(0, EXECUTE_ONLY), gp(EXECUTE_ONLY.into()));
    assert_eq!(ds(0, TASK), gp(TASK.into()));
    assert_eq!(ds(0, ABSENT_DATA), raised(vector::NP, ABSENT_DATA.into()));
    assert_eq!(ds(0, 0xffff), gp(0xfffc), "the LDT is null");
    assert_eq!(ss(0, 0u16), gp(0));
    assert_eq!(ss(0, DATA0), Step::Done);
    assert_eq!(ss(3, DATA3), Step::Done);
    assert_eq!(ss(3, DATA3 & !3), gp((DATA3 & !3).into()), "RPL must be CPL");
    assert_eq!(ss(0, DATA3), gp((DATA3 & !3).into()));
    assert_eq!(ss(0, READ_ONLY), gp(READ_ONLY.into()));
    assert_eq!(ss(0, CODE0), gp(CODE0.into()));
    assert_eq!(ss(0, ABSENT_DATA), raised(vector::SS, ABSENT_DATA.into()));

    let mut cpu = long(0);
    cpu.regs.set64(at::RAX, 0);
    assert_eq!(execute(&mut cpu, &[0x8e, 0xd0]), Step::Done, "64-bit mode takes a null SS below level 3");
    assert_eq!(cpu.mode.cpl, 0);
    let mut cpu = long(3);
    cpu.regs.set64(at::RAX, 3);
    assert_eq!(execute(&mut cpu, &[0x8e, 0xd0]), gp(0));
    let mut cpu = protected(0);
    assert_eq!(execute(&mut cpu, &[0x8e, 0xc8]), UD, "MOV CS");
}

#[test]
fn the_local_table() {
    let mut cpu = protected(0);
    cpu.regs.set64(at::RAX, LOCAL.into());
    assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd0]), Step::Done, "LLDT");
    cpu.memory.write_u64(LDT + 8, flat(access::DATA | access::DB)).unwrap();
    cpu.regs.set64(at::RAX, 0xc);
    assert_eq!(execute(&mut cpu, &[0x8e, 0xd8]), Step::Done);
    assert_eq!(cpu.segs[seg::DS].selector, 0xc);
    cpu.regs.set64(at::RAX, TASK.into());
    assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd0]), gp(TASK.into()));
    cpu.regs.set64(at::RAX, 0xc);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd0]), gp(0xc), "it must lie in the GDT");
    cpu.regs.set64(at::RAX, 0);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd0]), Step::Done);
    assert_ne!(cpu.ldtr.access & Segment::UNUSABLE, 0);
}

#[test]
fn the_task_register() {
    for mut cpu in [protected(0), long(0)] {
        cpu.regs.set64(at::RAX, TASK.into());
        assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd8]), Step::Done, "LTR");
        assert_eq!((cpu.tr.base, cpu.tr.access & 0xf), (TSS, 11));
        assert_eq!(cpu.memory.read_u8(GDT + u64::from(TASK) + 5).unwrap() & 0xf, 11, "busy");
        assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd8]), gp(TASK.into()), "not again");
        cpu.regs.set64(at::RAX, 0);
        assert_eq!(execute(&mut cpu, &[0x0f, 0x00, 0xd8]), gp(0));
    }
    assert_eq!(execute(&mut protected(3), &[0x0f, 0x00, 0xd8]), gp(0));
    assert_eq!(execute(&mut real(), &[0x0f, 0x00, 0xd8]), UD);
}

#[test]
fn pop_ss_moves_the_old_stack_pointer() {
    let mut cpu = protected(0);
    // A 16-bit stack segment: the pop still is one of the 32-bit stack.
    set_descriptor(&cpu, FREE, flat(access::DATA));
    cpu.regs.set64(at::RSP, 0x1_fffe);
    put_stack(&cpu, 4, &[FREE.into()]);
    assert_eq!(execute(&mut cpu, &[0x17]), Step::Done);
    assert_eq!((cpu.regs.r64(at::RSP), cpu.mode.stack_mask), (0x2_0002, 0xffff));
    assert!(cpu.mov_ss_shadow);
}

#[test]
fn iret_to_an_outer_level_drops_privileged_segments() {
    let mut cpu = protected(0);
    cpu.segs[seg::FS] = cpu.segs[seg::DS];
    cpu.segs[seg::ES] =
        Segment { selector: DATA3, access: cpu.segs[seg::ES].access | access::DPL, ..cpu.segs[seg::ES] };
    put_stack(&cpu, 4, &[HANDLER, CODE3.into(), fl::IF | 2, 0x5000, DATA3.into()]);
    assert_eq!(execute(&mut cpu, &[0xcf]), Step::Done);
    assert_eq!(
        (cpu.mode.cpl, cpu.rip, cpu.regs.r64(at::RSP), cpu.rflags()),
        (3, HANDLER, 0x5000, fl::IF | 2)
    );
    for register in [seg::DS, seg::FS, seg::GS] {
        assert_ne!(cpu.segs[register].access & Segment::UNUSABLE, 0);
    }
    assert_eq!(cpu.segs[seg::ES].selector, DATA3);
}

#[test]
fn iret_faults_leave_everything() {
    let frame = |cs: u16, ss: u16| [HANDLER, cs.into(), 2, 0x5000, ss.into()];
    for (frame, wanted) in [
        (frame(0, DATA3), gp(0)),
        (frame(DATA0, DATA3), gp(DATA0.into())),
        (frame(CODE3, 0), gp(0)),
        (frame(CODE3, DATA0), gp(DATA0.into())),
        (frame(CODE3, CODE3), gp((CODE3 & !3).into())),
        (frame(ABSENT_CODE, DATA0), raised(vector::NP, ABSENT_CODE.into())),
        (frame(CODE0, ABSENT_DATA), raised(vector::SS, ABSENT_DATA.into())),
    ] {
        let mut cpu = long(0);
        put_stack(&cpu, 8, &frame);
        let before = cpu
            .get_state(skep_hv::state::StateGroups { msrs: false, ..skep_hv::state::StateGroups::ALL })
            .unwrap();
        assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), wanted, "{frame:x?}");
        let after = cpu
            .get_state(skep_hv::state::StateGroups { msrs: false, ..skep_hv::state::StateGroups::ALL })
            .unwrap();
        assert_eq!(after, before);
    }
    let mut cpu = long(0);
    put_stack(&cpu, 8, &[1 << 60, CODE0.into(), 2, 0x5000, DATA0.into()]);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), gp(0), "not canonical");
    cpu.set_rflags(fl::NT | 2);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), gp(0), "NT");
    let mut cpu = long(3);
    put_stack(&cpu, 8, &[HANDLER, CODE0.into(), 2, 0x5000, DATA0.into()]);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), gp(CODE0.into()), "no return to an inner level");
}

#[test]
fn iret_changes_flags_by_privilege() {
    // From level 3 with IOPL 0, neither IF nor IOPL move.
    let mut cpu = long(3);
    put_stack(
        &cpu,
        8,
        &[
            HANDLER,
            CODE3.into(),
            fl::IF | fl::IOPL | fl::VIP | fl::AC | fl::CF | fl::VM | 2,
            STACK,
            DATA3.into(),
        ],
    );
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), Step::Done);
    assert_eq!(cpu.rflags(), fl::AC | fl::CF | 2);
    // A 16-bit one leaves the upper half.
    let mut cpu = protected(0);
    cpu.set_rflags(fl::AC | fl::ID | 2);
    put_stack(&cpu, 2, &[0x9000, CODE0.into(), fl::IF | fl::IOPL | fl::ZF]);
    assert_eq!(execute(&mut cpu, &[0x66, 0xcf]), Step::Done);
    assert_eq!(cpu.rflags(), fl::AC | fl::ID | fl::IF | fl::IOPL | fl::ZF | 2);
}

#[test]
fn iret_to_compatibility_mode_and_a_system_call_from_there() {
    let mut cpu = long(0);
    put_stack(&cpu, 8, &[HANDLER, OTHER_CODE3.into(), 2, 0x1_0000_5000, DATA3.into()]);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcf]), Step::Done);
    assert!(cpu.mode.long && !cpu.is_64bit());
    assert_eq!(cpu.regs.r64(at::RSP), 0x5000);
    cpu.rip = CODE;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x05]), UD, "SYSCALL is for 64-bit mode");
    cpu.msrs.sysenter_cs = CODE0.into();
    cpu.msrs.sysenter_esp = INNER_STACK;
    cpu.msrs.sysenter_eip = HANDLER;
    cpu.rip = CODE;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x34]), Step::Done, "SYSENTER");
    assert!(cpu.is_64bit() && cpu.mode.cpl == 0);
    assert_eq!((cpu.rip, cpu.regs.r64(at::RSP)), (HANDLER, INNER_STACK));
    cpu.regs.set64(at::RCX, STACK);
    cpu.regs.set64(at::RDX, CODE);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x35]), Step::Done, "SYSEXIT");
    assert!(!cpu.is_64bit() && cpu.mode.cpl == 3);
    assert_eq!(
        (cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector),
        ((CODE0 + 16) | 3, (CODE0 + 24) | 3)
    );
}

#[test]
fn syscall_and_sysret() {
    let mut cpu = long(3);
    assert_eq!(cpu.msr_write(msr::STAR, u64::from(CODE0) << 32 | 0x10 << 48), Some(()));
    assert_eq!(cpu.msr_write(msr::LSTAR, HANDLER), Some(()));
    assert_eq!(cpu.msr_write(msr::FMASK, fl::IF | fl::DF | fl::CF), Some(()));
    cpu.set_rflags(fl::IF | fl::CF | fl::ZF | fl::RF | 2);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x05]), Step::Done);
    assert_eq!((cpu.rip, cpu.mode.cpl, cpu.rflags()), (HANDLER, 0, fl::ZF | 2));
    assert_eq!(cpu.regs.r64(at::RCX), CODE + 2);
    assert_eq!(cpu.regs.r64(at::R11), fl::IF | fl::CF | fl::ZF | 2);
    assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector), (CODE0, CODE0 + 8));
    assert_eq!(cpu.regs.r64(at::RSP), STACK, "the stack is the kernel's affair");

    assert_eq!(execute(&mut cpu, &[0x48, 0x0f, 0x07]), Step::Done, "SYSRETQ");
    assert_eq!((cpu.rip, cpu.mode.cpl, cpu.rflags()), (CODE + 2, 3, fl::IF | fl::CF | fl::ZF | 2));
    assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector), (0x23, 0x1b));
    assert!(cpu.is_64bit());
    assert_eq!(execute(&mut cpu, &[0x48, 0x0f, 0x07]), gp(0), "not from level 3");

    let mut cpu = long(0);
    cpu.regs.set64(at::RCX, 1 << 47);
    assert_eq!(execute(&mut cpu, &[0x48, 0x0f, 0x07]), gp(0), "not canonical");
    assert_eq!(cpu.mode.cpl, 0);
    cpu.msrs.star = 0x10 << 48;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x07]), Step::Done, "SYSRETL goes to 32-bit code");
    assert!(!cpu.is_64bit());
    assert_eq!((cpu.rip, cpu.segs[seg::CS].selector), (0, 0x13));
    let mut cpu = long(0);
    cpu.efer &= !efer::SCE;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x05]), UD);
    assert_eq!(execute(&mut cpu, &[0x48, 0x0f, 0x07]), UD);
}

#[test]
fn sysenter_needs_its_msr() {
    let mut cpu = protected(3);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x34]), gp(0));
    assert_eq!(execute(&mut cpu, &[0x0f, 0x35]), gp(0));
    assert_eq!(execute(&mut real(), &[0x0f, 0x34]), gp(0));
}

#[test]
fn real_mode_far_transfers() {
    let mut cpu = real();
    assert_eq!(execute(&mut cpu, &[0x9a, 0x10, 0x00, 0x00, 0x09]), Step::Done);
    assert_eq!((cpu.segs[seg::CS].base, cpu.rip), (0x9000, 0x10));
    assert_eq!(stack(&cpu, 2), [CODE + 5, 0]);
    assert_eq!(execute(&mut cpu, &[0xca, 2, 0]), Step::Done);
    assert_eq!((cpu.segs[seg::CS].base, cpu.rip, cpu.regs.r64(at::RSP)), (0, CODE + 5, STACK + 2));
    // IRET takes all of FLAGS.
    put_stack(&cpu, 2, &[CODE, 0, 0xffff]);
    assert_eq!(execute(&mut cpu, &[0xcf]), Step::Done);
    assert_eq!(cpu.rflags(), 0x7fd7 & 0xffff);
}

#[test]
fn real_mode_keeps_limits() {
    let mut cpu = real();
    cpu.segs[seg::DS].limit = u32::MAX;
    cpu.segs[seg::DS].access |= access::G;
    cpu.regs.set64(at::RAX, 0x123);
    assert_eq!(execute(&mut cpu, &[0x8e, 0xd8]), Step::Done);
    assert_eq!((cpu.segs[seg::DS].base, cpu.segs[seg::DS].limit), (0x1230, u32::MAX));
}

#[test]
fn lar_lsl_verr_verw() {
    let mut cpu = protected(3);
    let lar = [0x0f, 0x02, 0xc1];
    let lsl = [0x0f, 0x03, 0xc1];
    let verr = [0x0f, 0x00, 0xe1];
    let verw = [0x0f, 0x00, 0xe9];
    let mut ask = |selector: u16, bytes: &[u8]| {
        cpu.rip = CODE;
        cpu.regs.set64(at::RAX, 0x55);
        cpu.regs.set64(at::RCX, selector.into());
        assert_eq!(execute(&mut cpu, bytes), Step::Done);
        let zero = cpu.rflags() & fl::ZF != 0;
        zero.then_some(cpu.regs.r64(at::RAX))
    };
    assert_eq!(ask(DATA3, &lar), Some(0x00c0_f300));
    assert_eq!(ask(DATA0, &lar), None, "too privileged");
    assert_eq!(ask(CONFORMING, &lar), Some(0x00c0_9f00));
    assert_eq!(ask(DATA3, &lsl), Some(0xffff_ffff));
    assert_eq!(ask(0, &lsl), None);
    assert_eq!(ask(0xff8, &lsl), None);
    assert_eq!(ask(DATA3, &verr), Some(0x55));
    assert_eq!(ask(CODE3, &verr), Some(0x55));
    assert_eq!(ask(CODE3, &verw), None);
    assert_eq!(ask(DATA3, &verw), Some(0x55));
    assert_eq!(ask(READ_ONLY, &verr), None);
    let mut cpu = protected(0);
    cpu.regs.set64(at::RCX, TASK.into());
    assert_eq!(execute(&mut cpu, &lsl), Step::Done);
    assert_eq!(cpu.regs.r64(at::RAX), 0x2067);
    assert_eq!(execute(&mut real(), &lar), UD);
}
