//! A hypervisor whose processors follow a script, and a sink that remembers: lifecycle tests that are fast and exact.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use skep_hv::state::{CpuState, StateError, StateGroups};
use skep_hv::{
    HvError, Hypervisor, IoFlow, Kick, Probe, RunEnd, Startup, Vcpu, VcpuIo, VcpuStats, Vm, VmOptions,
    monotonic_ns,
};
use skep_machine::{Command, End, Error, Event, EventSink, Machine, MachineSpec};
use skep_memory::GuestMemory;

/// How long to wait for what must come, on a host that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// One thing that a scripted processor does.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// OUT of a byte.
    Out(u16, u8),
    /// A 32-bit write to memory-mapped I/O.
    Store(u64, u32),
    /// Writes text to COM1, polling its transmitter.
    Print(Vec<u8>),
    /// Reads that many bytes from COM1 and prints them back.
    Echo(usize),
    /// Polls a port until a bit is set.
    Await(u16, u8),
    /// Executes nothing of note until kicked.
    Spin,
    /// HLT with interrupts enabled, until one comes.
    Sleep,
    /// HLT with interrupts disabled.
    HaltForGood,
    TripleFault,
    Fail,
    Panic,
}

/// The scripts, one a processor.
pub(crate) struct Scripted(pub(crate) Vec<Vec<Step>>);

impl Hypervisor for Scripted {
    fn probe(&self) -> Probe {
        Probe { name: "scripted", available: true, reason: String::new() }
    }
    fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError> {
        if options.vcpus as usize != self.0.len() {
            return Err(HvError::Invalid("one script a processor".into()));
        }
        Ok(Arc::new(ScriptedVm { scripts: self.0.clone(), _memory: memory }))
    }
}

struct ScriptedVm {
    scripts: Vec<Vec<Step>>,
    _memory: GuestMemory,
}

impl Vm for ScriptedVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, HvError> {
        Ok(Box::new(ScriptedVcpu {
            id,
            script: self.scripts[id as usize].clone(),
            at: 0,
            done: 0,
            waiting: id != 0,
            runs: 0,
            general: Default::default(),
            kicker: Arc::default(),
        }))
    }
    fn memory_changed(&self) -> Result<(), HvError> {
        Ok(())
    }
    fn sync_dirty_log(&self) -> Result<(), HvError> {
        Ok(())
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
}

#[derive(Default)]
struct Kicker {
    /// Kicked, woken.
    flags: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Kick for Kicker {
    fn kick(&self) {
        self.flags.lock().unwrap().0 = true;
        self.changed.notify_all();
    }
    fn wake(&self) {
        self.flags.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl Kicker {
    fn take_kick(&self) -> bool {
        std::mem::take(&mut self.flags.lock().unwrap().0)
    }
    /// Sleeps until kicked, woken or `until`.
    fn wait(&self, until: u64) {
        let mut flags = self.flags.lock().unwrap();
        while !flags.0 && !flags.1 {
            let now = monotonic_ns();
            if now >= until {
                break;
            }
            let sleep = Duration::from_nanos((until - now).min(1_000_000_000));
            flags = self.changed.wait_timeout(flags, sleep).unwrap().0;
        }
        flags.1 = false;
    }
}

struct ScriptedVcpu {
    id: u32,
    script: Vec<Step>,
    at: usize,
    /// Progress within a step.
    done: usize,
    waiting: bool,
    runs: u64,
    general: skep_hv::state::General,
    kicker: Arc<Kicker>,
}

impl ScriptedVcpu {
    fn next(&mut self) {
        self.at += 1;
        self.done = 0;
    }

    /// INIT and start-up; false while it waits for one.
    fn startup(&mut self, io: &mut dyn VcpuIo) -> bool {
        while io.interrupts().startup {
            match io.acknowledge_startup() {
                Some(Startup::Init) => self.reset(),
                Some(Startup::Sipi(_)) => self.waiting = false,
                None => {}
            }
        }
        !self.waiting
    }
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd {
        self.runs += 1;
        loop {
            if self.kicker.take_kick() {
                return RunEnd::Kicked;
            }
            if !self.startup(io) {
                let until = io.interrupts().next_ns;
                self.kicker.wait(until);
                continue;
            }
            match self.script.get(self.at).cloned().unwrap_or(Step::Spin) {
                Step::Out(port, value) => {
                    self.next();
                    if io.port_write(port, 1, value.into()) == IoFlow::Leave {
                        return RunEnd::Kicked;
                    }
                }
                Step::Store(gpa, value) => {
                    self.next();
                    if io.memory_write(gpa, 4, value.into()) == IoFlow::Leave {
                        return RunEnd::Kicked;
                    }
                }
                Step::Print(text) => match text.get(self.done) {
                    None => self.next(),
                    Some(&byte) if io.port_read(0x3fd, 1) & 0x20 != 0 => {
                        let _ = io.port_write(0x3f8, 1, byte.into());
                        self.done += 1;
                    }
                    Some(_) => std::thread::yield_now(),
                },
                Step::Echo(count) => {
                    if self.done == count {
                        self.next();
                    } else if io.port_read(0x3fd, 1) & 0x21 == 0x21 {
                        let byte = io.port_read(0x3f8, 1);
                        let _ = io.port_write(0x3f8, 1, byte);
                        self.done += 1;
                    } else {
                        std::thread::yield_now();
                    }
                }
                Step::Await(port, mask) => {
                    if io.port_read(port, 1) as u8 & mask != 0 {
                        self.next();
                    } else {
                        std::thread::yield_now();
                    }
                }
                Step::Spin => std::thread::yield_now(),
                Step::Sleep => {
                    let pending = io.interrupts();
                    if pending.maskable {
                        io.acknowledge();
                        self.next();
                    } else {
                        self.kicker.wait(pending.next_ns);
                    }
                }
                Step::HaltForGood => {
                    if !io.interrupts().nmi {
                        return RunEnd::Halted;
                    }
                    io.acknowledge_nmi();
                    self.next();
                }
                Step::TripleFault => return RunEnd::TripleFault,
                Step::Fail => return RunEnd::Failed("as scripted".into()),
                Step::Panic => panic!("as scripted"),
            }
        }
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }
    fn get_state(&mut self, _groups: StateGroups) -> Result<CpuState, StateError> {
        self.general.rip = self.at as u64;
        Ok(CpuState { general: Some(self.general), system: Some(Default::default()), ..CpuState::default() })
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let general = state.general.unwrap_or_default();
        if general.rflags & 1 << 63 != 0 {
            return Err(StateError::Value {
                field: "general.rflags",
                value: general.rflags,
                why: "reserved",
            });
        }
        self.general = general;
        self.at = general.rip as usize;
        Ok(())
    }
    fn reset(&mut self) {
        (self.at, self.done, self.waiting) = (0, 0, self.id != 0);
    }
    fn stats(&self) -> VcpuStats {
        VcpuStats { instructions: self.runs, ..VcpuStats::default() }
    }
}

/// What a sink has been told, in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Told {
    Event(Event),
    Console(u32, Vec<u8>),
}

/// A sink that passes everything on to the test.
pub(crate) struct Recorder {
    pub(crate) told: Sender<Told>,
}

impl EventSink for Recorder {
    fn event(&self, event: Event) {
        let _ = self.told.send(Told::Event(event));
    }
    fn console(&self, port: u32, data: &[u8]) {
        let _ = self.told.send(Told::Console(port, data.to_vec()));
    }
}

/// A machine under test.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) told: Receiver<Told>,
    files: Vec<PathBuf>,
}

/// A file name of this process's own.
pub(crate) fn scratch(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("skep-{}-{number}-{name}", std::process::id()))
}

