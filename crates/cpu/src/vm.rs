//! What the machine sees: the hypervisor contract on the software CPU, and how its vCPUs reach one another.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, StateError, StateGroups};
use skep_hv::{
    HvError, Hypervisor, Kick, Probe, RunEnd, Vcpu, VcpuIo, VcpuStats, Vm, VmOptions, monotonic_ns,
};
use skep_memory::{CodeListener, GuestMemory};

use crate::alarm::Alarm;
use crate::cpu::Cpu;
use crate::mmu::Frame;
use crate::system;

/// Bits of [`Mailbox::attention`].
pub(crate) mod mail {
    /// Leave the guest.
    pub(crate) const KICK: u32 = 1 << 0;
    /// The local APIC has something.
    pub(crate) const WAKE: u32 = 1 << 1;
    /// Forget cached permissions to write.
    pub(crate) const FLUSH: u32 = 1 << 2;
    /// Somebody must be alone for a moment.
    pub(crate) const STAND_STILL: u32 = 1 << 3;
    /// Decoded code was overwritten, as [`skep_memory::GuestMemory::epoch`] says; this only ends loops that look nowhere else.
    pub(crate) const CODE: u32 = 1 << 4;
    /// What a sleeper need not wake for: it sees to it before it executes anything again.
    pub(crate) const QUIET: u32 = FLUSH | STAND_STILL | CODE;
}

/// Pages in a mailbox before all are meant.
const NAMED: usize = 16;

/// Pages that cached permissions to write must be forgotten for.
enum Forget {
    These(Vec<Frame>),
    All,
}

/// Where other threads leave word for one vCPU.
pub(crate) struct Mailbox {
    /// What waits; looked at between blocks.
    pub(crate) attention: AtomicU32,
    /// The vCPU executes guest instructions, or may begin to.
    pub(crate) in_guest: AtomicBool,
    /// What this vCPU's guest has added to the VM's TSC.
    tsc_offset: AtomicU64,
    /// The last flush that was answered.
    flushed: AtomicU64,
    /// What the next one is about. Filled before the flush gets its number.
    forget: Mutex<Forget>,
    sleeping: Mutex<bool>,
    bell: Condvar,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Self {
            attention: AtomicU32::new(0),
            in_guest: AtomicBool::new(false),
            tsc_offset: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            forget: Mutex::new(Forget::These(Vec::new())),
            sleeping: Mutex::new(false),
            bell: Condvar::new(),
        }
    }

    /// Shows the machine what the guest has added to this vCPU's TSC.
    pub(crate) fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, Ordering::Relaxed);
    }

    /// Says what the next flush is about: these pages, or all.
    fn ask_to_forget(&self, pages: Option<&[Frame]>) {
        let mut forget = self.forget.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *forget, pages) {
            (Forget::These(named), Some(pages)) if named.len() + pages.len() <= NAMED => {
                named.extend_from_slice(pages);
            }
            _ => *forget = Forget::All,
        }
    }

    fn post(&self, bits: u32) {
        self.attention.fetch_or(bits, Ordering::SeqCst);
        if bits & !mail::QUIET != 0 && *self.sleeping.lock().unwrap_or_else(PoisonError::into_inner) {
            self.bell.notify_all();
        }
    }

    /// Sleeps until there is mail or `deadline` (monotonic ns).
    pub(crate) fn wait(&self, deadline: u64) {
        let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        *sleeping = true;
        while self.attention.load(Ordering::SeqCst) & !mail::QUIET == 0 {
            let now = monotonic_ns();
            if now >= deadline {
                break;
            }
            sleeping = if deadline == u64::MAX {
                self.bell.wait(sleeping).unwrap_or_else(PoisonError::into_inner)
            } else {
                let nap = Duration::from_nanos(deadline - now);
                self.bell.wait_timeout(sleeping, nap).unwrap_or_else(PoisonError::into_inner).0
            };
        }
        *sleeping = false;
    }
}

impl Kick for Mailbox {
    fn kick(&self) {
        self.post(mail::KICK);
    }
    fn wake(&self) {
        self.post(mail::WAKE);
    }
}

