//! Control, debug and model-specific registers, CPUID.

use super::super::msr::index as msr;
use super::*;

/// MOV CRn, RAX in 64-bit mode; EAX elsewhere.
fn mov_cr(cpu: &mut Cpu, number: u8, value: u64) -> Step {
    cpu.regs.set64(at::RAX, value);
    let rip = cpu.rip;
    let step = execute(cpu, &[0x0f, 0x22, 0xc0 | number << 3]);
    cpu.rip = rip;
    step
}

#[test]
fn cr0_is_checked() {
    let mut cpu = protected(0);
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PG), gp(0), "PG without PE");
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE | cr0::NW), gp(0), "NW without CD");
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE | 0x1ff8_0000 | cr0::ET), Step::Done, "reserved bits are ignored");
    assert_eq!(cpu.cr0, cr0::PE | cr0::ET);
    assert_eq!(mov_cr(&mut cpu, 0, 0), Step::Done);
    assert_eq!(cpu.cr0, cr0::ET, "ET is always one");
    assert!(!cpu.mode.protected);
    let mut cpu = long(0);
    let now = cpu.cr0;
    assert_eq!(mov_cr(&mut cpu, 0, now | 1 << 32), gp(0));
    assert_eq!(mov_cr(&mut cpu, 0, now & !cr0::PG), gp(0), "64-bit mode cannot leave paging");
    assert_eq!(mov_cr(&mut long(3), 0, 0), gp(0));
    assert_eq!(execute(&mut long(0), &[0x0f, 0x22, 0xc8]), UD, "CR1");
}

#[test]
fn into_and_out_of_ia32e_mode() {
    let mut cpu = protected(0);
    for (table, entry) in
        [(0, (PAGE_TABLES + 0x1000) | 7), (0x1000, (PAGE_TABLES + 0x2000) | 7), (0x2000, 0x87)]
    {
        cpu.memory.write_u64(PAGE_TABLES + table, entry).unwrap();
    }
    assert_eq!(cpu.msr_write(msr::EFER, efer::LME), Some(()));
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES), Step::Done);
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE | cr0::PG), gp(0), "PAE is missing");
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE), Step::Done);
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE | cr4::PCIDE), gp(0), "PCIDE before IA-32e mode");
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE | cr0::PG), Step::Done);
    assert_ne!(cpu.efer & efer::LMA, 0);
    assert!(cpu.mode.long && !cpu.is_64bit());
    assert_eq!(cpu.msr_write(msr::EFER, 0), None, "LME under paging");
    assert_eq!(cpu.msr_write(msr::EFER, efer::LME | efer::SCE), Some(()), "LMA is not software's");
    assert_ne!(cpu.efer & efer::LMA, 0);
    assert_eq!(mov_cr(&mut cpu, 4, 0), gp(0), "PAE under IA-32e mode");
    // To 64-bit code by a far jump.
    set_descriptor(&cpu, FREE, flat(access::CODE_SEGMENT | access::L));
    let rip = cpu.rip;
    assert_eq!(execute(&mut cpu, &[0xea, 0, 0x90, 0, 0, FREE as u8, 0]), Step::Done);
    assert!(cpu.is_64bit());
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE | cr4::LA57), gp(0), "LA57 in IA-32e mode");
    // Back.
    put_stack(&cpu, 8, &[rip, CODE0.into()]);
    assert_eq!(execute(&mut cpu, &[0x48, 0xcb]), Step::Done);
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE), Step::Done);
    assert_eq!(cpu.efer, efer::LME | efer::SCE);
    assert!(!cpu.mode.long);
}

#[test]
fn pcids() {
    let mut cpu = long(0);
    cpu.cr3 |= 8;
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE | cr4::PCIDE), gp(0), "CR3 has low bits");
    cpu.cr3 = PAGE_TABLES;
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 1 << 63), gp(0), "bit 63 without PCIDE");
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE | cr4::PCIDE), Step::Done);
    // A translation of PCID 5 outlives a visit to PCID 6, unless it is flushed.
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 5), Step::Done);
    assert_eq!(cpu.read::<u64>(0xa000), Ok(0));
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 6), Step::Done);
    assert!(cpu.tlb.read(0xa000, 8).is_none());
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 5 | 1 << 63), Step::Done);
    assert_eq!(cpu.cr3, PAGE_TABLES | 5, "bit 63 is no part of CR3");
    assert!(cpu.tlb.read(0xa000, 8).is_some());
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 5), Step::Done);
    assert!(cpu.tlb.read(0xa000, 8).is_none());
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 1 << 50), gp(0), "beyond MAXPHYADDR");
}

