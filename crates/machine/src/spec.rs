//! The machine specification: plain data in which every slot and every default is explicit. Whoever resolved it has
//! checked it already; it is checked again here, because this is the trust boundary.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use skep_hv::ExitControls;
use skep_hv::cpuid::{self, Model};
use skep_memory::{Backing, PageSize};

use crate::error::Error;

/// The version of the specification that this engine understands.
pub const VERSION: u32 = 1;
/// Most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 64;
/// Where the LPC bridge sits.
pub const LPC_SLOT: &str = "0:31:0";
/// Granule of memory sizes: 1 MiB.
pub const MEMORY_GRANULE: u64 = 1 << 20;
/// Least and most memory of a machine, in bytes.
pub const MEMORY_RANGE: std::ops::RangeInclusive<u64> = 2 << 20..=1 << 44;
/// Highest number of a host CPU: what Linux can be built for on x86-64.
pub const MAX_HOST_CPU: u32 = 8191;
/// Longest polling of a halted vCPU, in ns: one second.
pub const MAX_HALT_POLL: u32 = 1_000_000_000;
/// Longest path or command line taken, in bytes.
const MAX_TEXT: usize = 65_536;
/// Most boot modules.
const MAX_MODULES: usize = 64;

/// A machine, fully resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MachineSpec {
    /// [`VERSION`].
    pub version: u32,
    /// Name, for people and for SMBIOS.
    pub name: String,
    /// UUID in its canonical text form.
    pub uuid: String,
    /// Processor topology.
    pub cpus: Cpus,
    /// The processor that guests see. Specifications from before it existed mean all that there is.
    #[serde(default)]
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// Which engine of the software CPU; none with another accelerator.
    pub engine: Option<Engine>,
    /// What a waiting guest does to the host's processor.
    #[serde(default)]
    pub exits: Exits,
    /// What is booted.
    pub boot: Boot,
    /// Devices by slot, `bus:device:function`.
    pub devices: BTreeMap<String, Device>,
    /// Whether the debug-exit port exists.
    pub debug_exit: bool,
    /// What the real-time clock shows.
    pub rtc: Rtc,
    /// What a guest's reboot does.
    pub on_reboot: OnReboot,
}

/// Processor topology, where the product is the number of vCPUs, and the host CPUs they run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpus {
    /// Packages.
    pub sockets: u32,
    /// Cores per package.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
    /// The host CPUs that a vCPU may run on, by its number. Those that are not named run where this process may.
    #[serde(default)]
    pub pin: BTreeMap<u32, Vec<u32>>,
}

impl Cpus {
    /// Number of vCPUs, `None` on overflow.
    pub fn count(&self) -> Option<u32> {
        self.sockets.checked_mul(self.cores)?.checked_mul(self.threads)
    }
}

/// What CPUID shows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// The model.
    pub model: Model,
    /// Features on and off by name, on top of the model.
    pub features: BTreeMap<String, bool>,
}

/// Guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Memory {
    /// Bytes, a multiple of [`MEMORY_GRANULE`].
    pub size: u64,
    /// All of it is taken when the machine is created, and never paged out.
    #[serde(default)]
    pub wired: bool,
    /// Larger pages of the host: `"auto"`, `false`, `"thp"`, `"2M"` or `"1G"`.
    #[serde(default, with = "huge_pages")]
    pub huge_pages: PageSize,
}

/// [`PageSize`] as the specification writes it.
mod huge_pages {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
    use skep_memory::PageSize;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Text {
        Switch(bool),
        Kind(String),
    }

    pub(super) fn serialize<S: Serializer>(pages: &PageSize, serializer: S) -> Result<S::Ok, S::Error> {
        let kind = match pages {
            PageSize::Small => return false.serialize(serializer),
            PageSize::Automatic => "auto",
            PageSize::Transparent => "thp",
            PageSize::Huge2M => "2M",
            PageSize::Huge1G => "1G",
        };
        kind.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PageSize, D::Error> {
        let expected = || de::Error::custom("hugePages must be \"auto\", false, \"thp\", \"2M\" or \"1G\"");
        match Text::deserialize(deserializer).map_err(|_| expected())? {
            Text::Switch(false) => Ok(PageSize::Small),
            Text::Kind(kind) if kind == "auto" => Ok(PageSize::Automatic),
            Text::Kind(kind) if kind == "thp" => Ok(PageSize::Transparent),
            Text::Kind(kind) if kind == "2M" => Ok(PageSize::Huge2M),
            Text::Kind(kind) if kind == "1G" => Ok(PageSize::Huge1G),
            _ => Err(expected()),
        }
    }
}

/// What runs the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The software CPU.
    Software,
    /// Linux KVM.
    Kvm,
}

