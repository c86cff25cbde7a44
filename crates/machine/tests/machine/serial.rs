//! What is behind the serial ports: order, completeness, back-pressure, files that fail.

use std::io::Read;

use crate::support::{Bench, PATIENCE, Step, Told, scratch};
use serde_json::json;
use skep_chipset::Uart;
use skep_machine::{CONSOLE_WINDOW, Command, Event, Reason, State};

fn text(length: usize) -> Vec<u8> {
    (0..length).map(|i| b'a' + (i % 26) as u8).collect()
}

/// Everything that is told until the machine ends.
fn told_until_exit(bench: &Bench) -> Vec<Told> {
    let mut told = Vec::new();
    while !matches!(told.last(), Some(Told::Event(Event::Exit { .. }))) {
        told.push(bench.told.recv_timeout(PATIENCE).expect("an end"));
    }
    told
}

fn console(told: &[Told]) -> Vec<u8> {
    let output = |told: &Told| if let Told::Console(1, data) = told { data.clone() } else { Vec::new() };
    told.iter().flat_map(output).collect()
}

#[test]
fn output_arrives_in_order_and_before_the_exit() {
    for length in [1, 100, 10_000] {
        let bench = Bench::started(vec![vec![Step::Print(text(length)), Step::HaltForGood]]);
        let told = told_until_exit(&bench);
        assert_eq!(console(&told), text(length));
        let chunks = told.iter().filter(|told| matches!(told, Told::Console(..))).count();
        assert!(chunks <= length / 100 + 4, "{chunks} calls for {length} bytes");
    }
}

#[test]
fn an_owner_that_credits_nothing_holds_the_guest_back_and_can_still_pause_and_kill_it() {
    let bench = Bench::started(vec![vec![Step::Print(text(1 << 20)), Step::Out(0xf4, 0)]]);
    let mut seen = 0;
    // As much as fits into the window, and not a byte more, however long one waits.
    while seen + Uart::OUTPUT_CAPACITY <= CONSOLE_WINDOW {
        if let Told::Console(_, data) = bench.told.recv_timeout(PATIENCE).expect("output") {
            seen += data.len();
        }
    }
    assert!(seen <= CONSOLE_WINDOW, "{seen}");
    bench.machine.call(Command::Pause).unwrap();
    bench.machine.call(Command::Resume).unwrap();
    assert_eq!(bench.machine.state(), State::Running);
    bench.machine.call(Command::Kill).unwrap();
    let rest = console(&told_until_exit(&bench)).len();
    assert!(seen + rest <= CONSOLE_WINDOW + Uart::OUTPUT_CAPACITY, "{seen} {rest}");
}

#[test]
fn credit_lets_the_guest_go_on() {
    let length = CONSOLE_WINDOW + 100_000;
    let bench = Bench::started(vec![vec![Step::Print(text(length)), Step::HaltForGood]]);
    assert_eq!(bench.output(length), text(length));
    assert_eq!(bench.end().reason, Reason::Halt);
    assert_eq!(bench.machine.console_credit(2, 1).unwrap_err().code(), "ERR_CONSOLE_PORT");
    assert_eq!(bench.machine.console_credit(0, 1).unwrap_err().code(), "ERR_CONSOLE_PORT");
}

#[test]
fn input_reaches_the_guest_in_order_however_much() {
    let input = text(100_000);
    let bench = Bench::started(vec![vec![Step::Echo(input.len()), Step::HaltForGood]]);
    let (mut sent, mut output, mut drains) = (0, Vec::new(), 0);
    let mut full = false;
    while output.len() < input.len() {
        if !full && sent < input.len() {
            let taken = bench.machine.console_write(1, &input[sent..]).unwrap();
            full = taken < input.len() - sent;
            sent += taken;
        }
        match bench.told.recv_timeout(PATIENCE).expect("an echo") {
            Told::Console(_, data) => {
                bench.machine.console_credit(1, data.len()).unwrap();
                output.extend(data);
            }
            Told::Event(Event::ConsoleDrain { port: 1 }) => (full, drains) = (false, drains + 1),
            Told::Event(_) => {}
        }
    }
    assert_eq!(output, input);
    assert!(drains > 0, "more than the queue holds was sent");
    assert_eq!(bench.machine.console_write(5, b"x").unwrap_err().code(), "ERR_CONSOLE_PORT");
}

fn with_file(path: &std::path::Path, length: usize) -> Bench {
    let bench = Bench::with(vec![vec![Step::Print(text(length)), Step::HaltForGood]], |spec| {
        spec["devices"]["0:31:0"]["com1"] = json!({ "kind": "file", "path": path });
    });
    bench.machine.call(Command::Start).unwrap();
    bench
}

#[test]
fn a_file_takes_the_output() {
    let log = scratch("log");
    std::fs::write(&log, "what was there before").unwrap();
    let bench = with_file(&log, 100_000);
    assert_eq!(bench.end().reason, Reason::Halt);
    assert_eq!(std::fs::read(&log).unwrap(), text(100_000));
    assert_eq!(bench.machine.console_write(1, b"x").unwrap_err().code(), "ERR_CONSOLE_PORT");
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn a_full_disk_is_told_once_and_the_guest_goes_on() {
    let bench = with_file(std::path::Path::new("/dev/full"), 100_000);
    let told = told_until_exit(&bench);
    let errors: Vec<_> = told
        .iter()
        .filter_map(|told| match told {
            Told::Event(Event::SerialError { port, message }) => Some((*port, message.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(errors.len(), 1, "{told:?}");
    assert!(errors[0].0 == 1 && errors[0].1.contains("No space left"), "{errors:?}");
}

#[test]
fn a_pipe_that_nobody_reads_blocks_neither_creation_nor_the_end() {
    let pipe = scratch("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // A reader that sleeps: the pipe fills, the guest waits, and the machine can still be killed.
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let bench = with_file(&pipe, 1 << 20);
    let mut first = [0; 1000];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(first[..], text(1000));
    bench.machine.call(Command::Kill).unwrap();
    assert_eq!(bench.end().reason, Reason::Killed);
    std::fs::remove_file(&pipe).unwrap();
}
