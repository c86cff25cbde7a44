//! Compares the interpreter with the processor it runs on, for as long as one likes. See `docs/oracle.md`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use skep_cpu::oracle::blocks::{Blocks, Counts, Level};
use skep_cpu::oracle::generate::Generator;
use skep_cpu::oracle::random::Random;
use skep_cpu::oracle::small::SmallBlocks;
use skep_cpu::oracle::{Oracle, OracleError};

const HELP: &str = "oracle [--seed N] [--cases N] [--only NAME] [--keep-going N] [--jobs N] [--engine NAME] [--block N]
  --seed N        which cases (default 1)
  --cases N       how many (default 1000000)
  --only NAME     only instruction codes whose name contains NAME (such as `pshufb` or `VEX_`)
  --keep-going N  stop after N differences (default 1)
  --jobs N        share the cases among N threads (default 1), each with a seed of its own that follows from the given one
  --engine NAME   interpreter (default) or jit
  --block N       runs of up to N instructions (2 to 8) through the JIT, compared with the interpreter from many states
                  each, a share of the cases at each level of what the JIT may do
  --bits 32       those runs are of 32-bit code";

/// Cases between two looks at what the others do.
const SLICE: u64 = 8192;

struct Options {
    seed: u64,
    cases: u64,
    only: Option<String>,
    keep_going: u64,
    jobs: u64,
    jit: bool,
    block: usize,
    small: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        seed: 1,
        cases: 1_000_000,
        only: None,
        keep_going: 1,
        jobs: 1,
        jit: false,
        block: 0,
        small: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--help" {
            return Err("Compares the interpreter with the processor it runs on, or with the JIT.".into());
        }
        let value = arguments.next().ok_or_else(|| format!("{name} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{name} {value}: {e}"));
        match name.as_str() {
            "--seed" => options.seed = number()?,
            "--cases" => options.cases = number()?,
            "--keep-going" => options.keep_going = number()?,
            "--jobs" => options.jobs = number()?.clamp(1, 1024),
            "--only" => options.only = Some(value),
            "--engine" if value == "jit" => options.jit = true,
            "--engine" if value == "interpreter" => options.jit = false,
            "--block" => options.block = number()? as usize,
            "--bits" => options.small = number()? == 32,
            _ => return Err(format!("{name} is not an option")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}\n{HELP}");
            return ExitCode::from(4);
        }
    };
    match run(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(4)
        }
    }
}

/// How far all threads have come.
struct Together<'a> {
    options: &'a Options,
    started: Instant,
    done: AtomicU64,
    found: AtomicU64,
    /// A thread could not go on.
    failed: AtomicU64,
    shown: Mutex<Instant>,
}

impl<'a> Together<'a> {
    fn new(options: &'a Options) -> Self {
        let now = Instant::now();
        let [done, found, failed] = [0; 3].map(AtomicU64::new);
        Self { options, started: now, done, found, failed, shown: Mutex::new(now) }
    }

    /// Whether nobody has a reason to stop.
    fn goes_on(&self) -> bool {
        let found = self.found.load(Ordering::Relaxed);
        self.failed.load(Ordering::Relaxed) == 0 && (found == 0 || found < self.options.keep_going)
    }

    fn rate(&self) -> f64 {
        self.done.load(Ordering::Relaxed) as f64 / self.started.elapsed().as_secs_f64().max(1e-6)
    }

    /// Counts cases, and says on stderr now and then how many there are.
    fn add(&self, cases: u64) {
        let done = self.done.fetch_add(cases, Ordering::Relaxed) + cases;
        let terminal = std::io::stderr().is_terminal();
        let Ok(mut shown) = self.shown.try_lock() else { return };
        if shown.elapsed() >= Duration::from_secs(if terminal { 1 } else { 10 }) {
            *shown = Instant::now();
            let end = if terminal { "\r" } else { "\n" };
            eprint!("{done} of {} cases, {:.0}/s{end}", self.options.cases, self.rate());
            let _ = std::io::stderr().flush();
        }
    }

    /// Prints a difference; whether to go on.
    fn found(&self, text: &str) -> bool {
        let number = self.found.fetch_add(1, Ordering::Relaxed) + 1;
        println!("difference {number}{text}");
        number < self.options.keep_going
    }
}

/// One thread's part.
#[derive(Clone, Copy)]
struct Job {
    seed: u64,
    cases: u64,
}

