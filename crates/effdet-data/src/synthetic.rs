//! The built-in synthetic data set: textured shapes on cluttered backgrounds, JPEG-encoded, the same bytes for the same seed.
//!
//! Shapes vary in size, rotation, colour and texture, overlap each other in part, and lie among lines and blobs that belong to
//! no class.
//!
//! Only operations that IEEE 754 rounds exactly are used, so that every machine renders the same pixels: directions are drawn as
//! vectors instead of angles, and distances need no more than a square root.

use std::ops::Range;

use effdet_model::label_map::CategoryId;
use effdet_model::rng::{Draws, Purpose};
use image::{Rgb, RgbImage};

use crate::dataset::{Category, DetectionDataset, Example, ImageSource, ObjectAnnotation};

/// What to render.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticConfig {
    /// Side of the square images in pixels.
    pub image_size: u32,
    /// Seed; another one gives other images.
    pub seed: u64,
    /// Fewest objects of an image.
    pub min_objects: u64,
    /// Most objects of an image.
    pub max_objects: u64,
    /// Radius of the smallest objects as a fraction of the image's side; the largest are four times as large.
    pub smallest_radius: f32,
    /// JPEG quality.
    pub quality: u8,
}

impl Default for SyntheticConfig {
    fn default() -> Self {
        Self {
            image_size: 256,
            seed: 0,
            min_objects: 1,
            max_objects: 6,
            smallest_radius: 0.06,
            quality: 90,
        }
    }
}

/// Class names; category ids count from 1 in this order.
pub const CLASS_NAMES: [&str; 4] = ["circle", "square", "triangle", "star"];

/// One rendered image.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticImage {
    /// JPEG file.
    pub jpeg: Vec<u8>,
    /// Class and box `[x, y, width, height]` of every object, back to front.
    ///
    /// A box is tight around the part of the object inside the image, whether or not something lies on it.
    pub objects: Vec<(CategoryId, [f64; 4])>,
}

/// The images of a range of indices as a data set in memory; disjoint ranges make training and validation sets.
///
/// # Determinism
/// A function of the arguments alone.
pub fn dataset(config: &SyntheticConfig, indices: Range<u64>) -> DetectionDataset {
    let object = |&(category, box_xywh_px): &(CategoryId, [f64; 4])| ObjectAnnotation {
        box_xywh_px,
        category,
        area: box_xywh_px[2] * box_xywh_px[3],
        is_crowd: false,
        difficult: false,
    };
    let examples = indices.map(|index| {
        let image = render(config, index);
        Example {
            image_id: index as i64 + 1,
            source_id: (index + 1).to_string(),
            file_name: format!("{index:06}.jpg"),
            width: config.image_size,
            height: config.image_size,
            objects: image.objects.iter().map(object).collect(),
            source: ImageSource::Memory(image.jpeg.into()),
        }
    });
    let category = |(name, id): (&&str, u32)| Category {
        id: CategoryId(id),
        name: (*name).to_owned(),
    };
    DetectionDataset {
        name: "synthetic shapes".to_owned(),
        examples: examples.collect(),
        categories: CLASS_NAMES.iter().zip(1..).map(category).collect(),
    }
}

/// Renders image `index` of the set.
///
/// # Determinism
/// A function of the configuration and `index` alone.
pub fn render(config: &SyntheticConfig, index: u64) -> SyntheticImage {
    let (image, objects) = paint_image(config, index);
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, config.quality)
        .encode_image(&image)
        .expect("writing to memory does not fail");
    SyntheticImage { jpeg, objects }
}

/// Least part of an object that stays visible.
const MIN_VISIBLE: f32 = 0.5;

