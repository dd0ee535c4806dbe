//! Comparison with the full decoder.

use image::RgbImage;
use proptest::prelude::*;

use super::*;
use crate::decode::{DecodeOptions, decode_rgb};

/// The decoded rectangle by pixels.
fn pixels(decoder: &mut JpegDecoder, region: &Region) -> Vec<u8> {
    let count = region.x.len();
    let mut planar = vec![0; 3 * count];
    let mut out = Vec::new();
    for y in region.y.clone() {
        let (r, rest) = planar.split_at_mut(count);
        let (g, b) = rest.split_at_mut(count);
        decoder.row(y, &region.x, [r, g, b]);
        (0..count).for_each(|x| out.extend([planar[x], planar[count + x], planar[2 * count + x]]));
    }
    out
}

fn crop(image: &RgbImage, region: &Region) -> Vec<u8> {
    let mut out = Vec::new();
    for y in region.y.clone() {
        let row = &image.as_raw()[3 * image.width() as usize * y..];
        out.extend(&row[3 * region.x.start..3 * region.x.end]);
    }
    out
}

macro_rules! fixtures {
    ($($name:literal)*) => {
        [$(($name, include_bytes!(concat!("fixtures/", $name, ".jpg")).as_slice())),*]
    };
}

/// Written by `fixtures/make.py`; all but the last are taken.
const FIXTURES: [(&str, &[u8]); 11] = fixtures!(
    "420" "420_restart" "420_tiny" "420_optimized" "422" "422_narrow" "422_restart" "444" "444_harsh" "grey" "progressive"
);
const TAKEN: usize = 10;

/// Compares a rectangle with the crop of the full decoder; gives whether it was decoded here.
fn check(decoder: &mut JpegDecoder, bytes: &[u8], region: Option<&Region>) -> bool {
    let Some((width, height)) = decoder.open(bytes) else {
        return false;
    };
    if width * height > 1 << 20 {
        return false;
    }
    let whole = Region {
        x: 0..width,
        y: 0..height,
    };
    let region = region.unwrap_or(&whole);
    if region.x.end > width || region.y.end > height || decoder.decode(bytes, region).is_none() {
        return false;
    }
    let full = decode_rgb(bytes, &DecodeOptions::default()).expect("what is taken here is taken there");
    assert_eq!(full.dimensions(), (width as u32, height as u32));
    assert!(
        pixels(decoder, region) == crop(&full, region),
        "{region:?} of {width}x{height}"
    );
    true
}

#[test]
fn whole_images_are_those_of_the_full_decoder() {
    let mut decoder = JpegDecoder::default();
    for (name, bytes) in &FIXTURES[..TAKEN] {
        assert!(check(&mut decoder, bytes, None), "{name}");
    }
    assert!(!check(&mut decoder, FIXTURES[TAKEN].1, None), "progressive");
}

#[test]
fn every_rectangle_of_a_small_image_is_the_crop_of_the_whole() {
    let mut decoder = JpegDecoder::default();
    let bytes = FIXTURES[2].1;
    let (width, height) = decoder.open(bytes).unwrap();
    for left in 0..width {
        for right in left + 1..=width {
            for top in 0..height {
                for bottom in top + 1..=height {
                    let region = Region {
                        x: left..right,
                        y: top..bottom,
                    };
                    assert!(check(&mut decoder, bytes, Some(&region)));
                }
            }
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_left_to_the_full_decoder() {
    let mut decoder = JpegDecoder::default();
    for (name, bytes) in FIXTURES {
        for len in 0..bytes.len() {
            assert!(
                !check(&mut decoder, &bytes[..len], None),
                "{name} cut to {len} bytes"
            );
        }
    }
}

/// Also when the fault lies behind the rectangle, where it is not seen.
#[test]
fn a_fault_in_any_byte_gives_the_pixels_of_the_full_decoder_or_none() {
    let mut decoder = JpegDecoder::default();
    let region = Region { x: 20..50, y: 9..21 };
    for (name, bytes) in FIXTURES {
        let mut damaged = bytes.to_vec();
        let mut taken = 0;
        for at in 0..bytes.len() {
            for value in [bytes[at] ^ 1, !bytes[at], 0xff] {
                damaged[at] = value;
                taken += usize::from(check(&mut decoder, &damaged, None));
                taken += usize::from(check(&mut decoder, &damaged, Some(&region)));
            }
            damaged[at] = bytes[at];
        }
        println!("{name}: {taken} taken of {}", 6 * bytes.len());
    }
}

proptest! {
    #[test]
    fn a_rectangle_is_the_crop_of_the_whole(
        index in 0..TAKEN, x in (0.0f64..1.0, 0.0f64..1.0), y in (0.0f64..1.0, 0.0f64..1.0),
    ) {
        let mut decoder = JpegDecoder::default();
        let bytes = FIXTURES[index].1;
        let (width, height) = decoder.open(bytes).unwrap();
        let range = |(a, b): (f64, f64), size: usize| {
            let [a, b] = [a, b].map(|v| (v * size as f64) as usize);
            a.min(b)..a.max(b) + 1
        };
        let region = Region { x: range(x, width), y: range(y, height) };
        prop_assert!(check(&mut decoder, bytes, Some(&region)));
    }

    #[test]
    fn several_faults_give_the_pixels_of_the_full_decoder_or_none(
        index in 0..FIXTURES.len(), faults in prop::collection::vec((0.0..1.0_f64, any::<u8>()), 1..6),
    ) {
        let mut bytes = FIXTURES[index].1.to_vec();
        let len = bytes.len() as f64;
        for (place, value) in faults {
            bytes[(place * len) as usize] = value;
        }
        let mut decoder = JpegDecoder::default();
        check(&mut decoder, &bytes, None);
        check(&mut decoder, &bytes, Some(&Region { x: 3..5, y: 1..3 }));
    }
}

#[test]
fn photographs_are_those_of_the_full_decoder() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/coco/val2017");
    let Ok(files) = std::fs::read_dir(folder) else {
        println!("skipped: {folder} is absent");
        return;
    };
    let mut decoder = JpegDecoder::default();
    for file in files.flatten().take(24) {
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(check(&mut decoder, &bytes, None), "{}", file.path().display());
        let region = Region {
            x: 17..134,
            y: 51..166,
        };
        assert!(
            check(&mut decoder, &bytes, Some(&region)),
            "{}",
            file.path().display()
        );
    }
}