/// Engines of the software CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The JIT.
    Jit,
    /// The interpreter.
    Interpreter,
    /// Both, compared block by block, for diagnosis; one vCPU only.
    Lockstep,
}

impl From<Engine> for skep_cpu::Engine {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Jit => Self::Jit,
            Engine::Interpreter => Self::Interpreter,
            Engine::Lockstep => Self::Lockstep,
        }
    }
}

/// What a waiting guest does to the host's processor, where the accelerator can choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Exits {
    /// HLT leaves the guest.
    pub hlt: bool,
    /// PAUSE in a loop leaves the guest.
    pub pause: bool,
    /// For how long a halted vCPU polls before its thread sleeps, in ns, at most [`MAX_HALT_POLL`]; none leaves it to the host.
    pub halt_poll: Option<u32>,
}

impl Default for Exits {
    fn default() -> Self {
        let ExitControls { hlt, pause, halt_poll_ns } = ExitControls::default();
        Self { hlt, pause, halt_poll: halt_poll_ns }
    }
}

impl From<Exits> for ExitControls {
    fn from(exits: Exits) -> Self {
        Self { hlt: exits.hlt, pause: exits.pause, halt_poll_ns: exits.halt_poll }
    }
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Boot {
    /// A kernel, loaded directly.
    Kernel {
        /// bzImage, ELF with a PVH note, or multiboot image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Command line.
        cmdline: String,
        /// Multiboot and PVH modules.
        modules: Vec<Module>,
    },
    /// A firmware image that ends at 4 GiB.
    Rom {
        /// The image.
        rom: PathBuf,
    },
}

/// A file handed to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub cmdline: String,
}

/// A device in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Device {
    /// The LPC bridge with its four serial ports.
    Lpc {
        /// Port 0x3f8, IRQ 4.
        com1: Serial,
        /// Port 0x2f8, IRQ 3.
        com2: Serial,
        /// Port 0x3e8, IRQ 4.
        com3: Serial,
        /// Port 0x2e8, IRQ 3.
        com4: Serial,
    },
}

/// What is behind a serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Serial {
    /// The owner, through [`crate::EventSink::console`] and [`crate::Machine::console_write`].
    Console {},
    /// A file that takes the output; emptied when the machine is created.
    File {
        /// The file.
        path: PathBuf,
    },
    /// Nothing: output is dropped.
    None {},
}

/// What the real-time clock shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rtc {
    /// Universal time.
    Utc,
    /// The host's local time.
    Localtime,
}

/// What a guest's reboot does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// Reset and go on.
    Restart,
    /// End with status 0.
    Exit,
}

impl MachineSpec {
    /// Parses JSON and validates.
    pub fn from_json(json: &str) -> Result<Self, Error> {
        let spec: Self = serde_json::from_str(json).map_err(|error| {
            Error::spec("ERR_SPEC_JSON", "", format!("the machine specification cannot be read: {error}"))
        })?;
        spec.validate()?;
        Ok(spec)
    }

    /// How memory is backed.
    pub fn backing(&self) -> Backing {
        Backing {
            pages: self.memory.huge_pages,
            wired: self.memory.wired,
            // The software CPU looks at two pages side by side.
            private: self.accel == Accel::Kvm,
        }
    }

    /// Checks everything that the types do not say.
    pub fn validate(&self) -> Result<(), Error> {
        if self.version != VERSION {
            let message = format!("version is {}, this engine reads version {VERSION}", self.version);
            return Err(Error::spec("ERR_SPEC_VERSION", "version", message));
        }
        if self.name.is_empty() || self.name.len() > 255 || self.name.chars().any(char::is_control) {
            let message = "name must be 1 to 255 bytes of text without control characters";
            return Err(Error::spec("ERR_SPEC_NAME", "name", message));
        }
        self.uuid_bytes()?;
        let count = self.cpus.count().unwrap_or(u32::MAX);
        if !(1..=MAX_VCPUS).contains(&count) {
            let Cpus { sockets, cores, threads, .. } = self.cpus;
            let message = format!(
                "cpus: {sockets} sockets of {cores} cores of {threads} threads; the product must be 1 to {MAX_VCPUS}"
            );
            return Err(Error::spec("ERR_SPEC_CPUS", "cpus", message));
        }
        cpuid::check_names(&self.cpu.features)?;
        self.validate_pins(count)?;
        self.validate_engine(count)?;
        if self.exits.halt_poll.is_some_and(|ns| ns > MAX_HALT_POLL) {
            let message = format!("exits.haltPoll must be at most {MAX_HALT_POLL} ns");
            return Err(Error::spec("ERR_SPEC_EXITS", "exits.haltPoll", message));
        }
        let size = self.memory.size;
        if !size.is_multiple_of(MEMORY_GRANULE) || !MEMORY_RANGE.contains(&size) {
            let message = format!(
                "memory.size is {size} bytes; it must be a multiple of 1 MiB between {} MiB and {} TiB",
                MEMORY_RANGE.start() >> 20,
                MEMORY_RANGE.end() >> 40
            );
            return Err(Error::spec("ERR_SPEC_MEMORY", "memory.size", message));
        }
        self.validate_boot()?;
        self.validate_devices()
    }

