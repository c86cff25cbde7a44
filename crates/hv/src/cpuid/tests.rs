use std::collections::BTreeSet;

use super::super::features::{Giver, Register, position};
use super::super::{Processor, host};
use super::*;

/// Every bit of every leaf.
fn everything() -> CpuidTable {
    let all = CpuidLeaf { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX };
    let mut table = CpuidTable::default();
    for function in (0..0x20).chain(0x4000_0000..0x4000_0002).chain(0x8000_0000..0x8000_0030) {
        for index in 0..4 {
            table.set(function, index, all);
        }
    }
    table
}

/// A table in the form of `hosts/`, with TSC-deadline as a back end adds it.
fn parse(text: &str) -> CpuidTable {
    let mut table = CpuidTable::default();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<u32> =
            line.split_whitespace().map(|word| u32::from_str_radix(word, 16).unwrap()).collect();
        let &[function, index, eax, ebx, ecx, edx] = words.as_slice() else { panic!("{line}") };
        table.set(function, index, CpuidLeaf { eax, ebx, ecx, edx });
    }
    let mut basic = table.get(1, 0).unwrap();
    basic.ecx |= 1 << 24;
    table.set(1, 0, basic);
    table
}

fn svm() -> CpuidTable {
    parse(include_str!("hosts/svm.txt"))
}

/// The same with leaves 8000_001DH and 8000_001EH, as EPYC processors have them.
fn epyc() -> CpuidTable {
    let mut table = svm();
    let leaf = table.get(0x8000_0001, 0).unwrap();
    table.set(0x8000_0001, 0, CpuidLeaf { ecx: leaf.ecx | TOPOEXT, ..leaf });
    table
}

fn pvm() -> CpuidTable {
    parse(include_str!("hosts/pvm.txt"))
}

fn features(wishes: &[(&str, bool)]) -> BTreeMap<String, bool> {
    wishes.iter().map(|&(name, on)| (name.to_owned(), on)).collect()
}

fn software() -> PolicyOptions {
    PolicyOptions::default()
}

fn hardware(model: Model) -> PolicyOptions {
    PolicyOptions { provider: Provider::Hardware, model, ..PolicyOptions::default() }
}

fn feature(name: &str) -> &'static super::super::Feature {
    &FEATURES[position(name).expect(name)]
}

fn has(table: &CpuidTable, name: &str) -> bool {
    feature(name).is_in(table)
}

fn add(table: &mut CpuidTable, name: &str) {
    let feature = feature(name);
    let mut leaf = table.get(feature.function, feature.index).unwrap_or_default();
    *leaf.register_mut(feature.register) |= 1 << feature.bit;
    table.set(feature.function, feature.index, leaf);
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// True `percent` times out of a hundred.
    fn chance(&mut self, percent: u64) -> bool {
        self.next() >> 33 & 0xffff < percent * 0x1_0000 / 100
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() >> 33) as usize % from.len()]
    }

    /// A back end's table: features there with `percent`, the rest of all leaves noise.
    fn host(&mut self, percent: u64) -> CpuidTable {
        let mut table = CpuidTable::default();
        for (function, _, leaf) in everything().iter().filter(|leaf| leaf.1 == 0) {
            let mut noise = || self.next() as u32 & self.next() as u32;
            let [eax, ebx, ecx, edx] = [noise(), noise(), noise(), noise()];
            table.set(
                function,
                0,
                CpuidLeaf {
                    eax: leaf.eax & eax,
                    ebx: leaf.ebx & ebx,
                    ecx: leaf.ecx & ecx,
                    edx: leaf.edx & edx,
                },
            );
        }
        let vendor =
            self.pick(&[INTEL, CpuidLeaf { eax: 0, ebx: 0x6874_7541, ecx: 0x444d_4163, edx: 0x6974_6e65 }]);
        if self.chance(90) {
            table.set(0, 0, vendor);
        }
        for feature in FEATURES {
            let mut leaf = table.get(feature.function, feature.index).unwrap_or_default();
            let there = feature.giver == Giver::Base || self.chance(percent);
            let register = leaf.register_mut(feature.register);
            *register = *register & !(1 << feature.bit) | if there { 1 << feature.bit } else { 0 };
            table.set(feature.function, feature.index, leaf);
        }
        let mut basic = table.get(1, 0).unwrap();
        basic.ecx |= if self.chance(90) { 1 << 27 } else { 0 };
        table.set(1, 0, basic);
        let components = self.pick(&[INTEL_LAYOUT, AMD_LAYOUT]);
        let xcr0 = if self.chance(50) { 0x2e7 } else { self.next() as u32 };
        table.set(0xd, 0, CpuidLeaf { eax: xcr0, ebx: self.pick(&[576, 832, 2696]), ecx: 2696, edx: 0 });
        for &(number, eax, ebx) in components {
            let (eax, ebx) = if self.chance(95) { (eax, ebx) } else { (self.next() as u32, ebx) };
            table.set(0xd, number, CpuidLeaf { eax, ebx, ecx: self.next() as u32 & 2, edx: 0 });
        }
        table
    }

    fn wishes(&mut self, count: u64) -> BTreeMap<String, bool> {
        (0..count).map(|_| (self.pick(FEATURES).name.to_owned(), self.chance(50))).collect()
    }
}

