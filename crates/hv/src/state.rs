//! Typed processor state in register groups, the same for every back end: what can be read, written, compared and
//! saved. Values are architectural (as the guest would see them), never a back end's own encoding.

use serde::{Deserialize, Serialize};

/// Which groups a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateGroups {
    /// General registers, RIP, RFLAGS.
    pub general: bool,
    /// Segments, descriptor tables, control registers, EFER, APIC base.
    pub system: bool,
    /// x87, SSE, AVX: the XSAVE image.
    pub fpu: bool,
    /// Model-specific registers.
    pub msrs: bool,
    /// DR0-DR3, DR6, DR7.
    pub debug: bool,
    /// Interrupt shadow, pending exception and NMI, halt state.
    pub events: bool,
    /// The local APIC, of back ends that bring their own.
    pub apic: bool,
}

impl StateGroups {
    /// No group.
    pub const NONE: Self = Self {
        general: false,
        system: false,
        fpu: false,
        msrs: false,
        debug: false,
        events: false,
        apic: false,
    };
    /// Every group.
    pub const ALL: Self =
        Self { general: true, system: true, fpu: true, msrs: true, debug: true, events: true, apic: true };
}

/// The state of one vCPU; a group that was not asked for is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers.
    pub general: Option<General>,
    /// System registers.
    pub system: Option<System>,
    /// FPU and vector state.
    pub fpu: Option<Fpu>,
    /// MSRs by index, ascending.
    pub msrs: Option<Vec<(u32, u64)>>,
    /// Debug registers.
    pub debug: Option<Debug>,
    /// Events.
    pub events: Option<Events>,
    /// Local APIC; `None` too where the machine has it.
    pub apic: Option<Apic>,
}

/// General registers in encoding order (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15), RIP and RFLAGS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct General {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; bit 1 is always set.
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights as bits 8-15 and 20-23 of the descriptor's second dword stand, shifted right by 8: type 3:0,
    /// S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15; bit 16: unusable (a null selector was loaded).
    pub access: u32,
}

impl Segment {
    /// Bit of [`Segment::access`] for "unusable".
    pub const UNUSABLE: u32 = 1 << 16;
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// System registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct System {
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

/// The x87, SSE and extended state as a standard-format XSAVE area (SDM vol. 1 §13.4), XSTATE_BV says what is valid.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Fpu {
    /// The area; its length is what CPUID.0DH says for the VM's XCR0 maximum.
    pub xsave: Vec<u8>,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Debug {
    /// DR0 to DR3.
    pub address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// A local APIC as the registers of its page show it (SDM vol. 3A table 11-1): 64 registers of 32 bits, which stand 16
/// bytes apart. IA32_APIC_BASE is in [`System::apic_base`], IA32_TSC_DEADLINE among the MSRs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apic {
    /// Register `n` is the one at offset `16 * n`.
    pub registers: Vec<u32>,
}

/// What a processor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// Halted, waits for an interrupt.
    Halted,
    /// After INIT, waits for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Pending and inhibited events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Events {
    /// Activity.
    pub activity: Activity,
    /// Interrupts are inhibited for one instruction after STI.
    pub sti_shadow: bool,
    /// Interrupts are inhibited for one instruction after MOV SS or POP SS.
    pub mov_ss_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An exception that has been raised and not yet delivered.
    pub exception: Option<PendingException>,
    /// Vector of an external interrupt that has been acknowledged and not yet delivered.
    pub interrupt: Option<u8>,
}

/// An exception that waits for delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for vectors that push one.
    pub error_code: Option<u32>,
}

/// A state that a back end will not take.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A value that no processor of this model can hold.
    #[error("{field} cannot be {value:#x}: {why}")]
    Value {
        /// Field, for example `system.cr4`.
        field: &'static str,
        /// The value.
        value: u64,
        /// Why not.
        why: &'static str,
    },
    /// An MSR that this back end does not have.
    #[error("MSR {0:#x} is not one of this processor's")]
    Msr(u32),
    /// The back end failed.
    #[error("{0}")]
    Backend(String),
}
