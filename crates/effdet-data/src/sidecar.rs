//! What a format cannot hold, in a file beside it, so that a conversion and its way back give the same data set.
//!
//! VOC and YOLO have no image ids, no areas and no crowds; YOLO rounds boxes. The converters leave all of it in
//! `effdet-<split>.json`. Labels win over it: an image whose labels were changed afterwards is read as the labels have it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use effdet_model::label_map::CategoryId;
use serde::{Deserialize, Serialize};

use crate::coco::write_json;
use crate::dataset::{DetectionDataset, Example, ObjectAnnotation, read_file};
use crate::error::{DataError, Result};
use crate::report::{Finding, FindingKind, LoadReport};

/// As for instances files.
const MAX_BYTES: u64 = 4 << 30;
/// Boxes of a text format agree with the exact ones to this, in pixels.
const TOLERANCE_PX: f64 = 1e-6;
/// Images that are listed as changed.
const EDITED_LISTED: usize = 20;

/// The sidecar of a split of a data set in `root`.
pub fn file(root: &Path, split: &str) -> PathBuf {
    root.join(format!("effdet-{split}.json"))
}

#[derive(Serialize, Deserialize)]
struct Sidecar {
    about: String,
    images: Vec<Image>,
}

#[derive(Serialize, Deserialize)]
struct Image {
    /// Name of the file in the converted data set.
    file: String,
    file_name: String,
    id: i64,
    source_id: String,
    width: u32,
    height: u32,
    objects: Vec<Object>,
}

#[derive(Serialize, Deserialize)]
struct Object {
    bbox: [f64; 4],
    category_id: u32,
    area: f64,
    #[serde(default)]
    iscrowd: bool,
    #[serde(default)]
    difficult: bool,
}

/// Writes what `dataset` holds; `files` are the names that its images have in the converted data set.
pub(crate) fn write(path: &Path, dataset: &DetectionDataset, files: &[String]) -> Result<()> {
    let image = |(example, file): (&Example, &String)| Image {
        file: file.clone(),
        file_name: example.file_name.clone(),
        id: example.image_id,
        source_id: example.source_id.clone(),
        width: example.width,
        height: example.height,
        objects: (example.objects.iter())
            .map(|object| Object {
                bbox: object.box_xywh_px,
                category_id: object.category.0,
                area: object.area,
                iscrowd: object.is_crowd,
                difficult: object.difficult,
            })
            .collect(),
    };
    let sidecar = Sidecar {
        about:
            "ids, areas, crowds and exact boxes that the labels cannot hold; the labels win where they differ"
                .into(),
        images: dataset.examples.iter().zip(files).map(image).collect(),
    };
    write_json(path, &sidecar)
}

/// Gives `dataset` back what its sidecar holds, if there is one.
///
/// Images that it does not know get ids behind those it knows.
///
/// # Errors
/// [`DataError::Malformed`] for a sidecar that makes no sense, [`DataError::Io`].
pub(crate) fn apply(path: &Path, dataset: &mut DetectionDataset, report: &mut LoadReport) -> Result<()> {
    if !path.is_file() {
        return Ok(());
    }
    let malformed = |what: String| DataError::Malformed {
        file: path.to_path_buf(),
        what: format!("{what}: convert the data set again, or remove the file"),
    };
    let bytes = read_file(path, MAX_BYTES)?;
    let sidecar: Sidecar = serde_json::from_slice(&bytes)
        .map_err(|error| malformed(format!("not the expected JSON: {error}")))?;
    let mut next_id = sidecar.images.iter().map(|image| image.id).max().unwrap_or(0);
    let mut images: HashMap<String, Image> = (sidecar.images.into_iter())
        .map(|image| (image.file.clone(), image))
        .collect();
    let mut edited = Vec::new();
    for example in &mut dataset.examples {
        let Some(image) = images.remove(&example.file_name) else {
            next_id = next_id
                .checked_add(1)
                .ok_or_else(|| malformed("its ids reach 2^63".into()))?;
            example.image_id = next_id;
            continue;
        };
        example.image_id = image.id;
        example.source_id = image.source_id;
        let exact: Vec<ObjectAnnotation> = image.objects.iter().map(annotation).collect();
        if same_labels(&example.objects, &exact) {
            example.objects = exact;
            if (image.width, image.height) != (0, 0) {
                (example.width, example.height) = (image.width, image.height);
            }
        } else {
            edited.push(example.file_name.clone());
        }
        example.file_name = image.file_name;
    }
    let note = |name: &String| Finding {
        kind: FindingKind::Edited,
        file: name.clone(),
        record: 0,
        what: format!(
            "its labels differ from {}: they were changed after the conversion and are taken as they are",
            path.display()
        ),
        box_xywh_px: None,
    };
    report.notes.extend(edited.iter().take(EDITED_LISTED).map(note));
    Ok(())
}

fn annotation(object: &Object) -> ObjectAnnotation {
    ObjectAnnotation {
        box_xywh_px: object.bbox,
        category: CategoryId(object.category_id),
        area: object.area,
        is_crowd: object.iscrowd,
        difficult: object.difficult,
    }
}

/// Whether labels are those that the exact objects were written as; crowds are not written.
fn same_labels(labels: &[ObjectAnnotation], exact: &[ObjectAnnotation]) -> bool {
    let written: Vec<&ObjectAnnotation> = exact.iter().filter(|object| !object.is_crowd).collect();
    let close = |a: [f64; 4], b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= TOLERANCE_PX);
    labels.len() == written.len()
        && labels.iter().zip(written).all(|(label, exact)| {
            label.category == exact.category && close(label.box_xywh_px, exact.box_xywh_px)
        })
}
