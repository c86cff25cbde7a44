//! A vCPU in 64-bit mode with a few bytes of code, on every back end that there is.

use std::sync::Arc;

use skep_cpu::{Engine, Interpreter, Software};
use skep_hv::cpuid::{Model, PolicyOptions, Provider, policy};
use skep_hv::state::{CpuState, DescriptorTable, General, Segment, StateGroups};
use skep_hv::{Hypervisor, IoFlow, Pending, RunEnd, Startup, Vcpu, VcpuIo, Vm, VmOptions};
use skep_kvm::{Kvm, KvmOptions};
use skep_memory::{GuestMemory, RegionKind, RegionSpec};

/// Where the code is.
pub(crate) const CODE: u64 = 0x7000;
/// Page tables: identity for the first 2 MiB, and the last GiB below 4 GiB at its place and, sign-extended, at the top.
const TABLES: u64 = 0x1_0000;

/// What the guest has done, and what ends its run.
#[derive(Default)]
pub(crate) struct Io {
    /// Reads of memory without backing: address, width, value.
    pub reads: Vec<(u64, u8, u64)>,
    /// Writes.
    pub writes: Vec<(u64, u8, u64)>,
    /// 16-bit writes to port 0x90.
    pub words: Vec<u16>,
    /// How often [`VcpuIo::emulated`] was called.
    pub emulated: u64,
    stop: Option<u16>,
    inputs: u32,
}

impl VcpuIo for Io {
    fn port_read(&mut self, _port: u16, _width: u8) -> u32 {
        self.inputs += 1;
        self.inputs - 1
    }
    fn port_write(&mut self, port: u16, _width: u8, value: u32) -> IoFlow {
        if port == 0x90 {
            self.words.push(value as u16);
        }
        if self.stop == Some(port) { IoFlow::Leave } else { IoFlow::Continue }
    }
    /// Every byte is the low byte of its address.
    fn memory_read(&mut self, gpa: u64, width: u8) -> u64 {
        let value = (0..u64::from(width)).fold(0, |value, n| value | ((gpa + n) & 0xff) << (n * 8));
        self.reads.push((gpa, width, value));
        value
    }
    fn memory_write(&mut self, gpa: u64, width: u8, value: u64) -> IoFlow {
        self.writes.push((gpa, width, value));
        IoFlow::Continue
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
        0
    }
    fn set_cr8(&mut self, _value: u8) {}
    fn apic_msr_read(&mut self, _msr: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _msr: u32, _value: u64) -> Option<IoFlow> {
        None
    }
    fn send_ipis(&mut self, _icr: u64, _targets: &mut dyn Iterator<Item = u32>) {}
    fn emulated(&mut self, _rip: u64, _bytes: &[u8]) {
        self.emulated += 1;
    }
}

/// One vCPU.
pub(crate) struct Bed {
    pub name: &'static str,
    pub memory: GuestMemory,
    pub vcpu: Box<dyn Vcpu>,
    pub vm: Arc<dyn Vm>,
    pub io: Io,
}

/// One MiB of memory.
pub(crate) fn memory() -> GuestMemory {
    GuestMemory::new(&[RegionSpec { start: 0, size: 1 << 20, kind: RegionKind::Ram }]).unwrap()
}

/// The code on one back end.
pub(crate) fn bed(name: &'static str, hypervisor: &dyn Hypervisor, provider: Provider, code: &[u8]) -> Bed {
    let memory = memory();
    memory.write(CODE, code).unwrap();
    // Accessed and dirty, so that the processor does not write there.
    let entry = |at: u64, value: u64| memory.write_u64(TABLES + at, value | 0x60).unwrap();
    entry(0, (TABLES + 0x1000) | 3);
    entry(511 * 8, (TABLES + 0x1000) | 3);
    entry(0x1000, (TABLES + 0x2000) | 3);
    for high in [3, 511] {
        entry(0x1000 + high * 8, (TABLES + 0x3000) | 3);
    }
    entry(0x2000, 0x83);
    (0..512).for_each(|n| entry(0x3000 + n * 8, (3 << 30) + (n << 21) | 0x83));
    // The same on every back end and host.
    let options = PolicyOptions { provider, model: Model::X86_64V1, ..PolicyOptions::default() };
    let cpuid = policy(&hypervisor.cpuid().unwrap(), &options).unwrap();
    let options = VmOptions { cpuid, stepper: Some(Arc::new(Interpreter)), ..VmOptions::default() };
    let vm = hypervisor.create_vm(memory.clone(), options).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Bed { name, memory, vcpu, vm, io: Io::default() }
}

/// The code on KVM, if it is to be tested.
pub(crate) fn kvm(code: &[u8], options: KvmOptions) -> Vec<Bed> {
    if std::env::var_os("SKEP_TEST_KVM").is_none() {
        return Vec::new();
    }
    vec![bed("kvm", &Kvm::open(options).unwrap(), Provider::Hardware, code)]
}

/// The code on the engines of the software CPU, and on KVM if that is to be tested.
pub(crate) fn back_ends(code: &[u8]) -> Vec<Bed> {
    let software = [("jit", Engine::Jit), ("interpreter", Engine::Interpreter)];
    let mut beds: Vec<Bed> = software
        .into_iter()
        .map(|(name, engine)| bed(name, &Software::with_engine(engine), Provider::Software, code))
        .collect();
    beds.extend(kvm(code, KvmOptions::default()));
    beds
}

impl Bed {
    /// 64-bit mode at [`CODE`], with an empty interrupt table.
    pub(crate) fn start_state(&mut self) -> CpuState {
        let mut state = self.vcpu.get_state(StateGroups { system: true, ..StateGroups::NONE }).unwrap();
        let system = state.system.as_mut().unwrap();
        let segment = |selector, access| Segment { selector, base: 0, limit: u32::MAX, access };
        system.segments = [segment(0x10, 0xc093); 6];
        system.segments[1] = segment(0x08, 0xa09b);
        system.tr = Segment { selector: 0x18, base: 0, limit: 0x67, access: 0x8b };
        system.ldtr = Segment { selector: 0, base: 0, limit: 0, access: 0x82 | Segment::UNUSABLE };
        (system.gdtr, system.idtr) = (DescriptorTable::default(), DescriptorTable::default());
        (system.cr0, system.cr3, system.cr4) = (0x8000_0033, TABLES, 0x620);
        system.efer = 0xd01;
        let general =
            General { rip: CODE, rflags: 2, gpr: std::array::from_fn(|n| if n == 4 { 0x6000 } else { 0 }) };
        state.general = Some(general);
        state
    }

    /// Stands at the code's beginning.
    pub(crate) fn start(&mut self) {
        let state = self.start_state();
        self.vcpu.set_state(&state).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Runs until it is kicked or ends.
    pub(crate) fn run(&mut self) -> RunEnd {
        self.vcpu.run(&mut self.io)
    }

    /// Runs until the guest writes to `port`.
    pub(crate) fn run_until(&mut self, port: u16) -> RunEnd {
        self.io.stop = Some(port);
        self.run()
    }
}