/// The part of thread `n`: the first has the seed itself.
fn job(options: &Options, n: u64) -> Job {
    let seed = if n == 0 { options.seed } else { Random::new(options.seed.wrapping_add(n << 40)).next() };
    Job { seed, cases: part(options.cases, n, options.jobs) }
}

/// The `n`th of `of` parts of a number.
fn part(all: u64, n: u64, of: u64) -> u64 {
    let until = |n: u64| (u128::from(all) * u128::from(n) / u128::from(of)) as u64;
    until(n + 1) - until(n)
}

/// Compares in slices until all is done or somebody has a reason to stop.
fn in_slices(
    together: &Together,
    cases: u64,
    mut slice: impl FnMut(u64) -> Result<u64, OracleError>,
) -> Result<(), OracleError> {
    let mut left = cases;
    while left > 0 && together.goes_on() {
        let done = slice(left.min(SLICE))?;
        left -= done.min(left);
        together.add(done);
    }
    Ok(())
}

/// Single instructions.
fn singles(together: &Together, job: Job) -> Result<Counts, OracleError> {
    let options = together.options;
    let mut oracle = if options.jit { Oracle::translator()? } else { Oracle::new()? };
    let mut generator = Generator::new(job.seed, options.only.as_deref());
    let mut counts = Counts::default();
    in_slices(together, job.cases, |cases| {
        let found = |f: skep_cpu::oracle::Finding| together.found(&format!(": {}", f.describe()));
        let done = oracle.run_many(&mut generator, cases, found)?;
        counts.cases += done;
        Ok(done)
    })?;
    Ok(counts)
}

/// Runs of several instructions, at each level in turn.
fn blocks(together: &Together, job: Job) -> Result<Counts, OracleError> {
    let options = together.options;
    let mut counts = Counts::default();
    for (n, level) in Level::ALL.into_iter().enumerate() {
        let mut blocks = Blocks::new(job.seed, options.only.as_deref(), options.block, level)?;
        in_slices(together, part(job.cases, n as u64, Level::ALL.len() as u64), |cases| {
            let found = |f: skep_cpu::oracle::blocks::Found| {
                together.found(&format!(" ({level:?}, seed {}):\n{}", job.seed, f.text))
            };
            let done = blocks.run_many(cases, found)?;
            counts += done;
            Ok(done.cases)
        })?;
    }
    Ok(counts)
}

/// Compares everything; how many differences there were.
fn run(options: &Options) -> Result<u64, OracleError> {
    let codes = Generator::new(options.seed, options.only.as_deref()).codes();
    if options.small {
        return run_small_blocks(options);
    }
    eprintln!("seed {}, {} cases from {codes} instruction codes", options.seed, options.cases);
    let together = Together::new(options);
    let work = |n: u64| {
        let job = job(options, n);
        let result = if options.block > 0 { blocks(&together, job) } else { singles(&together, job) };
        together.failed.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
        result
    };
    let results: Vec<_> = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..options.jobs).map(|n| scope.spawn(move || work(n))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut counts = Counts::default();
    for result in results {
        counts += result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    let found = together.found.load(Ordering::Relaxed);
    summary(options, counts, found, together.rate());
    Ok(found)
}

/// The same of 32-bit code.
fn run_small_blocks(options: &Options) -> Result<u64, OracleError> {
    for level in Level::ALL {
        let share = options.cases.div_ceil(Level::ALL.len() as u64);
        let mut blocks = SmallBlocks::new(options.seed, options.block.max(1), level)?;
        if let Some(difference) = blocks.run_many(share)? {
            println!("difference ({level:?}): {}", difference.text);
            return Ok(1);
        }
        println!("{level:?}: {share} runs of up to {} instructions, 0 differences", options.block.max(1));
    }
    Ok(0)
}

fn summary(options: &Options, counts: Counts, found: u64, rate: f64) {
    let Counts { cases, runs, faults } = counts;
    if options.block > 0 {
        let percent = 100.0 * faults as f64 / cases.max(1) as f64;
        let most = options.block;
        println!(
            "{cases} cases ({runs} runs of up to {most} instructions, {percent:.0}% end in a fault), {found} differences, {rate:.0} cases/s"
        );
    } else {
        println!("{cases} cases, {found} differences, {rate:.0} cases/s");
    }
}
