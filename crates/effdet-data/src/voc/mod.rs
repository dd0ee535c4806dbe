//! Pascal VOC folders: `Annotations/*.xml`, `JPEGImages/`, `ImageSets/Main/<split>.txt`.
//!
//! A box is `[xmin, ymin, xmax − xmin, ymax − ymin]`, corners as written (the convention of automl's converter). Categories are
//! those of `categories.json` where there is one, the twenty of VOC when every name belongs to them, otherwise the names found,
//! sorted, with ids from 1. What the format cannot hold lies in a [sidecar file](crate::sidecar).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use effdet_model::label_map::{CategoryId, LabelMap};

use crate::coco::clip;
use crate::confine::{Confinement, confined_join};
use crate::dataset::{Category, DetectionDataset, Example, ImageSource, ObjectAnnotation};
use crate::error::{DataError, Result};
use crate::folder::{list_folder, read_text};
use crate::report::{FindingKind, LoadOptions, LoadReport};
use crate::sidecar;

mod write;
mod xml;

pub use write::write;
pub use xml::{Annotation, RawObject, parse};

/// The split that stands for a folder without lists: every annotation.
pub const ALL: &str = "all";
/// Extensions of images, in the order in which they are looked for.
const EXTENSIONS: [&str; 5] = ["jpg", "jpeg", "png", "JPG", "JPEG"];

fn malformed(file: &Path, what: String) -> DataError {
    DataError::Malformed {
        file: file.to_path_buf(),
        what,
    }
}

/// As [`load_with`], stopping at the first fault.
///
/// # Errors
/// Those of [`load_with`].
pub fn load(root: &Path, split: &str) -> Result<(DetectionDataset, LoadReport)> {
    load_with(root, split, &LoadOptions::default())
}

/// Reads one split of a VOC folder; [`ALL`] where the folder has no lists.
///
/// Images get ids from 1 in the order of the split's list. Categories come from all annotations of the folder, so that every
/// split has the same ones.
///
/// # Errors
/// A missing list, annotation or image, an image that is listed twice, and malformed annotations, each with its file; unless
/// `options` collects them.
pub fn load_with(root: &Path, split: &str, options: &LoadOptions) -> Result<(DetectionDataset, LoadReport)> {
    let mut report = LoadReport::default();
    let annotations = read_annotations(root)?;
    let names = (annotations.values().flatten())
        .flat_map(|annotation| &annotation.objects)
        .map(|object| object.name.clone())
        .filter(|name| !name.is_empty())
        .collect();
    let categories = categories_of(root, names)?;
    let list = root.join("ImageSets/Main").join(format!("{split}.txt"));
    let stems = match list.is_file() || split != ALL {
        true => read_list(&list)?,
        false => all_stems(root)?,
    };
    let mut reader = Reader {
        root,
        list: &list,
        options,
        categories: (categories.iter())
            .map(|category| (category.name.clone(), category.id))
            .collect(),
        annotations,
        inside: Confinement::new(root, options.follow_links)?,
        listed: HashSet::new(),
    };
    let mut examples = Vec::with_capacity(stems.len());
    for (line, stem) in stems.iter().enumerate() {
        examples.extend(reader.example(line, stem, examples.len() as i64 + 1, &mut report)?);
    }
    if examples.is_empty() && report.faults.is_empty() {
        return Err(malformed(&list, "lists no image".into()));
    }
    let folder = root
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut dataset = DetectionDataset {
        name: format!("{folder} {split}"),
        examples,
        categories,
    };
    sidecar::apply(&sidecar::file(root, split), &mut dataset, &mut report)?;
    Ok((dataset, report))
}

struct Reader<'a> {
    root: &'a Path,
    list: &'a Path,
    options: &'a LoadOptions,
    categories: HashMap<String, CategoryId>,
    annotations: HashMap<PathBuf, Result<Annotation>>,
    inside: Confinement,
    listed: HashSet<String>,
}