fn paint_image(config: &SyntheticConfig, index: u64) -> (RgbImage, Vec<(CategoryId, [f64; 4])>) {
    let mut draws = Draws::new(config.seed, Purpose::Synthetic, 0, index);
    let mut canvas = background(config.image_size, &mut draws);
    let count = config.min_objects + draws.below(config.max_objects.saturating_sub(config.min_objects) + 1);
    let mut scene = Scene::new(config.image_size);
    for _ in 0..count {
        // A place that hides too much is drawn again; crowded images end up with fewer objects.
        (0..8).any(|_| {
            scene.try_add(random_shape(
                config.image_size as f32,
                config.smallest_radius,
                &mut draws,
            ))
        });
    }
    for placed in &scene.objects {
        paint(&mut canvas, &placed.shape, &mut draws);
    }
    let noise = draws.range(1.0, 7.0);
    for value in canvas.values.iter_mut() {
        *value += (draws.uniform() - 0.5) * 2.0 * noise;
    }
    let objects = scene.objects.iter().map(|placed| {
        let category = CategoryId(placed.shape.class as u32 + 1);
        (category, placed.box_xywh_px.map(f64::from))
    });
    (canvas.to_image(), objects.collect())
}

/// The objects of an image and which of them is on top at each pixel.
struct Scene {
    side: u32,
    objects: Vec<PlacedShape>,
    /// Index of the topmost object, plus 1; 0 for none.
    owners: Vec<usize>,
}

struct PlacedShape {
    shape: Shape,
    box_xywh_px: [u32; 4],
    pixels: u32,
    visible: u32,
}

impl Scene {
    fn new(side: u32) -> Self {
        Self {
            side,
            objects: Vec::new(),
            owners: vec![0; (side * side) as usize],
        }
    }

    /// Puts a shape on top, unless it is tiny or hides too much of another.
    fn try_add(&mut self, shape: Shape) -> bool {
        let [xs, ys] = shape.reach(self.side);
        let (mut left, mut top, mut right, mut bottom) = (self.side, self.side, 0, 0);
        let mut covered = Vec::new();
        for y in ys {
            for x in xs.clone() {
                if shape.distance(x as f32 + 0.5, y as f32 + 0.5) < 0.0 {
                    (left, top) = (left.min(x), top.min(y));
                    (right, bottom) = (right.max(x + 1), bottom.max(y + 1));
                    covered.push((y * self.side + x) as usize);
                }
            }
        }
        let smallest = self.side / 16;
        if right < left + smallest || bottom < top + smallest {
            return false;
        }
        let mut visible: Vec<u32> = self.objects.iter().map(|object| object.visible).collect();
        for &pixel in &covered {
            if let Some(under) = self.owners[pixel].checked_sub(1) {
                visible[under] -= 1;
            }
        }
        let enough =
            |(object, &visible): (&PlacedShape, &u32)| visible as f32 >= MIN_VISIBLE * object.pixels as f32;
        if !self.objects.iter().zip(&visible).all(enough) {
            return false;
        }
        for (object, visible) in self.objects.iter_mut().zip(visible) {
            object.visible = visible;
        }
        let pixels = covered.len() as u32;
        self.objects.push(PlacedShape {
            shape,
            box_xywh_px: [left, top, right - left, bottom - top],
            pixels,
            visible: pixels,
        });
        for pixel in covered {
            self.owners[pixel] = self.objects.len();
        }
        true
    }
}

#[derive(Debug, Clone, Copy)]
enum Texture {
    Plain,
    Stripes,
    Checks,
    Speckle,
}

struct Shape {
    class: usize,
    x: f32,
    y: f32,
    radius: f32,
    /// Unit vector of the shape's own x axis.
    axis: [f32; 2],
    colors: [[f32; 3]; 2],
    texture: Texture,
    pitch: f32,
}

impl Shape {
    /// A position along the shape's own axes.
    fn local(&self, px: f32, py: f32) -> [f32; 2] {
        let [cos, sin] = self.axis;
        let (dx, dy) = (px - self.x, py - self.y);
        [cos * dx + sin * dy, cos * dy - sin * dx]
    }

    /// Signed distance to the outline in pixels, negative inside (exact enough near the outline for antialiasing).
    fn distance(&self, px: f32, py: f32) -> f32 {
        let [x, y] = self.local(px, py);
        match self.class {
            0 => length(x, y) - self.radius,
            1 => x.abs().max(y.abs()) - self.radius * 0.8,
            2 => triangle_distance(x, y, self.radius),
            _ => star_distance(x, y, self.radius),
        }
    }

