//! `effdet bench postprocess`.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::boxes;
use effdet_model::detect::candidates::ImageHeads;
use effdet_model::detect::{postprocess_evaluation, suppress_evaluation};
use effdet_model::engine::{HeadOutputs, LevelOutput};
use effdet_model::hparams::NmsConfigs;
use effdet_model::rng::{Draws, Purpose};
use serde_json::json;

use super::distribution::Distribution;
use crate::cli::PostprocessBenchOptions;
use crate::commands::host::{ForeignLoad, cpu_name, write_foreign};
use crate::commands::model::resolve_hparams;
use crate::npy;

/// Objects in made-up outputs.
const OBJECTS: usize = 20;

/// Times the way from head outputs to detections and its two halves.
pub fn run(options: &PostprocessBenchOptions) -> Result<()> {
    ensure!(options.steps > 0, "--steps must be at least 1");
    let hparams = resolve_hparams(&options.model, "d0")?;
    let anchors = Anchors::new(&AnchorConfig::from(&hparams))?;
    let outputs = match &options.inputs {
        Some(folder) => read(folder, &anchors)?,
        None => made_up(&anchors, hparams.num_classes, options.data == "clustered"),
    };
    let config = NmsConfigs {
        method: options.method.unwrap_or(hparams.nms_configs.method),
        max_nms_inputs: options.candidates,
        max_output_size: options.detections,
        pyfunc: true,
        ..hparams.nms_configs
    };
    let heads = ImageHeads::new(&outputs, 0, &anchors)?;
    let (mut all_s, mut candidates_s, mut suppression_s) = (Vec::new(), Vec::new(), Vec::new());
    let mut detections = Vec::new();
    let load = ForeignLoad::start();
    for step in 0..options.warmup + options.steps {
        let begin = Instant::now();
        detections = postprocess_evaluation(&outputs, 0, &anchors, &config, 1.0)?;
        let all = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let candidates = heads.candidates(config.max_nms_inputs);
        let selection = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let again = suppress_evaluation(candidates, &config, 1.0);
        let suppression = begin.elapsed().as_secs_f64();
        ensure!(again == detections, "the halves give the whole");
        if step >= options.warmup {
            all_s.push(all);
            candidates_s.push(selection);
            suppression_s.push(suppression);
        }
    }
    let foreign_cores = load.cores();
    let median_ms = |times_s: &[f64]| 1e3 * Distribution::new(times_s).percentile_s(50);
    let (candidates_ms, suppression_ms) = (median_ms(&candidates_s), median_ms(&suppression_s));
    let distribution = Distribution::new(&all_s);
    let mut out = std::io::stdout().lock();
    if options.json {
        let mut report = json!({
            "bench": "postprocess", "model": hparams.name, "anchors": anchors.len(), "classes": heads.num_classes(),
            "candidates": options.candidates, "method": config.method.to_string(), "cpu": cpu_name(),
            "ms": 1e3 * distribution.percentile_s(50), "candidates_ms": candidates_ms, "suppression_ms": suppression_ms,
            "detections": detections.len(), "top_score": detections.first().map(|best| best.score),
            "foreign_cores": foreign_cores,
        });
        distribution.add_to(&mut report, 1);
        writeln!(out, "{report}")?;
        return Ok(());
    }
    writeln!(
        out,
        "postprocess {}, {} anchors x {} classes, {} candidates, {}, {} detections, one thread, {}",
        hparams.name,
        anchors.len(),
        heads.num_classes(),
        options.candidates,
        config.method,
        detections.len(),
        cpu_name().as_deref().unwrap_or("unknown processor")
    )?;
    distribution.print(&mut out, 1)?;
    writeln!(
        out,
        "  candidates {candidates_ms:.2} ms, suppression {suppression_ms:.2} ms"
    )?;
    write_foreign(&mut out, foreign_cores)?;
    Ok(())
}

/// Head outputs of one image from `cls.npy` and `box.npy`, anchors ascending by level.
fn read(folder: &Path, anchors: &Anchors) -> Result<HeadOutputs> {
    let array = |name: &str, columns: Option<usize>| {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let (shape, values) = npy::parse(&bytes).with_context(|| path.display().to_string())?;
        ensure!(
            shape.len() == 2
                && shape[0] == anchors.len()
                && columns.is_none_or(|columns| shape[1] == columns),
            "{}: shape {shape:?}, but the model has {} anchors: give --model and --image-size of the outputs",
            path.display(),
            anchors.len()
        );
        Ok(values)
    };
    Ok(by_level(
        anchors,
        &array("cls.npy", None)?,
        &array("box.npy", Some(4))?,
    ))
}

/// Cuts `[anchors, classes]` logits and `[anchors, 4]` codes into levels.
fn by_level(anchors: &Anchors, logits: &[f32], codes: &[f32]) -> HeadOutputs {
    let classes = logits.len() / anchors.len();
    let levels = anchors.levels.iter().map(|level| {
        let (start, end) = (level.range.start, level.range.end);
        LevelOutput {
            height: level.height,
            width: level.width,
            class_logits: logits[start * classes..end * classes].to_vec(),
            box_codes: codes[start * 4..end * 4].to_vec(),
        }
    });
    HeadOutputs {
        batch: 1,
        levels: levels.collect(),
    }
}

/// Noise, and objects that the anchors around them see the better the more they overlap.
fn made_up(anchors: &Anchors, classes: usize, with_objects: bool) -> HeadOutputs {
    let mut draws = Draws::new(0, Purpose::Synthetic, 0, 0);
    let mut logits: Vec<f32> = (0..anchors.len() * classes)
        .map(|_| -6.0 + 0.7 * draws.normal() as f32)
        .collect();
    let mut codes: Vec<f32> = (0..anchors.len() * 4)
        .map(|_| 0.1 * draws.normal() as f32)
        .collect();
    let objects = if with_objects { OBJECTS } else { 0 };
    for _ in 0..objects {
        let class = draws.below(classes as u64) as usize;
        let mut side = |extent: usize| {
            let extent = extent as f32;
            let length = (0.16 * extent * (0.6 * draws.normal() as f32).exp()).min(0.8 * extent);
            let start = (extent - length) * draws.uniform();
            (start, start + length)
        };
        let ((top, bottom), (left, right)) = (side(anchors.image_height), side(anchors.image_width));
        let object = [top, left, bottom, right];
        for (index, &anchor) in anchors.boxes_yxyx_px.iter().enumerate() {
            let iou = boxes::iou(object, anchor);
            if iou > 0.3 {
                logits[index * classes + class] += 8.0 * iou;
                let code = boxes::encode(object, anchor);
                for (out, code) in codes[index * 4..].iter_mut().zip(code) {
                    *out = code + 0.05 * draws.normal() as f32;
                }
            }
        }
    }
    by_level(anchors, &logits, &codes)
}
