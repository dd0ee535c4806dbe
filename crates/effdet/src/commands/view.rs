//! `effdet data view`: images of a data set with their boxes drawn.

use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use effdet_data::batch::{Preparation, SampleKey};
use effdet_data::dataset::{DetectionDataset, Example};
use effdet_data::decode::{DecodeOptions, MAX_ENCODED_BYTES, decode_rgb};
use effdet_data::text::printable;
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::label_map::{CategoryId, ClassIndex, LabelMap};
use effdet_model::rng::{Draws, Purpose};
use effdet_train::eval::preparation;
use image::imageops::{FilterType, overlay, resize};
use image::{Rgb, RgbImage};

use super::infer::write_jpeg;
use super::model::{apply_augmentation, resolve_hparams};
use super::run_config::label_map_of;
use super::sources::{self, Part};
use crate::cli::{SourceArgs, ViewArgs};
use crate::draw::{Annotation, draw};

/// Pixels between the images of a sheet.
const GAP: u32 = 6;
const BACKGROUND: Rgb<u8> = Rgb([40, 40, 40]);
/// Sheets have no more pixels than this.
const MAX_SHEET_PIXELS: u64 = 400_000_000;

/// What is shown of an example; augmented samples are another kind of picture of the same example.
struct Picture {
    image: RgbImage,
    annotations: Vec<Annotation>,
    caption: String,
}

/// Writes a contact sheet or a page.
pub fn run(args: &ViewArgs) -> Result<()> {
    ensure!(
        args.count > 0 && args.columns > 0,
        "--count and --columns must be at least 1"
    );
    ensure!(
        (32..=4096).contains(&args.tile),
        "--tile {}: 32 to 4096 pixels",
        args.tile
    );
    let source = SourceArgs {
        train_split: args.split.clone(),
        ..args.source.clone()
    };
    let dataset = sources::require(&source, Part::Train)?;
    let chosen = choose(&dataset, args)?;
    let mut tiles = Vec::with_capacity(chosen.len());
    let augmented = args.augmented || args.augmentation.is_given();
    ensure!(
        augmented || args.pass == 0,
        "--pass is of --augmented: images as they are stored are the same in every pass"
    );
    let augmenter = augmented.then(|| Augmenter::new(&dataset, args)).transpose()?;
    for index in chosen {
        let picture = match &augmenter {
            Some(augmenter) => augmenter.picture(&dataset, index, args.pass)?,
            None => stored(&dataset, &dataset.examples[index])?,
        };
        tiles.push((
            tile(picture.image, picture.annotations, args.tile),
            picture.caption,
        ));
    }
    match args.output.extension().and_then(|extension| extension.to_str()) {
        Some("html" | "htm") => write_page(&tiles, &dataset.name, &args.output)?,
        Some("png" | "jpg" | "jpeg") => write_sheet(&tiles, args)?,
        _ => bail!("--output {}: .png, .jpg or .html", args.output.display()),
    }
    writeln!(
        std::io::stdout(),
        "{} of {} images: {}",
        tiles.len(),
        dataset.examples.len(),
        args.output.display()
    )?;
    Ok(())
}

/// Indices of examples evenly over the data set, or at random.
fn choose(dataset: &DetectionDataset, args: &ViewArgs) -> Result<Vec<usize>> {
    let mut indices: Vec<usize> = (0..dataset.examples.len()).collect();
    if let Some(name) = &args.category {
        let id = category(dataset, name)?;
        let holds = |index: &usize| {
            let objects = &dataset.examples[*index].objects;
            objects.iter().any(|object| object.category == id)
        };
        indices.retain(holds);
        ensure!(!indices.is_empty(), "no image has an object of category {name:?}");
    }
    let count = args.count.min(indices.len());
    if let Some(seed) = args.seed {
        Draws::new(seed, Purpose::Shuffle, 0, 0).shuffle(&mut indices);
    } else {
        indices = (0..count)
            .map(|index| indices[index * indices.len() / count])
            .collect();
    }
    indices.truncate(count);
    Ok(indices)
}

fn category(dataset: &DetectionDataset, name: &str) -> Result<CategoryId> {
    let known = dataset.categories.iter().find(|category| category.name == name);
    known.map(|category| category.id).with_context(|| {
        let names: Vec<&str> = dataset
            .categories
            .iter()
            .map(|category| category.name.as_str())
            .collect();
        format!("--category {name:?}: there are {}", printable(&names.join(", ")))
    })
}

/// Shows samples as training sees them.
struct Augmenter {
    hparams: HParams,
    label_map: LabelMap,
    preparation: Preparation,
}

impl Augmenter {
    fn new(dataset: &DetectionDataset, args: &ViewArgs) -> Result<Self> {
        let mut hparams = resolve_hparams(&args.model, "d0")?;
        apply_augmentation(&args.augmentation, &mut hparams)?;
        let label_map = label_map_of(dataset)?;
        let preparation = preparation(&hparams, &label_map, args.seed.unwrap_or(0));
        Ok(Self {
            hparams,
            label_map,
            preparation,
        })
    }

