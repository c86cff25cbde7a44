use std::sync::atomic::{AtomicBool, Ordering};

use skep_hv::cpuid::{CpuidLeaf, CpuidTable, host};
use skep_hv::state::{Debug, Fpu, General, PendingException, Segment};
use skep_memory::{RegionKind, RegionSpec};

use super::*;
use crate::cpu::{cr0, efer, fl};
use crate::drive::update;
use crate::oracle::generate::Generator;
use crate::oracle::subject::Subject;

const HZ: u64 = 1_000_000_000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
/// A page that no memory backs.
const DEVICE: u64 = 0x10_0000;
const TABLES: u64 = 0x1000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;

/// A device that remembers what was done to it; each byte reads as the low byte of its address.
#[derive(Default)]
struct Device {
    done: Vec<(char, u64, u8, u64)>,
    flow: Option<IoFlow>,
}

impl VcpuIo for Device {
    fn port_read(&mut self, port: u16, width: u8) -> u32 {
        self.done.push(('i', port.into(), width, 0));
        0x1234_5678 >> (32 - 8 * u32::from(width))
    }
    fn port_write(&mut self, port: u16, width: u8, value: u32) -> IoFlow {
        self.done.push(('o', port.into(), width, value.into()));
        self.flow.unwrap_or(IoFlow::Continue)
    }
    fn memory_read(&mut self, gpa: u64, width: u8) -> u64 {
        self.done.push(('r', gpa, width, 0));
        (0..u64::from(width)).fold(0, |v, i| v | (gpa + i & 0xff) << (8 * i))
    }
    fn memory_write(&mut self, gpa: u64, width: u8, value: u64) -> IoFlow {
        self.done.push(('w', gpa, width, value));
        self.flow.unwrap_or(IoFlow::Continue)
    }
    fn interrupts(&mut self) -> Pending {
        panic!("a step does not look for interrupts")
    }
    fn acknowledge(&mut self) -> Option<u8> {
        panic!("a step takes no interrupt")
    }
    fn acknowledge_nmi(&mut self) {
        panic!("a step takes no NMI")
    }
    fn acknowledge_startup(&mut self) -> Option<Startup> {
        panic!("a step does not start")
    }
    fn cr8(&mut self) -> u8 {
        panic!("CR8 is the state's")
    }
    fn set_cr8(&mut self, _: u8) {
        panic!("CR8 is the state's")
    }
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        panic!("the APIC is the back end's")
    }
    fn apic_msr_write(&mut self, _: u32, _: u64) -> Option<IoFlow> {
        panic!("the APIC is the back end's")
    }
    fn send_ipis(&mut self, _: u64, _: &mut dyn Iterator<Item = u32>) {
        panic!("the APIC is the back end's")
    }
}

/// A guest in 64-bit mode at level 0, a MiB identity-mapped and DEVICE behind it, its registers in a state.
struct Guest {
    memory: GuestMemory,
    stepper: Box<dyn Stepper>,
    state: CpuState,
    device: Device,
}

fn guest_with(cpuid: &CpuidTable) -> Guest {
    let ram = RegionSpec { start: 0, size: DEVICE, kind: RegionKind::Ram };
    let memory = GuestMemory::new(&[ram]).unwrap();
    for (at, value) in [(0, TABLES + 0x1000), (0x1000, TABLES + 0x2000)] {
        memory.write_u64(TABLES + at, value | 7).unwrap();
    }
    memory.write_u64(TABLES + 0x2000, 0x87).unwrap();
    memory.write_u64(GDT + 8, 0x00af_9b00_0000_ffff).unwrap();
    memory.write_u64(GDT + 16, 0x00cf_9300_0000_ffff).unwrap();
    for vector in 0..256 {
        memory.write_u64(IDT + 16 * vector, 0x8e00 << 32 | 8 << 16 | (0xa000 + 16 * vector)).unwrap();
    }
    let data = Segment { selector: 16, base: 0, limit: u32::MAX, access: 0xc093 };
    let mut system = System {
        segments: [data; 6],
        tr: Segment { selector: 0x18, base: 0x6000, limit: 0x67, access: 0x8b },
        ldtr: Segment { access: Segment::UNUSABLE, ..Segment::default() },
        cr0: cr0::PE | cr0::PG | cr0::NE | cr0::MP | cr0::WP | cr0::ET,
        cr3: TABLES,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
        xcr0: 7,
        efer: efer::LME | efer::LMA | efer::NXE | efer::SCE,
        apic_base: 0xfee0_0d00,
        ..System::default()
    };
    system.segments[1] = Segment { selector: 8, access: 0xa09b, ..data };
    (system.gdtr.base, system.gdtr.limit) = (GDT, 23);
    (system.idtr.base, system.idtr.limit) = (IDT, 0xfff);
    let mut gpr = [0; 16];
    gpr[4] = 0x7000;
    let state = CpuState {
        general: Some(General { gpr, rip: CODE, rflags: 2 }),
        system: Some(system),
        fpu: Some(Fpu { xsave: area(832, 0) }),
        msrs: Some(vec![(index::TSC, 1 << 40), (index::KERNEL_GS_BASE, 0x1234)]),
        debug: Some(Debug { address: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400 }),
        events: Some(Events::default()),
        apic: None,
    };
    let stepper = Interpreter.create(3, &memory, cpuid, HZ).unwrap();
    Guest { memory, stepper, state, device: Device::default() }
}

