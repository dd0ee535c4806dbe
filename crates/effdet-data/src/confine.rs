//! Names from inside data, kept inside the folder they belong to.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::error::{DataError, Result};
use crate::report::FindingKind;

/// Joins a name from inside data to a folder it must not leave.
///
/// A colon is part of a name except behind a drive letter.
///
/// # Errors
/// [`DataError::Malformed`] for absolute names, names with `..`, drive letters, backslashes and NUL.
pub fn confined_join(folder: &Path, name: &str, from: &Path) -> Result<PathBuf> {
    let relative = Path::new(name);
    let inside = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let bytes = name.as_bytes();
    let drive = bytes.len() >= 2 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':';
    let what = if name.is_empty() {
        "an empty file name: name the image".to_owned()
    } else if !inside || drive {
        format!("file name {name:?} leaves the image folder: use names relative to it")
    } else if name.contains('\0') {
        format!("file name {name:?} holds a NUL byte, which no file name can: write the annotations again")
    } else if name.contains('\\') {
        format!("file name {name:?} holds a backslash: write folders with / between them")
    } else {
        return Ok(folder.join(relative));
    };
    Err(DataError::Malformed {
        file: from.to_path_buf(),
        what,
    })
}

/// A folder whose files are checked: they are there, and no link leads out of it.
#[derive(Debug)]
pub struct Confinement {
    root: PathBuf,
    follow_links: bool,
    /// Folders that were looked at: whether they lie inside.
    folders: HashMap<PathBuf, bool>,
}

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Misplaced {
    /// There is no such file.
    Missing,
    /// It is reached through a link that leaves the folder.
    Escapes,
}

impl Confinement {
    /// Files below `root`, which may itself be a link.
    ///
    /// # Errors
    /// [`DataError::Io`] when there is no such folder.
    pub fn new(root: &Path, follow_links: bool) -> Result<Self> {
        let root = fs::canonicalize(root).map_err(|source| DataError::Io {
            file: root.to_path_buf(),
            source,
        })?;
        Ok(Self {
            root,
            follow_links,
            folders: HashMap::new(),
        })
    }

    /// Checks one file.
    pub fn check(&mut self, file: &Path) -> std::result::Result<(), Misplaced> {
        let Ok(metadata) = fs::symlink_metadata(file) else {
            return Err(Misplaced::Missing);
        };
        if metadata.is_symlink() && !file.exists() {
            return Err(Misplaced::Missing);
        }
        if self.follow_links {
            return Ok(());
        }
        let inside = match metadata.is_symlink() {
            true => self.lies_inside(file),
            false => {
                let folder = file.parent().unwrap_or(Path::new("."));
                match self.folders.get(folder) {
                    Some(&inside) => inside,
                    None => {
                        let inside = self.lies_inside(folder);
                        self.folders.insert(folder.to_path_buf(), inside);
                        inside
                    }
                }
            }
        };
        if inside { Ok(()) } else { Err(Misplaced::Escapes) }
    }

    fn lies_inside(&self, path: &Path) -> bool {
        fs::canonicalize(path).is_ok_and(|path| path.starts_with(&self.root))
    }
}

impl Misplaced {
    /// Its kind of finding.
    pub(crate) fn kind(&self) -> FindingKind {
        match self {
            Self::Missing => FindingKind::MissingFile,
            Self::Escapes => FindingKind::Escape,
        }
    }

    /// The error for a file named by `from`.
    pub fn error(&self, file: &Path, from: &Path) -> DataError {
        DataError::Malformed {
            file: from.to_path_buf(),
            what: match self {
                Self::Missing => format!(
                    "image {} is not there: check the image folder, or leave the image out",
                    file.display()
                ),
                Self::Escapes => format!(
                    "image {} is a link out of the data folder: copy the file, or allow such links",
                    file.display()
                ),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str) -> Option<String> {
        let joined = confined_join(Path::new("images"), name, Path::new("a.json"));
        joined.err().map(|error| error.to_string())
    }

    #[test]
    fn names_cannot_leave_the_folder() {
        for name in ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "C:\\a.jpg", "c:a.jpg"] {
            assert!(
                message(name).unwrap().contains("leaves the image folder"),
                "{name}"
            );
        }
        assert!(message("").unwrap().contains("empty"));
        assert!(message("a\0.jpg").unwrap().contains("NUL"));
        assert!(message("a\\b.jpg").unwrap().contains("backslash"));
        for name in [
            "a.jpg",
            "sub/a.jpg",
            "./a.jpg",
            "12:30.jpg",
            "ab:c.jpg",
            "caf\u{e9}.jpg",
        ] {
            assert_eq!(message(name), None, "{name}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_out_of_the_folder_are_told_from_links_inside_it() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
        for dir in [&root, &outside] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("a.jpg"), "").unwrap();
        }
        symlink(outside.join("a.jpg"), root.join("out.jpg")).unwrap();
        symlink(root.join("a.jpg"), root.join("in.jpg")).unwrap();
        symlink(&outside, root.join("sub")).unwrap();
        symlink(folder.path().join("nowhere"), root.join("broken.jpg")).unwrap();
        let check = |follow, name: &str| Confinement::new(&root, follow).unwrap().check(&root.join(name));
        assert_eq!(check(false, "a.jpg"), Ok(()));
        assert_eq!(check(false, "in.jpg"), Ok(()));
        assert_eq!(check(false, "out.jpg"), Err(Misplaced::Escapes));
        assert_eq!(check(false, "sub/a.jpg"), Err(Misplaced::Escapes));
        assert_eq!(check(false, "broken.jpg"), Err(Misplaced::Missing));
        assert_eq!(check(false, "b.jpg"), Err(Misplaced::Missing));
        assert_eq!(check(true, "sub/a.jpg"), Ok(()));
        // The folder itself may be a link.
        symlink(&root, folder.path().join("alias")).unwrap();
        let alias = folder.path().join("alias");
        assert_eq!(
            Confinement::new(&alias, false)
                .unwrap()
                .check(&alias.join("a.jpg")),
            Ok(())
        );
    }
}