    /// One sample of a pass; pixels are taken back from their normalised values.
    fn picture(&self, dataset: &DetectionDataset, index: usize, pass: u64) -> Result<Picture> {
        let key = SampleKey {
            pass,
            index: index as u64,
        };
        let view = self.preparation.training_view(&dataset.examples, key)?;
        let ImageSize { height, width } = self.hparams.image_size;
        let image = RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let at = (y as usize * width + x as usize) * 3;
            Rgb(std::array::from_fn(|channel| {
                let value = f64::from(view.pixels[at + channel]) * self.hparams.stddev_rgb[channel];
                (value + self.hparams.mean_rgb[channel]).round() as u8
            }))
        });
        let annotation = |(&box_yxyx_px, &class): (&[f32; 4], &i32)| {
            let class = ClassIndex(class as u32);
            Annotation {
                box_yxyx_px,
                label: printable(self.label_map.class_name(class).unwrap_or("?")).to_string(),
                category: self.label_map.category_id(class).map_or(0, |id| id.0),
            }
        };
        let example = &dataset.examples[index];
        Ok(Picture {
            annotations: view
                .boxes_yxyx_px
                .iter()
                .zip(&view.classes)
                .map(annotation)
                .collect(),
            caption: format!("{} (id {}), pass {pass}", example.file_name, example.image_id),
            image,
        })
    }
}

/// The image as it is stored, with its boxes.
fn stored(dataset: &DetectionDataset, example: &Example) -> Result<Picture> {
    let bytes = example.source.read_bytes(MAX_ENCODED_BYTES)?;
    let image = decode_rgb(&bytes, &DecodeOptions::default())
        .with_context(|| format!("image {}", printable(&example.file_name)))?;
    let name = |id: CategoryId| {
        let known = dataset.categories.iter().find(|category| category.id == id);
        known.map_or("?", |category| category.name.as_str())
    };
    let annotation = |object: &effdet_data::dataset::ObjectAnnotation| {
        let [x, y, w, h] = object.box_xywh_px;
        let crowd = if object.is_crowd { " (crowd)" } else { "" };
        Annotation {
            box_yxyx_px: [y, x, y + h, x + w].map(|v| v as f32),
            label: format!("{}{crowd}", printable(name(object.category))),
            category: object.category.0,
        }
    };
    Ok(Picture {
        annotations: example.objects.iter().map(annotation).collect(),
        caption: format!("{} (id {})", example.file_name, example.image_id),
        image,
    })
}

/// Scales a picture to fit a square and draws its boxes at that size, so that labels stay legible.
fn tile(image: RgbImage, mut annotations: Vec<Annotation>, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let scale = f64::from(side) / f64::from(width.max(height));
    let scaled = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    let mut small = resize(&image, scaled(width), scaled(height), FilterType::Triangle);
    for annotation in &mut annotations {
        annotation.box_yxyx_px = annotation.box_yxyx_px.map(|v| v * scale as f32);
    }
    draw(&mut small, &annotations, 2);
    small
}

fn write_sheet(tiles: &[(RgbImage, String)], args: &ViewArgs) -> Result<()> {
    let columns = args.columns.min(tiles.len()).max(1);
    let rows = tiles.len().div_ceil(columns);
    let step = args.tile + GAP;
    let side = |count: usize| u32::try_from(count as u64 * u64::from(step) + u64::from(GAP));
    let (width, height) = (side(columns)?, side(rows)?);
    ensure!(
        u64::from(width) * u64::from(height) <= MAX_SHEET_PIXELS,
        "a sheet of {width}x{height} pixels is too large: choose fewer images or smaller tiles, or a page (.html)"
    );
    let mut sheet = RgbImage::from_pixel(width, height, BACKGROUND);
    for (index, (tile, _)) in tiles.iter().enumerate() {
        let place = |cell: usize, free: u32| i64::from(GAP + cell as u32 * step + free / 2);
        let x = place(index % columns, args.tile.saturating_sub(tile.width()));
        let y = place(index / columns, args.tile.saturating_sub(tile.height()));
        overlay(&mut sheet, tile, x, y);
    }
    if args
        .output
        .extension()
        .is_some_and(|extension| extension == "png")
    {
        return sheet
            .save(&args.output)
            .with_context(|| format!("cannot write {}", args.output.display()));
    }
    write_jpeg(&sheet, &args.output)
}

fn write_page(tiles: &[(RgbImage, String)], title: &str, output: &Path) -> Result<()> {
    let escaped = effdet_data::doctor::escaped;
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"><title>{0}</title>\
         <style>body{{font:14px system-ui,sans-serif;margin:1em}}figure{{display:inline-block;margin:.4em;vertical-align:top}}\
         figcaption{{overflow-wrap:anywhere}}</style></head><body><h1>{0}</h1>",
        escaped(title)
    );
    for (tile, caption) in tiles {
        let mut jpeg = Cursor::new(Vec::new());
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 85).encode_image(tile)?;
        let data = base64::engine::general_purpose::STANDARD.encode(jpeg.into_inner());
        page.push_str(&format!(
            "<figure><img width=\"{}\" src=\"data:image/jpeg;base64,{data}\" alt=\"\"><figcaption>{}</figcaption></figure>",
            tile.width(),
            escaped(caption)
        ));
    }
    page.push_str("</body></html>\n");
    fs::write(output, page).with_context(|| format!("cannot write {}", output.display()))
}
