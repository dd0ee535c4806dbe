//! What is wrong with a data set, before a training run finds out: every finding names file or record and the remedy.
//!
//! Splits are loaded with [`Faults::Collect`](crate::report::Faults::Collect) and examined together.

use effdet_model::anchors::AnchorConfig;
use serde::Serialize;

use crate::dataset::{Category, DetectionDataset};
use crate::decode::{DecodeOptions, MAX_ENCODED_BYTES};
use crate::inspect::{Statistics, statistics};
use crate::report::LoadReport;

mod anchor;
mod boxes;
mod classes;
mod findings;
mod html;
mod images;
mod loaded;

pub use anchor::{AnchorReport, SizeRecall, Suggestion};
pub use findings::{Check, Instance, Problem, Severity};
pub use html::{HtmlOptions, escaped, page};
pub use images::ImageCensus;

/// A split to examine.
#[derive(Debug)]
pub struct Split {
    /// `train`, `val`, …
    pub name: String,
    /// Where it lies, for messages.
    pub place: String,
    /// `COCO`, `VOC`, `YOLO` or `TFRecord`.
    pub format: &'static str,
    /// Its usable part.
    pub dataset: DetectionDataset,
    /// What loading found.
    pub report: LoadReport,
}

/// A class map to compare with that of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassMap {
    /// Where it comes from: a checkpoint, an instances file.
    pub source: String,
    /// Its categories.
    pub categories: Vec<Category>,
    /// Whether the data may hold categories that it lacks.
    pub may_lack: bool,
}

/// Numbers of class outputs that have to agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassOutputs {
    /// Outputs that the categories of the data need.
    pub needed: usize,
    /// Outputs that there are, with where: a checkpoint, a run.
    pub given: Vec<(String, usize)>,
}

/// How closely images are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Headers of some images; a second at most.
    Quick,
    /// Every image is read, decoded and hashed.
    Full,
}

/// How to examine.
#[derive(Debug)]
pub struct Options {
    /// How closely images are looked at.
    pub depth: Depth,
    /// Anchors of the model, with its name for messages.
    pub anchors: Option<(String, AnchorConfig)>,
    /// Other class maps.
    pub class_maps: Vec<ClassMap>,
    /// Class outputs to compare.
    pub class_outputs: Option<ClassOutputs>,
    /// Splits that must not share images with the first one.
    pub held_out: Vec<String>,
    /// Most objects of an image that evaluation of the reference's kind can take.
    pub max_objects_per_image: usize,
    /// Limits of decoding.
    pub decode: DecodeOptions,
    /// Largest encoded image in bytes.
    pub max_encoded_bytes: u64,
    /// Threads, at least 1; results are the same for any number.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            depth: Depth::Full,
            anchors: None,
            class_maps: Vec::new(),
            class_outputs: None,
            held_out: Vec::new(),
            max_objects_per_image: 100,
            decode: DecodeOptions::default(),
            max_encoded_bytes: MAX_ENCODED_BYTES,
            threads: 1,
        }
    }
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// Problems, the gravest first.
    pub problems: Vec<Problem>,
    /// Figures of the splits.
    pub splits: Vec<SplitFigures>,
    /// How well the anchors fit the boxes of the first split.
    pub anchors: Option<AnchorReport>,
}

/// Figures of one split.
#[derive(Debug, Serialize)]
pub struct SplitFigures {
    /// Name.
    pub name: String,
    /// Where it lies.
    pub place: String,
    /// Format.
    pub format: &'static str,
    /// Counts.
    pub statistics: Statistics,
    /// What its images are.
    pub images: ImageCensus,
}

impl Diagnosis {
    /// Number of problems of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.problems
            .iter()
            .filter(|problem| problem.severity == severity)
            .count()
    }

    /// Adds a problem found elsewhere.
    pub fn add(&mut self, problem: Problem) {
        self.problems.push(problem);
        self.sort();
    }

    fn sort(&mut self) {
        self.problems
            .sort_by_key(|problem| (problem.severity, problem.check));
    }
}

/// Examines splits; the first one is what is trained on. `progress` is called with the number of images that are through.
///
/// # Determinism
/// The same for any number of threads.
pub fn examine(splits: &[Split], options: &Options, progress: &(dyn Fn(usize) + Sync)) -> Diagnosis {
    let mut problems = Vec::new();
    let mut figures = Vec::new();
    for (index, split) in splits.iter().enumerate() {
        loaded::check(split, &mut problems);
        boxes::check(split, options.max_objects_per_image, &mut problems);
        classes::check(split, index == 0, &mut problems);
        let (census, found) = images::check(split, options, progress);
        problems.extend(found);
        figures.push(SplitFigures {
            name: split.name.clone(),
            place: split.place.clone(),
            format: split.format,
            statistics: statistics(&split.dataset),
            images: census,
        });
    }
    classes::compare(splits, &options.class_maps, &mut problems);
    if let Some(outputs) = &options.class_outputs {
        classes::outputs(outputs, &mut problems);
    }
    let held_out = |split: &&Split| options.held_out.contains(&split.name);
    if let Some((first, rest)) = splits.split_first() {
        let first_figures = &figures[0];
        for split in rest.iter().filter(held_out) {
            let other = figures.iter().find(|figures| figures.name == split.name);
            if let Some(other) = other {
                images::leakage(
                    (first, &first_figures.images),
                    (split, &other.images),
                    &mut problems,
                );
            }
        }
    }
    let anchors = splits.first().zip(options.anchors.as_ref());
    let anchors = anchors.map(|(split, (model, config))| anchor::report(&split.dataset, model, config));
    if let (Some(report), Some(split)) = (&anchors, splits.first()) {
        anchor::check(split, report, &mut problems);
    }
    let mut diagnosis = Diagnosis {
        problems,
        splits: figures,
        anchors,
    };
    diagnosis.sort();
    diagnosis
}

#[cfg(test)]
mod tests;
