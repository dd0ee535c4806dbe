//! `effdet data`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use effdet_data::coco;
use effdet_data::convert::{ConvertOptions, Converted, coco_folder};
use effdet_data::dataset::DetectionDataset;
use effdet_data::decode::MAX_ENCODED_BYTES;
use effdet_data::inspect::{SIDE_BINS_PX, Statistics, statistics};
use effdet_data::synthetic::{self, SyntheticConfig};
use effdet_data::tfrecord::{self, WriteOptions};
use effdet_data::{sidecar, voc, yolo};
use serde_json::json;

use super::progress::Progress;
use super::sources::{self, Part};
use super::{doctor, download, view};
use crate::cli::{ConvertFormat, DataCommand, SourceArgs};

/// Image sizes that `inspect` lists.
const SIZES_SHOWN: usize = 5;

/// Converts, inspects, examines, fetches, draws or renders a data set.
pub fn run(command: &DataCommand) -> Result<ExitCode> {
    let done = match command {
        DataCommand::Convert {
            source,
            image_dir,
            object_annotations_file,
            caption_annotations_file,
            to,
            splits,
            output,
            num_shards,
        } => {
            if let Some(captions) = caption_annotations_file {
                bail!(
                    "{}: captions have no boxes to train on; give --object_annotations_file instances_*.json",
                    captions.display()
                );
            }
            let target = Target {
                format: *to,
                output,
                num_shards: *num_shards,
            };
            let one = match (image_dir, object_annotations_file) {
                (Some(images), Some(json)) => Some(coco::load(json, images)?.0),
                _ if source.data.is_none() || (splits.is_empty() && *to == ConvertFormat::Tfrecord) => {
                    Some(sources::require(source, Part::Train)?)
                }
                _ => None,
            };
            if let Some(dataset) = one {
                return target.write(&dataset, None).map(|()| ExitCode::SUCCESS);
            }
            let splits = sources::load_splits(source, splits)?;
            splits
                .iter()
                .try_for_each(|(split, dataset)| target.write(dataset, Some(split)))
        }
        DataCommand::Doctor(args) => return doctor::run(args),
        DataCommand::Download(args) => download::run(args),
        DataCommand::View(args) => view::run(args),
        DataCommand::Inspect { source, json } => inspect(source, *json),
        DataCommand::Synth {
            output,
            images,
            val_images,
            image_size,
            seed,
        } => synth(output, *images, *val_images, *image_size, *seed),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Where a data set is converted to.
struct Target<'a> {
    format: ConvertFormat,
    output: &'a Path,
    num_shards: usize,
}

impl Target<'_> {
    /// Writes one split; a split without a name is `train`, and its shards have the output as their prefix.
    fn write(&self, dataset: &DetectionDataset, split: Option<&str>) -> Result<()> {
        let mut progress = Progress::new(dataset.examples.len() as u64, "images");
        let mut advance = || progress.advance(1);
        let (output, name) = (self.output, split.unwrap_or("train"));
        let options = ConvertOptions {
            max_encoded_bytes: MAX_ENCODED_BYTES,
        };
        let converted = match self.format {
            ConvertFormat::Tfrecord => {
                let options = WriteOptions {
                    num_shards: self.num_shards,
                    max_encoded_bytes: MAX_ENCODED_BYTES,
                };
                let prefix = split.map_or_else(|| output.to_owned(), |split| output.join(split));
                let report = tfrecord::write(dataset, &prefix, &options, &mut advance)?;
                Converted {
                    images: report.records,
                    objects: report.objects,
                    crowds: 0,
                    places: vec![
                        format!("{}-*.tfrecord ({} shards)", prefix.display(), self.num_shards).into(),
                        report.manifest,
                    ],
                }
            }
            ConvertFormat::Coco => coco_folder(dataset, output, name, &options, &mut advance)?,
            ConvertFormat::Voc => voc::write(dataset, output, name, &options, &mut advance)?,
            ConvertFormat::Yolo => yolo::write(dataset, output, name, &options, &mut advance)?,
        };
        drop(progress);
        let places: Vec<String> = (converted.places.iter())
            .map(|place| place.display().to_string())
            .collect();
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{}: {} images, {} objects: {}",
            name,
            converted.images,
            converted.objects,
            places.join(", ")
        )?;
        if converted.crowds > 0 {
            writeln!(
                out,
                "  {} crowd regions are in {} only: this format has no such thing",
                converted.crowds,
                sidecar::file(output, name).display()
            )?;
        }
        Ok(())
    }
}

