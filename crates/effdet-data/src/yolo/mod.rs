//! YOLO folders: `data.yaml`, images below `images/`, one text file of labels per image below `labels/`.
//!
//! A label is `class x y width height`, centre and size divided by those of the image, or `class x1 y1 x2 y2 x3 y3 …`, a polygon
//! that stands for its bounding box. Class k is category k + 1 unless `categories.json` says otherwise. Image ids are the numbers
//! that the files are called by where all are, otherwise they count from 1. What the format cannot hold lies in a
//! [sidecar file](crate::sidecar).

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use effdet_model::label_map::CategoryId;

use crate::coco::{clip, read_categories};
use crate::confine::Confinement;
use crate::dataset::{Category, DetectionDataset, Example, ImageSource, ObjectAnnotation};
use crate::decode::probe_reader;
use crate::error::{DataError, Result};
use crate::folder::read_text;
use crate::report::{FindingKind, LoadOptions, LoadReport};
use crate::sidecar;

mod config;
mod labels;
mod write;

pub use config::Config;
pub use labels::{Label, parse as parse_labels};
pub use write::write;

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
pub fn load(config: &Path, split: &str) -> Result<(DetectionDataset, LoadReport)> {
    load_with(config, split, &LoadOptions::default())
}

/// Reads one split of the data set that a `data.yaml` describes; an image without labels is background.
///
/// # Errors
/// A split that is not there, images that are missing or no JPEG or PNG, labels that make no sense, each with file and line;
/// unless `options` collects them.
pub fn load_with(
    config: &Path,
    split: &str,
    options: &LoadOptions,
) -> Result<(DetectionDataset, LoadReport)> {
    let config = Config::read(config)?;
    let categories = categories_of(&config)?;
    let mut report = LoadReport::default();
    let mut reader = Reader {
        config: &config,
        options,
        categories: &categories,
        inside: Confinement::new(&config.root, options.follow_links)?,
        listed: HashSet::new(),
    };
    let mut examples = Vec::new();
    for (record, image) in config.images(split)?.into_iter().enumerate() {
        examples.extend(reader.example(record as i64, image, &mut report)?);
    }
    if examples.is_empty() && report.faults.is_empty() {
        let what = format!("split {split:?} has no image: check its folder");
        return Err(malformed(&config.file, what));
    }
    number(&mut examples);
    let folder = config
        .root
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut dataset = DetectionDataset {
        name: format!("{folder} {split}"),
        examples,
        categories,
    };
    sidecar::apply(&sidecar::file(&config.root, split), &mut dataset, &mut report)?;
    Ok((dataset, report))
}

/// Ids from 1, or the numbers that the files are called by.
fn number(examples: &mut [Example]) {
    let numbers: Option<Vec<i64>> = (examples.iter())
        .map(|example| example.source_id.parse().ok())
        .collect();
    let mut seen = HashSet::new();
    let numbers = numbers.filter(|numbers| numbers.iter().all(|&number| number >= 0 && seen.insert(number)));
    for (index, example) in examples.iter_mut().enumerate() {
        example.image_id = numbers
            .as_ref()
            .map_or(index as i64 + 1, |numbers| numbers[index]);
    }
}

fn categories_of(config: &Config) -> Result<Vec<Category>> {
    let file = config.root.join("categories.json");
    if file.is_file() {
        let categories = read_categories(&file)?;
        let names = categories.iter().map(|category| &category.name);
        if !names.eq(config.names.iter()) {
            let what = format!(
                "its categories are not the names of {}, in this order: remove the file, or convert the data set again",
                config.file.display()
            );
            return Err(malformed(&file, what));
        }
        return Ok(categories);
    }
    let category = |(id, name): (u32, &String)| Category {
        id: CategoryId(id),
        name: name.clone(),
    };
    Ok((1..).zip(&config.names).map(category).collect())
}

struct Reader<'a> {
    config: &'a Config,
    options: &'a LoadOptions,
    categories: &'a [Category],
    inside: Confinement,
    listed: HashSet<PathBuf>,
}

impl Reader<'_> {
    /// The example of an image; none where it cannot be used and faults are collected.
    fn example(&mut self, record: i64, image: PathBuf, report: &mut LoadReport) -> Result<Option<Example>> {
        let faults = self.options.faults;
        let name = image.display().to_string();
        if !self.listed.insert(image.clone()) {
            let error = malformed(
                &self.config.file,
                format!("{name} is listed twice: remove one of the lines"),
            );
            report.fault(faults, FindingKind::DuplicateImage, name, record, error)?;
            return Ok(None);
        }
        if let Err(misplaced) = self.inside.check(&image)
            && self.options.check_files
        {
            let error = misplaced.error(&image, &self.config.file);
            report.fault(faults, misplaced.kind(), name, record, error)?;
            return Ok(None);
        }
        let (width, height) = match image_size(&image) {
            Ok(size) => size,
            Err(error) => {
                report.fault(faults, FindingKind::Undecodable, name, record, error)?;
                return Ok(None);
            }
        };
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let mut example = Example {
            image_id: 0,
            source_id: stem.into_owned(),
            file_name: self.config.name_of(&image),
            source: ImageSource::File(image.clone()),
            width,
            height,
            objects: Vec::new(),
        };
        let file = config::labels_of(&image);
        if !file.exists() {
            return Ok(Some(example));
        }
        let lines = read_text(&file).and_then(|text| labels::parse_text(&file, &text));
        let lines = match lines {
            Ok(lines) => lines,
            Err(error) => {
                // Without its labels the image would count as background.
                let file = file.display().to_string();
                report.fault(faults, FindingKind::Malformed, file, record, error)?;
                return Ok(None);
            }
        };
        for label in lines {
            self.object(&file, &label, &mut example, report)?;
        }
        Ok(Some(example))
    }

    fn object(
        &self,
        file: &Path,
        label: &Label,
        example: &mut Example,
        report: &mut LoadReport,
    ) -> Result<()> {
        let record = label.line as i64;
        let Some(category) = self.categories.get(label.class) else {
            let error = malformed(
                file,
                format!(
                    "line {record}: class {} is not among the {} names of {}, which count from 0",
                    label.class,
                    self.categories.len(),
                    self.config.file.display()
                ),
            );
            let file = file.display().to_string();
            *report
                .unknown_categories
                .entry(label.class.to_string())
                .or_default() += 1;
            return report.fault(
                self.options.faults,
                FindingKind::UnknownCategory,
                file,
                record,
                error,
            );
        };
        let bbox = label.box_xywh_px(example.width, example.height);
        if let Some(box_xywh_px) = clip(bbox, example, record, report) {
            example.objects.push(ObjectAnnotation {
                box_xywh_px,
                category: category.id,
                area: box_xywh_px[2] * box_xywh_px[3],
                is_crowd: false,
                difficult: false,
            });
        }
        Ok(())
    }
}

fn image_size(file: &Path) -> Result<(u32, u32)> {
    let input = File::open(file).map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })?;
    let probed = probe_reader(BufReader::new(input)).map_err(|reason| DataError::Image {
        file: file.display().to_string(),
        reason,
    })?;
    Ok((probed.width, probed.height))
}

#[cfg(test)]
mod tests;
