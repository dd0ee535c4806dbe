//! Annotated images: boxes with labels, in the reference's colours.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

/// One box to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Annotation {
    /// `ymin, xmin, ymax, xmax` in pixels of the image.
    pub box_yxyx_px: [f32; 4],
    /// Text above the box.
    pub label: String,
    /// Picks the colour: `STANDARD_COLORS[category mod 126]`.
    pub category: u32,
}

/// Draws boxes with labels in order, so later ones lie on top.
///
/// Boxes identical to an earlier one stack their labels upwards. The label goes above the box, below it where it would leave
/// the image.
pub fn draw(image: &mut RgbImage, annotations: &[Annotation], line_thickness: u32) {
    let height = text_height(image);
    let mut stacked: Vec<([f32; 4], u32)> = Vec::new();
    for annotation in annotations {
        let [top, left, bottom, right] = annotation.box_yxyx_px;
        if ![top, left, bottom, right].iter().all(|v| v.is_finite()) {
            continue;
        }
        let color = color_of(annotation.category);
        rectangle(image, annotation.box_yxyx_px, color, line_thickness);
        let level = match stacked
            .iter_mut()
            .find(|(other, _)| *other == annotation.box_yxyx_px)
        {
            Some((_, count)) => {
                *count += 1;
                *count
            }
            None => {
                stacked.push((annotation.box_yxyx_px, 0));
                0
            }
        };
        let line = label_line(height) as f32;
        let y = if top - line * (level as f32 + 1.0) >= 0.0 {
            top - line * (level as f32 + 1.0)
        } else {
            bottom + line * level as f32
        };
        label(
            image,
            left,
            y.min(image.height() as f32 - line),
            &annotation.label,
            color,
            height,
        );
    }
}

/// Colour of a category as the reference picks it.
pub fn color_of(category: u32) -> Rgb<u8> {
    let packed = STANDARD_COLORS[category as usize % STANDARD_COLORS.len()];
    Rgb([(packed >> 16) as u8, (packed >> 8) as u8, packed as u8])
}

fn text_height(image: &RgbImage) -> RasterHeight {
    match image.width().max(image.height()) {
        0..=799 => RasterHeight::Size16,
        800..=1199 => RasterHeight::Size20,
        1200..=1999 => RasterHeight::Size24,
        _ => RasterHeight::Size32,
    }
}

fn label_line(height: RasterHeight) -> u32 {
    height as u32 + 2
}

/// A closed outline of `thickness` pixels, centred on the box's edges and clipped to the image.
fn rectangle(image: &mut RgbImage, box_yxyx_px: [f32; 4], color: Rgb<u8>, thickness: u32) {
    let [top, left, bottom, right] = box_yxyx_px;
    let thickness = thickness.max(1) as f32;
    let (low, high) = ((thickness / 2.0).floor(), (thickness / 2.0).ceil());
    fill(image, top - low, left - low, top + high, right + high, color);
    fill(
        image,
        bottom - low,
        left - low,
        bottom + high,
        right + high,
        color,
    );
    fill(image, top - low, left - low, bottom + high, left + high, color);
    fill(image, top - low, right - low, bottom + high, right + high, color);
}

/// Fills rows `top..bottom`, columns `left..right`, clipped to the image.
fn fill(image: &mut RgbImage, top: f32, left: f32, bottom: f32, right: f32, color: Rgb<u8>) {
    let clip = |v: f32, end: u32| v.round().clamp(0.0, end as f32) as u32;
    let (width, height) = image.dimensions();
    for y in clip(top, height)..clip(bottom, height) {
        for x in clip(left, width)..clip(right, width) {
            image.put_pixel(x, y, color);
        }
    }
}

fn label(image: &mut RgbImage, left: f32, top: f32, text: &str, color: Rgb<u8>, height: RasterHeight) {
    let advance = get_raster_width(FontWeight::Bold, height) as f32;
    let width = advance * text.chars().count() as f32 + 4.0;
    let left = left.min(image.width() as f32 - width).max(0.0).round();
    let top = top.max(0.0).round();
    fill(
        image,
        top,
        left,
        top + label_line(height) as f32,
        left + width,
        color,
    );
    for (index, character) in text.chars().enumerate() {
        let raster = get_raster(character, FontWeight::Bold, height)
            .or_else(|| get_raster('?', FontWeight::Bold, height));
        let Some(raster) = raster else { continue };
        let x0 = left as u32 + 2 + (index as f32 * advance) as u32;
        for (dy, row) in raster.rows().enumerate() {
            for (dx, &coverage) in row.iter().enumerate() {
                let (x, y) = (x0 + dx as u32, top as u32 + 1 + dy as u32);
                if coverage > 0 && x < image.width() && y < image.height() {
                    // Black text over the label's colour.
                    let under = image.get_pixel(x, y).0;
                    let blend = |v: u8| (u32::from(v) * (255 - u32::from(coverage)) / 255) as u8;
                    image.put_pixel(x, y, Rgb(under.map(blend)));
                }
            }
        }
    }
}

