//! What scripts drive: each device with its lines, and the events that reach it from outside.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(test)]
use serde::{Serialize, de::DeserializeOwned};
use skep_hv::Startup;
use skep_hv::irq::{Irq, IrqLine, MsiMessage, MsiSender};

use super::{Op, Subject};
use crate::device::{Device, Effect, Snapshot};
use crate::hpet::HpetLines;
use crate::{
    AcpiPm, ApicConfig, DebugExit, ExternalController, Hpet, IoApic, IrqChip, LegacyGate, LinearTsc,
    LocalApics, NoSignal, PicPair, Pit, PostPort, Ps2, ResetControl, Rtc, RtcConfig, Uart,
};

/// A line's level.
#[derive(Debug, Default)]
struct Level(AtomicBool);

impl IrqLine for Level {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::Relaxed);
    }
}

/// Levels of a device's lines, and a digest of the messages it has sent.
#[derive(Default)]
struct Wires {
    levels: Vec<Arc<Level>>,
    messages: Arc<Digest>,
}

impl Wires {
    fn line(&mut self) -> Irq {
        let level = Arc::new(Level::default());
        self.levels.push(level.clone());
        level
    }

    fn levels(&self) -> Vec<bool> {
        self.levels.iter().map(|level| level.0.load(Ordering::Relaxed)).collect()
    }
}

#[derive(Default)]
struct Digest(AtomicU64);

impl Digest {
    fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl MsiSender for Digest {
    fn send(&self, message: MsiMessage) {
        let word = message.address.rotate_left(32) ^ u64::from(message.data) ^ 1;
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_mul(31).wrapping_add(word), Ordering::Relaxed);
    }
}

fn observe(effect: Effect) -> u64 {
    match effect {
        Effect::None => 0,
        Effect::PowerOff => 1,
        Effect::Reset => 2,
        Effect::Exit(status) => 0x100 | u64::from(status),
    }
}

/// Reads, writes and resets, which every device has; `None` for other steps.
fn act_on_registers(device: &mut dyn Device, op: Op, now: u64) -> Option<u64> {
    let span = device.windows().iter().map(|window| window.offset + window.length).max().unwrap_or(1);
    // Mostly within the windows; the bus never goes outside, but a device must not mind.
    let offset = if op.offset & 0x8000 != 0 { op.offset } else { op.offset % span };
    match op.kind {
        0 | 1 => Some(device.read(offset, op.width, now)),
        2 | 3 => Some(observe(device.write(offset, op.width, op.value, now))),
        4 if op.offset == 0 => {
            device.reset(now);
            Some(0)
        }
        _ => None,
    }
}

/// A device with its own kinds of outside events.
pub(super) trait Model: Device + Snapshot + Sized {
    fn build(wires: &mut dyn FnMut() -> Irq, messages: Arc<dyn MsiSender>, now: u64) -> Self;
    /// An event from outside the guest, and what it answers.
    fn event(&mut self, op: Op, now: u64) -> u64 {
        let _ = (op, now);
        0
    }
    /// Throws away what a snapshot does not hold.
    fn settle_back_ends(&mut self) {}
}

impl Model for Pit {
    fn build(wires: &mut dyn FnMut() -> Irq, _: Arc<dyn MsiSender>, _: u64) -> Self {
        Self::new(wires())
    }
}

impl Model for Hpet {
    fn build(wires: &mut dyn FnMut() -> Irq, msi: Arc<dyn MsiSender>, _: u64) -> Self {
        let mut pins = [const { None }; 24];
        (16..24).for_each(|pin| pins[pin] = Some(wires()));
        let gate = LegacyGate::default();
        let _guarded = gate.guard(wires());
        Self::new(HpetLines { gsi: pins, legacy: [wires(), wires()], msi }, gate)
    }
}

impl Model for AcpiPm {
    fn build(wires: &mut dyn FnMut() -> Irq, _: Arc<dyn MsiSender>, _: u64) -> Self {
        Self::new(wires())
    }

    fn event(&mut self, op: Op, _: u64) -> u64 {
        if op.value & 0x80 != 0 {
            self.power_button()
        } else {
            self.raise_gpe(op.value as u8)
        }
        self.enabled().into()
    }
}

impl Model for Rtc {
    fn build(wires: &mut dyn FnMut() -> Irq, _: Arc<dyn MsiSender>, now: u64) -> Self {
        let config =
            RtcConfig { time: 1_709_164_798_500_000_000, memory_below_4g: 1 << 30, memory_above_4g: 0 };
        Self::new(config, wires(), now)
    }

