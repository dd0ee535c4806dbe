//! One file of labels.

use std::path::Path;

use super::malformed;
use crate::error::Result;

/// Labels of one image; more are a mistake.
const MAX_LABELS: usize = 1_000_000;

/// One line: a class and a box divided by the size of the image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Label {
    /// Line, counted from 1.
    pub line: usize,
    /// Class, counted from 0.
    pub class: usize,
    /// Centre x, centre y, width, height.
    pub box_cxcywh_norm: [f64; 4],
}

impl Label {
    /// `[x, y, width, height]` in pixels of an image of this size.
    ///
    /// A coordinate within 1e-9 of a millionth of a pixel is that millionth, so that what conversions divided comes back.
    pub fn box_xywh_px(&self, width: u32, height: u32) -> [f64; 4] {
        let [cx, cy, w, h] = self.box_cxcywh_norm;
        let (width, height) = (f64::from(width), f64::from(height));
        [
            (cx - w / 2.0) * width,
            (cy - h / 2.0) * height,
            w * width,
            h * height,
        ]
        .map(|v| {
            let millionth = (v * 1e6).round() / 1e6;
            if (v - millionth).abs() < 1e-9 {
                millionth
            } else {
                v
            }
        })
    }
}

/// Reads the labels of one image from bytes.
///
/// # Errors
/// [`DataError::Malformed`](crate::error::DataError::Malformed) with file and line; never panics on any input.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<Vec<Label>> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse_text(file, text),
        Err(_) => Err(malformed(file, "is no UTF-8 text: save it as such".into())),
    }
}

pub(super) fn parse_text(file: &Path, text: &str) -> Result<Vec<Label>> {
    let mut labels = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let bad = |what: String| malformed(file, format!("line {}: {what}", index + 1));
        let mut fields = line.split_ascii_whitespace();
        let Some(class) = fields.next() else {
            continue;
        };
        let class_number = class.parse::<f64>().ok();
        let class = class_number
            .filter(|class| class.fract() == 0.0 && (0.0..=1e6).contains(class))
            .ok_or_else(|| bad(format!("class {class:?} is no whole number from 0 on")))?;
        let numbers: Vec<f64> = fields
            .map(|field| {
                let number = field.parse::<f64>().ok().filter(|number| number.is_finite());
                number.ok_or_else(|| bad(format!("{field:?} is no finite number")))
            })
            .collect::<Result<_>>()?;
        let box_cxcywh_norm = match numbers.as_slice() {
            &[cx, cy, w, h] => [cx, cy, w, h],
            points if points.len() >= 6 && points.len() % 2 == 0 => bounding_box(points),
            other => {
                return Err(bad(format!(
                    "{} numbers behind the class; a box has 4 (centre x, centre y, width, height), a polygon 6 or more, \
                     in pairs. Detections with a score are no labels",
                    other.len()
                )));
            }
        };
        if labels.len() == MAX_LABELS {
            return Err(bad(format!("more than {MAX_LABELS} labels")));
        }
        labels.push(Label {
            line: index + 1,
            class: class as usize,
            box_cxcywh_norm,
        });
    }
    Ok(labels)
}

/// Of points x, y, x, y, …
fn bounding_box(points: &[f64]) -> [f64; 4] {
    let range = |offset: usize| {
        let values = points[offset..].iter().step_by(2);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &v| {
            (low.min(v), high.max(v))
        })
    };
    let ((left, right), (top, bottom)) = (range(0), range(1));
    [
        (left + right) / 2.0,
        (top + bottom) / 2.0,
        right - left,
        bottom - top,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Vec<Label>> {
        parse(Path::new("a.txt"), text.as_bytes())
    }

    #[test]
    fn boxes_and_polygons_are_read_and_blank_lines_are_none() {
        let labels = read("0 0.5 0.5 0.25 0.5\n\n 3.0\t0.1 0.2  0.3 0.2 0.3 0.6 0.1 0.6 \n").unwrap();
        assert_eq!((labels[0].class, labels[0].line), (0, 1));
        assert_eq!(labels[0].box_xywh_px(80, 40), [30.0, 10.0, 20.0, 20.0]);
        assert_eq!((labels[1].class, labels[1].line), (3, 3));
        assert_eq!(labels[1].box_xywh_px(100, 100), [10.0, 20.0, 20.0, 40.0]);
    }

    #[test]
    fn lines_that_make_no_sense_are_named() {
        for (text, expected) in [
            ("0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1", "line 2: 3 numbers"),
            ("0 0.5 0.5 0.1 0.1 0.9", "line 1: 5 numbers"),
            ("0 0.5 0.5 0.1 x", "line 1: \"x\""),
            ("0 0.5 nan 0.1 0.1", "line 1: \"nan\""),
            ("-1 0.5 0.5 0.1 0.1", "line 1: class \"-1\""),
            ("0.5 0.5 0.5 0.1 0.1", "line 1: class \"0.5\""),
            ("cat 0.5 0.5 0.1 0.1", "line 1: class \"cat\""),
            ("99999999999 0.5 0.5 0.1 0.1", "line 1: class"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("a.txt"), "{error}");
        }
        assert!(parse(Path::new("a.txt"), &[0xff, 0xfe]).is_err());
    }

    proptest! {
        #[test]
        fn boxes_of_hundredths_survive_the_division(
            (width, height) in (1u32..9000, 1u32..9000), corners in [0.0f64..1.0, 0.0..1.0, 0.0..1.0, 0.0..1.0],
        ) {
            let round = |v: f64, side: u32| (v * f64::from(side) * 100.0).round() / 100.0;
            let (x, w) = (round(corners[0], width), round(corners[1], width));
            let (y, h) = (round(corners[2], height), round(corners[3], height));
            let line = super::super::write::line(0, [x, y, w, h], width, height);
            prop_assert_eq!(read(&line).unwrap()[0].box_xywh_px(width, height), [x, y, w, h]);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(Path::new("a.txt"), &bytes);
        }
    }
}
