//! The napi binding of [`skep_machine`]: conversions between JavaScript and the engine, and nothing else.
//!
//! Everything that may take time answers with a promise that the engine's threads settle. Everything that the engine
//! tells goes through one [`mailbox`], so that order is kept: output of a console comes before the exit that followed it,
//! and the events that a call caused come before the call's promise resolves. A failing call has an `Error` whose
//! `message` is JSON: `{ code, message, path?, details? }`.

mod mailbox;
mod promise;
mod registry;

use std::sync::Arc;

use napi::bindgen_prelude::{BigInt, Buffer, FnArgs, Function, Object, Result, Uint8Array};
use napi::{Env, Error};
use napi_derive::napi;
use skep_machine::{Command, Machine as Engine, MachineSpec, Reply, State};

use crate::mailbox::Mailbox;
use crate::promise::{promise, thread};

/// An engine's error as JavaScript gets it.
fn refusal(error: &skep_machine::Error) -> Error {
    Error::from_reason(error.to_json().to_string())
}

/// A refusal of an argument that the engine's types cannot even hold.
fn invalid(code: &str, message: String) -> Error {
    Error::from_reason(serde_json::json!({ "code": code, "message": message }).to_string())
}

/// A virtual machine. It ends with the environment that it was made in.
#[napi]
pub struct Machine {
    engine: Arc<Engine>,
    mailbox: Arc<Mailbox>,
}

