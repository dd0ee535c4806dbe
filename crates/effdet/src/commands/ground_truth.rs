//! Ground truth as pycocotools reads it: every number of the file as it stands, no image needed.

use std::path::Path;

use anyhow::{Context, Result};
use effdet_metrics::GroundTruth;
use serde::Deserialize;

#[derive(Deserialize)]
struct Instances {
    images: Vec<Image>,
    annotations: Vec<Annotation>,
    categories: Vec<Category>,
}

#[derive(Deserialize)]
struct Image {
    id: i64,
}

#[derive(Deserialize)]
struct Annotation {
    id: i64,
    image_id: i64,
    category_id: i64,
    bbox: [f64; 4],
    area: Option<f64>,
    #[serde(default)]
    iscrowd: u8,
}

#[derive(Deserialize)]
struct Category {
    id: i64,
    #[serde(default)]
    name: String,
}

/// An instances file as the metric takes it.
pub struct Reference {
    /// Ids of the images.
    pub image_ids: Vec<i64>,
    /// Ids and names of the categories.
    pub categories: Vec<(i64, String)>,
    /// Objects.
    pub objects: Vec<GroundTruth>,
}

/// Reads an instances JSON.
pub fn read(path: &Path) -> Result<Reference> {
    let context = || format!("ground truth {}", path.display());
    let bytes = std::fs::read(path).with_context(context)?;
    let raw: Instances = serde_json::from_slice(&bytes)
        .context("not COCO instances with images, annotations and categories")
        .with_context(context)?;
    let object = |annotation: &Annotation| GroundTruth {
        id: annotation.id,
        image_id: annotation.image_id,
        category_id: annotation.category_id,
        bbox_xywh_px: annotation.bbox,
        area: annotation.area.unwrap_or(annotation.bbox[2] * annotation.bbox[3]),
        iscrowd: annotation.iscrowd != 0,
        // As pycocotools, which overwrites the file's value.
        ignore: false,
    };
    Ok(Reference {
        image_ids: raw.images.iter().map(|image| image.id).collect(),
        objects: raw.annotations.iter().map(object).collect(),
        categories: (raw.categories.into_iter())
            .map(|category| (category.id, category.name))
            .collect(),
    })
}
