//! What every back end must do alike, run on the software CPU and, with SKEP_TEST_KVM=1, on this host's KVM.
#![allow(clippy::unwrap_used, reason = "in a test, that is the message")]

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use guest::{Bed, back_ends, kvm};
use skep_hv::state::{Activity, CpuState, StateGroups};
use skep_hv::{Kick, RunEnd};
use skep_kvm::{Kvm, KvmOptions};

/// `jmp .`
const SPIN: &[u8] = &[0xeb, 0xfe];

#[test]
fn state_is_read_as_it_was_written() {
    for mut bed in back_ends(&[0xf4]) {
        let mut state = bed.start_state();
        let general = state.general.as_mut().unwrap();
        general.gpr = std::array::from_fn(|n| 0x0123_4567_89ab_cdef_u64.rotate_left(n as u32 * 4));
        general.rflags = 0x8d7;
        let system = state.system.as_mut().unwrap();
        (system.cr2, system.cr8) = (0x0dea_dbee_f000, 0);
        system.segments[4].base = 0x1234_5678_9000;
        let debug = skep_hv::state::Debug { address: [1, 2, 3, 4], dr6: 0xffff_0ff0, dr7: 0x400 };
        state.debug = Some(debug);
        bed.vcpu.set_state(&state).unwrap();
        let now = bed.vcpu.get_state(StateGroups::ALL).unwrap();
        assert_eq!(now.general, state.general, "{}", bed.name);
        assert_eq!(now.debug, state.debug, "{}", bed.name);
        let (now, then) = (now.system.unwrap(), state.system.unwrap());
        assert_eq!(now.segments, then.segments, "{}", bed.name);
        assert_eq!((now.tr, now.gdtr, now.idtr), (then.tr, then.gdtr, then.idtr), "{}", bed.name);
        assert_eq!((now.cr0, now.cr2, now.cr3, now.cr4), (then.cr0, then.cr2, then.cr3, then.cr4));
        assert_eq!((now.efer, now.xcr0), (then.efer, then.xcr0), "{}", bed.name);

        // A whole state can be written back, and is the same then.
        let whole = bed.vcpu.get_state(StateGroups::ALL).unwrap();
        bed.vcpu.set_state(&whole).unwrap();
        let again = bed.vcpu.get_state(StateGroups::ALL).unwrap();
        assert_eq!(again.fpu, whole.fpu, "{}", bed.name);
        assert_eq!(again.events, whole.events, "{}", bed.name);
        assert_eq!(again.apic.is_some(), whole.apic.is_some());
    }
}

#[test]
fn what_no_processor_can_hold_is_refused() {
    for mut bed in back_ends(&[0xf4]) {
        let good = bed.start_state();
        let mut refused = |what: &str, change: &dyn Fn(&mut CpuState)| {
            let mut state = good.clone();
            change(&mut state);
            assert!(bed.vcpu.set_state(&state).is_err(), "{what} on {}", bed.name);
        };
        refused("paging without protection", &|state| state.system.as_mut().unwrap().cr0 = 1 << 31);
        refused("long mode without PAE", &|state| state.system.as_mut().unwrap().cr4 = 0);
        refused("XCR0 without x87", &|state| state.system.as_mut().unwrap().xcr0 = 2);
        refused("an unknown MSR", &|state| state.msrs = Some(vec![(0x1234_5678, 1)]));
        bed.vcpu.set_state(&good).unwrap();
    }
}

/// Counts down, sums up in RAX and XMM0, keeps a value on the x87 stack and in an MSR; then `out 0x80`, and behind it stores
/// what is in RAX, XMM0, ST0 and the MSR at 0x8000; then `out 0x81`.
const TRAVELLER: &[u8] = &[
    0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
    0x31, 0xc0, // xor eax, eax
    0x66, 0x48, 0x0f, 0x6e, 0xc9, // movq xmm1, rcx
    0x66, 0x0f, 0xef, 0xc0, // pxor xmm0, xmm0
    0xd9, 0xeb, // fldpi
    0x48, 0x01, 0xc8, // 1: add rax, rcx
    0x66, 0x0f, 0xd4, 0xc1, // paddq xmm0, xmm1
    0xff, 0xc9, // dec ecx
    0x75, 0xf5, // jnz 1b
    0x48, 0x89, 0xc3, // mov rbx, rax
    0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, IA32_KERNEL_GS_BASE
    0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
    0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0xe6, 0x80, // out 0x80, al
    0x0f, 0x32, // rdmsr
    0x48, 0x89, 0x04, 0x25, 0x18, 0x80, 0x00, 0x00, // mov [0x8018], rax
    0x48, 0x89, 0x1c, 0x25, 0x00, 0x80, 0x00, 0x00, // mov [0x8000], rbx
    0x66, 0x0f, 0xd6, 0x04, 0x25, 0x08, 0x80, 0x00, 0x00, // movq [0x8008], xmm0
    0xdd, 0x1c, 0x25, 0x10, 0x80, 0x00, 0x00, // fstp qword [0x8010]
    0xe6, 0x81, // out 0x81, al
    0xf4, // hlt
];