fn guest() -> Guest {
    guest_with(&host())
}

/// An XSAVE area in its initial state, but for components that `present` says are not.
fn area(len: usize, present: u64) -> Vec<u8> {
    let mut area = vec![0; len];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&present.to_le_bytes());
    area
}

impl Guest {
    fn general(&mut self) -> &mut General {
        self.state.general.as_mut().unwrap()
    }
    fn system(&mut self) -> &mut System {
        self.state.system.as_mut().unwrap()
    }
    fn events(&mut self) -> &mut Events {
        self.state.events.as_mut().unwrap()
    }
    fn xsave(&mut self) -> &mut Vec<u8> {
        &mut self.state.fpu.as_mut().unwrap().xsave
    }

    /// Puts code where execution begins, and makes a step; what it gave back, the state updated.
    fn step(&mut self, code: &[u8]) -> (Step, CpuState) {
        self.memory.write(CODE, code).unwrap();
        self.general().rip = CODE;
        self.again()
    }

    fn again(&mut self) -> (Step, CpuState) {
        let mut given = self.state.clone();
        let step = self.stepper.step(&mut given, &mut self.device);
        if matches!(step, Step::Failed(_)) {
            assert_eq!(given, self.state, "a step that fails changes nothing");
        } else {
            update(&mut self.state, given.clone());
        }
        (step, given)
    }

    fn done(&mut self, code: &[u8]) -> CpuState {
        let (step, given) = self.step(code);
        assert_eq!(step, Step::Done, "{code:02x?}");
        given
    }

    fn fails(&mut self, code: &[u8], why: &str) {
        match self.step(code) {
            (Step::Failed(text), _) => assert!(text.contains(why), "{text}"),
            (other, _) => panic!("{code:02x?}: {other:?}"),
        }
    }
}

