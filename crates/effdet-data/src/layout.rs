//! Which format a folder has, and which splits.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::dataset::{DetectionDataset, LoadReport};
use crate::error::{DataError, Result};
use crate::{coco, voc};

/// Where one split of a data set lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SplitSource {
    /// COCO instances JSON and its images.
    Coco {
        /// Annotations.
        json: PathBuf,
        /// Images.
        images: PathBuf,
    },
    /// A list of a VOC folder.
    Voc {
        /// Folder with `Annotations`.
        root: PathBuf,
        /// Name of the list.
        split: String,
    },
}

impl SplitSource {
    /// Reads the split.
    ///
    /// # Errors
    /// Those of the format.
    pub fn load(&self) -> Result<(DetectionDataset, LoadReport)> {
        match self {
            Self::Coco { json, images } => coco::load(json, images),
            Self::Voc { root, split } => voc::load(root, split),
        }
    }
}

/// The splits of a data set by name: `train`, `val`, `test` …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Folder.
    pub root: PathBuf,
    /// Splits.
    pub splits: BTreeMap<String, SplitSource>,
}

impl Layout {
    /// Finds out what lies in `root`.
    ///
    /// VOC: a folder `Annotations` and lists in `ImageSets/Main`. COCO: JSON files in the folder or in `annotations/` whose names
    /// hold the split (`instances_train2017.json`, `train.json`) beside a folder of images of the same name (`train2017`,
    /// `train`, `images/train`).
    ///
    /// # Errors
    /// [`DataError::Malformed`] saying what was looked for.
    pub fn find(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "not a folder");
            return Err(DataError::Io {
                file: root.to_path_buf(),
                source,
            });
        }
        let mut splits = voc_splits(root);
        if splits.is_empty() {
            splits = coco_splits(root);
        }
        if splits.is_empty() {
            let what = "no data set found. Looked for VOC (Annotations/ with ImageSets/Main/*.txt) and for COCO \
                        (instances_<split>.json here or in annotations/, beside a folder <split> or images/<split>). \
                        Name the files with --train-json and --train-images"
                .to_owned();
            return Err(DataError::Malformed {
                file: root.to_path_buf(),
                what,
            });
        }
        Ok(Self {
            root: root.to_path_buf(),
            splits,
        })
    }

    /// A split by name.
    ///
    /// # Errors
    /// [`DataError::Malformed`] listing the splits there are.
    pub fn split(&self, name: &str) -> Result<&SplitSource> {
        self.splits.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.splits.keys().map(String::as_str).collect();
            let what = format!("has no split {name:?}; there are: {}", known.join(", "));
            DataError::Malformed {
                file: self.root.clone(),
                what,
            }
        })
    }
}

fn files_with_extension(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = (fs::read_dir(folder).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

fn stem(file: &Path) -> String {
    file.file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

fn voc_splits(root: &Path) -> BTreeMap<String, SplitSource> {
    if !root.join("Annotations").is_dir() {
        return BTreeMap::new();
    }
    // Lists of one class (`cat_train.txt`) are no splits.
    (files_with_extension(&root.join("ImageSets/Main"), "txt")
        .iter()
        .map(|file| stem(file)))
    .filter(|split| !split.contains('_'))
    .map(|split| {
        (
            split.clone(),
            SplitSource::Voc {
                root: root.to_path_buf(),
                split,
            },
        )
    })
    .collect()
}

fn coco_splits(root: &Path) -> BTreeMap<String, SplitSource> {
    let mut splits = BTreeMap::new();
    let files =
        [root.to_path_buf(), root.join("annotations")].map(|folder| files_with_extension(&folder, "json"));
    for json in files.into_iter().flatten() {
        let name = stem(&json);
        let name = name.strip_prefix("instances_").unwrap_or(&name);
        let images = [root.join(name), root.join("images").join(name)]
            .into_iter()
            .find(|folder| folder.is_dir());
        let Some(images) = images else { continue };
        // `train2017` is the split `train`.
        let split = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let split = if split.is_empty() { name } else { split };
        splits.insert(split.to_owned(), SplitSource::Coco { json, images });
    }
    splits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layouts_of_the_real_sets_are_found() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
        if !root.exists() {
            println!("skipped: ../shared/data is absent");
            return;
        }
        for (folder, expected) in [
            ("shape", vec!["train", "val"]),
            ("coco", vec!["train", "val"]),
            ("bccd", vec!["test", "train", "trainval", "val"]),
        ] {
            let layout = Layout::find(&root.join(folder)).unwrap();
            assert_eq!(layout.splits.keys().collect::<Vec<_>>(), expected, "{folder}");
        }
        let layout = Layout::find(&root.join("shape")).unwrap();
        assert!(
            layout
                .split("tset")
                .unwrap_err()
                .to_string()
                .contains("train, val")
        );
        assert!(
            Layout::find(&root.join("weights"))
                .unwrap_err()
                .to_string()
                .contains("--train-json")
        );
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = Layout::find(Path::new("/no/such/folder"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/folder"), "{error}");
    }
}
