//! Why a download or an archive was refused, by fault: the data, the caller, a limit, the environment.

use std::path::PathBuf;

/// Result of fetching.
pub type Result<T> = std::result::Result<T, FetchError>;

/// A fault in fetching; names address or file and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Environment: the server cannot be reached, or breaks off again and again.
    #[error(
        "{url}: {reason}; what has come so far is kept, run the command again to go on, or name a mirror"
    )]
    Network {
        /// Address.
        url: String,
        /// What happened.
        reason: String,
    },
    /// Data: the server answers, but not with the file.
    #[error("{url}: the server answers {status}; check the address, or name a mirror")]
    Status {
        /// Address.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// Data: the file is not the one that was asked for.
    #[error("{}: checksum {found} instead of {expected}: the file is damaged or another one, remove it and fetch it again", file.display())]
    Checksum {
        /// File.
        file: PathBuf,
        /// Checksum of the file.
        found: String,
        /// Checksum it should have.
        expected: String,
    },
    /// Limit: more than allowed.
    #[error("{what}: more than the limit of {limit} {unit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Limit.
        limit: u64,
        /// `bytes` or `entries`.
        unit: &'static str,
    },
    /// Data: an archive that is damaged or reaches out of its folder.
    #[error("{}: {what}", file.display())]
    Archive {
        /// Archive.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Environment: reading or writing failed.
    #[error("cannot read or write {}: {source}", file.display())]
    Io {
        /// File.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
