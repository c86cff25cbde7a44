//! What the oracle cannot reach from user mode: control registers, other code sizes, CPUID; and the store of thunks.

use std::sync::Arc;

use skep_hv::VmOptions;
use skep_hv::cpuid::CpuidLeaf;
use skep_memory::{GuestMemory, RegionKind, RegionSpec};

use super::fpu::component;
use crate::cpu::{Cpu, cr0, cr4, seg};
use crate::fault::{Exception, vector};
use crate::run::Step;
use crate::system::Tsc;
use crate::vm::{Mailbox, Shared};

const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;

/// A processor in protected mode without paging, flat segments, everything enabled.
fn processor(hide: impl Fn(u32, u32, &mut CpuidLeaf)) -> Box<Cpu> {
    let mut cpuid = skep_hv::cpuid::host();
    for (function, index, mut leaf) in cpuid.clone().iter() {
        hide(function, index, &mut leaf);
        cpuid.set(function, index, leaf);
    }
    let ram = RegionSpec { start: 0, size: 1 << 20, kind: RegionKind::Ram };
    let memory = GuestMemory::new(&[ram]).expect("a region");
    let shared = Shared::new(VmOptions { cpuid, tsc_hz: Some(1_000_000_000), ..VmOptions::default() });
    let tsc = Tsc::new(shared.tsc_hz);
    let mut cpu = Cpu::new(0, memory, shared, Arc::new(Mailbox::new()), tsc).expect("a processor");
    cpu.cr0 |= cr0::PE | cr0::NE;
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.xcr0 = 7;
    set_code_size(&mut cpu, 32);
    cpu
}

fn set_code_size(cpu: &mut Cpu, bits: u32) {
    for (i, segment) in cpu.segs.iter_mut().enumerate() {
        let kind = if i == seg::CS { 0xb } else { 0x3 };
        segment.selector = 8 * (i as u16 + 1);
        segment.base = 0;
        segment.limit = u32::MAX;
        segment.access = kind | 1 << 4 | 1 << 7 | 1 << 15 | if bits == 32 { 1 << 14 } else { 0 };
    }
    cpu.refresh_mode();
}

fn run(cpu: &mut Cpu, code: &[u8]) -> Step {
    cpu.memory.write(CODE, code).expect("room for code");
    cpu.rip = CODE;
    let step = cpu.step();
    if step == Step::Done {
        assert_eq!(cpu.rip, CODE + code.len() as u64, "{code:02x?}");
    }
    step
}

fn raised(vector: u8) -> Step {
    let error = (vector == vector::GP).then_some(0);
    Step::Raised(Exception { vector, error })
}

const ADDPS: &[u8] = b"\x0f\x58\xc1";
const VADDPS: &[u8] = b"\xc5\xf4\x58\xc2";
const PADDB_MMX: &[u8] = b"\x0f\xfc\xc1";
const FLD1: &[u8] = b"\xd9\xe8";
const FWAIT: &[u8] = b"\x9b";
const ANDN: &[u8] = b"\xc4\xe2\x70\xf2\xc2";
const POPCNT: &[u8] = b"\xf3\x0f\xb8\xc1";
const XSAVE: &[u8] = b"\x0f\xae\x25\x00\x90\x00\x00";

#[test]
fn control_registers_decide_what_is_available() {
    let all: [&[u8]; 8] = [ADDPS, VADDPS, PADDB_MMX, FLD1, FWAIT, ANDN, POPCNT, XSAVE];
    let expect = |change: fn(&mut Cpu), outcomes: [u8; 8]| {
        for (code, outcome) in all.iter().zip(outcomes) {
            let mut cpu = processor(|_, _, _| {});
            change(&mut cpu);
            cpu.refresh_mode();
            let wanted = if outcome == u8::MAX { Step::Done } else { raised(outcome) };
            assert_eq!(run(&mut cpu, code), wanted, "{code:02x?}");
        }
    };
    const OK: u8 = u8::MAX;
    use vector::{NM, UD};
    expect(|_| {}, [OK; 8]);
    expect(|cpu| cpu.cr0 |= cr0::EM, [UD, OK, UD, NM, OK, OK, OK, OK]);
    expect(|cpu| cpu.cr0 |= cr0::TS, [NM, NM, NM, NM, OK, OK, OK, NM]);
    expect(|cpu| cpu.cr0 |= cr0::TS | cr0::MP, [NM, NM, NM, NM, NM, OK, OK, NM]);
    expect(|cpu| cpu.cr4 &= !cr4::OSFXSR, [UD, OK, OK, OK, OK, OK, OK, OK]);
    expect(|cpu| cpu.cr4 &= !cr4::OSXSAVE, [OK, UD, OK, OK, OK, OK, OK, UD]);
    expect(|cpu| cpu.xcr0 = 3, [OK, UD, OK, OK, OK, OK, OK, OK]);
}