fn arrived(bed: &Bed) {
    let word = |at: u64| bed.memory.read_u64(0x8000 + at).unwrap();
    assert_eq!(word(0), 500_500, "{}", bed.name);
    assert_eq!(word(8), 1_000_000, "{}", bed.name);
    assert_eq!(f64::from_bits(word(16)), std::f64::consts::PI, "{}", bed.name);
    assert_eq!(word(24), 0x1234_5678, "{}", bed.name);
}

#[test]
fn a_guest_moves_between_back_ends() {
    for from in 0..2 {
        let mut beds = back_ends(TRAVELLER);
        if beds.len() < 2 {
            beds.extend(back_ends(TRAVELLER));
        }
        let mut to = beds.remove(1 - from);
        let mut from = beds.remove(0);
        from.start();
        assert_eq!(from.run_until(0x80), RunEnd::Kicked, "{}", from.name);
        let mut state = from.vcpu.get_state(StateGroups::ALL).unwrap();
        // What one has and the other does not is not this guest's.
        let known = |state: &CpuState| {
            state.msrs.clone().unwrap().into_iter().map(|(index, _)| index).collect::<Vec<_>>()
        };
        let there = known(&to.vcpu.get_state(StateGroups::ALL).unwrap());
        state.msrs.as_mut().unwrap().retain(|(index, _)| there.contains(index));
        state.apic = None;
        let mut page = vec![0; 1 << 20];
        from.memory.read(0, &mut page).unwrap();
        to.memory.write(0, &page).unwrap();
        to.vcpu.set_state(&state).unwrap_or_else(|error| panic!("{} to {}: {error}", from.name, to.name));
        assert_eq!(to.run_until(0x81), RunEnd::Kicked, "{}", to.name);
        arrived(&to);
    }
}

#[test]
fn a_kick_is_never_lost() {
    for mut bed in back_ends(SPIN) {
        bed.start();
        let kick = bed.vcpu.kicker();
        // Before the run.
        kick.kick();
        assert_eq!(bed.run(), RunEnd::Kicked, "{}", bed.name);
        // At any moment.
        for round in 0..500u64 {
            let kick = bed.vcpu.kicker();
            scope(|scope| {
                scope.spawn(move || {
                    if round % 3 != 0 {
                        sleep(Duration::from_nanos(round * 997 % 200_000));
                    }
                    kick.kick();
                });
                assert_eq!(bed.run(), RunEnd::Kicked, "{} round {round}", bed.name);
            });
        }
        // A wake does not end the run.
        let done = AtomicBool::new(false);
        let kick = bed.vcpu.kicker();
        scope(|scope| {
            scope.spawn(|| {
                (0..100).for_each(|_| kick.wake());
                done.store(true, Ordering::SeqCst);
                kick.kick();
            });
            assert_eq!(bed.run(), RunEnd::Kicked, "{}", bed.name);
        });
        assert!(done.load(Ordering::SeqCst), "{}", bed.name);
    }
}

#[test]
fn a_halt_for_good_ends_the_run() {
    // cli; hlt
    for mut bed in back_ends(&[0xfa, 0xf4]) {
        bed.start();
        assert_eq!(bed.run(), RunEnd::Halted, "{}", bed.name);
    }
    // sti; hlt; jmp .-3: interrupts could come, so that only a kick ends it.
    for mut bed in back_ends(&[0xfb, 0xf4, 0xeb, 0xfd]) {
        bed.start();
        let kick = bed.vcpu.kicker();
        scope(|scope| {
            scope.spawn(move || {
                sleep(Duration::from_millis(1200));
                kick.kick();
            });
            assert_eq!(bed.run(), RunEnd::Kicked, "{}", bed.name);
        });
        let groups = StateGroups { events: true, ..StateGroups::NONE };
        let state = bed.vcpu.get_state(groups).unwrap();
        assert_eq!(state.events.unwrap().activity, Activity::Halted, "{}", bed.name);
    }
}

#[test]
fn a_triple_fault_ends_the_run() {
    // ud2, with an interrupt table of no entries.
    for mut bed in back_ends(&[0x0f, 0x0b]) {
        bed.start();
        assert_eq!(bed.run(), RunEnd::TripleFault, "{}", bed.name);
        // And a reset brings it back.
        bed.vcpu.reset();
        let state = bed.vcpu.get_state(StateGroups::ALL).unwrap();
        let (general, system) = (state.general.unwrap(), state.system.unwrap());
        assert_eq!((general.rip, system.segments[1].base), (0xfff0, 0xffff_0000), "{}", bed.name);
        assert_eq!((system.cr0 & 1, system.efer, general.rflags), (0, 0, 2), "{}", bed.name);
        bed.start();
        assert_eq!(bed.run(), RunEnd::TripleFault, "{}", bed.name);
    }
}

