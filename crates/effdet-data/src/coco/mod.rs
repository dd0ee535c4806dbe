//! COCO annotation files: instances JSON beside a folder of images, and results JSON.
//!
//! Boxes that run past their image are cut to it; boxes without area (before or after that) are left out; both are reported.
//! Segmentations and every unknown key are skipped. Files are read as a stream, so that memory follows the number of objects, not
//! the length of the file. Ids may be texts: one that is no number stands for 53 bits of its SHA-256.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::path::Path;

use effdet_model::label_map::CategoryId;

use crate::confine::{Confinement, confined_join};
use crate::dataset::{
    Category, DetectionDataset, Example, ImageSource, ObjectAnnotation, open_file, read_file,
};
use crate::error::{DataError, Result};
use crate::report::{Faults, Finding, FindingKind, LoadOptions, LoadReport};

mod results;
mod stream;
mod write;

pub use results::{ResultRow, read_results, write_results};
use stream::{RawAnnotation, RawCategory, RawImage, Sink, Stop};
pub(crate) use write::write_json;
pub use write::{read_categories, write, write_categories};

/// Ten times the instances file of COCO's training set.
const MAX_JSON_BYTES: u64 = 4 << 30;
/// Annotation ids that are listed as duplicates.
const DUPLICATES_LISTED: usize = 20;

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

/// Reads an instances JSON whose images lie in `image_dir`.
///
/// # Errors
/// Duplicate image ids, annotations of unknown images or categories, boxes that are not finite, names that leave the folder,
/// missing files; unless `options` collects them. A file without boxes (captions) is refused with the way out. Each names file and
/// record.
pub fn load_with(
    json: &Path,
    image_dir: &Path,
    options: &LoadOptions,
) -> Result<(DetectionDataset, LoadReport)> {
    parse(open_file(json, MAX_JSON_BYTES)?, json, image_dir, options)
}

/// As [`load_with`], stopping at the first fault and without a look at the images.
///
/// # Errors
/// Those of [`load_with`].
pub fn load(json: &Path, image_dir: &Path) -> Result<(DetectionDataset, LoadReport)> {
    let options = LoadOptions {
        check_files: false,
        ..LoadOptions::default()
    };
    load_with(json, image_dir, &options)
}

/// As [`load_with`], from an open file or from memory.
///
/// # Errors
/// Those of [`load_with`]; never panics on any input.
pub fn parse(
    input: impl Read,
    json: &Path,
    image_dir: &Path,
    options: &LoadOptions,
) -> Result<(DetectionDataset, LoadReport)> {
    let confinement = match options.check_files {
        true => Some(Confinement::new(image_dir, options.follow_links)?),
        false => None,
    };
    let mut builder = Builder {
        json,
        image_dir,
        faults: options.faults,
        confinement,
        examples: Vec::new(),
        places: HashMap::new(),
        left_out: HashSet::new(),
        images_complete: false,
        has_annotations: false,
        pending: Vec::new(),
        annotations: 0,
        without_box: None,
        boxes: 0,
        annotation_ids: Vec::new(),
        categories: BTreeMap::new(),
        used: BTreeMap::new(),
        report: LoadReport::default(),
    };
    match stream::read(input, &mut builder) {
        Err(Stop::Sink(error)) => return Err(error),
        Err(Stop::Json(error)) if error.is_io() => {
            return Err(DataError::Io {
                file: json.to_path_buf(),
                source: error.into(),
            });
        }
        Err(Stop::Json(error)) => {
            return Err(malformed(json, format!("not the expected JSON: {error}")));
        }
        Ok(()) => {}
    }
    builder.finish()
}

/// The data set as it grows while the file is read.
struct Builder<'a> {
    json: &'a Path,
    image_dir: &'a Path,
    faults: Faults,
    confinement: Option<Confinement>,
    examples: Vec<Example>,
    places: HashMap<i64, usize>,
    /// Images that cannot be used; their annotations go with them.
    left_out: HashSet<i64>,
    images_complete: bool,
    has_annotations: bool,
    /// Annotations that came before the images.
    pending: Vec<(i64, RawAnnotation)>,
    annotations: usize,
    /// First annotation without a box.
    without_box: Option<i64>,
    boxes: usize,
    annotation_ids: Vec<i64>,
    categories: BTreeMap<CategoryId, String>,
    /// First annotation and number of objects of every category id.
    used: BTreeMap<CategoryId, (i64, usize)>,
    report: LoadReport,
}

