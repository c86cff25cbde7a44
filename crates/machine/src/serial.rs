//! What is behind the serial ports. One thread a machine, the pump, carries bytes between the UARTs and their back ends,
//! so that no vCPU ever waits for a file or for the owner. It gathers output for a few milliseconds before it passes it
//! on. A back end that does not keep up leaves output in the UART, whose transmitter then reads as busy: the guest waits,
//! and can still be paused and killed.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use skep_chipset::Uart;
use skep_hv::irq::Signal;

use crate::board::Board;
use crate::bus::lock;
use crate::error::Error;
use crate::event::{Event, EventSink};
use crate::spec::Serial;

/// Most bytes of one console's output that its owner has been given and has not credited back.
pub const CONSOLE_WINDOW: usize = 256 * 1024;
/// Most bytes of input that wait for a guest to read them.
const INPUT_CAPACITY: usize = 64 * 1024;
/// How long output is gathered.
const LINGER: Duration = Duration::from_millis(4);
/// When a pipe that took nothing is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// A port's back end.
enum BackEnd {
    Console,
    File(File),
    None,
}

/// The state of one port.
#[derive(Default)]
struct Port {
    /// The UART may have output.
    output_ready: bool,
    /// The UART may have room for input.
    input_ready: bool,
    /// Console: bytes out and not yet credited.
    uncredited: usize,
    /// Input that the UART has had no room for.
    input: VecDeque<u8>,
    /// The owner was told to wait for a drain event.
    input_full: bool,
}

#[derive(Default)]
struct State {
    ports: [Port; 4],
    /// Flushes asked for and done.
    flush: u64,
    flushed: u64,
    quit: bool,
}

/// The ports' side that other threads reach.
pub(crate) struct SerialPorts {
    state: Mutex<State>,
    changed: Condvar,
    flush_done: Condvar,
    console: [bool; 4],
}

/// A UART's way to call the pump.
struct Attention {
    ports: Arc<SerialPorts>,
    port: usize,
}

impl Signal for Attention {
    fn signal(&self) {
        let mut state = lock(&self.ports.state);
        let port = &mut state.ports[self.port];
        port.output_ready = true;
        port.input_ready = true;
        self.ports.changed.notify_one();
    }
}