#[test]
fn strings_of_ports_arrive_item_by_item() {
    // mov esi, 0x9000; mov edi, 0xa000; mov ecx, 3000; mov dx, 0x90; rep outsw; mov ecx, 2000; rep insb; out 0x81
    let code = [
        0xbe, 0x00, 0x90, 0x00, 0x00, 0xbf, 0x00, 0xa0, 0x00, 0x00, 0xb9, 0xb8, 0x0b, 0x00, 0x00, 0x66, 0xba,
        0x90, 0x00, 0xf3, 0x66, 0x6f, 0xb9, 0xd0, 0x07, 0x00, 0x00, 0xf3, 0x6c, 0xe6, 0x81, 0xf4,
    ];
    for mut bed in back_ends(&code) {
        let text: Vec<u8> = (0..6000u32).map(|n| (n * 7 % 251) as u8).collect();
        bed.memory.write(0x9000, &text).unwrap();
        bed.start();
        assert_eq!(bed.run_until(0x81), RunEnd::Kicked, "{}", bed.name);
        let sent: Vec<u8> = bed.io.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(sent, text, "{}", bed.name);
        let mut got = vec![0; 2000];
        bed.memory.read(0xa000, &mut got).unwrap();
        assert_eq!(got, (0..2000u32).map(|n| n as u8).collect::<Vec<_>>(), "{}", bed.name);
    }
}

#[test]
fn device_memory_is_read_and_written_in_aligned_pieces() {
    // mov rax, [0xfed80003]; mov [0xfed80105], eax; movdqu xmm0, [0xfed80010]; movdqu [0x8000], xmm0; out 0x81
    let code = [
        0x48, 0x8b, 0x04, 0x25, 0x03, 0x00, 0xd8, 0xfe, // sign-extended: see Bed::start_state
        0x89, 0x04, 0x25, 0x05, 0x01, 0xd8, 0xfe, 0xf3, 0x0f, 0x6f, 0x04, 0x25, 0x10, 0x00, 0xd8, 0xfe, 0xf3,
        0x0f, 0x7f, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xe6, 0x81, 0xf4,
    ];
    for mut bed in back_ends(&code) {
        bed.start();
        assert_eq!(bed.run_until(0x81), RunEnd::Kicked, "{}", bed.name);
        let general = bed.vcpu.get_state(StateGroups { general: true, ..StateGroups::NONE }).unwrap().general;
        assert_eq!(general.unwrap().gpr[0], 0x0a09_0807_0605_0403, "{}", bed.name);
        for &(gpa, width, _) in bed.io.reads.iter().chain(&bed.io.writes) {
            assert!(gpa.is_multiple_of(width.into()) && matches!(width, 1 | 2 | 4 | 8), "{gpa:#x} {width}");
        }
        let written: u64 = bed.io.writes.iter().fold(0, |all, &(gpa, width, value)| {
            all | (value & (u64::MAX >> (64 - 8 * u32::from(width)))) << ((gpa - 0xfed8_0105) * 8)
        });
        assert_eq!(written, 0x0605_0403, "{}", bed.name);
        assert_eq!(bed.memory.read_u64(0x8008).unwrap(), 0x1f1e_1d1c_1b1a_1918, "{}", bed.name);
        // KVM's emulator has no MOVDQU... or has, by version; but then nothing is told.
        let counted = bed.vcpu.stats().emulated;
        assert_eq!(counted, bed.io.emulated, "{}", bed.name);
    }
}

#[test]
fn what_kvm_cannot_execute_is_finished() {
    // cvtsi2sd xmm0, dword [0xfed80010]; movq [0x8000], xmm0; lock cmpxchg16b [0xfed80020]; out 0x81
    let code = [
        0xf2, 0x0f, 0x2a, 0x04, 0x25, 0x10, 0x00, 0xd8, 0xfe, 0x66, 0x0f, 0xd6, 0x04, 0x25, 0x00, 0x80, 0x00,
        0x00, 0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x20, 0x00, 0xd8, 0xfe, 0xe6, 0x81, 0xf4,
    ];
    for mut bed in back_ends(&code) {
        bed.start();
        assert_eq!(bed.run_until(0x81), RunEnd::Kicked, "{}", bed.name);
        let value = f64::from_bits(bed.memory.read_u64(0x8000).unwrap());
        assert_eq!(value, f64::from(0x1312_1110), "{}", bed.name);
        if bed.name.starts_with("kvm") {
            // A paravirtual KVM emulates all, and fails at more.
            let stats = bed.vcpu.stats();
            assert!(stats.emulated >= 2 && stats.emulated == bed.io.emulated, "{stats:?}");
            assert_eq!(stats.exits["emulationFailure"], stats.emulated);
        }
    }
}