/// Cases of the oracle's generator: one step does what the interpreter does in its own run of one instruction.
#[test]
fn a_step_is_one_instruction_of_the_interpreter() {
    const CASES: usize = if cfg!(debug_assertions) { 4_000 } else { 100_000 };
    /// What the subject uses of its memory.
    const USED: usize = 0x4_3000;
    let mut generator = Generator::new(11, None);
    let mut subject = Subject::new().unwrap();
    subject.add_handlers().unwrap();
    let mut stepper: Option<Box<dyn Stepper>> = None;
    let all = StateGroups { msrs: false, ..StateGroups::ALL };
    let mut failed = 0;
    for n in 0..CASES {
        let mut case = generator.next_case();
        if n % 8 == 0 {
            case.state.rflags |= fl::TF;
        }
        // First the interpreter by itself.
        let cpu = subject.prepare(&case).unwrap();
        let before = cpu.get_state(StateGroups::ALL).unwrap();
        let mut image = vec![0; USED];
        cpu.memory.read(0, &mut image).unwrap();
        cpu.look = false;
        cpu.step_and_deliver();
        deliver_trap(cpu);
        let wanted = cpu.get_state(all).unwrap();
        let mut wanted_image = vec![0; USED];
        cpu.memory.read(0, &mut wanted_image).unwrap();
        // Then a step, from the same state and memory.
        cpu.memory.write(0, &image).unwrap();
        let stepper = stepper.get_or_insert_with(|| {
            let cpuid = &cpu.shared.cpuid;
            Interpreter.create(0, &cpu.memory, cpuid, HZ).unwrap()
        });
        let groups = stepper.fetch(&before).groups;
        let mut given = CpuState {
            fpu: before.fpu.clone().filter(|_| groups.fpu),
            msrs: before.msrs.clone().filter(|_| groups.msrs),
            ..before.clone()
        };
        let step = stepper.step(&mut given, &mut run::Nowhere);
        if let Step::Failed(_) = step {
            failed += 1;
        } else {
            let mut after = before.clone();
            update(&mut after, given);
            after.msrs = None;
            // Both say that all components are in use; a step may say so of fewer.
            after.fpu.as_mut().unwrap().xsave[512] |= 7;
            let text = || crate::oracle::compare::describe(&case);
            assert!(after == wanted, "{}{after:x?}\nis not\n{wanted:x?}", text());
            cpu.memory.read(0, &mut image).unwrap();
            assert!(image == wanted_image, "memory: {}", text());
        }
        // The interpreter's own way on starts from what the next case sets.
        subject.prepare(&case).unwrap().set_state(&before).unwrap();
    }
    assert!(failed < CASES / 50, "{failed} of {CASES} failed");
}

#[test]
fn memory_without_backing_is_reached_in_aligned_pieces() {
    let mut g = guest();
    g.general().gpr[3] = DEVICE + 0x20;
    // movups xmm1, [rbx]; movdqa [rbx + 0x10], xmm1
    let given = g.done(b"\x0f\x10\x0b");
    assert_eq!(given.fpu.unwrap().xsave[176..192], core::array::from_fn::<u8, 16, _>(|i| 0x20 + i as u8));
    assert!(
        given.system.is_none() && given.msrs.is_none() && given.debug.is_none() && given.events.is_none()
    );
    assert_eq!(g.general().rip, CODE + 3);
    g.done(b"\x66\x0f\x7f\x4b\x10");
    let (low, high) = (0x2726_2524_2322_2120, 0x2f2e_2d2c_2b2a_2928);
    assert_eq!(
        std::mem::take(&mut g.device.done),
        [
            ('r', DEVICE + 0x20, 8, 0),
            ('r', DEVICE + 0x28, 8, 0),
            ('w', DEVICE + 0x30, 8, low),
            ('w', DEVICE + 0x38, 8, high)
        ]
    );
    // mov eax, [rbx + 3]: what straddles comes in pieces, lowest first.
    g.done(b"\x8b\x43\x03");
    assert_eq!(
        std::mem::take(&mut g.device.done),
        [('r', DEVICE + 0x23, 1, 0), ('r', DEVICE + 0x24, 2, 0), ('r', DEVICE + 0x26, 1, 0)]
    );
    assert_eq!(g.general().gpr[0], 0x2625_2423);
    // lock cmpxchg16b [rbx]: a read and a write of both halves.
    (g.general().gpr[0], g.general().gpr[2]) = (low, high);
    g.general().gpr[1] = 7;
    g.done(b"\xf0\x48\x0f\xc7\x0b");
    assert_eq!(
        std::mem::take(&mut g.device.done)[2..],
        [('w', DEVICE + 0x20, 8, DEVICE + 0x20), ('w', DEVICE + 0x28, 8, 7)]
    );
    assert_ne!(g.general().rflags & fl::ZF, 0);
    // out dx, al, answered by Leave.
    g.device.flow = Some(IoFlow::Leave);
    assert_eq!(g.step(b"\xee").0, Step::Leave);
    let port = g.general().gpr[2] & 0xffff;
    assert_eq!(g.device.done, [('o', port, 1, 0x20)]);
}

