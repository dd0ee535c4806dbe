//! `data.yaml`: names of classes and where the images of each split lie.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::malformed;
use crate::confine::confined_join;
use crate::error::Result;
use crate::folder::{is_image_name, list_folder, read_text};

/// Extensions of files beside images that are none.
const NO_IMAGES: [&str; 8] = ["txt", "npy", "cache", "json", "yaml", "yml", "xml", "csv"];
/// Folders nest no deeper below a split's own.
const MAX_DEPTH: usize = 8;

/// A data set in YOLO's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The `data.yaml`, or the list of names that stands in for it.
    pub file: PathBuf,
    /// Folder that every name is relative to.
    pub root: PathBuf,
    /// Names of the classes 0, 1, 2, …
    pub names: Vec<String>,
    /// Folders of images and lists of images by split.
    pub splits: BTreeMap<String, Vec<PathBuf>>,
}

impl Config {
    /// The configuration in `root`: `data.yaml`, another YAML file with `names`, or `classes.txt` beside `images/` and `labels/`.
    ///
    /// # Errors
    /// That a file that looks like one is malformed; [`Io`](crate::error::DataError::Io).
    pub fn find(root: &Path) -> Result<Option<PathBuf>> {
        let files = list_folder(root)?;
        let named = |name: &str| files.iter().find(|file| file.ends_with(name)).cloned();
        if let Some(file) = named("data.yaml").or_else(|| named("data.yml")) {
            return Ok(Some(file));
        }
        for file in &files {
            let extension = file.extension().and_then(|extension| extension.to_str());
            if matches!(extension, Some("yaml" | "yml")) {
                let tree = serde_saphyr::from_str::<Value>(&read_text(file)?);
                if tree.is_ok_and(|tree| tree.get("names").is_some() && tree.get("train").is_some()) {
                    return Ok(Some(file.clone()));
                }
            }
        }
        let folders = root.join("images").is_dir() && root.join("labels").is_dir();
        Ok(named("classes.txt").filter(|_| folders))
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// [`Malformed`](crate::error::DataError::Malformed) for a file that is none, for classes without a name, and for places outside its folder.
    pub fn read(file: &Path) -> Result<Self> {
        let text = read_text(file)?;
        let folder = match file.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if file.extension().is_some_and(|extension| extension == "txt") {
            return Self::of_classes(file, folder, &text);
        }
        let bad = |what: String| malformed(file, what);
        let tree: Value =
            serde_saphyr::from_str(&text).map_err(|error| bad(format!("is no YAML: {error}")))?;
        let names = names_of(&tree).map_err(bad)?;
        if let Some(count) = tree.get("nc").and_then(Value::as_u64)
            && count != names.len() as u64
        {
            return Err(bad(format!("nc is {count}, but there are {} names", names.len())));
        }
        let root = match tree.get("path").and_then(Value::as_str) {
            Some(path) => root_of(file, folder, path)?,
            None => folder.to_path_buf(),
        };
        let mut splits = BTreeMap::new();
        for (key, value) in tree.as_object().into_iter().flatten() {
            // Other keys are splits where they say so as our own converter does.
            let known = ["train", "val", "valid", "test"].contains(&key.as_str())
                || value.as_str() == Some(&format!("images/{key}"));
            if !known || value.is_null() || value.as_str() == Some("") {
                continue;
            }
            let entries: Option<Vec<&str>> = match value {
                Value::Array(entries) => entries.iter().map(Value::as_str).collect(),
                other => other.as_str().map(|entry| vec![entry]),
            };
            let entries =
                entries.ok_or_else(|| bad(format!("{key}: a folder or a list of folders is needed")))?;
            let places = entries.iter().map(|entry| place_of(file, &root, entry));
            splits.insert(split_name(key), places.collect::<Result<Vec<_>>>()?);
        }
        if splits.is_empty() {
            return Err(bad("names no split: give train: and val:".into()));
        }
        Ok(Self {
            file: file.to_path_buf(),
            root,
            names,
            splits,
        })
    }

    /// A list of names, one a line, and `images/<split>` or `images` alone.
    fn of_classes(file: &Path, root: &Path, text: &str) -> Result<Self> {
        let names: Vec<String> = (text.lines())
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
            .collect();
        let images = root.join("images");
        let mut splits = BTreeMap::new();
        for folder in list_folder(&images)? {
            if let (true, Some(name)) = (folder.is_dir(), folder.file_name().and_then(|name| name.to_str())) {
                splits.insert(split_name(name), vec![folder]);
            }
        }
        if splits.is_empty() {
            splits.insert("train".to_owned(), vec![images]);
        }
        Ok(Self {
            file: file.to_path_buf(),
            root: root.to_path_buf(),
            names,
            splits,
        })
    }

    /// Images of a split, in the order of the lists, folders sorted.
    ///
    /// # Errors
    /// [`Malformed`](crate::error::DataError::Malformed) for a split, folder or list that is not there, and for images that are neither JPEG nor PNG.
    pub fn images(&self, split: &str) -> Result<Vec<PathBuf>> {
        let places = self.splits.get(split).ok_or_else(|| {
            let known: Vec<&str> = self.splits.keys().map(String::as_str).collect();
            malformed(
                &self.file,
                format!("has no split {split:?}; there are: {}", known.join(", ")),
            )
        })?;
        let mut images = Vec::new();
        for place in places {
            if place.is_dir() {
                self.walk(place, 0, &mut images)?;
            } else if place.extension().is_some_and(|extension| extension == "txt") && place.is_file() {
                self.read_list(place, &mut images)?;
            } else {
                let what = format!(
                    "split {split:?} is in {}, which is neither a folder nor a list",
                    place.display()
                );
                return Err(malformed(&self.file, what));
            }
        }
        Ok(images)
    }

    fn walk(&self, folder: &Path, depth: usize, images: &mut Vec<PathBuf>) -> Result<()> {
        for path in list_folder(folder)? {
            let extension = path.extension().and_then(|extension| extension.to_str());
            let extension = extension.unwrap_or("").to_ascii_lowercase();
            let hidden = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if hidden {
                continue;
            }
            // Links to folders could lead round in a circle.
            if path.is_dir() {
                if depth < MAX_DEPTH && !path.is_symlink() {
                    self.walk(&path, depth + 1, images)?;
                }
            } else if is_image_name(&path) {
                images.push(path);
            } else if !NO_IMAGES.contains(&extension.as_str()) {
                let what = format!(
                    "{} is neither JPEG nor PNG: convert it, or remove it from the data set",
                    path.display()
                );
                return Err(malformed(&self.file, what));
            }
        }
        Ok(())
    }

    fn read_list(&self, list: &Path, images: &mut Vec<PathBuf>) -> Result<()> {
        for line in read_text(list)?.lines() {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            // `./` means the folder of the list; everything else is relative to the root.
            let base = match line.starts_with("./") {
                true => list.parent().unwrap_or(&self.root),
                false => &self.root,
            };
            images.push(confined_join(base, line, list)?);
        }
        Ok(())
    }

    /// The name of an image as annotations would write it: behind `images/<split>/`.
    pub(super) fn name_of(&self, image: &Path) -> String {
        let folders = self.splits.values().flatten();
        let inside = folders
            .filter(|folder| folder.is_dir())
            .find_map(|folder| image.strip_prefix(folder).ok());
        let inside = inside.or_else(|| image.strip_prefix(self.root.join("images")).ok());
        let inside = inside.or_else(|| image.strip_prefix(&self.root).ok());
        inside.unwrap_or(image).to_string_lossy().into_owned()
    }
}

fn split_name(key: &str) -> String {
    match key {
        "valid" | "validation" => "val".to_owned(),
        key => key.to_owned(),
    }
}

fn names_of(tree: &Value) -> std::result::Result<Vec<String>, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        _ => Err(format!("names: {value} is no name")),
    };
    match tree.get("names") {
        Some(Value::Array(names)) if !names.is_empty() => names.iter().map(text).collect(),
        Some(Value::Object(names)) if !names.is_empty() => {
            let mut by_class = BTreeMap::new();
            for (class, name) in names {
                let number: usize = class
                    .parse()
                    .map_err(|_| format!("names: {class:?} is no class number"))?;
                by_class.insert(number, text(name)?);
            }
            let gap = (0..by_class.len()).find(|class| !by_class.contains_key(class));
            match gap {
                Some(class) => Err(format!("names: class {class} has no name; classes count from 0")),
                None => Ok(by_class.into_values().collect()),
            }
        }
        _ => Err("has no names: give the names of the classes as a list".into()),
    }
}

