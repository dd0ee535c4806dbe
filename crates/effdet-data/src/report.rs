//! What loading a data set found: objects changed or left out, and samples that cannot be used.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::error::{DataError, Result};

/// How a data set is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// What to do about an object or image that cannot be used.
    pub faults: Faults,
    /// Refuse images whose files are missing or reached through a link that leaves the data folder.
    pub check_files: bool,
    /// Follow links out of the data folder.
    pub follow_links: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            faults: Faults::Refuse,
            check_files: true,
            follow_links: false,
        }
    }
}

/// What to do about an object or image that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Stop with an error that names it.
    Refuse,
    /// Leave it out and list it in [`LoadReport::faults`].
    Collect,
}

/// What kind of thing a [`Finding`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FindingKind {
    /// A box cut to its image.
    Clipped,
    /// A box without area.
    NoArea,
    /// A box outside its image.
    Outside,
    /// A crowd region that a format cannot hold.
    Crowd,
    /// An annotation of an image that does not exist.
    UnknownImage,
    /// An object of a category that does not exist.
    UnknownCategory,
    /// An object without a category.
    NoCategory,
    /// An annotation without a box.
    NoBox,
    /// A box or area that is no finite number.
    NotFinite,
    /// An image id that occurs twice.
    DuplicateImage,
    /// An annotation id that occurs twice.
    DuplicateAnnotation,
    /// A name that leaves the data folder.
    Escape,
    /// An image file that is not there.
    MissingFile,
    /// An annotation file or line that makes no sense.
    Malformed,
    /// A record with a wrong checksum or features that make no sense.
    DamagedRecord,
    /// An image that cannot be read or decoded.
    Undecodable,
    /// An image of another size than annotated.
    SizeDiffers,
    /// Labels changed after a conversion.
    Edited,
}

/// One remark about a record.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub kind: FindingKind,
    /// File.
    pub file: String,
    /// Record in it: annotation id, line or index.
    pub record: i64,
    /// What about it.
    pub what: String,
    /// The box as it was written: x, y, width, height in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub box_xywh_px: Option<[f64; 4]>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, record {}: {}", self.file, self.record, self.what)
    }
}

/// What loading had to change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadReport {
    /// Boxes cut to their image.
    pub clipped: Vec<Finding>,
    /// Objects left out because no area of them is inside the image.
    pub dropped: Vec<Finding>,
    /// Damaged records left out.
    pub skipped: Vec<Finding>,
    /// Objects and images left out because they cannot be used; only with [`Faults::Collect`].
    pub faults: Vec<Finding>,
    /// Remarks that change nothing.
    pub notes: Vec<Finding>,
    /// Objects by categories that do not exist; ids or names.
    pub unknown_categories: BTreeMap<String, usize>,
    /// How the boxes lie, as they were written.
    pub census: BoxCensus,
}

impl LoadReport {
    /// Adds what `other` found behind what is here.
    pub fn append(&mut self, other: Self) {
        self.clipped.extend(other.clipped);
        self.dropped.extend(other.dropped);
        self.skipped.extend(other.skipped);
        self.faults.extend(other.faults);
        self.notes.extend(other.notes);
        for (category, count) in other.unknown_categories {
            *self.unknown_categories.entry(category).or_default() += count;
        }
        self.census.add(&other.census);
    }

    /// Whether nothing was changed or left out.
    pub fn is_clean(&self) -> bool {
        [&self.clipped, &self.dropped, &self.skipped, &self.faults]
            .iter()
            .all(|findings| findings.is_empty())
    }

    /// Stops with `error` or lists it, as `faults` says.
    pub(crate) fn fault(
        &mut self,
        faults: Faults,
        kind: FindingKind,
        file: impl Into<String>,
        record: i64,
        error: DataError,
    ) -> Result<()> {
        match faults {
            Faults::Refuse => Err(error),
            Faults::Collect => {
                self.faults.push(Finding {
                    kind,
                    file: file.into(),
                    record,
                    what: error.to_string(),
                    box_xywh_px: None,
                });
                Ok(())
            }
        }
    }
}

/// Which readings of the four numbers of a box put it inside its image; tells wrong conventions from stray boxes.
///
/// Boxes of images without a known size are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BoxCensus {
    /// Boxes counted.
    pub boxes: usize,
    /// Inside as written, with a pixel to spare.
    pub fit: usize,
    /// Inside when the last two numbers are the far corner instead of the size.
    pub fit_as_corners: usize,
    /// Inside when the far corner is the size.
    pub fit_as_size: usize,
    /// Inside when x and y change places.
    pub fit_transposed: usize,
    /// Inside when the point is the centre instead of the near corner.
    pub fit_as_centre: usize,
    /// Inside when what was taken for the centre is the near corner.
    pub fit_as_corner: usize,
    /// All four numbers at most 1: divided by the image's size.
    pub below_one: usize,
    /// Far past the image: multiplied by its size once too often.
    pub far_outside: usize,
}

