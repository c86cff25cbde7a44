//! The owner thread: the only one that changes a machine's state.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use skep_boot::BootOptions;
use skep_chipset::Effect;
use skep_hv::state::{Activity, CpuState, StateGroups};
use skep_hv::{RunEnd, Vm, monotonic_ns};
use skep_memory::GuestMemory;

use crate::board::Board;
use crate::bus::Outcome;
use crate::error::Error;
use crate::event::{End, Event, EventSink, Reason, ResetCause, State, wall_ms};
use crate::machine::{Command, Helpers, MAX_TRANSFER, Message, Reply, StateCell, Stats, VcpuCount};
use crate::registers;
use crate::spec::{Engine, OnReboot};
use crate::vcpu::{Order, Report, VcpuThread};

/// A machine from inside. Fields are dropped in this order: vCPUs first, so that nobody uses what follows.
pub(crate) struct Owner {
    pub(crate) vcpus: Vec<VcpuThread>,
    pub(crate) helpers: Helpers,
    pub(crate) messages: Receiver<Message>,
    /// Messages that came while the vCPUs were being stopped.
    pub(crate) postponed: VecDeque<Message>,
    pub(crate) board: Arc<Board>,
    pub(crate) memory: GuestMemory,
    pub(crate) boot: BootOptions,
    pub(crate) on_reboot: OnReboot,
    pub(crate) engine: Option<Engine>,
    pub(crate) state: StateCell,
    pub(crate) sink: Arc<dyn EventSink>,
    /// Lives as long as its vCPUs.
    #[expect(dead_code, reason = "held, not used")]
    pub(crate) vm: Arc<dyn Vm>,
}

/// The general and system registers.
const REGISTERS: StateGroups = StateGroups { general: true, system: true, ..StateGroups::NONE };

/// The MSR that places a local APIC (SDM vol. 3A §11.4.4).
const IA32_APIC_BASE: u32 = 0x1b;

impl Owner {
    /// The thread.
    pub(crate) fn run(mut self) {
        self.tell(|time| Event::State { state: State::Created, time });
        loop {
            let message = match self.postponed.pop_front() {
                Some(message) => message,
                // The handle always says goodbye.
                None => self.messages.recv().unwrap_or(Message::Quit),
            };
            match message {
                Message::Command(command) => self.command(command),
                Message::Report { vcpu, report } => self.report(vcpu, report),
                Message::Broken(text) => {
                    if self.state.get() != State::Stopped {
                        let detail = format!("internal error, please report it: {text}");
                        self.end(End::new(Reason::Error).detail(detail));
                    }
                }
                Message::Quit => break,
            }
        }
        if self.state.get() != State::Stopped {
            self.end(End::new(Reason::Killed));
        }
        // Callers that still wait are answered before everything goes.
        for message in std::mem::take(&mut self.postponed).into_iter().chain(self.messages.try_iter()) {
            if let Message::Command(command) = message {
                command.refuse();
            }
        }
    }

    fn tell(&self, event: impl FnOnce(u64) -> Event) {
        self.sink.event(event(wall_ms()));
    }

    fn enter(&self, state: State) {
        self.state.set(state);
        self.tell(|time| Event::State { state, time });
    }

    /// Lets every vCPU run.
    fn go(&self) {
        self.helpers.timer.resume();
        for vcpu in &self.vcpus {
            vcpu.order_parked(Order::Run);
        }
    }

    /// Brings every vCPU out of the guest and holds it there.
    fn hold(&mut self) {
        self.helpers.timer.pause();
        for vcpu in &self.vcpus {
            vcpu.order(Order::Stop);
        }
        let mut out = self.vcpus.len();
        while out > 0 {
            match self.messages.recv() {
                Ok(Message::Report { report: Report::Parked, .. }) => out -= 1,
                Ok(message) => self.postponed.push_back(message),
                Err(_) => return,
            }
        }
    }

    /// Ends the machine.
    fn end(&mut self, end: End) {
        if self.state.get() == State::Running {
            self.hold();
        }
        self.forget_reports();
        self.helpers.serial.flush();
        self.enter(State::Stopped);
        self.tell(|time| Event::Exit { end, time });
    }

    /// Drops what vCPUs reported before they were held: it belongs to a past life.
    fn forget_reports(&mut self) {
        self.postponed.retain(|message| !matches!(message, Message::Report { .. }));
    }

