//! The built-in synthetic data set: textured shapes on cluttered backgrounds, JPEG-encoded, the same bytes for the same seed.
//!
//! Shapes vary in size, rotation, colour and texture, overlap each other in part, and lie among lines and blobs that belong to
//! no class.

use effdet_model::label_map::CategoryId;
use effdet_model::rng::{Draws, Purpose};
use image::{Rgb, RgbImage};

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
    pub objects: Vec<(CategoryId, [f64; 4])>,
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
    angle: f32,
    colors: [[f32; 3]; 2],
    texture: Texture,
    pitch: f32,
}

impl Shape {
    /// Signed distance to the outline in pixels, negative inside (exact enough near the outline for antialiasing).
    fn distance(&self, px: f32, py: f32) -> f32 {
        let (sin, cos) = self.angle.sin_cos();
        let (dx, dy) = (px - self.x, py - self.y);
        let (x, y) = (cos * dx + sin * dy, cos * dy - sin * dx);
        match self.class {
            0 => x.hypot(y) - self.radius,
            1 => x.abs().max(y.abs()) - self.radius * 0.8,
            2 => polygon_distance(x, y, self.radius, 3, 0.5),
            _ => star_distance(x, y, self.radius),
        }
    }

    fn color(&self, px: f32, py: f32, speckle: f32) -> [f32; 3] {
        let (sin, cos) = self.angle.sin_cos();
        let (u, v) = (cos * px + sin * py, cos * py - sin * px);
        let band = |t: f32| ((t / self.pitch).floor() as i64).rem_euclid(2) as usize;
        let pick = match self.texture {
            Texture::Plain => 0,
            Texture::Stripes => band(u),
            Texture::Checks => band(u) ^ band(v),
            Texture::Speckle => usize::from(speckle > 0.75),
        };
        self.colors[pick]
    }
}

/// Distance to a regular polygon with its apothem a fraction `inner` of the circumradius.
fn polygon_distance(x: f32, y: f32, radius: f32, sides: u32, inner: f32) -> f32 {
    let sector = std::f32::consts::TAU / sides as f32;
    let angle = y.atan2(x);
    let folded = (angle + sector / 2.0).rem_euclid(sector) - sector / 2.0;
    x.hypot(y) * folded.cos() - radius * inner
}

/// Distance to a five-pointed star, to first order.
fn star_distance(x: f32, y: f32, radius: f32) -> f32 {
    let sector = std::f32::consts::TAU / 5.0;
    let folded = ((y.atan2(x) + sector / 2.0).rem_euclid(sector) - sector / 2.0).abs();
    let r = x.hypot(y);
    let (px, py) = (r * folded.cos(), r * folded.sin());
    // The edge from the tip (radius, 0) to the notch between two tips.
    let notch = radius * 0.42;
    let (nx, ny) = (notch * (sector / 2.0).cos(), notch * (sector / 2.0).sin());
    let (ex, ey) = (nx - radius, ny);
    let length = ex.hypot(ey);
    ((px - radius) * ey - py * ex) / length
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

/// Renders image `index` of the set.
///
/// # Determinism
/// A function of the configuration and `index` alone.
pub fn render(config: &SyntheticConfig, index: u64) -> SyntheticImage {
    let mut draws = Draws::new(config.seed, Purpose::Synthetic, 0, index);
    let side = config.image_size as f32;
    let mut canvas = background(config.image_size, &mut draws);
    let count = config.min_objects + draws.below(config.max_objects.saturating_sub(config.min_objects) + 1);
    let mut shapes: Vec<(Shape, [f64; 4])> = Vec::new();
    for _ in 0..count {
        // A place that hides too much of an earlier object is drawn again; crowded images end up with fewer objects.
        for _attempt in 0..8 {
            let shape = random_shape(side, &mut draws);
            let Some(extent) = extent(&shape, config.image_size) else {
                continue;
            };
            let hides = |other: &[f64; 4]| {
                overlap(&extent, other) > 0.35 * (other[2] * other[3]).min(extent[2] * extent[3])
            };
            if !shapes.iter().any(|(_, other)| hides(other)) {
                shapes.push((shape, extent));
                break;
            }
        }
    }
    for (shape, _) in &shapes {
        paint(&mut canvas, shape, &mut draws);
    }
    let noise = draws.range(1.0, 7.0);
    for value in canvas.values.iter_mut() {
        *value += (draws.uniform() - 0.5) * 2.0 * noise;
    }
    SyntheticImage {
        jpeg: canvas.encode(config.quality),
        objects: shapes
            .iter()
            .map(|(s, extent)| (CategoryId(s.class as u32 + 1), *extent))
            .collect(),
    }
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

    fn encode(&self, quality: u8) -> Vec<u8> {
        let byte = |x: u32, y: u32, c: usize| {
            self.values[3 * (y * self.side + x) as usize + c].clamp(0.0, 255.0) as u8
        };
        let image = RgbImage::from_fn(self.side, self.side, |x, y| {
            Rgb(std::array::from_fn(|c| byte(x, y, c)))
        });
        let mut out = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, quality)
            .encode_image(&image)
            .expect("writing to memory does not fail");
        out
    }
}

