use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use skep_hv::irq::{MsiMessage, MsiSender};
use skep_hv::{Kick, Startup};

use super::*;

#[derive(Default)]
struct Waker(AtomicU32);

impl Kick for Waker {
    fn kick(&self) {}
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Controller {
    ended: Mutex<Vec<u8>>,
}

impl ExternalController for Controller {
    fn acknowledge(&self) -> u8 {
        0x33
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.ended.lock().unwrap().push(vector);
    }
}

struct Bench {
    apics: Arc<LocalApics>,
    wakers: Vec<Arc<Waker>>,
}

impl Bench {
    /// `vcpus` software-enabled APICs.
    fn new(vcpus: u32) -> Self {
        let apics = LocalApics::new(ApicConfig { vcpus, ..ApicConfig::default() });
        let wakers: Vec<_> = (0..vcpus).map(|_| Arc::new(Waker::default())).collect();
        for (vcpu, waker) in (0..).zip(&wakers) {
            apics.attach_cpu(vcpu, waker.clone());
            apics.mmio_write(vcpu, 0xf0, 4, 0x1ff, 0);
        }
        Self { apics, wakers }
    }

    fn x2apic(self) -> Self {
        for vcpu in 0..self.apics.count() {
            let base = self.apics.apic_base(vcpu);
            self.apics.msr_write(vcpu, 0x1b, base | 0x400, 0).unwrap();
        }
        self
    }

    /// Which vCPUs have `vector` requested; acknowledges and ends it.
    fn take(&self, vector: u8) -> Vec<u32> {
        (0..self.apics.count())
            .filter(|&vcpu| {
                let taken = self.apics.acknowledge(vcpu, 0);
                assert!(taken.is_none_or(|taken| taken == vector));
                if taken.is_some() {
                    self.apics.end_skipped(vcpu);
                }
                taken.is_some()
            })
            .collect()
    }

    fn icr(&self, vcpu: u32, low: u32, destination: u8) {
        self.apics.mmio_write(vcpu, 0x310, 4, u64::from(destination) << 24, 0);
        self.apics.mmio_write(vcpu, 0x300, 4, low.into(), 0);
    }

    fn wakes(&self, vcpu: usize) -> u32 {
        self.wakers[vcpu].0.swap(0, Ordering::Relaxed)
    }
}

fn msi(destination: u64, flags: u64, data: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 | destination << 12 | flags, data }
}

#[test]
fn physical_and_broadcast_destinations() {
    let b = Bench::new(4);
    b.icr(0, 0x50, 2);
    assert_eq!(b.take(0x50), [2]);
    b.icr(0, 0x50, 0xff);
    assert_eq!(b.take(0x50), [0, 1, 2, 3]);
    b.icr(0, 0x50, 99);
    assert!(b.take(0x50).is_empty());
}

#[test]
fn shorthands() {
    let b = Bench::new(3);
    b.icr(1, 1 << 18 | 0x50, 0);
    assert_eq!(b.take(0x50), [1]);
    b.icr(1, 2 << 18 | 0x50, 0);
    assert_eq!(b.take(0x50), [0, 1, 2]);
    b.icr(1, 3 << 18 | 0x50, 0);
    assert_eq!(b.take(0x50), [0, 2]);
}

#[test]
fn flat_and_cluster_logical_destinations() {
    let b = Bench::new(4);
    for vcpu in 0..4 {
        b.apics.mmio_write(vcpu, 0xd0, 4, 1 << (24 + vcpu), 0);
    }
    b.icr(0, 0x850, 0b1010);
    assert_eq!(b.take(0x50), [1, 3]);
    for vcpu in 0..4 {
        b.apics.mmio_write(vcpu, 0xe0, 4, 0x0fff_ffff, 0);
        let cluster = u64::from(vcpu / 2) << 4 | 1 << (vcpu % 2);
        b.apics.mmio_write(vcpu, 0xd0, 4, cluster << 24, 0);
    }
    b.icr(0, 0x850, 0x13);
    assert_eq!(b.take(0x50), [2, 3]);
    b.icr(0, 0x850, 0xf1);
    assert_eq!(b.take(0x50), [0, 2], "every cluster");
}