    /// Resets the machine. Guest memory stays, but for what the boot loader and the firmware tables bring.
    fn reset(&mut self, cause: ResetCause) {
        let running = self.state.get() == State::Running;
        if running {
            self.hold();
        }
        self.forget_reports();
        self.board.reset();
        let loaded = match skep_boot::load(&self.memory, &self.boot) {
            Ok(loaded) => loaded,
            Err(error) => {
                return self.end(End::new(Reason::Error).detail(format!("cannot boot again: {error}")));
            }
        };
        let mut boot_state = loaded.boot_state.map(Box::new);
        for vcpu in &self.vcpus {
            // The bootstrap processor comes first.
            vcpu.order_parked(Order::Reset(boot_state.take()));
        }
        self.tell(|time| Event::Reset { cause, time });
        if running {
            self.go();
        }
    }

    fn report(&mut self, vcpu: u32, report: Report) {
        if !matches!(self.state.get(), State::Running | State::Paused) {
            return;
        }
        match report {
            Report::Parked => {}
            Report::Emulated { rip, bytes, count } => {
                let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                let rip = format!("{rip:#x}");
                self.tell(|time| Event::Emulated { vcpu, rip, bytes, count, time });
            }
            Report::Halted => {
                if self.vcpus.iter().all(|vcpu| vcpu.status.idle()) && !self.wake_pending() {
                    let detail = "every vCPU has halted with interrupts disabled";
                    self.end(End::new(Reason::Halt).by(vcpu).detail(detail));
                }
            }
            Report::Ended(end) => self.end(match end {
                RunEnd::TripleFault => End::new(Reason::TripleFault).by(vcpu),
                RunEnd::Failed(text) => End::new(Reason::Error).by(vcpu).detail(text),
                RunEnd::Halted | RunEnd::Kicked => End::new(Reason::Halt).by(vcpu),
            }),
            Report::Effect(Outcome { effect, slot }) => match effect {
                Effect::None => {}
                Effect::PowerOff => self.end(End::new(Reason::PowerOff).by(vcpu)),
                Effect::Reset if self.on_reboot == OnReboot::Exit => {
                    self.end(End::new(Reason::Reboot).by(vcpu))
                }
                Effect::Reset => self.reset(self.board.reset_cause(slot)),
                Effect::Exit(status) => {
                    self.end(End { status, ..End::new(Reason::DebugExit).by(vcpu) });
                }
            },
        }
    }

    /// Whether some vCPU is about to be woken by a signal that HLT with interrupts disabled still obeys. All stand still.
    fn wake_pending(&self) -> bool {
        const EVENTS: StateGroups = StateGroups { events: true, ..StateGroups::NONE };
        (0..).zip(&self.vcpus).any(|(id, vcpu)| {
            let pending = self.board.apics.pending(id);
            if self.board.apics.machine().is_some() {
                return pending.nmi || pending.startup;
            }
            let state = self.ask(vcpu, |reply| Order::Get(EVENTS, reply));
            let events = state.ok().and_then(|state| state.ok()?.events).unwrap_or_default();
            events.nmi_pending || events.activity == Activity::Running
        })
    }

    fn refusal(&self, command: &'static str) -> Error {
        let state = self.state.get();
        let hint = match (command, state) {
            (_, State::Stopped) => Some("create a new one"),
            ("start", State::Paused) => Some("resume it"),
            ("start", _) => None,
            ("resume", State::Created) | ("reset" | "press the power button of", State::Created) => {
                Some("start it first")
            }
            ("pause", State::Created) => Some("it does not run yet"),
            ("read registers of" | "set registers of", State::Running) => Some("pause it first"),
            _ => None,
        };
        Error::State { command, state, hint }
    }

    fn command(&mut self, command: Command) {
        let state = self.state.get();
        let live = matches!(state, State::Running | State::Paused);
        match command {
            Command::Start(reply) if state == State::Created => {
                self.enter(State::Running);
                self.go();
                reply(Ok(()));
            }
            Command::Start(reply) => reply(Err(self.refusal("start"))),
            Command::Pause(reply) if state == State::Running => {
                self.hold();
                self.enter(State::Paused);
                reply(Ok(()));
            }
            Command::Pause(reply) => reply(Err(self.refusal("pause"))),
            Command::Resume(reply) if state == State::Paused => {
                self.enter(State::Running);
                self.go();
                reply(Ok(()));
            }
            Command::Resume(reply) => reply(Err(self.refusal("resume"))),
            Command::Reset(reply) if live => {
                self.reset(ResetCause::Host);
                reply(Ok(()));
            }
            Command::Reset(reply) => reply(Err(self.refusal("reset"))),
            Command::PowerButton(reply) if live => {
                self.board.power_button();
                reply(Ok(()));
            }
            Command::PowerButton(reply) => reply(Err(self.refusal("press the power button of"))),
            Command::Kill(reply) => {
                if state != State::Stopped {
                    self.end(End::new(Reason::Killed));
                }
                reply(Ok(()));
            }
            Command::Stats(reply) => reply(self.stats()),
            Command::Registers(vcpu, reply) => reply(self.registers(vcpu)),
            Command::SetRegisters(vcpu, json, reply) => reply(self.set_registers(vcpu, &json)),
            Command::ReadMemory(gpa, length, reply) => self.read_memory(gpa, length, reply),
            Command::WriteMemory(gpa, data, reply) => reply(self.write_memory(gpa, &data)),
        }
    }

