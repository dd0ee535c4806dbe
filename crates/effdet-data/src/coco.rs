//! COCO annotation files: instances JSON beside a folder of images, and results JSON.
//!
//! Boxes that run past their image are cut to it; boxes without area (before or after that) are left out; both are reported.
//! Segmentations and every unknown key are ignored.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use effdet_model::label_map::CategoryId;
use serde::{Deserialize, Serialize};

use crate::dataset::{
    Category, DetectionDataset, Example, Finding, ImageSource, LoadReport, ObjectAnnotation, read_file,
};
use crate::error::{DataError, Result};

/// Ten times the instances file of COCO's training set.
const MAX_JSON_BYTES: u64 = 4 << 30;

#[derive(Deserialize)]
struct Instances {
    #[serde(default)]
    images: Vec<Image>,
    annotations: Option<Vec<Annotation>>,
    #[serde(default)]
    categories: Vec<RawCategory>,
}

#[derive(Deserialize)]
struct Image {
    id: i64,
    file_name: String,
    #[serde(default)]
    width: u32,
    #[serde(default)]
    height: u32,
}

#[derive(Deserialize)]
struct Annotation {
    #[serde(default)]
    id: i64,
    image_id: i64,
    category_id: Option<u32>,
    bbox: Option<[f64; 4]>,
    area: Option<f64>,
    #[serde(default)]
    iscrowd: u8,
}

#[derive(Serialize, Deserialize)]
struct RawCategory {
    id: u32,
    name: String,
}

fn malformed(file: &Path, what: String) -> DataError {
    DataError::Malformed {
        file: file.to_path_buf(),
        what,
    }
}

fn read_json<T: serde::de::DeserializeOwned>(file: &Path) -> Result<T> {
    let bytes = read_file(file, MAX_JSON_BYTES)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(text).map_err(|error| malformed(file, format!("not the expected JSON: {error}")))
}

/// Joins a name from inside data to a folder it must not leave.
///
/// # Errors
/// [`DataError::Malformed`] for absolute names and names with `..`.
pub fn confined_join(folder: &Path, name: &str, from: &Path) -> Result<PathBuf> {
    let relative = Path::new(name);
    let inside = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if name.is_empty() || !inside || name.contains('\0') || name.contains(':') || name.contains('\\') {
        let what = format!("file name {name:?} leaves the image folder: use names relative to it");
        return Err(malformed(from, what));
    }
    Ok(folder.join(relative))
}

/// Reads an instances JSON whose images lie in `image_dir`.
///
/// # Errors
/// Duplicate image ids, annotations of unknown images or categories, boxes that are not finite, names that leave the folder;
/// a file without boxes (captions) is refused with the way out. Each names file and record.
pub fn load(json: &Path, image_dir: &Path) -> Result<(DetectionDataset, LoadReport)> {
    let raw: Instances = read_json(json)?;
    let bad = |what: String| malformed(json, what);
    let annotations = raw
        .annotations
        .ok_or_else(|| bad("has no \"annotations\": use an instances file".into()))?;
    if !annotations.is_empty() && annotations.iter().all(|annotation| annotation.bbox.is_none()) {
        return Err(bad(
            "its annotations have no boxes (a captions file?): use the instances file, \
                        instances_train2017.json or instances_val2017.json for COCO"
                .into(),
        ));
    }
    let mut categories = BTreeMap::new();
    for category in raw.categories {
        let id = CategoryId(category.id);
        if let Some(first) = categories.insert(id, category.name.clone()) {
            return Err(bad(format!(
                "category id {} is used by {first:?} and {:?}",
                id.0, category.name
            )));
        }
    }
    let mut examples = Vec::with_capacity(raw.images.len());
    let mut places = HashMap::with_capacity(raw.images.len());
    for image in raw.images {
        if places.insert(image.id, examples.len()).is_some() {
            return Err(bad(format!(
                "image id {} occurs twice: ids must be unique",
                image.id
            )));
        }
        examples.push(Example {
            image_id: image.id,
            source_id: image.id.to_string(),
            source: ImageSource::File(confined_join(image_dir, &image.file_name, json)?),
            file_name: image.file_name,
            width: image.width,
            height: image.height,
            objects: Vec::new(),
        });
    }
    let mut report = LoadReport::default();
    for (index, annotation) in annotations.into_iter().enumerate() {
        let record = if annotation.id != 0 {
            annotation.id
        } else {
            index as i64
        };
        let at = |what: &str| bad(format!("annotation {record}: {what}"));
        let place = places.get(&annotation.image_id);
        let &place = place.ok_or_else(|| at(&format!("image id {} does not exist", annotation.image_id)))?;
        let category = annotation.category_id.ok_or_else(|| at("has no category_id"))?;
        if !categories.contains_key(&CategoryId(category)) {
            return Err(at(&format!("category id {category} is not among the categories")));
        }
        let bbox = annotation
            .bbox
            .ok_or_else(|| at("has no bbox: use an instances file"))?;
        // A missing area is the product of the sides, which must not overflow.
        let area = annotation.area.unwrap_or(bbox[2] * bbox[3]);
        if !bbox.iter().chain([&area]).all(|v| v.is_finite()) {
            return Err(at(&format!("box {bbox:?} or its area {area} is not finite")));
        }
        let example = &mut examples[place];
        let Some(box_xywh_px) = clip(bbox, example, record, &mut report) else {
            continue;
        };
        example.objects.push(ObjectAnnotation {
            box_xywh_px,
            category: CategoryId(category),
            area: annotation.area.unwrap_or(box_xywh_px[2] * box_xywh_px[3]),
            is_crowd: annotation.iscrowd != 0,
            difficult: false,
        });
    }
    let name = json
        .file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let categories = categories
        .into_iter()
        .map(|(id, name)| Category { id, name })
        .collect();
    Ok((
        DetectionDataset {
            name,
            examples,
            categories,
        },
        report,
    ))
}

