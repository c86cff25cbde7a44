//! vCPU threads: each owns one vCPU and what it sees of the machine, takes orders from the owner thread, and reports.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use skep_chipset::{Effect, LocalApics, Space};
use skep_hv::state::{CpuState, StateError, StateGroups};
use skep_hv::{IoFlow, Kick, Pending, RunEnd, Startup, Vcpu, VcpuIo, VcpuStats, monotonic_ns};

use crate::board::Board;
use crate::bus::{Outcome, lock};
use crate::error::Error;
use crate::host::affinity;
use crate::machine::{Message, panic_text};

/// After what time a halted processor whose local APIC is out of sight is run again, to see whether it is still halted.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How many instructions executed for the back end are told one by one.
const EMULATED_TOLD: u64 = 16;

/// What the owner thread asks of a vCPU thread. Orders are followed in turn, between runs.
pub(crate) enum Order {
    /// Run the guest.
    Run,
    /// Do not; answered by [`Report::Parked`].
    Stop,
    /// Something may have ended the halt that the vCPU is in.
    Look,
    /// Power-on state, then this one where there is one.
    Reset(Option<Box<CpuState>>),
    /// The named groups of state, please.
    Get(StateGroups, Sender<Result<CpuState, StateError>>),
    /// Take on this state.
    Set(Box<CpuState>, Sender<Result<(), StateError>>),
    /// Counters, please.
    Stats(Sender<VcpuStats>),
    /// End the thread.
    Quit,
}

/// What a vCPU thread tells the owner thread.
#[derive(Debug)]
pub(crate) enum Report {
    /// It has stopped as ordered.
    Parked,
    /// It halted for good; see [`Status::halted`].
    Halted,
    /// It cannot go on.
    Ended(RunEnd),
    /// A write of the guest's asks something of the whole machine. The vCPU stands still.
    Effect(Outcome),
    /// The software CPU has executed an instruction for the back end; it goes on.
    Emulated { rip: u64, bytes: Vec<u8>, count: u64 },
}

/// What a processor is waiting for, as others may see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Activity {
    Running,
    WaitForSipi,
    Halted,
}

/// A vCPU's activity, shared between its thread, its APIC's wake and the owner thread.
pub(crate) struct Status(AtomicU8);

impl Status {
    fn set(&self, activity: Activity) {
        self.0.store(activity as u8, Ordering::SeqCst);
    }

    fn is(&self, activity: Activity) -> bool {
        self.0.load(Ordering::SeqCst) == activity as u8
    }

    /// It executes nothing and will not until another vCPU sends it an NMI, INIT or start-up.
    pub(crate) fn idle(&self) -> bool {
        !self.is(Activity::Running)
    }

    /// After power-on or INIT: the bootstrap processor runs, the others wait. Those of a back end with APICs of its own
    /// wait inside of it, and count as running.
    fn reset(&self, id: u32, board: &Board) {
        let runs = id == 0 || board.apics.machine().is_none();
        self.set(if runs { Activity::Running } else { Activity::WaitForSipi });
    }
}

/// The wake that a vCPU's APIC is given: also gets a vCPU that has reported a halt for good to look again.
struct Waker {
    kick: Arc<dyn Kick>,
    status: Arc<Status>,
    orders: Mutex<Sender<Order>>,
    looking: Arc<AtomicBool>,
}

impl Kick for Waker {
    fn kick(&self) {
        self.kick.kick();
    }

    fn wake(&self) {
        self.kick.wake();
        if self.status.is(Activity::Halted) && !self.looking.swap(true, Ordering::SeqCst) {
            // A thread that is gone needs no wake.
            let _ = lock(&self.orders).send(Order::Look);
        }
    }
}

/// The owner thread's hold on a vCPU thread.
pub(crate) struct VcpuThread {
    orders: Sender<Order>,
    kick: Arc<dyn Kick>,
    /// Its activity.
    pub(crate) status: Arc<Status>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `id`, which stands still until it is ordered to run. It runs on the host CPUs `cpus` alone,
    /// where there are some.
    pub(crate) fn spawn(
        id: u32,
        vcpu: Box<dyn Vcpu>,
        cpus: Option<Vec<u32>>,
        board: Arc<Board>,
        reports: Sender<Message>,
    ) -> Result<Self, Error> {
        let (orders, inbox) = channel();
        let status = Arc::new(Status(AtomicU8::new(0)));
        status.reset(id, &board);
        let kick = vcpu.kicker();
        let looking = Arc::new(AtomicBool::new(false));
        let waker = Waker {
            kick: kick.clone(),
            status: status.clone(),
            orders: Mutex::new(orders.clone()),
            looking: looking.clone(),
        };
        board.apics.attach_cpu(id, Arc::new(waker));
        let name = format!("skep-vcpu{id}");
        let view = View { id, board, status: status.clone(), reports, left: false, emulated: 0 };
        let body = Body { vcpu, view, inbox, looking, allowed: false, blocked: false };
        let (bound, binding) = channel();
        let pinned = cpus.is_some();
        let body = move || {
            let result = cpus.map_or(Ok(()), |cpus| affinity::bind(id, &cpus));
            let failed = result.is_err();
            // Nobody waits for a thread that is not bound.
            let _ = bound.send(result);
            if !failed {
                body.run();
            }
        };
        let thread =
            Builder::new().name(name.clone()).spawn(body).map_err(|source| Error::Thread { name, source })?;
        let spawned = Self { orders, kick, status, thread: Some(thread) };
        if pinned {
            binding.recv().unwrap_or(Err(Error::Destroyed))?;
        }
        Ok(spawned)
    }

