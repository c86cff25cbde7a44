//! Input files: opened once and checked, then read piece by piece straight into guest memory.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use skep_memory::GuestMemory;

use crate::error::{BootError, Role};

/// Bytes moved at a time: an initial RAM disk of several hundred MiB is never held outside the guest.
const CHUNK: usize = 1 << 20;

/// Where an input's bytes come from.
pub trait Source: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Reads at `offset`; returns how many bytes came, 0 at the end.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;
}

/// A file of known size.
struct FileSource {
    file: File,
    size: u64,
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }
}

/// Bytes in memory.
struct BytesSource(Arc<[u8]>);

impl Source for BytesSource {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or_default();
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

/// One input: a name for messages and the bytes. Clones share the open file, so that a machine which resets reads
/// the same file again whatever has become of its name.
#[derive(Clone)]
pub struct Input {
    role: Role,
    name: String,
    source: Arc<dyn Source>,
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({} bytes)", self.role, self.name, self.size())
    }
}

impl Input {
    /// Opens a file by name. Never blocks on a pipe.
    ///
    /// # Errors
    /// The file is missing, may not be read, is empty, or is no regular file.
    pub fn open(role: Role, path: &Path) -> Result<Self, BootError> {
        let name = path.display().to_string();
        let file = OpenOptions::new()
            .read(true)
            // Opening a pipe without a writer would wait for one.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|source| opening(role, &name, source))?;
        Self::from_file(role, name, file)
    }

    /// Takes a file that is already open; `name` is for messages.
    ///
    /// # Errors
    /// As [`Input::open`].
    pub fn from_file(role: Role, name: String, file: File) -> Result<Self, BootError> {
        let data = file.metadata().map_err(|source| opening(role, &name, source))?;
        let kind = data.file_type();
        if kind.is_dir() {
            return Err(BootError::IsDirectory { role, name });
        }
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_char_device() => "character device",
                () if kind.is_block_device() => "block device",
                () if kind.is_fifo() => "pipe",
                () if kind.is_socket() => "socket",
                () => "special file",
            };
            return Err(BootError::NotAFile { role, name, kind });
        }
        Self::new(role, name, Arc::new(FileSource { size: data.len(), file }))
    }

    /// Takes bytes in memory; `name` is for messages.
    ///
    /// # Errors
    /// There are no bytes.
    pub fn bytes(role: Role, name: &str, bytes: impl Into<Arc<[u8]>>) -> Result<Self, BootError> {
        Self::new(role, name.into(), Arc::new(BytesSource(bytes.into())))
    }

    /// Takes any source; `name` is for messages.
    ///
    /// # Errors
    /// It is empty.
    pub fn new(role: Role, name: String, source: Arc<dyn Source>) -> Result<Self, BootError> {
        if source.size() == 0 {
            return Err(BootError::Empty { role, name });
        }
        Ok(Self { role, name, source })
    }

    /// Which input it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.source.size()
    }

    /// The error for contents that are not what they should be; `why` goes on after the name.
    pub(crate) fn format(&self, why: impl Into<String>) -> BootError {
        BootError::Format { role: self.role, name: self.name.clone(), why: why.into() }
    }

    /// The error for a file that ends before `need`.
    pub(crate) fn truncated(&self, what: &'static str, need: u64) -> BootError {
        BootError::Truncated { role: self.role, name: self.name.clone(), what, need, have: self.size() }
    }

    /// Reads exactly `into.len()` bytes of `what` at `offset`.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8], what: &'static str) -> Result<(), BootError> {
        let need = offset.saturating_add(into.len() as u64);
        let mut done = 0;
        while done < into.len() {
            let at = offset.checked_add(done as u64).ok_or_else(|| self.truncated(what, need))?;
            match self.source.read_at(at, &mut into[done..]) {
                Ok(0) => return Err(self.truncated(what, need)),
                Ok(count) => done = done.saturating_add(count).min(into.len()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(BootError::Read { role: self.role, name: self.name.clone(), source });
                }
            }
        }
        Ok(())
    }

    /// Reads up to `limit` bytes from the start: what formats are told apart by.
    pub(crate) fn head(&self, limit: usize) -> Result<Vec<u8>, BootError> {
        let len = usize::try_from(self.size()).map_or(limit, |size| size.min(limit));
        let mut head = vec![0; len];
        self.read(0, &mut head, "the file")?;
        Ok(head)
    }

    /// Copies `len` bytes of `what` at `offset` into guest memory at `gpa`.
    pub(crate) fn copy_to(
        &self,
        memory: &GuestMemory,
        gpa: u64,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), BootError> {
        let need = offset.checked_add(len).ok_or_else(|| self.truncated(what, u64::MAX))?;
        if need > self.size() {
            return Err(self.truncated(what, need));
        }
        let mut chunk = vec![0; len.min(CHUNK as u64) as usize];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(CHUNK as u64) as usize;
            self.read(offset + done, &mut chunk[..piece], what)?;
            memory.load_rom(gpa + done, &chunk[..piece])?;
            done += piece as u64;
        }
        Ok(())
    }
}