/// Number, bytes, place.
type Layout = &'static [(u32, u32, u32)];
const INTEL_LAYOUT: Layout = &[(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)];
const AMD_LAYOUT: Layout = &[(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408), (9, 8, 2432)];

/// What must hold of every table that the policy makes.
fn check(table: &CpuidTable, host: &CpuidTable, options: &PolicyOptions) {
    for feature in FEATURES.iter().filter(|feature| feature.is_in(table)) {
        let name = feature.name;
        for need in feature.needs {
            assert!(has(table, need), "{name} without {need}");
        }
        match (options.provider, feature.giver) {
            (Provider::Hardware, _) => assert!(feature.is_in(host) || name == "hypervisor", "{name}"),
            (Provider::Software, Giver::Host) => assert!(feature.is_in(host), "{name}"),
            (Provider::Software, giver) => assert_ne!(giver, Giver::Hardware, "{name}"),
        }
    }
    for (name, &on) in &options.features {
        assert_eq!(has(table, name), on, "{name}");
    }
    if let Some(model) = options.model.features() {
        let mut expected: BTreeSet<&str> = model.into_iter().collect();
        for (name, &on) in &options.features {
            let name = feature(name).name;
            if on {
                expected.insert(name)
            } else {
                expected.remove(name)
            };
        }
        assert_eq!(shown(table).into_iter().collect::<BTreeSet<_>>(), expected);
    }
    // Registers that hold features hold nothing else, but for what follows from the machine.
    for place in FEATURES {
        let leaf = table.get(place.function, place.index).unwrap_or_default();
        let same = FEATURES
            .iter()
            .filter(|f| (f.function, f.index, f.register) == (place.function, place.index, place.register));
        let known = same.fold(0, |bits, f| bits | 1 << f.bit);
        let derived = match (place.function, place.register) {
            (1, Register::Edx) => HTT,
            (0x8000_0001, Register::Ecx) => CMP_LEGACY | TOPOEXT,
            (0x8000_0001, Register::Edx) => REPEATED,
            _ => 0,
        };
        assert_eq!(leaf.register(place.register) & !(known | derived), 0, "{:#x}", place.function);
    }
    // No processor is shown that has more than the guest sees of what programs take for given by the model.
    let signature = table.get(1, 0).unwrap().eax;
    assert!(has(table, "avx512f") || !is_avx512(Maker::of(table), signature), "{signature:#x}");
    if options.provider == Provider::Software || options.model != Model::Host {
        let row = SIGNATURES.iter().position(|row| row.1 == signature).unwrap();
        let mut needs = SIGNATURES[..=row].iter().flat_map(|row| row.0).flat_map(|names| names.iter());
        assert!(needs.all(|name| has(table, name)), "{signature:#x}");
    }
    let xcr0 = table.get(0xd, 0).unwrap_or_default();
    let wanted = [("xsave", 3), ("avx", 4), ("avx512f", 0xe0), ("pku", 0x200)];
    let wanted = wanted.iter().filter(|(name, _)| has(table, name)).fold(0, |bits, (_, more)| bits | more);
    assert_eq!(xcr0.eax, wanted);
    assert_eq!(xcr0.ecx, if wanted == 0 { 0 } else { table.xsave_size(u64::from(wanted), false) });
    assert!(xcr0.ecx <= 8192);
}

