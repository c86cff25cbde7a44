//! What a specification says of the host: where vCPUs run, what backs memory, what leaves the guest.

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;
use skep_hv::{ExitControls, HvError, Hypervisor, Probe, Vm, VmOptions};
use skep_machine::{Error, Machine};
use skep_memory::GuestMemory;

use crate::support::{Bench, PATIENCE, Recorder, Scripted, scratch, spec};

/// `Cpus_allowed_list` of the threads of this process whose names are among `names`.
fn allowed(names: &[&str]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        let name = field("Name");
        if names.contains(&name.as_str()) {
            found.insert(name, field("Cpus_allowed_list"));
        }
    }
    found
}

/// Host CPUs of a list such as `0-3,8`.
fn cpus(list: &str) -> Vec<u32> {
    let numbers = list.split(',').flat_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.parse::<u32>().unwrap()..=last.parse().unwrap()
    });
    numbers.collect()
}

#[test]
fn a_pinned_vcpu_runs_where_it_was_told_to() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ours =
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
    let all = cpus(&ours);
    let (first, last) = (all[0], all[all.len() - 1]);
    // Numbers that no other test's vCPUs have.
    let _bench = Bench::with(vec![vec![]; 23], |spec| {
        spec["cpus"]["pin"] = json!({ "20": [first], "21": [last], "22": [last, first] });
    });
    // Bound before the machine exists: nothing of a vCPU ever runs elsewhere.
    let found = allowed(&["skep-vcpu20", "skep-vcpu21", "skep-vcpu22"]);
    assert_eq!(found["skep-vcpu20"], first.to_string());
    assert_eq!(found["skep-vcpu21"], last.to_string());
    let mut both = vec![first, last];
    both.dedup();
    assert_eq!(cpus(&found["skep-vcpu22"]), both);
    // Whoever is not named runs anywhere. Its thread takes its name when it begins, which nobody waits for.
    let since = Instant::now();
    let other = loop {
        if let Some(list) = allowed(&["skep-vcpu19"]).remove("skep-vcpu19") {
            break list;
        }
        assert!(since.elapsed() < PATIENCE);
    };
    assert_eq!(other, ours);
}

fn refused(scripts: usize, change: impl FnOnce(&mut serde_json::Value)) -> Error {
    let rom = scratch("host-rom");
    let spec = spec(scripts, &rom, change);
    let (told, _) = channel();
    let sink = Arc::new(Recorder { told });
    let error = Machine::create(&spec, &Scripted(vec![vec![]; scripts]), sink).err().unwrap();
    let _ = fs::remove_file(rom);
    error
}

#[test]
fn a_host_cpu_that_is_not_there_is_named_before_anything_is_left_behind() {
    let log = scratch("host-log");
    fs::write(&log, "as it was").unwrap();
    let error = refused(2, |spec| {
        spec["cpus"]["pin"] = json!({ "1": [8191] });
        spec["devices"]["0:31:0"]["com1"] = json!({ "kind": "file", "path": log });
    });
    assert_eq!((error.code(), error.path().as_deref()), ("ERR_CPU_AFFINITY", Some("cpus.pin.1")));
    assert!(
        error.to_string().starts_with("cpus.pin.1: host CPU 8191 does not exist; choose among 0"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&log).unwrap(), "as it was");
    fs::remove_file(log).unwrap();
}

#[test]
fn memory_that_the_host_does_not_have_is_refused_by_its_option() {
    // No host has 1 TiB of huge pages to spare where 2 GiB of small ones would do.
    let available = skep_memory::Pool::of(2 << 20).map_or(0, |pool| pool.available);
    let total = skep_machine::host::probe().limits.memory_total_bytes.unwrap();
    let size = (available + 1) * (2 << 20);
    if size <= total {
        let error = refused(1, |spec| spec["memory"] = json!({ "size": size, "hugePages": "2M" }));
        assert_eq!(
            (error.code(), error.path().as_deref()),
            ("ERR_MEMORY_HUGE_PAGES", Some("memory.hugePages"))
        );
        assert_eq!(error.details().unwrap()["page"], 2 << 20);
    }
    // All of memory and swap can be promised, but never wired.
    let size = total >> 20 << 20;
    let error = refused(1, |spec| spec["memory"] = json!({ "size": size, "wired": true }));
    assert_eq!(error.code(), "ERR_MEMORY_HOST");
    assert!(error.to_string().contains("all of it wired"), "{error}");
}

#[test]
fn what_leaves_the_guest_reaches_the_back_end() {
    /// Remembers what it was asked for.
    struct Asked(Scripted, Mutex<Option<ExitControls>>);
    impl Hypervisor for Asked {
        fn probe(&self) -> Probe {
            self.0.probe()
        }
        fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError> {
            *self.1.lock().unwrap() = Some(options.exits);
            self.0.create_vm(memory, options)
        }
    }
    for (exits, expected) in [
        (None, ExitControls::default()),
        (
            Some(json!({ "hlt": false, "pause": true, "haltPoll": 200_000 })),
            ExitControls { hlt: false, pause: true, halt_poll_ns: Some(200_000) },
        ),
        (
            Some(json!({ "hlt": true, "pause": false, "haltPoll": null })),
            ExitControls { hlt: true, pause: false, halt_poll_ns: None },
        ),
    ] {
        let rom = scratch("exits-rom");
        let spec = spec(1, &rom, |spec| {
            if let Some(exits) = exits {
                spec["exits"] = exits;
            }
        });
        let asked = Asked(Scripted(vec![vec![]]), Mutex::default());
        let (told, _) = channel();
        Machine::create(&spec, &asked, Arc::new(Recorder { told })).unwrap();
        assert_eq!(*asked.1.lock().unwrap(), Some(expected));
        fs::remove_file(rom).unwrap();
    }
}