    /// Asks a vCPU's thread and waits for its answer.
    fn ask<T>(
        &self,
        vcpu: &VcpuThread,
        order: impl FnOnce(std::sync::mpsc::Sender<T>) -> Order,
    ) -> Result<T, Error> {
        let (answer, answered) = channel();
        vcpu.order(order(answer));
        answered.recv().map_err(|_| Error::Internal("a vCPU's thread is gone".into()))
    }

    fn stats(&self) -> Result<Stats, Error> {
        let count = |(vcpu, thread)| Ok(VcpuCount { vcpu, counters: self.ask(thread, Order::Stats)? });
        let vcpus = (0..).zip(&self.vcpus).map(count).collect::<Result<Vec<_>, Error>>()?;
        let translations = vcpus.iter().map(|vcpu| vcpu.counters.translations).sum();
        Ok(Stats { engine: self.engine, translations, vcpus, devices: self.board.bus.stats() })
    }

    fn vcpu(&self, vcpu: u32) -> Result<&VcpuThread, Error> {
        let count = self.vcpus.len() as u32;
        self.vcpus.get(vcpu as usize).ok_or(Error::NoVcpu { vcpu, count })
    }

    fn registers(&self, vcpu: u32) -> Result<String, Error> {
        if self.state.get() == State::Running {
            return Err(self.refusal("read registers of"));
        }
        Ok(registers::to_json(&self.get_registers(vcpu)?).to_string())
    }

    /// What a vCPU holds, and what its local APIC holds of its registers.
    fn get_registers(&self, vcpu: u32) -> Result<CpuState, Error> {
        let mut state = self.ask(self.vcpu(vcpu)?, |reply| Order::Get(REGISTERS, reply))??;
        if let (Some(system), Some(apics)) = (&mut state.system, self.board.apics.machine()) {
            system.apic_base = apics.apic_base(vcpu);
            system.cr8 = apics.cr8(vcpu).into();
        }
        Ok(state)
    }

    fn set_registers(&self, vcpu: u32, json: &str) -> Result<(), Error> {
        if !matches!(self.state.get(), State::Created | State::Paused) {
            return Err(self.refusal("set registers of"));
        }
        let thread = self.vcpu(vcpu)?;
        let before = self.get_registers(vcpu)?;
        let mut state = before.clone();
        registers::patch(&mut state, json)?;
        let (old, new) = (before.system.unwrap_or_default(), state.system.unwrap_or_default());
        if new.cr8 > 15 {
            return Err(Error::Registers(format!("cr8 cannot be {:#x}: it has four bits", new.cr8)));
        }
        self.ask(thread, |reply| Order::Set(Box::new(state), reply))??;
        let Some(apics) = self.board.apics.machine() else { return Ok(()) };
        let accepted = old.apic_base == new.apic_base
            || apics.msr_write(vcpu, IA32_APIC_BASE, new.apic_base, monotonic_ns()).is_some();
        if !accepted {
            self.ask(thread, |reply| Order::Set(Box::new(before), reply))??;
            return Err(Error::Registers(format!("apicBase cannot be {:#x}", new.apic_base)));
        }
        if old.cr8 != new.cr8 {
            apics.set_cr8(vcpu, new.cr8 as u8);
        }
        Ok(())
    }

    fn read_memory(&self, gpa: u64, length: u64, reply: Reply<Vec<u8>>) {
        if length > MAX_TRANSFER {
            return reply(Err(Error::Length { length, max: MAX_TRANSFER }));
        }
        let mut data = vec![0; length as usize];
        reply(match self.memory.read(gpa, &mut data) {
            Ok(()) => Ok(data),
            Err(error) => Err(Error::GuestMemory(error)),
        });
    }

    fn write_memory(&self, gpa: u64, data: &[u8]) -> Result<(), Error> {
        let length = data.len() as u64;
        if length > MAX_TRANSFER {
            return Err(Error::Length { length, max: MAX_TRANSFER });
        }
        self.memory.write(gpa, data).map_err(Error::GuestMemory)
    }
}