/// Cuts a box to its image; none, with a remark, where no area is left.
pub(crate) fn clip(
    bbox: [f64; 4],
    example: &Example,
    record: i64,
    report: &mut LoadReport,
) -> Option<[f64; 4]> {
    let finding = |what: String| Finding {
        file: example.file_name.clone(),
        record,
        what,
    };
    let [x, y, w, h] = bbox;
    if w <= 0.0 || h <= 0.0 {
        report.dropped.push(finding(format!("box {bbox:?} has no area")));
        return None;
    }
    if example.width == 0 || example.height == 0 {
        return Some(bbox);
    }
    let (width, height) = (f64::from(example.width), f64::from(example.height));
    let (left, top) = (x.clamp(0.0, width), y.clamp(0.0, height));
    let (right, bottom) = ((x + w).clamp(0.0, width), (y + h).clamp(0.0, height));
    if (left, top) == (x, y) && right == x + w && bottom == y + h {
        return Some(bbox);
    }
    if right <= left || bottom <= top {
        report.dropped.push(finding(format!(
            "box {bbox:?} lies outside the {width}x{height} image"
        )));
        return None;
    }
    report.clipped.push(finding(format!(
        "box {bbox:?} runs past the {width}x{height} image"
    )));
    Some([left, top, right - left, bottom - top])
}

/// Writes the annotations of a data set as instances JSON; annotation ids count from 1.
///
/// # Errors
/// [`DataError::Caller`] for a box or an area that is not finite; [`DataError::Io`].
pub fn write(dataset: &DetectionDataset, json: &Path) -> Result<()> {
    #[derive(Serialize)]
    struct OutImage<'a> {
        id: i64,
        file_name: &'a str,
        width: u32,
        height: u32,
    }
    #[derive(Serialize)]
    struct OutAnnotation {
        id: i64,
        image_id: i64,
        category_id: u32,
        bbox: [f64; 4],
        area: f64,
        iscrowd: u8,
    }
    #[derive(Serialize)]
    struct Out<'a> {
        images: Vec<OutImage<'a>>,
        annotations: Vec<OutAnnotation>,
        categories: Vec<RawCategory>,
    }
    let mut annotations = Vec::new();
    for example in &dataset.examples {
        for (index, object) in example.objects.iter().enumerate() {
            require_finite(&object.box_xywh_px, object.area, || {
                format!("object {index} of {}", example.file_name)
            })?;
            annotations.push(OutAnnotation {
                id: annotations.len() as i64 + 1,
                image_id: example.image_id,
                category_id: object.category.0,
                bbox: object.box_xywh_px,
                area: object.area,
                iscrowd: u8::from(object.is_crowd),
            });
        }
    }
    let image = |e: &'_ Example| (e.image_id, e.width, e.height);
    let out = Out {
        images: (dataset.examples.iter())
            .map(|e| {
                let (id, width, height) = image(e);
                OutImage {
                    id,
                    file_name: &e.file_name,
                    width,
                    height,
                }
            })
            .collect(),
        annotations,
        categories: raw_categories(&dataset.categories),
    };
    write_json(json, &out)
}

