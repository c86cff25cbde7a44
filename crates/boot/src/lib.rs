//! Loaders, ACPI, SMBIOS.
