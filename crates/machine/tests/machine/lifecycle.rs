//! The life of a machine: what may follow what, who ends it and how, and that nothing stays.

use std::sync::Arc;
use std::sync::mpsc::channel;

use crate::support::{Bench, Recorder, Scripted, Step, Told, scratch, spec};
use skep_machine::{Command, Event, Machine, Reason, ResetCause, State};

/// x2APIC would need an MSR; the legacy registers will do. Sends an IPI to the APIC `to`.
fn ipi(to: u32, low: u32) -> Vec<Step> {
    vec![Step::Store(0xfee0_0310, to << 24), Step::Store(0xfee0_0300, low)]
}

fn script(parts: &[&[Step]]) -> Vec<Step> {
    parts.concat()
}

#[test]
fn states_follow_each_other_and_every_change_is_told() {
    let bench = Bench::new(vec![vec![Step::Spin]]);
    assert_eq!(bench.machine.state(), State::Created);
    bench.machine.call(Command::Start).unwrap();
    bench.machine.call(Command::Pause).unwrap();
    assert_eq!(bench.machine.state(), State::Paused);
    bench.machine.call(Command::Resume).unwrap();
    bench.machine.call(Command::Kill).unwrap();
    assert_eq!(bench.machine.state(), State::Stopped);
    for state in [State::Created, State::Running, State::Paused, State::Running, State::Stopped] {
        assert!(matches!(bench.event(), Event::State { state: told, time } if told == state && time > 0));
    }
    let Event::Exit { end, .. } = bench.event() else { panic!("the exit comes last") };
    assert_eq!((end.reason, end.status, end.vcpu), (Reason::Killed, 4, None));
    bench.machine.destroy();
    assert!(bench.told.try_recv().is_err(), "nothing after the exit");
}

#[test]
fn a_command_in_the_wrong_state_says_which_it_was() {
    let bench = Bench::new(vec![vec![Step::Spin]]);
    for error in
        [bench.refused(Command::Pause), bench.refused(Command::Resume), bench.refused(Command::Reset)]
    {
        assert_eq!(error.code(), "ERR_VM_STATE");
        assert!(error.to_string().contains("created"), "{error}");
    }
    assert!(bench.refused(Command::PowerButton).to_string().contains("start it first"));
    bench.machine.call(Command::Start).unwrap();
    assert!(bench.refused(Command::Start).to_string().contains("running"));
    assert!(bench.refused(|reply| Command::Registers(0, reply)).to_string().contains("pause it first"));
    bench.machine.call(Command::Pause).unwrap();
    assert!(bench.refused(Command::Start).to_string().contains("resume it"));
    assert!(bench.refused(Command::Pause).to_string().contains("paused"));
    bench.machine.call(Command::Kill).unwrap();
    bench.machine.call(Command::Kill).expect("killing twice is no mistake");
    let error = bench.refused(Command::Start);
    assert_eq!(error.details().unwrap()["state"], "stopped");
    bench.machine.destroy();
    bench.machine.destroy();
    assert_eq!(bench.refused(Command::Start).code(), "ERR_VM_DESTROYED");
    assert_eq!(bench.refused(|reply| Command::ReadMemory(0, 1, reply)).code(), "ERR_VM_DESTROYED");
}

#[test]
fn guests_end_with_bhyves_status() {
    let ends = [
        (vec![Step::HaltForGood], Reason::Halt, 2),
        (vec![Step::TripleFault], Reason::TripleFault, 3),
        (vec![Step::Fail], Reason::Error, 4),
        (vec![Step::Panic], Reason::Error, 4),
        (vec![Step::Out(0xf4, 0x10)], Reason::DebugExit, 0x21),
    ];
    for (script, reason, status) in ends {
        let bench = Bench::started(vec![script]);
        let end = bench.end();
        assert_eq!((end.reason, end.status, end.vcpu), (reason, status, Some(0)));
        if reason == Reason::Error {
            assert!(end.detail.unwrap().contains("as scripted"));
        }
    }
}