#[test]
fn whatever_the_host_what_is_shown_can_be_had_and_has_what_it_needs() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut given, mut refused) = (0, 0);
    for round in 0..4000u64 {
        let percent = random.pick(&[0, 50, 80, 97, 100]);
        let host = random.host(percent);
        let options = PolicyOptions {
            provider: random.pick(&[Provider::Software, Provider::Hardware]),
            model: random.pick(&Model::ALL),
            features: random.wishes(round % 4),
            vcpus: 1 + random.next() as u32 % 64,
            cores: 1 + random.next() as u32 % 64,
            threads: 1 + random.next() as u32 % 8,
            ..software()
        };
        match policy(&host, &options) {
            Ok(table) => {
                given += 1;
                check(&table, &host, &options);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(given > 500 && refused > 500, "{given} given, {refused} refused: too one-sided to say anything");
}

#[test]
fn following_the_errors_leads_to_a_machine() {
    let mut random = Random(7);
    for _ in 0..2000 {
        let host = random.host(90);
        let model = random.pick(&Model::ALL);
        let wishes = random.wishes(5);
        let mut options = PolicyOptions { features: wishes, ..hardware(model) };
        let mut steps = 0;
        let table = loop {
            steps += 1;
            assert!(steps < 40, "no end: {options:?}");
            let error = match policy(&host, &options) {
                Ok(table) => break table,
                Err(error) => error,
            };
            let message = error.to_string();
            match error {
                PolicyError::Unknown { .. } => panic!("{message}"),
                PolicyError::Fixed { feature, .. } => {
                    assert!(message.contains(feature));
                    options.features.remove(feature);
                }
                PolicyError::Unavailable { model, features } => {
                    for (feature, _) in features {
                        assert!(message.contains(feature));
                        options.features.remove(feature);
                        if model.is_some() {
                            options.features.insert(feature.to_owned(), false);
                        }
                    }
                }
                PolicyError::Needs { missing, .. } => {
                    for feature in missing {
                        assert!(message.contains(feature));
                        options.features.insert(feature.to_owned(), true);
                    }
                }
                PolicyError::NeededBy { dependents, .. } => {
                    for feature in dependents {
                        assert!(message.contains(feature));
                        options.features.insert(feature.to_owned(), false);
                    }
                }
            }
        };
        check(&table, &host, &options);
    }
}

#[test]
fn a_named_model_is_the_same_on_every_host_that_has_it() {
    let mut random = Random(42);
    for model in &Model::ALL[1..] {
        let options = PolicyOptions { vcpus: 8, cores: 4, threads: 2, ..hardware(*model) };
        let mut first = None;
        for round in 0..300 {
            let percent = random.pick(&[0, 30, 70, 100]);
            let mut host = random.host(percent);
            for name in model.features().unwrap() {
                add(&mut host, name);
            }
            let mut basic = host.get(1, 0).unwrap();
            basic.ecx |= 1 << 27;
            host.set(1, 0, basic);
            host.set(0xd, 0, CpuidLeaf { eax: 0x2e7, ebx: 2696, ecx: 2696, edx: 0 });
            for &(number, eax, ebx) in INTEL_LAYOUT {
                host.set(0xd, number, CpuidLeaf { eax, ebx, ecx: 0, edx: 0 });
            }
            let bits = 46 + round % 7;
            host.set(0x8000_0008, 0, CpuidLeaf { eax: bits, ..host.get(0x8000_0008, 0).unwrap() });
            let table = policy(&host, &options).unwrap();
            assert_eq!(table, *first.get_or_insert(table.clone()), "{model}");
            assert_eq!(table.get(0, 0).unwrap().ebx, INTEL.ebx);
            let brand = (0x8000_0002..=0x8000_0004).flat_map(|function| {
                let leaf = table.get(function, 0).unwrap();
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat()
            });
            let brand = String::from_utf8(brand.take_while(|&byte| byte != 0).collect()).unwrap();
            assert_eq!(brand, format!("Skep {model} processor"));
            if *model != Model::X86_64V4 {
                let software = PolicyOptions { provider: Provider::Software, ..options.clone() };
                assert_eq!(policy(&host, &software).unwrap(), table, "{model} of the software CPU");
            }
        }
    }
}

#[test]
fn signatures_are_those_of_processors_that_have_what_is_shown_and_no_more() {
    const V4: &[&str] = &["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"];
    let mut host = everything();
    host.set(0, 0, INTEL);
    for &(number, eax, ebx) in INTEL_LAYOUT {
        host.set(0xd, number, CpuidLeaf { eax, ebx, ecx: 0, edx: 0 });
    }
    let with = |own: u32, provider, model, wishes: &[(&str, bool)]| {
        let mut host = host.clone();
        host.set(1, 0, CpuidLeaf { eax: own, ..host.get(1, 0).unwrap() });
        let options = PolicyOptions { provider, model, features: features(wishes), ..software() };
        policy(&host, &options).unwrap().get(1, 0).unwrap().eax
    };
    let off: Vec<_> = V4.iter().chain(&["avx512_vnni"]).map(|&name| (name, false)).collect();
    // Whatever processor the host has, the software CPU goes by what it shows.
    for own in [0x50657, 0x606a6, 0x90672, 0x306c3] {
        let software = |model, wishes: &[_]| with(own, Provider::Software, model, wishes);
        assert_eq!(software(Model::Host, &[]), 0x50657);
        assert_eq!(software(Model::Host, &off), 0x306f2);
        assert_eq!(software(Model::Host, &[("bmi2", false)]), 0x106a5);
        assert_eq!(software(Model::Host, &[("popcnt", false)]), 0x10661);
        assert_eq!(software(Model::Host, &[("pdpe1gb", false), ("aes", false)]), 0x50657);
    }
    // Named models are the same everywhere.
    for provider in [Provider::Software, Provider::Hardware] {
        let named = |model, wishes: &[_]| with(0x606a6, provider, model, wishes);
        assert_eq!(named(Model::X86_64V1, &[]), 0x10661);
        assert_eq!(named(Model::X86_64V2, &[]), 0x106a5);
        assert_eq!(named(Model::X86_64V2, &[("xsave", true), ("avx", true)]), 0x106a5);
        assert_eq!(named(Model::X86_64V3, &[]), 0x306f2);
        assert_eq!(named(Model::X86_64V4, &[]), 0x306f2, "no IBRS, which Linux wants of Cascade Lake");
        assert_eq!(named(Model::X86_64V4, &[("spec_ctrl", true)]), 0x50657);
    }
    // Hardware shows itself, unless it has AVX-512 and the guest none.
    let hidden = FEATURES.iter().map(|feature| (feature.name, false));
    let hidden: Vec<_> = hidden.filter(|(name, _)| name.starts_with("avx512")).collect();
    let itself = |own, wishes: &[_]| with(own, Provider::Hardware, Model::Host, wishes);
    for own in [0x50657, 0x606a6, 0x806f8, 0xc06f2, 0x80650, 0x90672, 0x306c3, 0x206a7] {
        assert_eq!(itself(own, &[]), own);
    }
    for own in [0x50657, 0x606a6, 0x806f8, 0xc06f2, 0xa0671] {
        assert_eq!(itself(own, &hidden), 0x906ed);
    }
    for own in [0x90672, 0xb0671, 0xa06f3, 0x306c3, 0x206a7] {
        assert_eq!(itself(own, &hidden), own);
    }
    // A Cascade Lake whose back end offers not even SSE3.
    assert_eq!(policy(&pvm(), &hardware(Model::Host)).unwrap().get(1, 0).unwrap().eax, 0x10661);
}

#[test]
fn zen_without_avx512_is_shown_as_zen_3() {
    let hardware = |signature: u32| {
        let mut host = epyc();
        host.set(1, 0, CpuidLeaf { eax: signature, ..host.get(1, 0).unwrap() });
        let table = policy(&host, &hardware(Model::Host)).unwrap();
        // AMD repeats it.
        assert_eq!(table.get(1, 0).unwrap().eax, table.get(0x8000_0001, 0).unwrap().eax);
        table.get(1, 0).unwrap().eax
    };
    // Zen 4: Genoa, Phoenix. Zen 5: Turin, Granite Ridge.
    for own in [0xa10f11, 0xa70f52, 0xb00f21, 0xb40f40] {
        assert_eq!(hardware(own), 0xa00f11);
    }
    // Zen, Zen 2, Zen 3: Milan, Vermeer, Cezanne.
    for own in [0x800f12, 0x830f10, 0xa00f11, 0xa20f12, 0xa50f00] {
        assert_eq!(hardware(own), own);
    }
}

#[test]
fn levels_are_those_of_the_psabi() {
    // psABI x86-64, table 3.1. OSFXSR, SCE and OSXSAVE are for the operating system to set, here FXSR, SYSCALL and XSAVE.
    const LEVELS: [&[&str]; 4] = [
        &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"],
        &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
        &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
        &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    ];
    for (level, model) in Model::ALL[1..].iter().enumerate() {
        let features = model.features().unwrap();
        for (at, group) in LEVELS.iter().enumerate() {
            let there = group.iter().filter(|name| features.contains(name)).count();
            assert_eq!(there, if at <= level { group.len() } else { 0 }, "{model}: {group:?}");
        }
    }
}

#[test]
fn models_grow_and_their_needs_are_in_them() {
    for pair in Model::ALL[1..].windows(2) {
        let [lower, higher] = [pair[0], pair[1]].map(|model| model.features().unwrap());
        assert!(lower.iter().all(|name| higher.contains(name)), "{}", pair[1]);
    }
    for model in &Model::ALL[1..] {
        let features = model.features().unwrap();
        for &name in &features {
            assert!(feature(name).needs.iter().all(|need| features.contains(need)), "{model}: {name}");
        }
    }
}

#[test]
fn kvm_on_amd_shows_an_amd_processor_and_runs_levels_as_intel() {
    let options = PolicyOptions { vcpus: 8, cores: 2, threads: 2, ..hardware(Model::Host) };
    let table = policy(&epyc(), &options).unwrap();
    let vendor = table.get(0, 0).unwrap();
    assert_eq!(
        (vendor.ebx.to_le_bytes(), vendor.edx.to_le_bytes(), vendor.ecx.to_le_bytes()),
        (*b"Auth", *b"enti", *b"cAMD")
    );
    assert_eq!(table.get(1, 0).unwrap().eax, 0x0080_0f12);
    assert!(table.get(4, 0).is_none() && table.get(2, 0).is_none() && table.get(0x15, 0).is_none());
    assert!(has(&table, "sse4a") && has(&table, "avx2") && has(&table, "kvm_pv_eoi"));
    assert!(!has(&table, "nonstop_tsc") && !has(&table, "pcid"));
    assert_eq!(table.get(0x8000_0008, 0).unwrap().eax & 0xff, 40);
    // Topology: two threads a core, four in a package, in AMD's leaves and in the common one.
    let cpu = Processor { apic_id: 7, ..Processor::default() };
    let identifiers = table.lookup(0x8000_001e, 0, &cpu);
    assert_eq!((identifiers.eax, identifiers.ebx, identifiers.ecx), (7, 1 << 8 | 1, 1));
    assert_eq!(table.get(0x8000_0008, 0).unwrap().ecx, 2 << 12 | 3);
    assert_eq!((table.lookup(0xb, 0, &cpu).eax, table.lookup(0xb, 1, &cpu).eax), (1, 2));
    assert_ne!(table.get(0x8000_0001, 0).unwrap().ecx & CMP_LEGACY, 0);
    // The first-level caches are a core's, the last one the package's; sizes are the host's.
    let sharing = |index| table.get(0x8000_001d, index).map(|leaf| leaf.eax >> 14);
    assert_eq!([0, 1, 2, 3, 4].map(sharing), [Some(1), Some(1), Some(1), Some(3), Some(0)]);
    assert_eq!(table.get(0x8000_001d, 3).unwrap().ecx, 0x1fff);
    assert_eq!(table.get(0x8000_0000, 0).unwrap().eax, 0x8000_0021);
    assert_eq!(table.lookup(0x17, 0, &cpu), CpuidLeaf::default(), "AMD answers zeros out of range");
    // A processor that cannot say 8000_001EH says none of it.
    let table = policy(&svm(), &options).unwrap();
    assert_eq!([0x8000_001d, 0x8000_001e].map(|function| table.get(function, 0)), [None, None]);
    assert_eq!(table.get(0x8000_0001, 0).unwrap().ecx & TOPOEXT, 0);

    let table = policy(&epyc(), &PolicyOptions { model: Model::X86_64V3, ..options.clone() }).unwrap();
    assert_eq!(table.get(0, 0).unwrap().ebx, INTEL.ebx);
    assert!(table.get(4, 3).is_some() && table.get(0x8000_001e, 0).is_none() && table.get(0x15, 0).is_some());
    assert_eq!(table.get(0x8000_0008, 0).unwrap().ecx, 0);
    // Hypercalls are another instruction there.
    let features = features(&[("kvm_pv_send_ipi", true)]);
    let refused =
        policy(&epyc(), &PolicyOptions { model: Model::X86_64V3, features, ..options }).unwrap_err();
    let reason = ("kvm_pv_send_ipi", Reason::OtherMaker);
    assert_eq!(refused, PolicyError::Unavailable { model: None, features: vec![reason] });
}

#[test]
fn a_back_end_that_offers_little_gets_little() {
    // This one offers neither SSE3 nor XSAVE, though its leaf 0xD speaks of AVX-512.
    let table = policy(&pvm(), &hardware(Model::Host)).unwrap();
    assert!(table.get(0xd, 0).is_none() && !has(&table, "pni") && has(&table, "spec_ctrl_ssbd"));
    assert_eq!(table.get(0, 0).unwrap().ebx, INTEL.ebx);
    let given: Vec<bool> = models(&pvm(), Provider::Hardware).iter().map(|(_, can)| can.is_ok()).collect();
    assert_eq!(given, [true, true, false, false, false]);
    let given: Vec<bool> = models(&svm(), Provider::Hardware).iter().map(|(_, can)| can.is_ok()).collect();
    assert_eq!(given, [true, true, true, true, false]);
    let error = policy(&pvm(), &hardware(Model::X86_64V2)).unwrap_err();
    assert_eq!(error.feature(), None);
    assert!(
        error.to_string().contains("x86-64-v2 cannot be had here, for lack of rdtscp, popcnt, pni"),
        "{error}"
    );
}

#[test]
fn avx512_brings_its_state() {
    let mut host = everything();
    for (layout, size) in [(INTEL_LAYOUT, 2688), (AMD_LAYOUT, 2432)] {
        for &(number, eax, ebx) in layout {
            host.set(0xd, number, CpuidLeaf { eax, ebx, ecx: 0, edx: 0 });
        }
        let table = policy(&host, &hardware(Model::X86_64V4)).unwrap();
        assert_eq!((table.get(0xd, 0).unwrap().eax, table.get(0xd, 0).unwrap().ecx), (0xe7, size));
        let software = PolicyOptions { model: Model::X86_64V4, ..software() };
        assert_eq!(policy(&host, &software).unwrap(), table, "of the software CPU");
    }
    assert!(has(&policy(&host, &software()).unwrap(), "avx512f"), "with the model `host` too");
    // The software CPU has no use for opmasks of 16 bits.
    let mut seven = host.get(7, 0).unwrap();
    seven.ebx &= !(1 << 30);
    let mut narrow = host.clone();
    narrow.set(7, 0, seven);
    let by_name = PolicyOptions { features: features(&[("avx512f", true)]), ..software() };
    assert!(policy(&host, &by_name).is_ok() && policy(&narrow, &by_name).is_err());
    // Without its state there is none.
    host.set(0xd, 0, CpuidLeaf { eax: 7, ebx: 832, ecx: 832, edx: 0 });
    let error = policy(&host, &hardware(Model::X86_64V4)).unwrap_err().to_string();
    assert!(error.contains("avx512f (not enabled by this host's kernel)"), "{error}");
    assert!(error.contains("avx512vl (it needs avx512f, which cannot be had)"), "{error}");
    let error =
        policy(&host, &PolicyOptions { model: Model::X86_64V4, ..software() }).unwrap_err().to_string();
    assert!(error.contains("avx512f (not enabled by this host's kernel)"), "{error}");
}

#[test]
fn features_go_on_and_off_by_name() {
    let with = |model, wishes: &[_]| {
        policy(&everything(), &PolicyOptions { model, features: features(wishes), ..software() })
    };
    let table = with(Model::X86_64V2, &[("aes", true), ("rdtscp", false)]).unwrap();
    assert!(has(&table, "aes") && !has(&table, "rdtscp") && has(&table, "sse4_2"));
    assert!(!has(&with(Model::Host, &[("aes", false)]).unwrap(), "aes"));
    let message = |model, wishes: &[_]| with(model, wishes).unwrap_err().to_string();
    assert_eq!(
        message(Model::X86_64V2, &[("avx2", true)]),
        "CPU feature avx2 needs xsave, avx; turn on what is missing too"
    );
    assert_eq!(
        message(Model::X86_64V3, &[("avx", false)]),
        "CPU feature avx is needed by f16c, fma, avx2; turn those off too"
    );
    let off = [("avx", false), ("f16c", false), ("fma", false), ("avx2", false)];
    assert!(!has(&with(Model::X86_64V3, &off).unwrap(), "avx"));
    assert_eq!(
        message(Model::Host, &[("avx52", true)]),
        r#"unknown CPU feature "avx52"; did you mean "avx2"?"#
    );
    assert_eq!(
        message(Model::Host, &[("lm", false)]),
        "CPU feature lm cannot be set: every x86-64 processor has it; leave it out"
    );
    assert_eq!(
        message(Model::Host, &[("ht", true)]),
        "CPU feature ht cannot be set: it follows from the topology; leave it out"
    );
    assert_eq!(
        message(Model::Host, &[("fma4", true)]),
        "CPU feature fma4 (not in the software CPU) cannot be had here; leave it out"
    );
    assert!(with(Model::Host, &[("lm", true)]).is_ok());
    assert!(message(Model::Host, &[(&"x".repeat(1 << 20), true)]).len() < 100);
}

#[test]
fn arch_capabilities_say_nothing_that_cpuid_does_not_bear_out() {
    let with = |wishes: &[_]| {
        let options = PolicyOptions { features: features(wishes), ..software() };
        policy(&everything(), &options).unwrap().arch_capabilities(u64::MAX)
    };
    assert_eq!(with(&[]), u64::MAX);
    assert_eq!(with(&[("spec_ctrl", false), ("bhi_ctrl", false)]), !2, "IBRS_ALL needs IA32_SPEC_CTRL");
    assert_eq!(with(&[("arch_capabilities", false)]), 0);
}

#[test]
fn halts_that_stay_in_the_guest_need_no_wake_up_call() {
    let table = policy(&svm(), &hardware(Model::Host)).unwrap();
    assert!(has(&table, "kvm_pv_unhalt"));
    let options = PolicyOptions { hlt_exits: false, ..hardware(Model::Host) };
    assert!(!has(&policy(&svm(), &options).unwrap(), "kvm_pv_unhalt"));
}

#[test]
fn five_levels_of_paging_come_by_name() {
    for host in [everything(), host()] {
        let four = policy(&host, &software()).unwrap();
        assert!(!has(&four, "la57") && four.get(0x8000_0008, 0).unwrap().eax >> 8 & 0xff == 48);
        let options = PolicyOptions { features: features(&[("la57", true)]), ..software() };
        let five = policy(&host, &options).unwrap();
        assert!(has(&five, "la57") && five.get(0x8000_0008, 0).unwrap().eax >> 8 & 0xff == 57);
    }
}

#[test]
fn what_is_not_on_the_list_never_shows() {
    let shown = policy(&everything(), &software()).unwrap();
    let (one, seven) = (shown.get(1, 0).unwrap(), shown.get(7, 0).unwrap());
    // MONITOR, VMX, SMX; TSX, MPX, AVX-512F, Intel PT; PKU, WAITPKG, SHSTK; AMX-TILE, IBT, SSBD.
    assert_eq!(one.ecx & (1 << 3 | 1 << 5 | 1 << 6), 0);
    assert_eq!(seven.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 16 | 1 << 25), 0);
    assert_eq!(seven.ecx & (1 << 3 | 1 << 5 | 1 << 7), 0);
    assert_eq!(seven.edx & (1 << 20 | 1 << 24 | 1 << 31), 0);
    assert_eq!(shown.get(0xd, 0).unwrap().eax, 7);
    assert_eq!(shown.get(0xd, 1).unwrap().eax, 7, "no XSAVES");
    assert!(shown.get(0xa, 0).is_none(), "no performance counters");
    let table = policy(&everything(), &hardware(Model::Host)).unwrap();
    let seven = table.get(7, 0).unwrap();
    assert_eq!(seven.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 25), 0, "neither TSX nor MPX nor PT");
    assert_eq!(table.get(1, 0).unwrap().ecx & (1 << 3 | 1 << 5), 0, "neither MONITOR nor VMX");
    assert_eq!(table.get(0x8000_0001, 0).unwrap().ecx & 1 << 2, 0, "no SVM");
    assert!(table.get(0x8000_000a, 0).is_none());
}

