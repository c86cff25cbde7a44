//! The state of one processor.

use std::sync::Arc;

use skep_hv::state::Segment;
use skep_hv::{HvError, Pending, VcpuStats};
use skep_memory::GuestMemory;

use crate::block::Blocks;
use crate::fault::Raised;
use crate::jit::{Hot, Jit, Lockstep};
use crate::mmu::Tlb;
use crate::native::{Fpu, Thunks};
use crate::regs::Regs;
use crate::run::IoSlot;
use crate::system::{Msrs, Tsc};
use crate::vm::{Mailbox, Shared};

/// Segment registers in encoding order.
#[allow(dead_code, reason = "a complete list reads better than a partial one")]
pub(crate) mod seg {
    pub(crate) const ES: usize = 0;
    pub(crate) const CS: usize = 1;
    pub(crate) const SS: usize = 2;
    pub(crate) const DS: usize = 3;
    pub(crate) const FS: usize = 4;
    pub(crate) const GS: usize = 5;
}

/// RFLAGS bits.
#[allow(dead_code, reason = "a complete list reads better than a partial one")]
pub(crate) mod fl {
    pub(crate) const CF: u64 = 1 << 0;
    pub(crate) const PF: u64 = 1 << 2;
    pub(crate) const AF: u64 = 1 << 4;
    pub(crate) const ZF: u64 = 1 << 6;
    pub(crate) const SF: u64 = 1 << 7;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const OF: u64 = 1 << 11;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
    /// The six that arithmetic sets.
    pub(crate) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
#[allow(dead_code, reason = "a complete list reads better than a partial one")]
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1 << 0;
    pub(crate) const MP: u64 = 1 << 1;
    pub(crate) const EM: u64 = 1 << 2;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const NE: u64 = 1 << 5;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const AM: u64 = 1 << 18;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(dead_code, reason = "a complete list reads better than a partial one")]
pub(crate) mod cr4 {
    pub(crate) const VME: u64 = 1 << 0;
    pub(crate) const PVI: u64 = 1 << 1;
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const MCE: u64 = 1 << 6;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const PCE: u64 = 1 << 8;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const OSXMMEXCPT: u64 = 1 << 10;
    pub(crate) const UMIP: u64 = 1 << 11;
    pub(crate) const LA57: u64 = 1 << 12;
    pub(crate) const FSGSBASE: u64 = 1 << 16;
    pub(crate) const PCIDE: u64 = 1 << 17;
    pub(crate) const OSXSAVE: u64 = 1 << 18;
    pub(crate) const SMEP: u64 = 1 << 20;
    pub(crate) const SMAP: u64 = 1 << 21;
    pub(crate) const PKE: u64 = 1 << 22;
}

/// EFER bits.
pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1 << 0;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    pub(crate) const NXE: u64 = 1 << 11;
}

/// Default operand and address size of the code segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum CodeSize {
    /// 16-bit.
    Bits16 = 0,
    /// 32-bit.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

impl CodeSize {
    /// As decoders name it.
    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// What follows from CR0, CR4, EFER, RFLAGS and the segments; kept by [`Cpu::refresh_mode`], never set elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Current privilege level.
    pub(crate) cpl: u8,
    /// Code size.
    pub(crate) code: CodeSize,
    /// Mask of the stack pointer: 16, 32 or 64 bits.
    pub(crate) stack_mask: u64,
    /// CR0.PE.
    pub(crate) protected: bool,
    /// RFLAGS.VM in protected mode.
    pub(crate) v86: bool,
    /// EFER.LMA.
    pub(crate) long: bool,
    /// CR0.PG.
    pub(crate) paging: bool,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) base: u64,
    pub(crate) limit: u16,
}

/// One processor. Fields that the hot path touches come first.
#[repr(C)]
pub(crate) struct Cpu {
    /// General registers.
    pub(crate) regs: Regs,
    /// Instruction pointer: during a handler, that of the instruction behind the block's last (which branches replace).
    pub(crate) rip: u64,
    /// Status flags as LAHF and SETO leave them in AX: see [`crate::alu`].
    pub(crate) status: u16,
    /// Derived mode.
    pub(crate) mode: Mode,
    /// What translated code touches.
    pub(crate) hot: Hot,
    /// Where translated code was left for: linear address and stamp.
    pub(crate) left_for: (u64, u64),
    /// Why the last instruction was abandoned.
    pub(crate) raised: Raised,
    /// Address translations.
    pub(crate) tlb: Tlb,
    /// Segments: base is what is added (zero for ES, CS, SS, DS in 64-bit mode is the user's affair, see `linear`).
    pub(crate) segs: [Segment; 6],
    /// RFLAGS without the status flags: TF IF DF IOPL NT RF VM AC VIF VIP ID, and bit 1.
    pub(crate) rflags_rest: u64,
    /// The run loop must look at something at the next block boundary (set by handlers on this thread).
    pub(crate) look: bool,
    /// No interrupt may be taken before one more instruction has run (STI).
    pub(crate) sti_shadow: bool,
    /// As above, also for debug exceptions and NMIs (MOV SS, POP SS).
    pub(crate) mov_ss_shadow: bool,
    /// NMIs are blocked until IRET.
    pub(crate) nmi_blocked: bool,
    /// HLT was executed.
    pub(crate) halted: bool,
    /// INIT was received: waits for a start-up IPI.
    pub(crate) wait_for_sipi: bool,
    /// A triple fault happened.
    pub(crate) shutdown: bool,
    /// The machine asked to leave after this instruction.
    pub(crate) leave: bool,
    /// A debug trap (single step, data breakpoint) waits for the end of the instruction: DR6 bits to set.
    pub(crate) debug_trap: u64,
    /// The instruction that runs ends in a single-step trap: TF was set before it, or what it does says so.
    pub(crate) stepping: bool,
    /// What the local APIC said last.
    pub(crate) pending: Pending,
    /// Ask the local APIC again.
    pub(crate) ask_apic: bool,
    /// [`GuestMemory::epoch`] as the jump cache knows it.
    pub(crate) code_epoch: u32,
    /// When to ask it again at the latest, monotonic ns.
    pub(crate) deadline: u64,
    /// Counts PAUSE.
    pub(crate) pauses: u32,