#[test]
fn avx512_is_available_with_all_of_its_state() {
    if !is_x86_feature_detected!("avx512bw") {
        return;
    }
    // vaddps zmm1, zmm1, zmm2; kmovd k1, ecx
    for code in [&b"\x62\xf1\x74\x48\x58\xca"[..], b"\xc5\xfb\x92\xc9"] {
        let with = |change: fn(&mut Cpu)| {
            let mut cpu = processor(|_, _, _| {});
            cpu.xcr0 = component::ALL;
            change(&mut cpu);
            cpu.refresh_mode();
            run(&mut cpu, code)
        };
        assert_eq!(with(|_| {}), Step::Done, "{code:02x?}");
        assert_eq!(with(|cpu| cpu.cr0 |= cr0::TS), raised(vector::NM), "{code:02x?}");
        assert_eq!(with(|cpu| cpu.cr4 &= !cr4::OSXSAVE), raised(vector::UD), "{code:02x?}");
        assert_eq!(with(|cpu| cpu.xcr0 = component::BASIC), raised(vector::UD), "{code:02x?}");
    }
    let mut hidden = processor(|function, _, leaf| {
        if function == 7 {
            leaf.ebx &= !(1 << 16);
        }
    });
    hidden.xcr0 = component::ALL;
    assert_eq!(run(&mut hidden, b"\x62\xf1\x74\x48\x58\xca"), raised(vector::UD));
}

#[test]
fn masked_accesses_in_segments_of_32_bit_code() {
    if !is_x86_feature_detected!("avx512bw") {
        return;
    }
    let mut cpu = processor(|_, _, _| {});
    cpu.xcr0 = component::ALL;
    // The segment ends behind the second element.
    cpu.segs[seg::DS].limit = DATA as u32 + 7;
    cpu.segs[seg::DS].access &= !(1 << 15);
    cpu.refresh_mode();
    cpu.memory.write(DATA, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]).expect("room for data");
    // vmovdqu32 zmm1{k1}{z}, [0x9000]; vmovdqu32 [0x9000]{k1}, zmm2
    let (load, store) =
        (b"\x62\xf1\x7e\xc9\x6f\x0d\x00\x90\x00\x00", b"\x62\xf1\x7e\x49\x7f\x15\x00\x90\x00\x00");
    cpu.fpu.frame.opmask[1] = 0b11;
    assert_eq!(run(&mut cpu, load), Step::Done);
    assert_eq!(cpu.fpu.frame.vector[1], [2 << 32 | 1, 0, 0, 0, 0, 0, 0, 0]);
    cpu.fpu.frame.opmask[1] = 0b10;
    assert_eq!(run(&mut cpu, store), Step::Done);
    cpu.fpu.frame.opmask[1] = 0b100;
    assert_eq!(run(&mut cpu, load), raised(vector::GP));
    assert_eq!(run(&mut cpu, store), raised(vector::GP));
    let mut bytes = [0; 12];
    cpu.memory.read(DATA, &mut bytes).expect("data");
    assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
}

#[test]
fn real_mode_has_no_vex() {
    let mut cpu = processor(|_, _, _| {});
    cpu.cr0 &= !cr0::PE;
    set_code_size(&mut cpu, 16);
    assert_eq!(run(&mut cpu, ADDPS), Step::Done);
    for code in [VADDPS, ANDN] {
        assert_eq!(run(&mut cpu, code), raised(vector::UD), "{code:02x?}");
    }
}