#[test]
fn power_off_and_the_power_button() {
    use skep_boot::layout::{PM1A_CONTROL, PM1A_EVENT, SLP_TYP_S5};
    // ACPI on; wait for PWRBTN_STS; SLP_TYP and SLP_EN for S5.
    let off = SLP_TYP_S5 << 2 | 1 << 5;
    let script = vec![
        Step::Out(skep_boot::layout::SMI_COMMAND, skep_boot::layout::ACPI_ENABLE),
        Step::Await(PM1A_CONTROL, 1),
        Step::Print(b"up".to_vec()),
        Step::Await(PM1A_EVENT + 1, 1),
        Step::Out(PM1A_CONTROL + 1, off),
    ];
    let bench = Bench::started(vec![script]);
    assert_eq!(bench.output(2), b"up");
    bench.machine.call(Command::PowerButton).unwrap();
    let end = bench.end();
    assert_eq!((end.reason, end.status), (Reason::PowerOff, 1));
}

#[test]
fn a_reboot_restarts_or_ends_as_specified() {
    let reboot = |port, value| vec![Step::Print(b"x".to_vec()), Step::Out(port, value)];
    for (port, value, cause) in [(0xcf9, 0x06, ResetCause::ResetRegister), (0x64, 0xfe, ResetCause::Keyboard)]
    {
        let bench = Bench::started(vec![reboot(port, value)]);
        for _ in 0..3 {
            while !matches!(bench.event(), Event::Reset { cause: told, .. } if told == cause) {}
        }
        assert_eq!(bench.machine.state(), State::Running);
        let bench = Bench::with(vec![reboot(port, value)], |spec| spec["onReboot"] = "exit".into());
        bench.machine.call(Command::Start).unwrap();
        let end = bench.end();
        assert_eq!((end.reason, end.status), (Reason::Reboot, 0));
    }
}

#[test]
fn the_owner_resets_a_running_and_a_paused_machine() {
    let bench = Bench::started(vec![vec![Step::Print(b"hello".to_vec()), Step::Spin]]);
    assert_eq!(bench.output(5), b"hello");
    bench.machine.call(Command::Reset).unwrap();
    assert_eq!(bench.output(5), b"hello");
    bench.machine.call(Command::Pause).unwrap();
    bench.machine.call(Command::Reset).unwrap();
    assert_eq!(bench.machine.state(), State::Paused);
    bench.machine.call(Command::Resume).unwrap();
    assert_eq!(bench.output(5), b"hello");
}

#[test]
fn pause_holds_every_vcpu_and_resume_lets_it_go_on() {
    let script = script(&[&ipi(1, 0x4500), &ipi(1, 0x4601), &[Step::Print(vec![b'.'; 20_000]), Step::Spin]]);
    let bench = Bench::started(vec![script, vec![Step::Spin]]);
    let seen = bench.output(1).len();
    for _ in 0..50 {
        bench.machine.call(Command::Pause).unwrap();
        let before = bench.machine.call(|reply| Command::Registers(0, reply)).unwrap();
        assert_eq!(bench.machine.call(|reply| Command::Registers(0, reply)).unwrap(), before);
        bench.machine.call(Command::Resume).unwrap();
    }
    bench.output(20_000 - seen);
    assert!(bench.machine.call(Command::Stats).unwrap().vcpus[1].counters.instructions > 0);
}

#[test]
fn a_machine_halts_only_when_all_processors_have() {
    // The second prints; the first has halted already and gets it to stop by waiting for nothing.
    let first = script(&[&ipi(1, 0x4500), &ipi(1, 0x4601), &[Step::HaltForGood]]);
    let bench = Bench::started(vec![first, vec![Step::Print(b"ap".to_vec()), Step::HaltForGood]]);
    assert_eq!(bench.output(2), b"ap");
    assert_eq!(bench.end().reason, Reason::Halt);
}

#[test]
fn an_nmi_ends_a_halt_with_interrupts_disabled() {
    let first = script(&[
        &ipi(1, 0x4500),
        &ipi(1, 0x4601),
        &[Step::HaltForGood, Step::Print(b"woken".to_vec()), Step::HaltForGood],
    ]);
    let bench = Bench::started(vec![
        first,
        script(&[&[Step::Await(0x3fd, 0x20)], &ipi(0, 0x4400), &[Step::HaltForGood]]),
    ]);
    assert_eq!(bench.output(5), b"woken");
    let end = bench.end();
    assert_eq!(end.reason, Reason::Halt);
}

