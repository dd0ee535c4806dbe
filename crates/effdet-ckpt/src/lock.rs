//! One process at a time writes into a run folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::CkptError;

/// File that is locked; it stays when the lock ends.
const LOCK_FILE: &str = ".lock";

/// Exclusive use of a run folder, until it is dropped or its process ends in whatever way.
#[derive(Debug)]
pub struct RunLock {
    /// The operating system's lock lives as long as this.
    _file: File,
}

impl RunLock {
    /// Locks `folder`, which exists; `holder` tells others who has it.
    ///
    /// # Errors
    /// [`CkptError::Locked`] when another process has it; [`CkptError::Io`].
    pub fn acquire(folder: &Path, holder: &str) -> Result<Self, CkptError> {
        let path = folder.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(CkptError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Who it is helps; that it is somebody is what counts.
                let _ = file.read_to_string(&mut holder);
                return Err(CkptError::Locked {
                    path: folder.to_owned(),
                    holder: holder.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(CkptError::io("lock", &path)(error)),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(holder.as_bytes()));
        written.map_err(CkptError::io("write", &path))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_who_is_named_and_is_free_when_he_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(folder.path(), "process 7 on a").unwrap();
        let error = RunLock::acquire(folder.path(), "process 8 on b").unwrap_err();
        assert!(error.to_string().contains("process 7 on a"), "{error}");
        drop(lock);
        RunLock::acquire(folder.path(), "process 8 on b").unwrap();
    }
}