/// The reference's 126 CSS colours in its order, as 0xRRGGBB.
#[rustfmt::skip]
const STANDARD_COLORS: [u32; 126] = [
    0xf0f8ff, 0x7fff00, 0x00ffff, 0x7fffd4, 0xf0ffff, 0xf5f5dc, 0xffe4c4, 0xffebcd, 0x8a2be2, 0xdeb887,
    0x5f9ea0, 0xfaebd7, 0xd2691e, 0xff7f50, 0x6495ed, 0xfff8dc, 0xdc143c, 0x00ffff, 0x008b8b, 0xb8860b,
    0xa9a9a9, 0xbdb76b, 0xff8c00, 0x9932cc, 0xe9967a, 0x8fbc8f, 0x00ced1, 0x9400d3, 0xff1493, 0x00bfff,
    0x1e90ff, 0xb22222, 0xfffaf0, 0x228b22, 0xff00ff, 0xdcdcdc, 0xf8f8ff, 0xffd700, 0xdaa520, 0xfa8072,
    0xd2b48c, 0xf0fff0, 0xff69b4, 0xcd5c5c, 0xfffff0, 0xf0e68c, 0xe6e6fa, 0xfff0f5, 0x7cfc00, 0xfffacd,
    0xadd8e6, 0xf08080, 0xe0ffff, 0xfafad2, 0xd3d3d3, 0xd3d3d3, 0x90ee90, 0xffb6c1, 0xffa07a, 0x20b2aa,
    0x87cefa, 0x778899, 0x778899, 0xb0c4de, 0xffffe0, 0x00ff00, 0x32cd32, 0xfaf0e6, 0xff00ff, 0x66cdaa,
    0xba55d3, 0x9370db, 0x3cb371, 0x7b68ee, 0x00fa9a, 0x48d1cc, 0xc71585, 0xf5fffa, 0xffe4e1, 0xffe4b5,
    0xffdead, 0xfdf5e6, 0x808000, 0x6b8e23, 0xffa500, 0xff4500, 0xda70d6, 0xeee8aa, 0x98fb98, 0xafeeee,
    0xdb7093, 0xffefd5, 0xffdab9, 0xcd853f, 0xffc0cb, 0xdda0dd, 0xb0e0e6, 0x800080, 0xff0000, 0xbc8f8f,
    0x4169e1, 0x8b4513, 0x008000, 0xf4a460, 0x2e8b57, 0xfff5ee, 0xa0522d, 0xc0c0c0, 0x87ceeb, 0x6a5acd,
    0x708090, 0x708090, 0xfffafa, 0x00ff7f, 0x4682b4, 0xadff2f, 0x008080, 0xd8bfd8, 0xff6347, 0x40e0d0,
    0xee82ee, 0xf5deb3, 0xffffff, 0xf5f5f5, 0xffff00, 0x9acd32,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn blank() -> RgbImage {
        RgbImage::from_pixel(64, 48, Rgb([255, 255, 255]))
    }

    fn annotation(box_yxyx_px: [f32; 4]) -> Annotation {
        Annotation {
            box_yxyx_px,
            label: "cat: 93%".into(),
            category: 1,
        }
    }

    #[test]
    fn a_box_is_outlined_in_the_colour_of_its_category() {
        let mut image = blank();
        draw(&mut image, &[annotation([25.0, 10.0, 40.0, 50.0])], 2);
        // Chartreuse is the second of the reference's colours.
        assert_eq!(*image.get_pixel(49, 30), Rgb([127, 255, 0]));
        assert_eq!(*image.get_pixel(30, 40), Rgb([127, 255, 0]));
        assert_eq!(*image.get_pixel(30, 33), Rgb([255, 255, 255]));
    }

    #[test]
    fn boxes_beyond_the_image_and_not_finite_ones_are_harmless() {
        let mut image = blank();
        let wild = [
            [-1e9, -1e9, 1e9, 1e9],
            [f32::NAN, 0.0, 1.0, 1.0],
            [f32::INFINITY; 4],
            [60.0, 70.0, 80.0, 90.0],
        ];
        draw(&mut image, &wild.map(annotation), 3);
        assert_eq!(image.dimensions(), (64, 48));
    }

    #[test]
    fn a_label_without_room_above_goes_below() {
        let mut image = blank();
        draw(&mut image, &[annotation([1.0, 5.0, 20.0, 30.0])], 1);
        assert_eq!(*image.get_pixel(6, 22), Rgb([127, 255, 0]));
    }

    #[test]
    fn colours_wrap_around() {
        assert_eq!(color_of(0), color_of(126));
    }
}