#[test]
fn a_timer_interrupt_wakes_a_sleeper() {
    let apic = 0xfee0_0000;
    // Spurious vector and software enable; divide by 1; one-shot vector 0x40; count.
    let script = vec![
        Step::Store(apic + 0xf0, 0x1ff),
        Step::Store(apic + 0x3e0, 0xb),
        Step::Store(apic + 0x320, 0x40),
        Step::Store(apic + 0x380, 1000),
        Step::Sleep,
        Step::Print(b"tick".to_vec()),
    ];
    let bench = Bench::started(vec![script]);
    assert_eq!(bench.output(4), b"tick");
}

#[test]
fn registers_and_memory_are_reached_between_runs() {
    let bench = Bench::new(vec![vec![Step::Spin, Step::Print(b"jumped".to_vec()), Step::Spin]]);
    let call = |vcpu| bench.machine.call(move |reply| Command::Registers(vcpu, reply));
    assert_eq!(call(1).unwrap_err().code(), "ERR_VCPU_INDEX");
    let registers: serde_json::Value = serde_json::from_str(&call(0).unwrap()).unwrap();
    assert_eq!(registers["rip"], "0x0");
    let set = |json: &str| {
        let json = json.to_owned();
        bench.machine.call(move |reply| Command::SetRegisters(0, json, reply))
    };
    assert_eq!(set("{\"rflags\":\"0x8000000000000000\"}").unwrap_err().code(), "ERR_REGISTERS");
    assert_eq!(set("{\"sunflower\":1}").unwrap_err().code(), "ERR_REGISTERS");
    assert_eq!(set("{\"cr8\":16}").unwrap_err().code(), "ERR_REGISTERS");
    assert_eq!(set("{\"rip\":2,\"apicBase\":\"0xffffffffffffffff\"}").unwrap_err().code(), "ERR_REGISTERS");
    set("{\"rip\":1,\"cr8\":3}").unwrap();
    let registers: serde_json::Value = serde_json::from_str(&call(0).unwrap()).unwrap();
    assert_eq!(registers["cr8"], "0x3");
    assert_eq!(registers["apicBase"], "0xfee00900");
    bench.machine.call(Command::Start).unwrap();
    assert_eq!(bench.output(6), b"jumped");

    let read = |gpa, length| bench.machine.call(move |reply| Command::ReadMemory(gpa, length, reply));
    bench.machine.call(|reply| Command::WriteMemory(0x1000, b"abc".to_vec(), reply)).unwrap();
    assert_eq!(read(0x1000, 3).unwrap(), b"abc");
    assert_eq!(read(0xffff_fff0, 1).unwrap(), [0xf4], "the ROM");
    assert_eq!(read(2 << 20, 1).unwrap_err().code(), "ERR_MEMORY_RANGE");
    assert_eq!(read(u64::MAX, 2).unwrap_err().code(), "ERR_MEMORY_RANGE");
    assert_eq!(read(0, (16 << 20) + 1).unwrap_err().code(), "ERR_MEMORY_LENGTH");
    assert_eq!(read(0, u64::MAX).unwrap_err().code(), "ERR_MEMORY_LENGTH");
    let rom = bench.machine.call(|reply| Command::WriteMemory(0xffff_fff0, vec![0], reply));
    assert_eq!(rom.unwrap_err().code(), "ERR_MEMORY_READ_ONLY");
}

#[test]
fn commands_from_many_threads_are_done_one_at_a_time() {
    let bench = Bench::started(vec![vec![Step::Spin]]);
    let machine = &bench.machine;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                for _ in 0..100 {
                    // Whether it fits the state depends on the others; that it is answered does not.
                    let _ = machine.call(Command::Pause);
                    let _ = machine.call(Command::Resume);
                    machine.call(Command::Stats).unwrap();
                }
            });
        }
    });
    bench.machine.call(Command::Kill).unwrap();
    let mut previous = State::Created;
    while let Ok(told) = bench.told.try_recv() {
        let Told::Event(Event::State { state, .. }) = told else { continue };
        let fits = matches!(
            (previous, state),
            (State::Created, State::Created | State::Running)
                | (State::Running, State::Paused)
                | (State::Paused, State::Running)
                | (_, State::Stopped)
        );
        assert!(fits, "{previous} then {state}");
        previous = state;
    }
    assert_eq!(previous, State::Stopped);
}