impl BoxCensus {
    /// Counts a box `[x, y, width, height]` of an image.
    pub fn count(&mut self, [x, y, w, h]: [f64; 4], (width, height): (u32, u32)) {
        if width == 0 || height == 0 {
            return;
        }
        let (width, height) = (f64::from(width), f64::from(height));
        let inside = |left: f64, top: f64, right: f64, bottom: f64| {
            let spare = 1.0;
            right > left
                && bottom > top
                && left >= -spare
                && top >= -spare
                && right <= width + spare
                && bottom <= height + spare
        };
        let (right, bottom) = (x + w, y + h);
        self.boxes += 1;
        self.fit += usize::from(inside(x, y, right, bottom));
        self.fit_as_corners += usize::from(inside(x, y, w, h));
        self.fit_as_size += usize::from(inside(x, y, x + right, y + bottom));
        self.fit_transposed += usize::from(inside(y, x, bottom, right));
        self.fit_as_centre += usize::from(inside(x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0));
        self.fit_as_corner += usize::from(inside(x + w / 2.0, y + h / 2.0, x + 1.5 * w, y + 1.5 * h));
        self.below_one += usize::from([x, y, w, h].iter().all(|v| v.abs() <= 1.0));
        self.far_outside += usize::from(right > 4.0 * width && bottom > 4.0 * height);
    }

    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Self) {
        self.boxes += other.boxes;
        self.fit += other.fit;
        self.fit_as_corners += other.fit_as_corners;
        self.fit_as_size += other.fit_as_size;
        self.fit_transposed += other.fit_transposed;
        self.fit_as_centre += other.fit_as_centre;
        self.fit_as_corner += other.fit_as_corner;
        self.below_one += other.below_one;
        self.far_outside += other.far_outside;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn census(boxes: &[[f64; 4]]) -> BoxCensus {
        let mut census = BoxCensus::default();
        boxes.iter().for_each(|&b| census.count(b, (100, 50)));
        census
    }

    #[test]
    fn a_census_tells_which_reading_of_a_box_fits() {
        let right = census(&[[10.0, 10.0, 20.0, 20.0]]);
        assert_eq!((right.boxes, right.fit, right.fit_transposed), (1, 1, 1));
        // xmin, ymin, xmax, ymax where a size is expected.
        let corners = census(&[[60.0, 30.0, 90.0, 45.0]]);
        assert_eq!((corners.fit, corners.fit_as_corners), (0, 1));
        // x and y changed places: x beyond the height is fine, y beyond it is not.
        let transposed = census(&[[10.0, 60.0, 10.0, 30.0]]);
        assert_eq!((transposed.fit, transposed.fit_transposed), (0, 1));
        // The size where the far corner is expected, so that the size here is negative.
        let size = census(&[[60.0, 30.0, 20.0 - 60.0, 15.0 - 30.0]]);
        assert_eq!((size.fit, size.fit_as_size), (0, 1));
        // The centre where a corner is expected.
        let centre = census(&[[90.0, 40.0, 20.0, 20.0]]);
        assert_eq!((centre.fit, centre.fit_as_centre), (0, 1));
        // A corner where the centre is expected, so that half the size was taken off.
        let corner = census(&[[2.0 - 10.0, 2.0 - 10.0, 20.0, 20.0]]);
        assert_eq!((corner.fit, corner.fit_as_corner), (0, 1));
        assert_eq!(census(&[[0.1, 0.2, 0.3, 0.4]]).below_one, 1);
        assert_eq!(census(&[[9000.0, 900.0, 900.0, 900.0]]).far_outside, 1);
        let mut unknown = BoxCensus::default();
        unknown.count([1.0; 4], (0, 0));
        assert_eq!(unknown, BoxCensus::default());
    }

    #[test]
    fn faults_stop_or_are_listed() {
        let error = || DataError::Caller { what: "no".into() };
        let mut report = LoadReport::default();
        let mut fault = |faults| report.fault(faults, FindingKind::Malformed, "a", 3, error());
        assert!(fault(Faults::Refuse).is_err());
        assert!(fault(Faults::Collect).is_ok());
        assert_eq!(report.faults.len(), 1);
        assert_eq!(report.faults[0].to_string(), "a, record 3: no");
        assert!(!report.is_clean());
    }
}