#[test]
fn x2apic_logical_destinations() {
    let b = Bench::new(20).x2apic();
    b.apics.msr_write(0, 0x830, 0x0001_0006 << 32 | 0x850, 0).unwrap();
    assert_eq!(b.take(0x50), [17, 18]);
    b.apics.msr_write(0, 0x830, 0xffff_ffff << 32 | 0x50, 0).unwrap();
    assert_eq!(b.take(0x50).len(), 20);
    b.apics.msr_write(0, 0x830, 19 << 32 | 0x50, 0).unwrap();
    assert_eq!(b.take(0x50), [19]);
}

#[test]
fn messages_from_devices() {
    let b = Bench::new(2);
    b.apics.send(msi(1, 0, 0x41));
    assert_eq!(b.take(0x41), [1]);
    b.apics.send(MsiMessage { address: 0x1_fee0_1000, data: 0x41 });
    b.apics.send(MsiMessage { address: 0xfec0_1000, data: 0x41 });
    b.apics.send(msi(1, 0, 0x8041));
    assert!(b.take(0x41).is_empty(), "not ours, and a level de-assert");
    b.apics.send(msi(1, 0, 0x400));
    assert!(b.apics.pending(1, 0).nmi);
}

#[test]
fn lowest_priority_takes_turns_and_looks_at_priorities() {
    let b = Bench::new(3);
    for vcpu in 0..3 {
        b.apics.mmio_write(vcpu, 0xd0, 4, 1 << (24 + vcpu), 0);
    }
    let targets: Vec<u32> = (0..6)
        .flat_map(|_| {
            b.apics.send(msi(7, 4, 0x141));
            b.take(0x41)
        })
        .collect();
    assert_eq!(targets, [0, 1, 2, 0, 1, 2]);
    b.apics.set_cr8(0, 5);
    b.apics.set_cr8(2, 3);
    b.apics.mmio_write(1, 0xf0, 4, 0xff, 0);
    b.apics.send(msi(7, 4, 0x141));
    assert_eq!(b.take(0x41), [2], "1 is disabled, 0 is busier");
    b.apics.send(msi(7, 4 | 8, 0x41));
    assert_eq!(b.take(0x41), [2], "a redirection hint is the same");
}

#[test]
fn vcpus_are_woken_once_for_news() {
    let b = Bench::new(2);
    b.wakes(1);
    b.icr(0, 0x50, 1);
    assert_eq!(b.wakes(1), 1);
    b.icr(0, 0x50, 1);
    b.icr(0, 0x51, 1);
    assert_eq!(b.wakes(1), 0, "it knows");
    assert_eq!(b.apics.acknowledge(1, 0), Some(0x51));
    assert_eq!(b.wakes(1), 0);
    b.apics.mmio_write(1, 0xb0, 4, 0, 0);
    assert_eq!(b.wakes(1), 1, "0x50 becomes possible");
    b.apics.mmio_write(1, 0x320, 4, 0x60, 0);
    b.apics.mmio_write(1, 0x380, 4, 1000, 0);
    assert_eq!(b.wakes(1), 1, "the timer is due earlier than never");
    assert_eq!(b.wakes(0), 0);
    assert_eq!(b.apics.pending(1, 2000).next_ns, u64::MAX);
    assert_eq!(b.wakes(1), 0, "it asked itself");
}

#[test]
fn level_interrupts_and_external_ones_reach_the_controller() {
    let b = Bench::new(1);
    let controller = Arc::new(Controller::default());
    let weak: std::sync::Weak<dyn ExternalController> = Arc::downgrade(&controller) as _;
    b.apics.attach_controller(weak);
    b.apics.send(msi(0, 0, 0xc041));
    assert_eq!(b.apics.acknowledge(0, 0), Some(0x41));
    b.apics.mmio_write(0, 0xb0, 4, 0, 0);
    assert_eq!(*controller.ended.lock().unwrap(), [0x41]);
    b.apics.mmio_write(0, 0x350, 4, 0x700, 0);
    let lint0 = b.apics.lint0();
    lint0.set(true);
    assert!(b.apics.pending(0, 0).maskable);
    assert_eq!(b.apics.acknowledge(0, 0), Some(0x33));
    lint0.set(false);
    assert_eq!(b.apics.acknowledge(0, 0), None);
    b.apics.send(msi(0, 0, 0x700));
    assert_eq!(b.apics.acknowledge(0, 0), Some(0x33), "an ExtINT message");
    assert!(!b.apics.pending(0, 0).maskable);
}

