//! The few operations that saving needs, so that tests can make each of them fail.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::error::CkptError;

/// Operations that change the disk.
pub(crate) trait Filesystem: Send + Sync {
    /// Creates a directory and its parents.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Creates a file that does not exist yet and writes all of it.
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<File>;
    /// Forces the content of a file to disk.
    fn sync_file(&self, file: &File) -> io::Result<()>;
    /// Forces the entries of a directory to disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Moves a file or directory within its file system, atomically.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a directory and what is in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Disk;

impl Filesystem for Disk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<File> {
        // `create_new` follows no symbolic link that someone put in the way.
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(bytes)?;
        Ok(file)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Elsewhere directories cannot be opened as files, and the rename itself is journalled.
        if cfg!(unix) {
            File::open(path)?.sync_all()?;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// Writes a new file and forces it to disk.
pub(crate) fn write_synced(filesystem: &dyn Filesystem, path: &Path, bytes: &[u8]) -> Result<(), CkptError> {
    let file = filesystem
        .write_new(path, bytes)
        .map_err(CkptError::io("write", path))?;
    filesystem.sync_file(&file).map_err(CkptError::io("sync", path))
}

/// Size of a regular file of at most `limit` bytes.
pub(crate) fn checked_size(path: &Path, limit: u64) -> Result<u64, CkptError> {
    let metadata = fs::metadata(path).map_err(CkptError::io("open", path))?;
    if !metadata.is_file() {
        return Err(CkptError::Io {
            operation: "read",
            path: path.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"),
        });
    }
    if metadata.len() > limit {
        return Err(CkptError::TooLarge {
            path: path.to_owned(),
            bytes: metadata.len(),
            limit,
        });
    }
    Ok(metadata.len())
}

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, CkptError> {
    let size = checked_size(path, limit)?;
    let file = File::open(path).map_err(CkptError::io("open", path))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(size as usize)
        .map_err(|_| CkptError::Io {
            operation: "allocate memory for",
            path: path.to_owned(),
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
    // A file that grows while it is read stays within the limit.
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(CkptError::io("read", path))?;
    Ok(bytes)
}