/// A specification with a ROM of 4 KiB and `vcpus` processors, changed by `change`.
pub(crate) fn spec(vcpus: usize, rom: &PathBuf, change: impl FnOnce(&mut Value)) -> MachineSpec {
    std::fs::write(rom, [0xf4; 4096]).unwrap();
    let none = json!({ "kind": "none" });
    let mut spec = json!({
        "version": 1, "name": "test", "uuid": "00000000-0000-4000-8000-000000000000",
        "cpus": { "sockets": 1, "cores": vcpus, "threads": 1 }, "memory": { "size": 2 << 20 },
        "accel": "software", "engine": "jit", "boot": { "kind": "rom", "rom": rom },
        "devices": { "0:31:0": { "type": "lpc", "com1": { "kind": "console" }, "com2": none, "com3": none, "com4": none } },
        "debugExit": true, "rtc": "utc", "onReboot": "restart",
    });
    change(&mut spec);
    MachineSpec::from_json(&spec.to_string()).unwrap()
}

impl Bench {
    pub(crate) fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self::with(scripts, |_| {})
    }

    pub(crate) fn with(scripts: Vec<Vec<Step>>, change: impl FnOnce(&mut Value)) -> Self {
        let rom = scratch("rom");
        let spec = spec(scripts.len(), &rom, change);
        let (sender, told) = channel();
        let machine =
            Machine::create(&spec, &Scripted(scripts), Arc::new(Recorder { told: sender })).unwrap();
        Self { machine, told, files: vec![rom] }
    }

    pub(crate) fn started(scripts: Vec<Vec<Step>>) -> Self {
        let bench = Self::new(scripts);
        bench.machine.call(Command::Start).unwrap();
        bench
    }

    /// The next event, console output skipped.
    pub(crate) fn event(&self) -> Event {
        loop {
            if let Told::Event(event) = self.told.recv_timeout(PATIENCE).expect("an event") {
                return event;
            }
        }
    }

    /// Waits for the end.
    pub(crate) fn end(&self) -> End {
        loop {
            if let Event::Exit { end, .. } = self.event() {
                return end;
            }
        }
    }

    /// Waits for that much output of COM1, crediting it.
    pub(crate) fn output(&self, length: usize) -> Vec<u8> {
        let mut output = Vec::new();
        while output.len() < length {
            if let Told::Console(port, data) = self.told.recv_timeout(PATIENCE).expect("output") {
                self.machine.console_credit(port, data.len()).unwrap();
                output.extend(data);
            }
        }
        output
    }

    /// The error of a command that must fail.
    pub(crate) fn refused<T: Send + std::fmt::Debug + 'static>(
        &self,
        command: impl FnOnce(skep_machine::Reply<T>) -> Command,
    ) -> Error {
        self.machine.call(command).unwrap_err()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
    }
}
