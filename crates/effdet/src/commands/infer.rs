//! `effdet infer`.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use effdet_data::decode::{DecodeOptions, MAX_ENCODED_BYTES, decode_rgb};
use effdet_model::detect::Detection;
use effdet_model::label_map::LabelMap;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use serde::Serialize;

use super::checkpoint::Trained;
use super::detector::{Detector, annotate};
use super::engine::cpu_engine;
use super::model::apply_overrides;
use super::progress::Progress;
use crate::cli::{InferArgs, StepMemory};

const JPEG_QUALITY: u8 = 92;

/// Detections of one image, as written to `detections.json`.
#[derive(Serialize)]
struct ImageRecord {
    file: PathBuf,
    width: u32,
    height: u32,
    detections: Vec<DetectionRecord>,
}

#[derive(Serialize)]
struct DetectionRecord {
    category_id: u32,
    name: String,
    score: f32,
    /// `[x, y, width, height]` in pixels.
    bbox: [f32; 4],
}

/// Detects objects in every image; an image that cannot be read is reported and fails the command at its end.
pub fn run(args: &InferArgs) -> Result<ExitCode> {
    ensure!(
        (0.0..=1.0).contains(&args.score_threshold),
        "--score-threshold {}: scores lie within 0..=1",
        args.score_threshold
    );
    let files = find_images(args.image_path.iter().chain(&args.inputs))?;
    let mut trained = Trained::open(&args.checkpoint)?;
    apply_overrides(&mut trained.hparams, &args.hparams)?;
    if let Some(size) = args.image_size {
        trained.hparams.image_size = size;
    }
    let mut nms = trained.hparams.nms_configs.clone();
    nms.max_output_size = args.max_detections;
    if let Some(method) = args.nms_method {
        nms.method = method;
    }
    let network = trained.network()?;
    let weights = trained.weights(&network, args.raw_weights)?;
    let mut engine = cpu_engine(&network, &args.engine, StepMemory::default())?;
    let mut detector = Detector::new(&mut engine, &network, &weights, nms)?;

    fs::create_dir_all(&args.output_dir)
        .with_context(|| format!("--output-dir: cannot create {}", args.output_dir.display()))?;
    if !args.no_images {
        check_outputs(&files, &args.output_dir)?;
    }
    let mut names = OutputNames::default();
    let mut records = Vec::with_capacity(files.len());
    let mut failures = 0;
    let mut progress = Progress::new(files.len() as u64, "images");
    for file in files {
        match read_image(&file) {
            Err(error) => {
                failures += 1;
                progress.say(&format!("error: {}: {}", file.display(), super::describe(&error)));
            }
            Ok(mut image) => {
                let detections = detector.detect(&image, args.score_threshold)?;
                records.push(ImageRecord {
                    width: image.width(),
                    height: image.height(),
                    detections: (detections.iter())
                        .map(|detection| record(detection, &trained.label_map))
                        .collect(),
                    file: file.clone(),
                });
                if !args.no_images {
                    annotate(&mut image, &detections, &trained.label_map, args.line_thickness);
                    let path = args.output_dir.join(names.next(&file));
                    write_jpeg(&image, &path)?;
                }
            }
        }
        progress.advance(1);
    }
    drop(progress);

    let json_path = args.output_dir.join("detections.json");
    write_json(&records, &json_path)?;
    let found: usize = records.iter().map(|record| record.detections.len()).sum();
    let summary = format!(
        "{found} detections above {} in {} images: {}",
        args.score_threshold,
        records.len(),
        args.output_dir.display()
    );
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::json!({ "images": records }))?;
        tell!("{summary}");
    } else {
        writeln!(std::io::stdout(), "{summary}")?;
    }
    if failures > 0 {
        tell!("error: {failures} images could not be read, see above; the others are done");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses to write an annotated image over one of those that are read.
fn check_outputs(files: &[PathBuf], output_dir: &Path) -> Result<()> {
    let inputs: HashSet<PathBuf> = (files.iter())
        .filter_map(|file| file.canonicalize().ok())
        .collect();
    let mut names = OutputNames::default();
    for file in files {
        let output = output_dir.join(names.next(file));
        ensure!(
            !(output.canonicalize()).is_ok_and(|output| inputs.contains(&output)),
            "--output-dir {}: the annotated image of {} would be written over {}, which is one of the images to detect in: choose another \
             folder, or --no-images",
            output_dir.display(),
            file.display(),
            output.display()
        );
    }
    Ok(())
}

fn record(detection: &Detection, label_map: &LabelMap) -> DetectionRecord {
    let [ymin, xmin, ymax, xmax] = detection.box_yxyx_px;
    DetectionRecord {
        category_id: label_map.category_id(detection.class).map_or(0, |id| id.0),
        name: label_map.class_name(detection.class).unwrap_or("N/A").to_owned(),
        score: detection.score,
        bbox: [xmin, ymin, xmax - xmin, ymax - ymin],
    }
}

/// Expands files, folders and globs in their order; the content of folders and globs is sorted.
fn find_images<'a>(inputs: impl Iterator<Item = &'a String>) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for input in inputs {
        let path = Path::new(input);
        let before = files.len();
        if path.is_file() {
            files.push(path.to_owned());
        } else if path.is_dir() {
            let entries = fs::read_dir(path).with_context(|| format!("cannot list {input}"))?;
            for entry in entries {
                let file = entry.with_context(|| format!("cannot list {input}"))?.path();
                if is_image_name(&file) {
                    files.push(file);
                }
            }
            files[before..].sort();
        } else {
            let matches =
                glob::glob(input).with_context(|| format!("{input}: neither a file nor a valid glob"))?;
            for entry in matches {
                files.push(entry?);
            }
        }
        if files.len() == before {
            bail!(
                "{input}: no image there; give .jpg, .jpeg or .png files, folders of them, or quoted globs"
            );
        }
    }
    Ok(files)
}