#[test]
fn invpcid_in_all_its_types() {
    const INVPCID: [u8; 9] = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0xb0, 0];
    fn invpcid(cpu: &mut Cpu, kind: u64, pcid: u64, linear: u64) -> Step {
        cpu.memory.write_u64(0xb000, pcid).unwrap();
        cpu.memory.write_u64(0xb008, linear).unwrap();
        cpu.regs.set64(at::RAX, kind);
        let rip = cpu.rip;
        let mut bytes = INVPCID.to_vec();
        bytes.push(0);
        let step = execute(cpu, &bytes);
        cpu.rip = rip;
        step
    }
    let mut cpu = long(0);
    assert_eq!(invpcid(&mut cpu, 1, 1, 0), gp(0), "a PCID without PCIDE");
    assert_eq!(invpcid(&mut cpu, 1, 0, 0), Step::Done);
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE | cr4::PCIDE), Step::Done);
    assert_eq!(invpcid(&mut cpu, 4, 0, 0), gp(0));
    assert_eq!(invpcid(&mut cpu, 1, 0x1000, 0), gp(0));
    assert_eq!(invpcid(&mut cpu, 0, 0, 1 << 60), gp(0));
    for (kind, pcid, gone) in [(0, 5, true), (1, 5, true), (1, 6, false), (2, 0, true), (3, 0, true)] {
        assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES | 5 | 1 << 63), Step::Done);
        assert_eq!(cpu.read::<u64>(0xa000), Ok(0));
        assert_eq!(invpcid(&mut cpu, kind, pcid, 0xa000), Step::Done);
        assert_eq!(cpu.tlb.read(0xa000, 8).is_none(), gone, "type {kind}");
    }
    assert_eq!(invpcid(&mut long(3), 2, 0, 0), gp(0));
}

#[test]
fn global_translations_outlive_cr3_and_nothing_else() {
    let mut cpu = long(0);
    let (cr0, with_pge) = (cpu.cr0, cpu.cr4 | cr4::PGE);
    assert_eq!(mov_cr(&mut cpu, 4, with_pge), Step::Done);
    // The entry that maps 0xa000, alone or as part of a large page.
    let (mut entry, mut level) = (cpu.cr3, 4);
    loop {
        let at = (entry & !0xfff) + (0xa000 >> (12 + 9 * (level - 1)) & 511) * 8;
        entry = cpu.memory.read_u64(at).unwrap();
        if level == 1 || entry & 1 << 7 != 0 {
            cpu.memory.write_u64(at, entry | 1 << 8).unwrap();
            break;
        }
        level -= 1;
    }
    let invlpg = [0x0f, 0x01, 0x3c, 0x25, 0, 0xa0, 0, 0];
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0xb0, 0, 0];
    for change in 0..6 {
        assert_eq!(cpu.write::<u64>(0xa000, 1), Ok(()));
        let kept = change < 2;
        let rip = cpu.rip;
        cpu.memory.write(0xb000, &[0; 16]).unwrap();
        let step = match change {
            0 => mov_cr(&mut cpu, 3, PAGE_TABLES),
            1 | 2 => {
                // All but global ones, all.
                cpu.regs.set64(at::RAX, if change == 1 { 3 } else { 2 });
                execute(&mut cpu, &invpcid)
            }
            3 => execute(&mut cpu, &invlpg),
            4 => mov_cr(&mut cpu, 4, with_pge & !cr4::PGE),
            _ => mov_cr(&mut cpu, 0, cr0 ^ cr0::WP),
        };
        cpu.rip = rip;
        assert_eq!(step, Step::Done);
        assert!(cpu.tlb.read(0xa000, 8).is_none(), "change {change}");
        let context = cpu.tlb.context();
        assert_eq!(cpu.tlb.global(context, 0xa000, true).is_some(), kept, "change {change}");
        assert_eq!(cpu.read::<u64>(0xa000), Ok(1));
        assert_eq!(mov_cr(&mut cpu, 4, with_pge), Step::Done);
    }
}