/// The folder that `path:` means: the one of the file, or one inside it.
///
/// Data sets move, so a path that does not exist is taken for the folder that the file lies in.
fn root_of(file: &Path, folder: &Path, path: &str) -> Result<PathBuf> {
    let given = folder.join(path);
    let (Ok(given), Ok(own)) = (given.canonicalize(), folder.canonicalize()) else {
        return Ok(folder.to_path_buf());
    };
    if given == own {
        return Ok(folder.to_path_buf());
    }
    match given.strip_prefix(&own) {
        Ok(inside) => Ok(folder.join(inside)),
        Err(_) => Err(malformed(
            file,
            format!(
                "path: {path:?} lies outside the folder of this file: put the file into that folder and leave path out"
            ),
        )),
    }
}

/// The folder or list that an entry of a split means.
///
/// Exports write `../train/images` for folders beside the file.
fn place_of(file: &Path, root: &Path, entry: &str) -> Result<PathBuf> {
    let entry = entry.trim_end_matches('/');
    let stripped = entry.trim_start_matches("../");
    if stripped.len() < entry.len() && root.join(stripped).exists() {
        return confined_join(root, stripped, file);
    }
    if Path::new(entry).is_absolute()
        && let (Ok(given), Ok(own)) = (Path::new(entry).canonicalize(), root.canonicalize())
        && let Ok(inside) = given.strip_prefix(&own)
    {
        return Ok(root.join(inside));
    }
    let place = confined_join(root, entry, file)?;
    // `./images` and `images` are one.
    Ok(place
        .components()
        .filter(|part| *part != Component::CurDir)
        .collect())
}

