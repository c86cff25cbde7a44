//! A device with doorbells, messages and a line that falls at the end of its interrupt, under every back end: the device
//! does not know which.

use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use skep_chipset::{Access, Device, Effect, Window};
use skep_hv::irq::{Doorbell, EFD_CLOEXEC, EventFd, IoAddress, Irq, MessageLine, MsiMessage, Signal};
use skep_machine::{Command, DoorbellHandle, Error, Event, Harness, Machine};

use crate::support::{PATIENCE, Recorder, Told, scratch, spec};

const BASE: u64 = 0xfed8_0000;
const VALUE: u64 = 0x5eed;
/// IOAPIC input of its line.
const PIN: u8 = 20;

/// The device; `test/guests/devices.s` says what its registers do.
struct Prober {
    line: Irq,
    message: Arc<dyn MessageLine>,
    address: u32,
    due: Arc<Due>,
    reached: u32,
    bell: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _bells: [DoorbellHandle; 2],
}

/// How many interrupts of the line are due, and have ended.
#[derive(Default)]
struct Due {
    due: AtomicU32,
    ended: AtomicU32,
    line: OnceLock<std::sync::Weak<dyn skep_hv::irq::IrqLine>>,
}

impl Signal for Due {
    fn signal(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
        if self.due.fetch_sub(1, Ordering::SeqCst) > 1
            && let Some(line) = self.line.get().and_then(std::sync::Weak::upgrade)
        {
            line.set(true);
        }
    }
}

impl Prober {
    fn new(harness: &Harness) -> Result<Self, Error> {
        let due = Arc::new(Due::default());
        let line = harness.resampled_line(PIN, due.clone());
        let _ = due.line.set(Arc::downgrade(&line));
        let message = harness.message_line()?;
        let bell = Arc::new(EventFd::new(EFD_CLOEXEC).unwrap());
        let at = |offset, width, value| Doorbell { address: IoAddress::Memory(BASE + offset), width, value };
        let bells = [
            harness.doorbell(at(0, 2, None), bell.clone())?,
            harness.doorbell(at(8, 4, Some(VALUE)), bell.clone())?,
        ];
        assert!(harness.doorbell(at(0, 2, None), bell.clone()).is_err(), "attached twice");
        assert!(harness.doorbell(at(0, 0, Some(1)), bell.clone()).is_err(), "a value of no width");
        assert!(harness.memory().regions().count() > 0);
        // The device's own thread: it sleeps until a bell rings, and answers each ring with a message.
        let stop = Arc::new(AtomicBool::new(false));
        let (ring, answer, ended) = (bell.clone(), message.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while let Ok(rings) = ring.read() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                (0..rings).for_each(|_| answer.signal());
            }
        });
        let (address, reached, thread) = (0, 0, Some(thread));
        Ok(Self { line, message, address, due, reached, bell, stop, thread, _bells: bells })
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.bell.signal();
        self.thread.take().map(JoinHandle::join);
    }
}

impl Device for Prober {
    fn name(&self) -> &'static str {
        "prober"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::memory(BASE, 0x1000)]
    }

    fn access(&self) -> Access {
        Access { min: 1, max: 4 }
    }

    fn read_register(&mut self, offset: u64, _width: u8, _now: u64) -> u64 {
        match offset {
            0x14 => self.due.ended.load(Ordering::SeqCst).into(),
            0x18 => self.reached.into(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        match offset {
            0x10 => {
                self.due.due.store(value as u32, Ordering::SeqCst);
                self.line.set(value != 0);
            }
            0x20 | 0x24 => {
                if offset == 0x20 {
                    self.address = value as u32;
                }
                let data = if offset == 0x24 { value as u32 } else { 0x50 };
                let message = MsiMessage { address: self.address.into(), data };
                self.message.set_message((self.address != 0).then_some(message)).unwrap();
            }
            _ => self.reached += 1,
        }
        Effect::None
    }

    fn reset(&mut self, _now: u64) {}
}

/// The project's test guests, built once.
fn guest(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        let folder = scratch("guests");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test/guests/build.sh");
        let built = Process::new("bash").arg(script).arg(&folder).status().unwrap();
        assert!(built.success(), "test/guests/build.sh needs as and ld, of Debian's package binutils");
        folder
    });
    folder.join(name)
}

fn run(accel: &str, engine: Option<&str>) {
    let rom = scratch("rom");
    let spec = spec(1, &rom, |spec| {
        let kernel = guest("devices.elf");
        spec["accel"] = accel.into();
        spec["engine"] = engine.into();
        spec["memory"]["size"] = (16 << 20).into();
        spec["boot"] = serde_json::json!({
            "kind": "kernel", "kernel": kernel, "initrd": null, "cmdline": "", "modules": []
        });
    });
    let (sender, told) = channel();
    let sink = Arc::new(Recorder { told: sender });
    let hypervisor = skep_machine::hypervisor(&spec).unwrap();
    let machine = Machine::create_with(&spec, &*hypervisor, sink, |harness| {
        Ok(vec![Arc::new(Mutex::new(Prober::new(harness)?))])
    })
    .unwrap();
    machine.call(Command::Start).unwrap();
    let mut output = String::new();
    let end = loop {
        match told.recv_timeout(PATIENCE).expect("an event") {
            Told::Console(port, data) => {
                machine.console_credit(port, data.len()).unwrap();
                output += &String::from_utf8_lossy(&data);
            }
            Told::Event(Event::Exit { end, .. }) => break end,
            Told::Event(_) => {}
        }
    };
    assert_eq!(end.status, 33, "{output}");
    let stats = serde_json::to_value(machine.call(Command::Stats).unwrap()).unwrap();
    assert_eq!(stats["engine"], serde_json::json!(engine));
    assert_eq!(stats["translations"], stats["vcpus"][0]["translations"], "there is one vCPU");
    let _ = std::fs::remove_file(rom);
}

#[test]
fn doorbells_messages_and_lines_on_the_jit() {
    run("software", Some("jit"));
}

#[test]
fn doorbells_messages_and_lines_on_the_interpreter() {
    run("software", Some("interpreter"));
}

#[test]
fn doorbells_messages_and_lines_on_kvm() {
    if std::env::var_os("SKEP_TEST_KVM").is_some() {
        run("kvm", None);
    }
}