#[test]
fn a_page_is_forgotten_by_invlpg_and_by_every_change_of_translation() {
    let mut cpu = long(0);
    let invlpg = [0x0f, 0x01, 0x3c, 0x25, 0, 0xa0, 0, 0];
    let with_pge = cpu.cr4 | cr4::PGE;
    for change in 0..4 {
        assert_eq!(cpu.read::<u64>(0xa000), Ok(0));
        assert!(cpu.tlb.read(0xa000, 8).is_some());
        let rip = cpu.rip;
        let step = match change {
            0 => execute(&mut cpu, &invlpg),
            1 => mov_cr(&mut cpu, 3, PAGE_TABLES),
            2 => mov_cr(&mut cpu, 4, with_pge),
            _ => mov_cr(&mut cpu, 0, cr0::PE | cr0::PG),
        };
        cpu.rip = rip;
        assert_eq!(step, Step::Done);
        assert!(cpu.tlb.read(0xa000, 8).is_none(), "change {change}");
    }
    assert_eq!(execute(&mut long(3), &invlpg), gp(0));
}

#[test]
fn pae_pointers_are_loaded_and_checked() {
    let mut cpu = protected(0);
    assert_eq!(mov_cr(&mut cpu, 4, cr4::PAE), Step::Done);
    cpu.memory.write_u64(PAGE_TABLES + 0x20, (PAGE_TABLES + 0x1000) | 1).unwrap();
    cpu.memory.write_u64(PAGE_TABLES + 0x38, 2).unwrap();
    cpu.memory.write_u64(PAGE_TABLES + 0x1000, 0x83).unwrap();
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES + 0x20), Step::Done, "not paging yet");
    assert_eq!(mov_cr(&mut cpu, 0, cr0::PE | cr0::PG), Step::Done, "an absent entry may hold anything");
    // What is loaded stays until CR3 is written.
    cpu.memory.write_u64(PAGE_TABLES + 0x20, 0).unwrap();
    assert_eq!(execute(&mut cpu, &[0x90]), Step::Done);
    cpu.memory.write_u64(PAGE_TABLES + 0x20, (PAGE_TABLES + 0x1000) | 3).unwrap();
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES + 0x20), gp(0), "bit 1 is reserved");
    cpu.memory.write_u64(PAGE_TABLES + 0x20, 1 << 50 | 1).unwrap();
    assert_eq!(mov_cr(&mut cpu, 3, PAGE_TABLES + 0x20), gp(0));
}

#[test]
fn cr4_has_the_bits_of_the_model_only() {
    let mut cpu = long(0);
    for bit in 0..64 {
        let value = cr4::PAE | 1 << bit;
        let known = cpu.msrs.model.cr4 >> bit & 1 != 0 && 1 << bit != cr4::LA57;
        assert_eq!(cpu.write_cr4(value).is_ok(), known, "bit {bit}");
        assert_eq!(cpu.write_cr4(cr4::PAE), Ok(()));
    }
}

#[test]
fn lmsw_sets_pe_and_never_clears_it() {
    let mut cpu = protected(0);
    cpu.regs.set64(at::RAX, 0xe);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xf0]), Step::Done);
    assert_eq!(cpu.cr0 & 0xf, 0xf);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x06]), Step::Done, "CLTS");
    assert_eq!(cpu.cr0 & 0xf, 7);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xe0]), Step::Done, "SMSW");
    assert_eq!(cpu.regs.r64(at::RAX), cpu.cr0);
}

#[test]
fn umip_hides_system_registers_from_users() {
    // SGDT, SIDT [0xa000]; SLDT, STR, SMSW EAX.
    let looks: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x04, 0x25, 0, 0xa0, 0, 0],
        &[0x0f, 0x01, 0x0c, 0x25, 0, 0xa0, 0, 0],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ];
    for bytes in looks {
        for (cpl, umip, wanted) in [(3, 0, Step::Done), (3, cr4::UMIP, gp(0)), (0, cr4::UMIP, Step::Done)] {
            let mut cpu = long(cpl);
            cpu.cr4 |= umip;
            assert_eq!(execute(&mut cpu, bytes), wanted);
        }
    }
}