/// A two-colour gradient with soft blobs and thin lines.
fn background(side: u32, draws: &mut Draws) -> Canvas {
    let extent = side as f32;
    let (from, to) = (hue(draws, (0.2, 0.7)), hue(draws, (0.2, 0.7)));
    let (sin, cos) = (draws.uniform() * std::f32::consts::TAU).sin_cos();
    let mut canvas = Canvas {
        side,
        values: vec![0.0; 3 * (side * side) as usize],
    };
    for y in 0..side {
        for x in 0..side {
            let (u, v) = (x as f32 / extent - 0.5, y as f32 / extent - 0.5);
            let t = (0.5 + 0.7 * (u * cos + v * sin)).clamp(0.0, 1.0);
            canvas.blend(
                x,
                y,
                std::array::from_fn(|c| from[c] + t * (to[c] - from[c])),
                1.0,
            );
        }
    }
    for _ in 0..draws.below(6) {
        let (cx, cy) = (draws.range(0.0, extent), draws.range(0.0, extent));
        let (radius, color) = (draws.range(0.05, 0.3) * extent, hue(draws, (0.2, 0.8)));
        for y in 0..side {
            for x in 0..side {
                let d = (x as f32 - cx).hypot(y as f32 - cy) / radius;
                if d < 2.0 {
                    canvas.blend(x, y, color, 0.35 * (-d * d * 2.0).exp());
                }
            }
        }
    }
    for _ in 0..draws.below(7) {
        let (x0, y0) = (draws.range(0.0, extent), draws.range(0.0, extent));
        let (sin, cos) = (draws.uniform() * std::f32::consts::TAU).sin_cos();
        let (width, color) = (draws.range(0.6, 2.2), hue(draws, (0.3, 1.0)));
        for y in 0..side {
            for x in 0..side {
                let distance = ((x as f32 - x0) * sin - (y as f32 - y0) * cos).abs() - width;
                if distance < 1.0 {
                    canvas.blend(x, y, color, 0.7 * (0.5 - distance).clamp(0.0, 1.0));
                }
            }
        }
    }
    canvas
}

fn random_shape(side: f32, draws: &mut Draws) -> Shape {
    let class = draws.below(CLASS_NAMES.len() as u64) as usize;
    // Log-uniform, so that small and large objects are equally common.
    let radius = side * (0.06f32.ln() + draws.uniform() * (0.24f32 / 0.06).ln()).exp();
    let margin = 0.6 * radius;
    let textures = [
        Texture::Plain,
        Texture::Stripes,
        Texture::Checks,
        Texture::Speckle,
    ];
    Shape {
        class,
        x: draws.range(margin, side - margin),
        y: draws.range(margin, side - margin),
        radius,
        angle: draws.uniform() * std::f32::consts::TAU,
        colors: [hue(draws, (0.75, 1.0)), hue(draws, (0.55, 1.0))],
        texture: textures[draws.below(4) as usize],
        pitch: draws.range(0.18, 0.4) * radius + 1.5,
    }
}

/// Bounding box `[x, y, width, height]` of the part inside the image; none when little of it is.
fn extent(shape: &Shape, side: u32) -> Option<[f64; 4]> {
    let reach = shape.radius + 1.0;
    let clip = |v: f32| v.clamp(0.0, side as f32) as u32;
    let (mut left, mut top, mut right, mut bottom) = (side, side, 0, 0);
    for y in clip(shape.y - reach)..clip(shape.y + reach + 1.0) {
        for x in clip(shape.x - reach)..clip(shape.x + reach + 1.0) {
            if shape.distance(x as f32 + 0.5, y as f32 + 0.5) < 0.0 {
                (left, top, right, bottom) = (left.min(x), top.min(y), right.max(x + 1), bottom.max(y + 1));
            }
        }
    }
    let large_enough = right >= left + 8 && bottom >= top + 8;
    large_enough.then(|| [left, top, right - left, bottom - top].map(f64::from))
}

fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let side = |at: usize| ((a[at] + a[at + 2]).min(b[at] + b[at + 2]) - a[at].max(b[at])).max(0.0);
    side(0) * side(1)
}

fn paint(canvas: &mut Canvas, shape: &Shape, draws: &mut Draws) {
    let reach = shape.radius + 2.0;
    let side = canvas.side;
    let clip = |v: f32| v.clamp(0.0, side as f32) as u32;
    for y in clip(shape.y - reach)..clip(shape.y + reach + 1.0) {
        for x in clip(shape.x - reach)..clip(shape.x + reach + 1.0) {
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