    /// Task register.
    pub(crate) tr: Segment,
    /// LDT register.
    pub(crate) ldtr: Segment,
    /// GDT.
    pub(crate) gdtr: Table,
    /// IDT.
    pub(crate) idtr: Table,
    /// CR0.
    pub(crate) cr0: u64,
    /// CR2.
    pub(crate) cr2: u64,
    /// CR3.
    pub(crate) cr3: u64,
    /// CR4.
    pub(crate) cr4: u64,
    /// EFER.
    pub(crate) efer: u64,
    /// XCR0.
    pub(crate) xcr0: u64,
    /// DR0-DR3.
    pub(crate) dr: [u64; 4],
    /// DR6.
    pub(crate) dr6: u64,
    /// DR7.
    pub(crate) dr7: u64,
    /// PDPTEs of PAE paging, loaded with CR3 (SDM vol. 3A §4.4.1).
    pub(crate) pdpte: [u64; 4],

    /// Guest TSC.
    pub(crate) tsc: Tsc,
    /// Native code for single instructions.
    pub(crate) thunks: Thunks,
    /// x87, SSE, AVX state.
    pub(crate) fpu: Box<Fpu>,
    /// Model-specific registers.
    pub(crate) msrs: Msrs,
    /// Decoded code.
    pub(crate) blocks: Blocks,
    /// Translated code, if the engine is the translator.
    pub(crate) jit: Option<Box<Jit>>,
    /// What compares translated code with the interpreter, if the engine is both.
    pub(crate) lockstep: Option<Box<Lockstep>>,
    /// The machine, while running.
    pub(crate) io: IoSlot,
    /// Guest memory.
    pub(crate) memory: GuestMemory,
    /// What all vCPUs of the VM share.
    pub(crate) shared: Arc<Shared>,
    /// Where other threads leave word.
    pub(crate) mailbox: Arc<Mailbox>,
    /// Others write guest memory unseen, other vCPUs among them: a locked operation must be one of the host's, whatever it
    /// straddles.
    pub(crate) unseen_writers: bool,
    /// PKRU, for the walks of a processor with CR4.PKE.
    pub(crate) pkru: u32,
    /// APIC ID.
    pub(crate) id: u32,
    /// Counters.
    pub(crate) stats: VcpuStats,
}

impl Cpu {
    /// RFLAGS as the guest sees it.
    pub(crate) fn rflags(&self) -> u64 {
        self.rflags_rest | crate::alu::status_to_rflags(self.status)
    }

    /// Sets all of RFLAGS (reserved bits forced). The caller refreshes the mode if VM or AC may have changed.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        const REST: u64 = fl::TF
            | fl::IF
            | fl::DF
            | fl::IOPL
            | fl::NT
            | fl::RF
            | fl::VM
            | fl::AC
            | fl::VIF
            | fl::VIP
            | fl::ID;
        self.status = crate::alu::rflags_to_status(value);
        self.rflags_rest = (value & REST) | 2;
        // What has arrived since the local APIC was last asked comes with mail of its own.
        self.look |= value & fl::TF != 0 || (value & fl::IF != 0 && self.pending.maskable);
    }

    /// Whether `flag` (not a status flag) is set.
    #[inline(always)]
    pub(crate) fn flag(&self, flag: u64) -> bool {
        self.rflags_rest & flag != 0
    }
}

impl Cpu {
    /// A processor in its power-on state.
    pub(crate) fn new(
        id: u32,
        memory: GuestMemory,
        shared: Arc<Shared>,
        mailbox: Arc<Mailbox>,
        tsc: Tsc,
    ) -> Result<Box<Self>, HvError> {
        let thunks = Thunks::new(&shared.cpuid)
            .map_err(|source| HvError::Os { what: "executable memory for the software CPU", source })?;
        let mut cpu = Box::new(Self {
            regs: Regs::new(),
            rip: 0,
            status: 0,
            mode: Mode {
                cpl: 0,
                code: CodeSize::Bits16,
                stack_mask: 0xffff,
                protected: false,
                v86: false,
                long: false,
                paging: false,
            },
            hot: Hot::new(),
            left_for: (0, 0),
            raised: Raised::None,
            tlb: Tlb::new(memory.page_count()),
            segs: [Segment::default(); 6],
            rflags_rest: 2,
            look: true,
            sti_shadow: false,
            mov_ss_shadow: false,
            nmi_blocked: false,
            halted: false,
            wait_for_sipi: false,
            shutdown: false,
            leave: false,
            debug_trap: 0,
            stepping: false,
            pending: Pending::default(),
            ask_apic: true,
            code_epoch: 0,
            deadline: u64::MAX,
            pauses: 0,
            tr: Segment::default(),
            ldtr: Segment::default(),
            gdtr: Table::default(),
            idtr: Table::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pdpte: [0; 4],
            tsc,
            thunks,
            fpu: Box::new(Fpu::new()),
            msrs: Msrs::new(id, &shared),
            blocks: Blocks::new(),
            jit: None,
            lockstep: None,
            io: IoSlot::empty(),
            memory,
            shared,
            mailbox,
            unseen_writers: false,
            pkru: 0,
            id,
            stats: VcpuStats::default(),
        });
        cpu.power_on_reset();
        Ok(cpu)
    }
}