#[test]
fn descriptor_table_registers() {
    let mut cpu = long(0);
    cpu.memory.write(0xa000, &[0x34, 0x12, 1, 2, 3, 4, 5, 0, 0, 0]).unwrap();
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0x1c, 0x25, 0, 0xa0, 0, 0]), Step::Done, "LIDT");
    assert_eq!(cpu.idtr, Table { base: 0x05_0403_0201, limit: 0x1234 });
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0x0c, 0x25, 0, 0xb0, 0, 0]), Step::Done, "SIDT");
    assert_eq!(cpu.memory.read_array::<10>(0xb000).unwrap(), cpu.memory.read_array::<10>(0xa000).unwrap());
    cpu.memory.write_u8(0xa009, 0x12).unwrap();
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0x1c, 0x25, 0, 0xa0, 0, 0]), gp(0), "not canonical");
    let mut cpu = real();
    cpu.memory.write(0xa000, &[0x34, 0x12, 1, 2, 3, 4]).unwrap();
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0x16, 0x00, 0xa0]), Step::Done, "LGDT with 16-bit operands");
    assert_eq!(cpu.gdtr, Table { base: 0x03_0201, limit: 0x1234 });
    assert_eq!(execute(&mut cpu, &[0x66, 0x0f, 0x01, 0x16, 0x00, 0xa0]), Step::Done);
    assert_eq!(cpu.gdtr.base, 0x0403_0201);
}

#[test]
fn debug_registers() {
    fn mov_dr(cpu: &mut Cpu, number: u8, value: u64) -> Step {
        cpu.regs.set64(at::RAX, value);
        execute(cpu, &[0x0f, 0x23, 0xc0 | number << 3])
    }
    let mut cpu = long(0);
    assert_eq!(mov_dr(&mut cpu, 7, 1 << 32), gp(0));
    assert_eq!(mov_dr(&mut cpu, 6, 0), Step::Done);
    assert_eq!(cpu.dr6, 0xffff_0ff0);
    assert_eq!(mov_dr(&mut cpu, 0, 0xa004), Step::Done);
    // A four-byte write breakpoint, by its alias without CR4.DE.
    assert_eq!(mov_dr(&mut cpu, 5, 0x000d_0001), Step::Done);
    assert_eq!(cpu.dr7, 0x000d_0401);
    assert_eq!(execute(&mut cpu, &[0x8b, 0x04, 0x25, 0x04, 0xa0, 0, 0]), Step::Done);
    assert_eq!(cpu.debug_trap, 0, "reads do not count");
    assert_eq!(execute(&mut cpu, &[0x88, 0x04, 0x25, 0x08, 0xa0, 0, 0]), Step::Done);
    assert_eq!(cpu.debug_trap, 0, "beside it");
    assert_eq!(execute(&mut cpu, &[0x88, 0x04, 0x25, 0x07, 0xa0, 0, 0]), Step::Done);
    assert_eq!(cpu.debug_trap, 1);
    cpu.cr4 |= cr4::DE;
    assert_eq!(mov_dr(&mut cpu, 5, 0), UD);
    cpu.dr7 |= super::super::debug::dr7::GD;
    assert_eq!(mov_dr(&mut cpu, 1, 0), Step::Raised(Exception { vector: vector::DB, error: None }));
    assert_ne!(cpu.dr6 & 1 << 13, 0);
    assert_eq!(mov_dr(&mut long(3), 0, 0), gp(0));
}

#[test]
fn instruction_breakpoints_wait_for_rf_to_go() {
    let mut cpu = long(0);
    cpu.dr[2] = CODE;
    cpu.dr7 |= 1 << 4;
    assert!(cpu.instruction_breakpoint(CODE));
    assert_eq!(cpu.dr6 & 0xf, 4);
    assert!(!cpu.instruction_breakpoint(CODE + 1));
    cpu.set_rflags(fl::RF | 2);
    assert!(!cpu.instruction_breakpoint(CODE));
}

