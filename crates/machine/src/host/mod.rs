//! What this host is and can do: for `skep doctor`, for the choice of an accelerator, and for refusing memory that the
//! host does not have before anything is allocated.

pub(crate) mod affinity;
mod guest;
mod kvm;

use std::fs;

use serde::Serialize;

pub use guest::{GuestCpu, GuestModel};
pub use kvm::Kvm;

/// The host, as far as it matters to virtual machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// The processor.
    pub cpu: Cpu,
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// What processors guests can have, by back end.
    pub guests: Vec<GuestCpu>,
    /// What `auto` chooses.
    pub accelerator: Choice,
    /// The system.
    pub host: System,
    /// Limits that decide how large and how many machines can be.
    pub limits: Limits,
}

/// The host's processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// CPUID vendor string.
    pub vendor: String,
    /// Brand string.
    pub model: String,
    /// Hardware virtualization.
    pub features: Features,
}

/// Hardware virtualization, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Features {
    /// Intel VT-x.
    pub vmx: bool,
    /// AMD SVM.
    pub svm: bool,
    /// Intel extended page tables.
    pub ept: bool,
    /// Intel unrestricted guest.
    pub unrestricted_guest: bool,
    /// AMD nested paging.
    pub npt: bool,
    /// The host is itself a virtual machine, by its hypervisor's own word (CPUID.1:ECX[31]).
    pub hypervisor: bool,
}

/// The accelerator that `auto` picks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Its name.
    pub auto: &'static str,
    /// Why, one sentence.
    pub reason: String,
}

/// The host system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct System {
    /// Kernel release.
    pub kernel: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// Limits on this process and host; `None` for unlimited or unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Memory that may be locked (RLIMIT_MEMLOCK), bytes.
    pub memlock_bytes: Option<u64>,
    /// Address space (RLIMIT_AS), bytes.
    pub address_space_bytes: Option<u64>,
    /// Open files (RLIMIT_NOFILE).
    pub open_files: Option<u64>,
    /// Processes and threads (RLIMIT_NPROC).
    pub processes: Option<u64>,
    /// Memory and swap of the host, bytes.
    pub memory_total_bytes: Option<u64>,
    /// Memory that can be had without swapping, bytes.
    pub memory_available_bytes: Option<u64>,
    /// Mappings per process (vm.max_map_count).
    pub max_map_count: Option<u64>,
    /// vm.overcommit_memory: 0 heuristic, 1 always, 2 never.
    pub overcommit_memory: Option<u64>,
}

/// What the choice of an accelerator is made from, and the choice: a part of [`Host`] that is had quickly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accelerator {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// What `auto` chooses.
    pub accelerator: Choice,
}

impl Accelerator {
    fn of(cpu: &Cpu) -> Self {
        let kvm = Kvm::probe(&cpu.features);
        let accelerator = choose(&cpu.features, &kvm);
        Self { kvm, accelerator }
    }
}

/// Looks at what runs machines here, and at nothing else of the host. Leaves nothing behind.
pub fn accelerator() -> Accelerator {
    Accelerator::of(&Cpu::probe())
}

/// Looks at the host. Leaves nothing behind.
pub fn probe() -> Host {
    let cpu = Cpu::probe();
    let Accelerator { kvm, accelerator } = Accelerator::of(&cpu);
    let limits = Limits::probe();
    let memory = meminfo(&text("/proc/meminfo"), "MemTotal").unwrap_or(0);
    let host = System {
        kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory,
    };
    let guests =
        std::iter::once(GuestCpu::software()).chain(kvm.usable.then(GuestCpu::kvm).flatten()).collect();
    Host { cpu, kvm, guests, accelerator, host, limits }
}

/// Memory and swap of this host in bytes: more can never be backed.
pub(crate) fn memory_total() -> Option<u64> {
    let info = text("/proc/meminfo");
    Some(meminfo(&info, "MemTotal")?.saturating_add(meminfo(&info, "SwapTotal").unwrap_or(0)))
}

/// Memory of this host in bytes that can be had without swapping.
pub(crate) fn memory_available() -> Option<u64> {
    meminfo(&text("/proc/meminfo"), "MemAvailable")
}

/// A file of the kernel's, empty if there is none.
fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn choose(features: &Features, kvm: &Kvm) -> Choice {
    let hardware = if features.vmx { "VT-x" } else { "SVM" };
    let why_not = kvm.error.as_deref().unwrap_or("/dev/kvm cannot be used");
    let (auto, reason) = match (features.hardware(), kvm.usable) {
        (true, true) => ("kvm", format!("this CPU offers {hardware}, and /dev/kvm can be used")),
        (true, false) => ("software", format!("this CPU offers {hardware}, but {why_not}")),
        // An error about a device that would not be taken anyway would only mislead.
        (false, _) if kvm.present => {
            let reason = "this CPU offers neither VT-x nor SVM; /dev/kvm is the paravirtual kind (PVM), which would interpret \
                 unmodified guests slowly";
            ("software", reason.to_owned())
        }
        (false, _) => {
            ("software", "this CPU offers neither VT-x nor SVM, and there is no /dev/kvm".to_owned())
        }
    };
    Choice { auto, reason }
}