impl Reader<'_> {
    /// The example of one line; none where it cannot be used and faults are collected.
    fn example(
        &mut self,
        line: usize,
        stem: &str,
        image_id: i64,
        report: &mut LoadReport,
    ) -> Result<Option<Example>> {
        let record = line as i64 + 1;
        let faults = self.options.faults;
        let list_name = self.list.display().to_string();
        if !self.listed.insert(stem.to_owned()) {
            let error = malformed(self.list, format!("names {stem} twice: remove one of the lines"));
            report.fault(faults, FindingKind::DuplicateImage, list_name, record, error)?;
            return Ok(None);
        }
        let xml = match confined_join(&self.root.join("Annotations"), &format!("{stem}.xml"), self.list) {
            Ok(xml) => xml,
            Err(error) => {
                report.fault(faults, FindingKind::Escape, list_name, record, error)?;
                return Ok(None);
            }
        };
        let annotation = match self.annotations.remove(&xml) {
            Some(annotation) => annotation,
            // In a folder below.
            None => read_annotation(&xml),
        };
        let annotation = match annotation {
            Ok(annotation) => annotation,
            Err(error) => {
                let kind = match error {
                    DataError::Io { .. } => FindingKind::MissingFile,
                    _ => FindingKind::Malformed,
                };
                report.fault(faults, kind, xml.display().to_string(), record, error)?;
                return Ok(None);
            }
        };
        let image = image_file(self.root, stem, self.list);
        let image = image.and_then(|image| match self.inside.check(&image) {
            Err(misplaced) if self.options.check_files => {
                Err((misplaced.kind(), misplaced.error(&image, self.list)))
            }
            _ => Ok(image),
        });
        let image = match image {
            Ok(image) => image,
            Err((kind, error)) => {
                report.fault(faults, kind, list_name, record, error)?;
                return Ok(None);
            }
        };
        let folder = self.root.join("JPEGImages");
        let file_name = image.strip_prefix(&folder).unwrap_or(&image);
        let mut example = Example {
            image_id,
            source_id: stem.to_owned(),
            file_name: file_name.to_string_lossy().into_owned(),
            source: ImageSource::File(image),
            width: annotation.width,
            height: annotation.height,
            objects: Vec::new(),
        };
        for (index, object) in annotation.objects.into_iter().enumerate() {
            self.object(&xml, index, object, &mut example, report)?;
        }
        Ok(Some(example))
    }

    fn object(
        &self,
        xml: &Path,
        index: usize,
        object: RawObject,
        example: &mut Example,
        report: &mut LoadReport,
    ) -> Result<()> {
        let faults = self.options.faults;
        let mut fault = |kind, what: String| {
            let file = xml.display().to_string();
            report.fault(faults, kind, file, index as i64, malformed(xml, what))
        };
        let [Some(xmin), Some(ymin), Some(xmax), Some(ymax)] = object.corners else {
            let what = format!("object {index} ({}) has no complete bndbox", object.name);
            return fault(FindingKind::NoBox, what);
        };
        let Some(&category) = self.categories.get(&object.name) else {
            let (kind, what) = match object.name.as_str() {
                "" => (FindingKind::NoCategory, format!("object {index} has no name")),
                name => (
                    FindingKind::UnknownCategory,
                    format!("object {index}: {name:?} is not in categories.json"),
                ),
            };
            fault(kind, what)?;
            if kind == FindingKind::UnknownCategory {
                *report.unknown_categories.entry(object.name).or_default() += 1;
            }
            return Ok(());
        };
        let bbox = [xmin, ymin, xmax - xmin, ymax - ymin];
        if let Some(box_xywh_px) = clip(bbox, example, index as i64, report) {
            example.objects.push(ObjectAnnotation {
                box_xywh_px,
                category,
                area: box_xywh_px[2] * box_xywh_px[3],
                is_crowd: false,
                difficult: object.difficult,
            });
        }
        Ok(())
    }
}

/// Every annotation of the folder, or why it cannot be read.
fn read_annotations(root: &Path) -> Result<HashMap<PathBuf, Result<Annotation>>> {
    let files = xml_files(root)?;
    Ok(files
        .into_iter()
        .map(|file| {
            let annotation = read_annotation(&file);
            (file, annotation)
        })
        .collect())
}

fn read_annotation(file: &Path) -> Result<Annotation> {
    parse(file, &read_text(file)?)
}

fn xml_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = list_folder(&root.join("Annotations"))?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "xml"));
    Ok(files)
}

fn all_stems(root: &Path) -> Result<Vec<String>> {
    let stem = |file: &PathBuf| Some(file.file_stem()?.to_string_lossy().into_owned());
    Ok(xml_files(root)?.iter().filter_map(stem).collect())
}

/// Stems of a list; the second column of a list of a single class is left out.
fn read_list(list: &Path) -> Result<Vec<String>> {
    let stem = |line: &str| {
        let line = line.trim();
        let stem = match line.rsplit_once(char::is_whitespace) {
            Some((stem, "-1" | "0" | "1")) => stem.trim_end(),
            _ => line,
        };
        (!stem.is_empty()).then(|| stem.to_owned())
    };
    Ok(read_text(list)?.lines().filter_map(stem).collect())
}

