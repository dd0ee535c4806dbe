//! Data sets named on the command line.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use effdet_data::coco;
use effdet_data::dataset::{DetectionDataset, ObjectAnnotation};
use effdet_data::layout::Layout;
use effdet_data::report::{Finding, LoadOptions, LoadReport};
use effdet_data::tfrecord::{self, ReadOptions};

use crate::cli::SourceArgs;

/// Findings printed one by one; more are counted.
const FINDINGS_SHOWN: usize = 5;

/// Which part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What is trained on.
    Train,
    /// What is held out.
    Val,
}

/// Whether the command line names any data.
pub fn is_given(args: &SourceArgs) -> bool {
    args.data.is_some()
        || args.train_json.is_some()
        || args.val_json.is_some()
        || args.training_file_pattern.is_some()
        || args.val_file_pattern.is_some()
}

/// The same data, found from any folder.
pub fn absolute(args: &SourceArgs) -> Result<SourceArgs> {
    let absolute = |path: &Option<PathBuf>| {
        let path = path.as_ref();
        path.map(|path| std::path::absolute(path).with_context(|| path.display().to_string()))
            .transpose()
    };
    let absolute_pattern = |pattern: &Option<String>| -> Result<Option<String>> {
        let path = absolute(&pattern.as_ref().map(PathBuf::from))?;
        Ok(path.map(|path| path.display().to_string()))
    };
    Ok(SourceArgs {
        training_file_pattern: absolute_pattern(&args.training_file_pattern)?,
        val_file_pattern: absolute_pattern(&args.val_file_pattern)?,
        data: absolute(&args.data)?,
        train_json: absolute(&args.train_json)?,
        train_images: absolute(&args.train_images)?,
        val_json: absolute(&args.val_json)?,
        val_images: absolute(&args.val_images)?,
        ..args.clone()
    })
}

/// Reads one part; none when the command line does not name it and the data folder lacks that split.
pub fn load(args: &SourceArgs, part: Part) -> Result<Option<DetectionDataset>> {
    let (json, images, pattern, split) = match part {
        Part::Train => (
            &args.train_json,
            &args.train_images,
            &args.training_file_pattern,
            &args.train_split,
        ),
        Part::Val => (
            &args.val_json,
            &args.val_images,
            &args.val_file_pattern,
            &args.val_split,
        ),
    };
    let (dataset, report) = if let Some(pattern) = pattern {
        load_records(pattern, json.as_deref())?
    } else if let (Some(json), Some(images)) = (json, images) {
        coco::load_with(json, images, &options(args))?
    } else if let Some(json) = json {
        bail!(
            "{} needs the folder of its images beside it: --val-images DIR",
            json.display()
        );
    } else if let Some(root) = &args.data {
        let layout = Layout::find(root)?;
        if !layout.splits.contains_key(split) && part == Part::Val && split == "val" {
            return Ok(None);
        }
        layout.split(split)?.load_with(&options(args))?
    } else {
        return Ok(None);
    };
    warn_all(&dataset.name, &report);
    Ok(Some(dataset))
}

fn options(args: &SourceArgs) -> LoadOptions {
    LoadOptions {
        follow_links: args.follow_links,
        ..LoadOptions::default()
    }
}

/// The splits of `--data` by name, all of them unless some are named.
pub fn load_splits(args: &SourceArgs, names: &[String]) -> Result<Vec<(String, DetectionDataset)>> {
    let root = args.data.as_ref().context("name the data set with --data")?;
    let layout = Layout::find(root)?;
    let names = match names {
        [] => layout.splits.keys().cloned().collect(),
        names => names.to_vec(),
    };
    let load = |name: String| {
        let (dataset, report) = layout.split(&name)?.load_with(&options(args))?;
        warn_all(&dataset.name, &report);
        Ok((name, dataset))
    };
    names.into_iter().map(load).collect()
}

fn warn_all(name: &str, report: &LoadReport) {
    warn(name, "boxes cut to their image", &report.clipped);
    warn(name, "objects left out", &report.dropped);
    warn(name, "damaged records left out", &report.skipped);
    warn(name, "remarks", &report.notes);
}

/// As [`load`], for commands that cannot do without.
pub fn require(args: &SourceArgs, part: Part) -> Result<DetectionDataset> {
    load(args, part)?.with_context(|| match (&args.data, part) {
        (Some(root), _) => format!(
            "{}: no split {:?}; name one with --val-split",
            root.display(),
            args.val_split
        ),
        (None, Part::Train) => {
            "no training data: give --data DIR, or --train-json with --train-images".to_owned()
        }
        (None, Part::Val) => {
            "no data to evaluate on: give --data DIR, or --val-json with --val-images".to_owned()
        }
    })
}

/// Records; where there is an instances file too, objects and categories are those of the file, as in the reference's evaluation.
fn load_records(pattern: &str, ground_truth: Option<&Path>) -> Result<(DetectionDataset, LoadReport)> {
    let (mut records, mut report) = tfrecord::load(pattern, &ReadOptions::default())?;
    if let Some(json) = ground_truth {
        // The images come from the records, so the folder plays no part.
        let (truth, truth_report) = coco::load(json, Path::new(""))?;
        let mut objects: HashMap<i64, Vec<ObjectAnnotation>> = (truth.examples.into_iter())
            .map(|example| (example.image_id, example.objects))
            .collect();
        for example in &mut records.examples {
            example.objects = objects.remove(&example.image_id).with_context(|| {
                format!(
                    "image {} ({}) of {pattern} is not in {}: give the annotations that the records were made from",
                    example.image_id,
                    example.file_name,
                    json.display()
                )
            })?;
        }
        records.categories = truth.categories;
        (report.clipped, report.dropped) = (truth_report.clipped, truth_report.dropped);
    }
    Ok((records, report))
}

fn warn(name: &str, what: &str, findings: &[Finding]) {
    if findings.is_empty() || !super::ranks::speaks() {
        return;
    }
    eprintln!("warning: {name}: {} {what}", findings.len());
    for finding in findings.iter().take(FINDINGS_SHOWN) {
        eprintln!("  {finding}");
    }
    if findings.len() > FINDINGS_SHOWN {
        eprintln!("  and {} more", findings.len() - FINDINGS_SHOWN);
    }
}
