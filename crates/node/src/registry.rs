//! The machines of an environment, so that they end with it: when Node exits, however it does, or a worker is terminated.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Weak};

use napi::Env;
use napi::bindgen_prelude::Result;
use skep_machine::Machine;

thread_local! {
    /// An environment lives on one thread and a thread has one at a time.
    static MACHINES: RefCell<Vec<Weak<Machine>>> = const { RefCell::new(Vec::new()) };
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread's machines destroyed when its environment goes.
pub(crate) fn watch(env: &Env) -> Result<()> {
    if !WATCHED.replace(true) {
        env.add_env_cleanup_hook((), |()| {
            WATCHED.set(false);
            for machine in MACHINES.take() {
                if let Some(machine) = machine.upgrade() {
                    machine.destroy();
                }
            }
        })?;
    }
    Ok(())
}

/// Adds a machine.
pub(crate) fn add(machine: &Arc<Machine>) {
    MACHINES.with_borrow_mut(|machines| {
        machines.retain(|machine| machine.strong_count() > 0);
        machines.push(Arc::downgrade(machine));
    });
}
