//! Assembly of a machine from its specification.