#[test]
fn exits_are_counted_by_reason() {
    for mut bed in kvm(&[0xe6, 0x10, 0xe4, 0x10, 0xe6, 0x81, 0xf4], KvmOptions::default()) {
        bed.start();
        assert_eq!(bed.run_until(0x81), RunEnd::Kicked);
        let stats = bed.vcpu.stats();
        assert_eq!((stats.exits["portWrite"], stats.exits["portRead"], stats.port_io), (2, 1, 3));
        assert!(stats.kernel["exits"] >= 3, "{:?}", stats.kernel);
    }
}

/// Stores into pages 0x40 to 0x4f, one after the other, for ever.
const WRITER: &[u8] = &[
    0xbf, 0x00, 0x00, 0x04, 0x00, // 1: mov edi, 0x40000
    0x89, 0x07, // 2: mov [rdi], eax
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0x05, 0x00, // cmp edi, 0x50000
    0x72, 0xf0, // jb 2b
    0xeb, 0xe9, // jmp 1b
];

/// Ends the run when the test does, however that ends.
struct KickAtEnd(Arc<dyn Kick>);

impl Drop for KickAtEnd {
    fn drop(&mut self) {
        self.0.kick();
    }
}

fn written(mut bed: Bed) {
    bed.start();
    bed.memory.set_dirty_logging(true);
    bed.vm.sync_dirty_log().unwrap();
    bed.memory.take_dirty();
    let (memory, vm, kick, name) =
        (bed.memory.clone(), bed.vm.clone(), KickAtEnd(bed.vcpu.kicker()), bed.name);
    let all: Vec<u64> = (0x40..0x50).map(|page| page << 12).collect();
    scope(|scope| {
        scope.spawn(move || {
            let _kick = kick;
            // While it runs: every round of the log has all of them sooner or later. A processor with nested paging may also
            // tell pages that it has read to walk or to execute, but none that it has not touched.
            for round in 0..3 {
                let mut found = Vec::new();
                while !all.iter().all(|page| found.contains(page)) {
                    sleep(Duration::from_millis(5));
                    vm.sync_dirty_log().unwrap();
                    found.extend(memory.take_dirty());
                    found.sort_unstable();
                    found.dedup();
                    assert!(found.iter().all(|&page| page < 0x50000), "{name} round {round}: {found:x?}");
                }
            }
        });
        assert_eq!(bed.run(), RunEnd::Kicked, "{name}");
    });
    bed.vm.sync_dirty_log().unwrap();
    bed.memory.take_dirty();
    bed.vm.sync_dirty_log().unwrap();
    assert_eq!(bed.memory.take_dirty(), [], "{name}: nobody has written");
    bed.memory.set_dirty_logging(false);
    bed.vm.sync_dirty_log().unwrap();
    assert_eq!(bed.memory.take_dirty(), [], "{name}");
}

#[test]
fn the_dirty_log_has_every_page_that_was_written() {
    back_ends(WRITER).into_iter().for_each(written);
}

#[test]
fn rings_log_what_bitmaps_log() {
    // 64 entries are fewer than 16 pages written again and again: the ring fills.
    kvm(WRITER, KvmOptions { dirty_ring: 1024 }).into_iter().for_each(written);
}

#[test]
fn kvm_refuses_what_it_cannot_do() {
    if std::env::var_os("SKEP_TEST_KVM").is_none() {
        return;
    }
    use skep_hv::{Hypervisor, VmOptions};
    let kvm = Kvm::open(KvmOptions::default()).unwrap();
    assert!(kvm.tsc_hz() > 100_000_000);
    let memory = guest::memory();
    for vcpus in [0, 256, u32::MAX] {
        let options = VmOptions { vcpus, ..VmOptions::default() };
        assert!(kvm.create_vm(memory.clone(), options).is_err());
    }
    let vm =
        kvm.create_vm(memory, VmOptions { cpuid: kvm.cpuid().unwrap(), ..VmOptions::default() }).unwrap();
    assert!(vm.create_vcpu(1).is_err());
    let apics: Arc<_> = vm.apics().unwrap();
    let lines: Vec<_> = (0..64).map(|_| apics.message_line().unwrap()).collect();
    for (at, line) in (0u32..).zip(&lines) {
        line.set_message(Some(skep_hv::irq::MsiMessage { address: 0xfee0_0000, data: 0x40 + at })).unwrap();
        line.signal();
    }
    drop(lines);
    assert!(apics.message_line().is_ok());
}
