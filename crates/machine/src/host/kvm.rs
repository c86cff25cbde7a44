//! A look at `/dev/kvm`.
#![expect(unsafe_code, reason = "KVM answers through an ioctl")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;
use skep_kvm::{API_VERSION, NEEDED, Needed};

use super::Features;

const DEVICE: &str = "/dev/kvm";
/// `_IO(KVMIO, 0x00)` of linux/kvm.h.
const KVM_GET_API_VERSION: u64 = 0xae00;
/// `_IO(KVMIO, 0x03)`.
const KVM_CHECK_EXTENSION: u64 = 0xae03;
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
    /// Machines can run on it, if slowly on a paravirtual one.
    pub usable: bool,
    /// Stable code of what stands in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// What stands in the way, with a remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What stands in the way of KVM.
enum Obstacle {
    /// No device node.
    Missing,
    /// A device node with nothing behind it.
    Unloaded,
    /// Its permissions: the mode, and the name of the group.
    Permission(u32, Option<String>),
    /// A container's list of devices, or a security module.
    Denied,
    /// Another failure to open or to answer.
    Broken(&'static str, io::Error),
    /// An unknown version of the API.
    Version(i32),
    /// Something that every machine needs is not there.
    Capability(&'static str, &'static str),
}

impl Kvm {
    /// Looks.
    pub(super) fn probe(features: &Features) -> Self {
        let hardware = features.hardware();
        let Ok(metadata) = fs::metadata(DEVICE) else {
            return Self::default().behind(&Obstacle::Missing, features);
        };
        let mut kvm = Self { present: true, paravirtual: !hardware, ..Self::default() };
        let file = match OpenOptions::new().read(true).write(true).open(DEVICE) {
            Ok(file) => file,
            Err(error) => {
                let obstacle = match error.raw_os_error() {
                    Some(libc::ENODEV | libc::ENXIO) => Obstacle::Unloaded,
                    Some(libc::EACCES) => Obstacle::Permission(metadata.mode(), group_name(metadata.gid())),
                    Some(libc::EPERM) => Obstacle::Denied,
                    _ => Obstacle::Broken("cannot be opened", error),
                };
                return kvm.behind(&obstacle, features);
            }
        };
        kvm.openable = true;
        match ioctl(&file, KVM_GET_API_VERSION, 0) {
            Ok(version) => kvm.api_version = Some(version),
            Err(error) => {
                return kvm.behind(&Obstacle::Broken("does not answer as KVM does", error), features);
            }
        }
        if let Some(version) = kvm.api_version.filter(|&version| version != API_VERSION) {
            return kvm.behind(&Obstacle::Version(version), features);
        }
        let has = |number: u32| ioctl(&file, KVM_CHECK_EXTENSION, number.into()).is_ok_and(|value| value > 0);
        if let Some(&Needed { name, since, .. }) = NEEDED.iter().find(|needed| !has(needed.number)) {
            return kvm.behind(&Obstacle::Capability(name, since), features);
        }
        kvm.usable = true;
        kvm
    }

