//! Single instructions for a back end that cannot execute them: [`skep_hv::step`] by the interpreter.
//!
//! The processor that does it belongs to the stepper. Nothing that it has learned of guest memory lasts from one step to the
//! next: every step begins with no translation and decodes its instruction anew, without watching the bytes it came from.

mod limits;
#[cfg(test)]
mod tests;
mod vectors;

use std::sync::Arc;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{Activity, CpuState, Events, StateError, StateGroups, System};
use skep_hv::step::{Fetched, Step, Stepper, StepperFactory};
use skep_hv::{HvError, IoFlow, Pending, Startup, VcpuIo, VmOptions};
use skep_memory::GuestMemory;

use crate::cpu::{Cpu, cr4};
use crate::decode::{Fresh, Room};
use crate::fault::{Abort, Exception, Exec, Raised, vector};
use crate::run;
use crate::system::{Tsc, index};
use crate::vm::{Mailbox, Shared};
use vectors::Vectors;

/// The interpreter as a finisher of single instructions.
#[derive(Debug, Default, Clone, Copy)]
pub struct Interpreter;

impl StepperFactory for Interpreter {
    fn create(
        &self,
        id: u32,
        memory: &GuestMemory,
        cpuid: &CpuidTable,
        tsc_hz: u64,
    ) -> Result<Box<dyn Stepper>, HvError> {
        Ok(Box::new(InterpreterStepper {
            id,
            memory: memory.clone(),
            cpuid: cpuid.clone(),
            tsc_hz,
            cpu: None,
        }))
    }
}

/// One vCPU's. The processor takes a MiB, so it is made when the first instruction fails: most never do.
struct InterpreterStepper {
    id: u32,
    memory: GuestMemory,
    cpuid: CpuidTable,
    tsc_hz: u64,
    cpu: Option<Box<Cpu>>,
}

impl Stepper for InterpreterStepper {
    fn groups(&self) -> StateGroups {
        StateGroups { general: true, system: true, debug: true, events: true, ..StateGroups::default() }
    }

    fn fetch(&mut self, state: &CpuState) -> Fetched {
        let groups = self.groups();
        let nothing = Fetched { rip: state.general.map_or(0, |g| g.rip), bytes: Vec::new(), groups };
        let Ok(cpu) = self.cpu() else { return nothing };
        let alone = CpuState { general: state.general, system: state.system, ..CpuState::default() };
        if load(cpu, &alone).is_err() {
            return nothing;
        }
        let rip = cpu.code_linear();
        let bytes = cpu.instruction_bytes(rip);
        let groups = match cpu.decode_fresh(rip, cpu.mode.code) {
            Ok(fresh) => needs(cpu, &fresh, groups),
            Err(Abort) => groups,
        };
        Fetched { rip, bytes, groups }
    }

    fn step(&mut self, state: &mut CpuState, io: &mut dyn VcpuIo) -> Step {
        match self.try_step(state, io) {
            Ok(step) => step,
            Err(why) => Step::Failed(why),
        }
    }
}

impl InterpreterStepper {
    fn cpu(&mut self) -> Result<&mut Cpu, HvError> {
        let cpu = match self.cpu.take() {
            Some(cpu) => cpu,
            None => self.make_cpu()?,
        };
        Ok(self.cpu.insert(cpu))
    }

    fn make_cpu(&self) -> Result<Box<Cpu>, HvError> {
        let cpuid = self.cpuid.clone();
        let shared = Shared::new(VmOptions { cpuid, tsc_hz: Some(self.tsc_hz), ..VmOptions::default() });
        let tsc = Tsc::new(self.tsc_hz);
        let mut cpu = Cpu::new(self.id, self.memory.clone(), shared, Arc::new(Mailbox::new()), tsc)?;
        cpu.unseen_writers = true;
        if limits::has_protection_keys(&self.cpuid) {
            cpu.msrs.model.cr4 |= cr4::PKE;
        }
        Ok(cpu)
    }

