//! The handle: builds a machine, and sends commands to its owner thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use serde::Serialize;
use skep_boot::{BootOptions, BootPaths, MemoryLayout, Payload, Platform};
use skep_chipset::Device;
use skep_cpu::Interpreter;
use skep_hv::{Hypervisor, Translations, VcpuStats, VmOptions};
use skep_memory::GuestMemory;

use crate::accel;
use crate::board::{Board, Parts};
use crate::bus::{DeviceStats, lock};
use crate::clock::VmTsc;
use crate::error::Error;
use crate::event::{EventSink, State};
use crate::harness::Harness;
use crate::host::{self, affinity};
use crate::owner::Owner;
use crate::serial::{Pump, SerialPorts};
use crate::spec::{Boot, Engine, MachineSpec};
use crate::timer::Timer;
use crate::vcpu::{Report, VcpuThread};

/// Most bytes of guest memory that one command moves: 16 MiB.
pub const MAX_TRANSFER: u64 = 16 << 20;

/// Where the answer to a command goes. Called once, from the owner thread (or at once, if that is gone).
pub type Reply<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// What can be asked of a machine.
pub enum Command {
    /// `created` → `running`.
    Start(Reply<()>),
    /// `running` → `paused`: every vCPU stands at an instruction boundary when this is answered.
    Pause(Reply<()>),
    /// `paused` → `running`.
    Resume(Reply<()>),
    /// Resets a running or paused machine; it stays in its state.
    Reset(Reply<()>),
    /// Presses the power button of a running or paused machine.
    PowerButton(Reply<()>),
    /// Ends the machine, in any state; one that has ended stays as it is.
    Kill(Reply<()>),
    /// Counters.
    Stats(Reply<Stats>),
    /// Registers of a vCPU, by name, as JSON. Not while running.
    Registers(u32, Reply<String>),
    /// Sets registers of a vCPU from an object as [`Command::Registers`] answers, or a part of one. Not while running.
    SetRegisters(u32, String, Reply<()>),
    /// Reads guest-physical memory: address and length, at most [`MAX_TRANSFER`].
    ReadMemory(u64, u64, Reply<Vec<u8>>),
    /// Writes guest-physical memory, at most [`MAX_TRANSFER`].
    WriteMemory(u64, Vec<u8>, Reply<()>),
}

impl Command {
    /// Answers that there is nobody to do it.
    pub(crate) fn refuse(self) {
        match self {
            Self::Start(reply)
            | Self::Pause(reply)
            | Self::Resume(reply)
            | Self::Reset(reply)
            | Self::PowerButton(reply)
            | Self::Kill(reply)
            | Self::SetRegisters(_, _, reply)
            | Self::WriteMemory(_, _, reply) => reply(Err(Error::Destroyed)),
            Self::Stats(reply) => reply(Err(Error::Destroyed)),
            Self::Registers(_, reply) => reply(Err(Error::Destroyed)),
            Self::ReadMemory(_, _, reply) => reply(Err(Error::Destroyed)),
        }
    }
}

/// Counters of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Which engine of the software CPU; none with another accelerator.
    pub engine: Option<Engine>,
    /// What all vCPUs' JITs have translated.
    pub translations: Translations,
    /// By vCPU.
    pub vcpus: Vec<VcpuCount>,
    /// By device.
    pub devices: Vec<DeviceStats>,
}

/// Counters of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VcpuCount {
    /// Its number.
    pub vcpu: u32,
    /// What its back end has counted.
    #[serde(flatten)]
    pub counters: VcpuStats,
}

/// What arrives at the owner thread.
pub(crate) enum Message {
    Command(Command),
    Report {
        vcpu: u32,
        report: Report,
    },
    /// A defect: one of the threads that serve the devices has panicked.
    Broken(String),
    Quit,
}

/// A state that other threads may look at.
#[derive(Clone)]
pub(crate) struct StateCell(Arc<AtomicU8>);

impl StateCell {
    fn new() -> Self {
        Self(Arc::new(AtomicU8::new(0)))
    }

    pub(crate) fn set(&self, state: State) {
        self.0.store(state as u8, Ordering::SeqCst);
    }

    pub(crate) fn get(&self) -> State {
        match self.0.load(Ordering::SeqCst) {
            0 => State::Created,
            1 => State::Running,
            2 => State::Paused,
            _ => State::Stopped,
        }
    }
}

/// A machine. Dropping it ends the machine (which tells its sink so), joins every thread and frees everything.
pub struct Machine {
    inbox: Mutex<Sender<Message>>,
    state: StateCell,
    serial: Arc<SerialPorts>,
    owner: Mutex<Option<JoinHandle<()>>>,
}

