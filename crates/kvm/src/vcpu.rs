//! The run loop of one vCPU.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, StateError, StateGroups};
use skep_hv::{HvError, IoFlow, Kick, RunEnd, Vcpu, VcpuIo, VcpuStats};

use crate::error::Tried;
use crate::finish::Finisher;
use crate::ioctl;
use crate::kick::{Stay, Tick, note};
use crate::run::{self, Exit};
use crate::state::{self, PowerOn};
use crate::statistics::Statistics;
use crate::vm::Shared;

/// How often a vCPU that stays in the kernel is looked at, for whether it can ever come out.
const LOOK: Duration = Duration::from_millis(250);

/// One vCPU on KVM.
pub(crate) struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    /// Bytes of the page (or pages) that the kernel shares with us.
    run_size: usize,
    shared: Arc<Shared>,
    power_on: PowerOn,
    finisher: Finisher,
    tick: Option<Tick>,
    /// KVM has told us of an access and not yet had our answer: the instruction is half done.
    half_done: bool,
    stats: VcpuStats,
    statistics: Option<Statistics>,
    /// How often it had halted when it was last found standing still.
    halts: Option<u64>,
}

/// What follows an exit.
enum Next {
    Go,
    Leave,
    End(RunEnd),
}

impl From<IoFlow> for Next {
    fn from(flow: IoFlow) -> Self {
        match flow {
            IoFlow::Continue => Self::Go,
            IoFlow::Leave => Self::Leave,
        }
    }
}

impl KvmVcpu {
    pub(crate) fn new(id: u32, fd: VcpuFd, run_size: usize, shared: Arc<Shared>) -> Result<Self, HvError> {
        let cpuid = &shared.options.cpuid;
        fd.set_cpuid2(&entries(cpuid, id)?).tried("KVM_SET_CPUID2")?;
        let khz = (shared.tsc_hz / 1000) as u32;
        if fd.get_tsc_khz().ok() != Some(khz) {
            fd.set_tsc_khz(khz).tried("KVM_SET_TSC_KHZ")?;
        }
        shared.dirty.add(&fd).map_err(|source| HvError::Os { what: "map the dirty ring", source })?;
        let power_on = PowerOn::of(&fd, cpuid, &shared.shape)
            .map_err(|error| HvError::Invalid(format!("vCPU {id}: {error}")))?;
        // Counters are a convenience: without them the machine runs as well.
        let statistics = shared.capabilities.statistics.then(|| Statistics::open(&fd).ok()).flatten();
        let mut vcpu = Self {
            id,
            fd,
            run_size,
            power_on,
            finisher: Finisher::new(id),
            shared,
            tick: None,
            half_done: false,
            stats: VcpuStats::default(),
            statistics,
            halts: None,
        };
        vcpu.try_reset().map_err(|error| HvError::Invalid(format!("vCPU {id}: {error}")))?;
        Ok(vcpu)
    }

    fn try_reset(&mut self) -> Result<(), StateError> {
        self.half_done = false;
        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        if self.id == 0 {
            self.shared.apics.reset();
        }
        self.power_on.restore(&self.fd)
    }

    /// Gives the processor an interrupt of the 8259 pair, or asks to be told when it takes one.
    fn offer_interrupt(&mut self, io: &mut dyn VcpuIo) -> Result<(), RunEnd> {
        let waits = io.interrupts().maskable;
        let run = self.fd.get_kvm_run();
        if !waits {
            run.request_interrupt_window = 0;
            return Ok(());
        }
        if run.ready_for_interrupt_injection == 0 {
            run.request_interrupt_window = 1;
            return Ok(());
        }
        // One at a time: the next has to ask again.
        run.ready_for_interrupt_injection = 0;
        run.request_interrupt_window = 1;
        if let Some(vector) = io.acknowledge() {
            ioctl::interrupt(&self.fd, vector)
                .map_err(|error| RunEnd::Failed(format!("KVM_INTERRUPT: {error}")))?;
            self.stats.interrupts += 1;
        }
        Ok(())
    }

    fn count(&mut self, exit: &'static str) {
        *self.stats.exits.entry(exit).or_default() += 1;
    }