#[test]
fn a_command_behind_the_end_is_still_answered() {
    for _ in 0..50 {
        let bench = Bench::started(vec![vec![Step::HaltForGood]]);
        let (answer, answered) = channel();
        bench.machine.send(Command::Pause(Box::new(move |result| answer.send(result).unwrap())));
        match answered.recv().unwrap() {
            // It came before the halt.
            Ok(()) => drop(bench.machine.call(Command::Resume)),
            Err(error) => assert_eq!(error.code(), "ERR_VM_STATE"),
        }
        assert_eq!(bench.end().reason, Reason::Halt);
    }
}

#[test]
fn what_cannot_be_created_leaves_nothing() {
    let (rom, log) = (scratch("rom"), scratch("log"));
    let file = |spec: &mut serde_json::Value| {
        spec["devices"]["0:31:0"]["com1"] = serde_json::json!({ "kind": "file", "path": log })
    };
    let (sender, told) = channel();
    let sink = Arc::new(Recorder { told: sender });
    let create = |spec: &skep_machine::MachineSpec, scripts| {
        Machine::create(spec, &Scripted(scripts), sink.clone()).err().unwrap()
    };

    // A back end that refuses.
    let error = create(&spec(1, &rom, file), vec![]);
    assert_eq!(error.code(), "ERR_ACCEL");
    // No such payload.
    let valid = spec(1, &rom, file);
    std::fs::remove_file(&rom).unwrap();
    let error = create(&valid, vec![vec![]]);
    assert_eq!((error.code(), error.path().as_deref()), ("ERR_ROM_MISSING", Some("boot.rom")));
    // More memory than there is.
    let error = create(&spec(1, &rom, |spec| spec["memory"]["size"] = (1u64 << 43).into()), vec![vec![]]);
    assert_eq!((error.code(), error.path().as_deref()), ("ERR_MEMORY_HOST", Some("memory.size")));
    // A serial file in no folder.
    let nowhere = |spec: &mut serde_json::Value| {
        spec["devices"]["0:31:0"]["com2"] = serde_json::json!({ "kind": "file", "path": log.join("x") });
    };
    let error = create(&spec(1, &rom, nowhere), vec![vec![]]);
    assert_eq!(
        (error.code(), error.path().as_deref()),
        ("ERR_SERIAL_FILE", Some("devices[\"0:31:0\"].com2"))
    );
    assert!(!log.exists());
    assert!(told.try_recv().is_err(), "no events either");
    std::fs::remove_file(&rom).unwrap();
}

/// Threads and descriptors of this process.
fn holdings() -> (usize, usize) {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// Machines that come and go in different states.
fn cycles(count: usize) {
    for turn in 0..count {
        let bench = Bench::new(vec![vec![Step::Print(b"x".to_vec()), Step::Spin], vec![Step::Spin]]);
        if turn % 3 > 0 {
            bench.machine.call(Command::Start).unwrap();
        }
        if turn % 3 > 1 {
            bench.machine.call(Command::Kill).unwrap();
        }
    }
}

#[test]
fn a_dropped_machine_tells_its_end_and_takes_everything_along() {
    let rom = scratch("rom");
    let (sender, told) = channel();
    let machine = Machine::create(
        &spec(1, &rom, |_| {}),
        &Scripted(vec![vec![Step::Spin]]),
        Arc::new(Recorder { told: sender }),
    )
    .unwrap();
    machine.call(Command::Start).unwrap();
    drop(machine);
    let events: Vec<Told> = told.iter().collect();
    let Some(Told::Event(Event::Exit { end, .. })) = events.last() else { panic!("{events:?}") };
    assert_eq!(end.reason, Reason::Killed);
    std::fs::remove_file(&rom).unwrap();
}

#[test]
fn nothing_stays() {
    // In a process of its own, where no other test comes and goes.
    if std::env::var_os("SKEP_LEAK_TEST").is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "lifecycle::nothing_stays", "--test-threads=1"]).env("SKEP_LEAK_TEST", "1");
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    cycles(3);
    let before = holdings();
    cycles(60);
    assert_eq!(holdings(), before);
}
