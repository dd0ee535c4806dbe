//! Evaluation: run the network over a data set and score its detections.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use effdet_data::augment::AugmentConfig;
use effdet_data::batch::Preparation;
use effdet_data::dataset::DetectionDataset;
use effdet_data::decode::{DecodeOptions, MAX_ENCODED_BYTES};
use effdet_data::loader::{Loader, LoaderConfig, LoaderMode, Shard};
use effdet_data::preprocess::PreprocessConfig;
use effdet_dist::{ProcessGroup, SingleProcess};
use effdet_metrics::{CocoSummary, Dataset, DetectionRow, EvalOptions, GroundTruth, ImageSet, evaluate};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::detect::{Detection, postprocess_evaluation};
use effdet_model::engine::{Engine, HeadOutputs};
use effdet_model::hparams::HParams;
use effdet_model::label_map::LabelMap;
use effdet_model::weights::Weights;

use crate::error::TrainError;
use crate::ranks::gather_detections;
use crate::requests::Requests;

/// The preparation of images that a model asks for.
pub fn preparation(hparams: &HParams, label_map: &LabelMap, seed: u64) -> Preparation {
    Preparation {
        preprocess: PreprocessConfig::new(hparams),
        augment: AugmentConfig::new(hparams),
        decode: DecodeOptions::default(),
        max_encoded_bytes: MAX_ENCODED_BYTES,
        label_map: label_map.clone(),
        skip_crowd: hparams.skip_crowd_during_training,
        seed,
        cache: None,
    }
}

/// Scores a network on a data set.
#[derive(Debug, Clone)]
pub struct Evaluator {
    /// Images and ground truth.
    pub dataset: Arc<DetectionDataset>,
    /// Model and post-processing.
    pub hparams: HParams,
    /// Categories.
    pub label_map: LabelMap,
    /// Images per step.
    pub batch_size: usize,
    /// Loader threads.
    pub workers: usize,
    /// Score the images with detections only, as the reference does.
    pub only_images_with_detections: bool,
}

/// The outcome of an evaluation.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// The COCO numbers.
    pub summary: CocoSummary,
    /// All detections.
    pub detections: Vec<DetectionRow>,
}

impl Evaluator {
    /// Runs `engine` with `weights` over the data set; `progress` hears of images done and images in all.
    ///
    /// Post-processing is that of the reference's evaluation: per-class soft-NMS, 100 detections, boxes in original pixels, not
    /// clipped.
    ///
    /// # Errors
    /// Unreadable images, a network that does not fit, and what the metric refuses.
    ///
    /// # Determinism
    /// The same weights and data give the same bits.
    pub fn run(
        &self,
        engine: &mut dyn Engine,
        weights: &Weights,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, TrainError> {
        self.run_on_ranks(engine, weights, &SingleProcess, progress)
    }

    /// The same with the images divided among the ranks of a group; every rank gets the whole outcome.
    ///
    /// # Errors
    /// As [`Self::run`], and those of the group.
    ///
    /// # Determinism
    /// The same bits for any number of ranks: each image is run once, and detections are put together in the order of the images.
    pub fn run_on_ranks(
        &self,
        engine: &mut dyn Engine,
        weights: &Weights,
        group: &dyn ProcessGroup,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Evaluation, TrainError> {
        let never = Requests::default();
        let outcome = self.run_until(engine, weights, group, &never, progress)?;
        Ok(outcome.unwrap_or_else(|| unreachable!("nobody can ask it to stop")))
    }

    /// The same; none when a rank is asked to stop before the end.
    ///
    /// # Errors
    /// As [`Self::run_on_ranks`].
    pub fn run_until(
        &self,
        engine: &mut dyn Engine,
        weights: &Weights,
        group: &dyn ProcessGroup,
        requests: &Requests,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<Evaluation>, TrainError> {
        let anchors = Anchors::new(&AnchorConfig::from(&self.hparams))?;
        let config = LoaderConfig {
            batch_size: self.batch_size,
            shard: Shard {
                rank: group.rank(),
                ranks: group.size(),
            },
            workers: self.workers,
            prefetch: 1,
            mode: LoaderMode::Evaluate,
        };
        let prepared = preparation(&self.hparams, &self.label_map, 0);
        let mut loader = Loader::new(Arc::clone(&self.dataset), prepared, None, config)?;
        let mut outputs = HeadOutputs::default();
        let mut detections = Vec::new();
        let (mut done, total) = (0, self.dataset.examples.len());
        progress(0, total);
        // Ranks have different numbers of images, but look for requests equally often.
        let rounds = total.div_ceil(group.size()).div_ceil(self.batch_size.max(1));
        for _ in 0..rounds {
            if group.any(requests.stop.load(Ordering::Relaxed))? {
                return Ok(None);
            }
            let Some(batch) = loader.next_batch() else {
                continue;
            };
            let batch = batch?;
            engine.infer(weights, &batch.image_batch(), &mut outputs)?;
            for (image, (&image_id, &scale)) in batch.image_ids.iter().zip(&batch.image_scales).enumerate() {
                let found =
                    postprocess_evaluation(&outputs, image, &anchors, &self.hparams.nms_configs, scale)?;
                detections.extend(found.iter().filter_map(|d| row(d, image_id, &self.label_map)));
            }
            done += batch.len();
            loader.recycle(batch);
            // The other ranks are about as far.
            progress((done * group.size()).min(total), total);
        }
        progress(total, total);
        let detections = gather_detections(group, detections)?;
        let summary = score(&self.dataset, &detections, self.only_images_with_detections)?;
        Ok(Some(Evaluation { summary, detections }))
    }
}

/// A detection as the metric takes it; none for a class that stands for no category.
fn row(detection: &Detection, image_id: i64, label_map: &LabelMap) -> Option<DetectionRow> {
    let category = label_map.category_id(detection.class)?;
    let [top, left, bottom, right] = detection.box_yxyx_px.map(f64::from);
    Some(DetectionRow {
        image_id,
        category_id: i64::from(category.0),
        bbox_xywh_px: [left, top, right - left, bottom - top],
        score: f64::from(detection.score),
    })
}

/// Scores detections against a data set.
///
/// # Errors
/// What the metric refuses.
pub fn score(
    dataset: &DetectionDataset,
    detections: &[DetectionRow],
    only_images_with_detections: bool,
) -> Result<CocoSummary, TrainError> {
    let image_ids: Vec<i64> = dataset.examples.iter().map(|example| example.image_id).collect();
    let category_ids: Vec<i64> = dataset
        .categories
        .iter()
        .map(|category| i64::from(category.id.0))
        .collect();
    let objects = dataset
        .examples
        .iter()
        .flat_map(|e| e.objects.iter().map(move |object| (e.image_id, object)));
    let ground_truth: Vec<GroundTruth> = objects
        .enumerate()
        .map(|(index, (image_id, object))| GroundTruth {
            // pycocotools never counts an object with id 0 as found.
            id: index as i64 + 1,
            image_id,
            category_id: i64::from(object.category.0),
            bbox_xywh_px: object.box_xywh_px,
            area: object.area,
            iscrowd: object.is_crowd,
            ignore: object.difficult,
        })
        .collect();
    let images = if only_images_with_detections {
        ImageSet::OnlyWithDetections
    } else {
        ImageSet::All
    };
    let dataset = Dataset {
        image_ids: &image_ids,
        category_ids: &category_ids,
        ground_truth: &ground_truth,
    };
    Ok(evaluate(&dataset, detections, &EvalOptions { images })?)
}