    fn color(&self, px: f32, py: f32, speckle: f32) -> [f32; 3] {
        let [u, v] = self.local(px, py);
        let band = |t: f32| ((t / self.pitch).floor() as i64).rem_euclid(2) as usize;
        let pick = match self.texture {
            Texture::Plain => 0,
            Texture::Stripes => band(u),
            Texture::Checks => band(u) ^ band(v),
            Texture::Speckle => usize::from(speckle > 0.75),
        };
        self.colors[pick]
    }

    /// Columns and rows that the shape may touch.
    fn reach(&self, side: u32) -> [Range<u32>; 2] {
        [self.x, self.y].map(|centre| pixels_around(centre, self.radius + 2.0, side))
    }
}

fn pixels_around(centre: f32, reach: f32, side: u32) -> Range<u32> {
    let clip = |v: f32| v.clamp(0.0, side as f32) as u32;
    clip(centre - reach)..clip(centre + reach + 1.0)
}

fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

/// Distance to an equilateral triangle by its circumradius.
fn triangle_distance(x: f32, y: f32, radius: f32) -> f32 {
    const SIN_120: f32 = 0.866_025_4;
    x.max(SIN_120 * y.abs() - 0.5 * x) - radius * 0.5
}

/// Distance to a five-pointed star by its circumradius, to first order.
fn star_distance(x: f32, y: f32, radius: f32) -> f32 {
    /// Cosine and sine of the directions of the tips: multiples of 72°.
    const TIPS: [[f32; 2]; 5] = [
        [1.0, 0.0],
        [0.309_017, 0.951_056_5],
        [-0.809_017, 0.587_785_24],
        [-0.809_017, -0.587_785_24],
        [0.309_017, -0.951_056_5],
    ];
    /// The notch between two tips, 36° from either, in units of the circumradius.
    const NOTCH: [f32; 2] = [0.42 * 0.809_017, 0.42 * 0.587_785_24];
    // Along the nearest tip and, by symmetry, on its positive side.
    let along = |[cos, sin]: [f32; 2]| [cos * x + sin * y, (cos * y - sin * x).abs()];
    let nearest = |a: [f32; 2], b: [f32; 2]| if b[0] > a[0] { b } else { a };
    let [px, py] = TIPS.map(along).into_iter().fold([f32::MIN, 0.0], nearest);
    let [ex, ey] = [radius * (NOTCH[0] - 1.0), radius * NOTCH[1]];
    ((px - radius) * ey - py * ex) / length(ex, ey)
}

/// A unit vector in a uniform direction.
fn direction(draws: &mut Draws) -> [f32; 2] {
    loop {
        let [x, y] = [draws.range(-1.0, 1.0), draws.range(-1.0, 1.0)];
        let length = length(x, y);
        if (0.1..=1.0).contains(&length) {
            return [x / length, y / length];
        }
    }
}

/// Cosine and sine of a small angle, at most 20 degrees either way: squares stay squares and do not turn into diamonds.
fn tilt(draws: &mut Draws) -> [f32; 2] {
    let slope = draws.range(-0.36, 0.36);
    let length = length(1.0, slope);
    [1.0 / length, slope / length]
}

fn hue(draws: &mut Draws, value: (f32, f32)) -> [f32; 3] {
    let h = draws.uniform() * 6.0;
    let saturation = draws.range(0.45, 1.0);
    let value = draws.range(value.0, value.1) * 255.0;
    std::array::from_fn(|c| {
        let offset = (h + [0.0, 4.0, 2.0][c]) % 6.0;
        let ramp = ((offset - 3.0).abs() - 1.0).clamp(0.0, 1.0);
        value * (1.0 - saturation * (1.0 - ramp))
    })
}

struct Canvas {
    side: u32,
    values: Vec<f32>,
}

impl Canvas {
    fn blend(&mut self, x: u32, y: u32, color: [f32; 3], alpha: f32) {
        let at = 3 * (y * self.side + x) as usize;
        for (value, color) in self.values[at..at + 3].iter_mut().zip(color) {
            *value += alpha * (color - *value);
        }
    }

    fn to_image(&self) -> RgbImage {
        RgbImage::from_fn(self.side, self.side, |x, y| {
            let at = 3 * (y * self.side + x) as usize;
            Rgb(std::array::from_fn(|c| {
                self.values[at + c].clamp(0.0, 255.0) as u8
            }))
        })
    }
}

