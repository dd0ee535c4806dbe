//! Public data sets over HTTP: resumed downloads with checksums, and archives unpacked into their folder only.
//!
//! Knows addresses, HTTP and archives; knows nothing of what is in them.
#![forbid(unsafe_code)]

mod catalog;
mod error;
mod extract;
mod fetch;

pub use catalog::{CATALOG, Part, Set, find};
pub use error::{FetchError, Result};
pub use extract::{Limits, Unpacked, unpack};
pub use fetch::{Checksum, Fetched, Request, fetch};