#[test]
fn out_of_range_functions_answer_with_the_highest_basic_leaf() {
    let shown = policy(&host(), &software()).unwrap();
    let cpu = Processor::default();
    let last = shown.lookup(0x16, 0, &cpu);
    assert_ne!(last, CpuidLeaf::default());
    for function in [0x17, 0x1f, 0x3fff_ffff, 0x5000_0000, 0x7fff_ffff, 0x8000_0009, u32::MAX] {
        assert_eq!(shown.lookup(function, 5, &cpu), last, "{function:#x}");
    }
    assert_eq!(shown.lookup(0xa, 0, &cpu), CpuidLeaf::default());
    assert_eq!(shown.lookup(7, 1, &cpu), CpuidLeaf::default());
    assert_eq!(shown.lookup(0x4000_0077, 0, &cpu), CpuidLeaf::default());
    let hidden = FEATURES.iter().filter(|f| f.giver == Giver::Own && f.function == 0x4000_0001);
    let hidden = hidden.map(|f| (f.name, false)).chain([("hypervisor", false)]).collect::<Vec<_>>();
    let bare = policy(&host(), &PolicyOptions { features: features(&hidden), ..software() }).unwrap();
    assert_eq!(bare.lookup(0x4000_0000, 0, &cpu), bare.lookup(0x16, 0, &cpu));
    assert_eq!(bare.get(1, 0).unwrap().ecx & 1 << 31, 0);
}