    /// With what stands in the way, and a remedy.
    fn behind(self, obstacle: &Obstacle, features: &Features) -> Self {
        let setup = "enable virtualization (VT-x, AMD-V) in the firmware's set-up";
        let module = if features.svm { "kvm_amd" } else { "kvm_intel" };
        let load = if features.hardware() {
            format!("load its module (sudo modprobe {module}); if that fails, {setup}")
        } else if features.hypervisor {
            "this host is itself a virtual machine; turn on nested virtualization in the hypervisor that runs it".into()
        } else {
            format!("this CPU shows neither VT-x nor SVM; {setup}, and load the module kvm_intel or kvm_amd")
        };
        let (code, error) = match obstacle {
            Obstacle::Missing => ("ERR_KVM_MISSING", format!("there is no {DEVICE}: {load}")),
            Obstacle::Unloaded => ("ERR_KVM_MISSING", format!("there is no KVM behind {DEVICE}: {load}")),
            Obstacle::Permission(mode, group) => {
                let give = match group {
                    Some(group) if mode & 0o060 == 0o060 && group != "root" => {
                        format!("add yourself to group {group} (sudo usermod -aG {group} $USER)")
                    }
                    _ => format!(
                        "give it to group kvm (sudo chgrp kvm {DEVICE} && sudo chmod 660 {DEVICE}), add yourself to that \
                         group (sudo usermod -aG kvm $USER)"
                    ),
                };
                let text = format!("{DEVICE} exists but may not be opened: {give} and log in again");
                ("ERR_KVM_PERMISSION", text)
            }
            Obstacle::Denied => {
                let text = format!(
                    "{DEVICE} exists but may not be opened here: if this is a container, start it with --device {DEVICE}"
                );
                ("ERR_KVM_PERMISSION", text)
            }
            Obstacle::Broken(what, source) => ("ERR_KVM_DEVICE", format!("{DEVICE} {what}: {source}")),
            Obstacle::Version(version) => {
                let text = format!("{DEVICE} speaks version {version} of its API, not {API_VERSION}");
                ("ERR_KVM_VERSION", text)
            }
            Obstacle::Capability(name, since) => {
                let text =
                    format!("KVM here lacks {name}, which Linux has since {since}: use a newer kernel");
                ("ERR_KVM_CAPABILITY", text)
            }
        };
        Self { usable: false, code: Some(code), error: Some(error), ..self }
    }
}

/// The name of a group, as far as `/etc/group` has it.
fn group_name(gid: u32) -> Option<String> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    name.filter(|name| !name.is_empty())
}

/// A request whose argument is a number and whose answer is one.
fn ioctl(file: &File, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the descriptor is open for the length of the call, and both requests take no pointer.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_way_is_told_with_its_remedy() {
        let amd = Features { svm: true, ..Features::default() };
        let guest = Features { hypervisor: true, ..Features::default() };
        let none = Features::default();
        let kvm = || Some("kvm".to_owned());
        for (obstacle, features, code, parts) in [
            (Obstacle::Missing, amd, "ERR_KVM_MISSING", ["there is no /dev/kvm", "sudo modprobe kvm_amd"]),
            (Obstacle::Missing, none, "ERR_KVM_MISSING", ["neither VT-x nor SVM", "firmware's set-up"]),
            (
                Obstacle::Missing,
                guest,
                "ERR_KVM_MISSING",
                ["itself a virtual machine", "nested virtualization"],
            ),
            (Obstacle::Unloaded, amd, "ERR_KVM_MISSING", ["no KVM behind", "modprobe"]),
            (
                Obstacle::Permission(0o20660, kvm()),
                amd,
                "ERR_KVM_PERMISSION",
                ["/dev/kvm exists but may not be opened", "group kvm (sudo usermod -aG kvm $USER)"],
            ),
            (
                Obstacle::Permission(0o20660, Some("virt".into())),
                amd,
                "ERR_KVM_PERMISSION",
                ["", "sudo usermod -aG virt $USER"],
            ),
            (Obstacle::Permission(0o20600, kvm()), amd, "ERR_KVM_PERMISSION", ["chgrp kvm", "chmod 660"]),
            (
                Obstacle::Permission(0o20660, Some("root".into())),
                amd,
                "ERR_KVM_PERMISSION",
                ["chgrp kvm", ""],
            ),
            (Obstacle::Denied, amd, "ERR_KVM_PERMISSION", ["container", "--device /dev/kvm"]),
            (Obstacle::Version(11), amd, "ERR_KVM_VERSION", ["version 11", "not 12"]),
            (
                Obstacle::Capability("KVM_CAP_IMMEDIATE_EXIT", "4.13"),
                amd,
                "ERR_KVM_CAPABILITY",
                ["KVM_CAP_IMMEDIATE_EXIT", "4.13"],
            ),
            (
                Obstacle::Broken("cannot be opened", io::Error::from_raw_os_error(libc::EMFILE)),
                amd,
                "ERR_KVM_DEVICE",
                ["cannot be opened", "Too many open files"],
            ),
        ] {
            let told = Kvm { present: true, usable: true, ..Kvm::default() }.behind(&obstacle, &features);
            let text = told.error.unwrap();
            assert_eq!((told.code, told.usable), (Some(code), false), "{text}");
            for part in parts {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }

    #[test]
    fn groups_have_names() {
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(u32::MAX), None);
    }
}
