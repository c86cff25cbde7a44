//! A vCPU's registers by their names, as plain JSON: 64-bit values are strings like `"0x1f"`, narrower ones numbers.

use serde_json::{Map, Value, json};
use skep_hv::state::{CpuState, DescriptorTable, General, Segment, System};

use crate::error::Error;

/// General registers in encoding order.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Segment registers in encoding order.
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Where a named 64-bit register lives.
fn quad<'a>(general: &'a mut General, system: &'a mut System, name: &str) -> Option<&'a mut u64> {
    if let Some(at) = GENERAL.iter().position(|&register| register == name) {
        return Some(&mut general.gpr[at]);
    }
    Some(match name {
        "rip" => &mut general.rip,
        "rflags" => &mut general.rflags,
        "cr0" => &mut system.cr0,
        "cr2" => &mut system.cr2,
        "cr3" => &mut system.cr3,
        "cr4" => &mut system.cr4,
        "cr8" => &mut system.cr8,
        "xcr0" => &mut system.xcr0,
        "efer" => &mut system.efer,
        "apicBase" => &mut system.apic_base,
        _ => return None,
    })
}

fn segment<'a>(system: &'a mut System, name: &str) -> Option<&'a mut Segment> {
    match name {
        "tr" => Some(&mut system.tr),
        "ldtr" => Some(&mut system.ldtr),
        _ => SEGMENTS.iter().position(|&segment| segment == name).map(|at| &mut system.segments[at]),
    }
}

fn table<'a>(system: &'a mut System, name: &str) -> Option<&'a mut DescriptorTable> {
    match name {
        "gdtr" => Some(&mut system.gdtr),
        "idtr" => Some(&mut system.idtr),
        _ => None,
    }
}

const OTHERS: [&str; 10] = ["rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "xcr0", "efer", "apicBase"];

fn hex(value: u64) -> Value {
    format!("{value:#x}").into()
}

/// The general and system registers of `state` as an object.
pub(crate) fn to_json(state: &CpuState) -> Value {
    let (mut general, mut system) = (state.general.unwrap_or_default(), state.system.unwrap_or_default());
    let mut object = Map::new();
    for name in GENERAL.into_iter().chain(OTHERS) {
        if let Some(value) = quad(&mut general, &mut system, name) {
            object.insert(name.into(), hex(*value));
        }
    }
    for name in SEGMENTS.into_iter().chain(["tr", "ldtr"]) {
        if let Some(&mut Segment { selector, base, limit, access }) = segment(&mut system, name) {
            let value = json!({ "selector": selector, "base": hex(base), "limit": limit, "access": access });
            object.insert(name.into(), value);
        }
    }
    for name in ["gdtr", "idtr"] {
        if let Some(&mut DescriptorTable { base, limit }) = table(&mut system, name) {
            object.insert(name.into(), json!({ "base": hex(base), "limit": limit }));
        }
    }
    Value::Object(object)
}

/// Overwrites in `state` what `json`, an object as [`to_json`] makes or a part of one, names.
pub(crate) fn patch(state: &mut CpuState, json: &str) -> Result<(), Error> {
    let value: Value = serde_json::from_str(json)
        .map_err(|error| Error::Registers(format!("registers must be a JSON object: {error}")))?;
    let Value::Object(object) = value else {
        return Err(Error::Registers("registers must be a JSON object of values by name".into()));
    };
    let (mut general, mut system) = (state.general.unwrap_or_default(), state.system.unwrap_or_default());
    for (name, value) in &object {
        if let Some(register) = quad(&mut general, &mut system, name) {
            *register = number(name, value, u64::MAX)?;
        } else if let Some(register) = segment(&mut system, name) {
            for (field, value) in fields(name, value)? {
                let path = format!("{name}.{field}");
                match field.as_str() {
                    "selector" => register.selector = number(&path, value, u16::MAX.into())? as u16,
                    "base" => register.base = number(&path, value, u64::MAX)?,
                    "limit" => register.limit = number(&path, value, u32::MAX.into())? as u32,
                    "access" => register.access = number(&path, value, u32::MAX.into())? as u32,
                    _ => return Err(unknown(&path)),
                }
            }
        } else if let Some(register) = table(&mut system, name) {
            for (field, value) in fields(name, value)? {
                let path = format!("{name}.{field}");
                match field.as_str() {
                    "base" => register.base = number(&path, value, u64::MAX)?,
                    "limit" => register.limit = number(&path, value, u16::MAX.into())? as u16,
                    _ => return Err(unknown(&path)),
                }
            }
        } else {
            return Err(unknown(name));
        }
    }
    state.general = Some(general);
    state.system = Some(system);
    Ok(())
}

fn unknown(name: &str) -> Error {
    Error::Registers(format!("there is no register \"{name}\""))
}

fn fields<'a>(name: &str, value: &'a Value) -> Result<&'a Map<String, Value>, Error> {
    value.as_object().ok_or_else(|| Error::Registers(format!("{name} must be an object of its fields")))
}

fn number(name: &str, value: &Value, max: u64) -> Result<u64, Error> {
    let number = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => match text.strip_prefix("0x") {
            // `from_str_radix` would take a sign.
            Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
            Some(_) => None,
            None => text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten(),
        },
        _ => None,
    };
    number.filter(|&number| number <= max).ok_or_else(|| {
        Error::Registers(format!(
            "{name} must be a number, or a string like \"0x1f\", of at most {max:#x}; it is {value}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CpuState {
        let mut general = General { rip: 0xfff0, rflags: 2, ..General::default() };
        general.gpr = std::array::from_fn(|i| i as u64 + 1);
        let mut system = System { cr0: 0x6000_0010, ..System::default() };
        system.segments[1] = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, access: 0x9b };
        system.gdtr = DescriptorTable { base: u64::MAX, limit: 0xffff };
        CpuState { general: Some(general), system: Some(system), ..CpuState::default() }
    }

    #[test]
    fn json_goes_round() {
        let json = to_json(&state());
        assert_eq!(json["rax"], "0x1");
        assert_eq!(json["cs"]["selector"], 0xf000);
        assert_eq!(json["gdtr"]["base"], "0xffffffffffffffff");
        let mut copy = CpuState::default();
        patch(&mut copy, &json.to_string()).unwrap();
        assert_eq!(copy, state());
    }

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let mut changed = state();
        patch(&mut changed, r#"{"rbx":"0x10","rcx":"17","cs":{"base":0}}"#).unwrap();
        let mut expected = state();
        let general = expected.general.as_mut().unwrap();
        (general.gpr[3], general.gpr[1]) = (0x10, 17);
        expected.system.as_mut().unwrap().segments[1].base = 0;
        assert_eq!(changed, expected);
    }

    #[test]
    fn nonsense_is_refused_and_changes_nothing() {
        let nonsense = [
            "",
            "[]",
            "1",
            r#"{"rzx":1}"#,
            r#"{"rax":-1}"#,
            r#"{"rax":1.5}"#,
            r#"{"rax":"0x"}"#,
            r#"{"rax":"0x+1"}"#,
            r#"{"rax":"0x10000000000000000"}"#,
            r#"{"rax":null}"#,
            r#"{"cs":1}"#,
            r#"{"cs":{"selector":65536}}"#,
            r#"{"cs":{"flavour":1}}"#,
            r#"{"gdtr":{"access":1}}"#,
            r#"{"rax":"+1"}"#,
            r#"{"rax":""}"#,
        ];
        for json in nonsense {
            let mut same = state();
            assert_eq!(patch(&mut same, json).unwrap_err().code(), "ERR_REGISTERS", "{json}");
            assert_eq!(same, state());
        }
    }
}