    /// Changes `state` only if it succeeds.
    fn try_step(&mut self, state: &mut CpuState, io: &mut dyn VcpuIo) -> Result<Step, String> {
        let cpuid = self.cpuid.clone();
        let cpu = self.cpu().map_err(|error| error.to_string())?;
        let (Some(system), Some(_)) = (state.system, state.general) else {
            return Err("a step needs the general and the system registers".into());
        };
        match state.events.unwrap_or_default().activity {
            Activity::Running => {}
            Activity::Halted => {
                return Err("the processor is halted: it has no instruction to execute".into());
            }
            Activity::WaitForSipi => return Err("the processor waits for a start-up IPI".into()),
            Activity::Shutdown => return Err("the processor is in shutdown after a triple fault".into()),
        }
        let refused = |why: StateError| format!("the interpreter cannot take this state: {why}");
        let vectors = match &state.fpu {
            Some(fpu) => Some(Vectors::load(cpu, &fpu.xsave, &cpuid).map_err(refused)?),
            None => None,
        };
        let mut window = Window { io, cr8: system.cr8 as u8 & 0xf };
        let mut flushes = false;
        cpu.with_io(&mut window, |cpu| {
            let exceptions = cpu.stats.exceptions;
            // An exception that waits is delivered while the state is loaded.
            load(cpu, state).map_err(refused)?;
            if state.events.and_then(|events| events.exception).is_none() {
                cpu.step_and_deliver_by(|cpu| {
                    let fresh = match fetch(cpu) {
                        Ok(fresh) => fresh,
                        Err(Abort) => return cpu.abandoned(None),
                    };
                    let missing = || missing(needs(cpu, &fresh, StateGroups::default()), state);
                    if let Some(why) = limits::refusal(cpu, &fresh, &cpuid, &system).or_else(missing) {
                        return run::Step::Failed(why);
                    }
                    let step = cpu.step_fresh(&fresh);
                    if step == run::Step::Done {
                        flushes = invalidates(&fresh.insn);
                    }
                    step
                });
                deliver_trap(cpu);
            }
            // Everything else has been delivered.
            if let Raised::Failed(why) = std::mem::replace(&mut cpu.raised, Raised::None) {
                return Err(format!("{why}, at {:#x}", cpu.rip));
            }
            flushes &= cpu.stats.exceptions == exceptions;
            Ok(())
        })?;
        let cr8 = window.cr8;
        store(cpu, state, system, cr8, vectors)?;
        Ok(match (cpu.shutdown, cpu.leave) {
            (true, _) => Step::TripleFault,
            (_, true) => Step::Leave,
            _ if flushes => Step::Flushed,
            _ => Step::Done,
        })
    }
}

/// Loads all but the vector state, and delivers the exception that waits.
fn load(cpu: &mut Cpu, state: &CpuState) -> Result<(), StateError> {
    cpu.leave = false;
    let (Some(general), Some(system)) = (state.general, state.system) else {
        return Err(StateError::Backend("the general or the system registers are missing".into()));
    };
    let system = System {
        cr4: system.cr4 & !limits::PASSIVE_CR4,
        efer: system.efer & !limits::PASSIVE_EFER,
        ..system
    };
    let registers = CpuState {
        general: Some(general),
        system: Some(system),
        debug: Some(state.debug.unwrap_or_default()),
        events: Some(state.events.unwrap_or_default()),
        ..CpuState::default()
    };
    cpu.check_state(&registers)?;
    cpu.put_system(&system);
    let has_aux = cpu.msrs.model.rdtscp || cpu.msrs.model.rdpid;
    for &(msr, value) in state.msrs.iter().flatten() {
        if MSRS.contains(&msr) && (has_aux || msr != index::TSC_AUX) {
            cpu.put_msr(msr, value)?;
        }
    }
    cpu.put_rest(&registers);
    // Nobody else wants attention.
    cpu.look = false;
    Ok(())
}

/// Gives back what has changed.
fn store(
    cpu: &mut Cpu,
    state: &mut CpuState,
    before: System,
    cr8: u8,
    vectors: Option<Vectors>,
) -> Result<(), String> {
    let now = cpu.get_state(StateGroups { msrs: false, fpu: false, ..StateGroups::ALL });
    let now = now.map_err(|error| error.to_string())?;
    let system = now.system.map(|system| System {
        cr4: system.cr4 | before.cr4 & limits::PASSIVE_CR4,
        efer: system.efer | before.efer & limits::PASSIVE_EFER,
        cr8: cr8.into(),
        apic_base: before.apic_base,
        ..system
    });
    let pending = state.events.unwrap_or_default().nmi_pending;
    let events = now.events.map(|events| Events { nmi_pending: pending, ..events });
    let kernel_gs = cpu.msrs.kernel_gs_base;
    let mut msrs = state.msrs.iter().flatten();
    let swapped = msrs.any(|&(msr, value)| msr == index::KERNEL_GS_BASE && value != kernel_gs);
    state.msrs = swapped.then(|| vec![(index::KERNEL_GS_BASE, kernel_gs)]);
    state.general = now.general;
    state.system = system.filter(|system| *system != before);
    state.debug = now.debug.filter(|debug| state.debug.is_some_and(|before| *debug != before));
    state.events = events.filter(|events| *events != state.events.unwrap_or_default());
    state.fpu = vectors.and_then(|vectors| vectors.store(cpu));
    state.apic = None;
    Ok(())
}