    fn event(&mut self, op: Op, now: u64) -> u64 {
        if op.offset & 1 != 0 {
            self.set_time(op.value as i64, now);
        }
        self.time(now) as u64
    }
}

impl Model for Uart {
    fn build(wires: &mut dyn FnMut() -> Irq, _: Arc<dyn MsiSender>, _: u64) -> Self {
        Self::new(Self::COM1, wires(), Arc::new(NoSignal))
    }

    fn event(&mut self, op: Op, _: u64) -> u64 {
        match op.offset & 3 {
            0 => {
                let bytes = op.value.to_le_bytes();
                let room = self.input_room();
                let taken = self.push_input(&bytes);
                assert_eq!(taken, room.min(bytes.len()));
                taken as u64
            }
            1 => self.take_output().iter().fold(0u64, |sum, &byte| sum.wrapping_mul(31) ^ u64::from(byte)),
            2 => {
                self.push_break();
                0
            }
            _ => {
                self.set_connected(op.value & 1 != 0);
                0
            }
        }
    }

    fn settle_back_ends(&mut self) {
        self.take_output();
    }
}

impl Model for Ps2 {
    fn build(wires: &mut dyn FnMut() -> Irq, _: Arc<dyn MsiSender>, _: u64) -> Self {
        Self::new(wires(), wires())
    }

    fn event(&mut self, op: Op, _: u64) -> u64 {
        if op.offset & 1 == 0 {
            return self.push_scancodes(&op.value.to_le_bytes()) as u64;
        }
        self.push_motion(op.value as i32, (op.value >> 32) as i32, (op.offset >> 1) as u8);
        0
    }
}

/// `state` after `spoil` has been at it, if it still has the form of a state.
#[cfg(test)]
fn spoilt<S: Serialize + DeserializeOwned>(
    state: S,
    spoil: &mut dyn FnMut(&mut serde_json::Value),
) -> Option<S> {
    let mut value = serde_json::to_value(state).ok()?;
    spoil(&mut value);
    serde_json::from_value(value).ok()
}

/// One device and its wires.
pub(super) struct Single<D> {
    device: D,
    wires: Wires,
}

impl<D: Model> Subject for Single<D> {
    fn fresh(now: u64) -> Self {
        let mut wires = Wires::default();
        let messages = wires.messages.clone();
        let device = D::build(&mut || wires.line(), messages, now);
        Self { device, wires }
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        let seen = match act_on_registers(&mut self.device, op, now) {
            Some(seen) => seen,
            None => self.device.event(op, now),
        };
        seen ^ self.wires.messages.take()
    }

    fn advance(&mut self, now: u64) {
        self.device.advance(now);
    }

    fn deadline(&self) -> Option<u64> {
        self.device.next_deadline()
    }

    fn twin(&mut self, now: u64, later: u64) -> Self {
        self.device.settle_back_ends();
        self.wires.messages.take();
        let mut twin = Self::fresh(later);
        let restored = twin.device.restore(&self.device.save(now), later);
        assert_eq!(restored, Ok(()), "a device refuses its own state");
        twin
    }

    fn same(&self, now: u64, twin: &Self, later: u64) -> bool {
        self.device.save(now) == twin.device.save(later) && self.wires.levels() == twin.wires.levels()
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        if let Some(state) = spoilt(self.device.save(now), spoil) {
            let _ = self.device.restore(&state, now);
        }
    }
}

/// An IOAPIC with its pins.
pub(super) struct IoApics {
    ioapic: IoApic,
    messages: Arc<Digest>,
}

impl Subject for IoApics {
    fn fresh(_: u64) -> Self {
        let messages = Arc::new(Digest::default());
        Self { ioapic: IoApic::new(messages.clone()), messages }
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        let registers = Op { offset: [0x00, 0x10, 0x40, op.offset][op.offset as usize & 3], ..op };
        let seen = act_on_registers(&mut self.ioapic, registers, now).unwrap_or_else(|| {
            match op.kind {
                4 => self.ioapic.end_of_interrupt(op.value as u8),
                _ => self.ioapic.set_pin(op.offset as u8 & 31, op.value & 1 != 0),
            }
            0
        });
        seen ^ self.messages.take()
    }

    fn advance(&mut self, _: u64) {}

    fn deadline(&self) -> Option<u64> {
        None
    }

    fn twin(&mut self, now: u64, later: u64) -> Self {
        self.messages.take();
        let mut twin = Self::fresh(later);
        assert_eq!(twin.ioapic.restore(&self.ioapic.save(now), later), Ok(()));
        twin
    }