/// JSON has no other numbers: they would be written as `null` and not read again.
fn require_finite(box_xywh_px: &[f64; 4], number: f64, place: impl Fn() -> String) -> Result<()> {
    if box_xywh_px.iter().chain([&number]).all(|v| v.is_finite()) {
        return Ok(());
    }
    let what = format!(
        "{}: box {box_xywh_px:?} and {number} must be finite to be written as JSON; check where it came from",
        place()
    );
    Err(DataError::Caller { what })
}

fn write_json(file: &Path, value: &impl Serialize) -> Result<()> {
    let io = |source| DataError::Io {
        file: file.to_path_buf(),
        source,
    };
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent).map_err(io)?;
    }
    // A reader never sees half a file.
    let scratch = file.with_extension("json.tmp");
    let bytes = serde_json::to_vec(value).map_err(|error| io(error.into()))?;
    fs::write(&scratch, bytes).map_err(io)?;
    fs::rename(&scratch, file).map_err(io)
}

#[derive(Serialize, Deserialize)]
struct CategoryList {
    categories: Vec<RawCategory>,
}

/// Reads the categories of a COCO JSON.
///
/// # Errors
/// [`DataError`] naming the file.
pub fn read_categories(json: &Path) -> Result<Vec<Category>> {
    let list: CategoryList = read_json(json)?;
    let category = |raw: RawCategory| Category {
        id: CategoryId(raw.id),
        name: raw.name,
    };
    Ok(list.categories.into_iter().map(category).collect())
}

/// Writes a COCO JSON that holds nothing but categories.
///
/// # Errors
/// [`DataError::Io`].
pub fn write_categories(json: &Path, categories: &[Category]) -> Result<()> {
    let categories = raw_categories(categories);
    write_json(json, &CategoryList { categories })
}

fn raw_categories(categories: &[Category]) -> Vec<RawCategory> {
    let raw = |category: &Category| RawCategory {
        id: category.id.0,
        name: category.name.clone(),
    };
    categories.iter().map(raw).collect()
}

/// One row of a results JSON.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// Image.
    pub image_id: i64,
    /// Category.
    pub category_id: i64,
    /// `[x, y, width, height]` in pixels.
    pub bbox: [f64; 4],
    /// Score.
    pub score: f64,
}

/// Reads a results JSON.
///
/// # Errors
/// [`DataError`] naming the file.
pub fn read_results(json: &Path) -> Result<Vec<ResultRow>> {
    read_json(json)
}

