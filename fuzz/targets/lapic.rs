//! Local APICs of several vCPUs: registers of both modes, IPIs, messages, timers in every mode, EOI.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use skep_chipset::{ApicConfig, LocalApics};
use skep_hv::irq::{MsiMessage, MsiSender};

const VCPUS: u32 = 3;

#[derive(Debug, Arbitrary)]
enum Step {
    Read(u16, u8),
    Write(u16, u8, u32),
    ReadMsr(u8),
    WriteMsr(u8, u64),
    Base(u64),
    Deadline(u64),
    Message(u32, u32),
    Ipis(u64, Vec<u32>),
    Acknowledge,
    AcknowledgeNmi,
    AcknowledgeStartup,
    Priority(u8),
    Lint(bool, bool),
    Nmi,
    Skip,
    Wait(u32),
    Migrate,
    Reset,
}

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;

fuzz_target!(|script: Vec<(u8, Step)>| {
    let apics = LocalApics::new(ApicConfig { vcpus: VCPUS, ..ApicConfig::default() });
    let mut now = 0u64;
    for (vcpu, step) in script {
        let vcpu = u32::from(vcpu) % VCPUS;
        match step {
            Step::Read(offset, width) => {
                drop(apics.mmio_read(vcpu, u64::from(offset) % 4096, 1 << (width % 4), now))
            }
            Step::Write(offset, width, value) => {
                apics.mmio_write(vcpu, u64::from(offset) % 4096, 1 << (width % 4), value.into(), now);
            }
            Step::ReadMsr(msr) => drop(apics.msr_read(vcpu, 0x800 + u32::from(msr), now)),
            Step::WriteMsr(msr, value) => drop(apics.msr_write(vcpu, 0x800 + u32::from(msr), value, now)),
            Step::Base(value) => drop(apics.msr_write(vcpu, APIC_BASE, value, now)),
            Step::Deadline(value) => drop(apics.msr_write(vcpu, TSC_DEADLINE, value, now)),
            Step::Message(address, data) => {
                apics.send(MsiMessage { address: 0xfee0_0000 | u64::from(address & 0xf_ffff), data });
            }
            Step::Ipis(icr, targets) => apics.send_ipis(icr, &mut targets.into_iter().take(1000)),
            Step::Acknowledge => {
                let pending = apics.pending(vcpu, now);
                let vector = apics.acknowledge(vcpu, now);
                assert!(vector.is_none() || pending.maskable, "an interrupt nobody announced");
            }
            Step::AcknowledgeNmi => apics.acknowledge_nmi(vcpu),
            Step::AcknowledgeStartup => drop(apics.acknowledge_startup(vcpu)),
            Step::Priority(value) => {
                apics.set_cr8(vcpu, value & 15);
                let _ = apics.cr8(vcpu);
            }
            Step::Lint(second, high) => if second { apics.lint1() } else { apics.lint0() }.set(high),
            Step::Nmi => apics.inject_nmi(vcpu),
            Step::Skip => {
                if apics.can_skip_eoi(vcpu) {
                    apics.end_skipped(vcpu);
                }
            }
            Step::Wait(ns) => {
                now += u64::from(ns);
                let pending = apics.pending(vcpu, now);
                assert!(pending.next_ns > now, "a timer that has run out stays");
            }
            Step::Migrate => {
                let saved = apics.save(now);
                apics.restore(&saved, now).expect("a state that was saved can be restored");
                assert_eq!(apics.save(now), saved);
            }
            Step::Reset => apics.reset(),
        }
    }
});