    fn same(&self, now: u64, twin: &Self, later: u64) -> bool {
        self.ioapic.save(now) == twin.ioapic.save(later)
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        if let Some(state) = spoilt(self.ioapic.save(now), spoil) {
            let _ = self.ioapic.restore(&state, now);
        }
    }
}

/// A pair of 8259 with its inputs.
pub(super) struct Pics {
    pics: PicPair,
    wires: Wires,
}

impl Subject for Pics {
    fn fresh(_: u64) -> Self {
        let mut wires = Wires::default();
        Self { pics: PicPair::new(wires.line()), wires }
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        act_on_registers(&mut self.pics, op, now).unwrap_or_else(|| match op.kind {
            4 => self.pics.acknowledge().into(),
            _ => {
                self.pics.set_line(op.offset as u8 & 31, op.value & 1 != 0);
                self.pics.output().into()
            }
        })
    }

    fn advance(&mut self, _: u64) {}

    fn deadline(&self) -> Option<u64> {
        None
    }

    fn twin(&mut self, now: u64, later: u64) -> Self {
        let mut twin = Self::fresh(later);
        assert_eq!(twin.pics.restore(&self.pics.save(now), later), Ok(()));
        twin
    }

    fn same(&self, now: u64, twin: &Self, later: u64) -> bool {
        self.pics.save(now) == twin.pics.save(later) && self.wires.levels() == twin.wires.levels()
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        if let Some(state) = spoilt(self.pics.save(now), spoil) {
            let _ = self.pics.restore(&state, now);
        }
    }
}

/// Three local APICs and the interrupt controllers behind them.
pub(super) struct Apics {
    apics: Arc<LocalApics>,
    chip: Arc<IrqChip>,
    tsc: Arc<LinearTsc>,
    lines: Vec<Irq>,
    levels: Mutex<Vec<bool>>,
}

impl Apics {
    const VCPUS: u32 = 3;
    const TSC_HZ: u64 = 2_000_000_000;

    fn startup(&self, vcpu: u32) -> u64 {
        match self.apics.acknowledge_startup(vcpu) {
            None => 0,
            Some(Startup::Init) => 1,
            Some(Startup::Sipi(vector)) => 0x100 | u64::from(vector),
        }
    }

    fn event(&self, op: Op, vcpu: u32, now: u64) -> u64 {
        match op.offset >> 4 & 15 {
            0 => self.apics.acknowledge_nmi(vcpu),
            1 => return self.startup(vcpu),
            2 => self.apics.set_cr8(vcpu, op.value as u8 & 15),
            3 => self.apics.inject_nmi(vcpu),
            4 => self.apics.end_skipped(vcpu),
            5 => return self.apics.can_skip_eoi(vcpu).into(),
            6 => self.apics.send_ipis(op.value, &mut [vcpu, 7].into_iter()),
            7 => self.apics.send(MsiMessage {
                address: 0xfee0_0000 | op.value & 0xf_ffff,
                data: (op.value >> 20) as u32 & 0xffff,
            }),
            8 => {
                self.tsc.set_offset(self.tsc.offset().wrapping_add(op.value & 0xff_ffff));
                (0..Self::VCPUS).for_each(|vcpu| self.apics.tsc_changed(vcpu));
            }
            9 if op.value == 0 => {
                self.apics.reset();
                self.chip.reset(now);
            }
            10 | 11 => {
                let mut window = self.chip.ioapic_window();
                let _ = window.write(0, 4, op.value & 0x3f, now);
                let _ = window.write(0x10, 4, op.value >> 8, now);
            }
            12 => {
                let mut window = self.chip.pic_window();
                let _ = window.write(op.offset & 3, 1, op.value, now);
            }
            _ => {
                let index = op.value as usize % self.lines.len();
                let high = op.value & 0x80 != 0;
                if let Some(level) = self.levels.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index)
                {
                    *level = high;
                }
                self.lines[index].set(high);
            }
        }
        0
    }
}