    fn validate_pins(&self, vcpus: u32) -> Result<(), Error> {
        for (&vcpu, cpus) in &self.cpus.pin {
            let path = format!("cpus.pin.{vcpu}");
            if vcpu >= vcpus {
                let message = format!("{path}: this machine has {vcpus} vCPUs, numbered from 0");
                return Err(Error::spec("ERR_SPEC_CPUS", path, message));
            }
            if cpus.is_empty() || cpus.iter().any(|&cpu| cpu > MAX_HOST_CPU) {
                let message = format!("{path} must name one or more host CPUs, from 0 to {MAX_HOST_CPU}");
                return Err(Error::spec("ERR_SPEC_CPUS", path, message));
            }
        }
        Ok(())
    }

    fn validate_engine(&self, vcpus: u32) -> Result<(), Error> {
        let message = match (self.accel, self.engine) {
            (Accel::Software, Some(Engine::Lockstep)) if vcpus != 1 => &*format!(
                "engine \"lockstep\" runs one vCPU, and cpus makes {vcpus}; give cpus 1 or engine \"jit\""
            ),
            (Accel::Software, Some(_)) | (Accel::Kvm, None) => return Ok(()),
            (Accel::Software, None) => {
                "engine is missing: the software CPU has \"jit\", \"interpreter\" and \"lockstep\""
            }
            (Accel::Kvm, Some(_)) => {
                "engine is about the software CPU, and accel is \"kvm\"; leave one of them out"
            }
        };
        Err(Error::spec("ERR_SPEC_ENGINE", "engine", message))
    }

    fn validate_boot(&self) -> Result<(), Error> {
        let text = |path: &str, bytes: &[u8]| {
            if bytes.len() > MAX_TEXT || bytes.contains(&0) {
                let message = format!("{path} must be at most {MAX_TEXT} bytes and hold no NUL");
                return Err(Error::spec("ERR_SPEC_TEXT", path, message));
            }
            Ok(())
        };
        let file = |path: &str, file: &PathBuf| {
            if file.as_os_str().is_empty() {
                return Err(Error::spec("ERR_SPEC_PATH", path, format!("{path} must name a file")));
            }
            text(path, file.as_os_str().as_encoded_bytes())
        };
        match &self.boot {
            Boot::Kernel { kernel, initrd, cmdline, modules } => {
                file("boot.kernel", kernel)?;
                if let Some(initrd) = initrd {
                    file("boot.initrd", initrd)?;
                }
                text("boot.cmdline", cmdline.as_bytes())?;
                if modules.len() > MAX_MODULES {
                    let message = format!("boot.modules: {} modules, at most {MAX_MODULES}", modules.len());
                    return Err(Error::spec("ERR_SPEC_MODULES", "boot.modules", message));
                }
                for (at, module) in modules.iter().enumerate() {
                    file(&format!("boot.modules[{at}].path"), &module.path)?;
                    text(&format!("boot.modules[{at}].cmdline"), module.cmdline.as_bytes())?;
                }
                Ok(())
            }
            Boot::Rom { rom } => file("boot.rom", rom),
        }
    }

