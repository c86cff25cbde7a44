//! A look at `/dev/kvm`.
#![expect(unsafe_code, reason = "KVM answers through an ioctl")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use serde::Serialize;

const DEVICE: &str = "/dev/kvm";
/// `_IO(KVMIO, 0x00)` of linux/kvm.h.
const KVM_GET_API_VERSION: u64 = 0xae00;

/// `/dev/kvm` as this process finds it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kvm {
    /// The device node exists.
    pub present: bool,
    /// This process may open it.
    pub openable: bool,
    /// What KVM_GET_API_VERSION says; 12 for every KVM since Linux 2.6.22.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<i32>,
    /// It is there although the CPU has neither VT-x nor SVM: guests run by paravirtualization (PVM).
    pub paravirtual: bool,
    /// Why it cannot be opened, with a remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Kvm {
    /// Looks. `hardware`: the CPU has VT-x or SVM.
    pub(super) fn probe(hardware: bool) -> Self {
        let present = Path::new(DEVICE).exists();
        let mut kvm = Self { present, paravirtual: present && !hardware, ..Self::default() };
        if !present {
            return kvm;
        }
        match OpenOptions::new().read(true).write(true).open(DEVICE) {
            Ok(file) => {
                kvm.openable = true;
                match api_version(&file) {
                    Ok(version) => kvm.api_version = Some(version),
                    Err(error) => kvm.error = Some(format!("{DEVICE} does not answer as KVM does: {error}")),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                kvm.error = Some(format!(
                    "{DEVICE} may not be opened: add yourself to group kvm (sudo usermod -aG kvm $USER) and log in again"
                ));
            }
            Err(error) => kvm.error = Some(format!("{DEVICE} cannot be opened: {error}")),
        }
        kvm
    }
}

fn api_version(file: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open for the length of the call, and this request takes no pointer.
    let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}
