//! What a run leaves on disk beside its checkpoints: logs, detections, pictures.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use effdet_data::coco::{ResultRow, write_results};
use effdet_data::dataset::DetectionDataset;
use effdet_data::decode::MAX_ENCODED_BYTES;
use effdet_data::decode::{DecodeOptions, decode_rgb};
use effdet_metrics::DetectionRow;
use effdet_model::engine::Engine;
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::events::EventSink;
use effdet_train::sinks::{Csv, Curves, DlLogger, DlLoggerConfig, TensorBoard};

use super::detector::{Detector, annotate};
use crate::cli::TrainArgs;

/// Held-out images drawn at the end of a run.
const SAMPLES: usize = 8;
/// Detections drawn on them score above this.
const SAMPLE_THRESHOLD: f32 = 0.4;

/// The logs of a run; those of a resumed run are continued behind `step`.
pub fn logs(args: &TrainArgs, run_dir: &Path, step: u64, ranks: usize) -> Result<Vec<Box<dyn EventSink>>> {
    let dllogger = DlLoggerConfig {
        path: run_dir.join(&args.log_filename),
        log_steps: args.log_steps,
        ranks,
        step,
    };
    Ok(vec![
        Box::new(DlLogger::open(&dllogger)?),
        Box::new(TensorBoard::open(
            &run_dir.join("tensorboard"),
            step,
            args.log_steps,
        )?),
        // The curves begin with what the tables hold.
        Box::new(Curves::open(&run_dir.join("curves.svg"), run_dir, step)?),
        Box::new(Csv::open(run_dir, step)?),
    ])
}

/// Writes detections as COCO results JSON.
pub fn write_detections(detections: &[DetectionRow], file: &Path) -> Result<()> {
    let rows: Vec<ResultRow> = (detections.iter())
        .map(|d| ResultRow {
            image_id: d.image_id,
            category_id: d.category_id,
            bbox: d.bbox_xywh_px,
            score: d.score,
        })
        .collect();
    write_results(file, &rows).with_context(|| format!("cannot write {}", file.display()))
}

/// Draws detections on some held-out images.
pub fn write_samples(
    engine: &mut dyn Engine,
    network: &Arc<Network>,
    weights: &Weights,
    label_map: &LabelMap,
    val: &DetectionDataset,
    folder: &Path,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut detector = Detector::new(engine, network, weights, network.hparams.nms_configs.clone())?;
    for example in val.examples.iter().take(SAMPLES) {
        let bytes = example.source.read_bytes(MAX_ENCODED_BYTES)?;
        let mut image = decode_rgb(&bytes, &DecodeOptions::default())
            .with_context(|| format!("image {}", example.file_name))?;
        let detections = detector.detect(&image, SAMPLE_THRESHOLD)?;
        annotate(&mut image, &detections, label_map, 2);
        let file = folder.join(format!("{}.jpg", example.image_id));
        image
            .save(&file)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}
