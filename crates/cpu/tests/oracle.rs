//! A bounded run of the differential oracle: see `docs/oracle.md` for the unbounded one.

use skep_cpu::oracle::Oracle;
use skep_cpu::oracle::blocks::{Blocks, Level};
use skep_cpu::oracle::generate::Generator;

/// Cases in a release build; debug builds check a tenth.
const CASES: u64 = if cfg!(debug_assertions) { 20_000 } else { 200_000 };

#[test]
fn the_interpreter_does_what_this_processor_does() {
    let mut oracle = Oracle::new().expect("both sides start");
    let mut generator = Generator::new(1, None);
    let mut findings = Vec::new();
    let done = oracle
        .run_many(&mut generator, CASES, |finding| {
            findings.push(finding.describe());
            findings.len() < 5
        })
        .expect("both sides go on");
    assert!(findings.is_empty(), "after {done} cases:\n{}", findings.join("\n"));
    assert_eq!(done, CASES);
}

/// Names of instructions whose corners were wrong once.
const DELICATE: [&str; 31] = [
    "idiv", "gather", "maskmov", "xsave", "xrstor", "fxsave", "fxrstor", "rol_", "ror_", "scas", "cmps",
    "movs", "call_rm", "cmpxchg", "ins", "outs", "fstp_m80", "fbstp", "fnstenv", "fnsave", "movq_m",
    "movntq", "cvtps2ph", "cvtpd2pi", "push", "pop", "ret", "enter", "leave", "evex_", "vex_k",
];

#[test]
fn delicate_instructions_do_too() {
    let mut oracle = Oracle::new().expect("both sides start");
    for name in DELICATE {
        let mut generator = Generator::new(2, Some(name));
        assert!(generator.codes() > 0, "{name}");
        let mut found = None;
        oracle
            .run_many(&mut generator, CASES / 50, |finding| {
                found = Some(finding.describe());
                false
            })
            .expect("both sides go on");
        assert!(found.is_none(), "{name}: {}", found.unwrap_or_default());
    }
}

#[test]
fn a_seed_names_the_same_cases_each_time() {
    let mut generators = [Generator::new(7, None), Generator::new(7, None)];
    for _ in 0..1000 {
        let [a, b] = generators.each_mut().map(Generator::next_case);
        assert_eq!(a, b);
    }
    let other = Generator::new(8, None).next_case();
    assert_ne!(other, Generator::new(7, None).next_case());
}

#[test]
fn the_translator_does_what_this_processor_does() {
    let mut oracle = Oracle::translator().expect("both sides start");
    let mut generator = Generator::new(3, None);
    let mut found = Vec::new();
    let keep_going = |finding: skep_cpu::oracle::Finding| {
        found.push(finding.describe());
        found.len() < 5
    };
    oracle.run_many(&mut generator, CASES / 4, keep_going).expect("both sides go on");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn translated_blocks_do_what_their_instructions_do() {
    for (seed, level) in Level::ALL.into_iter().enumerate() {
        let mut blocks = Blocks::new(seed as u64, None, 8, level).expect("both sides start");
        let mut found = None;
        let keep_going = |difference: skep_cpu::oracle::blocks::Found| {
            found = Some(difference.text);
            false
        };
        blocks.run_many(CASES / 4, keep_going).expect("both sides go on");
        assert!(found.is_none(), "{level:?}: {}", found.unwrap_or_default());
    }
}