#[test]
fn each_processor_sees_itself() {
    let options = PolicyOptions { vcpus: 8, cores: 4, threads: 2, ..software() };
    let shown = policy(&everything(), &options).unwrap();
    let cpu = Processor { apic_id: 5, osxsave: true, xcr0: 7 };
    assert_eq!(shown.lookup(1, 0, &cpu).ebx >> 24, 5);
    assert_ne!(shown.lookup(1, 0, &cpu).ecx & 1 << 27, 0);
    assert_eq!(shown.lookup(1, 0, &Processor::default()).ecx & 1 << 27, 0);
    for (index, shift, count) in [(0, 1, 2), (1, 3, 8), (2, 0, 0), (9, 0, 0)] {
        let leaf = shown.lookup(0xb, index, &cpu);
        assert_eq!((leaf.eax, leaf.ebx, leaf.ecx & 0xff, leaf.edx), (shift, count, index, 5));
    }
    assert_eq!(shown.lookup(1, 0, &cpu).ebx >> 16 & 0xff, 8);
    // A back end that answers by itself gets the same.
    for table in [shown, policy(&epyc(), &hardware(Model::Host)).unwrap()] {
        let own = table.on_processor(5);
        let identities = [(1, 0), (0xb, 0), (0xb, 1), (0x8000_001e, 0)];
        for (function, index) in identities.into_iter().filter(|&(f, i)| table.get(f, i).is_some()) {
            let cpu = Processor { apic_id: 5, ..Processor::default() };
            assert_eq!(own.get(function, index).unwrap(), table.lookup(function, index, &cpu));
        }
    }
}