fn is_image_name(file: &Path) -> bool {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or("");
    ["jpg", "jpeg", "png"].contains(&extension.to_ascii_lowercase().as_str())
}

fn read_image(file: &Path) -> Result<RgbImage> {
    let bytes = fs::metadata(file)?.len();
    ensure!(
        bytes <= MAX_ENCODED_BYTES,
        "{bytes} bytes are more than the limit of {MAX_ENCODED_BYTES}"
    );
    Ok(decode_rgb(&fs::read(file)?, &DecodeOptions::default())?)
}

/// Writes an annotated image.
pub fn write_jpeg(image: &RgbImage, path: &Path) -> Result<()> {
    let write = || -> Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        JpegEncoder::new_with_quality(&mut out, JPEG_QUALITY).encode_image(image)?;
        Ok(out.flush()?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn write_json(records: &[ImageRecord], path: &Path) -> Result<()> {
    let write = || -> Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        serde_json::to_writer_pretty(&mut out, records)?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Names `<stem>.jpg`, numbered where images of several folders share a stem.
#[derive(Default)]
struct OutputNames(HashSet<String>);

impl OutputNames {
    fn next(&mut self, file: &Path) -> String {
        let stem = file
            .file_stem()
            .map_or_else(|| "image".into(), |stem| stem.to_string_lossy());
        let numbered = (2u64..).map(|number| format!("{stem}-{number}.jpg"));
        let name = std::iter::once(format!("{stem}.jpg"))
            .chain(numbered)
            .find(|name| !self.0.contains(name))
            .unwrap_or_default();
        self.0.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stems_get_distinct_names() {
        let mut names = OutputNames::default();
        let files = ["a/x.jpg", "b/x.png", "c/x-2.jpg", "d/x.jpeg"];
        let given = files.map(|file| names.next(Path::new(file)));
        assert_eq!(given, ["x.jpg", "x-2.jpg", "x-2-2.jpg", "x-3.jpg"]);
    }
}