#[napi]
impl Machine {
    /// Builds a machine from its specification (JSON). Output and events arrive in order, on the thread of the caller.
    #[napi(catch_unwind, ts_return_type = "Promise<Machine>")]
    pub fn create<'env>(
        env: &'env Env,
        spec: String,
        #[napi(ts_arg_type = "(events: string) => void")] on_event: Function<'env, String, ()>,
        #[napi(ts_arg_type = "(port: number, data: Buffer) => void")] on_console: Function<
            'env,
            FnArgs<(u32, Buffer)>,
            (),
        >,
    ) -> Result<Object<'env>> {
        registry::watch(env)?;
        let mailbox = Mailbox::new(env, on_event, on_console)?;
        let (settle, object) = promise(env, mailbox.clone())?;
        thread("skep-create", move || {
            let engine = MachineSpec::from_json(&spec)
                .and_then(|spec| Engine::create(&spec, &*skep_machine::hypervisor(&spec)?, mailbox.clone()));
            settle(engine.map(|engine| {
                move |_: &Env| {
                    let engine = Arc::new(engine);
                    registry::add(&engine);
                    Ok(Self { engine, mailbox })
                }
            }));
        })?;
        Ok(object)
    }

    /// Sends a command; its answer settles a promise.
    fn command<'env, T, R>(
        &self,
        env: &'env Env,
        command: impl FnOnce(Reply<T>) -> Command,
        convert: impl FnOnce(T) -> R + Send + 'static,
    ) -> Result<Object<'env>>
    where
        T: Send + 'static,
        R: napi::bindgen_prelude::ToNapiValue + 'static,
    {
        let (settle, object) = promise(env, self.mailbox.clone())?;
        self.engine.send(command(Box::new(move |answer: std::result::Result<T, _>| {
            settle(answer.map(|value| move |_: &Env| Ok(convert(value))));
        })));
        Ok(object)
    }

    /// Lets the vCPUs run for the first time. From now to its end the machine keeps Node alive, unless told not to.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn start<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.mailbox.set_live(env, true)?;
        let (settle, object) = promise(env, self.mailbox.clone())?;
        let (engine, mailbox) = (Arc::downgrade(&self.engine), self.mailbox.clone());
        self.engine.send(Command::Start(Box::new(move |answer| {
            // Whatever was answered, the state decides; the exit's delivery is what lets go in the end.
            let live = engine.upgrade().is_some_and(|e| matches!(e.state(), State::Running | State::Paused));
            if answer.is_err() && !live {
                mailbox.let_go_at_settling();
            }
            settle(answer.map(|()| |_: &Env| Ok(())));
        })));
        Ok(object)
    }

    /// Brings every vCPU to a stand.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn pause<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::Pause, |()| ())
    }

    /// Lets paused vCPUs run on.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn resume<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::Resume, |()| ())
    }

    /// Resets the machine.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn reset<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::Reset, |()| ())
    }

    /// Presses the power button.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn power_button<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::PowerButton, |()| ())
    }

    /// Ends the machine.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn kill<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::Kill, |()| ())
    }

    /// `created`, `running`, `paused` or `stopped`, at this moment.
    #[napi(catch_unwind)]
    pub fn state(&self) -> String {
        self.engine.state().name().to_owned()
    }

    /// Counters, as JSON: `{ vcpus: [...], devices: [...] }`.
    #[napi(catch_unwind, ts_return_type = "Promise<string>")]
    pub fn stats<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        self.command(env, Command::Stats, |stats| serde_json::to_string(&stats).unwrap_or_default())
    }

    /// Registers of a vCPU by name, as JSON.
    #[napi(catch_unwind, ts_return_type = "Promise<string>")]
    pub fn registers<'env>(&self, env: &'env Env, vcpu: u32) -> Result<Object<'env>> {
        self.command(env, |reply| Command::Registers(vcpu, reply), |json| json)
    }

    /// Sets the registers of a vCPU that the JSON object names.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn set_registers<'env>(&self, env: &'env Env, vcpu: u32, json: String) -> Result<Object<'env>> {
        self.command(env, |reply| Command::SetRegisters(vcpu, json, reply), |()| ())
    }

    /// Copies guest-physical memory out.
    #[napi(catch_unwind, ts_return_type = "Promise<Buffer>")]
    pub fn read_memory<'env>(&self, env: &'env Env, gpa: BigInt, length: f64) -> Result<Object<'env>> {
        let gpa = address(&gpa)?;
        if !(0.0..=9_007_199_254_740_991.0).contains(&length) || length.fract() != 0.0 {
            let message = format!("a length is a whole number of bytes, not {length}");
            return Err(invalid("ERR_MEMORY_LENGTH", message));
        }
        self.command(env, |reply| Command::ReadMemory(gpa, length as u64, reply), Buffer::from)
    }

    /// Copies into guest-physical memory.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn write_memory<'env>(
        &self,
        env: &'env Env,
        gpa: BigInt,
        #[napi(ts_arg_type = "Buffer")] data: Uint8Array,
    ) -> Result<Object<'env>> {
        let gpa = address(&gpa)?;
        let data = data.to_vec();
        self.command(env, |reply| Command::WriteMemory(gpa, data, reply), |()| ())
    }

    /// Sends input to console `port` (1 to 4); returns the number of bytes taken. After fewer than all, an event
    /// `console-drain` says when there is room.
    #[napi(catch_unwind)]
    pub fn console_write(&self, port: u32, #[napi(ts_arg_type = "Buffer")] data: Uint8Array) -> Result<u32> {
        let taken = self.engine.console_write(port, &data).map_err(|error| refusal(&error))?;
        Ok(u32::try_from(taken).unwrap_or(u32::MAX))
    }

    /// Says that `bytes` of a console's output have been dealt with.
    #[napi(catch_unwind)]
    pub fn console_credit(&self, port: u32, bytes: u32) -> Result<()> {
        self.engine.console_credit(port, bytes as usize).map_err(|error| refusal(&error))
    }

    /// A running machine keeps Node alive (the default).
    #[napi(js_name = "ref", catch_unwind)]
    pub fn reference(&self, env: &Env) -> Result<()> {
        self.mailbox.set_wanted(env, true)
    }

    /// A running machine does not keep Node alive.
    #[napi(catch_unwind)]
    pub fn unref(&self, env: &Env) -> Result<()> {
        self.mailbox.set_wanted(env, false)
    }

    /// Ends the machine, joins its threads and frees its memory. Can be called again.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn destroy<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        let (settle, object) = promise(env, self.mailbox.clone())?;
        let (engine, mailbox) = (self.engine.clone(), self.mailbox.clone());
        thread("skep-destroy", move || {
            engine.destroy();
            settle(Ok(move |env: &Env| mailbox.close(env)));
        })?;
        Ok(object)
    }
}

/// What the host is and can do, as JSON.
#[napi(catch_unwind)]
pub fn probe() -> String {
    serde_json::to_string(&skep_machine::host::probe()).unwrap_or_default()
}

/// What of it decides between accelerators, as JSON.
#[napi(catch_unwind)]
pub fn accelerator() -> String {
    serde_json::to_string(&skep_machine::host::accelerator()).unwrap_or_default()
}

fn address(gpa: &BigInt) -> Result<u64> {
    match gpa.get_u64() {
        (false, address, true) => Ok(address),
        _ => Err(invalid("ERR_MEMORY_RANGE", "a guest physical address is a number of 64 bits".into())),
    }
}
