//! Source: `golden.json`, section `upstream_augment`.

use image::{Rgb, RgbImage};
use serde_json::Value;

use super::geometry::Movement;
use super::pixels;

const BOXES: [[f32; 4]; 3] = [
    [0.1, 0.2, 0.5, 0.6],
    [0.3, 0.7, 0.95, 1.0],
    [0.0, 0.0, 0.05, 0.04],
];

/// Image of `golden.md`: `((7y + 13x + 31c + 5·((x·y) mod 17)) mod 256)/2 + 40`, 37 rows and 53 columns.
fn base() -> RgbImage {
    RgbImage::from_fn(53, 37, |x, y| {
        Rgb(std::array::from_fn(|c| {
            (((7 * y + 13 * x + 31 * c as u32 + 5 * ((x * y) % 17)) % 256) / 2 + 40) as u8
        }))
    })
}

fn golden() -> Value {
    let text = include_str!("../../../../tests/golden/golden.json");
    serde_json::from_str::<Value>(text).unwrap()["upstream_augment"].clone()
}

/// What `golden.json` keeps of an image.
fn summary(image: &RgbImage) -> [Vec<u64>; 4] {
    let values = || image.as_raw().iter().map(|&v| u64::from(v));
    [
        vec![values().sum()],
        values().take(9).collect(),
        image.get_pixel(26, 18).0.map(u64::from).to_vec(),
        vec![values().zip(0u64..).map(|(v, i)| v * (i % 97)).sum()],
    ]
}

fn expected(entry: &Value) -> [Vec<u64>; 4] {
    ["sum", "first9", "mid3", "wsum"].map(|key| match &entry[key] {
        Value::Array(values) => values.iter().map(|v| v.as_u64().unwrap()).collect(),
        value => vec![value.as_u64().unwrap()],
    })
}

#[test]
fn operations_on_colours_equal_the_reference() {
    let golden = golden();
    let mut compared = 0;
    for (name, entry) in golden.as_object().unwrap() {
        let mut image = base();
        let argument = || name.rsplit('_').next().unwrap().parse::<f32>().unwrap();
        match name.split('_').next().unwrap() {
            "base" => {}
            "autocontrast" => pixels::autocontrast(&mut image),
            "equalize" => pixels::equalize(&mut image),
            "posterize" => pixels::posterize(&mut image, 3),
            "solarize" if name.contains("add") => pixels::solarize_add(&mut image, argument() as u8),
            "solarize" => pixels::solarize(&mut image, argument() as u32),
            "color" => pixels::color(&mut image, argument()),
            "contrast" => pixels::contrast(&mut image, argument()),
            "brightness" => pixels::brightness(&mut image, argument()),
            "sharpness" => pixels::sharpness(&mut image, argument()),
            _ => continue,
        }
        assert_eq!(summary(&image), expected(entry), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 18);
}

#[test]
fn movements_of_images_and_boxes_equal_the_reference() {
    let golden = golden();
    let mut compared = 0;
    for (name, entry) in golden.as_object().unwrap() {
        let Some((operation, argument)) = name.rsplit_once('_') else {
            continue;
        };
        let Ok(argument) = argument.parse::<f32>() else {
            continue;
        };
        let movement = match operation {
            "translate_x" => Movement::TranslateX(argument),
            "translate_y" => Movement::TranslateY(argument),
            "shear_x" => Movement::ShearX(argument),
            "shear_y" => Movement::ShearY(argument),
            "rotate" => Movement::Rotate(argument),
            _ => continue,
        };
        assert_eq!(
            summary(&movement.image(&base())),
            expected(&entry["img"]),
            "{name}"
        );
        let want: Vec<[f32; 4]> = serde_json::from_value(entry["boxes"].clone()).unwrap();
        assert_eq!(
            BOXES.map(|b| movement.bounding_box(b, 37, 53)).to_vec(),
            want,
            "{name}"
        );
        compared += 1;
    }
    assert_eq!(compared, 10);
}