impl Sink for Builder<'_> {
    fn image(&mut self, image: RawImage) -> Result<()> {
        let id = image.id.number;
        if self.places.contains_key(&id) || self.left_out.contains(&id) {
            let error = malformed(
                self.json,
                format!(
                    "image id {id} ({}) occurs twice: ids must be unique",
                    image.file_name
                ),
            );
            return self.fault(FindingKind::DuplicateImage, id, error);
        }
        let file = match confined_join(self.image_dir, &image.file_name, self.json) {
            Ok(file) => file,
            Err(error) => {
                self.left_out.insert(id);
                return self.fault(FindingKind::Escape, id, error);
            }
        };
        if let Some(Err(misplaced)) = self.confinement.as_mut().map(|inside| inside.check(&file)) {
            self.left_out.insert(id);
            let kind = misplaced.kind();
            return self.fault(kind, id, misplaced.error(&file, self.json));
        }
        self.places.insert(id, self.examples.len());
        self.examples.push(Example {
            image_id: id,
            source_id: image.id.text.unwrap_or_else(|| id.to_string()),
            source: ImageSource::File(file),
            file_name: image.file_name,
            width: image.width,
            height: image.height,
            objects: Vec::new(),
        });
        Ok(())
    }

    fn annotation(&mut self, annotation: RawAnnotation) -> Result<()> {
        let record = match &annotation.id {
            Some(id) if id.number != 0 => {
                self.annotation_ids.push(id.number);
                id.number
            }
            _ => self.annotations as i64,
        };
        self.annotations += 1;
        if self.images_complete {
            return self.place(record, annotation);
        }
        self.pending.push((record, annotation));
        Ok(())
    }

    fn category(&mut self, category: RawCategory) -> Result<()> {
        let id = CategoryId(category.id);
        match self.categories.insert(id, category.name.clone()) {
            Some(first) => Err(malformed(
                self.json,
                format!(
                    "category id {} is used by {first:?} and {:?}",
                    id.0, category.name
                ),
            )),
            None => Ok(()),
        }
    }

    fn images_end(&mut self) -> Result<()> {
        self.images_complete = true;
        for (record, annotation) in std::mem::take(&mut self.pending) {
            self.place(record, annotation)?;
        }
        Ok(())
    }

    fn annotations_end(&mut self) {
        self.has_annotations = true;
    }
}

