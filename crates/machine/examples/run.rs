//! Runs one machine without Node: the serial console on stdin and stdout, bhyve's exit status.
//!
//! `run (--kernel FILE [--initrd FILE] [--cmdline TEXT] [--module FILE]... | --rom FILE) [-m MIB] [-c CPUS] [--accel software|kvm] [--engine jit|interpreter|lockstep]
//! [--cpu MODEL[,+FEATURE|,-FEATURE]...] [--huge-pages auto|off|thp|2M|1G] [--debug-exit] [--exit-on-reboot] [--stats]`
//!
//! The engine is the JIT unless `--engine` or the environment variable `SKEP_ENGINE` says otherwise.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use skep_machine::{Command, Event, EventSink, Machine, MachineSpec};

/// Events to stderr, console to stdout.
struct Terminal {
    machine: OnceLock<std::sync::Weak<Machine>>,
    ended: Sender<u8>,
}

impl EventSink for Terminal {
    fn event(&self, event: Event) {
        eprintln!("[{}]", serde_json::to_string(&event).unwrap_or_default());
        if let Event::Exit { end, .. } = event {
            let _ = self.ended.send(end.status);
        }
    }

    fn console(&self, port: u32, data: &[u8]) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(data).and_then(|()| out.flush());
        if let Some(machine) = self.machine.get().and_then(std::sync::Weak::upgrade) {
            let _ = machine.console_credit(port, data.len());
        }
    }
}

/// A model, and features that are on or off.
fn processor(text: &str) -> Option<Value> {
    let (model, features) = text.split_once(',').unwrap_or((text, ""));
    let one = |wish: &str| Some((wish.get(1..)?.to_string(), Value::Bool(wish.starts_with('+'))));
    let features = features.split(',').filter(|wish| !wish.is_empty()).map(one);
    Some(json!({ "model": model, "features": features.collect::<Option<serde_json::Map<_, _>>>()? }))
}

fn spec(mut args: std::env::Args) -> Option<(Value, bool)> {
    let none = json!({ "kind": "none" });
    let (mut boot, mut rom, mut stats) =
        (json!({ "kind": "kernel", "initrd": null, "cmdline": "", "modules": [] }), None, false);
    let engine = std::env::var("SKEP_ENGINE").ok().filter(|name| !name.is_empty());
    let mut engine: Value = engine.unwrap_or("jit".into()).into();
    let mut spec = json!({
        "version": 1, "name": "run", "uuid": "00000000-0000-4000-8000-000000000000",
        "cpus": { "sockets": 1, "cores": 1, "threads": 1 }, "memory": { "size": 512 << 20, "hugePages": "auto" },
        "accel": "software",
        "devices": { "0:31:0": { "type": "lpc", "com1": { "kind": "console" }, "com2": none, "com3": none, "com4": none } },
        "debugExit": false, "rtc": "utc", "onReboot": "restart",
    });
    args.next();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--debug-exit" => spec["debugExit"] = true.into(),
            "--exit-on-reboot" => spec["onReboot"] = "exit".into(),
            "--stats" => stats = true,
            "--accel" => {
                let accel = args.next()?;
                if accel != "software" {
                    engine = Value::Null;
                }
                spec["accel"] = accel.into();
            }
            "--engine" => engine = args.next()?.into(),
            "--cpu" => spec["cpu"] = processor(&args.next()?)?,
            "--kernel" | "--initrd" | "--cmdline" => boot[&arg[2..]] = args.next()?.into(),
            "--module" => {
                boot["modules"].as_array_mut()?.push(json!({ "path": args.next()?, "cmdline": "" }))
            }
            "--huge-pages" => {
                spec["memory"]["hugePages"] = match args.next()?.as_str() {
                    "off" => false.into(),
                    kind => kind.into(),
                }
            }
            "--rom" => rom = Some(args.next()?),
            "-m" => spec["memory"]["size"] = (args.next()?.parse::<u64>().ok()? << 20).into(),
            "-c" => spec["cpus"]["cores"] = args.next()?.parse::<u32>().ok()?.into(),
            _ => return None,
        }
    }
    spec["engine"] = engine;
    spec["boot"] = rom.map_or(boot, |rom| json!({ "kind": "rom", "rom": rom }));
    Some((spec, stats))
}

fn main() -> ExitCode {
    let Some((spec, stats)) = spec(std::env::args()) else {
        eprintln!(
            "usage: run (--kernel FILE [--initrd FILE] [--cmdline TEXT] [--module FILE]... | --rom FILE)\n           \
             [-m MIB] [-c CPUS] [--accel software|kvm] [--engine jit|interpreter|lockstep]\n           \
             [--huge-pages auto|off|thp|2M|1G] [--debug-exit] [--exit-on-reboot] [--stats]"
        );
        return ExitCode::from(4);
    };
    let (ended, end) = channel();
    let sink = Arc::new(Terminal { machine: OnceLock::new(), ended });
    let created = MachineSpec::from_json(&spec.to_string())
        .and_then(|spec| Machine::create(&spec, &*skep_machine::hypervisor(&spec)?, sink.clone()));
    let machine = match created {
        Ok(machine) => Arc::new(machine),
        Err(error) => {
            eprintln!("{}: {error}", error.code());
            return ExitCode::from(4);
        }
    };
    let _ = sink.machine.set(Arc::downgrade(&machine));
    if let Err(error) = machine.call(Command::Start) {
        eprintln!("{error}");
    }
    let keyboard = Arc::downgrade(&machine);
    std::thread::spawn(move || {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte).is_ok_and(|n| n == 1) {
            let Some(machine) = keyboard.upgrade() else { return };
            while machine.console_write(1, &byte).is_ok_and(|taken| taken == 0) {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    });
    let status = end.recv().unwrap_or(4);
    if stats && let Ok(stats) = machine.call(Command::Stats) {
        eprintln!("{}", serde_json::to_string_pretty(&stats).unwrap_or_default());
    }
    machine.destroy();
    ExitCode::from(status)
}
