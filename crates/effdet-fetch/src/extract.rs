//! Archives unpacked into one folder and nowhere else.
//!
//! Entries that are links, or whose names are absolute or climb, are refused; so is more than the limits allow, whatever the
//! archive says of its own sizes.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek};
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::error::{FetchError, Result};

/// What an archive may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together.
    pub total_bytes: u64,
    /// Files and folders.
    pub entries: u64,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// Unpacks `.zip`, `.tar`, `.tar.gz` or `.tgz` into `folder`; `progress` is called with the bytes written so far.
///
/// Every file is written under a temporary name and renamed; files of the same name are replaced.
///
/// # Errors
/// [`FetchError::Archive`] for an archive that is damaged or reaches out of the folder, [`FetchError::TooLarge`],
/// [`FetchError::Io`].
pub fn unpack(
    archive: &Path,
    folder: &Path,
    limits: &Limits,
    progress: &mut dyn FnMut(u64),
) -> Result<Unpacked> {
    fs::create_dir_all(folder).map_err(io_error(folder))?;
    let root = fs::canonicalize(folder).map_err(io_error(folder))?;
    let mut target = Target {
        archive,
        root,
        limits,
        checked: HashSet::new(),
        unpacked: Unpacked::default(),
        entries: 0,
        progress,
    };
    let input = BufReader::with_capacity(1 << 20, File::open(archive).map_err(io_error(archive))?);
    let name = archive
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase();
    if name.ends_with(".zip") {
        unzip(input, &mut target)?;
    } else if name.ends_with(".tar.gz") || name.ends_with(".tgz") {
        untar(MultiGzDecoder::new(input), &mut target)?;
    } else if name.ends_with(".tar") {
        untar(input, &mut target)?;
    } else {
        return Err(target.bad("is neither .zip nor .tar nor .tar.gz"));
    }
    Ok(target.unpacked)
}

fn io_error(file: &Path) -> impl Fn(io::Error) -> FetchError {
    move |source| FetchError::Io {
        file: file.to_path_buf(),
        source,
    }
}

struct Target<'a> {
    archive: &'a Path,
    root: PathBuf,
    limits: &'a Limits,
    /// Folders that are known to lie inside.
    checked: HashSet<PathBuf>,
    unpacked: Unpacked,
    entries: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Target<'_> {
    fn bad(&self, what: impl Into<String>) -> FetchError {
        FetchError::Archive {
            file: self.archive.to_path_buf(),
            what: what.into(),
        }
    }

    fn count_entry(&mut self) -> Result<()> {
        self.entries += 1;
        match self.entries > self.limits.entries {
            true => Err(FetchError::TooLarge {
                what: self.archive.display().to_string(),
                limit: self.limits.entries,
                unit: "entries",
            }),
            false => Ok(()),
        }
    }

    /// The place of an entry below the folder.
    fn place(&self, name: &str) -> Result<PathBuf> {
        let parts = Path::new(name).components();
        let mut place = self.root.clone();
        for part in parts {
            match part {
                Component::Normal(part) => place.push(part),
                Component::CurDir => {}
                _ => return Err(self.bad(format!("entry {name:?} leaves the folder"))),
            }
        }
        let bytes = name.as_bytes();
        let drive = bytes.len() > 1 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':';
        if drive || name.contains(['\\', '\0']) || place == self.root {
            return Err(self.bad(format!("entry {name:?} is no name below the folder")));
        }
        Ok(place)
    }

    /// Makes a folder, through no link that leads out.
    fn make_folder(&mut self, folder: &Path) -> Result<()> {
        if self.checked.contains(folder) {
            return Ok(());
        }
        // From above, so that nothing is made behind a link that leads out.
        let mut path = self.root.clone();
        let below = folder.strip_prefix(&self.root).unwrap_or(Path::new(""));
        for part in below.components() {
            path.push(part);
            if !path.exists() {
                fs::create_dir(&path).map_err(io_error(&path))?;
            }
            let real = fs::canonicalize(&path).map_err(io_error(&path))?;
            if !real.starts_with(&self.root) {
                return Err(self.bad(format!("{} is a link out of the folder", path.display())));
            }
        }
        self.checked.insert(folder.to_path_buf());
        Ok(())
    }

    fn write(&mut self, place: &Path, input: &mut impl Read) -> Result<()> {
        self.make_folder(place.parent().unwrap_or(&self.root.clone()))?;
        let mut scratch = place.as_os_str().to_owned();
        scratch.push(".part");
        let scratch = PathBuf::from(scratch);
        let left = self.limits.total_bytes - self.unpacked.bytes;
        let mut output = File::create(&scratch).map_err(io_error(&scratch))?;
        let copied = io::copy(&mut input.take(left.saturating_add(1)), &mut output);
        let copied = match copied {
            Ok(copied) if copied <= left => copied,
            other => {
                // Nothing can be done about a file that stays.
                let _ = fs::remove_file(&scratch);
                return Err(match other {
                    Ok(_) => FetchError::TooLarge {
                        what: format!("{} unpacked", self.archive.display()),
                        limit: self.limits.total_bytes,
                        unit: "bytes",
                    },
                    Err(error) => self.bad(format!("{}: {error}", place.display())),
                });
            }
        };
        fs::rename(&scratch, place).map_err(io_error(place))?;
        self.unpacked.files += 1;
        self.unpacked.bytes += copied;
        (self.progress)(self.unpacked.bytes);
        Ok(())
    }
}

fn unzip(input: impl Read + Seek, target: &mut Target<'_>) -> Result<()> {
    const LINK: u32 = 0o120_000;
    const KIND: u32 = 0o170_000;
    let mut archive = zip::ZipArchive::new(input).map_err(|error| target.bad(error.to_string()))?;
    for index in 0..archive.len() {
        target.count_entry()?;
        let mut entry = archive
            .by_index(index)
            .map_err(|error| target.bad(error.to_string()))?;
        let name = entry
            .name()
            .map_err(|error| target.bad(error.to_string()))?
            .into_owned();
        if entry.unix_mode().is_some_and(|mode| mode & KIND == LINK) {
            return Err(target.bad(format!("entry {name:?} is a link")));
        }
        let place = target.place(&name)?;
        match entry.is_dir() {
            true => target.make_folder(&place)?,
            false => target.write(&place, &mut entry)?,
        }
    }
    Ok(())
}

fn untar(input: impl Read, target: &mut Target<'_>) -> Result<()> {
    let mut archive = tar::Archive::new(input);
    let entries = archive.entries().map_err(|error| target.bad(error.to_string()))?;
    for entry in entries {
        target.count_entry()?;
        let mut entry = entry.map_err(|error| target.bad(error.to_string()))?;
        let name = String::from_utf8(entry.path_bytes().into_owned())
            .map_err(|_| target.bad("an entry has a name that is no UTF-8"))?;
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            // `./` is the folder itself.
            if name.trim_start_matches("./").is_empty() {
                continue;
            }
            let place = target.place(&name)?;
            target.make_folder(&place)?;
        } else if kind.is_file() {
            let place = target.place(&name)?;
            target.write(&place, &mut entry)?;
        } else if !kind.is_pax_global_extensions() {
            return Err(target.bad(format!("entry {name:?} is a link or a device")));
        }
    }
    Ok(())
}