#[test]
fn nothing_is_remembered_from_step_to_step() {
    let mut g = guest();
    g.general().gpr[3] = DATA;
    g.memory.write_u32(DATA, 1).unwrap();
    g.done(b"\x8b\x03");
    assert_eq!(g.general().gpr[0], 1);
    // Others move the page and change the code, by ways that tell nobody.
    let host = |g: &Guest, gpa: u64| g.memory.page(gpa).unwrap().host.as_ptr();
    g.memory.write_u32(0xb000, 2).unwrap();
    let split = (0..512).map(|i| (i * 4096 | 7, TABLES + 0x10000 + 8 * i));
    split.for_each(|(entry, at)| g.memory.write_u64(at, entry).unwrap());
    g.memory.write_u64(TABLES + 0x10000 + 8 * 9, 0xb007).unwrap();
    g.memory.write_u64(TABLES + 0x2000, TABLES + 0x10007).unwrap();
    assert!(!host(&g, CODE).is_null());
    g.memory.write(CODE + 1, &[0x0b]).unwrap();
    g.general().rip = CODE;
    assert_eq!(g.again().0, Step::Done);
    assert_eq!(g.general().gpr[1], 2, "mov ecx, [rbx] through the new mapping");
    for page in 0..DEVICE / 4096 {
        assert_eq!(g.memory.watch(page as usize).load(Ordering::SeqCst), 0);
    }
}

#[test]
fn exceptions_enter_their_handlers() {
    let mut g = guest();
    assert_eq!(g.step(b"\x0f\x0b").0, Step::Done);
    assert_eq!(g.general().rip, 0xa000 + 16 * 6);
    assert_eq!(g.memory.read_u64(g.state.general.unwrap().gpr[4]).unwrap(), CODE);
    // A page fault: CR2 is in the system registers. mov eax, [rbx]
    g.general().gpr[3] = 1 << 30;
    let given = g.done(b"\x8b\x03");
    assert_eq!((given.general.unwrap().rip, given.system.unwrap().cr2), (0xa000 + 16 * 14, 1 << 30));
    // One that waits is delivered in place of an instruction.
    g.events().exception = Some(PendingException { vector: 13, error_code: Some(0x18) });
    g.done(b"\x90");
    assert_eq!(g.general().rip, 0xa000 + 16 * 13);
    assert_eq!(g.events().exception, None);
    assert_eq!(g.memory.read_u64(g.state.general.unwrap().gpr[4]).unwrap(), 0x18);
    // Without an IDT it is a triple fault.
    g.system().idtr.limit = 0;
    assert_eq!(g.step(b"\x0f\x0b").0, Step::TripleFault);
    assert_eq!(g.events().activity, Activity::Shutdown);
    g.fails(b"\x90", "shutdown");
}

#[test]
fn single_step_and_breakpoints_trap() {
    let mut g = guest();
    g.general().rflags |= fl::TF;
    let given = g.done(b"\x90");
    assert_eq!(g.general().rip, 0xa010);
    assert_eq!(given.debug.unwrap().dr6 & 0xe00f, 1 << 14);
    // mov ss, eax: no trap behind it, interrupts held off.
    g.general().rflags |= fl::TF;
    g.general().gpr[0] = 16;
    g.done(b"\x8e\xd0");
    assert_eq!(g.general().rip, CODE + 2);
    assert!(g.events().mov_ss_shadow);
    g.general().rflags &= !fl::TF;
    // A breakpoint at the instruction itself; then with RF it runs.
    g.state.debug = Some(Debug { address: [CODE, 0, 0, 0], dr6: 0xffff_0ff0, dr7: 0x402 });
    g.events().mov_ss_shadow = false;
    let given = g.done(b"\x90");
    assert_eq!((g.general().rip, given.debug.unwrap().dr6 & 0xf), (0xa010, 1));
    g.general().rflags |= fl::RF;
    g.done(b"\x90");
    assert_eq!(g.general().rip, CODE + 1);
    // A data breakpoint, 4 bytes, on a write: mov [rbx], eax
    g.state.debug = Some(Debug { address: [0, DATA, 0, 0], dr6: 0xffff_0ff0, dr7: 0x00d0_0408 });
    g.general().gpr[3] = DATA;
    let given = g.done(b"\x89\x03");
    assert_eq!((g.general().rip, given.debug.unwrap().dr6 & 0xf), (0xa010, 2));
    assert_eq!(g.memory.read_u64(g.state.general.unwrap().gpr[4]).unwrap(), CODE + 2);
}