impl Builder<'_> {
    fn fault(&mut self, kind: FindingKind, record: i64, error: DataError) -> Result<()> {
        let file = self.json.display().to_string();
        self.report.fault(self.faults, kind, file, record, error)
    }

    /// Gives an annotation to its image.
    fn place(&mut self, record: i64, annotation: RawAnnotation) -> Result<()> {
        let at = |what: String| malformed(self.json, format!("annotation {record}: {what}"));
        let image_id = annotation.image_id.number;
        if annotation.bbox.len == 0 {
            self.without_box.get_or_insert(record);
            if self.faults == Faults::Collect {
                let error = at("has no bbox: use an instances file".into());
                return self.fault(FindingKind::NoBox, record, error);
            }
            // Whether this is one odd annotation or a file of captions is known at the end.
            return Ok(());
        }
        self.boxes += 1;
        let Some(&place) = self.places.get(&image_id) else {
            if self.left_out.contains(&image_id) {
                return Ok(());
            }
            let error = at(format!("image id {image_id} does not exist"));
            return self.fault(FindingKind::UnknownImage, record, error);
        };
        let Some(category) = annotation.category_id.map(CategoryId) else {
            let error = at("has no category_id".into());
            return self.fault(FindingKind::NoCategory, record, error);
        };
        if annotation.bbox.len != 4 {
            let error = at(format!(
                "its bbox has {} numbers, [x, y, width, height] are needed",
                annotation.bbox.len
            ));
            return self.fault(FindingKind::NoBox, record, error);
        }
        let bbox = annotation.bbox.values;
        // A missing area is the product of the sides, which must not overflow.
        let area = annotation.area.unwrap_or(bbox[2] * bbox[3]);
        if !bbox.iter().chain([&area]).all(|v| v.is_finite()) {
            let error = at(format!("box {bbox:?} or its area {area} is not finite"));
            return self.fault(FindingKind::NotFinite, record, error);
        }
        let (_, count) = self.used.entry(category).or_insert((record, 0));
        *count += 1;
        let example = &mut self.examples[place];
        let Some(box_xywh_px) = clip(bbox, example, record, &mut self.report) else {
            return Ok(());
        };
        example.objects.push(ObjectAnnotation {
            box_xywh_px,
            category,
            area: annotation.area.unwrap_or(box_xywh_px[2] * box_xywh_px[3]),
            is_crowd: annotation.iscrowd.0,
            difficult: false,
        });
        Ok(())
    }

    fn finish(mut self) -> Result<(DetectionDataset, LoadReport)> {
        if !self.has_annotations {
            let what = "has no \"annotations\": use an instances file".to_owned();
            return Err(malformed(self.json, what));
        }
        if !self.images_complete {
            self.images_end()?;
        }
        match self.without_box {
            Some(_) if self.boxes == 0 => {
                return Err(DataError::NoBoxes {
                    file: self.json.to_path_buf(),
                    what: "its annotations have no boxes (a captions file?): use the instances file, \
                           instances_train2017.json or instances_val2017.json for COCO"
                        .into(),
                });
            }
            Some(record) if self.faults == Faults::Refuse => {
                let what = format!("annotation {record}: has no bbox: use an instances file");
                return Err(malformed(self.json, what));
            }
            _ => {}
        }
        self.refuse_unknown_categories()?;
        self.note_duplicate_annotations();
        let name = self
            .json
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        let category = |(id, name)| Category { id, name };
        let dataset = DetectionDataset {
            name,
            examples: self.examples,
            categories: self.categories.into_iter().map(category).collect(),
        };
        Ok((dataset, self.report))
    }

    fn refuse_unknown_categories(&mut self) -> Result<()> {
        let unknown: Vec<(CategoryId, (i64, usize))> = (self.used.iter())
            .filter(|(id, _)| !self.categories.contains_key(id))
            .map(|(&id, &first)| (id, first))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        // The first annotation in the file is the one to name.
        let mut by_record = unknown;
        by_record.sort_by_key(|&(_, (record, _))| record);
        for (id, (record, count)) in by_record {
            let what = format!(
                "annotation {record}: category id {id} is not among the categories ({count} objects have it)"
            );
            self.fault(FindingKind::UnknownCategory, record, malformed(self.json, what))?;
            self.report.unknown_categories.insert(id.to_string(), count);
        }
        for example in &mut self.examples {
            let known = |object: &ObjectAnnotation| self.categories.contains_key(&object.category);
            example.objects.retain(known);
        }
        Ok(())
    }

    fn note_duplicate_annotations(&mut self) {
        let mut ids = std::mem::take(&mut self.annotation_ids);
        ids.sort_unstable();
        let mut twice: Vec<i64> = (ids.windows(2))
            .filter(|pair| pair[0] == pair[1])
            .map(|pair| pair[0])
            .collect();
        twice.dedup();
        let note = |id: &i64| Finding {
            kind: FindingKind::DuplicateAnnotation,
            file: self.json.display().to_string(),
            record: *id,
            what: format!("annotation id {id} occurs more than once"),
            box_xywh_px: None,
        };
        let notes = twice.iter().take(DUPLICATES_LISTED).map(note);
        self.report.notes.extend(notes);
    }
}