    /// Deals with an exit.
    fn exit(&mut self, exit: Exit, io: &mut dyn VcpuIo) -> Next {
        self.count(run::name(&exit));
        match exit {
            Exit::Port { port, write, width, count, offset } => {
                self.half_done = true;
                self.port(port, write, width, count, offset, io)
            }
            Exit::Memory { gpa, write, width, data } => {
                self.half_done = true;
                self.stats.memory_io += 1;
                if write {
                    return write_pieces(io, gpa, width, data).into();
                }
                let value = read_pieces(io, gpa, width);
                run::set_memory_data(&mut self.fd, value);
                Next::Go
            }
            Exit::EndOfInterrupt(vector) => {
                // Kernels tell this whether or not the guest has suppressed the broadcast (SDM vol. 3A §11.8.5).
                if !state::suppresses_eoi_broadcast(&self.fd) {
                    io.end_of_interrupt(vector);
                }
                Next::Go
            }
            Exit::DirtyRingFull => match self.shared.dirty.harvest() {
                Ok(()) => Next::Go,
                Err(error) => Next::End(RunEnd::Failed(error.to_string())),
            },
            Exit::InterruptWindow | Exit::Interrupted => Next::Go,
            // The kernel waits by itself. Should it not, the next KVM_RUN does.
            Exit::Halt => Next::Go,
            Exit::Shutdown => Next::End(RunEnd::TripleFault),
            Exit::InternalError(suberror) => {
                let step = self.finisher.finish(&self.fd, &self.shared, suberror, io);
                match step {
                    Ok(flow) => {
                        self.stats.emulated += 1;
                        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
                        flow.into()
                    }
                    Err(end) => Next::End(end),
                }
            }
            Exit::FailedEntry(reason, cpu) => Next::End(RunEnd::Failed(format!(
                "host processor {cpu} refused to enter the guest, reason {reason:#x}"
            ))),
            Exit::SystemEvent(kind) => Next::End(RunEnd::Failed(format!("KVM reports system event {kind}"))),
            Exit::Other(reason) => {
                Next::End(RunEnd::Failed(format!("KVM stopped for the unknown reason {reason}")))
            }
        }
    }

    fn port(
        &mut self,
        port: u16,
        write: bool,
        width: u8,
        count: u32,
        offset: u64,
        io: &mut dyn VcpuIo,
    ) -> Next {
        let size = usize::from(width.clamp(1, 4));
        let data = run::port_data(&mut self.fd, offset, size * count as usize, self.run_size);
        let mut next = Next::Go;
        for item in data.chunks_exact_mut(size) {
            self.stats.port_io += 1;
            if write {
                let mut bytes = [0; 4];
                bytes[..size].copy_from_slice(item);
                if io.port_write(port, size as u8, u32::from_le_bytes(bytes)) == IoFlow::Leave {
                    next = Next::Leave;
                }
            } else {
                item.copy_from_slice(&io.port_read(port, size as u8).to_le_bytes()[..size]);
            }
        }
        next
    }

