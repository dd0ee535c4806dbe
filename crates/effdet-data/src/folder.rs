//! Folders of images: what lies in them, and copies of images under names that are checked.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::confine::confined_join;
use crate::dataset::{Example, read_file};
use crate::decode::probe;
use crate::error::{DataError, Result};

/// No list and no annotation of one image is as long as this.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Sorted entries of a folder; none where there is no such folder.
pub(crate) fn list_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| DataError::Io {
        file: folder.to_path_buf(),
        source,
    };
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(io)?;
    let mut paths = entries
        .map(|entry| Ok(entry.map_err(io)?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// A UTF-8 file of sane length; a byte-order mark is skipped.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    let bytes = read_file(file, MAX_TEXT_BYTES)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    String::from_utf8(text.to_vec()).map_err(|_| DataError::Malformed {
        file: file.to_path_buf(),
        what: "is no UTF-8 text: save it as such".into(),
    })
}

/// Files that a conversion makes, and the folders above them; removed when dropped unless kept.
#[derive(Debug, Default)]
pub(crate) struct Written {
    files: Vec<PathBuf>,
    /// Folders, each before those inside it.
    folders: Vec<PathBuf>,
    kept: bool,
}

impl Written {
    /// Writes a new file and the folders above it.
    ///
    /// # Errors
    /// [`DataError::Caller`] for a file that is there already, [`DataError::Io`].
    pub(crate) fn write(&mut self, file: &Path, bytes: &[u8]) -> Result<()> {
        if file.exists() {
            return Err(DataError::Caller {
                what: format!(
                    "{} is there already: choose an empty folder, or rename images that share a name",
                    file.display()
                ),
            });
        }
        let parent = file.parent().unwrap_or(Path::new("."));
        let missing: Vec<PathBuf> = (parent.ancestors())
            .take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists())
            .map(Path::to_path_buf)
            .collect();
        self.folders.extend(missing.into_iter().rev());
        self.files.push(file.to_path_buf());
        let written = fs::create_dir_all(parent).and_then(|()| fs::write(file, bytes));
        written.map_err(|source| DataError::Io {
            file: file.to_path_buf(),
            source,
        })
    }

    /// Leaves the files where they are.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing can be done about what stays.
            for file in &self.files {
                let _ = fs::remove_file(file);
            }
            for folder in self.folders.iter().rev() {
                let _ = fs::remove_dir(folder);
            }
        }
    }
}

/// Copies images into a folder.
#[derive(Debug)]
pub(crate) struct ImageCopier<'a> {
    folder: &'a Path,
    max_encoded_bytes: u64,
    taken: HashSet<PathBuf>,
}

/// A copied image.
pub(crate) struct Copied {
    /// Name in the folder: the example's own, with an extension where it had none.
    pub file_name: String,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl<'a> ImageCopier<'a> {
    pub(crate) fn new(folder: &'a Path, max_encoded_bytes: u64) -> Self {
        Self {
            folder,
            max_encoded_bytes,
            taken: HashSet::new(),
        }
    }

    /// Copies the image of an example, byte for byte; `from` is named in messages about its name.
    ///
    /// # Errors
    /// A file name that leaves the folder, occurs twice, or is there already; an image that cannot be read or has another size
    /// than annotated; [`DataError::Io`].
    pub(crate) fn copy(&mut self, example: &Example, from: &Path, written: &mut Written) -> Result<Copied> {
        let encoded = example.source.read_bytes(self.max_encoded_bytes)?;
        let probed = probe(&encoded).map_err(|reason| DataError::Image {
            file: example.file_name.clone(),
            reason,
        })?;
        let (decoded, annotated) = ((probed.width, probed.height), (example.width, example.height));
        if annotated.0 != 0 && annotated.1 != 0 && annotated != decoded {
            return Err(DataError::SizeMismatch {
                file: example.file_name.clone(),
                decoded,
                annotated,
            });
        }
        let mut file_name = example.file_name.clone();
        if !is_image_name(Path::new(&file_name)) {
            file_name.push_str(match probed.format_name {
                "jpeg" => ".jpg",
                _ => ".png",
            });
        }
        let file = confined_join(self.folder, &file_name, from)?;
        if !self.taken.insert(file.clone()) {
            return Err(DataError::Caller {
                what: format!("two images are called {file_name}: rename one of them"),
            });
        }
        written.write(&file, &encoded)?;
        Ok(Copied {
            file_name,
            width: decoded.0,
            height: decoded.1,
        })
    }
}

/// Whether a name ends as those of images that can be decoded do.
pub(crate) fn is_image_name(file: &Path) -> bool {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("");
    ["jpg", "jpeg", "png"].contains(&extension.to_ascii_lowercase().as_str())
}
