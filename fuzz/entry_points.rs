//! Where bytes from outside enter `effdet-data`. Each of these takes any bytes and must come back: without a panic, and without
//! taking memory that the bytes merely ask for.

use std::ops::Range;
use std::path::Path;

use effdet_data::decode::{DecodeOptions, decode_rgb, probe};
use effdet_data::header;
use effdet_data::jpeg::{JpegDecoder, Reduction, Region};
use effdet_data::report::{Faults, LoadOptions};
use effdet_data::tfrecord::framing::RecordReader;
use effdet_data::{coco, tfrecord, voc, yolo};

/// Framing of a record file.
pub fn record_framing(bytes: &[u8]) {
    let mut reader = RecordReader::new(bytes, Path::new("a.tfrecord"), bytes.len() as u64, 1 << 20);
    let mut faults = 0;
    loop {
        match reader.next_record() {
            Ok(None) => break,
            Ok(Some(record)) => assert!(record.payload.len() <= bytes.len()),
            // Every record takes sixteen bytes, so that faults cannot go on for ever.
            Err(_) => faults += 1,
        }
        assert!(faults <= bytes.len() / 16 + 2);
    }
}

/// One serialised `tf.train.Example`.
pub fn tf_example(bytes: &[u8]) {
    if let Ok(example) = tfrecord::parse_record(Path::new("a.tfrecord"), bytes) {
        let finite = |v: &f64| v.is_finite();
        assert!(
            example
                .objects
                .iter()
                .all(|object| object.box_xywh_px.iter().all(finite))
        );
    }
}

/// An instances file.
pub fn coco_json(bytes: &[u8]) {
    for faults in [Faults::Refuse, Faults::Collect] {
        let options = LoadOptions {
            faults,
            check_files: false,
            follow_links: false,
        };
        let loaded = coco::parse(bytes, Path::new("a.json"), Path::new("images"), &options);
        if let Ok((dataset, _)) = loaded {
            for example in &dataset.examples {
                for object in &example.objects {
                    let [_, _, w, h] = object.box_xywh_px;
                    assert!(w > 0.0 && h > 0.0 && w.is_finite() && h.is_finite());
                    assert!(
                        dataset
                            .categories
                            .iter()
                            .any(|category| category.id == object.category)
                    );
                }
            }
        }
    }
}

/// A VOC annotation.
pub fn voc_xml(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = voc::parse(Path::new("a.xml"), text);
    }
}

/// A file of YOLO labels.
pub fn yolo_labels(bytes: &[u8]) {
    if let Ok(labels) = yolo::parse_labels(Path::new("a.txt"), bytes) {
        for label in labels {
            assert!(label.box_cxcywh_norm.iter().all(|v| !v.is_nan()));
        }
    }
}

/// The way of an encoded image.
pub fn image(bytes: &[u8]) {
    let options = DecodeOptions {
        max_pixels: 1 << 18,
        max_scans: 20,
        ..DecodeOptions::default()
    };
    let _ = (header::colour(bytes), header::orientation(bytes));
    let probed = probe(bytes);
    for (apply_orientation, allow_truncated) in [(false, false), (true, true)] {
        let options = DecodeOptions {
            apply_orientation,
            allow_truncated,
            ..options
        };
        if let Ok(image) = decode_rgb(bytes, &options) {
            assert!(u64::from(image.width()) * u64::from(image.height()) <= options.max_pixels);
            let probed = probed.as_ref().expect("what decodes has a header");
            let stored = (probed.width, probed.height);
            assert!(apply_orientation || image.dimensions() == stored);
        }
    }
    jpeg_region(bytes, &options);
}

/// What the decoder of regions takes, the full one takes with the same pixels.
fn jpeg_region(bytes: &[u8], options: &DecodeOptions) {
    let mut decoder = JpegDecoder::default();
    let Some((width, height)) = decoder.open(bytes) else {
        return;
    };
    if (width * height) as u64 > options.max_pixels {
        return;
    }
    let region = Region {
        x: width / 3..width,
        y: height / 4..height - height / 3,
    };
    for reduction in &Reduction::ALL[1..] {
        let reduced = |pixels: &Range<usize>| pixels.start / reduction.factor()..reduction.of(pixels.end);
        let region = Region {
            x: reduced(&region.x),
            y: reduced(&region.y),
        };
        if decoder.decode(bytes, &region, *reduction).is_some() {
            let mut colours = [(); 3].map(|()| vec![0; region.x.len()]);
            for y in region.y {
                decoder.row(y, &region.x, colours.each_mut().map(Vec::as_mut_slice));
            }
        }
    }
    if decoder.decode(bytes, &region, Reduction::NONE).is_none() {
        return;
    }
    let whole = decode_rgb(bytes, options).expect("what is taken in part is taken whole");
    assert_eq!(whole.dimensions(), (width as u32, height as u32));
    let mut colours = [(); 3].map(|()| vec![0; region.x.len()]);
    for y in region.y.clone() {
        decoder.row(y, &region.x, colours.each_mut().map(Vec::as_mut_slice));
        for (index, x) in region.x.clone().enumerate() {
            let pixel = [0, 1, 2].map(|colour| colours[colour][index]);
            assert_eq!(whole.get_pixel(x as u32, y as u32).0, pixel, "{x}, {y}");
        }
    }
}
