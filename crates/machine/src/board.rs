//! The main board: every device of the machine, wired up.

use std::sync::{Arc, Mutex};

use skep_boot::MemoryLayout;
use skep_boot::layout::{self, COM_IRQS, COM_PORTS, FOUR_GIB, KEYBOARD_IRQ, MOUSE_IRQ, RTC_IRQ, SCI_IRQ};
use skep_chipset::hpet::HpetLines;
use skep_chipset::{
    Access, AcpiPm, ApicConfig, DebugExit, Device, Effect, Hpet, IoApic, IrqChip, LegacyGate, Pit, PostPort,
    Ps2, ResetControl, Rtc, RtcConfig, TscClock, Uart, Window,
};
use skep_hv::cpuid::CpuidTable;
use skep_hv::irq::Signal;
use skep_hv::{Vm, monotonic_ns};
use skep_memory::GuestMemory;

use crate::apics::Apics;
use crate::bus::{Bus, lock};
use crate::clock;
use crate::error::Error;
use crate::event::ResetCause;
use crate::harness::{Doorbells, Harness};
use crate::spec::MachineSpec;
use crate::timer::Timer;

/// A device that the machine also reaches by other ways than the bus.
pub(crate) type Shared<D> = Arc<Mutex<D>>;

/// The devices of a machine.
pub(crate) struct Board {
    /// Registers by address.
    pub(crate) bus: Bus,
    /// The local APICs.
    pub(crate) apics: Arc<Apics>,
    /// COM1 to COM4.
    pub(crate) uarts: [Shared<Uart>; 4],
    pm: Shared<AcpiPm>,
}

/// Makes devices.
pub(crate) type More<'a> = Box<dyn FnOnce(&Harness) -> Result<Vec<Shared<dyn Device>>, Error> + 'a>;

/// The parts that a board is made with.
pub(crate) struct Parts<'a> {
    pub(crate) spec: &'a MachineSpec,
    pub(crate) layout: &'a MemoryLayout,
    pub(crate) cpuid: &'a CpuidTable,
    pub(crate) tsc: Arc<dyn TscClock>,
    pub(crate) timer: Arc<Timer>,
    pub(crate) vm: &'a Arc<dyn Vm>,
    pub(crate) memory: &'a GuestMemory,
    /// Makes the devices that are not on every board.
    pub(crate) more: More<'a>,
    /// What the UARTs call when they have output or room for input.
    pub(crate) attention: [Arc<dyn Signal>; 4],
}

fn shared<D: Device>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

impl Board {
    /// Makes the devices and wires them.
    pub(crate) fn new(parts: Parts<'_>) -> Result<Self, Error> {
        let Parts { spec, layout, cpuid, tsc, timer, vm, memory, more, attention } = parts;
        let now = monotonic_ns();
        let config = ApicConfig {
            vcpus: spec.vcpus(),
            x2apic: cpuid.get(1, 0).is_none_or(|leaf| leaf.ecx & 1 << 21 != 0),
            physical_bits: cpuid.get(0x8000_0008, 0).map_or(46, |leaf| leaf.eax as u8),
            tsc,
        };
        let apics = Arc::new(Apics::new(config, vm.apics()));
        let chip = IrqChip::new(apics.msi(), apics.lint0());
        let controller: Arc<dyn skep_chipset::ExternalController> = chip.clone();
        apics.attach_controller(Arc::downgrade(&controller));

        let uarts = std::array::from_fn(|at| {
            shared(Uart::new(COM_PORTS[at], chip.isa_line(COM_IRQS[at]), attention[at].clone()))
        });
        let gate = LegacyGate::default();
        let lines = HpetLines {
            gsi: std::array::from_fn(|gsi| {
                (gsi < usize::from(IoApic::PINS)).then(|| chip.gsi_line(gsi as u8))
            }),
            legacy: [chip.isa_line(0), chip.isa_line(RTC_IRQ)],
            msi: apics.msi(),
        };
        let rtc = RtcConfig {
            time: clock::time_of_day(spec.rtc),
            memory_below_4g: layout.low_end(),
            memory_above_4g: layout.high_end().saturating_sub(FOUR_GIB),
        };
        let pm = shared(AcpiPm::new(chip.isa_line(SCI_IRQ)));

        let mut devices: Vec<(String, Arc<Mutex<dyn Device>>)> = Vec::new();
        for (at, uart) in uarts.iter().enumerate() {
            devices.push((format!("com{}", at + 1), uart.clone()));
        }
        let mut add = |device: Arc<Mutex<dyn Device>>| {
            let name = lock(&device).name().to_owned();
            devices.push((name, device));
        };
        add(shared(Pit::new(gate.guard(chip.isa_line(0)))));
        add(shared(Rtc::new(rtc, gate.guard(chip.isa_line(RTC_IRQ)), now)));
        add(shared(Hpet::new(lines, gate)));
        add(shared(Ps2::new(chip.isa_line(KEYBOARD_IRQ), chip.isa_line(MOUSE_IRQ))));
        add(pm.clone());
        add(shared(ConfigPorts { reset: ResetControl::new() }));
        add(shared(PostPort::new()));
        if spec.debug_exit {
            add(shared(DebugExit::new(DebugExit::PORT)));
        }
        let doorbells = Doorbells::new(Some(vm.clone()));
        let harness = Harness {
            chip: chip.clone(),
            apics: apics.clone(),
            doorbells: doorbells.clone(),
            memory: memory.clone(),
        };
        more(&harness)?.into_iter().for_each(&mut add);
        // Last, so that a reset of the whole board finds their inputs at rest.
        add(shared(chip.pic_window()));
        add(shared(chip.ioapic_window()));
        let bus = Bus::new(devices, timer, doorbells).map_err(Error::Internal)?;
        Ok(Self { bus, apics, uarts, pm })
    }

