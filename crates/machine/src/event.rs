//! What a machine tells its owner.

use std::fmt;

use serde::Serialize;

/// Where a machine is in its life. There is no way back from `Stopped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Built; its vCPUs have not run.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still at an instruction boundary.
    Paused,
    /// Ended. Registers and memory can still be read.
    Stopped,
}

impl State {
    /// The name, as in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The guest rebooted and the specification says `onReboot: "exit"`.
    Reboot,
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// Every vCPU halted with interrupts disabled.
    Halt,
    /// A vCPU shut down after a triple fault.
    TripleFault,
    /// The owner killed it.
    Killed,
    /// The guest wrote to the debug-exit port.
    DebugExit,
    /// The machine cannot go on.
    Error,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct End {
    /// Why.
    pub reason: Reason,
    /// bhyve's exit status (0 reboot, 1 power-off, 2 halt, 3 triple fault, 4 error or killed); `(value << 1) | 1` for
    /// debug-exit.
    pub status: u8,
    /// The vCPU that caused it, where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
    /// More for a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl End {
    pub(crate) fn new(reason: Reason) -> Self {
        let status = match reason {
            Reason::Reboot => 0,
            Reason::PowerOff => 1,
            Reason::Halt => 2,
            Reason::TripleFault => 3,
            Reason::Killed | Reason::DebugExit | Reason::Error => 4,
        };
        Self { reason, status, vcpu: None, detail: None }
    }

    pub(crate) fn by(mut self, vcpu: u32) -> Self {
        self.vcpu = Some(vcpu);
        self
    }

    pub(crate) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

/// What asked for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCause {
    /// The owner, by command.
    Host,
    /// The guest, through the reset control register (port 0xcf9, the FADT's RESET_REG).
    ResetRegister,
    /// The guest, by pulsing the keyboard controller's output port.
    Keyboard,
    /// The guest, through port 0x92.
    Port92,
}

/// One thing that happened. Times are host wall-clock milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// The machine entered a state.
    State {
        /// It.
        state: State,
        /// When.
        time: u64,
    },
    /// The machine was reset and starts again.
    Reset {
        /// Why.
        cause: ResetCause,
        /// When.
        time: u64,
    },
    /// The machine ended; always the last event, after all console output.
    Exit {
        /// How.
        #[serde(flatten)]
        end: End,
        /// When.
        time: u64,
    },
    /// The back end could not execute an instruction, and the software CPU's interpreter has. Told for the first ones of
    /// a vCPU and then ever more rarely: at counts that are powers of two.
    Emulated {
        /// The vCPU.
        vcpu: u32,
        /// Linear address of the instruction, in hexadecimal: JSON's numbers do not hold it.
        rip: String,
        /// Its bytes in hexadecimal, as far as they are known.
        bytes: String,
        /// How many instructions of this vCPU that were by now.
        count: u64,
        /// When.
        time: u64,
    },
    /// A console whose input was full has room again.
    ConsoleDrain {
        /// COM port, 1 to 4.
        port: u32,
    },
    /// The file behind a serial port failed; that port's output is dropped from now on. Reported once a port.
    SerialError {
        /// COM port, 1 to 4.
        port: u32,
        /// The host's words.
        message: String,
    },
}

/// Takes what a machine tells. Called from the machine's own threads, one call at a time per source; must not block on
/// anything that waits for the machine.
pub trait EventSink: Send + Sync {
    /// An event.
    fn event(&self, event: Event);
    /// Output of console `port` (1 to 4), in order. The machine sends on only while fewer than
    /// [`crate::CONSOLE_WINDOW`] bytes have not been credited back through [`crate::Machine::console_credit`].
    fn console(&self, port: u32, data: &[u8]);
}

/// Wall-clock time for event stamps.
pub(crate) fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
