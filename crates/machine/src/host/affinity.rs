//! Which of the host's CPUs a thread runs on.
#![expect(unsafe_code, reason = "the scheduler is told by system calls")]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::thread;

use crate::error::Error;
use crate::spec::MAX_HOST_CPU;

const WORDS: usize = (MAX_HOST_CPU as usize + 1) / 64;

/// A set of host CPUs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct CpuSet([u64; WORDS]);

impl CpuSet {
    const ALL: Self = Self([u64::MAX; WORDS]);

    /// Of numbers up to [`MAX_HOST_CPU`]; larger ones are left out.
    fn of(cpus: &[u32]) -> Self {
        let mut set = Self([0; WORDS]);
        for &cpu in cpus {
            if let Some(word) = set.0.get_mut(cpu as usize / 64) {
                *word |= 1 << (cpu % 64);
            }
        }
        set
    }

    fn has(&self, cpu: u32) -> bool {
        self.0.get(cpu as usize / 64).is_some_and(|word| word >> (cpu % 64) & 1 != 0)
    }

    /// Those that the calling thread runs on.
    fn current() -> io::Result<Self> {
        let mut set = Self([0; WORDS]);
        // SAFETY: the kernel writes at most the length that it is given, all of which is the array.
        let rc = unsafe { libc::sched_getaffinity(0, size_of_val(&set.0), set.0.as_mut_ptr().cast()) };
        if rc == 0 { Ok(set) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes the calling thread run on these alone, as far as the kernel lets it.
    fn bind(&self) -> io::Result<()> {
        // SAFETY: the kernel reads the length that it is given, all of which is the array.
        let rc = unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), self.0.as_ptr().cast()) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// All that a thread of this process could run on: what the host has and the control group allows. Asked on a thread that
    /// ends afterwards, because asking changes what it runs on.
    fn usable() -> io::Result<Self> {
        let ask = || {
            // One that may not be widened keeps what it has.
            let _ = Self::ALL.bind();
            Self::current()
        };
        let thread = thread::Builder::new().name("skep-affinity".into()).spawn(ask)?;
        thread.join().unwrap_or_else(|_| Self::current())
    }
}

impl fmt::Display for CpuSet {
    /// As the kernel writes it: `0-3,8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpu = 0;
        let mut separator = "";
        while cpu <= MAX_HOST_CPU {
            if !self.has(cpu) {
                cpu += 1;
                continue;
            }
            let first = cpu;
            while self.has(cpu) {
                cpu += 1;
            }
            write!(f, "{separator}{first}")?;
            if cpu - 1 > first {
                write!(f, "-{}", cpu - 1)?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// Checks that every vCPU can be bound as `pins` says, before anything is built.
pub(crate) fn check(pins: &BTreeMap<u32, Vec<u32>>) -> Result<(), Error> {
    if pins.is_empty() {
        return Ok(());
    }
    let usable = CpuSet::usable().map_err(|source| Error::Thread { name: "skep-affinity".into(), source })?;
    pins.iter().try_for_each(|(&vcpu, cpus)| compare(vcpu, cpus, &usable))
}

/// Makes the calling thread, which is that of `vcpu`, run on `cpus` alone.
pub(crate) fn bind(vcpu: u32, cpus: &[u32]) -> Result<(), Error> {
    let wanted = CpuSet::of(cpus);
    // The kernel leaves out in silence what a thread may not use.
    let bound = wanted.bind().and_then(|()| CpuSet::current());
    match bound {
        Ok(set) if set == wanted => Ok(()),
        Ok(_) => compare(vcpu, cpus, &CpuSet::usable().unwrap_or(CpuSet([0; WORDS]))),
        Err(source) => {
            compare(vcpu, cpus, &CpuSet::usable().unwrap_or(wanted))?;
            Err(Error::Affinity { vcpu, cpu: cpus.first().copied().unwrap_or(0), why: source.to_string() })
        }
    }
}

fn compare(vcpu: u32, cpus: &[u32], usable: &CpuSet) -> Result<(), Error> {
    let Some(&cpu) = cpus.iter().find(|&&cpu| !usable.has(cpu)) else { return Ok(()) };
    let folder = format!("/sys/devices/system/cpu/cpu{cpu}");
    let online = std::fs::read_to_string(format!("{folder}/online"));
    let why = if !Path::new(&folder).exists() {
        "does not exist"
    } else if online.is_ok_and(|text| text.trim() == "0") {
        "is offline"
    } else {
        "may not be used by this process (see cpuset.cpus of its control group)"
    };
    Err(Error::Affinity { vcpu, cpu, why: format!("{why}; choose among {usable}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_reads_as_the_kernel_writes_it() {
        assert_eq!(CpuSet::of(&[]).to_string(), "");
        assert_eq!(CpuSet::of(&[8, 0, 1, 3, 2, 63, 64, 8191, 9000]).to_string(), "0-3,8,63-64,8191");
        assert_eq!(CpuSet::ALL.to_string(), "0-8191");
    }

    #[test]
    fn a_thread_is_bound_or_told_what_it_may_use() {
        let usable = CpuSet::usable().unwrap();
        let before = CpuSet::current().unwrap();
        let last = (0..=MAX_HOST_CPU).rev().find(|&cpu| usable.has(cpu)).unwrap();
        let bound = thread::spawn(move || {
            bind(0, &[last, last]).unwrap();
            CpuSet::current().unwrap()
        });
        assert!(bound.join().unwrap() == CpuSet::of(&[last]));
        // One that is there does not make up for one that is not.
        let refused = thread::spawn(move || (bind(3, &[last, 8191]), bind(3, &[8191])));
        let (some, none) = refused.join().unwrap();
        for error in [some, none, check(&BTreeMap::from([(3, vec![last, 8191])]))] {
            let error = error.unwrap_err();
            assert_eq!((error.code(), error.path().as_deref()), ("ERR_CPU_AFFINITY", Some("cpus.pin.3")));
            let expected = format!("host CPU 8191 does not exist; choose among {usable}");
            assert_eq!(error.to_string(), format!("cpus.pin.3: {expected}"));
        }
        check(&BTreeMap::from([(0, vec![last])])).unwrap();
        assert!(CpuSet::current().unwrap() == before, "asking changes nothing here");
    }
}