#[test]
fn shadows_halts_and_blocked_nmis_are_state() {
    let mut g = guest();
    g.events().nmi_pending = true;
    let given = g.done(b"\xfb");
    assert!(given.events.unwrap().sti_shadow && g.general().rflags & fl::IF != 0);
    g.done(b"\x90");
    assert!(!g.events().sti_shadow && g.events().nmi_pending);
    // iretq lets NMIs through again.
    g.events().nmi_blocked = true;
    let frame = [CODE, 8, 2, 0x7000, 16];
    g.general().gpr[4] = 0x6f00;
    for (i, value) in frame.into_iter().enumerate() {
        g.memory.write_u64(0x6f00 + 8 * i as u64, value).unwrap();
    }
    g.done(b"\x48\xcf");
    assert!(!g.events().nmi_blocked);
    g.done(b"\xf4");
    assert_eq!(g.events().activity, Activity::Halted);
    g.fails(b"\x90", "halted");
    g.events().activity = Activity::WaitForSipi;
    g.fails(b"\x90", "start-up");
}

#[test]
fn registers_of_the_back_end_are_its_own() {
    let mut g = guest();
    g.system().cr8 = 5;
    // mov rax, cr8; mov cr8, rbx
    let given = g.done(b"\x44\x0f\x20\xc0");
    assert_eq!((g.general().gpr[0], given.system), (5, None));
    g.general().gpr[3] = 9;
    let given = g.done(b"\x44\x0f\x22\xc3");
    assert_eq!(given.system.map(|s| (s.cr8, s.apic_base)), Some((9, 0xfee0_0d00)));
    g.fails(b"\x0f\x32", "back end");
    g.fails(b"\x0f\x01\xc1", "hypercalls");
    // swapgs gives back one MSR; rdtsc goes on from the state's.
    g.system().segments[5].base = 0x5678;
    let given = g.done(b"\x0f\x01\xf8");
    assert_eq!(given.msrs, Some(vec![(index::KERNEL_GS_BASE, 0x5678)]));
    assert_eq!(g.system().segments[5].base, 0x1234);
    let given = g.done(b"\x0f\x31");
    assert_eq!((g.general().gpr[2], given.msrs), (1 << 8, None));
    // Bits that change nothing here stay.
    g.system().cr4 |= 1 << 13;
    g.system().efer |= 1 << 12;
    g.done(b"\x0f\x06");
    assert!(g.system().cr4 & 1 << 13 != 0 && g.system().efer & 1 << 12 != 0);
    g.fails(b"\x0f\x20\xe0", "VMXE");
    g.system().cr4 |= 1 << 23;
    g.fails(b"\x90", "system.cr4");
}

#[test]
fn what_invalidates_translations_says_so() {
    let mut g = guest();
    assert_eq!(g.step(b"\x0f\x01\x3b").0, Step::Flushed);
    g.general().gpr[0] = TABLES;
    assert_eq!(g.step(b"\x0f\x22\xd8").0, Step::Flushed);
    g.general().gpr[0] = u64::MAX;
    assert_eq!(g.step(b"\x0f\x22\xd8").0, Step::Done, "#GP");
    assert_eq!(g.general().rip, 0xa000 + 16 * 13);
}

#[test]
fn repetitions_are_bounded() {
    let mut g = guest();
    g.general().gpr[1] = 5000;
    g.general().gpr[7] = 0x2_0000;
    // rep stosd under an address size of 32 bits goes element by element.
    let (step, _) = g.step(b"\x67\xf3\xab");
    assert_eq!((step, g.general().rip, g.general().gpr[1]), (Step::Done, CODE, 5000 - 4096));
    assert_eq!(g.again().0, Step::Done);
    assert_eq!((g.general().rip, g.general().gpr[1], g.general().gpr[7]), (CODE + 3, 0, 0x2_0000 + 20_000));
    // To a device, one element at a time.
    g.general().gpr[1] = 3;
    g.general().gpr[7] = DEVICE;
    while g.step(b"\xf3\xaa").0 == Step::Done && g.general().rip == CODE {}
    assert_eq!((g.general().rip, g.device.done.len()), (CODE + 2, 3));
}

