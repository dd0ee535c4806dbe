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
    if region.x.end > width
        || region.y.end > height
        || decoder.decode(bytes, region, Reduction::NONE).is_none()
    {
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

/// The whole image in reduced size.
fn reduced(decoder: &mut JpegDecoder, bytes: &[u8], reduction: Reduction) -> RgbImage {
    let (width, height) = decoder.open(bytes).unwrap();
    let (width, height) = (reduction.of(width), reduction.of(height));
    let region = Region {
        x: 0..width,
        y: 0..height,
    };
    decoder.decode(bytes, &region, reduction).expect("it is taken");
    RgbImage::from_raw(width as u32, height as u32, pixels(decoder, &region)).unwrap()
}

/// Mean and largest difference between an image in reduced size and the means of the whole one's pixels, incomplete ones left out.
fn difference_from_means(reduced: &RgbImage, whole: &RgbImage, reduction: Reduction) -> (f64, f64) {
    let factor = reduction.factor() as u32;
    let (mut sum, mut largest, mut count) = (0.0, 0.0f64, 0);
    for y in 0..whole.height() / factor {
        for x in 0..whole.width() / factor {
            for colour in 0..3 {
                let members = (0..factor * factor).map(|i| {
                    let (x, y) = (x * factor + i % factor, y * factor + i / factor);
                    f64::from(whole.get_pixel(x, y).0[colour])
                });
                let mean = members.sum::<f64>() / f64::from(factor * factor);
                let difference = (f64::from(reduced.get_pixel(x, y).0[colour]) - mean).abs();
                sum += difference;
                largest = largest.max(difference);
                count += 1;
            }
        }
    }
    (sum / f64::from(count.max(1)), largest)
}

/// Means of `factor` × `factor` samples of a wholly decoded plane; and, by sample, whether a clamped one has part in it.
fn means(plane: &Plane, factor: usize) -> (Plane, Vec<bool>) {
    let (width, height) = (plane.stride() / factor, plane.rows.len() * plane.side / factor);
    let members = |at: usize| {
        let (x, y) = (at % width * factor, at / width * factor);
        (y..y + factor).flat_map(move |y| plane.row(y)[x..x + factor].iter().copied())
    };
    let area = factor * factor;
    let mean = |at: usize| ((members(at).map(usize::from).sum::<usize>() + area / 2) / area) as u8;
    let clamped = |at: usize| members(at).any(|sample| sample == 0 || sample == 255);
    let mut out = Plane::default();
    out.hold(1, (width, height), 0..width, 0..height);
    out.samples = (0..width * height).map(mean).collect();
    (out, (0..width * height).map(clamped).collect())
}

/// Luma and chroma may each be a level off, and the largest factor of the conversion is 1.8.
#[test]
fn reduced_size_has_the_means_of_the_samples_that_are_stored() {
    let mut decoder = JpegDecoder::default();
    let mut total = 0;
    for (name, bytes) in &FIXTURES[..TAKEN] {
        for reduction in &Reduction::ALL[1..] {
            let got = reduced(&mut decoder, bytes, *reduction);
            let (width, height) = decoder.open(bytes).unwrap();
            let whole = Region {
                x: 0..width,
                y: 0..height,
            };
            decoder.decode(bytes, &whole, Reduction::NONE).unwrap();
            let sampling = decoder.sampling.unwrap();
            let factor = reduction.factor();
            let chroma_factor = if sampling == Sampling::Half {
                factor / 2
            } else {
                factor
            };
            let (luma, luma_clamped) = means(&decoder.planes[0], factor);
            let count = got.width() as usize;
            let mut compared = 0;
            for y in 0..got.height() as usize {
                let mut rows = [vec![128; count + 1], vec![128; count + 1]];
                let mut clamped: Vec<bool> = luma_clamped[y * luma.stride()..][..count].to_vec();
                for (plane, row) in decoder.planes[1..].iter().zip(&mut rows) {
                    match sampling {
                        Sampling::Grey => {}
                        Sampling::HalfColumns => {
                            let (plane, limits) = means(plane, chroma_factor);
                            colour::upsample_row(&plane, y, false, &(0..count), &mut Vec::new(), row);
                            let near = |x: usize| (x / 2).saturating_sub(1)..(x / 2 + 2).min(plane.stride());
                            let limits = &limits[y * plane.stride()..];
                            (0..count).for_each(|x| clamped[x] |= limits[near(x)].contains(&true));
                            // What the filter sees behind the image is held in one of the two alone.
                            clamped[count.saturating_sub(2)..].fill(true);
                        }
                        Sampling::Full | Sampling::Half => {
                            let (plane, limits) = means(plane, chroma_factor);
                            row[..count].copy_from_slice(&plane.row(y)[..count]);
                            (0..count).for_each(|x| clamped[x] |= limits[y * plane.stride() + x]);
                        }
                    }
                }
                let mut want = [vec![0; count], vec![0; count], vec![0; count]];
                colour::to_rgb(
                    &luma.row(y)[..count],
                    &rows[0],
                    &rows[1],
                    want.each_mut().map(Vec::as_mut_slice),
                );
                for x in (0..count).filter(|&x| !clamped[x]) {
                    let got = got.get_pixel(x as u32, y as u32).0;
                    let difference = |colour: usize| got[colour].abs_diff(want[colour][x]);
                    let largest = (0..3).map(difference).max().unwrap();
                    let allowed = if sampling == Sampling::Grey { 1 } else { 3 };
                    assert!(largest <= allowed, "{name} by {factor}: {x}, {y}: {largest}");
                    compared += 1;
                }
            }
            println!(
                "{name} by {factor}: {compared} of {} compared",
                count * got.height() as usize
            );
            total += compared;
        }
    }
    assert!(total > 5000, "{total} pixels compared");
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

/// Where sums wrap, two decoders of the same arithmetic need not agree.
#[test]
fn coefficients_that_no_pixels_have_are_left_to_the_full_decoder() {
    let mut decoder = JpegDecoder::default();
    let mut bytes = FIXTURES[7].1.to_vec();
    assert!(check(&mut decoder, &bytes, None));
    let table = bytes.windows(2).position(|pair| pair == [0xff, 0xdb]).unwrap();
    bytes[table + 5..][..64].fill(0xff);
    assert!(!check(&mut decoder, &bytes, None));
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
    fn a_rectangle_in_reduced_size_is_the_crop_of_the_whole_reduced_image(
        index in 0..TAKEN, strength in 1usize..4, x in (0.0f64..1.0, 0.0f64..1.0), y in (0.0f64..1.0, 0.0f64..1.0),
    ) {
        let mut decoder = JpegDecoder::default();
        let (bytes, reduction) = (FIXTURES[index].1, Reduction::ALL[strength]);
        let whole = reduced(&mut decoder, bytes, reduction);
        let range = |(a, b): (f64, f64), size: u32| {
            let [a, b] = [a, b].map(|v| (v * f64::from(size)) as usize);
            a.min(b)..a.max(b) + 1
        };
        let region = Region { x: range(x, whole.width()), y: range(y, whole.height()) };
        decoder.open(bytes).unwrap();
        decoder.decode(bytes, &region, reduction).unwrap();
        prop_assert!(pixels(&mut decoder, &region) == crop(&whole, &region));
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

/// Images of COCO val2017; none where the data set is absent.
fn photographs() -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/coco/val2017");
    let Ok(files) = std::fs::read_dir(folder) else {
        println!("skipped: {folder} is absent");
        return Vec::new();
    };
    let mut paths: Vec<_> = files.flatten().map(|file| file.path()).collect();
    paths.sort();
    let read = |path: std::path::PathBuf| {
        let bytes = std::fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().take(24).map(read).collect()
}

#[test]
fn photographs_in_reduced_size_stay_within_a_level_of_the_means_of_their_pixels_on_average() {
    let mut decoder = JpegDecoder::default();
    let mut total = [(0.0, 0.0f64); 3];
    for (path, bytes) in photographs() {
        let whole = decode_rgb(&bytes, &DecodeOptions::default()).unwrap();
        for (reduction, total) in Reduction::ALL[1..].iter().zip(&mut total) {
            let got = reduced(&mut decoder, &bytes, *reduction);
            let (mean, largest) = difference_from_means(&got, &whole, *reduction);
            assert!(
                mean <= 1.0,
                "{} by {}: {mean}",
                path.display(),
                reduction.factor()
            );
            *total = (total.0 + mean / 24.0, total.1.max(largest));
        }
    }
    println!("mean and largest by 2, 4, 8: {total:.2?}");
}

#[test]
fn photographs_are_those_of_the_full_decoder() {
    let mut decoder = JpegDecoder::default();
    for (path, bytes) in photographs() {
        assert!(check(&mut decoder, &bytes, None), "{}", path.display());
        let region = Region {
            x: 17..134,
            y: 51..166,
        };
        assert!(check(&mut decoder, &bytes, Some(&region)), "{}", path.display());
    }
}