#[test]
fn model_specific_registers() {
    let mut cpu = long(0);
    let mut access = |number: u32, value: Option<u64>| {
        cpu.rip = CODE;
        cpu.regs.set64(at::RCX, number.into());
        match value {
            Some(value) => {
                cpu.set_edx_eax(value);
                (execute(&mut cpu, &[0x0f, 0x30]), 0)
            }
            None => (execute(&mut cpu, &[0x0f, 0x32]), cpu.edx_eax()),
        }
    };
    for number in [
        msr::LSTAR,
        msr::CSTAR,
        msr::FS_BASE,
        msr::GS_BASE,
        msr::KERNEL_GS_BASE,
        msr::SYSENTER_EIP,
        msr::SYSENTER_ESP,
    ] {
        assert_eq!(access(number, Some(0xffff_8000_1234_5678)).0, Step::Done, "{number:#x}");
        assert_eq!(access(number, None), (Step::Done, 0xffff_8000_1234_5678));
        assert_eq!(access(number, Some(1 << 47)).0, gp(0), "{number:#x} is not canonical");
    }
    for (number, bad) in [
        (msr::EFER, 1 << 1),
        (msr::PAT, 2),
        (msr::FMASK, 1 << 32),
        (msr::TSC_AUX, 1 << 32),
        (msr::SPEC_CTRL, 1 << 5),
        (msr::FEATURE_CONTROL, 0),
        (msr::ARCH_CAPABILITIES, 0),
        (msr::MCG_STATUS, 1),
        (msr::MC0_CTL + 1, 1),
        (0x4b56_4d03, 2),
    ] {
        assert_eq!(access(number, Some(bad)).0, gp(0), "{number:#x}");
    }
    for unknown in [0u32, 0x2ff + 1, 0x480, 0xc001_0015, 0xc000_0108, 0x4b56_4d02, 0x4b56_4d04, u32::MAX] {
        assert_eq!(access(unknown, None).0, gp(0), "{unknown:#x}");
        assert_eq!(access(unknown, Some(0)).0, gp(0), "{unknown:#x}");
    }
    assert_eq!(execute(&mut long(3), &[0x0f, 0x32]), gp(0));
}

#[test]
fn no_msr_brings_the_processor_down() {
    let mut cpu = long(0);
    let mut seed = 1u64;
    for number in (0..0x2000u32).chain(0xc000_0000..0xc000_2000).chain(0x4b56_4d00..0x4b56_4d10) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let before = cpu.msr_read(number);
        for value in [0, seed, u64::MAX, 1 << 46 | 1] {
            let written = cpu.msr_write(number, value);
            assert!(written.is_none() || before.is_some() || matches!(number, msr::PRED_CMD), "{number:#x}");
        }
    }
}

#[test]
fn fs_and_gs_bases() {
    let mut cpu = long(3);
    assert_eq!(execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xc0]), UD, "RDFSBASE without CR4.FSGSBASE");
    cpu.cr4 |= cr4::FSGSBASE;
    cpu.regs.set64(at::RAX, 0x1234_5678_9abc);
    assert_eq!(execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xd8]), Step::Done, "WRGSBASE RAX");
    assert_eq!(execute(&mut cpu, &[0xf3, 0x0f, 0xae, 0xc9]), Step::Done, "RDGSBASE ECX");
    assert_eq!(cpu.regs.r64(at::RCX), 0x5678_9abc);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xf8]), gp(0), "SWAPGS");
    cpu.regs.set64(at::RAX, 1 << 60);
    assert_eq!(execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), gp(0));
    let mut cpu = long(0);
    cpu.msrs.kernel_gs_base = 7;
    cpu.segs[seg::GS].base = 9;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xf8]), Step::Done);
    assert_eq!((cpu.msrs.kernel_gs_base, cpu.segs[seg::GS].base), (9, 7));
}