/// A two-colour gradient with soft blobs and thin lines.
fn background(side: u32, draws: &mut Draws) -> Canvas {
    let extent = side as f32;
    let (from, to) = (hue(draws, (0.2, 0.7)), hue(draws, (0.2, 0.7)));
    let [cos, sin] = direction(draws);
    let mut canvas = Canvas {
        side,
        values: Vec::with_capacity(3 * (side * side) as usize),
    };
    for y in 0..side {
        for x in 0..side {
            let (u, v) = (x as f32 / extent - 0.5, y as f32 / extent - 0.5);
            let t = (0.5 + 0.7 * (u * cos + v * sin)).clamp(0.0, 1.0);
            canvas
                .values
                .extend((0..3).map(|c| from[c] + t * (to[c] - from[c])));
        }
    }
    for _ in 0..draws.below(6) {
        let (cx, cy) = (draws.range(0.0, extent), draws.range(0.0, extent));
        let (radius, color) = (draws.range(0.08, 0.5) * extent, hue(draws, (0.2, 0.8)));
        for y in pixels_around(cy, radius, side) {
            for x in pixels_around(cx, radius, side) {
                let d = length(x as f32 - cx, y as f32 - cy) / radius;
                let falloff = (1.0 - d * d).max(0.0);
                canvas.blend(x, y, color, 0.35 * falloff * falloff);
            }
        }
    }
    for _ in 0..draws.below(7) {
        let (x0, y0) = (draws.range(0.0, extent), draws.range(0.0, extent));
        let [cos, sin] = direction(draws);
        let (half_width, color) = (draws.range(0.6, 2.2), hue(draws, (0.3, 1.0)));
        for y in 0..side {
            for x in 0..side {
                let distance = ((x as f32 - x0) * sin - (y as f32 - y0) * cos).abs() - half_width;
                if distance < 0.5 {
                    canvas.blend(x, y, color, 0.7 * (0.5 - distance).min(1.0));
                }
            }
        }
    }
    canvas
}

fn random_shape(side: f32, smallest_radius: f32, draws: &mut Draws) -> Shape {
    let class = draws.below(CLASS_NAMES.len() as u64) as usize;
    // Uniform within an octave that is drawn first, so that small and large objects are equally common.
    let octave = [1.0, 2.0][draws.below(2) as usize];
    let radius = side * smallest_radius * octave * draws.range(1.0, 2.0);
    let margin = 0.6 * radius;
    let textures = [
        Texture::Plain,
        Texture::Stripes,
        Texture::Checks,
        Texture::Speckle,
    ];
    let color = hue(draws, (0.8, 1.0));
    // The texture is a darker tone of the same colour: it covers the shape without tearing its outline apart.
    let tone = draws.range(0.6, 0.85);
    Shape {
        class,
        x: draws.range(margin, side - margin),
        y: draws.range(margin, side - margin),
        radius,
        axis: tilt(draws),
        colors: [color, color.map(|value| value * tone)],
        texture: textures[draws.below(4) as usize],
        pitch: draws.range(0.18, 0.4) * radius + 1.5,
    }
}