#[test]
fn levels_that_apic_ids_cannot_tell_apart_are_not_shown() {
    let levels = |vcpus, cores, threads| {
        let options = PolicyOptions { vcpus, cores, threads, ..software() };
        let shown = policy(&everything(), &options).unwrap();
        let level = |index| shown.get(0xb, index).map(|leaf| (leaf.eax, leaf.ebx)).unwrap();
        (level(0), level(1))
    };
    assert_eq!(levels(6, 3, 2), ((1, 2), (3, 6)), "one package, ID space left over");
    assert_eq!(levels(6, 3, 1), ((0, 1), (3, 6)), "two packages of three look like one of six");
    assert_eq!(levels(4, 1, 1), ((0, 1), (0, 1)), "four packages");
    assert_eq!(levels(6, 2, 3), ((0, 1), (3, 6)), "three threads look like three cores");
}

#[test]
fn the_xsave_area_grows_with_xcr0() {
    let shown = policy(&everything(), &software()).unwrap();
    let with = |xcr0| shown.lookup(0xd, 0, &Processor { xcr0, ..Default::default() }).ebx;
    assert_eq!((with(1), with(3), with(7)), (576, 576, 832));
    assert_eq!(shown.get(0xd, 0).unwrap().ecx, 832);
    assert_eq!(shown.lookup(0xd, 1, &Processor { xcr0: 7, ..Default::default() }).ebx, 832);
}

