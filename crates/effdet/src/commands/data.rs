//! `effdet data`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use effdet_data::coco;
use effdet_data::dataset::{DetectionDataset, ImageSource};
use effdet_data::synthetic::{self, SyntheticConfig};
use serde_json::json;

use super::sources::{self, Part};
use crate::cli::{ConvertFormat, DataCommand, SourceArgs};

/// Largest encoded image that is copied.
const MAX_ENCODED_BYTES: u64 = 256 << 20;

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
    ensure!(num_shards > 0, "--num-shards must be at least 1");
    match to {
        ConvertFormat::Tfrecord => bail!("TFRecord shards cannot be written yet"),
        ConvertFormat::Coco => write_coco(dataset, output, "train")?,
    }
    println!(
        "{} images, {} objects: {}",
        dataset.examples.len(),
        dataset.examples.iter().map(|e| e.objects.len()).sum::<usize>(),
        output.display()
    );
    Ok(())
}

/// Writes `annotations/instances_<split>.json` and the images, as they are, into `<split>/`.
fn write_coco(dataset: &DetectionDataset, output: &Path, split: &str) -> Result<()> {
    let images = output.join(split);
    let annotations = output.join("annotations");
    for folder in [&images, &annotations] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let json = annotations.join(format!("instances_{split}.json"));
    ensure!(
        !json.exists(),
        "{} exists already; name another folder with --output",
        json.display()
    );
    for example in &dataset.examples {
        let target = coco::confined_join(&images, &example.file_name, &json)?;
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let write = match &example.source {
            ImageSource::File(path) => fs::copy(path, &target).map(drop),
            source => fs::write(&target, source.read_bytes(MAX_ENCODED_BYTES)?),
        };
        write.with_context(|| format!("cannot write {}", target.display()))?;
    }
    Ok(coco::write(dataset, &json)?)
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
    for (split, range) in [("train", 0..train), ("val", train..train + val)] {
        if !range.is_empty() {
            write_coco(&synthetic::dataset(&config, range), output, split)?;
        }
    }
    println!(
        "{images} training and {val_images} held-out images: {0}\ntrain on them:  effdet train --data {0} --image-size {image_size}",
        output.display()
    );
    Ok(())
}

/// Counts of one split.
struct Statistics {
    split: &'static str,
    name: String,
    images: usize,
    images_without_objects: usize,
    crowd: usize,
    difficult: usize,
    objects: usize,
    /// Small, medium, large by COCO's areas.
    by_size: [usize; 3],
    /// Smallest and largest width and height of the images, as annotated.
    widths: (u32, u32),
    heights: (u32, u32),
    by_class: BTreeMap<u32, (String, usize)>,
    fingerprint: String,
}

impl Statistics {
    fn new(split: &'static str, dataset: &DetectionDataset) -> Self {
        let objects = || dataset.examples.iter().flat_map(|example| &example.objects);
        let mut by_class: BTreeMap<u32, (String, usize)> = (dataset.categories.iter())
            .map(|category| (category.id.0, (category.name.clone(), 0)))
            .collect();
        let mut by_size = [0; 3];
        for object in objects() {
            if let Some((_, count)) = by_class.get_mut(&object.category.0) {
                *count += 1;
            }
            let size = usize::from(object.area >= 32.0 * 32.0) + usize::from(object.area >= 96.0 * 96.0);
            by_size[size] += 1;
        }
        let range = |side: fn(&effdet_data::dataset::Example) -> u32| {
            let sides = || dataset.examples.iter().map(side);
            (sides().min().unwrap_or(0), sides().max().unwrap_or(0))
        };
        Self {
            split,
            name: dataset.name.clone(),
            images: dataset.examples.len(),
            images_without_objects: dataset.examples.iter().filter(|e| e.objects.is_empty()).count(),
            crowd: objects().filter(|object| object.is_crowd).count(),
            difficult: objects().filter(|object| object.difficult).count(),
            objects: objects().count(),
            by_size,
            widths: range(|example| example.width),
            heights: range(|example| example.height),
            by_class,
            fingerprint: dataset.fingerprint(),
        }
    }
}

fn inspect(source: &SourceArgs, as_json: bool) -> Result<()> {
    let parts = [("train", Part::Train), ("val", Part::Val)];
    let mut all = Vec::new();
    for (split, part) in parts {
        if let Some(dataset) = sources::load(source, part)? {
            all.push(Statistics::new(split, &dataset));
        }
    }
    ensure!(
        !all.is_empty(),
        "no data: give --data DIR, or --val-json with --val-images"
    );
    let mut out = std::io::stdout().lock();
    if as_json {
        let splits: Vec<_> = all
            .iter()
            .map(|s| {
                let classes: Vec<_> = (s.by_class.iter())
                    .map(|(id, (name, count))| json!({"id": id, "name": name, "objects": count}))
                    .collect();
                json!({"split": s.split, "name": s.name, "images": s.images,
                       "images_without_objects": s.images_without_objects, "objects": s.objects,
                       "crowd": s.crowd, "difficult": s.difficult, "small": s.by_size[0],
                       "medium": s.by_size[1], "large": s.by_size[2], "widths": s.widths,
                       "heights": s.heights, "classes": classes, "fingerprint": s.fingerprint})
            })
            .collect();
        writeln!(out, "{}", json!({ "splits": splits }))?;
        return Ok(());
    }
    for s in &all {
        writeln!(
            out,
            "{} ({}): {} images ({} without objects), {}-{} x {}-{} pixels (width x height)",
            s.split,
            s.name,
            s.images,
            s.images_without_objects,
            s.widths.0,
            s.widths.1,
            s.heights.0,
            s.heights.1
        )?;
        writeln!(
            out,
            "  {} objects: {} small (below 32x32), {} medium, {} large (from 96x96); {} crowd, {} difficult",
            s.objects, s.by_size[0], s.by_size[1], s.by_size[2], s.crowd, s.difficult
        )?;
        for (id, (name, count)) in &s.by_class {
            writeln!(out, "  {id:>6}  {name:<24} {count:>8}")?;
        }
        writeln!(out, "  fingerprint {}", s.fingerprint)?;
    }
    Ok(())
}