impl SerialPorts {
    pub(crate) fn new(spec: [&Serial; 4]) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            flush_done: Condvar::new(),
            console: spec.map(|serial| matches!(serial, Serial::Console {})),
        })
    }

    /// What the four UARTs are to signal.
    pub(crate) fn attention(self: &Arc<Self>) -> [Arc<dyn Signal>; 4] {
        std::array::from_fn(|port| Arc::new(Attention { ports: self.clone(), port }) as Arc<dyn Signal>)
    }

    /// Index of console `port` (1 to 4).
    fn index(&self, port: u32) -> Result<usize, Error> {
        let index = usize::try_from(port).ok().and_then(|port| port.checked_sub(1));
        index.filter(|&at| self.console.get(at) == Some(&true)).ok_or(Error::NoConsole { port })
    }

    /// Sends `data` to the guest; returns how many bytes were taken. When fewer than all, an event says when there is
    /// room again.
    pub(crate) fn write(&self, port: u32, data: &[u8]) -> Result<usize, Error> {
        let index = self.index(port)?;
        let mut state = lock(&self.state);
        let port = &mut state.ports[index];
        let taken = data.len().min(INPUT_CAPACITY - port.input.len());
        port.input.extend(&data[..taken]);
        port.input_full |= taken < data.len();
        port.input_ready = true;
        self.changed.notify_one();
        Ok(taken)
    }

    /// The owner has dealt with `bytes` of output.
    pub(crate) fn credit(&self, port: u32, bytes: usize) -> Result<(), Error> {
        let index = self.index(port)?;
        let mut state = lock(&self.state);
        let port = &mut state.ports[index];
        port.uncredited = port.uncredited.saturating_sub(bytes);
        if port.output_ready {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Passes on all output that the UARTs hold, whatever the credit, and returns when that is done.
    pub(crate) fn flush(&self) {
        let mut state = lock(&self.state);
        state.flush += 1;
        let wanted = state.flush;
        self.changed.notify_one();
        while state.flushed < wanted && !state.quit {
            state = self.flush_done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes the pump return.
    pub(crate) fn quit(&self) {
        lock(&self.state).quit = true;
        self.changed.notify_one();
        self.flush_done.notify_all();
    }
}

/// The pump: the thread's own half.
pub(crate) struct Pump {
    ports: Arc<SerialPorts>,
    back_ends: [BackEnd; 4],
    /// Bytes that a pipe would not take yet.
    held: [Vec<u8>; 4],
    sink: Arc<dyn EventSink>,
}

impl Pump {
    /// Opens the back ends.
    pub(crate) fn open(
        ports: Arc<SerialPorts>,
        spec: [&Serial; 4],
        sink: Arc<dyn EventSink>,
    ) -> Result<Self, Error> {
        let mut back_ends = [const { BackEnd::None }; 4];
        for ((back_end, serial), number) in back_ends.iter_mut().zip(spec).zip(1..) {
            *back_end = match serial {
                Serial::Console {} => BackEnd::Console,
                Serial::File { path } => BackEnd::File(open(number, path)?),
                Serial::None {} => BackEnd::None,
            };
        }
        Ok(Self { ports, back_ends, held: Default::default(), sink })
    }

    /// The thread.
    pub(crate) fn run(mut self, board: &Board) {
        let ports = self.ports.clone();
        loop {
            let mut state = self.wait(lock(&ports.state));
            let (quit, flush) = (state.quit, state.flush);
            let all = flush > state.flushed;
            for index in 0..4 {
                let port = &mut state.ports[index];
                let input = port.input_ready && !port.input.is_empty();
                let output = port.output_ready && self.may_take(index, port);
                // Before the UART is looked at, so that what comes later raises them again.
                port.input_ready &= !input;
                port.output_ready &= !output;
                drop(state);
                if input {
                    self.input(index, board);
                }
                self.write_held(index, all);
                if output || all {
                    let data = board.bus.with(&board.uarts[index], |uart, _| uart.take_output());
                    self.output(index, data);
                }
                state = lock(&ports.state);
            }
            if all {
                state.flushed = flush;
                ports.flush_done.notify_all();
            }
            if quit {
                return;
            }
        }
    }

    /// Whether output of a port may be taken from its UART now.
    fn may_take(&self, index: usize, port: &Port) -> bool {
        match self.back_ends[index] {
            BackEnd::Console => port.uncredited + Uart::OUTPUT_CAPACITY <= CONSOLE_WINDOW,
            BackEnd::File(_) => self.held[index].is_empty(),
            BackEnd::None => true,
        }
    }

    /// Sleeps until there is something to do, and a little longer if that is output, which is gathered.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let started = Instant::now();
        let mut output_since: Option<Instant> = None;
        loop {
            let input = state.ports.iter().any(|port| port.input_ready && !port.input.is_empty());
            if input || state.quit || state.flush > state.flushed {
                return state;
            }
            let mut ports = state.ports.iter().enumerate();
            let output = ports.any(|(index, port)| port.output_ready && self.may_take(index, port));
            let held = self.held.iter().any(|held| !held.is_empty());
            let until = if output {
                *output_since.get_or_insert_with(Instant::now) + LINGER
            } else if held {
                started + RETRY
            } else {
                state = self.ports.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let sleep = until.saturating_duration_since(Instant::now());
            if sleep.is_zero() {
                return state;
            }
            state = self.ports.changed.wait_timeout(state, sleep).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Moves waiting input into the UART, and tells an owner that waits for room when there is some.
    fn input(&self, index: usize, board: &Board) {
        loop {
            let mut chunk = [0; 64];
            let state = lock(&self.ports.state);
            let waiting = &state.ports[index].input;
            let length = waiting.len().min(chunk.len());
            chunk.iter_mut().zip(waiting).for_each(|(to, from)| *to = *from);
            drop(state);
            let taken =
                board.bus.with(&board.uarts[index], |uart, _| uart.push_input(&chunk[..length])).min(length);
            let mut state = lock(&self.ports.state);
            let port = &mut state.ports[index];
            port.input.drain(..taken);
            let drained = port.input_full && port.input.len() <= INPUT_CAPACITY / 2;
            port.input_full &= !drained;
            drop(state);
            if drained {
                self.sink.event(Event::ConsoleDrain { port: index as u32 + 1 });
            }
            // A UART that refused some signals when it has room.
            if length == 0 || taken < length {
                return;
            }
        }
    }

    /// Tries again to write what a pipe would not take; the last time, what it does not take then is lost.
    fn write_held(&mut self, index: usize, last: bool) {
        let held = std::mem::take(&mut self.held[index]);
        self.output(index, held);
        if last {
            self.held[index].clear();
        }
    }

    /// Hands output to the back end.
    fn output(&mut self, index: usize, data: Vec<u8>) {
        if data.is_empty() {
            return;
        }
        let port = index as u32 + 1;
        match &mut self.back_ends[index] {
            BackEnd::Console => {
                lock(&self.ports.state).ports[index].uncredited += data.len();
                self.sink.console(port, &data);
            }
            BackEnd::File(file) => match write(file, &data) {
                Ok(written) => self.held[index] = data[written..].to_vec(),
                Err(error) => {
                    self.back_ends[index] = BackEnd::None;
                    let message =
                        format!("com{port}: writing to its file failed, further output is dropped: {error}");
                    self.sink.event(Event::SerialError { port, message });
                }
            },
            BackEnd::None => {}
        }
    }
}

impl Drop for Pump {
    /// However it ends, nobody may wait for it any more.
    fn drop(&mut self) {
        self.ports.quit();
    }
}

/// Writes until all is written or a pipe is full.
fn write(file: &mut File, data: &[u8]) -> std::io::Result<usize> {
    let mut written = 0;
    while written < data.len() {
        match file.write(&data[written..]) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

fn open(port: u32, path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    // Non-blocking, because opening a pipe without a reader, or writing to one whose reader sleeps, would hold us for ever;
    // appending, so that a log that is cut while we write does not get a hole.
    options
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|source| Error::serial_file(port, path, source))
}