#[test]
fn the_clock_leaf_gives_back_the_frequency() {
    for tsc_hz in [2_499_998_000u64, 2_600_000_000, 999_999_937, 4_000_000_000, 5_000_000_001] {
        for options in [software(), PolicyOptions { model: Model::X86_64V1, ..software() }] {
            let shown = policy(&host(), &PolicyOptions { tsc_hz, ..options }).unwrap();
            let leaf = shown.get(0x15, 0).unwrap();
            let hz = u128::from(leaf.ecx) * u128::from(leaf.ebx) / u128::from(leaf.eax);
            assert!((hz as u64).abs_diff(tsc_hz) <= 4, "{hz} for {tsc_hz}");
            assert_eq!(shown.get(0x4000_0010, 0).unwrap().eax, (tsc_hz / 1000) as u32);
        }
    }
    assert_eq!(ratio(0, 5), None);
    assert_eq!(ratio(5, 0), None);
    assert_eq!(ratio(u64::MAX, 1), None);
}

#[test]
fn hostile_options_do_no_harm() {
    for n in [0, 1, 3, 255, u32::MAX] {
        for (host, model) in [(everything(), Model::Host), (svm(), Model::Host), (svm(), Model::X86_64V3)] {
            for provider in [Provider::Software, Provider::Hardware] {
                let options = PolicyOptions {
                    vcpus: n,
                    cores: n,
                    threads: n,
                    tsc_hz: u64::from(n),
                    apic_hz: u64::MAX,
                    ..PolicyOptions { provider, ..hardware(model) }
                };
                let Ok(table) = policy(&host, &options) else {
                    assert_eq!((provider, model), (Provider::Software, Model::X86_64V3), "no OSXSAVE there");
                    continue;
                };
                for (function, index, _) in table.iter() {
                    let cpu = Processor { apic_id: n, osxsave: true, xcr0: u64::MAX };
                    let _ = table.lookup(function, index, &cpu);
                }
            }
        }
    }
}

#[test]
fn a_host_without_anything_still_gives_a_processor_of_ours() {
    let shown = policy(&CpuidTable::default(), &software()).unwrap();
    assert!(has(&shown, "lm") && !has(&shown, "xsave"));
    assert!(shown.get(0xd, 0).is_none());
    assert_eq!(&shown.get(0x8000_0002, 0).unwrap().eax.to_le_bytes(), b"Skep");
    assert_eq!(shown.get(4, 0).unwrap().eax & 31, 1);
    assert_eq!(shown.get(4, 4).unwrap(), CpuidLeaf::default());
    // Hardware that has not even the base is told of, not papered over.
    let error = policy(&CpuidTable::default(), &hardware(Model::Host)).unwrap_err();
    assert!(matches!(error, PolicyError::Unavailable { model: Some(Model::Host), .. }), "{error}");
}