    fn validate_devices(&self) -> Result<(), Error> {
        if let Some(slot) = self.devices.keys().find(|slot| *slot != LPC_SLOT) {
            let path = format!("devices[\"{slot}\"]");
            let message = format!("{path}: this machine has one slot, \"{LPC_SLOT}\", for the lpc device");
            return Err(Error::spec("ERR_SPEC_SLOT", path, message));
        }
        let ports = self.serial_ports()?;
        let mut files: Vec<&PathBuf> = Vec::new();
        for (at, port) in ports.iter().enumerate() {
            let Serial::File { path: file } = port else { continue };
            let path = format!("devices[\"{LPC_SLOT}\"].com{}.path", at + 1);
            if file.as_os_str().is_empty() || file.as_os_str().as_encoded_bytes().contains(&0) {
                return Err(Error::spec("ERR_SPEC_PATH", &path, format!("{path} must name a file")));
            }
            if files.contains(&file) {
                let message = format!("{path}: {} is behind another port already", file.display());
                return Err(Error::spec("ERR_SPEC_PATH", path, message));
            }
            files.push(file);
        }
        Ok(())
    }

    /// The back ends of COM1 to COM4.
    pub fn serial_ports(&self) -> Result<[&Serial; 4], Error> {
        match self.devices.get(LPC_SLOT) {
            Some(Device::Lpc { com1, com2, com3, com4 }) => Ok([com1, com2, com3, com4]),
            None => {
                let path = format!("devices[\"{LPC_SLOT}\"]");
                let message = format!("{path} is missing: every machine has an lpc device there");
                Err(Error::spec("ERR_SPEC_SLOT", path, message))
            }
        }
    }

    /// Number of vCPUs of a valid specification.
    pub fn vcpus(&self) -> u32 {
        self.cpus.count().unwrap_or(0)
    }

    /// The UUID as 16 bytes in text order.
    pub fn uuid_bytes(&self) -> Result<[u8; 16], Error> {
        parse_uuid(&self.uuid).ok_or_else(|| {
            let message = "uuid must be like 01234567-89ab-cdef-0123-456789abcdef";
            Error::spec("ERR_SPEC_UUID", "uuid", message)
        })
    }
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.as_bytes();
    if text.len() != 36 {
        return None;
    }
    let mut digits = Vec::with_capacity(32);
    for (at, &byte) in text.iter().enumerate() {
        match (at, byte) {
            (8 | 13 | 18 | 23, b'-') => {}
            (8 | 13 | 18 | 23, _) => return None,
            _ => digits.push(char::from(byte).to_digit(16)? as u8),
        }
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn valid() -> Value {
        json!({
            "version": 1, "name": "web1", "uuid": "01234567-89ab-cdef-0123-456789ABCDEF",
            "cpus": { "sockets": 1, "cores": 2, "threads": 1, "pin": { "1": [0, 3] } },
            "cpu": { "model": "host", "features": { "aes": false } },
            "memory": { "size": 536870912, "wired": true, "hugePages": "2M" },
            "accel": "software", "engine": "interpreter",
            "exits": { "hlt": true, "pause": true, "haltPoll": null },
            "boot": { "kind": "kernel", "kernel": "/k", "initrd": null, "cmdline": "", "modules": [] },
            "devices": { "0:31:0": { "type": "lpc", "com1": { "kind": "console" }, "com2": { "kind": "file", "path": "/x" },
                "com3": { "kind": "none" }, "com4": { "kind": "none" } } },
            "debugExit": false, "rtc": "utc", "onReboot": "restart"
        })
    }

    /// A valid specification with two vCPUs and the debug-exit port off.
    pub(crate) fn parsed() -> MachineSpec {
        MachineSpec::from_json(&valid().to_string()).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Value)) -> (&'static str, Option<String>) {
        let mut spec = valid();
        change(&mut spec);
        let error = MachineSpec::from_json(&spec.to_string()).unwrap_err();
        (error.code(), error.path())
    }

    #[test]
    fn a_valid_specification_goes_round() {
        let spec = parsed();
        assert_eq!(spec.vcpus(), 2);
        assert_eq!(spec.uuid_bytes().unwrap()[..4], [0x01, 0x23, 0x45, 0x67]);
        let mut uuid = valid();
        uuid["uuid"] = "01234567-89ab-cdef-0123-456789ABCDEF".into();
        assert_eq!(serde_json::to_value(&spec).unwrap(), uuid);
    }

    #[test]
    fn every_unknown_field_is_refused() {
        for at in [
            "",
            "/cpus",
            "/cpu",
            "/memory",
            "/exits",
            "/boot",
            "/devices/0:31:0",
            "/devices/0:31:0/com1",
            "/devices/0:31:0/com3",
        ] {
            let (code, _) = refused(|spec| spec.pointer_mut(at).unwrap()["surprise"] = true.into());
            assert_eq!(code, "ERR_SPEC_JSON", "at {at:?}");
        }
    }

