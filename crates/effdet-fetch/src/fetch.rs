//! One file over HTTP.
//!
//! It grows as `<target>.part` and gets its name when it is complete and its checksum is right. What there is of it is kept when
//! the connection breaks, and asked for no more (an HTTP range) the next time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use md5::{Digest, Md5};
use sha2::Sha256;
use ureq::Agent;

use crate::error::{FetchError, Result};

/// Attempts before giving up; those that brought something do not count.
const ATTEMPTS: u32 = 5;
const BUFFER_BYTES: usize = 1 << 17;

/// The checksum that a file must have, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksum {
    /// MD5, where the publisher gives nothing better.
    Md5(String),
    /// SHA-256.
    Sha256(String),
}

/// What to fetch.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// `http://` or `https://`.
    pub url: &'a str,
    /// Where to.
    pub target: &'a Path,
    /// What it must be.
    pub checksum: &'a Checksum,
    /// Longer answers are refused.
    pub max_bytes: u64,
    /// Pause before the second attempt; it doubles with every further one.
    pub pause: Duration,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes of the file.
    pub bytes: u64,
    /// Of them, those that came over the network this time.
    pub received: u64,
}

/// Fetches a file unless it is there already; `progress` is called with the bytes there are and, once known, the bytes of all.
///
/// # Errors
/// [`FetchError`]; what has come so far stays in `<target>.part`, but not when its checksum is wrong.
pub fn fetch(request: &Request<'_>, progress: &mut dyn FnMut(u64, Option<u64>)) -> Result<Fetched> {
    let target = request.target;
    if target.is_file() {
        verify(target, request.checksum)?;
        let bytes = length(target)?;
        return Ok(Fetched { bytes, received: 0 });
    }
    let parent = target.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io_error(parent))?;
    let mut part = target.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let agent: Agent = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(5)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("effdet/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let started_with = length(&part).unwrap_or(0);
    let mut received = 0;
    let mut started_over = false;
    loop {
        received += download(&agent, request, &part, progress)?;
        match verify(&part, request.checksum) {
            Ok(()) => break,
            Err(error) => {
                fs::remove_file(&part).map_err(io_error(&part))?;
                // What was left of an earlier attempt may be of another version of the file.
                if started_with == 0 || started_over {
                    return Err(error);
                }
                started_over = true;
            }
        }
    }
    let file = File::open(&part).map_err(io_error(&part))?;
    file.sync_all().map_err(io_error(&part))?;
    fs::rename(&part, target).map_err(io_error(target))?;
    let bytes = length(target)?;
    Ok(Fetched { bytes, received })
}

fn io_error(file: &Path) -> impl Fn(io::Error) -> FetchError {
    move |source| FetchError::Io {
        file: file.to_path_buf(),
        source,
    }
}

fn length(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file).map_err(io_error(file))?.len())
}

/// Why an attempt ended.
enum Broken {
    /// It may work another time.
    Passing(String),
    Lasting(FetchError),
}

/// Brings `part` to its full length and returns the bytes that came.
fn download(
    agent: &Agent,
    request: &Request<'_>,
    part: &Path,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<u64> {
    let (mut received, mut failures) = (0, 0);
    let mut pause = request.pause;
    loop {
        let before = received;
        match attempt(agent, request, part, &mut received, progress) {
            Ok(()) => return Ok(received),
            Err(Broken::Lasting(error)) => return Err(error),
            Err(Broken::Passing(reason)) => {
                failures = if received > before { 1 } else { failures + 1 };
                if failures >= ATTEMPTS {
                    return Err(FetchError::Network {
                        url: request.url.to_owned(),
                        reason,
                    });
                }
                std::thread::sleep(pause);
                pause = if received > before {
                    request.pause
                } else {
                    pause * 2
                };
            }
        }
    }
}

fn attempt(
    agent: &Agent,
    request: &Request<'_>,
    part: &Path,
    received: &mut u64,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> std::result::Result<(), Broken> {
    let lasting = |source| Broken::Lasting(io_error(part)(source));
    let mut have = length(part).unwrap_or(0);
    let mut call = agent.get(request.url);
    if have > 0 {
        call = call.header("Range", format!("bytes={have}-"));
    }
    let mut response = call.call().map_err(|error| Broken::Passing(error.to_string()))?;
    let status = response.status().as_u16();
    let header = |name: &str| {
        let value = response.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let total = match status {
        200 => {
            // The server begins anew.
            have = 0;
            header("content-length").and_then(|length| length.parse().ok())
        }
        206 => {
            // `bytes 100-199/200`
            let range = header("content-range").unwrap_or_default();
            let range = range.strip_prefix("bytes ").unwrap_or("");
            let (span, total) = range.split_once('/').unwrap_or(("", ""));
            let start = span
                .split_once('-')
                .and_then(|(start, _)| start.parse::<u64>().ok());
            if start != Some(have) {
                return Err(Broken::Passing(format!(
                    "the server sends the range {range:?}, {have}- was asked for"
                )));
            }
            total.parse().ok()
        }
        // Nothing behind the end: there is all of it, or more than there should be. The checksum tells.
        416 => return Ok(()),
        429 | 500..=599 => return Err(Broken::Passing(format!("the server answers {status}"))),
        _ => {
            return Err(Broken::Lasting(FetchError::Status {
                url: request.url.to_owned(),
                status,
            }));
        }
    };
    let too_large = || {
        Broken::Lasting(FetchError::TooLarge {
            what: request.url.to_owned(),
            limit: request.max_bytes,
            unit: "bytes",
        })
    };
    if total.is_some_and(|total| total > request.max_bytes) {
        return Err(too_large());
    }
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(have == 0)
        .append(false)
        .open(part)
        .map_err(lasting)?;
    io::Seek::seek(&mut file, io::SeekFrom::Start(have)).map_err(lasting)?;
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(Broken::Passing(error.to_string())),
        };
        have += count as u64;
        if have > request.max_bytes {
            return Err(too_large());
        }
        file.write_all(&buffer[..count]).map_err(lasting)?;
        *received += count as u64;
        progress(have, total);
    }
    match total {
        Some(total) if have < total => Err(Broken::Passing(format!("{have} of {total} bytes came"))),
        _ => Ok(()),
    }
}

/// Compares the checksum of a file.
fn verify(file: &Path, expected: &Checksum) -> Result<()> {
    let (found, expected) = match expected {
        Checksum::Md5(expected) => (hash::<Md5>(file)?, expected),
        Checksum::Sha256(expected) => (hash::<Sha256>(file)?, expected),
    };
    match found.eq_ignore_ascii_case(expected) {
        true => Ok(()),
        false => Err(FetchError::Checksum {
            file: file.to_path_buf(),
            found,
            expected: expected.clone(),
        }),
    }
}

fn hash<D: Digest>(file: &Path) -> Result<String> {
    let mut input = BufReader::with_capacity(1 << 20, File::open(file).map_err(io_error(file))?);
    let mut digest = D::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match input.read(&mut buffer).map_err(io_error(file))? {
            0 => break,
            count => digest.update(&buffer[..count]),
        }
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
