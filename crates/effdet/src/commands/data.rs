//! `effdet data`.

use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use effdet_data::coco;
use effdet_data::convert::to_coco_folder;
use effdet_data::dataset::DetectionDataset;
use effdet_data::inspect::{SIDE_BINS_PX, Statistics, statistics};
use effdet_data::synthetic::{self, SyntheticConfig};
use effdet_data::tfrecord::{self, WriteOptions};
use serde_json::json;

use super::progress::Progress;
use super::sources::{self, Part};
use crate::cli::{ConvertFormat, DataCommand, SourceArgs};

/// Largest encoded image that is copied.
const MAX_ENCODED_BYTES: u64 = 256 << 20;
/// Image sizes that `inspect` lists.
const SIZES_SHOWN: usize = 5;

/// Converts, inspects or renders a data set.
pub fn run(command: &DataCommand) -> Result<()> {
    match command {
        DataCommand::Convert {
            source,
            image_dir,
            object_annotations_file,
            caption_annotations_file,
            to,
            output,
            num_shards,
        } => {
            if let Some(captions) = caption_annotations_file {
                bail!(
                    "{}: captions have no boxes to train on; give --object_annotations_file instances_*.json",
                    captions.display()
                );
            }
            let dataset = match (image_dir, object_annotations_file) {
                (Some(images), Some(json)) => coco::load(json, images)?.0,
                _ => sources::require(source, Part::Train)?,
            };
            convert(&dataset, *to, output, *num_shards)
        }
        DataCommand::Inspect { source, json } => inspect(source, *json),
        DataCommand::Synth {
            output,
            images,
            val_images,
            image_size,
            seed,
        } => synth(output, *images, *val_images, *image_size, *seed),
    }
}

fn convert(dataset: &DetectionDataset, to: ConvertFormat, output: &Path, num_shards: usize) -> Result<()> {
    let mut progress = Progress::new(dataset.examples.len() as u64, "images");
    let where_to = match to {
        ConvertFormat::Tfrecord => {
            let options = WriteOptions {
                num_shards,
                max_encoded_bytes: MAX_ENCODED_BYTES,
            };
            tfrecord::write(dataset, output, &options, &mut || progress.advance(1))?;
            format!("{num_shards} shards {}-*.tfrecord", output.display())
        }
        ConvertFormat::Coco => write_coco(dataset, output, "train", &mut progress)?,
    };
    drop(progress);
    writeln!(
        std::io::stdout(),
        "{} images, {} objects: {where_to}",
        dataset.examples.len(),
        dataset.examples.iter().map(|e| e.objects.len()).sum::<usize>(),
    )?;
    Ok(())
}

fn write_coco(
    dataset: &DetectionDataset,
    output: &Path,
    split: &str,
    progress: &mut Progress,
) -> Result<String> {
    let written = to_coco_folder(dataset, output, split, MAX_ENCODED_BYTES, &mut || {
        progress.advance(1)
    })?;
    Ok(format!(
        "{} and {}",
        written.json.display(),
        written.images.display()
    ))
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
            write_coco(&synthetic::dataset(&config, range), output, split, &mut progress)?;
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