    #[test]
    fn every_missing_field_is_refused() {
        let keys: Vec<String> = valid().as_object().unwrap().keys().cloned().collect();
        for key in keys {
            if key == "exits" || key == "cpu" {
                continue;
            }
            let (code, _) = refused(|spec| drop(spec.as_object_mut().unwrap().remove(&key)));
            assert_eq!(
                code,
                if key == "engine" { "ERR_SPEC_ENGINE" } else { "ERR_SPEC_JSON" },
                "without {key}"
            );
        }
    }

    #[test]
    fn a_specification_without_a_processor_means_the_hosts() {
        let mut old = valid();
        old.as_object_mut().unwrap().remove("cpu");
        assert_eq!(MachineSpec::from_json(&old.to_string()).unwrap().cpu, Cpu::default());
    }

    #[test]
    fn processors_are_checked() {
        for model in ["x86-64-v5", "", "HOST"] {
            assert_eq!(refused(|spec| spec["cpu"]["model"] = model.into()).0, "ERR_SPEC_JSON");
        }
        assert_eq!(refused(|spec| spec["cpu"]["features"]["aes"] = 1.into()).0, "ERR_SPEC_JSON");
        let refusal = |name: &str, on: bool| refused(|spec| spec["cpu"]["features"][name] = on.into());
        let path = |path: &str| Some(path.to_owned());
        assert_eq!(refusal("aess", true), ("ERR_CPU_FEATURE_UNKNOWN", path("cpu.features.aess")));
        assert_eq!(refusal("a.s", true), ("ERR_CPU_FEATURE_UNKNOWN", path("cpu.features[\"a.s\"]")));
        assert_eq!(refusal("lm", false), ("ERR_CPU_FEATURE_FIXED", path("cpu.features.lm")));
    }

    #[test]
    fn what_came_later_has_defaults() {
        let mut spec = valid();
        spec.as_object_mut().unwrap().remove("exits");
        spec["cpus"].as_object_mut().unwrap().remove("pin");
        spec["memory"] = json!({ "size": 536870912 });
        let spec = MachineSpec::from_json(&spec.to_string()).unwrap();
        assert_eq!(ExitControls::from(spec.exits), ExitControls::default());
        let backing = Backing { private: spec.accel == Accel::Kvm, ..Backing::default() };
        assert_eq!(spec.backing(), backing);
        assert!(spec.cpus.pin.is_empty());
    }

    #[test]
    fn huge_pages_are_false_or_a_kind() {
        for (value, pages) in [
            (json!("auto"), PageSize::Automatic),
            (json!(false), PageSize::Small),
            (json!("thp"), PageSize::Transparent),
            (json!("2M"), PageSize::Huge2M),
            (json!("1G"), PageSize::Huge1G),
        ] {
            let mut spec = valid();
            spec["memory"]["hugePages"] = value.clone();
            let parsed = MachineSpec::from_json(&spec.to_string()).unwrap();
            assert_eq!(parsed.memory.huge_pages, pages);
            assert_eq!(serde_json::to_value(&parsed).unwrap()["memory"]["hugePages"], value);
        }
        for value in [json!(true), json!("4K"), json!(null), json!(2), json!({})] {
            let error = refused(|spec| spec["memory"]["hugePages"] = value);
            assert_eq!(error.0, "ERR_SPEC_JSON");
        }
    }

    #[test]
    fn pins_name_processors_that_can_be() {
        let pin = |pin: Value| refused(|spec| spec["cpus"]["pin"] = pin);
        assert_eq!(pin(json!({ "2": [0] })), ("ERR_SPEC_CPUS", Some("cpus.pin.2".into())));
        assert_eq!(pin(json!({ "0": [] })), ("ERR_SPEC_CPUS", Some("cpus.pin.0".into())));
        assert_eq!(pin(json!({ "0": [0, 8192] })), ("ERR_SPEC_CPUS", Some("cpus.pin.0".into())));
        for value in
            [json!({ "x": [0] }), json!({ "-1": [0] }), json!({ "0": 0 }), json!({ "0": [-1] }), json!([])]
        {
            assert_eq!(pin(value).0, "ERR_SPEC_JSON");
        }
    }