    /// RESET# to everything but the processors.
    pub(crate) fn reset(&self) {
        self.bus.reset();
        self.apics.reset();
    }

    /// Presses the power button.
    pub(crate) fn power_button(&self) {
        self.bus.with(&self.pm, |pm, _| pm.power_button());
    }

    /// What a reset asked for by the device at `slot` is called.
    pub(crate) fn reset_cause(&self, slot: usize) -> ResetCause {
        match self.bus.slots().get(slot).map(|slot| slot.name.as_str()) {
            Some("ps2") => ResetCause::Keyboard,
            _ => ResetCause::ResetRegister,
        }
    }
}

/// Ports 0xcf8 to 0xcff of a machine without a PCI bus: configuration reads as ones. The reset control register is the
/// byte in their middle, and a dword written to CONFIG_ADDRESS must not be taken for it.
struct ConfigPorts {
    reset: ResetControl,
}

impl ConfigPorts {
    const BASE: u16 = 0xcf8;
    const RESET: u64 = (layout::RESET_PORT - Self::BASE) as u64;
}

impl Device for ConfigPorts {
    fn name(&self) -> &'static str {
        "config-ports"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(Self::BASE, 8, 0)]
    }

    fn access(&self) -> Access {
        Access { min: 1, max: 4 }
    }

    fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64 {
        match (offset, width) {
            (Self::RESET, 1) => self.reset.read(0, 1, now),
            _ => u64::MAX >> (64 - 8 * u32::from(width.clamp(1, 8))),
        }
    }

    fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
        match (offset, width) {
            (Self::RESET, 1) => self.reset.write(0, 1, value, now),
            _ => Effect::None,
        }
    }

    fn reset(&mut self, now: u64) {
        self.reset.reset(now);
    }
}

#[cfg(test)]
mod tests {
    use skep_chipset::Space;
    use skep_hv::Hypervisor;

    use super::*;

    #[test]
    fn every_address_can_be_read_and_written_at_any_width() {
        let spec = crate::spec::tests::parsed();
        let layout = MemoryLayout::new(spec.memory.size, 0).unwrap();
        let serial = crate::serial::SerialPorts::new(spec.serial_ports().unwrap());
        let memory = GuestMemory::new(&layout.regions()).unwrap();
        let options = skep_hv::VmOptions { cpuid: skep_hv::cpuid::host(), ..Default::default() };
        let vm = skep_cpu::Software::new().create_vm(memory.clone(), options).unwrap();
        let board = Board::new(Parts {
            vm: &vm,
            memory: &memory,
            more: Box::new(|_| Ok(Vec::new())),
            spec: &spec,
            layout: &layout,
            cpuid: &CpuidTable::default(),
            tsc: Arc::new(skep_chipset::LinearTsc::new(1_000_000_000)),
            timer: Arc::default(),
            attention: serial.attention(),
        })
        .unwrap();
        let pages = [layout::IOAPIC, layout::HPET, layout::LOCAL_APIC, 0xfff0_0000];
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let (mut effects, mut claimed) = (0, 0);
        for _ in 0..200_000 {
            let (r, value) = (random(), random());
            let width = 1 << (r % 4);
            let (space, address) = match r >> 8 & 3 {
                0 => (Space::Port, r >> 16 & 0xffff),
                1 => (Space::Port, r >> 16 & 0x3ff),
                _ => (Space::Memory, pages[(r >> 10 & 3) as usize] + (r >> 16 & 0x1fff)),
            };
            if r & 1 << 12 == 0 {
                effects += u32::from(board.bus.write(space, address, width, value).effect != Effect::None);
            } else {
                let read = board.bus.read(space, address, width);
                let ones = u64::MAX >> (64 - 8 * u32::from(width));
                assert_eq!(read & !ones, 0, "{space:?} {address:#x} {width}");
                claimed += u32::from(read != ones);
            }
            if r & 0xff << 20 == 0 {
                board.bus.advance();
                board.reset();
            }
        }
        assert!(effects > 0 && claimed > 1000, "the devices are there: {effects} {claimed}");
    }

    #[test]
    fn a_dword_to_the_configuration_address_is_no_reset() {
        let mut ports = ConfigPorts { reset: ResetControl::new() };
        assert_eq!(ports.write(0, 4, 0x8000_0600, 0), Effect::None);
        assert_eq!(ports.write(0, 2, 0x0600, 0), Effect::None);
        assert_eq!((ports.read(0, 4, 0), ports.read(4, 4, 0)), (0xffff_ffff, 0xffff_ffff));
        assert_eq!((ports.read(0, 1, 0), ports.read(4, 1, 0)), (0xff, 0xff));
        assert_eq!(ports.write(1, 1, layout::RESET_VALUE.into(), 0), Effect::Reset);
    }
}