    /// Gives an order, and makes a vCPU that is in the guest come out and look at it. A thread that has died
    /// has reported that already.
    pub(crate) fn order(&self, order: Order) {
        let _ = self.orders.send(order);
        self.kick.kick();
    }

    /// Gives an order to a thread whose vCPU is not in the guest.
    pub(crate) fn order_parked(&self, order: Order) {
        let _ = self.orders.send(order);
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.order(Order::Quit);
        if let Some(thread) = self.thread.take() {
            // Its panics are caught and reported inside.
            let _ = thread.join();
        }
    }
}

/// The thread's own half.
struct Body {
    vcpu: Box<dyn Vcpu>,
    view: View,
    inbox: Receiver<Order>,
    looking: Arc<AtomicBool>,
    /// The owner thread lets it run.
    allowed: bool,
    /// It has reported something that the owner thread must deal with, or halts for good.
    blocked: bool,
}

impl Body {
    fn run(mut self) {
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.follow())) {
            let text = panic_text(&*panic);
            self.blocked = true;
            self.view
                .report(Report::Ended(RunEnd::Failed(format!("internal error, please report it: {text}"))));
        }
    }

    /// Follows orders until told to quit.
    fn follow(&mut self) {
        loop {
            let order = if self.allowed && !self.blocked {
                match self.inbox.try_recv() {
                    Ok(order) => Some(order),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                }
            } else {
                let order = if self.looks_again() {
                    self.inbox.recv_timeout(LOOK_AGAIN)
                } else {
                    self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
                };
                match order {
                    Ok(order) => Some(order),
                    Err(RecvTimeoutError::Timeout) => {
                        self.blocked = false;
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            };
            match order {
                None => self.enter(),
                Some(Order::Run) => (self.allowed, self.blocked) = (true, false),
                Some(Order::Stop) => {
                    self.allowed = false;
                    self.view.report(Report::Parked);
                }
                Some(Order::Look) => {
                    self.looking.store(false, Ordering::SeqCst);
                    if self.view.status.is(Activity::Halted) && self.view.left_by_halt() {
                        self.blocked = false;
                    }
                }
                Some(Order::Reset(state)) => self.reset(state.as_deref()),
                Some(Order::Get(groups, reply)) => {
                    let _ = reply.send(self.vcpu.get_state(groups));
                }
                Some(Order::Set(state, reply)) => {
                    let _ = reply.send(self.vcpu.set_state(&state));
                }
                Some(Order::Stats(reply)) => {
                    let _ = reply.send(self.vcpu.stats());
                }
                Some(Order::Quit) => return,
            }
        }
    }

    /// A processor that has halted for good, and whose local APIC is the back end's, is not woken by anybody outside.
    fn looks_again(&self) -> bool {
        self.allowed && self.view.status.is(Activity::Halted) && self.view.apics().is_none()
    }

    fn reset(&mut self, state: Option<&CpuState>) {
        self.vcpu.reset();
        self.view.status.reset(self.view.id, &self.view.board);
        if let Some(error) = state.and_then(|state| self.vcpu.set_state(state).err()) {
            let text = format!("the boot state was refused: {error}");
            self.view.report(Report::Ended(RunEnd::Failed(text)));
        }
    }

    /// Runs the guest once.
    fn enter(&mut self) {
        self.view.left = false;
        if self.view.status.is(Activity::Halted) {
            self.view.status.set(Activity::Running);
        }
        let end = self.vcpu.run(&mut self.view);
        match end {
            // After an effect, the owner thread decides; else there is an order to look at.
            RunEnd::Kicked => self.blocked = self.view.left,
            RunEnd::Halted => {
                self.view.status.set(Activity::Halted);
                // What came between the vCPU's last look and this store has woken nobody.
                self.blocked = !self.view.left_by_halt();
                if self.blocked {
                    self.view.report(Report::Halted);
                }
            }
            end => {
                self.blocked = true;
                self.view.report(Report::Ended(end));
            }
        }
    }
}

/// The machine as one vCPU sees it.
struct View {
    id: u32,
    board: Arc<Board>,
    status: Arc<Status>,
    reports: Sender<Message>,
    /// An effect was reported during this run.
    left: bool,
    /// Instructions that the software CPU has executed for the back end.
    emulated: u64,
}

impl View {
    fn report(&self, report: Report) {
        // The owner thread outlives this one, but for a failed start.
        let _ = self.reports.send(Message::Report { vcpu: self.id, report });
    }

    fn flow(&mut self, outcome: Outcome) -> IoFlow {
        if outcome.effect == Effect::None {
            return IoFlow::Continue;
        }
        self.left = true;
        self.report(Report::Effect(outcome));
        IoFlow::Leave
    }

    /// Whether something waits that ends a halt with interrupts disabled.
    fn left_by_halt(&self) -> bool {
        let pending = self.board.apics.pending(self.id);
        pending.nmi || pending.startup
    }

    /// This processor's local APIC, where it is ours.
    fn apics(&self) -> Option<&LocalApics> {
        self.board.apics.machine().map(|apics| &**apics)
    }

    /// The offset in the page of our local APIC, if `gpa` is in it.
    fn apic_register(&self, gpa: u64) -> Option<(&LocalApics, u64)> {
        let apics = self.apics()?;
        Some((apics, apics.mmio_offset(self.id, gpa)?))
    }
}

impl VcpuIo for View {
    fn port_read(&mut self, port: u16, width: u8) -> u32 {
        self.board.bus.read(Space::Port, port.into(), width) as u32
    }

    fn port_write(&mut self, port: u16, width: u8, value: u32) -> IoFlow {
        let outcome = self.board.bus.write(Space::Port, port.into(), width, value.into());
        self.flow(outcome)
    }

    fn memory_read(&mut self, gpa: u64, width: u8) -> u64 {
        match self.apic_register(gpa) {
            Some((apics, offset)) => apics.mmio_read(self.id, offset, width, monotonic_ns()),
            None => self.board.bus.read(Space::Memory, gpa, width),
        }
    }

    fn memory_write(&mut self, gpa: u64, width: u8, value: u64) -> IoFlow {
        match self.apic_register(gpa) {
            Some((apics, offset)) => {
                apics.mmio_write(self.id, offset, width, value, monotonic_ns());
                IoFlow::Continue
            }
            None => {
                let outcome = self.board.bus.write(Space::Memory, gpa, width, value);
                self.flow(outcome)
            }
        }
    }

    fn interrupts(&mut self) -> Pending {
        self.board.apics.pending(self.id)
    }

    fn acknowledge(&mut self) -> Option<u8> {
        self.board.apics.acknowledge(self.id)
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.board.apics.end_of_interrupt(vector);
    }

    fn acknowledge_nmi(&mut self) {
        if let Some(apics) = self.apics() {
            apics.acknowledge_nmi(self.id);
        }
    }

    fn acknowledge_startup(&mut self) -> Option<Startup> {
        let startup = self.apics()?.acknowledge_startup(self.id);
        match startup {
            Some(Startup::Init) => self.status.reset(self.id, &self.board),
            Some(Startup::Sipi(_)) => self.status.set(Activity::Running),
            None => {}
        }
        startup
    }

    fn cr8(&mut self) -> u8 {
        self.apics().map_or(0, |apics| apics.cr8(self.id))
    }

    fn set_cr8(&mut self, value: u8) {
        if let Some(apics) = self.apics() {
            apics.set_cr8(self.id, value);
        }
    }

    fn apic_msr_read(&mut self, msr: u32) -> Option<u64> {
        self.apics()?.msr_read(self.id, msr, monotonic_ns())
    }

    fn apic_msr_write(&mut self, msr: u32, value: u64) -> Option<IoFlow> {
        self.apics()?.msr_write(self.id, msr, value, monotonic_ns()).map(|()| IoFlow::Continue)
    }

    fn emulated(&mut self, rip: u64, bytes: &[u8]) {
        self.emulated += 1;
        let count = self.emulated;
        if count <= EMULATED_TOLD || count.is_power_of_two() {
            self.report(Report::Emulated { rip, bytes: bytes.to_vec(), count });
        }
    }

    fn send_ipis(&mut self, icr: u64, targets: &mut dyn Iterator<Item = u32>) {
        if let Some(apics) = self.apics() {
            apics.send_ipis(icr, targets);
        }
    }
}
