//! What the tests of this room share.

use skep_memory::GuestMemory;

use crate::{BootError, Input, Loaded, MemoryLayout, Payload, Platform, Role};

/// A small seeded generator (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A machine that has been loaded.
pub(crate) struct Booted {
    pub(crate) memory: GuestMemory,
    pub(crate) loaded: Loaded,
}

impl Booted {
    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(gpa, &mut bytes).unwrap();
        bytes
    }

    /// The NUL-terminated string at `gpa`.
    pub(crate) fn string(&self, gpa: u64) -> String {
        let bytes = (gpa..).map(|at| self.memory.read_u8(at).unwrap()).take_while(|&b| b != 0).collect();
        String::from_utf8(bytes).unwrap()
    }

    pub(crate) fn general(&self) -> skep_hv::state::General {
        self.loaded.boot_state.as_ref().unwrap().general.unwrap()
    }

    pub(crate) fn system(&self) -> skep_hv::state::System {
        self.loaded.boot_state.as_ref().unwrap().system.unwrap()
    }
}

/// A machine whose memory is full of garbage, as that of one that resets is. Loads one payload after the other.
pub(crate) struct Machine {
    layout: MemoryLayout,
    memory: GuestMemory,
}

impl Machine {
    pub(crate) fn new(size: u64, rom: u64) -> Result<Self, BootError> {
        let layout = MemoryLayout::new(size, rom)?;
        let memory = GuestMemory::new(&layout.regions()).unwrap();
        for start in [0, 0xc_0000, 0x10_0000, 0x20_0000, 0x100_0000] {
            if size > start {
                memory.write(start, &vec![0xcc; (size - start).min(0x4_0000) as usize]).unwrap();
            }
        }
        Ok(Self { layout, memory })
    }

    pub(crate) fn load(&self, payload: Payload) -> Result<Loaded, BootError> {
        let options = crate::BootOptions { payload, layout: self.layout, platform: Platform::new(2) };
        crate::load(&self.memory, &options)
    }
}

/// Boots `payload` in a new machine with `size` bytes of memory.
pub(crate) fn boot(payload: Payload, size: u64) -> Result<Booted, BootError> {
    let machine = Machine::new(size, payload.rom_size())?;
    let loaded = machine.load(payload)?;
    Ok(Booted { memory: machine.memory, loaded })
}

/// A kernel in memory with nothing beside it.
pub(crate) fn kernel(image: &[u8], cmdline: &str) -> Payload {
    Payload::Kernel {
        kernel: Input::bytes(Role::Kernel, "kernel", image).unwrap(),
        initrd: None,
        modules: Vec::new(),
        cmdline: cmdline.into(),
    }
}

/// The same with an initial RAM disk.
pub(crate) fn with_initrd(payload: Payload, image: &[u8]) -> Payload {
    match payload {
        Payload::Kernel { kernel, modules, cmdline, .. } => {
            let initrd = Some(Input::bytes(Role::Initrd, "initrd", image).unwrap());
            Payload::Kernel { kernel, initrd, modules, cmdline }
        }
        rom => rom,
    }
}

/// The error of a boot that must fail.
pub(crate) fn failure(payload: Payload, size: u64) -> BootError {
    match boot(payload, size) {
        Ok(booted) => panic!("booted as {:?}", booted.loaded.kind),
        Err(error) => error,
    }
}
