//! Instances JSON out, and lists of categories in and out.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::Path;

use effdet_model::label_map::CategoryId;
use serde::{Deserialize, Serialize};

use super::{read_json, stream::RawCategory};
use crate::dataset::{Category, DetectionDataset, Example};
use crate::error::{DataError, Result};

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
pub(super) fn require_finite(box_xywh_px: &[f64; 4], number: f64, place: impl Fn() -> String) -> Result<()> {
    if box_xywh_px.iter().chain([&number]).all(|v| v.is_finite()) {
        return Ok(());
    }
    let what = format!(
        "{}: box {box_xywh_px:?} and {number} must be finite to be written as JSON; check where it came from",
        place()
    );
    Err(DataError::Caller { what })
}

pub(crate) fn write_json(file: &Path, value: &impl Serialize) -> Result<()> {
    let io_error = |source| DataError::Io {
        file: file.to_path_buf(),
        source,
    };
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent).map_err(io_error)?;
    }
    // A reader never sees half a file.
    let mut scratch = file.as_os_str().to_owned();
    scratch.push(".tmp");
    let write = || -> io::Result<()> {
        let mut output = BufWriter::with_capacity(1 << 18, File::create(&scratch)?);
        serde_json::to_writer(&mut output, value)?;
        output.into_inner()?.sync_all()?;
        fs::rename(&scratch, file)
    };
    write().map_err(io_error)
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