#[test]
fn hidden_features_are_undefined() {
    let hide_sse4 = |function, _, leaf: &mut CpuidLeaf| {
        if function == 1 {
            leaf.ecx &= !(1 << 19 | 1 << 23 | 1 << 28);
        }
    };
    let mut cpu = processor(hide_sse4);
    assert_eq!(run(&mut cpu, b"\x66\x0f\x38\x17\xc1"), raised(vector::UD), "PTEST");
    assert_eq!(run(&mut cpu, POPCNT), raised(vector::UD));
    assert_eq!(run(&mut cpu, VADDPS), raised(vector::UD));
    assert_eq!(run(&mut cpu, ADDPS), Step::Done);
}

#[test]
fn counting_zeros_without_the_feature_is_scanning() {
    let mut cpu = processor(|function, _, leaf| match function {
        7 => leaf.ebx &= !(1 << 3),
        0x8000_0001 => leaf.ecx &= !(1 << 5),
        _ => {}
    });
    cpu.regs.set_gpr(1, 0x0100_0000);
    assert_eq!(run(&mut cpu, b"\xf3\x0f\xbd\xc1"), Step::Done);
    assert_eq!(cpu.regs.gpr(0), 24, "BSR, not LZCNT");
    assert_eq!(run(&mut cpu, b"\xf3\x0f\xbc\xc1"), Step::Done);
    assert_eq!(cpu.regs.gpr(0), 24, "BSF");
}

