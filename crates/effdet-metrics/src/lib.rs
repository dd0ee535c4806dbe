//! COCO detection metrics, equal to pycocotools in full precision.
#![forbid(unsafe_code)]