fn synth(output: &Path, images: usize, val_images: usize, image_size: u32, seed: u64) -> Result<()> {
    ensure!(
        (32..=4096).contains(&image_size),
        "--image-size {image_size}: images are rendered at 32 to 4096 pixels"
    );
    let config = SyntheticConfig {
        image_size,
        seed,
        ..SyntheticConfig::default()
    };
    let (train, val) = (images as u64, val_images as u64);
    let mut progress = Progress::new(train + val, "images");
    for (split, range) in [("train", 0..train), ("val", train..train + val)] {
        if !range.is_empty() {
            let dataset = synthetic::dataset(&config, range);
            let mut advance = || progress.advance(1);
            coco_folder(&dataset, output, split, &ConvertOptions::default(), &mut advance)?;
        }
    }
    drop(progress);
    writeln!(
        std::io::stdout(),
        "{images} training and {val_images} held-out images: {0}\ntrain on them:  effdet train --data {0} --image-size {image_size}",
        output.display()
    )?;
    Ok(())
}

fn inspect(source: &SourceArgs, as_json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut splits = Vec::new();
    for (split, part) in [("train", Part::Train), ("val", Part::Val)] {
        let Some(dataset) = sources::load(source, part)? else {
            continue;
        };
        let statistics = statistics(&dataset);
        if !as_json {
            print_statistics(&mut out, split, &dataset, &statistics)?;
        }
        splits.push(
            json!({"split": split, "name": dataset.name, "fingerprint": dataset.fingerprint(),
                           "statistics": statistics}),
        );
    }
    ensure!(
        !splits.is_empty(),
        "no data: give --data DIR, or --val-json with --val-images"
    );
    if as_json {
        writeln!(out, "{}", json!({ "splits": splits }))?;
    }
    Ok(())
}

fn print_statistics(
    out: &mut impl Write,
    split: &str,
    dataset: &DetectionDataset,
    statistics: &Statistics,
) -> Result<()> {
    writeln!(
        out,
        "{split} ({}): {} images, {} without objects, at most {} objects in one",
        dataset.name, statistics.images, statistics.images_without_objects, statistics.max_objects_per_image
    )?;
    let sizes: Vec<String> = (statistics.image_sizes.iter().take(SIZES_SHOWN))
        .map(|((width, height), count)| format!("{width}x{height} ({count})"))
        .collect();
    let more = match statistics.image_sizes.len().saturating_sub(SIZES_SHOWN) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    writeln!(out, "  width x height (images): {}{more}", sizes.join(", "))?;
    let [small, medium, large] = statistics.small_medium_large;
    writeln!(
        out,
        "  {} objects: {small} small (below 32x32), {medium} medium, {large} large (above 96x96); {} crowds, {} difficult",
        statistics.objects, statistics.crowds, statistics.difficult
    )?;
    let ends = SIDE_BINS_PX.iter().map(|end| format!("<{end}"));
    let bins: Vec<String> = ends
        .chain([">=1024".to_owned()])
        .zip(statistics.box_side_histogram)
        .filter(|(_, count)| *count > 0)
        .map(|(bin, count)| format!("{bin}: {count}"))
        .collect();
    writeln!(out, "  box side in pixels: {}", bins.join(", "))?;
    for category in &statistics.categories {
        writeln!(
            out,
            "  {:>6}  {:<24} {:>8} objects in {:>7} images",
            category.id, category.name, category.objects, category.images
        )?;
    }
    writeln!(out, "  fingerprint {}", dataset.fingerprint())?;
    Ok(())
}