/// What executes guest instructions.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The JIT; the interpreter for what is not worth a translation or has none.
    #[default]
    Jit,
    /// The interpreter alone.
    Interpreter,
    /// Both, block by block, for diagnosis: what the JIT makes of a block is compared with what the interpreter does. It
    /// takes exactly one vCPU, because another one would change memory in between.
    Lockstep,
}

/// What all vCPUs of a VM share.
pub(crate) struct Shared {
    /// What executes guest instructions.
    pub(crate) engine: Engine,
    /// What CPUID shows.
    pub(crate) cpuid: CpuidTable,
    /// Guest TSC frequency in Hz.
    pub(crate) tsc_hz: u64,
    /// vCPUs execute code that looks at no clock: [`Shared::alarm`] must know their deadlines.
    pub(crate) uses_alarm: bool,
    /// Posts [`mail::WAKE`] at a vCPU's deadline.
    pub(crate) alarm: Alarm,
    mailboxes: Arc<[Arc<Mailbox>]>,
    /// Posts [`mail::CODE`]; guest memory has a weak reference.
    code_listener: Arc<CodeListener>,
    flushes: AtomicU64,
    /// vCPUs that are about to make a page watched and may not have told the others.
    pub(crate) watching: AtomicU32,
    alone: AtomicBool,
}

impl Shared {
    /// For vCPUs that the interpreter runs.
    pub(crate) fn new(options: VmOptions) -> Arc<Self> {
        Self::with_engine(options, Engine::Interpreter)
    }

    pub(crate) fn with_engine(options: VmOptions, engine: Engine) -> Arc<Self> {
        let mailboxes: Arc<[_]> = (0..options.vcpus).map(|_| Arc::new(Mailbox::new())).collect();
        let listening = mailboxes.clone();
        let code_listener =
            Arc::new(move || listening.iter().for_each(|m: &Arc<Mailbox>| m.post(mail::CODE)));
        let tsc_hz = options.tsc_hz.unwrap_or_else(system::host_tsc_hz);
        Arc::new(Self {
            engine,
            cpuid: options.cpuid,
            tsc_hz,
            uses_alarm: engine == Engine::Jit,
            alarm: Alarm::new(mailboxes.clone()),
            mailboxes,
            code_listener,
            flushes: AtomicU64::new(0),
            watching: AtomicU32::new(0),
            alone: AtomicBool::new(false),
        })
    }

    /// Asks every vCPU but `except` to forget cached write permissions to these pages (or all), and waits until none can
    /// use one any more.
    fn flush_others(&self, except: Option<u32>, pages: Option<&[Frame]>) {
        if self.mailboxes.len() == 1 && except.is_some() {
            return;
        }
        let others =
            || self.mailboxes.iter().enumerate().filter(|&(i, _)| Some(i as u32) != except).map(|(_, m)| m);
        // Whoever answers to our number must find the pages.
        for mailbox in others() {
            mailbox.ask_to_forget(pages);
        }
        let number = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        for mailbox in others() {
            mailbox.post(mail::FLUSH);
        }
        for mailbox in others() {
            wait_until(|| {
                !mailbox.in_guest.load(Ordering::SeqCst) || mailbox.flushed.load(Ordering::SeqCst) >= number
            });
        }
    }
}