/// Writes a results JSON; every number reads back exactly.
///
/// # Errors
/// [`DataError::Caller`] for a box or a score that is not finite; [`DataError::Io`].
pub fn write_results(json: &Path, rows: &[ResultRow]) -> Result<()> {
    for (index, row) in rows.iter().enumerate() {
        require_finite(&row.bbox, row.score, || {
            format!("results row {index} (image {})", row.image_id)
        })?;
    }
    write_json(json, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(path: &str) -> Option<PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../../shared/data")
            .join(path);
        if !path.exists() {
            println!("skipped: ../shared/data is absent");
            return None;
        }
        Some(path)
    }

    fn load_text(text: &str) -> Result<(DetectionDataset, LoadReport)> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        fs::write(&file, text).unwrap();
        load(&file, folder.path())
    }

    const IMAGE: &str = r#""images": [{"id": 3, "file_name": "a.jpg", "width": 20, "height": 10}]"#;
    const CATEGORIES: &str = r#""categories": [{"id": 7, "name": "cat"}]"#;

    #[test]
    fn boxes_are_clipped_or_dropped_and_both_are_reported() {
        let text = format!(
            "\u{feff}{{{IMAGE}, {CATEGORIES}, \"annotations\": [
                {{\"id\": 1, \"image_id\": 3, \"category_id\": 7, \"bbox\": [1, 2, 3, 4], \"iscrowd\": 1, \"area\": 5.5}},
                {{\"id\": 2, \"image_id\": 3, \"category_id\": 7, \"bbox\": [15, 5, 10, 10]}},
                {{\"id\": 4, \"image_id\": 3, \"category_id\": 7, \"bbox\": [25, 5, 10, 10]}},
                {{\"id\": 5, \"image_id\": 3, \"category_id\": 7, \"bbox\": [5, 5, 0, 10]}}]}}"
        );
        let (dataset, report) = load_text(&text).unwrap();
        let objects = &dataset.examples[0].objects;
        assert_eq!(objects.len(), 2);
        assert_eq!((objects[0].is_crowd, objects[0].area), (true, 5.5));
        assert_eq!(
            (objects[1].box_xywh_px, objects[1].area),
            ([15.0, 5.0, 5.0, 5.0], 25.0)
        );
        assert_eq!(report.clipped.iter().map(|f| f.record).collect::<Vec<_>>(), [2]);
        assert_eq!(
            report.dropped.iter().map(|f| f.record).collect::<Vec<_>>(),
            [4, 5]
        );
    }

    #[test]
    fn every_fault_names_file_and_record() {
        let box_ = "\"bbox\": [1, 2, 3, 4]";
        for (annotations, expected) in [
            (
                format!("[{{\"id\": 9, \"image_id\": 4, \"category_id\": 7, {box_}}}]"),
                "annotation 9: image id 4",
            ),
            (
                format!("[{{\"id\": 9, \"image_id\": 3, \"category_id\": 8, {box_}}}]"),
                "annotation 9: category id 8",
            ),
            (
                format!("[{{\"id\": 9, \"image_id\": 3, {box_}}}]"),
                "no category_id",
            ),
            (
                "[{\"id\": 9, \"image_id\": 3, \"caption\": \"x\"}]".into(),
                "instances_train2017.json",
            ),
            (
                "[{\"id\": 9, \"image_id\": 3, \"category_id\": 7, \"bbox\": [1, 2]}]".into(),
                "JSON",
            ),
        ] {
            let error = load_text(&format!(
                "{{{IMAGE}, {CATEGORIES}, \"annotations\": {annotations}}}"
            ))
            .unwrap_err();
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("a.json"), "{text}");
        }
        assert!(
            load_text(&format!("{{{IMAGE}}}"))
                .unwrap_err()
                .to_string()
                .contains("annotations")
        );
        assert!(load_text("{\"images\": [").is_err());
    }

    #[test]
    fn every_truncation_duplicate_keys_and_infinite_numbers_are_errors() {
        let text = format!("{{{IMAGE}, {CATEGORIES}, \"annotations\": []}}");
        assert!(load_text(&text).is_ok());
        for len in 0..text.len() {
            assert!(load_text(&text[..len]).is_err(), "{len} bytes");
        }
        for faulty in [
            format!("{{{IMAGE}, {IMAGE}, \"annotations\": []}}"),
            text.replace(
                "[]",
                "[{\"image_id\": 3, \"category_id\": 7, \"bbox\": [1, 2, 3, 1e999]}]",
            ),
            text.replace("\"width\": 20", "\"width\": -20"),
        ] {
            let error = load_text(&faulty).unwrap_err().to_string();
            assert!(
                error.contains("a.json") && error.contains("line"),
                "{}",
                &error[..error.len().min(200)]
            );
        }
    }

    #[test]
    fn deep_nesting_is_ignored_under_unknown_keys_and_an_error_elsewhere() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let text = format!("{{{IMAGE}, {CATEGORIES}, \"annotations\": [], \"info\": {deep}}}");
        assert!(load_text(&text).is_ok());
        assert!(
            load_text(&text.replace("\"annotations\": []", &format!("\"annotations\": {deep}"))).is_err()
        );
    }

    #[test]
    fn an_image_or_category_id_that_occurs_twice_is_refused() {
        let image = r#"{"id": 3, "file_name": "a.jpg"}"#;
        let category = r#"{"id": 7, "name": "cat"}"#;
        for (images, categories, expected) in [
            (format!("{image}, {image}"), category.to_owned(), "image id 3"),
            (
                image.to_owned(),
                format!("{category}, {category}"),
                "category id 7",
            ),
        ] {
            let text =
                format!("{{\"images\": [{images}], \"categories\": [{categories}], \"annotations\": []}}");
            let error = load_text(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn names_cannot_leave_the_image_folder() {
        for name in ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "", "C:\\\\a.jpg"] {
            let text =
                format!("{{\"images\": [{{\"id\": 1, \"file_name\": \"{name}\"}}], \"annotations\": []}}");
            assert!(load_text(&text).is_err(), "{name}");
        }
        let text = "{\"images\": [{\"id\": 1, \"file_name\": \"sub/a.jpg\"}], \"annotations\": []}";
        assert!(load_text(text).is_ok());
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let text = format!(
            "{{{IMAGE}, {CATEGORIES}, \"annotations\": [{{\"image_id\": 3, \"category_id\": 7, \"bbox\": [0.1, 2.3, 3.7, 4.9]}}]}}"
        );
        let (dataset, _) = load_text(&text).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sub/b.json");
        write(&dataset, &file).unwrap();
        let (again, report) = load(&file, folder.path()).unwrap();
        assert_eq!(again.fingerprint(), dataset.fingerprint());
        assert_eq!(report, LoadReport::default());
        let rows = [ResultRow {
            image_id: 1,
            category_id: 2,
            bbox: [0.1, 0.2, 1.0 / 3.0, 4.0],
            score: 0.123456789012345,
        }];
        write_results(&file, &rows).unwrap();
        assert_eq!(read_results(&file).unwrap(), rows);
    }

    #[test]
    fn numbers_that_json_cannot_hold_are_refused_with_their_place() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("b.json");
        let row = |score| ResultRow {
            image_id: 42,
            category_id: 2,
            bbox: [0.0, 0.0, 1.0, 1.0],
            score,
        };
        let error = write_results(&file, &[row(0.5), row(f64::NAN)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("row 1") && error.contains("image 42"), "{error}");
        let text = format!(
            "{{{IMAGE}, {CATEGORIES}, \"annotations\": [{{\"image_id\": 3, \"category_id\": 7, \"bbox\": [1, 2, 3, 4]}}]}}"
        );
        let (mut dataset, _) = load_text(&text).unwrap();
        dataset.examples[0].objects[0].area = f64::INFINITY;
        let error = write(&dataset, &file).unwrap_err().to_string();
        assert!(error.contains("a.jpg") && error.contains("object 0"), "{error}");
        assert!(!file.exists());
        let huge = text.replace("3, 4]", "1e200, 1e200]");
        assert!(load_text(&huge).unwrap_err().to_string().contains("not finite"));
    }

    #[test]
    fn the_real_sets_have_their_known_counts() {
        let Some(root) = shared("") else { return };
        let counts = |json: &str, images: &str| {
            let (dataset, report) = load(&root.join(json), &root.join(images)).unwrap();
            let objects = || dataset.examples.iter().flat_map(|e| &e.objects);
            (
                dataset.examples.len(),
                objects().count(),
                objects().filter(|o| o.is_crowd).count(),
                report,
            )
        };
        let (images, objects, crowds, _) = counts("coco/instances_val2017.json", "coco/val2017");
        assert_eq!((images, objects, crowds), (188, 1692, 20));
        let (images, objects, crowds, _) = counts("coco/instances_train2017.json", "coco/train2017");
        assert_eq!((images, objects, crowds), (294, 2519, 25));
        let mut clipped = 0;
        for (split, images, objects) in [("train", 900, 2693), ("val", 100, 314)] {
            let json = fs::read_dir(root.join("shape/annotations"))
                .unwrap()
                .map(|entry| entry.unwrap().path());
            let json = json
                .into_iter()
                .find(|p| p.to_string_lossy().contains(split))
                .unwrap();
            let (dataset, report) = load(&json, &root.join("shape").join(split)).unwrap();
            assert_eq!(dataset.examples.len(), images);
            assert_eq!(
                dataset.examples.iter().map(|e| e.objects.len()).sum::<usize>(),
                objects
            );
            clipped += report.clipped.len();
        }
        // 384 by more than a pixel and 7 by exactly one.
        assert_eq!(clipped, 391);
    }
}