/// Labels of an image: the last folder `images` of its path becomes `labels`, the extension `txt`.
pub(super) fn labels_of(image: &Path) -> PathBuf {
    let parts: Vec<Component<'_>> = image.components().collect();
    let last = parts.iter().rposition(|part| part.as_os_str() == "images");
    let mut labels: PathBuf = match last {
        Some(at) => (parts.iter().enumerate())
            .map(|(index, part)| match index == at {
                true => std::ffi::OsStr::new("labels"),
                false => part.as_os_str(),
            })
            .collect(),
        None => image.to_path_buf(),
    };
    labels.set_extension("txt");
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read(yaml: &str, folders: &[&str]) -> std::result::Result<Config, String> {
        let root = tempfile::tempdir().unwrap();
        for folder in folders {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let file = root.path().join("data.yaml");
        fs::write(&file, yaml).unwrap();
        Config::read(&file)
            .map(|mut config| {
                let own = |path: &PathBuf| path.strip_prefix(root.path()).unwrap().to_path_buf();
                config
                    .splits
                    .values_mut()
                    .for_each(|places| *places = places.iter().map(own).collect());
                config
            })
            .map_err(|error| error.to_string())
    }

    fn train(config: &Config) -> String {
        config.splits["train"][0].display().to_string()
    }

    #[test]
    fn names_come_as_a_list_or_by_number() {
        let list = read("train: images/train\nval: [a, b]\nnames: [cat, 'no', 3]", &[]).unwrap();
        assert_eq!(list.names, ["cat", "no", "3"]);
        assert_eq!(list.splits["val"].len(), 2);
        let map = read("train: images/train\nnames:\n  1: dog\n  0: cat\nnc: 2", &[]).unwrap();
        assert_eq!(map.names, ["cat", "dog"]);
        for (yaml, expected) in [
            ("train: a\nnames: {0: a, 2: b}", "class 1 has no name"),
            ("train: a\nnames: [a]\nnc: 2", "nc is 2"),
            ("train: a", "no names"),
            ("names: [a]", "no split"),
            ("names: [", "YAML"),
        ] {
            let error = read(yaml, &[]).unwrap_err();
            assert!(error.contains(expected) && error.contains("data.yaml"), "{error}");
        }
    }

    #[test]
    fn places_are_found_as_exports_write_them_and_never_outside() {
        let exported = read(
            "train: ../train/images\nval: ../valid/images\nnames: [a]",
            &["train/images", "valid/images"],
        );
        assert_eq!(train(&exported.unwrap()), "train/images");
        // A path from another machine.
        let moved = read(
            "path: /home/me/set\ntrain: images/train\nnames: [a]",
            &["images/train"],
        );
        assert_eq!(train(&moved.unwrap()), "images/train");
        let below = read("path: sub\ntrain: images\nnames: [a]", &["sub/images"]);
        assert_eq!(train(&below.unwrap()), "sub/images");
        for yaml in [
            "path: /tmp\ntrain: a\nnames: [a]",
            "path: ..\ntrain: a\nnames: [a]",
            "train: /etc\nnames: [a]",
            "train: ../../etc\nnames: [a]",
        ] {
            assert!(read(yaml, &[]).is_err(), "{yaml}");
        }
    }

    #[test]
    fn labels_lie_where_the_last_folder_images_becomes_labels() {
        let labels = |image: &str| labels_of(Path::new(image)).display().to_string();
        assert_eq!(
            labels("/d/images/x/images/train/a.b.jpg"),
            "/d/images/x/labels/train/a.b.txt"
        );
        assert_eq!(labels("train/a.png"), "train/a.txt");
    }
}
