//! Errors of the host's.

use skep_hv::HvError;
use skep_hv::state::StateError;

/// A failed ioctl, by what was tried.
pub(crate) trait Tried<T> {
    fn tried(self, what: &'static str) -> Result<T, HvError>;
}

impl<T> Tried<T> for Result<T, kvm_ioctls::Error> {
    fn tried(self, what: &'static str) -> Result<T, HvError> {
        self.map_err(|error| HvError::Os { what, source: error.into() })
    }
}

/// The same for register state.
pub(crate) trait Moved<T> {
    fn moved(self, what: &'static str) -> Result<T, StateError>;
}

impl<T> Moved<T> for Result<T, kvm_ioctls::Error> {
    fn moved(self, what: &'static str) -> Result<T, StateError> {
        self.map_err(|error| StateError::Backend(format!("{what}: {}", std::io::Error::from(error))))
    }
}
