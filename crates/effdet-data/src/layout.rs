//! Which format a folder has, and which splits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::dataset::DetectionDataset;
use crate::error::{DataError, Result};
use crate::folder::list_folder;
use crate::report::{LoadOptions, LoadReport};
use crate::tfrecord::{ReadOptions, ShardName, is_shard_file};
use crate::{coco, tfrecord, voc, yolo};

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
    /// A split of a YOLO folder.
    Yolo {
        /// Its `data.yaml`.
        config: PathBuf,
        /// Name of the split.
        split: String,
    },
    /// TFRecord shards.
    TfRecord {
        /// Shards, sorted.
        shards: Vec<PathBuf>,
    },
}

impl SplitSource {
    /// `COCO`, `VOC`, `YOLO` or `TFRecord`.
    pub fn format_name(&self) -> &'static str {
        match self {
            Self::Coco { .. } => "COCO",
            Self::Voc { .. } => "VOC",
            Self::Yolo { .. } => "YOLO",
            Self::TfRecord { .. } => "TFRecord",
        }
    }

    /// Reads the split, stopping at the first fault.
    ///
    /// # Errors
    /// Those of the format.
    pub fn load(&self) -> Result<(DetectionDataset, LoadReport)> {
        self.load_with(&LoadOptions::default())
    }

    /// Reads the split.
    ///
    /// # Errors
    /// Those of the format.
    pub fn load_with(&self, options: &LoadOptions) -> Result<(DetectionDataset, LoadReport)> {
        match self {
            Self::Coco { json, images } => coco::load_with(json, images, options),
            Self::Voc { root, split } => voc::load_with(root, split, options),
            Self::Yolo { config, split } => yolo::load_with(config, split, options),
            Self::TfRecord { shards } => {
                tfrecord::check_complete(shards)?;
                tfrecord::load_shards(shards, &ReadOptions::of(options))
            }
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
    /// YOLO: `data.yaml`, which may be named itself, or `classes.txt` beside `images/` and `labels/`. VOC: a folder `Annotations`
    /// and lists in `ImageSets/Main`, here or in a folder `VOCdevkit/VOC…`. COCO: JSON files in the folder or in `annotations/`
    /// whose names hold the split (`instances_train2017.json`, `train.json`) beside a folder of images of the same name
    /// (`train2017`, `train`, `images/train`), or folders of images that hold their own `_annotations.coco.json`. TFRecord: shards
    /// whose names begin with the split (`train-00000-of-00032.tfrecord`, `train.tfrecord.gz`). The first of these that is there
    /// counts.
    ///
    /// # Errors
    /// [`DataError::Malformed`] saying what was looked for.
    pub fn find(root: &Path) -> Result<Self> {
        if root.is_file() {
            let splits = yolo_splits_of(root)?;
            let root = root.parent().unwrap_or(Path::new(".")).to_path_buf();
            return Ok(Self { root, splits });
        }
        if !root.is_dir() {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "not a folder");
            return Err(DataError::Io {
                file: root.to_path_buf(),
                source,
            });
        }
        let mut splits = BTreeMap::new();
        for find in [yolo_splits, voc_splits, coco_splits, record_splits] {
            splits = find(root)?;
            if !splits.is_empty() {
                break;
            }
        }
        if splits.is_empty() {
            let what = "no data set found. Looked for YOLO (data.yaml), for VOC (Annotations/ with ImageSets/Main/*.txt), for \
                        COCO (instances_<split>.json here or in annotations/, beside a folder <split> or images/<split>; \
                        <split>/_annotations.coco.json) and for TFRecord (<split>-00000-of-00032.tfrecord). \
                        If the files have other names, name the annotations and the images one by one"
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

type Splits = BTreeMap<String, SplitSource>;

fn files_with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut files = list_folder(folder)?;
    files.retain(|path| path.extension().is_some_and(|found| found == extension) && path.is_file());
    Ok(files)
}

fn stem(file: &Path) -> String {
    file.file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// `train2017` is the split `train`, `validation` and `valid` are `val`.
fn split_name(name: &str) -> &str {
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "" => name,
        "valid" | "validation" => "val",
        split => split,
    }
}

fn yolo_splits(root: &Path) -> Result<Splits> {
    yolo::Config::find(root)?.map_or_else(|| Ok(Splits::new()), |config| yolo_splits_of(&config))
}

fn yolo_splits_of(config: &Path) -> Result<Splits> {
    let source = |split: String| SplitSource::Yolo {
        config: config.to_path_buf(),
        split,
    };
    let splits = yolo::Config::read(config)?.splits.into_keys();
    Ok(splits.map(|split| (split.clone(), source(split))).collect())
}

fn voc_splits(root: &Path) -> Result<Splits> {
    let Some(root) = voc_root(root)? else {
        return Ok(Splits::new());
    };
    let lists = files_with_extension(&root.join("ImageSets/Main"), "txt")?;
    // Lists of one class (`cat_train.txt`) are no splits.
    let mut splits: Vec<String> = lists
        .iter()
        .map(|file| stem(file))
        .filter(|split| !split.contains('_'))
        .collect();
    if splits.is_empty() && root.join("JPEGImages").is_dir() {
        splits.push(voc::ALL.to_owned());
    }
    let source = |split: String| SplitSource::Voc {
        root: root.clone(),
        split,
    };
    Ok(splits
        .into_iter()
        .map(|split| (split.clone(), source(split)))
        .collect())
}

/// The folder with `Annotations`: here, or the only one of `VOCdevkit/VOC…`.
fn voc_root(root: &Path) -> Result<Option<PathBuf>> {
    if root.join("Annotations").is_dir() {
        return Ok(Some(root.to_path_buf()));
    }
    let mut years = list_folder(root)?;
    years.extend(list_folder(&root.join("VOCdevkit"))?);
    let is_year = |folder: &PathBuf| {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("VOC") && folder.join("Annotations").is_dir()
    };
    years.retain(is_year);
    match years.as_slice() {
        [] => Ok(None),
        [year] => Ok(Some(year.clone())),
        several => {
            let names: Vec<String> = several
                .iter()
                .map(|folder| folder.display().to_string())
                .collect();
            Err(DataError::Malformed {
                file: root.to_path_buf(),
                what: format!("holds several VOC sets, name one of them: {}", names.join(", ")),
            })
        }
    }
}

fn coco_splits(root: &Path) -> Result<Splits> {
    let mut found = Vec::new();
    for folder in [root.to_path_buf(), root.join("annotations")] {
        for json in files_with_extension(&folder, "json")? {
            let name = stem(&json);
            let name = name.strip_prefix("instances_").unwrap_or(&name);
            let images = [root.join(name), root.join("images").join(name)]
                .into_iter()
                .find(|folder| folder.is_dir());
            if let Some(images) = images {
                found.push((split_name(name).to_owned(), json, images));
            }
        }
    }
    for images in list_folder(root)? {
        let json = images.join("_annotations.coco.json");
        if json.is_file() {
            let name = images
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            found.push((split_name(&name).to_owned(), json, images));
        }
    }
    let mut splits = Splits::new();
    for (split, json, images) in found {
        let this = json.display().to_string();
        let previous = splits.insert(split.clone(), SplitSource::Coco { json, images });
        if let Some(SplitSource::Coco { json, .. }) = previous {
            let what = format!(
                "both {} and {this} look like the split {split:?}: remove one of them, or name the annotations and the images one by one",
                json.display()
            );
            return Err(DataError::Malformed {
                file: root.to_path_buf(),
                what,
            });
        }
    }
    Ok(splits)
}

fn record_splits(root: &Path) -> Result<Splits> {
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for file in list_folder(root)? {
        if !is_shard_file(&file) || !file.is_file() {
            continue;
        }
        let plain = match file.extension() {
            Some(extension) if extension == "gz" => file.with_extension(""),
            _ => file.clone(),
        };
        let name = ShardName::parse(&plain).map_or_else(|| stem(&plain), |name| name.prefix);
        splits.entry(split_name(&name).to_owned()).or_default().push(file);
    }
    let source = |(split, shards)| (split, SplitSource::TfRecord { shards });
    Ok(splits.into_iter().map(source).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

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
                .contains("one by one")
        );
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = Layout::find(Path::new("/no/such/folder"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/folder"), "{error}");
    }

    /// The splits of a folder of empty files.
    fn find(paths: &[&str]) -> Result<Vec<(String, SplitSource)>> {
        let root = tempfile::tempdir().unwrap();
        for path in paths {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        Ok(Layout::find(root.path())?.splits.into_iter().collect())
    }

    #[test]
    fn folders_with_their_own_annotations_are_splits() {
        let splits = find(&[
            "train/_annotations.coco.json",
            "valid/_annotations.coco.json",
            "README.txt",
        ])
        .unwrap();
        let names: Vec<_> = splits.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["train", "val"]);
    }

    #[test]
    fn records_are_grouped_by_their_split() {
        let splits = find(&[
            "val-00001-of-00002.tfrecord",
            "val-00000-of-00002.tfrecord",
            "train2017-00000-of-00001.tfrecord",
            "val.categories.json",
        ])
        .unwrap();
        let shards: Vec<_> = (splits.iter())
            .map(|(name, source)| match source {
                SplitSource::TfRecord { shards } => (name.as_str(), shards.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(shards, [("train", 1), ("val", 2)]);
    }

    #[test]
    fn an_incomplete_set_of_records_is_refused_when_it_is_loaded() {
        let splits = find(&["val-00001-of-00002.tfrecord"]).unwrap();
        let error = splits[0].1.load().unwrap_err().to_string();
        assert!(error.contains("00000"), "{error}");
    }

    #[test]
    fn two_annotation_files_for_one_split_are_refused() {
        let error = find(&[
            "annotations/instances_train2014.json",
            "annotations/instances_train2017.json",
            "train2014/a.jpg",
            "train2017/a.jpg",
        ])
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("train2014.json") && error.contains("train2017.json"),
            "{error}"
        );
    }
}