#[test]
fn every_code_size_computes_the_same() {
    for bits in [16u32, 32] {
        let mut cpu = processor(|_, _, _| {});
        set_code_size(&mut cpu, bits);
        let other = if bits == 16 { &b"\x66"[..] } else { b"" };
        cpu.regs.set_gpr(1, 0xf0f0_1234);
        assert_eq!(run(&mut cpu, &[other, POPCNT].concat()), Step::Done);
        assert_eq!(cpu.regs.gpr(0), 13, "32-bit POPCNT in {bits}-bit code");
        // paddd xmm0, [0x9000], with the address size that the code has
        cpu.memory.write(DATA, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]).expect("room");
        cpu.fpu.set_xmm(0, &[0xff; 16]);
        let paddd: &[u8] =
            if bits == 16 { b"\x66\x0f\xfe\x06\x00\x90" } else { b"\x66\x0f\xfe\x05\x00\x90\x00\x00" };
        assert_eq!(run(&mut cpu, paddd), Step::Done);
        assert_eq!(cpu.fpu.xmm(0), [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        // vpaddd xmm0, xmm1, xmm2 with VEX.B and the top bit of vvvv as 64-bit code would not have them
        cpu.fpu.set_xmm(1, &[1; 16]);
        cpu.fpu.set_xmm(2, &[2; 16]);
        assert_eq!(run(&mut cpu, b"\xc4\xc1\x31\xfe\xc2"), Step::Done);
        assert_eq!(cpu.fpu.xmm(0), [3; 16]);
    }
}

#[test]
fn simd_exceptions_are_raised_and_leave_everything_alone() {
    let divps = b"\x0f\x5e\xc1";
    let mut cpu = processor(|_, _, _| {});
    cpu.fpu.set_xmm(0, &[1; 16]);
    cpu.fpu.frame.mxcsr = 0x1f80 & !(1 << 9);
    assert_eq!(run(&mut cpu, divps), raised(vector::XM));
    assert_eq!(cpu.fpu.xmm(0), [1; 16]);
    assert_eq!(cpu.fpu.frame.mxcsr & 0x3f, 1 << 2, "ZE");
    cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(run(&mut cpu, divps), raised(vector::UD));
    cpu.fpu.frame.mxcsr = 0x1f80;
    assert_eq!(run(&mut cpu, divps), Step::Done);
    assert_eq!(cpu.fpu.frame.mxcsr, 0x1f84);
}

#[test]
fn a_segment_limit_bounds_operands() {
    let mut cpu = processor(|_, _, _| {});
    cpu.segs[seg::DS].limit = DATA as u32 + 14;
    cpu.segs[seg::DS].access &= !(1 << 15);
    assert_eq!(run(&mut cpu, b"\x0f\x10\x05\x00\x90\x00\x00"), raised(vector::GP), "movups xmm0, [9000h]");
    cpu.segs[seg::DS].limit += 1;
    assert_eq!(run(&mut cpu, b"\x0f\x10\x05\x00\x90\x00\x00"), Step::Done);
}

#[test]
fn environments_survive_memory_in_every_format() {
    for (bits, prefix) in [(16u32, &b""[..]), (16, b"\x66"), (32, b""), (32, b"\x66")] {
        for protected in [false, true] {
            let mut cpu = processor(|_, _, _| {});
            if !protected {
                cpu.cr0 &= !cr0::PE;
            }
            set_code_size(&mut cpu, bits);
            for code in [&b"\xd9\xeb"[..], b"\xd9\xe8", b"\xd9\xee"] {
                assert_eq!(run(&mut cpu, code), Step::Done);
            }
            let before = cpu.fpu.save_area(component::ALL);
            let address: &[u8] = if bits == 16 { b"\x00\x90" } else { b"\x00\x90\x00\x00" };
            let modrm = |reg: u8| reg << 3 | if bits == 16 { 6 } else { 5 };
            let save = [prefix, &[0xdd, modrm(6)], address].concat();
            let restore = [prefix, &[0xdd, modrm(4)], address].concat();
            assert_eq!(run(&mut cpu, &save), Step::Done, "FNSAVE");
            assert_eq!(cpu.fpu.word(super::fpu::fx::FSW), 0);
            assert_eq!(run(&mut cpu, &restore), Step::Done, "FRSTOR");
            let mut after = cpu.fpu.save_area(component::ALL);
            // The narrow formats hold parts of the pointers only.
            after[6..24].copy_from_slice(&before[6..24]);
            assert!(before == after, "{bits}-bit code, prefix {prefix:02x?}, protected {protected}");
        }
    }
}

#[test]
fn thunks_are_shared_and_bounded() {
    let mut cpu = processor(|_, _, _| {});
    let mut rounds = 0;
    // pshufd xmm, [mem], imm8 has 2048 variants; blends, shuffles and AVX forms give more than fit.
    'fill: for opcode in [0x70u8, 0xc6, 0xc2] {
        for imm in 0..=255u8 {
            for register in 0..8u8 {
                let code = [0x66, 0x0f, opcode, 0xc0 | register << 3, imm];
                if opcode != 0xc2 || imm < 8 {
                    assert_eq!(run(&mut cpu, &code), Step::Done);
                }
                rounds += 1;
                if rounds > 20_000 {
                    break 'fill;
                }
            }
        }
    }
    cpu.fpu.set_xmm(1, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(run(&mut cpu, b"\x66\x0f\x70\xc1\x1b"), Step::Done);
    assert_eq!(cpu.fpu.xmm(0), [4, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0], "reversed");
}

#[test]
fn operands_of_every_size_meet_data_breakpoints() {
    // MOVUPS, MOVQ, FSTP of 80 bits and FNSAVE to DATA, whose second 4 bytes are watched; MOVUPS from there.
    let [store, quad, extended, save, load] = [
        &[0x0f, 0x11, 0x05][..],
        &[0x66, 0x0f, 0xd6, 0x05],
        &[0xdb, 0x3d],
        &[0xdd, 0x35],
        &[0x0f, 0x10, 0x05],
    ];
    for (opcode, written, either) in
        [(store, 1, 1), (quad, 1, 1), (extended, 1, 1), (save, 1, 1), (load, 0, 1)]
    {
        for (condition, hit) in [(1, written), (3, either)] {
            let mut cpu = processor(|_, _, _| {});
            cpu.dr[0] = DATA + 4;
            cpu.dr7 = 1 | (3 << 2 | condition) << 16;
            cpu.refresh_mode();
            let code = [opcode, &(DATA as u32).to_le_bytes()].concat();
            assert_eq!(run(&mut cpu, &code), Step::Done);
            assert_eq!(cpu.debug_trap, hit, "{code:02x?}, {condition}");
        }
    }
}