impl Features {
    /// Whether the CPU has VT-x or SVM.
    fn hardware(&self) -> bool {
        self.vmx || self.svm
    }
}

impl Cpu {
    fn probe() -> Self {
        Self::from_cpuinfo(&text("/proc/cpuinfo"))
    }

    /// From the text of `/proc/cpuinfo`.
    fn from_cpuinfo(info: &str) -> Self {
        let field = |name: &str| {
            let line = info.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            });
            line.unwrap_or_default()
        };
        let (flags, vmx_flags) = (field("flags"), field("vmx flags"));
        let has = |flags: &str, name: &str| flags.split_whitespace().any(|flag| flag == name);
        let features = Features {
            vmx: has(flags, "vmx"),
            svm: has(flags, "svm"),
            // Kernels before 5.12 list what VMX can do among the other flags.
            ept: has(vmx_flags, "ept") || has(flags, "ept"),
            unrestricted_guest: has(vmx_flags, "unrestricted_guest"),
            npt: has(flags, "npt"),
            hypervisor: has(flags, "hypervisor"),
        };
        Self { vendor: field("vendor_id").to_owned(), model: field("model name").to_owned(), features }
    }
}

impl Limits {
    fn probe() -> Self {
        let limits = text("/proc/self/limits");
        let number = |path: &str| text(path).trim().parse().ok();
        Self {
            memlock_bytes: soft_limit(&limits, "Max locked memory"),
            address_space_bytes: soft_limit(&limits, "Max address space"),
            open_files: soft_limit(&limits, "Max open files"),
            processes: soft_limit(&limits, "Max processes"),
            memory_total_bytes: memory_total(),
            memory_available_bytes: meminfo(&text("/proc/meminfo"), "MemAvailable"),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            overcommit_memory: number("/proc/sys/vm/overcommit_memory"),
        }
    }
}

/// A field of `/proc/meminfo` in bytes.
fn meminfo(info: &str, name: &str) -> Option<u64> {
    let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The soft limit of a line in `/proc/self/limits`; `None` for unlimited.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\n\
        flags\t\t: fpu vme vmx nx\nvmx flags\t: vnmi ept vpid unrestricted_guest\n";
    const AMD: &str = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: fpu svm npt svmx\n";

    #[test]
    fn reads_cpuinfo() {
        let cpu = Cpu::from_cpuinfo(INTEL);
        assert_eq!((cpu.vendor.as_str(), cpu.model.as_str()), ("GenuineIntel", "Intel(R) Xeon(R)"));
        let expected = Features { vmx: true, ept: true, unrestricted_guest: true, ..Features::default() };
        assert_eq!(cpu.features, expected);
        assert_eq!(Cpu::from_cpuinfo(AMD).features, Features { svm: true, npt: true, ..Features::default() });
        assert_eq!(Cpu::from_cpuinfo("").features, Features::default());
    }

    #[test]
    fn reads_meminfo_and_limits() {
        assert_eq!(
            meminfo("MemTotalX: 1 kB\nMemTotal:       24581380 kB\n", "MemTotal"),
            Some(24_581_380 << 10)
        );
        assert_eq!(meminfo("MemTotal: 99999999999999999999 kB\n", "MemTotal"), None);
        assert_eq!(meminfo("", "MemTotal"), None);
        let limits = "Max locked memory         8388608              unlimited            bytes     \n\
            Max address space         unlimited            unlimited            bytes\n";
        assert_eq!(soft_limit(limits, "Max locked memory"), Some(8_388_608));
        assert_eq!(soft_limit(limits, "Max address space"), None);
    }

    #[test]
    fn hardware_is_chosen_where_it_can_be_used() {
        let (amd, none) = (Features { svm: true, ..Features::default() }, Features::default());
        let good = Kvm { present: true, openable: true, usable: true, ..Kvm::default() };
        let closed = Kvm { present: true, error: Some("it is closed".into()), ..Kvm::default() };
        for (features, kvm, auto, reason) in [
            (amd, &good, "kvm", "offers SVM, and /dev/kvm can be used"),
            (amd, &closed, "software", "offers SVM, but it is closed"),
            (none, &good, "software", "paravirtual kind (PVM)"),
            (none, &closed, "software", "paravirtual kind (PVM)"),
            (none, &Kvm::default(), "software", "there is no /dev/kvm"),
        ] {
            let choice = choose(&features, kvm);
            assert_eq!(choice.auto, auto);
            assert!(choice.reason.contains(reason), "{}", choice.reason);
        }
    }

    #[test]
    fn the_probe_finds_this_host() {
        let host = probe();
        assert!(host.host.cpus > 0 && host.host.memory_bytes > 0 && !host.host.kernel.is_empty());
        assert!(host.kvm.present || !host.kvm.openable);
        assert_eq!(host.kvm.usable, host.kvm.code.is_none());
        assert_eq!(host.kvm.code.is_none(), host.kvm.error.is_none());
        assert!(host.accelerator.auto == "software" || host.kvm.usable);
        assert!(host.limits.memory_total_bytes >= Some(host.host.memory_bytes));
        let json = serde_json::to_value(&host).unwrap();
        assert!(json["cpu"]["features"]["unrestrictedGuest"].is_boolean());
        assert!(json["limits"]["maxMapCount"].is_u64());
    }
}
