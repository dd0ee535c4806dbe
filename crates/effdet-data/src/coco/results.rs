//! Results JSON: detections as pycocotools reads them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    read_json,
    write::{require_finite, write_json},
};
use crate::error::Result;

/// One row of a results JSON.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// Image.
    pub image_id: i64,
    /// Category.
    pub category_id: i64,
    /// `[x, y, width, height]` in pixels.
    pub bbox: [f64; 4],
    /// Score.
    pub score: f64,
}

/// Reads a results JSON.
///
/// # Errors
/// [`DataError`](crate::error::DataError) naming the file.
pub fn read_results(json: &Path) -> Result<Vec<ResultRow>> {
    read_json(json)
}

/// Writes a results JSON; every number reads back exactly.
///
/// # Errors
/// [`DataError::Caller`](crate::error::DataError::Caller) for a box or a score that is not finite;
/// [`DataError::Io`](crate::error::DataError::Io).
pub fn write_results(json: &Path, rows: &[ResultRow]) -> Result<()> {
    for (index, row) in rows.iter().enumerate() {
        require_finite(&row.bbox, row.score, || {
            format!("results row {index} (image {})", row.image_id)
        })?;
    }
    write_json(json, &rows)
}