    /// Ends an instruction that waits for our answer, so that the state is that of an instruction boundary.
    fn settle(&mut self, stay: &Stay<'_>, io: &mut dyn VcpuIo) -> Option<RunEnd> {
        while self.half_done {
            self.half_done = false;
            stay.finish_only();
            match self.fd.run().map(drop) {
                Ok(()) => {
                    let exit = run::exit(&mut self.fd);
                    if let Next::End(end) = self.exit(exit, io) {
                        return Some(end);
                    }
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => return Some(self.broken(error)),
            }
        }
        None
    }

    fn broken(&self, error: kvm_ioctls::Error) -> RunEnd {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let error = std::io::Error::from(error);
        RunEnd::Failed(format!("vCPU {}: KVM_RUN at {rip:#x}: {error}", self.id))
    }

    /// Whether only others can get this vCPU going again. Looks at the kernel's state: not for every exit.
    fn stands_still(&mut self) -> Result<bool, StateError> {
        use skep_hv::state::Activity;
        let groups = StateGroups { events: true, ..StateGroups::default() };
        let interrupts = self.fd.get_kvm_run().if_flag != 0;
        let state = state::get(&self.fd, groups, &self.shared.shape)?;
        let Some(events) = state.events else { return Ok(false) };
        Ok(match events.activity {
            Activity::Halted => !interrupts && !events.nmi_pending,
            Activity::WaitForSipi => true,
            Activity::Running | Activity::Shutdown => false,
        })
    }

    /// Whether it has gone on and halted since this was last asked, where the kernel tells.
    fn has_halted_again(&mut self) -> bool {
        let halts = self.statistics.as_ref().and_then(Statistics::halts);
        std::mem::replace(&mut self.halts, halts) != halts
    }

    fn guest(&mut self, stay: &Stay<'_>, io: &mut dyn VcpuIo) -> RunEnd {
        loop {
            let notes = stay.enter();
            if notes & note::KICK != 0 {
                stay.leave();
                return self.settle(stay, io).unwrap_or(RunEnd::Kicked);
            }
            if let Err(end) = self.offer_interrupt(io) {
                return end;
            }
            self.half_done = false;
            let result = self.fd.run().map(drop);
            stay.leave();
            let next = match result {
                Ok(()) => {
                    self.shared.all_still(self.id, false);
                    let exit = run::exit(&mut self.fd);
                    self.exit(exit, io)
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.count(run::name(&Exit::Interrupted));
                    let still = self.stands_still().unwrap_or(false) && !self.has_halted_again();
                    if self.shared.all_still(self.id, still) { Next::End(RunEnd::Halted) } else { Next::Go }
                }
                Err(error) => Next::End(self.broken(error)),
            };
            match next {
                Next::Go => {}
                Next::Leave => return self.settle(stay, io).unwrap_or(RunEnd::Kicked),
                Next::End(end) => return end,
            }
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd {
        let kicker = self.shared.kickers[self.id as usize].clone();
        let stay = match Stay::begin(&kicker, &mut self.fd) {
            Ok(stay) => stay,
            Err(error) => return RunEnd::Failed(format!("the signal that stops vCPUs: {error}")),
        };
        if self.tick.is_none() {
            self.tick = Tick::new().ok();
        }
        let interval = if self.shared.options.exits.hlt { LOOK } else { Duration::ZERO };
        self.tick.iter().for_each(|tick| tick.every(interval));
        let end = self.guest(&stay, io);
        self.tick.iter().for_each(|tick| tick.every(Duration::ZERO));
        end
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.shared.kickers[self.id as usize].clone()
    }

    fn get_state(&mut self, groups: StateGroups) -> Result<CpuState, StateError> {
        state::get(&self.fd, groups, &self.shared.shape)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        state::set(&self.fd, state, &self.shared.shape)
    }

    fn reset(&mut self) {
        // Every value was read from this vCPU: nothing that could be refused.
        let _ = self.try_reset();
    }

    fn stats(&self) -> VcpuStats {
        let kernel = self.statistics.as_ref().map(Statistics::read).unwrap_or_default();
        let counter = |name: &str| kernel.get(name).copied().unwrap_or(0);
        VcpuStats {
            halts: counter("halt_exits"),
            interrupts: self.stats.interrupts.max(counter("irq_injections")),
            kernel,
            ..self.stats.clone()
        }
    }
}

/// The table as the kernel takes it, for the processor with this APIC ID. The kernel itself fills in what changes while the
/// guest runs (OSXSAVE, the XSAVE area's size).
fn entries(table: &CpuidTable, apic_id: u32) -> Result<CpuId, HvError> {
    let table = table.on_processor(apic_id);
    let indexed = |function: u32| {
        matches!(
            function,
            4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1d | 0x1e | 0x1f | 0x8000_001d
        )
    };
    let entries: Vec<_> = table
        .iter()
        .map(|(function, index, leaf)| kvm_cpuid_entry2 {
            function,
            index,
            flags: if indexed(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| HvError::Invalid(format!("CPUID of {} leaves: KVM takes fewer", entries.len())))
}

/// The naturally aligned pieces of an access: address, offset in bytes, width.
fn pieces(gpa: u64, width: u8) -> impl Iterator<Item = (u64, u8, u8)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = width - done;
        let at = gpa.wrapping_add(done.into());
        let piece = [8u8, 4, 2, 1]
            .into_iter()
            .find(|&size| size <= left && at.is_multiple_of(size.into()))
            .filter(|_| left > 0)?;
        let offset = done;
        done += piece;
        Some((at, offset, piece))
    })
}

fn read_pieces(io: &mut dyn VcpuIo, gpa: u64, width: u8) -> u64 {
    pieces(gpa, width.min(8))
        .fold(0, |value, (at, offset, width)| value | io.memory_read(at, width) << (offset * 8))
}

fn write_pieces(io: &mut dyn VcpuIo, gpa: u64, width: u8, data: u64) -> IoFlow {
    pieces(gpa, width.min(8)).fold(IoFlow::Continue, |flow, (at, offset, width)| {
        let value = data >> (offset * 8) & (u64::MAX >> (64 - 8 * u32::from(width)));
        match io.memory_write(at, width, value) {
            IoFlow::Leave => IoFlow::Leave,
            IoFlow::Continue => flow,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_complete() {
        let split = |gpa, width| pieces(gpa, width).map(|(at, _, width)| (at, width)).collect::<Vec<_>>();
        assert_eq!(split(0x1000, 8), [(0x1000, 8)]);
        assert_eq!(split(0x1001, 4), [(0x1001, 1), (0x1002, 2), (0x1004, 1)]);
        assert_eq!(split(0x1004, 8), [(0x1004, 4), (0x1008, 4)]);
        assert_eq!(split(0x1ffd, 3), [(0x1ffd, 1), (0x1ffe, 2)]);
        assert_eq!(split(u64::MAX, 2), [(u64::MAX, 1), (0, 1)]);
        assert_eq!(split(0, 0), []);
    }
}
