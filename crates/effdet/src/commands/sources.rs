//! Data sets named on the command line.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use effdet_data::coco;
use effdet_data::corrupt::{self, Cap, Excluded};
use effdet_data::dataset::{DetectionDataset, ObjectAnnotation};
use effdet_data::decode::{DecodeOptions, MAX_ENCODED_BYTES};
use effdet_data::layout::Layout;
use effdet_data::report::{Faults, Finding, LoadOptions, LoadReport};
use effdet_data::text::printable;
use effdet_data::tfrecord::{self, ReadOptions};

use super::progress::Progress;
use super::ranks;
use crate::cli::{OnCorrupt, SourceArgs};

/// Where lists of damaged samples go when there is no run folder.
const CORRUPT_DIR: &str = "effdet-corrupt";

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

/// One part of a data set.
pub struct Loaded {
    /// What is left to use.
    pub dataset: DetectionDataset,
    /// What loading found.
    pub report: LoadReport,
    /// `COCO`, `VOC`, `YOLO` or `TFRecord`.
    pub format: &'static str,
    /// Where it lies.
    pub place: String,
    /// Damaged samples that were left out.
    pub excluded: Vec<Excluded>,
}

/// Reads one part and lists what was left out in `effdet-corrupt/`; none when the command line does not name it and the data
/// folder lacks that split.
pub fn load(args: &SourceArgs, part: Part) -> Result<Option<DetectionDataset>> {
    let Some(loaded) = load_part(args, part)? else {
        return Ok(None);
    };
    list_excluded(args, part, &loaded.excluded, Path::new(CORRUPT_DIR))?;
    Ok(Some(loaded.dataset))
}

/// Reads one part, without what is damaged if the command line says so.
pub fn load_part(args: &SourceArgs, part: Part) -> Result<Option<Loaded>> {
    let Some(mut loaded) = read_part(args, part, &options(args))? else {
        return Ok(None);
    };
    if args.on_corrupt != OnCorrupt::Fail {
        loaded.excluded = exclude(args, &mut loaded)?;
    }
    if ranks::speaks() {
        warn_all(&loaded.dataset.name, &loaded.report);
    }
    Ok(Some(loaded))
}

/// Reads one part as it stands; `options` say what to do about faults.
pub fn read_part(args: &SourceArgs, part: Part, options: &LoadOptions) -> Result<Option<Loaded>> {
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
    let ((dataset, report), format, place) = if let Some(pattern) = pattern {
        (
            load_records(pattern, json.as_deref(), options)?,
            "TFRecord",
            pattern.clone(),
        )
    } else if let (Some(json), Some(images)) = (json, images) {
        (
            coco::load_with(json, images, options)?,
            "COCO",
            json.display().to_string(),
        )
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
        let source = layout.split(split)?;
        (
            source.load_with(options)?,
            source.format_name(),
            root.display().to_string(),
        )
    } else {
        return Ok(None);
    };
    Ok(Some(Loaded {
        dataset,
        report,
        format,
        place,
        excluded: Vec::new(),
    }))
}

fn exclude(args: &SourceArgs, loaded: &mut Loaded) -> Result<Vec<Excluded>> {
    let cap = args.max_corrupt.as_deref().unwrap_or("1%");
    let cap = cap.parse::<Cap>().map_err(anyhow::Error::msg)?;
    let progress = Mutex::new(Progress::new(
        loaded.dataset.examples.len() as u64,
        "images checked",
    ));
    let advance = || {
        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.advance(1);
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = (&DecodeOptions::default(), MAX_ENCODED_BYTES);
    Ok(corrupt::exclude(
        &mut loaded.dataset,
        &mut loaded.report,
        cap,
        limits,
        threads,
        &advance,
    )?)
}

/// Writes the list of what was left out of a part, and its bytes where those are wanted, and says so.
pub fn list_excluded(args: &SourceArgs, part: Part, excluded: &[Excluded], folder: &Path) -> Result<()> {
    if excluded.is_empty() {
        return Ok(());
    }
    let name = match part {
        Part::Train => &args.train_split,
        Part::Val => &args.val_split,
    };
    let list = folder.join(format!("corrupt-{name}.jsonl"));
    corrupt::write_list(&list, excluded)?;
    if args.on_corrupt == OnCorrupt::Quarantine {
        corrupt::quarantine(
            &folder.join(format!("quarantine-{name}")),
            excluded,
            MAX_ENCODED_BYTES,
        )?;
    }
    if ranks::speaks() {
        tell!(
            "warning: {} damaged samples are left out of the {name} data, listed in {}",
            excluded.len(),
            list.display()
        );
        for sample in excluded.iter().take(FINDINGS_SHOWN) {
            tell!("  {}", printable(&sample.finding.to_string()));
        }
    }
    Ok(())
}

/// How the command line says a data set is to be read.
fn options(args: &SourceArgs) -> LoadOptions {
    LoadOptions {
        follow_links: args.follow_links,
        faults: match args.on_corrupt {
            OnCorrupt::Fail => Faults::Refuse,
            OnCorrupt::Skip | OnCorrupt::Quarantine => Faults::Collect,
        },
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
        // Each split as if it were the one to train on.
        let args = SourceArgs {
            train_split: name.clone(),
            ..args.clone()
        };
        Ok((name, require(&args, Part::Train)?))
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
    load(args, part)?.with_context(|| nothing(args, part))
}

/// As [`load_part`], for commands that cannot do without.
pub fn require_part(args: &SourceArgs, part: Part) -> Result<Loaded> {
    load_part(args, part)?.with_context(|| nothing(args, part))
}

fn nothing(args: &SourceArgs, part: Part) -> String {
    match (&args.data, part) {
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
    }
}

/// Records; where there is an instances file too, objects and categories are those of the file, as in the reference's evaluation.
fn load_records(
    pattern: &str,
    ground_truth: Option<&Path>,
    options: &LoadOptions,
) -> Result<(DetectionDataset, LoadReport)> {
    let (mut records, mut report) = tfrecord::load(pattern, &ReadOptions::of(options))?;
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
    if findings.is_empty() {
        return;
    }
    tell!("warning: {}: {} {what}", printable(name), findings.len());
    for finding in findings.iter().take(FINDINGS_SHOWN) {
        tell!("  {}", printable(&finding.to_string()));
    }
    if findings.len() > FINDINGS_SHOWN {
        tell!("  and {} more", findings.len() - FINDINGS_SHOWN);
    }
}
