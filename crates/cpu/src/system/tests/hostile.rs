//! Tables full of anything: whatever the guest puts into descriptors, gates, task state, page tables and registers, the
//! processor raises an exception, shuts down or says why it cannot go on.

use skep_hv::state::StateGroups;

use super::*;

/// Xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A value near one of the borders that matter.
    fn edge(&mut self) -> u64 {
        let edges = [
            0,
            STACK,
            CODE,
            0xffff,
            0x10_0000,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 46,
            1 << 47,
            1 << 56,
            u64::MAX,
            1 << 63,
        ];
        let at = self.below(edges.len() as u64) as usize;
        match self.below(4) {
            0 => self.next(),
            _ => edges[at].wrapping_add(self.below(33)).wrapping_sub(16),
        }
    }

    /// A descriptor or gate that is almost right.
    fn descriptor(&mut self) -> u64 {
        let kind = (self.below(32) | self.below(4) << 5 | u64::from(self.below(8) != 0) << 7) << 40;
        let shape = match self.below(3) {
            0 => 0x00c0_0000_0000_ffff | self.below(16) << 48,
            1 => (8 * self.below(24) + self.below(8)) << 16 | HANDLER,
            _ => self.next() & !0xff00_0000_0000,
        };
        shape ^ if self.below(4) == 0 { 1 << self.below(64) } else { 0 } | kind | self.below(2) << 53
    }
}

/// System instructions, and far transfers; the bytes behind are random.
const OPCODES: [&[u8]; 44] = [
    &[0x9a],
    &[0xea],
    &[0xff, 0x1c, 0x24],
    &[0xff, 0x2c, 0x24],
    &[0xcb],
    &[0xca],
    &[0x48, 0xcb],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcd],
    &[0xcc],
    &[0xf1],
    &[0xce],
    &[0x8e],
    &[0x8c],
    &[0x07],
    &[0x17],
    &[0x1f],
    &[0x0f, 0xa1],
    &[0x0f, 0xa9],
    &[0xc4, 0x04, 0x24],
    &[0x0f, 0xb2, 0x04, 0x24],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x21],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0xec],
    &[0xe7],
    &[0x9c],
    &[0x9d],
    &[0x66, 0x0f, 0x38, 0x82, 0x04, 0x24],
    &[0x0f, 0xae],
];

fn scramble(cpu: &mut Cpu, random: &mut Random) {
    for at in (GDT..GDT + 0x100).chain(IDT..IDT + 0x200).chain(LDT..LDT + 0x40).step_by(8) {
        if random.below(3) != 0 {
            cpu.memory.write_u64(at, random.descriptor()).unwrap();
        }
    }
    for at in (TSS..TSS + 0x70).step_by(4) {
        if random.below(2) == 0 {
            let value = random.edge() as u32;
            cpu.memory.write_u32(at, value).unwrap();
        }
    }
    for at in (STACK..STACK + 64).step_by(8) {
        let value = if random.below(2) == 0 { 8 * random.below(20) + random.below(8) } else { random.edge() };
        cpu.memory.write_u64(at, value).unwrap();
    }
    for n in 0..16 {
        if random.below(3) == 0 {
            let value = random.edge();
            cpu.regs.set_gpr(n, value);
        }
    }
    if random.below(4) == 0 {
        cpu.gdtr.limit = random.next() as u16;
        cpu.idtr.limit = random.next() as u16;
        cpu.gdtr.base = GDT.wrapping_sub(random.below(64));
    }
    if random.below(4) == 0 {
        cpu.tr.limit = random.edge() as u32 & 0xf_ffff;
        cpu.tr.access = random.below(16) as u32 | 0x80;
        cpu.ldtr = Segment {
            selector: LOCAL,
            base: random.edge() & 0xffff_ffff,
            limit: random.edge() as u32 & 0xf_ffff,
            access: 0x82,
        };
    }
    let flags = random.next() & 0x003f_7fd7 & !fl::VM;
    cpu.set_rflags(flags | cpu.rflags() & fl::VM);
    cpu.refresh_mode();
}

#[test]
fn no_table_brings_the_processor_down() {
    let mut random = Random(0x5eed);
    let groups = StateGroups::ALL;
    for round in 0..6000u32 {
        let mut cpu = match round % 7 {
            0 => real(),
            1 => protected(0),
            2 => protected(3),
            3 => v86(random.below(4)),
            4 => long(0),
            5 => long(3),
            _ => {
                let mut cpu = long(3);
                cpu.segs[seg::CS].access ^= access::L | access::DB;
                cpu
            }
        };
        scramble(&mut cpu, &mut random);
        for _ in 0..6 {
            match random.below(8) {
                0 => cpu.deliver_interrupt(random.next() as u8),
                1 => cpu.deliver_exception(Exception {
                    vector: random.below(32) as u8,
                    error: (random.below(2) == 0).then_some(7),
                }),
                2 => cpu.deliver_nmi(),
                _ => {
                    let mut bytes = OPCODES[random.below(OPCODES.len() as u64) as usize].to_vec();
                    bytes.extend(random.next().to_le_bytes());
                    if random.below(2) == 0 {
                        cpu.rip = CODE;
                        cpu.segs[seg::CS].base = 0;
                        if !cpu.mode.protected || cpu.mode.v86 {
                            cpu.segs[seg::CS].selector = 0;
                        }
                    }
                    let base = if cpu.is_64bit() { 0 } else { cpu.segs[seg::CS].base };
                    let _ = cpu.memory.write(base.wrapping_add(cpu.rip), &bytes);
                    cpu.step_and_deliver();
                }
            }
            cpu.kvm_going_to_sleep();
            cpu.kvm_woken();
        }
        // However it ended, what it is can be told, and what can be told is consistent.
        let state = cpu.get_state(groups).unwrap();
        let general = state.general.unwrap();
        assert_eq!(general.rflags & 2, 2);
        let cpl = cpu.mode.cpl;
        if let Err(refused) = cpu.set_state(&state) {
            panic!("round {round}: {refused}: {:x?} {:x?}", state.general, state.system);
        }
        assert_eq!(cpu.mode.cpl, cpl);
    }
}

#[test]
fn no_page_table_does_either() {
    let mut random = Random(0xf00d);
    let mut cpu = long(0);
    for _ in 0..20_000 {
        for at in 0..8 {
            let entry = match random.below(3) {
                0 => random.edge(),
                _ => PAGE_TABLES + 0x1000 * random.below(6) | random.next() & 0xfff | random.below(2) << 63,
            };
            cpu.memory.write_u64(PAGE_TABLES + 0x1000 * at + 8 * random.below(2), entry).unwrap();
        }
        cpu.cr3 = if random.below(8) == 0 { random.edge() & ((1 << 46) - 1) } else { PAGE_TABLES };
        cpu.cr4 = cr4::PAE | random.next() & (cr4::SMEP | cr4::SMAP | cr4::LA57);
        let linear = random.below(0x40_0000);
        for access in [crate::mmu::Access::Read, crate::mmu::Access::Write, crate::mmu::Access::Fetch] {
            if let Ok(found) = cpu.walk(linear, access, random.below(2) == 0, random.below(2) == 0) {
                assert_eq!(found.gpa & 0xfff, 0);
                assert!(found.gpa < 1 << 46);
            }
        }
    }
}
