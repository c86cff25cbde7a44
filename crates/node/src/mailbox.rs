//! From the engine's threads to JavaScript's: one queue, in order, with a doorbell.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use napi::bindgen_prelude::{Buffer, FnArgs, Function, FunctionRef, Result};
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi::{Env, Status};
use skep_machine::{Event, EventSink};

/// Rings on JavaScript's thread. Does not keep Node alive by itself.
type Doorbell = ThreadsafeFunction<(), (), (), Status, false, true, 4>;

/// Largest piece of output in one call, in bytes.
const LARGEST: usize = 64 * 1024;

enum Item {
    /// An event as JSON.
    Event(String),
    /// The last one.
    Exit(String),
    Console(u32, Vec<u8>),
}

/// JavaScript's functions.
struct Callbacks {
    on_event: FunctionRef<String, ()>,
    on_console: FunctionRef<FnArgs<(u32, Buffer)>, ()>,
}

/// What keeps Node alive.
struct Anchor {
    /// A thread-safe function that is never called; while it is referenced, the event loop turns.
    hold: Doorbell,
    /// The owner wants a running machine to keep Node alive.
    wanted: bool,
    /// The machine runs, or its exit has not been delivered.
    live: bool,
}

/// One machine's way to JavaScript.
pub(crate) struct Mailbox {
    queue: Mutex<VecDeque<Item>>,
    /// The doorbell has rung and nobody has come yet.
    rung: AtomicBool,
    /// A start was refused: nothing will ever run.
    let_go: AtomicBool,
    doorbell: OnceLock<Doorbell>,
    callbacks: Mutex<Option<Arc<Callbacks>>>,
    anchor: Mutex<Option<Anchor>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mailbox {
    /// A mailbox that is emptied into these functions.
    pub(crate) fn new(
        env: &Env,
        on_event: Function<'_, String, ()>,
        on_console: Function<'_, FnArgs<(u32, Buffer)>, ()>,
    ) -> Result<Arc<Self>> {
        let callbacks = Callbacks { on_event: on_event.create_ref()?, on_console: on_console.create_ref()? };
        let mailbox = Arc::new(Self {
            queue: Mutex::default(),
            rung: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            doorbell: OnceLock::new(),
            callbacks: Mutex::new(Some(Arc::new(callbacks))),
            anchor: Mutex::new(None),
        });
        // The function must not hold the mailbox, which holds the doorbell, which holds the function.
        let weak: Weak<Self> = Arc::downgrade(&mailbox);
        let answer: Function<'_, (), ()> = env.create_function_from_closure("deliver", move |context| {
            if let Some(mailbox) = weak.upgrade() {
                mailbox.deliver(context.env);
            }
            Ok(())
        })?;
        let bell = || -> Result<Doorbell> {
            answer.build_threadsafe_function::<()>().weak::<true>().max_queue_size::<4>().build()
        };
        // Set once, here.
        let _ = mailbox.doorbell.set(bell()?);
        *lock(&mailbox.anchor) = Some(Anchor { hold: bell()?, wanted: true, live: false });
        Ok(mailbox)
    }

    fn put(&self, item: Item) {
        lock(&self.queue).push_back(item);
        if !self.rung.swap(true, Ordering::SeqCst)
            && let Some(doorbell) = self.doorbell.get()
        {
            // An environment that is closing hears nothing any more; a full queue means that it will come anyway.
            let _ = doorbell.call((), ThreadsafeFunctionCallMode::NonBlocking);
        }
    }

    /// Gives JavaScript everything that waits. An exception in a callback is an uncaught one, and the rest still comes.
    pub(crate) fn deliver(&self, env: &Env) {
        self.rung.store(false, Ordering::SeqCst);
        if self.let_go.swap(false, Ordering::SeqCst) {
            self.report(env, self.set_live(env, false));
        }
        loop {
            let Some(item) = lock(&self.queue).pop_front() else { return };
            let Some(callbacks) = lock(&self.callbacks).clone() else { continue };
            match item {
                Item::Console(port, data) => {
                    let data = self.gather_output(port, data);
                    let call = callbacks.on_console.borrow_back(env);
                    self.report(env, call.and_then(|call| call.call((port, Buffer::from(data)).into())));
                }
                Item::Event(event) => {
                    let events = self.gather_events(event);
                    let call = callbacks.on_event.borrow_back(env);
                    self.report(env, call.and_then(|call| call.call(events)));
                }
                Item::Exit(event) => {
                    let call = callbacks.on_event.borrow_back(env);
                    self.report(env, call.and_then(|call| call.call(format!("[{event}]"))));
                    self.report(env, self.set_live(env, false));
                }
            }
        }
    }

    /// `data` and the output of the same console behind it.
    fn gather_output(&self, port: u32, mut data: Vec<u8>) -> Vec<u8> {
        let mut queue = lock(&self.queue);
        while let Some(Item::Console(next, more)) = queue.front()
            && *next == port
            && data.len() + more.len() <= LARGEST
        {
            data.extend(more);
            queue.pop_front();
        }
        data
    }

    /// `event` and the events behind it, as a JSON array.
    fn gather_events(&self, event: String) -> String {
        let mut events = format!("[{event}");
        let mut queue = lock(&self.queue);
        while let Some(Item::Event(next)) = queue.front() {
            events.push(',');
            events.push_str(next);
            queue.pop_front();
        }
        events.push(']');
        events
    }

    fn report(&self, env: &Env, result: Result<()>) {
        if let Err(error) = result {
            env.fatal_exception(error);
        }
    }

    /// Whether the machine lives, as far as JavaScript has been told.
    pub(crate) fn set_live(&self, env: &Env, live: bool) -> Result<()> {
        self.change(env, |anchor| anchor.live = live)
    }

    /// Whether a living machine is to keep Node alive.
    pub(crate) fn set_wanted(&self, env: &Env, wanted: bool) -> Result<()> {
        self.change(env, |anchor| anchor.wanted = wanted)
    }

    /// From any thread: with the next delivery, the machine counts as not living.
    pub(crate) fn let_go_at_settling(&self) {
        self.let_go.store(true, Ordering::SeqCst);
    }

    #[expect(
        deprecated,
        reason = "the only way to change a thread-safe function's hold on the event loop later"
    )]
    fn change(&self, env: &Env, change: impl FnOnce(&mut Anchor)) -> Result<()> {
        let mut anchor = lock(&self.anchor);
        let Some(anchor) = anchor.as_mut() else { return Ok(()) };
        change(anchor);
        if anchor.wanted && anchor.live { anchor.hold.refer(env) } else { anchor.hold.unref(env) }
    }

    /// Lets go of Node and of the callbacks, after the last delivery.
    pub(crate) fn close(&self, env: &Env) -> Result<()> {
        self.set_live(env, false)?;
        lock(&self.anchor).take();
        lock(&self.callbacks).take();
        Ok(())
    }
}

impl EventSink for Mailbox {
    fn event(&self, event: Event) {
        let json = serde_json::to_string(&event).unwrap_or_default();
        self.put(if matches!(event, Event::Exit { .. }) { Item::Exit(json) } else { Item::Event(json) });
    }

    fn console(&self, port: u32, data: &[u8]) {
        self.put(Item::Console(port, data.to_vec()));
    }
}