fn categories_of(root: &Path, names: BTreeSet<String>) -> Result<Vec<Category>> {
    let file = root.join("categories.json");
    if file.is_file() {
        return crate::coco::read_categories(&file);
    }
    let voc = LabelMap::voc();
    let category = |id, name: &str| Category {
        id,
        name: name.to_owned(),
    };
    if names
        .iter()
        .all(|name| voc.categories().any(|(_, voc)| voc == name))
    {
        return Ok(voc.categories().map(|(id, name)| category(id, name)).collect());
    }
    let ids = (1..).map(CategoryId);
    Ok(ids.zip(&names).map(|(id, name)| category(id, name)).collect())
}

fn image_file(
    root: &Path,
    stem: &str,
    list: &Path,
) -> std::result::Result<PathBuf, (FindingKind, DataError)> {
    let folder = root.join("JPEGImages");
    for extension in EXTENSIONS {
        let file = confined_join(&folder, &format!("{stem}.{extension}"), list)
            .map_err(|error| (FindingKind::Escape, error))?;
        if file.is_file() {
            return Ok(file);
        }
    }
    let what = format!(
        "names {stem}, but {} has no such .jpg, .jpeg or .png",
        folder.display()
    );
    Err((FindingKind::MissingFile, malformed(list, what)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const XML: &str = "<annotation><size><width>20</width><height>10</height></size>\
        <object><name>A</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>8</ymax></bndbox></object></annotation>";

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    #[test]
    fn an_image_that_is_listed_twice_is_refused() {
        let root = folder(&[
            ("Annotations/a.xml", XML),
            ("JPEGImages/a.jpg", ""),
            ("ImageSets/Main/train.txt", "a\na\n"),
        ]);
        let error = load(root.path(), "train").unwrap_err().to_string();
        assert!(error.contains("train.txt") && error.contains("twice"), "{error}");
    }

    #[test]
    fn lists_of_one_class_and_names_with_spaces_are_understood() {
        let root = folder(&[
            ("Annotations/my photo.xml", XML),
            ("Annotations/b.xml", XML),
            ("JPEGImages/my photo.jpg", ""),
            ("JPEGImages/b.png", ""),
            ("ImageSets/Main/train.txt", "my photo\nb -1\n"),
        ]);
        let (data, _) = load(root.path(), "train").unwrap();
        let names: Vec<&str> = data.examples.iter().map(|e| e.file_name.as_str()).collect();
        assert_eq!(names, ["my photo.jpg", "b.png"]);
    }

    #[test]
    fn a_folder_without_lists_is_one_split() {
        let root = folder(&[("Annotations/a.xml", XML), ("JPEGImages/a.jpg", "")]);
        assert_eq!(load(root.path(), ALL).unwrap().0.examples.len(), 1);
        assert!(load(root.path(), "train").is_err());
    }

    #[test]
    fn faults_are_collected_on_request_and_the_rest_is_kept() {
        let root = folder(&[
            ("Annotations/a.xml", XML),
            ("Annotations/b.xml", "<annotation><object>"),
            ("Annotations/c.xml", XML),
            ("Annotations/d.xml", &XML.replace("<xmin>1</xmin>", "")),
            ("JPEGImages/a.jpg", ""),
            ("JPEGImages/b.jpg", ""),
            ("JPEGImages/d.jpg", ""),
            ("ImageSets/Main/train.txt", "a\nb\nc\nd\na\n../a\nmissing\n"),
        ]);
        let options = LoadOptions {
            faults: crate::report::Faults::Collect,
            ..LoadOptions::default()
        };
        let (data, report) = load_with(root.path(), "train", &options).unwrap();
        let objects: Vec<usize> = data.examples.iter().map(|e| e.objects.len()).collect();
        assert_eq!(objects, [1, 0]);
        let kinds: Vec<FindingKind> = report.faults.iter().map(|fault| fault.kind).collect();
        let expected = [
            FindingKind::Malformed,
            FindingKind::MissingFile,
            FindingKind::NoBox,
            FindingKind::DuplicateImage,
            FindingKind::Escape,
            FindingKind::MissingFile,
        ];
        assert_eq!(kinds, expected);
        assert!(load(root.path(), "train").is_err());
    }

    #[test]
    fn the_real_set_has_its_known_counts() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/bccd");
        if !root.exists() {
            println!("skipped: ../shared/data is absent");
            return;
        }
        let mut dropped = 0;
        let mut objects = 0;
        for (split, images) in [("train", 205), ("val", 87), ("test", 72)] {
            let (dataset, report) = load(&root, split).unwrap();
            assert_eq!(dataset.examples.len(), images, "{split}");
            let names: Vec<&str> = dataset.categories.iter().map(|c| c.name.as_str()).collect();
            assert_eq!(names, ["Platelets", "RBC", "WBC"]);
            dropped += report.dropped.len();
            objects += dataset.examples.iter().map(|e| e.objects.len()).sum::<usize>();
        }
        assert_eq!((dropped, objects), (2, 4886));
    }
}
