//! Faults of the input, and things worth telling the user that are no faults.

use std::fmt;

/// Why an evaluation was refused. All variants are faults of the data.
#[derive(Debug, Clone, PartialEq)]
pub enum MetricsError {
    /// A detection names an image that is not in the data set; it was made on other images.
    UnknownImage {
        /// Position of the detection in the given slice.
        index: usize,
        /// The id that is not in `Dataset::image_ids`.
        image_id: i64,
    },
    /// A detection has a NaN or infinite score or coordinate.
    DetectionNotFinite {
        /// Position of the detection in the given slice.
        index: usize,
        /// Image of the detection.
        image_id: i64,
        /// The field, `score` or `bbox_xywh_px`.
        field: &'static str,
        /// Its first value that is not finite.
        value: f64,
    },
    /// An annotation has a NaN or infinite area or coordinate.
    GroundTruthNotFinite {
        /// Position of the annotation in the given slice.
        index: usize,
        /// Id of the annotation.
        id: i64,
        /// The field, `area` or `bbox_xywh_px`.
        field: &'static str,
        /// Its first value that is not finite.
        value: f64,
    },
    /// More rows than can be numbered with 32 bits.
    TooManyRows {
        /// What there is too much of: `detections`, `annotations`, `images` or `categories`.
        what: &'static str,
        /// How many were given.
        count: usize,
    },
}

impl fmt::Display for MetricsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownImage { index, image_id } => write!(
                f,
                "detection {index} is on image {image_id}, which is not in the data set; \
                 evaluate against the annotations of the images that were detected on"
            ),
            Self::DetectionNotFinite {
                index,
                image_id,
                field,
                value,
            } => write!(
                f,
                "detection {index} on image {image_id} has {field} = {value}; \
                 the network's outputs are not finite, check its weights"
            ),
            Self::GroundTruthNotFinite {
                index,
                id,
                field,
                value,
            } => write!(
                f,
                "annotation {index} (id {id}) has {field} = {value}; correct the annotation file"
            ),
            Self::TooManyRows { what, count } => {
                write!(
                    f,
                    "{count} {what} exceed the limit of {} per evaluation",
                    u32::MAX
                )
            }
        }
    }
}

impl std::error::Error for MetricsError {}

/// Input that is legal and evaluated as pycocotools does, but probably not what its author meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warning {
    /// Annotations have the id 0, which pycocotools takes for "unmatched": a detection of such an object counts as a false positive.
    AnnotationIdZero {
        /// How many annotations have it.
        count: usize,
    },
    /// Annotations on images or of categories that are not evaluated; they were left out.
    GroundTruthOutside {
        /// How many were left out.
        count: usize,
    },
    /// Detections of categories that are not in the data set; they were left out.
    DetectionsOfUnknownCategory {
        /// How many were left out.
        count: usize,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnnotationIdZero { count } => write!(
                f,
                "{count} annotation(s) have the id 0, which COCO evaluation never counts as detected; number annotations from 1"
            ),
            Self::GroundTruthOutside { count } => write!(
                f,
                "{count} annotation(s) belong to images or categories that are not evaluated and were left out"
            ),
            Self::DetectionsOfUnknownCategory { count } => write!(
                f,
                "{count} detection(s) have a category that the data set does not have and were left out"
            ),
        }
    }
}
