//! Compares the interpreter with the processor it runs on, for as long as one likes. See `docs/oracle.md`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use skep_cpu::oracle::Oracle;
use skep_cpu::oracle::blocks::{Blocks, Level};
use skep_cpu::oracle::generate::Generator;
use skep_cpu::oracle::small::SmallBlocks;

const HELP: &str = "oracle [--seed N] [--cases N] [--only NAME] [--keep-going N]
  --seed N        which cases (default 1)
  --cases N       how many (default 1000000)
  --only NAME     only instruction codes whose name contains NAME (such as `pshufb` or `VEX_`)
  --keep-going N  stop after N differences (default 1)
  --engine NAME   interpreter (default) or jit
  --block N       runs of up to N instructions (2 to 8) through the JIT, compared with the interpreter, a share of the
                  cases at each level of what the JIT may do
  --bits 32       those runs are of 32-bit code";

struct Options {
    seed: u64,
    cases: u64,
    only: Option<String>,
    keep_going: u64,
    jit: bool,
    block: usize,
    small: bool,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { seed: 1, cases: 1_000_000, only: None, keep_going: 1, jit: false, block: 0, small: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{name} {value}: {e}"));
        match name.as_str() {
            "--seed" => options.seed = number()?,
            "--cases" => options.cases = number()?,
            "--keep-going" => options.keep_going = number()?,
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

/// Runs of several instructions.
fn run_blocks(options: &Options) -> Result<u64, skep_cpu::oracle::OracleError> {
    let mut found = 0;
    for level in Level::ALL {
        let share = options.cases.div_ceil(Level::ALL.len() as u64);
        let mut blocks = Blocks::new(options.seed, options.only.as_deref(), options.block, level)?;
        let started = Instant::now();
        let done = blocks.run_many(
            share,
            |_| {},
            |difference| {
                found += 1;
                println!("difference {found} ({level:?}): {}", difference.text);
                found < options.keep_going
            },
        )?;
        let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-6);
        println!(
            "{level:?}: {done} runs of up to {} instructions, {found} differences, {rate:.0}/s",
            options.block
        );
        if found >= options.keep_going {
            break;
        }
    }
    Ok(found)
}

/// The same of 32-bit code.
fn run_small_blocks(options: &Options) -> Result<u64, skep_cpu::oracle::OracleError> {
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

fn run(options: &Options) -> Result<u64, skep_cpu::oracle::OracleError> {
    if options.small {
        return run_small_blocks(options);
    }
    if options.block > 0 {
        return run_blocks(options);
    }
    let mut oracle = if options.jit { Oracle::translator()? } else { Oracle::new()? };
    let mut generator = Generator::new(options.seed, options.only.as_deref());
    eprintln!("seed {}, {} cases from {} instruction codes", options.seed, options.cases, generator.codes());
    let started = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    let mut shown = Instant::now();
    let mut found = 0;
    let rate = |done: u64| done as f64 / started.elapsed().as_secs_f64().max(1e-6);
    let progress = |done: u64| {
        if shown.elapsed().as_secs() >= if terminal { 1 } else { 10 } {
            shown = Instant::now();
            let end = if terminal { "\r" } else { "\n" };
            eprint!("{done} of {} cases, {:.0}/s{end}", options.cases, rate(done));
            let _ = std::io::stderr().flush();
        }
    };
    let done = oracle.run_many(&mut generator, options.cases, progress, |finding| {
        found += 1;
        println!("difference {found}: {}", finding.describe());
        found < options.keep_going
    })?;
    println!("{done} cases, {found} differences, {:.0} cases/s", rate(done));
    Ok(found)
}