fn opening(role: Role, name: &str, source: io::Error) -> BootError {
    let name = name.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => BootError::Missing { role, name },
        io::ErrorKind::PermissionDenied => BootError::Permission { role, name },
        io::ErrorKind::IsADirectory => BootError::IsDirectory { role, name },
        // What open(2) says of a socket in the file system.
        _ if source.raw_os_error() == Some(libc::ENXIO) => BootError::NotAFile { role, name, kind: "socket" },
        _ => BootError::Read { role, name, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    fn code(path: &Path) -> &'static str {
        Input::open(Role::Kernel, path).unwrap_err().code()
    }

    #[test]
    fn what_is_no_file_is_refused_by_kind() {
        let dir = std::env::temp_dir().join(format!("skep-boot-input-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let at = |name: &str| dir.join(name);
        std::fs::write(at("empty"), []).unwrap();
        assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::write(at("secret"), [1]).unwrap();
        std::fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o000)).unwrap();
        assert_eq!(code(&at("none")), "ERR_KERNEL_MISSING");
        assert_eq!(code(&dir), "ERR_KERNEL_IS_DIRECTORY");
        assert_eq!(code(&at("empty")), "ERR_KERNEL_EMPTY");
        assert_eq!(code(&at("fifo")), "ERR_KERNEL_NOT_A_FILE");
        assert_eq!(code(&at("socket")), "ERR_KERNEL_NOT_A_FILE");
        assert_eq!(code(Path::new("/dev/null")), "ERR_KERNEL_NOT_A_FILE");
        assert_eq!(code(Path::new("")), "ERR_KERNEL_MISSING");
        assert_eq!(code(&at("empty/below")), "ERR_KERNEL_READ");
        // The superuser may read it all the same.
        if let Err(error) = Input::open(Role::Initrd, &at("secret")) {
            assert_eq!(error.code(), "ERR_INITRD_PERMISSION");
        }
        drop(socket);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    /// Gives a byte at a time, and an interruption before each.
    struct Slow(std::sync::atomic::AtomicU64);

    impl Source for Slow {
        fn size(&self) -> u64 {
            100
        }
        fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
            if self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed).is_multiple_of(2) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if offset >= 90 {
                return Ok(0);
            }
            into[0] = offset as u8;
            Ok(1)
        }
    }

    #[test]
    fn short_reads_go_on_and_a_file_that_shrank_is_truncated() {
        let slow = Input::new(Role::Initrd, "slow".into(), Arc::new(Slow(0.into()))).unwrap();
        let mut bytes = [0; 5];
        slow.read(7, &mut bytes, "it").unwrap();
        assert_eq!(bytes, [7, 8, 9, 10, 11]);
        assert_eq!(slow.read(88, &mut bytes, "it").unwrap_err().code(), "ERR_INITRD_TRUNCATED");
        assert_eq!(slow.read(u64::MAX, &mut bytes, "it").unwrap_err().code(), "ERR_INITRD_TRUNCATED");
    }
}