impl Subject for Apics {
    fn fresh(now: u64) -> Self {
        let tsc = Arc::new(LinearTsc::new(Self::TSC_HZ));
        tsc.set_offset(
            0u64.wrapping_sub(now.wrapping_mul(Self::TSC_HZ / 1_000_000_000)).wrapping_add(1 << 40),
        );
        let config = ApicConfig { vcpus: Self::VCPUS, tsc: tsc.clone(), ..ApicConfig::default() };
        let apics = LocalApics::new(config);
        let chip = IrqChip::new(apics.clone(), apics.lint0());
        let controller: Arc<dyn ExternalController> = chip.clone();
        apics.attach_controller(Arc::downgrade(&controller));
        let lines: Vec<Irq> =
            (0..16).map(|irq| chip.isa_line(irq)).chain((0..24).map(|gsi| chip.gsi_line(gsi))).collect();
        let levels = Mutex::new(vec![false; lines.len()]);
        Self { apics, chip, tsc, lines, levels }
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        const MSRS: [u32; 3] = [0x1b, 0x6e0, 0x6e0];
        let vcpu = (op.offset & 3) as u32;
        let msr = || match op.offset >> 2 & 3 {
            0 => MSRS[op.offset as usize >> 4 & 1],
            _ => 0x800 + (op.offset >> 4 & 0x3f) as u32,
        };
        let seen = match op.kind {
            0 => self.apics.mmio_read(vcpu, op.offset >> 2 & 0xfff, op.width, now),
            1 => {
                self.apics.mmio_write(vcpu, op.offset & 0xff0, op.width, op.value, now);
                0
            }
            2 => self.apics.msr_read(vcpu, msr(), now).unwrap_or(u64::MAX),
            3 => self.apics.msr_write(vcpu, msr(), op.value, now).is_some().into(),
            4 => self.apics.acknowledge(vcpu, now).map_or(0x100, u64::from),
            _ => self.event(op, vcpu, now),
        };
        let pending = self.apics.pending(vcpu, now);
        let flags =
            u64::from(pending.startup) | u64::from(pending.nmi) << 1 | u64::from(pending.maskable) << 2;
        seen.wrapping_mul(31) ^ flags
    }

    fn advance(&mut self, now: u64) {
        (0..Self::VCPUS).for_each(|vcpu| _ = self.apics.pending(vcpu, now));
    }

    fn deadline(&self) -> Option<u64> {
        // At time 0 no timer is due: this only asks.
        (0..Self::VCPUS)
            .map(|vcpu| self.apics.pending(vcpu, 0).next_ns)
            .min()
            .filter(|&next| next != u64::MAX)
    }

    fn twin(&mut self, now: u64, later: u64) -> Self {
        let twin = Self::fresh(later);
        let shift = (later - now) * (Self::TSC_HZ / 1_000_000_000);
        twin.tsc.set_offset(self.tsc.offset().wrapping_sub(shift));
        let levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner).clone();
        twin.lines.iter().zip(&levels).for_each(|(line, &high)| line.set(high));
        *twin.levels.lock().unwrap_or_else(PoisonError::into_inner) = levels;
        assert_eq!(twin.chip.restore(&self.chip.save(now), later), Ok(()));
        assert_eq!(twin.apics.restore(&self.apics.save(now), later), Ok(()));
        twin
    }

    fn same(&self, now: u64, twin: &Self, later: u64) -> bool {
        self.apics.save(now) == twin.apics.save(later) && self.chip.save(now) == twin.chip.save(later)
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        if let Some(state) = spoilt(self.chip.save(now), spoil) {
            let _ = self.chip.restore(&state, now);
        }
        if let Some(state) = spoilt(self.apics.save(now), spoil) {
            let _ = self.apics.restore(&state, now);
        }
    }
}

/// The ports of one register.
pub(super) struct Ports {
    exit: DebugExit,
    post: PostPort,
}

impl Subject for Ports {
    fn fresh(_: u64) -> Self {
        Self { exit: DebugExit::new(DebugExit::PORT), post: PostPort::new() }
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        let device: &mut dyn Device = if op.offset & 0x4000 == 0 { &mut self.exit } else { &mut self.post };
        act_on_registers(device, op, now).unwrap_or(0)
    }

    fn advance(&mut self, _: u64) {}

    fn deadline(&self) -> Option<u64> {
        None
    }

    fn twin(&mut self, _: u64, _: u64) -> Self {
        Self { exit: self.exit, post: self.post }
    }

    fn same(&self, _: u64, twin: &Self, _: u64) -> bool {
        self.post.code() == twin.post.code()
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        let _ = (now, spoil);
    }
}

/// The reset control register.
pub(super) struct Resets(ResetControl);

impl Subject for Resets {
    fn fresh(_: u64) -> Self {
        Self(ResetControl::new())
    }

    fn act(&mut self, op: Op, now: u64) -> u64 {
        act_on_registers(&mut self.0, op, now).unwrap_or(0)
    }

    fn advance(&mut self, _: u64) {}

    fn deadline(&self) -> Option<u64> {
        None
    }

    fn twin(&mut self, _: u64, _: u64) -> Self {
        Self(self.0.clone())
    }

    fn same(&self, now: u64, twin: &Self, later: u64) -> bool {
        self.0.clone().read(0, 1, now) == twin.0.clone().read(0, 1, later)
    }

    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value)) {
        let _ = (now, spoil);
    }
}