    #[test]
    fn engines_are_known_by_name() {
        for (name, engine) in
            [("jit", Engine::Jit), ("interpreter", Engine::Interpreter), ("lockstep", Engine::Lockstep)]
        {
            let mut spec = valid();
            spec["cpus"] = json!({ "sockets": 1, "cores": 1, "threads": 1 });
            spec["engine"] = name.into();
            let parsed = MachineSpec::from_json(&spec.to_string()).unwrap();
            assert_eq!(parsed.engine, Some(engine));
            assert_eq!(serde_json::to_value(&parsed).unwrap()["engine"], name);
        }
        assert_eq!(refused(|spec| spec["engine"] = "auto".into()).0, "ERR_SPEC_JSON");
        // There are two vCPUs.
        let lockstep = refused(|spec| spec["engine"] = "lockstep".into());
        assert_eq!(lockstep, ("ERR_SPEC_ENGINE", Some("engine".into())));
    }

    #[test]
    fn an_engine_belongs_to_the_software_cpu() {
        let both = refused(|spec| spec["accel"] = "kvm".into());
        assert_eq!(both, ("ERR_SPEC_ENGINE", Some("engine".into())));
        let mut spec = valid();
        (spec["accel"], spec["engine"]) = ("kvm".into(), Value::Null);
        assert_eq!(MachineSpec::from_json(&spec.to_string()).unwrap().accel, Accel::Kvm);
        let poll = refused(|spec| spec["exits"]["haltPoll"] = 1_000_000_001.into());
        assert_eq!(poll, ("ERR_SPEC_EXITS", Some("exits.haltPoll".into())));
        assert_eq!(refused(|spec| spec["exits"]["haltPoll"] = (-1).into()).0, "ERR_SPEC_JSON");
    }

    #[test]
    fn numbers_out_of_range_name_their_path() {
        for (cores, sockets) in [(0, 1), (65, 1), (4096, 1), (u32::MAX, u32::MAX)] {
            let refusal = refused(|spec| {
                spec["cpus"]["cores"] = cores.into();
                spec["cpus"]["sockets"] = sockets.into();
            });
            assert_eq!(refusal, ("ERR_SPEC_CPUS", Some("cpus".into())));
        }
        for size in [0, 1 << 20, (512 << 20) + 4096, 100 << 40, u64::MAX] {
            let refusal = refused(|spec| spec["memory"]["size"] = size.into());
            assert_eq!(refusal, ("ERR_SPEC_MEMORY", Some("memory.size".into())));
        }
        assert_eq!(refused(|spec| spec["cpus"]["cores"] = 1.5.into()).0, "ERR_SPEC_JSON");
        assert_eq!(refused(|spec| spec["memory"]["size"] = (-1).into()).0, "ERR_SPEC_JSON");
    }

    #[test]
    fn texts_and_slots_are_checked() {
        assert_eq!(refused(|spec| spec["version"] = 2.into()).0, "ERR_SPEC_VERSION");
        assert_eq!(refused(|spec| spec["name"] = "".into()).0, "ERR_SPEC_NAME");
        assert_eq!(refused(|spec| spec["name"] = "a\nb".into()).0, "ERR_SPEC_NAME");
        for uuid in [
            "",
            "0123456789abcdef0123456789abcdef",
            "0123456g-89ab-cdef-0123-456789abcdef",
            "ä".repeat(18).as_str(),
        ] {
            assert_eq!(refused(|spec| spec["uuid"] = uuid.into()).0, "ERR_SPEC_UUID");
        }
        assert_eq!(refused(|spec| spec["boot"]["kernel"] = "".into()).0, "ERR_SPEC_PATH");
        assert_eq!(refused(|spec| spec["boot"]["cmdline"] = "a\0b".into()).0, "ERR_SPEC_TEXT");
        assert_eq!(refused(|spec| spec["devices"] = json!({})).0, "ERR_SPEC_SLOT");
        let (code, path) = refused(|spec| {
            let lpc = spec["devices"]["0:31:0"].clone();
            spec["devices"]["0:3:0"] = lpc;
        });
        assert_eq!((code, path.as_deref()), ("ERR_SPEC_SLOT", Some("devices[\"0:3:0\"]")));
        let twice = json!({ "kind": "file", "path": "/x" });
        assert_eq!(refused(|spec| spec["devices"]["0:31:0"]["com1"] = twice).0, "ERR_SPEC_PATH");
    }

    #[test]
    fn garbage_never_panics() {
        let text = valid().to_string();
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..5_000 {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % bytes.len();
                bytes[at] = (seed >> 20) as u8;
            }
            // The outcome does not matter, coming back does; a specification that is taken must be valid.
            if let Ok(spec) = MachineSpec::from_json(&String::from_utf8_lossy(&bytes)) {
                spec.validate().unwrap();
            }
        }
    }
}