#[test]
fn a_fetch_tells_bytes_and_needs() {
    let mut g = guest();
    g.memory.write(CODE, b"\x0f\x10\x0b").unwrap();
    let fetched = g.stepper.fetch(&g.state);
    assert_eq!((fetched.rip, fetched.bytes.len(), &fetched.bytes[..3]), (CODE, 15, &b"\x0f\x10\x0b"[..]));
    assert!(fetched.groups.fpu && !fetched.groups.msrs && fetched.groups.system && fetched.groups.events);
    g.memory.write(CODE, b"\x0f\x05").unwrap();
    let groups = g.stepper.fetch(&g.state).groups;
    assert!(groups.msrs && !groups.fpu);
    let without = CpuState { msrs: None, ..g.state.clone() };
    let mut given = without.clone();
    assert!(matches!(g.stepper.step(&mut given, &mut g.device), Step::Failed(why) if why.contains("MSRs")));
    assert_eq!(given, without);
    g.general().rip = DEVICE - 2;
    assert_eq!(g.stepper.fetch(&g.state).bytes.len(), 2, "no memory behind");
    g.general().rip = 1 << 40;
    assert!(g.stepper.fetch(&g.state).bytes.is_empty());
    assert!(g.stepper.fetch(&CpuState::default()).bytes.is_empty());
}

/// A guest with AVX-512 and protection keys, as a KVM guest may have them.
fn wide_guest() -> Guest {
    let mut cpuid = host();
    let mut seven = cpuid.get(7, 0).unwrap_or_default();
    seven.ebx |= 1 << 16;
    seven.ecx |= 1 << 3;
    cpuid.set(7, 0, seven);
    cpuid.set(0xd, 0, CpuidLeaf { eax: 0x2e7, ebx: 2696, ecx: 2696, edx: 0 });
    for (component, size, at) in [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)]
    {
        cpuid.set(0xd, component, CpuidLeaf { eax: size, ebx: at, ..CpuidLeaf::default() });
    }
    let mut g = guest_with(&cpuid);
    g.state.fpu = Some(Fpu { xsave: area(2696, 0x2e7) });
    g.xsave()[1088..2688].fill(0xee);
    g.system().xcr0 = 0x2e7;
    g
}

#[test]
fn wide_state_is_carried_and_what_is_not_known_survives() {
    // The area is the host's; this is Intel's.
    if host().get(0xd, 5).is_some_and(|leaf| leaf.ebx != 0 && leaf.ebx != 1088) {
        return;
    }
    let mut g = wide_guest();
    g.xsave()[2688..2696].copy_from_slice(&[4, 0, 0, 0, 1, 2, 3, 4]);
    g.general().gpr[3] = DATA;
    g.memory.write(DATA, &[7; 32]).unwrap();
    // movups xmm1, [rbx] leaves what is above.
    g.done(b"\x0f\x10\x0b");
    assert_eq!(g.xsave()[176..192], [7; 16]);
    assert!(g.xsave()[1088..2688].iter().all(|&b| b == 0xee));
    assert_eq!(g.xsave()[512..520], 0x2e7u64.to_le_bytes());
    if is_x86_feature_detected!("avx") {
        // vmovups ymm2, [rbx] clears all of ZMM2 above, and nothing else.
        g.done(b"\xc5\xfc\x10\x13");
        let upper = &g.xsave()[1152..1664];
        assert!(upper.iter().enumerate().all(|(i, &b)| b == if i / 32 == 2 { 0 } else { 0xee }));
        assert!(g.xsave()[1664..2688].iter().all(|&b| b == 0xee));
    }
    // vmovups zmm17, [rbx]
    let wide = is_x86_feature_detected!("avx512bw");
    if wide {
        g.done(b"\x62\xe1\x7c\x48\x10\x0b");
        assert!(
            g.xsave()[1728..1760].iter().all(|&b| b == 7) && g.xsave()[1760..1792].iter().all(|&b| b == 0)
        );
        assert!(g.xsave()[1664..1728].iter().all(|&b| b == 0xee));
    }
    assert_eq!(g.xsave()[2688..2696], [4, 0, 0, 0, 1, 2, 3, 4]);
    // Other instructions of AVX-512, here vpmadd52luq zmm0, zmm1, zmm2, are beyond us, and are not said to be undefined.
    g.fails(b"\x62\xf2\xf5\x48\xb4\xc2", "CPUID");
    g.general().gpr[0] = 0x2ff;
    g.fails(b"\x0f\xae\x23", "PKU");
    g.general().gpr[0] = 0xe7;
    g.done(b"\x0f\xae\x23");
    // For a guest without them they are.
    let mut cpuid = host();
    let mut seven = cpuid.get(7, 0).unwrap_or_default();
    seven.ebx &= !(1 << 16);
    cpuid.set(7, 0, seven);
    let mut g = guest_with(&cpuid);
    g.done(b"\x62\xf1\x7c\x48\x10\x0b");
    assert_eq!(g.general().rip, 0xa000 + 16 * 6);
}