impl Machine {
    /// Builds the machine that `spec` describes. Its vCPUs do not run yet. Takes as long as reading the files takes.
    ///
    /// # Errors
    /// The specification is invalid, a file cannot be used, or the host refuses memory or threads. Nothing is left
    /// behind.
    pub fn create(
        spec: &MachineSpec,
        hypervisor: &dyn Hypervisor,
        sink: Arc<dyn EventSink>,
    ) -> Result<Self, Error> {
        Self::create_with(spec, hypervisor, sink, |_| Ok(Vec::new()))
    }

    /// The same with devices that the specification does not know, which `devices` makes. They are reset with the machine.
    ///
    /// # Errors
    /// As [`Machine::create`], what `devices` answers, or two devices want the same address.
    pub fn create_with(
        spec: &MachineSpec,
        hypervisor: &dyn Hypervisor,
        sink: Arc<dyn EventSink>,
        devices: impl FnOnce(&Harness) -> Result<Vec<Arc<Mutex<dyn Device>>>, Error>,
    ) -> Result<Self, Error> {
        let more = Box::new(devices);
        spec.validate()?;
        let size = spec.memory.size;
        if let Some(total) = host::memory_total().filter(|&total| size > total) {
            let message = format!(
                "memory.size is {} MiB, but this host has only {} MiB of memory and swap; give the machine less",
                size >> 20,
                total >> 20
            );
            return Err(Error::HostMemory { message, size });
        }
        let backing = spec.backing();
        let available = host::memory_available().filter(|_| backing.wired && backing.pages.pool().is_none());
        if let Some(available) = available.filter(|&available| size > available) {
            let message = format!(
                "memory.size is {} MiB, all of it wired, but this host can give only {} MiB now; give the machine less, or \
                 end other programs",
                size >> 20,
                available >> 20
            );
            return Err(Error::HostMemory { message, size });
        }
        affinity::check(&spec.cpus.pin)?;
        let serial_spec = spec.serial_ports()?;
        let payload = Payload::open(&boot_paths(&spec.boot))?;
        let layout = MemoryLayout::new(size, payload.rom_size())?;
        let memory = GuestMemory::with_backing(&layout.regions(), backing).map_err(Error::allocation)?;
        let boot = BootOptions { payload, layout, platform: platform(spec)? };
        let loaded = skep_boot::load(&memory, &boot)?;

        let tsc_hz = hypervisor.tsc_hz();
        let cpuid = accel::cpuid(spec, &hypervisor.cpuid()?, tsc_hz)?;
        let options = VmOptions {
            vcpus: spec.vcpus(),
            cpuid: cpuid.clone(),
            tsc_hz: Some(tsc_hz),
            stepper: Some(Arc::new(Interpreter)),
            exits: spec.exits.into(),
        };
        let vm = hypervisor.create_vm(memory.clone(), options)?;
        let timer = Arc::new(Timer::default());
        let serial = SerialPorts::new(serial_spec);
        let board = Arc::new(Board::new(Parts {
            spec,
            layout: &layout,
            cpuid: &cpuid,
            tsc: Arc::new(VmTsc(vm.clone())),
            timer: timer.clone(),
            vm: &vm,
            memory: &memory,
            more,
            attention: serial.attention(),
        })?);
        let mut vcpus = (0..spec.vcpus()).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        if let (Some(state), Some(first)) = (&loaded.boot_state, vcpus.first_mut()) {
            first.set_state(state)?;
        }
        // The last step that leaves a trace outside this process: a file is emptied only when all else has worked.
        let pump = Pump::open(serial.clone(), serial_spec, sink.clone())?;

        let (inbox, messages) = channel();
        let (state, mut threads) = (StateCell::new(), Vec::new());
        let helpers = Helpers::spawn(&board, &timer, &serial, pump, &inbox)?;
        for (id, vcpu) in (0..).zip(vcpus) {
            let cpus = spec.cpus.pin.get(&id).cloned();
            threads.push(VcpuThread::spawn(id, vcpu, cpus, board.clone(), inbox.clone())?);
        }
        let owner = Owner {
            messages,
            postponed: Default::default(),
            vcpus: threads,
            helpers,
            board,
            memory,
            boot,
            on_reboot: spec.on_reboot,
            engine: spec.engine,
            state: state.clone(),
            sink,
            vm,
        };
        let name = "skep-owner".to_owned();
        let thread = Builder::new().name(name.clone()).spawn(move || owner.run());
        let thread = thread.map_err(|source| Error::Thread { name, source })?;
        Ok(Self { inbox: Mutex::new(inbox), state, serial, owner: Mutex::new(Some(thread)) })
    }