#[test]
fn starting_an_application_processor() {
    let b = Bench::new(2);
    b.icr(0, 0xc500, 1);
    b.icr(0, 0x8500, 1);
    b.icr(0, 0x0608, 1);
    assert!(b.apics.pending(1, 0).startup);
    assert_eq!(b.apics.acknowledge_startup(1), Some(Startup::Init));
    assert_eq!(b.apics.acknowledge_startup(1), Some(Startup::Sipi(8)));
    b.icr(0, 0x0608, 1);
    assert!(!b.apics.pending(1, 0).startup);
}

#[test]
fn paravirtual_ipis() {
    let b = Bench::new(4);
    b.apics.send_ipis(0x50, &mut [1, 3, 77].into_iter());
    assert_eq!(b.take(0x50), [1, 3]);
    b.apics.send_ipis(0x500, &mut [1].into_iter());
    assert!(!b.apics.pending(1, 0).startup, "INIT is not among them");
    b.apics.send_ipis(0x400, &mut [2].into_iter());
    assert!(b.apics.pending(2, 0).nmi);
}

#[test]
fn the_register_page_follows_its_base() {
    let b = Bench::new(2);
    assert_eq!(b.apics.mmio_offset(0, 0xfee0_0320), Some(0x320));
    assert_eq!(b.apics.mmio_offset(0, 0xfee0_1320), None);
    b.apics.msr_write(0, 0x1b, 0xfed1_0900, 0).unwrap();
    assert_eq!(b.apics.mmio_offset(0, 0xfed1_0020), Some(0x20));
    assert_eq!(b.apics.mmio_offset(1, 0xfed1_0020), None);
    let b = b.x2apic();
    assert_eq!(b.apics.mmio_offset(1, 0xfee0_0320), None);
}

#[test]
fn processors_that_do_not_exist_do_nothing() {
    let b = Bench::new(1);
    b.apics.inject_nmi(9);
    b.apics.mmio_write(9, 0xb0, 4, 0, 0);
    assert_eq!(b.apics.acknowledge(9, 0), None);
    assert_eq!(b.apics.msr_read(9, 0x1b, 0), None);
    let pending = b.apics.pending(9, 0);
    assert!(!pending.maskable && !pending.nmi && !pending.startup);
    assert_eq!(pending.next_ns, u64::MAX);
}

#[test]
fn save_and_restore() {
    let b = Bench::new(2);
    b.icr(0, 0x50, 1);
    b.apics.set_cr8(0, 3);
    let state = b.apics.save(1_000);
    let text = serde_json::to_string(&state).unwrap();
    let c = Bench::new(2);
    c.apics.restore(&serde_json::from_str(&text).unwrap(), 5).unwrap();
    assert_eq!(c.apics.cr8(0), 3);
    assert_eq!(c.take(0x50), [1]);
    assert!(Bench::new(3).apics.restore(&state, 0).is_err());
}

/// Senders on several threads, one receiver that sleeps until it is woken: no interrupt is lost.
#[test]
fn interrupts_from_other_threads_arrive() {
    struct Unpark(std::thread::Thread);
    impl Kick for Unpark {
        fn kick(&self) {}
        fn wake(&self) {
            self.0.unpark();
        }
    }
    let b = Bench::new(1);
    b.apics.attach_cpu(0, Arc::new(Unpark(std::thread::current())));
    const ROUNDS: u32 = 2_000;
    let received: [AtomicU32; 4] = Default::default();
    std::thread::scope(|scope| {
        for sender in 0..4u8 {
            let (apics, received) = (&b.apics, &received);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    // One of a vector at a time: two would be one.
                    while received[usize::from(sender)].load(Ordering::Acquire) < round {
                        std::thread::yield_now();
                    }
                    apics.send(msi(0, 0, 0x40 + u32::from(sender) * 0x10));
                }
            });
        }
        let mut left = 4 * ROUNDS;
        while left > 0 {
            if !b.apics.pending(0, 0).maskable {
                std::thread::park();
                continue;
            }
            if let Some(vector) = b.apics.acknowledge(0, 0) {
                b.apics.mmio_write(0, 0xb0, 4, 0, 0);
                received[usize::from((vector - 0x40) >> 4)].fetch_add(1, Ordering::Release);
                left -= 1;
            }
        }
    });
}