#[test]
fn protection_keys_are_honoured() {
    let mut g = wide_guest();
    g.system().cr4 |= cr4::PKE;
    g.general().gpr[3] = DATA;
    g.memory.write_u64(TABLES + 0x2000, 0x87 | 5 << 59).unwrap();
    let key = |g: &mut Guest, rights: u32| {
        let pkru = rights << 10;
        g.xsave()[2688..2692].copy_from_slice(&pkru.to_le_bytes());
    };
    let fault = 0xa000 + 16 * 14;
    for (rights, wp, reads, writes) in [
        (0, true, true, true),
        (2, true, true, false),
        (2, false, true, true),
        (1, true, false, false),
        (1, false, false, false),
    ] {
        key(&mut g, rights);
        g.system().cr0 = g.system().cr0 & !cr0::WP | if wp { cr0::WP } else { 0 };
        g.memory.write(CODE, b"\x8b\x03").unwrap();
        assert!(g.stepper.fetch(&g.state).groups.fpu);
        for (code, allowed) in [(b"\x8b\x03", reads), (b"\x89\x03", writes)] {
            // The stack is such a page too: without the right to it even the handler is out of reach.
            let (step, _) = g.step(code);
            let went_on = step == Step::Done && g.general().rip == CODE + 2;
            assert_eq!(went_on, allowed, "{rights} {wp} {code:02x?}: {step:?} {:#x}", g.general().rip);
            if !allowed && step == Step::Done {
                assert_eq!(g.general().rip, fault);
            }
            *g.events() = Events::default();
            g.general().gpr[4] = 0x7000;
        }
    }
}

#[test]
fn locked_operations_across_pages_are_the_hosts() {
    // Two pages that are neighbours in the guest's linear address space alone.
    let mut g = guest();
    for i in 0..512u64 {
        g.memory.write_u64(TABLES + 0x10000 + 8 * i, i * 4096 | 7).unwrap();
    }
    let (first, second) = (0x4_0000u64, 0x2_0000u64);
    g.memory.write_u64(TABLES + 0x10000 + 8 * 0x50, first | 7).unwrap();
    g.memory.write_u64(TABLES + 0x10000 + 8 * 0x51, second | 7).unwrap();
    g.memory.write_u64(TABLES + 0x2000, TABLES + 0x10007).unwrap();
    const ROUNDS: u64 = 2000;
    let page = |gpa| g.memory.page(gpa).unwrap().index;
    let (a, b) = (page(first), page(second));
    let memory = g.memory.clone();
    let stop = AtomicBool::new(false);
    let ours = std::thread::scope(|scope| {
        // Somebody else adds to the same number with locked instructions and tells nobody.
        let other = scope.spawn(|| {
            let pair = memory.side_by_side(a, b).unwrap();
            let mut added = 0u64;
            while !stop.load(Ordering::Relaxed) {
                add_locked(&pair);
                added += 1;
            }
            added
        });
        g.general().gpr[3] = 0x5_0ffd;
        for _ in 0..ROUNDS {
            // lock inc qword [rbx]
            g.done(b"\xf0\x48\xff\x03");
        }
        stop.store(true, Ordering::Relaxed);
        other.join().unwrap() + ROUNDS
    });
    let mut bytes = [0; 8];
    g.memory.read(first + 0xffd, &mut bytes[..3]).unwrap();
    g.memory.read(second, &mut bytes[3..]).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), ours);
}

#[expect(unsafe_code, reason = "another processor's locked addition")]
fn add_locked(pair: &skep_memory::PagePair<'_>) {
    // SAFETY: eight bytes round the boundary of the two pages.
    unsafe {
        let at = pair.host().as_ptr().add(0xffd);
        std::arch::asm!("lock inc qword ptr [{at}]", at = in(reg) at, options(nostack));
    }
}