    /// Sends a command; its reply is called when it has been done. Commands are done in the order in which they are sent.
    pub fn send(&self, command: Command) {
        let sent = lock(&self.inbox).send(Message::Command(command));
        if let Err(error) = sent
            && let Message::Command(command) = error.0
        {
            command.refuse();
        }
    }

    /// Sends a command and waits for its reply: `machine.call(Command::Start)`,
    /// `machine.call(|reply| Command::ReadMemory(0, 64, reply))`.
    ///
    /// # Errors
    /// Whatever the command answers.
    pub fn call<T: Send + 'static>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (answer, answered) = channel();
        self.send(command(Box::new(move |result| drop(answer.send(result)))));
        answered.recv().unwrap_or(Err(Error::Destroyed))
    }

    /// The state it is in at this moment.
    pub fn state(&self) -> State {
        self.state.get()
    }

    /// Sends input to console `port` (1 to 4); returns how many bytes were taken. When fewer than all, an
    /// [`crate::Event::ConsoleDrain`] follows when there is room.
    ///
    /// # Errors
    /// That port is not a console.
    pub fn console_write(&self, port: u32, data: &[u8]) -> Result<usize, Error> {
        self.serial.write(port, data)
    }

    /// Says that `bytes` of output of console `port` have been dealt with.
    ///
    /// # Errors
    /// That port is not a console.
    pub fn console_credit(&self, port: u32, bytes: usize) -> Result<(), Error> {
        self.serial.credit(port, bytes)
    }

    /// Ends the machine as dropping it does. Can be called again. The events it causes have been told when it returns.
    pub fn destroy(&self) {
        // One that is already gone hears nothing.
        let _ = lock(&self.inbox).send(Message::Quit);
        // With the lock held while joining, so that a second caller returns only when all is done.
        if let Some(thread) = lock(&self.owner).take() {
            // Its panics have been printed; there is nothing more to do about them.
            let _ = thread.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.destroy();
    }
}

fn boot_paths(boot: &Boot) -> BootPaths {
    match boot {
        Boot::Kernel { kernel, initrd, cmdline, modules } => BootPaths {
            kernel: Some(kernel.clone()),
            initrd: initrd.clone(),
            modules: modules.iter().map(|module| (module.path.clone(), module.cmdline.clone())).collect(),
            cmdline: cmdline.clone(),
            rom: None,
        },
        Boot::Rom { rom } => BootPaths { rom: Some(rom.clone()), ..BootPaths::default() },
    }
}

fn platform(spec: &MachineSpec) -> Result<Platform, Error> {
    Ok(Platform {
        sockets: spec.cpus.sockets,
        cores: spec.cpus.cores,
        threads: spec.cpus.threads,
        uuid: spec.uuid_bytes()?,
        ..Platform::new(spec.vcpus())
    })
}

/// The threads that serve the devices.
pub(crate) struct Helpers {
    pub(crate) timer: Arc<Timer>,
    pub(crate) serial: Arc<SerialPorts>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    fn spawn(
        board: &Arc<Board>,
        timer: &Arc<Timer>,
        serial: &Arc<SerialPorts>,
        pump: Pump,
        owner: &Sender<Message>,
    ) -> Result<Self, Error> {
        let mut helpers = Self { timer: timer.clone(), serial: serial.clone(), threads: Vec::new() };
        let (clock, devices) = (timer.clone(), board.clone());
        let keep_time = move || clock.run(|| devices.bus.next_deadline(), || devices.bus.advance());
        helpers.add("skep-timer", owner, keep_time)?;
        let devices = board.clone();
        helpers.add("skep-serial", owner, move || pump.run(&devices))?;
        Ok(helpers)
    }

    fn add(
        &mut self,
        name: &'static str,
        owner: &Sender<Message>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let owner = owner.clone();
        let body = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
                // An owner that is gone needs no report.
                let _ = owner.send(Message::Broken(format!("{name}: {}", panic_text(&*panic))));
            }
        };
        let thread = Builder::new().name(name.to_owned()).spawn(body);
        self.threads.push(thread.map_err(|source| Error::Thread { name: name.to_owned(), source })?);
        Ok(())
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown panic")
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.timer.quit();
        self.serial.quit();
        for thread in self.threads.drain(..) {
            // Its panics have been printed; there is nothing more to do about them.
            let _ = thread.join();
        }
    }
}