/// Fetches and decodes the instruction at CS:RIP.
fn fetch(cpu: &mut Cpu) -> Exec<Fresh> {
    cpu.check_code_limit()?;
    cpu.decode_fresh(cpu.code_linear(), cpu.mode.code)
}

/// The debug trap of the instruction that has just ended.
pub(crate) fn deliver_trap(cpu: &mut Cpu) {
    if cpu.mov_ss_shadow {
        // No single-step trap follows a change of SS; the next instruction's does (SDM vol. 3A §6.8.3).
        cpu.debug_trap &= !run::DR6_BS;
    } else if cpu.debug_trap != 0 && !cpu.shutdown {
        cpu.dr6 |= std::mem::take(&mut cpu.debug_trap);
        cpu.deliver_exception(Exception { vector: vector::DB, error: None });
    }
}

/// MSRs that an instruction may look at which the interpreter executes.
const MSRS: [u32; 10] = [
    index::TSC,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::FMASK,
    index::KERNEL_GS_BASE,
    index::TSC_AUX,
];

/// `groups` and those that the instruction needs beside them.
fn needs(cpu: &Cpu, fresh: &Fresh, groups: StateGroups) -> StateGroups {
    use Mnemonic as M;
    let keys = cpu.cr4 & cr4::PKE != 0;
    let fpu = keys || fresh.by == Room::Native || fresh.insn.mnemonic() == M::Xgetbv;
    let msrs = fresh.by == Room::System
        && matches!(
            fresh.insn.mnemonic(),
            M::Syscall
                | M::Sysret
                | M::Sysretq
                | M::Sysenter
                | M::Sysexit
                | M::Sysexitq
                | M::Swapgs
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpid
        );
    StateGroups { fpu: groups.fpu || fpu, msrs: groups.msrs || msrs, ..groups }
}

fn missing(needed: StateGroups, state: &CpuState) -> Option<&'static str> {
    if needed.fpu && state.fpu.is_none() {
        return Some("the instruction needs the FPU group of the state, which was not given");
    }
    if needed.msrs && state.msrs.is_none() {
        return Some("the instruction needs the MSRs of the state, which were not given");
    }
    None
}

/// Whether an instruction invalidates translations that a back end may have cached.
fn invalidates(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Invlpg | Mnemonic::Invpcid => true,
        Mnemonic::Mov => insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::CR3,
        _ => false,
    }
}

/// The machine as a step sees it: the local APIC's registers in the state are the back end's, and nothing else of the
/// APIC can be reached.
struct Window<'a> {
    io: &'a mut dyn VcpuIo,
    cr8: u8,
}

impl VcpuIo for Window<'_> {
    fn port_read(&mut self, port: u16, width: u8) -> u32 {
        self.io.port_read(port, width)
    }
    fn port_write(&mut self, port: u16, width: u8, value: u32) -> IoFlow {
        self.io.port_write(port, width, value)
    }
    fn memory_read(&mut self, gpa: u64, width: u8) -> u64 {
        self.io.memory_read(gpa, width)
    }
    fn memory_write(&mut self, gpa: u64, width: u8, value: u64) -> IoFlow {
        self.io.memory_write(gpa, width, value)
    }
    fn interrupts(&mut self) -> Pending {
        Pending { next_ns: u64::MAX, ..Pending::default() }
    }
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn acknowledge_nmi(&mut self) {}
    fn acknowledge_startup(&mut self) -> Option<Startup> {
        None
    }
    fn cr8(&mut self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64) -> Option<IoFlow> {
        None
    }
    fn send_ipis(&mut self, _: u64, _: &mut dyn Iterator<Item = u32>) {}
}
