//! The kernel's own counters of a vCPU: <https://docs.kernel.org/virt/kvm/api.html>, section 4.133.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use crate::ioctl;

/// Bytes of the header: flags, name size, number of descriptors, offsets of id, descriptors and data.
const HEADER: usize = 24;
/// Bytes of a descriptor before its name.
const DESCRIPTOR: usize = 16;
/// More than any kernel has, so that what a broken one says allocates little.
const MOST: usize = 1024;

/// One counter in the file.
#[derive(Debug)]
struct Counter {
    name: String,
    offset: u64,
}

/// The counters of one vCPU. Holds a descriptor.
#[derive(Debug)]
pub(crate) struct Statistics {
    file: File,
    counters: Vec<Counter>,
}

impl Statistics {
    pub(crate) fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        let file = ioctl::statistics(vcpu)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let word = |bytes: &[u8], at: usize| {
            bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)) as usize
        };
        let (name_size, count) = (word(&header, 4).min(256), word(&header, 8).min(MOST));
        let (descriptors, data) = (word(&header, 16), word(&header, 20));
        let mut bytes = vec![0; (DESCRIPTOR + name_size) * count];
        file.read_exact_at(&mut bytes, descriptors as u64)?;
        let counters = bytes.chunks_exact(DESCRIPTOR + name_size).filter_map(|descriptor| {
            let (head, name) = descriptor.split_at(DESCRIPTOR);
            // One number, not a histogram.
            let single = u16::from_le_bytes([head[6], head[7]]) == 1;
            let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
            let name = String::from_utf8_lossy(&name[..end]).into_owned();
            single.then(|| Counter { name, offset: (data + word(head, 8)) as u64 })
        });
        let counters = counters.collect();
        Ok(Self { file, counters })
    }

    fn value(&self, counter: &Counter) -> Option<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, counter.offset).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// How often the vCPU has halted.
    pub(crate) fn halts(&self) -> Option<u64> {
        self.value(self.counters.iter().find(|counter| counter.name == "halt_exits")?)
    }

    /// What has been counted so far, but for what has not happened.
    pub(crate) fn read(&self) -> BTreeMap<String, u64> {
        let happened = |counter: &Counter| {
            let value = self.value(counter).filter(|&value| value != 0)?;
            Some((counter.name.clone(), value))
        };
        self.counters.iter().filter_map(happened).collect()
    }
}