fn paint(canvas: &mut Canvas, shape: &Shape, draws: &mut Draws) {
    let [xs, ys] = shape.reach(canvas.side);
    for y in ys {
        for x in xs.clone() {
            let (px, py) = (x as f32 + 0.5, y as f32 + 0.5);
            let alpha = (0.5 - shape.distance(px, py)).clamp(0.0, 1.0);
            let speckle = draws.uniform();
            if alpha > 0.0 {
                canvas.blend(x, y, shape.color(px, py, speckle), alpha);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn the_same_key_renders_the_same_bytes_and_another_index_others() {
        let config = SyntheticConfig::default();
        assert_eq!(render(&config, 3), render(&config, 3));
        assert_ne!(render(&config, 3).jpeg, render(&config, 4).jpeg);
        let other = SyntheticConfig {
            seed: 1,
            ..config.clone()
        };
        assert_ne!(render(&config, 3).jpeg, render(&other, 3).jpeg);
    }

    #[test]
    fn pixels_and_boxes_are_pinned_so_that_every_machine_renders_the_same() {
        let mut hash = Sha256::new();
        for index in 0..4 {
            let (image, objects) = paint_image(&SyntheticConfig::default(), index);
            hash.update(image.as_raw());
            for (category, box_xywh_px) in objects {
                hash.update(category.0.to_le_bytes());
                box_xywh_px
                    .iter()
                    .for_each(|side| hash.update(side.to_le_bytes()));
            }
        }
        let hash: String = hash
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hash, "983dbac1eb9cf5bf");
    }

    #[test]
    fn every_object_stays_visible_in_part() {
        for index in 0..40 {
            let mut draws = Draws::new(1, Purpose::Synthetic, 0, index);
            let mut scene = Scene::new(96);
            let added = (0..60)
                .filter(|_| scene.try_add(random_shape(96.0, 0.06, &mut draws)))
                .count();
            assert!(added < 60, "some places must be refused in such a crowd");
            assert_eq!(added, scene.objects.len());
            for (object, owner) in scene.objects.iter().zip(1..) {
                let visible = scene.owners.iter().filter(|&&other| other == owner).count();
                assert_eq!(visible, object.visible as usize);
                assert!(visible as f32 >= MIN_VISIBLE * object.pixels as f32);
            }
        }
    }

    #[test]
    fn boxes_are_tight_around_the_painted_pixels() {
        for class in 0..4 {
            let shape = Shape {
                class,
                x: 40.3,
                y: 28.7,
                radius: 20.0,
                axis: [0.6, 0.8],
                colors: [[255.0; 3]; 2],
                texture: Texture::Plain,
                pitch: 5.0,
            };
            let mut canvas = Canvas {
                side: 64,
                values: vec![0.0; 64 * 64 * 3],
            };
            paint(&mut canvas, &shape, &mut Draws::new(0, Purpose::Synthetic, 0, 0));
            let mut scene = Scene::new(64);
            assert!(scene.try_add(shape));
            let [x, y, w, h] = scene.objects[0].box_xywh_px;
            let image = canvas.to_image();
            // Half covered or more.
            let painted = image.enumerate_pixels().filter(|(.., pixel)| pixel.0[0] >= 128);
            let (xs, ys): (Vec<u32>, Vec<u32>) = painted.map(|(x, y, _)| (x, y)).unzip();
            assert_eq!(
                xs.iter().min().zip(xs.iter().max()),
                Some((&x, &(x + w - 1))),
                "class {class}"
            );
            assert_eq!(
                ys.iter().min().zip(ys.iter().max()),
                Some((&y, &(y + h - 1))),
                "class {class}"
            );
        }
    }

    #[test]
    fn a_data_set_is_its_range_of_images() {
        let config = SyntheticConfig {
            image_size: 64,
            ..SyntheticConfig::default()
        };
        let (all, tail) = (dataset(&config, 0..5), dataset(&config, 3..5));
        assert_eq!(all.examples[3..], tail.examples[..]);
        assert_eq!(all.examples[0].source_id, "1");
        let objects = &all.examples[4].objects;
        assert_eq!(objects.len(), render(&config, 4).objects.len());
        assert_eq!(all.categories[3].name, "star");
    }

    #[test]
    fn every_image_has_valid_boxes_and_all_classes_occur() {
        let config = SyntheticConfig::default();
        let mut seen = [0usize; 4];
        for index in 0..60 {
            let image = render(&config, index);
            assert!(!image.objects.is_empty(), "image {index}");
            for (category, [x, y, w, h]) in image.objects {
                seen[category.0 as usize - 1] += 1;
                assert!(x >= 0.0 && y >= 0.0 && w >= 8.0 && h >= 8.0 && x + w <= 256.0 && y + h <= 256.0);
            }
        }
        assert!(seen.iter().all(|&n| n > 10), "{seen:?}");
    }

    #[test]
    fn rendered_files_decode_at_their_size() {
        let config = SyntheticConfig {
            image_size: 96,
            ..SyntheticConfig::default()
        };
        let image = render(&config, 0);
        let decoded = crate::decode::decode_rgb(&image.jpeg, &Default::default()).unwrap();
        assert_eq!(decoded.dimensions(), (96, 96));
    }
}