#[test]
fn cpuid_and_xcr0() {
    let mut cpu = long(3);
    cpu.regs.set64(at::RAX, 0xffff_ffff_0000_0000);
    assert_eq!(execute(&mut cpu, &[0x0f, 0xa2]), Step::Done);
    assert_eq!(cpu.regs.r64(at::RBX), 0x756e_6547, "upper halves are cleared");
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xd0]), UD, "XGETBV without OSXSAVE");
    let mut cpu = long(0);
    if cpu.msrs.model.cr4 & cr4::OSXSAVE == 0 {
        return;
    }
    cpu.cr4 |= cr4::OSXSAVE;
    cpu.regs.set64(at::RCX, 0);
    for (value, wanted) in [(1, Step::Done), (3, Step::Done), (0, gp(0)), (5, gp(0)), (1 << 9 | 1, gp(0))] {
        cpu.set_edx_eax(value);
        assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xd1]), wanted, "XSETBV {value:#x}");
    }
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xd0]), Step::Done);
    assert_eq!(cpu.edx_eax(), 3);
}

#[test]
fn the_tsc_is_privileged_only_if_asked() {
    let mut cpu = long(3);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x31]), Step::Done);
    let first = cpu.edx_eax();
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xf9]), Step::Done, "RDTSCP");
    assert!(cpu.edx_eax() >= first);
    cpu.cr4 |= cr4::TSD;
    assert_eq!(execute(&mut cpu, &[0x0f, 0x31]), gp(0));
    let mut cpu = long(0);
    cpu.cr4 |= cr4::TSD;
    cpu.msrs.tsc_aux = 0x55;
    assert_eq!(execute(&mut cpu, &[0xf3, 0x0f, 0xc7, 0xf8]), Step::Done, "RDPID");
    assert_eq!(cpu.regs.r64(at::RAX), 0x55);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x31]), Step::Done);
}

#[test]
fn the_paravirtual_clock_is_written_where_the_guest_says() {
    let mut cpu = long(0);
    assert_eq!(cpu.msr_write(0x4b56_4d01, 0xa000 | 1), Some(()));
    let word = |cpu: &Cpu, at: u64| cpu.memory.read_u32(0xa000 + at).unwrap();
    assert_eq!(word(&cpu, 0) & 1, 0);
    assert_eq!((word(&cpu, 24), word(&cpu, 28) & 0xff), (1 << 31, 1), "a TSC of 1 GHz");
    let version = word(&cpu, 0);
    assert_eq!(cpu.msr_write(msr::TSC_ADJUST, 1000), Some(()));
    assert_eq!(word(&cpu, 8), 1000, "the clock does not move with the guest's TSC");
    assert_ne!(word(&cpu, 0), version);
    assert_eq!(cpu.msr_write(0x4b56_4d00, 0xb000), Some(()));
    assert!(cpu.memory.read_u32(0xb004).unwrap() > 1_600_000_000);
    // Addresses without memory are nobody's loss.
    for at in [1 << 40, u64::MAX] {
        cpu.msr_write(0x4b56_4d00, at);
        cpu.msr_write(0x4b56_4d01, at | 1);
        cpu.msr_write(0x4b56_4d03, at & !63 | 1);
        cpu.kvm_going_to_sleep();
        cpu.kvm_woken();
    }
    assert_eq!(cpu.msr_write(0x4b56_4d03, 0xc001), Some(()));
    cpu.kvm_going_to_sleep();
    assert_eq!(cpu.memory.read_u8(0xc010).unwrap(), 1);
    assert_eq!(cpu.read::<u8>(0xd000), Ok(0));
    cpu.memory.write_u8(0xc010, 3).unwrap();
    cpu.kvm_woken();
    assert_eq!(cpu.memory.read_u8(0xc010).unwrap(), 0);
    assert!(cpu.tlb.read(0xd000, 1).is_none(), "a flush was asked for");
}

#[test]
fn hypercalls() {
    let mut cpu = long(0);
    cpu.regs.set64(at::RAX, 99);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xc1]), Step::Done, "VMCALL");
    assert_eq!(cpu.regs.r64(at::RAX) as i64, -1000);
    for (register, value) in [(at::RAX, 10), (at::RBX, 5), (at::RCX, 1), (at::RDX, u64::MAX), (at::RSI, 0x30)]
    {
        cpu.regs.set64(register, value);
    }
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xd9]), Step::Done, "VMMCALL");
    assert_eq!(cpu.regs.r64(at::RAX), 3);
    let mut cpu = long(3);
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xc1]), Step::Done);
    assert_eq!(cpu.regs.r64(at::RAX) as i64, -1);
}
