//! COCO detection metrics, equal to pycocotools in full precision.
//!
//! [`evaluate`] takes plain arrays (ground truth, detections, the ids of images and categories) and returns a [`CocoSummary`]: the
//! twelve COCO numbers, AP per class, precision–recall curves, and the usual printed table. It reproduces `COCOeval` of pycocotools
//! 2.0.11 for `iouType = "bbox"` with its default parameters, to the last bit on x86-64.
//!
//! This crate does no I/O, starts no threads and has no dependencies.
//!
//! ```
//! use effdet_metrics::{Dataset, DetectionRow, EvalOptions, GroundTruth, evaluate};
//!
//! let ground_truth = [GroundTruth {
//!     id: 1,
//!     image_id: 7,
//!     category_id: 3,
//!     bbox_xywh_px: [10.0, 10.0, 40.0, 50.0],
//!     area: 2000.0,
//!     iscrowd: false,
//!     ignore: false,
//! }];
//! let detections = [DetectionRow {
//!     image_id: 7,
//!     category_id: 3,
//!     bbox_xywh_px: [10.0, 10.0, 40.0, 45.0],
//!     score: 0.9,
//! }];
//! let dataset = Dataset { image_ids: &[7], category_ids: &[3], ground_truth: &ground_truth };
//! let summary = evaluate(&dataset, &detections, &EvalOptions::default())?;
//! // IoU = 0.9: a hit at the nine thresholds 0.50..=0.90 and a miss at 0.95.
//! assert!((summary.ap() - 0.9).abs() < 1e-12);
//! # Ok::<(), effdet_metrics::MetricsError>(())
//! ```
#![forbid(unsafe_code)]

mod coco;
mod error;
mod matching;
mod summary;

pub use coco::{Dataset, DetectionRow, EvalOptions, GroundTruth, ImageSet, evaluate};
pub use error::{MetricsError, Warning};
pub use summary::{
    AreaRange, ClassSummary, CocoSummary, MAX_DETECTIONS, METRIC_NAMES, NUM_IOU_THRESHOLDS,
    NUM_RECALL_THRESHOLDS, iou_thresholds, recall_thresholds,
};