/// Waits for another thread that needs less than a block's time if it runs, and a time slice if it does not.
fn wait_until(done: impl Fn() -> bool) {
    let mut spins = 0u32;
    while !done() {
        spins += 1;
        if spins < 200 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// While it lives, no other vCPU of the VM executes anything.
pub(crate) struct Alone(Arc<Shared>);

impl Drop for Alone {
    fn drop(&mut self) {
        self.0.alone.store(false, Ordering::SeqCst);
    }
}

impl Cpu {
    /// Announces that guest instructions may be executed; waits while somebody must be alone.
    pub(crate) fn enter_guest(&mut self) {
        loop {
            self.mailbox.in_guest.store(true, Ordering::SeqCst);
            if !self.shared.alone.load(Ordering::SeqCst) {
                break;
            }
            self.mailbox.in_guest.store(false, Ordering::SeqCst);
            wait_until(|| !self.shared.alone.load(Ordering::SeqCst));
        }
        // A flush that was asked for while we were out counted us as done.
        if self.mailbox.attention.load(Ordering::SeqCst) & mail::FLUSH != 0 {
            self.answer_flush();
        }
    }

    /// Forgets cached write permissions and says so.
    pub(crate) fn answer_flush(&mut self) {
        self.mailbox.attention.fetch_and(!mail::FLUSH, Ordering::SeqCst);
        let number = self.shared.flushes.load(Ordering::SeqCst);
        let nothing = Forget::These(Vec::new());
        let forget = std::mem::replace(
            &mut *self.mailbox.forget.lock().unwrap_or_else(PoisonError::into_inner),
            nothing,
        );
        match forget {
            Forget::These(pages) => pages.into_iter().for_each(|page| self.tlb.forget_writes_to(page)),
            Forget::All => self.tlb.forget_writes(),
        }
        self.mailbox.flushed.fetch_max(number, Ordering::SeqCst);
    }

    /// Makes every vCPU of the VM forget cached write permissions to these pages: they have become watched.
    pub(crate) fn everyone_forgets_writes(&mut self, pages: [Frame; 2]) {
        self.tlb.forget_writes_to(pages[0]);
        if pages[1] != pages[0] {
            self.tlb.forget_writes_to(pages[1]);
        }
        let was_in = self.mailbox.in_guest.swap(false, Ordering::SeqCst);
        let asked = if pages[1] == pages[0] { &pages[..1] } else { &pages[..] };
        self.shared.flush_others(Some(self.id), Some(asked));
        if was_in {
            self.enter_guest();
        }
    }

    /// Brings every other vCPU to a stop between two blocks.
    pub(crate) fn stand_alone(&mut self) -> Alone {
        let was_in = self.mailbox.in_guest.swap(false, Ordering::SeqCst);
        wait_until(|| {
            self.shared.alone.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        });
        for (i, mailbox) in self.shared.mailboxes.iter().enumerate() {
            if i as u32 != self.id {
                mailbox.post(mail::STAND_STILL);
                wait_until(|| !mailbox.in_guest.load(Ordering::SeqCst));
            }
        }
        self.mailbox.in_guest.store(was_in, Ordering::SeqCst);
        Alone(self.shared.clone())
    }
}

/// The software CPU as a hypervisor: available on every x86-64 host.
#[derive(Debug, Default, Clone, Copy)]
pub struct Software {
    engine: Engine,
}

impl Software {
    /// The back end with its default engine.
    pub fn new() -> Self {
        Self::default()
    }

    /// The back end with this engine.
    pub fn with_engine(engine: Engine) -> Self {
        Self { engine }
    }
}

impl Hypervisor for Software {
    fn probe(&self) -> Probe {
        let available = cfg!(target_arch = "x86_64");
        let reason = if available { "runs on every x86-64 host" } else { "needs an x86-64 host" };
        Probe { name: "software", available, reason: reason.into() }
    }

    fn tsc_hz(&self) -> u64 {
        system::host_tsc_hz()
    }

    fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError> {
        if options.vcpus == 0 || options.vcpus > 255 {
            return Err(HvError::Invalid(format!("{} vCPUs; a VM has 1 to 255", options.vcpus)));
        }
        let shared = Shared::with_engine(options, self.engine);
        if shared.engine == Engine::Lockstep && shared.mailboxes.len() != 1 {
            let vcpus = shared.mailboxes.len();
            return Err(HvError::Invalid(format!("{vcpus} vCPUs; lockstep takes exactly one")));
        }
        let clock = system::Tsc::new(shared.tsc_hz);
        memory.on_code_change(Arc::downgrade(&shared.code_listener));
        Ok(Arc::new(SoftwareVm { memory, shared, clock }))
    }
}

struct SoftwareVm {
    memory: GuestMemory,
    shared: Arc<Shared>,
    clock: system::Tsc,
}

impl Vm for SoftwareVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, HvError> {
        let mailbox = self.shared.mailboxes.get(id as usize);
        let mailbox = mailbox
            .ok_or_else(|| HvError::Invalid(format!("vCPU {id} of {}", self.shared.mailboxes.len())))?;
        let mut cpu =
            Cpu::new(id, self.memory.clone(), self.shared.clone(), mailbox.clone(), self.clock.clone())?;
        if self.shared.engine != Engine::Interpreter {
            let mut jit = crate::jit::Jit::new()
                .map_err(|source| HvError::Os { what: "executable memory for the software CPU", source })?;
            if self.shared.engine == Engine::Lockstep {
                jit.set_lockstep();
                cpu.lockstep = Some(Box::default());
            }
            cpu.jit = Some(Box::new(jit));
        }
        Ok(Box::new(SoftwareVcpu { cpu }))
    }

    fn memory_changed(&self) -> Result<(), HvError> {
        Ok(())
    }

    fn sync_dirty_log(&self) -> Result<(), HvError> {
        self.shared.flush_others(None, None);
        Ok(())
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.tsc_hz
    }

    fn tsc(&self, vcpu: u32) -> u64 {
        let offset =
            self.shared.mailboxes.get(vcpu as usize).map_or(0, |m| m.tsc_offset.load(Ordering::Relaxed));
        self.clock.now().wrapping_add(offset)
    }
}

struct SoftwareVcpu {
    cpu: Box<Cpu>,
}

impl Vcpu for SoftwareVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd {
        self.cpu.run(io)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.cpu.mailbox.clone()
    }

    fn get_state(&mut self, groups: StateGroups) -> Result<CpuState, StateError> {
        self.cpu.get_state(groups)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.cpu.set_state(state)
    }

    fn reset(&mut self) {
        self.cpu.power_on_reset();
    }

    fn stats(&self) -> VcpuStats {
        let mut stats = self.cpu.stats.clone();
        if let Some(lockstep) = &self.cpu.lockstep {
            stats.translations.compared = lockstep.tally();
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use skep_memory::{HostPage, RegionKind, RegionSpec};

    use super::*;
    use crate::mmu::{Context, Found};

    const PAGE: u64 = 4096;
    const PAGES: usize = 32;

    fn processors() -> [Box<Cpu>; 2] {
        let ram = RegionSpec { start: 0, size: PAGES as u64 * PAGE, kind: RegionKind::Ram };
        let memory = GuestMemory::new(&[ram]).unwrap();
        let shared = Shared::new(VmOptions { vcpus: 2, tsc_hz: Some(1_000_000_000), ..VmOptions::default() });
        [0, 1].map(|id: u32| {
            let tsc = system::Tsc::new(1_000_000_000);
            let mailbox = shared.mailboxes[id as usize].clone();
            Cpu::new(id, memory.clone(), shared.clone(), mailbox, tsc).unwrap()
        })
    }

    fn page(cpu: &Cpu, at: usize) -> HostPage {
        cpu.memory.page(at as u64 * PAGE).unwrap()
    }

    fn frame(cpu: &Cpu, at: usize) -> Frame {
        let page = page(cpu, at);
        Frame { host: page.host.as_ptr() as u64, index: page.index }
    }

    fn fill(cpu: &mut Cpu, at: usize) {
        let found = Found { gpa: 0, page: page(cpu, at), free: true, shift: 12 };
        cpu.tlb.select(Context::Kernel);
        cpu.tlb.fill(Context::Kernel, at as u64 * PAGE, found, false);
    }

    fn writable(cpu: &Cpu) -> Vec<usize> {
        (0..PAGES).filter(|&at| cpu.tlb.write(at as u64 * PAGE, 8).is_some()).collect()
    }

    #[test]
    fn a_flush_is_about_the_pages_it_names() {
        let [mut a, mut b] = processors();
        (0..PAGES).for_each(|at| fill(&mut b, at));
        let (three, five) = (frame(&a, 3), frame(&a, 5));
        a.everyone_forgets_writes([three, five]);
        assert_eq!(writable(&b).len(), PAGES, "it is not in the guest and has not answered");
        b.enter_guest();
        let others = |at: &usize| ![3, 5].contains(at);
        assert_eq!(writable(&b), (0..PAGES).filter(others).collect::<Vec<_>>());
        // More pages than a mailbox names: all.
        b.mailbox.in_guest.store(false, Ordering::SeqCst);
        for at in 6..6 + NAMED + 1 {
            let page = frame(&a, at);
            a.everyone_forgets_writes([page, page]);
        }
        b.enter_guest();
        assert!(writable(&b).is_empty());
        fill(&mut b, 9);
        b.mailbox.in_guest.store(false, Ordering::SeqCst);
        b.shared.clone().flush_others(None, None);
        b.enter_guest();
        assert!(writable(&b).is_empty(), "the dirty log was taken");
    }

    #[test]
    fn a_change_of_code_is_told_to_all_and_wakes_nobody() {
        let [a, b] = processors();
        a.memory.on_code_change(Arc::downgrade(&a.shared.code_listener));
        let sleeper = b.mailbox.clone();
        let asleep = std::thread::spawn(move || sleeper.wait(u64::MAX));
        while !*b.mailbox.sleeping.lock().unwrap() {
            std::thread::yield_now();
        }
        a.memory.watch(0).store(1, Ordering::SeqCst);
        a.memory.write_u8(0, 1).unwrap();
        for cpu in [&a, &b] {
            assert_eq!(cpu.mailbox.attention.load(Ordering::SeqCst), mail::CODE);
        }
        std::thread::sleep(Duration::from_millis(5));
        assert!(!asleep.is_finished());
        b.mailbox.wake();
        asleep.join().unwrap();
        let (memory, shared) = (a.memory.clone(), Arc::downgrade(&a.shared));
        drop((a, b));
        assert!(shared.upgrade().is_none());
        memory.watch(0).store(1, Ordering::SeqCst);
        memory.write_u8(0, 1).unwrap();
    }

    #[test]
    fn nobody_writes_to_a_page_once_all_were_asked_to_forget_it() {
        let [mut a, mut b] = processors();
        let closed: Arc<Vec<AtomicBool>> = Arc::new((0..PAGES).map(|_| AtomicBool::new(false)).collect());
        let over = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (seen, end, counted) = (closed.clone(), over.clone(), writes.clone());
        let other = std::thread::spawn(move || {
            b.enter_guest();
            for at in (0..PAGES).cycle() {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                // One block: it may write where the page is cached, or fill it if it is not watched.
                let shut = seen[at].load(Ordering::SeqCst);
                if b.tlb.write(at as u64 * PAGE, 8).is_some() {
                    assert!(!shut, "page {at} is watched");
                    counted.fetch_add(1, Ordering::Relaxed);
                } else if b.memory.watch(at).load(Ordering::SeqCst) == 0 {
                    fill(&mut b, at);
                }
                if b.mailbox.attention.load(Ordering::Relaxed) & mail::FLUSH != 0 {
                    b.answer_flush();
                }
                if at == 7 {
                    b.mailbox.in_guest.store(false, Ordering::SeqCst);
                    b.enter_guest();
                }
            }
            b.mailbox.in_guest.store(false, Ordering::SeqCst);
        });
        let mut round = 0;
        while round < 20_000 || writes.load(Ordering::Relaxed) < 1000 {
            round += 1;
            if other.is_finished() {
                break;
            }
            let at = round * 7 % PAGES;
            a.memory.watch(at).store(1, Ordering::SeqCst);
            let page = frame(&a, at);
            a.everyone_forgets_writes([page, page]);
            closed[at].store(true, Ordering::SeqCst);
            std::hint::spin_loop();
            closed[at].store(false, Ordering::SeqCst);
            a.memory.watch(at).store(0, Ordering::SeqCst);
        }
        over.store(true, Ordering::SeqCst);
        other.join().unwrap();
    }

    #[test]
    fn lockstep_takes_one_vcpu() {
        for (vcpus, taken) in [(1, true), (2, false)] {
            let ram = RegionSpec { start: 0, size: 0x1000, kind: RegionKind::Ram };
            let memory = GuestMemory::new(&[ram]).unwrap();
            let options = VmOptions { vcpus, tsc_hz: Some(1_000_000_000), ..VmOptions::default() };
            let vm = Software::with_engine(Engine::Lockstep).create_vm(memory, options);
            assert_eq!(vm.is_ok(), taken);
        }
    }
}