/// Cuts a box to its image; none, with a remark, where no area is left.
pub(crate) fn clip(
    bbox: [f64; 4],
    example: &Example,
    record: i64,
    report: &mut LoadReport,
) -> Option<[f64; 4]> {
    report.census.count(bbox, (example.width, example.height));
    let finding = |kind, what: String| Finding {
        kind,
        file: example.file_name.clone(),
        record,
        what,
        box_xywh_px: Some(bbox),
    };
    let [x, y, w, h] = bbox;
    if w <= 0.0 || h <= 0.0 {
        report.dropped.push(finding(
            FindingKind::NoArea,
            format!("box {bbox:?} (x, y, width, height) has no area"),
        ));
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
        report.dropped.push(finding(
            FindingKind::Outside,
            format!("box {bbox:?} (x, y, width, height) lies outside the {width}x{height} image"),
        ));
        return None;
    }
    let over = (x + w - width).max(y + h - height).max(-x).max(-y);
    report.clipped.push(finding(
        FindingKind::Clipped,
        format!("box {bbox:?} (x, y, width, height) runs {over:.2} pixels past the {width}x{height} image"),
    ));
    Some([left, top, right - left, bottom - top])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

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
                "annotation 9: its bbox has 2 numbers",
            ),
            (
                "[{\"id\": 9, \"image_id\": 3, \"category_id\": 7, \"bbox\": \"1, 2, 3, 4\"}]".into(),
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
        let text = "{\"images\": [{\"id\": 1, \"file_name\": \"../a.jpg\"}], \"annotations\": []}";
        assert!(load_text(text).unwrap_err().to_string().contains("../a.jpg"));
        let text = "{\"images\": [{\"id\": 1, \"file_name\": \"sub/a.jpg\"}], \"annotations\": []}";
        assert!(load_text(text).is_ok());
    }

    #[test]
    fn ids_may_be_texts_and_arrays_may_come_in_any_order() {
        let annotation =
            r#"{"id": "x", "image_id": "a-1", "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": true}"#;
        let image = r#"{"id": "a-1", "file_name": "a.jpg", "width": 20, "height": 10}"#;
        let text = format!("{{\"annotations\": [{annotation}], \"images\": [{image}], {CATEGORIES}}}");
        let (dataset, _) = load_text(&text).unwrap();
        let example = &dataset.examples[0];
        assert_eq!((example.source_id.as_str(), example.objects.len()), ("a-1", 1));
        assert!((0..1 << 53).contains(&example.image_id));
        assert!(example.objects[0].is_crowd);
        // A text that is a number is that number.
        let (numbered, _) = load_text(&text.replace("a-1", "17")).unwrap();
        assert_eq!(numbered.examples[0].image_id, 17);
        assert!(load_text(&text.replace("\"image_id\": \"a-1\"", "\"image_id\": 1.5")).is_err());
    }

    #[test]
    fn faults_are_collected_on_request_and_everything_else_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.jpg"), "").unwrap();
        let text = r#"{
            "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}, {"id": 1, "file_name": "a.jpg"},
                       {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "../c.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]},
                {"id": 2, "image_id": 2, "category_id": 7, "bbox": [1, 2, 3, 4]},
                {"id": 3, "image_id": 9, "category_id": 7, "bbox": [1, 2, 3, 4]},
                {"id": 4, "image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4]},
                {"id": 5, "image_id": 1, "bbox": [1, 2, 3, 4]},
                {"id": 6, "image_id": 1, "category_id": 7},
                {"id": 7, "image_id": 1, "category_id": 7, "bbox": [1, 2]},
                {"id": 8, "image_id": 1, "category_id": 7, "bbox": [1, 2, 1e200, 1e200]},
                {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 2, 3, 4]}],
            "categories": [{"id": 7, "name": "cat"}]}"#;
        let options = LoadOptions {
            faults: Faults::Collect,
            ..LoadOptions::default()
        };
        let (dataset, report) = parse(text.as_bytes(), Path::new("a.json"), folder.path(), &options).unwrap();
        assert_eq!(
            (dataset.examples.len(), dataset.examples[0].objects.len()),
            (1, 2)
        );
        let kinds: Vec<(FindingKind, i64)> = report.faults.iter().map(|f| (f.kind, f.record)).collect();
        let expected = [
            (FindingKind::DuplicateImage, 1),
            (FindingKind::MissingFile, 2),
            (FindingKind::Escape, 3),
            (FindingKind::UnknownImage, 3),
            (FindingKind::NoCategory, 5),
            (FindingKind::NoBox, 6),
            (FindingKind::NoBox, 7),
            (FindingKind::NotFinite, 8),
            (FindingKind::UnknownCategory, 4),
        ];
        assert_eq!(kinds, expected);
        assert_eq!(report.notes[0].kind, FindingKind::DuplicateAnnotation);
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
        assert!(report.is_clean(), "{report:?}");
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
