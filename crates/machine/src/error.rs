//! What can go wrong between a specification and a running machine.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use skep_boot::BootError;
use skep_hv::HvError;
use skep_hv::cpuid::PolicyError;
use skep_hv::state::StateError;
use skep_memory::{LockLimit, MemoryError, PoolShortage};

use crate::event::State;

/// A refusal. Every kind has a stable [`Error::code`], and where the configuration is to blame a [`Error::path`] into it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The specification is not one of this version, or contradicts itself.
    #[error("{message}")]
    Spec {
        /// Stable code, `ERR_SPEC_...`.
        code: &'static str,
        /// Offending path in the specification, empty for all of it.
        path: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The processor that was asked for cannot be.
    #[error(transparent)]
    Cpu(#[from] PolicyError),
    /// A command that does not fit the machine's state.
    #[error("cannot {command} a machine that is {state}{}", .hint.map(|h| format!("; {h}")).unwrap_or_default())]
    State {
        /// The command as a verb.
        command: &'static str,
        /// The state it was in.
        state: State,
        /// What to do instead.
        hint: Option<&'static str>,
    },
    /// The guest's software cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host has not enough memory, or refused it.
    #[error("{message}")]
    HostMemory {
        /// What was asked for and what there is.
        message: String,
        /// Bytes asked for.
        size: u64,
    },
    /// The host does not back memory in the way that was asked for.
    #[error(transparent)]
    Backing(MemoryError),
    /// A vCPU cannot be bound to a host CPU.
    #[error("cpus.pin.{vcpu}: host CPU {cpu} {why}")]
    Affinity {
        /// The vCPU.
        vcpu: u32,
        /// The host CPU.
        cpu: u32,
        /// Why not, and which could be.
        why: String,
    },
    /// An access outside of guest memory.
    #[error(transparent)]
    GuestMemory(MemoryError),
    /// An access that is longer than one call may move.
    #[error("one call moves at most {max} bytes of guest memory, {length} were asked for; split it")]
    Length {
        /// Bytes asked for.
        length: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// No such vCPU.
    #[error("there is no vCPU {vcpu}: this machine has {count}, numbered from 0")]
    NoVcpu {
        /// The number asked for.
        vcpu: u32,
        /// How many there are.
        count: u32,
    },
    /// No such serial port, or it has no console.
    #[error("serial port com{port} has no console; give devices[\"0:31:0\"].com{port} the kind \"console\"")]
    NoConsole {
        /// The number asked for, 1 to 4.
        port: u32,
    },
    /// A register file that is not JSON of the right shape, or holds values that no processor can.
    #[error("{0}")]
    Registers(String),
    /// The file behind a serial port cannot be opened.
    #[error("cannot open {} for com{port}: {source}; choose a file in a folder that exists and can be written", .file.display())]
    SerialFile {
        /// COM port, 1 to 4.
        port: u32,
        /// The file.
        file: PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// The processor back end refused.
    #[error("{0}")]
    Hypervisor(HvError),
    /// The host refused a thread.
    #[error(
        "cannot start thread {name}: {source}; raise the limit on processes (ulimit -u) or stop other programs"
    )]
    Thread {
        /// Its name.
        name: String,
        /// The error.
        source: std::io::Error,
    },
    /// The machine has been destroyed, or its owner thread is gone.
    #[error("the machine has been destroyed")]
    Destroyed,
    /// A defect of this program.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

impl Error {
    pub(crate) fn spec(code: &'static str, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Spec { code, path: path.into(), message: message.into() }
    }

    /// A failed allocation of guest memory.
    pub(crate) fn allocation(source: MemoryError) -> Self {
        match source {
            MemoryError::Host { size, .. } => Self::HostMemory {
                message: format!(
                    "{source}; lower memory.size, or raise the limits on memory (ulimit -v, cgroup)"
                ),
                size,
            },
            MemoryError::Pool(_) | MemoryError::NotTransparent { .. } | MemoryError::LockLimit(_) => {
                Self::Backing(source)
            }
            other => Self::GuestMemory(other),
        }
    }

    pub(crate) fn serial_file(port: u32, file: &Path, source: std::io::Error) -> Self {
        Self::SerialFile { port, file: file.to_owned(), source }
    }

    /// The stable code, one literal per kind.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Spec { code, .. } => code,
            Self::Cpu(PolicyError::Unknown { .. }) => "ERR_CPU_FEATURE_UNKNOWN",
            Self::Cpu(PolicyError::Fixed { .. }) => "ERR_CPU_FEATURE_FIXED",
            Self::Cpu(PolicyError::Needs { .. }) => "ERR_CPU_FEATURE_NEEDS",
            Self::Cpu(PolicyError::NeededBy { .. }) => "ERR_CPU_FEATURE_NEEDED",
            Self::Cpu(PolicyError::Unavailable { .. }) => "ERR_CPU_UNAVAILABLE",
            Self::State { .. } => "ERR_VM_STATE",
            Self::Boot(error) => error.code(),
            Self::HostMemory { .. } => "ERR_MEMORY_HOST",
            Self::Backing(MemoryError::LockLimit(_)) => "ERR_MEMORY_WIRED",
            Self::Backing(_) => "ERR_MEMORY_HUGE_PAGES",
            Self::Affinity { .. } => "ERR_CPU_AFFINITY",
            Self::GuestMemory(MemoryError::ReadOnly { .. }) => "ERR_MEMORY_READ_ONLY",
            Self::GuestMemory(_) => "ERR_MEMORY_RANGE",
            Self::Length { .. } => "ERR_MEMORY_LENGTH",
            Self::NoVcpu { .. } => "ERR_VCPU_INDEX",
            Self::NoConsole { .. } => "ERR_CONSOLE_PORT",
            Self::Registers(_) => "ERR_REGISTERS",
            Self::SerialFile { .. } => "ERR_SERIAL_FILE",
            Self::Hypervisor(HvError::Unsupported(_)) => "ERR_ACCEL_UNSUPPORTED",
            Self::Hypervisor(_) => "ERR_ACCEL",
            Self::Thread { .. } => "ERR_THREAD",
            Self::Destroyed => "ERR_VM_DESTROYED",
            Self::Internal(_) => "ERR_INTERNAL",
        }
    }

    /// Where in the specification the reason lies.
    pub fn path(&self) -> Option<String> {
        match self {
            Self::Spec { path, .. } => (!path.is_empty()).then(|| path.clone()),
            Self::Cpu(error) => Some(cpu_path(error)),
            Self::Boot(error) => Some(error.path()),
            Self::HostMemory { .. } => Some("memory.size".into()),
            Self::Backing(MemoryError::LockLimit(_)) => Some("memory.wired".into()),
            Self::Backing(_) => Some("memory.hugePages".into()),
            Self::Affinity { vcpu, .. } => Some(format!("cpus.pin.{vcpu}")),
            Self::NoConsole { port } | Self::SerialFile { port, .. } => {
                Some(format!("devices[\"0:31:0\"].com{port}"))
            }
            Self::Hypervisor(_) => Some("accel".into()),
            _ => None,
        }
    }

    /// Machine-readable particulars, an object, where there are any.
    pub fn details(&self) -> Option<Value> {
        match self {
            Self::Cpu(error) => cpu_details(error),
            Self::State { command, state, .. } => Some(json!({ "command": command, "state": state })),
            Self::HostMemory { size, .. } => Some(json!({ "size": size })),
            Self::Backing(MemoryError::Pool(PoolShortage { page, needed, pool, .. })) => {
                let available = pool.map_or(0, |pool| pool.available);
                Some(json!({ "page": page, "needed": needed, "available": available }))
            }
            Self::Backing(MemoryError::LockLimit(LockLimit { needed, allowed, held })) => {
                Some(json!({ "needed": needed, "allowed": allowed, "held": held }))
            }
            Self::Affinity { vcpu, cpu, .. } => Some(json!({ "vcpu": vcpu, "cpu": cpu })),
            Self::Length { length, max } => Some(json!({ "length": length, "max": max })),
            Self::NoVcpu { vcpu, count } => Some(json!({ "vcpu": vcpu, "count": count })),
            Self::SerialFile { file, source, .. } => {
                Some(json!({ "file": file.display().to_string(), "errno": source.raw_os_error() }))
            }
            _ => None,
        }
    }

    /// `{ code, message, path?, details? }`: the form in which errors cross process and language borders.
    pub fn to_json(&self) -> Value {
        let mut object = json!({ "code": self.code(), "message": self.to_string() });
        if let Some(path) = self.path() {
            object["path"] = path.into();
        }
        if let Some(details) = self.details() {
            object["details"] = details;
        }
        object
    }
}

/// Where the reason for a refused processor lies.
fn cpu_path(error: &PolicyError) -> String {
    match error.feature() {
        None => "cpu.model".into(),
        Some(name) if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => {
            format!("cpu.features.{name}")
        }
        Some(name) => format!("cpu.features[{}]", Value::from(name)),
    }
}

fn cpu_details(error: &PolicyError) -> Option<Value> {
    Some(match error {
        PolicyError::Unknown { nearest, .. } => json!({ "nearest": nearest }),
        PolicyError::Fixed { .. } => return None,
        PolicyError::Unavailable { model, features } => {
            let reasons: serde_json::Map<String, Value> = features
                .iter()
                .map(|(name, reason)| ((*name).to_owned(), reason.to_string().into()))
                .collect();
            json!({ "model": model, "features": reasons })
        }
        PolicyError::Needs { missing, .. } => json!({ "missing": missing }),
        PolicyError::NeededBy { dependents, .. } => json!({ "dependents": dependents }),
    })
}

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::Registers(error.to_string())
    }
}

impl From<HvError> for Error {
    fn from(error: HvError) -> Self {
        Self::Hypervisor(error)
    }
}
