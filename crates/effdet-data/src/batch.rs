//! One sample and one batch of network inputs.

use effdet_model::assign::Assigner;
use effdet_model::engine::{ImageBatch, Targets, TrainBatch};
use effdet_model::label_map::LabelMap;
use effdet_model::loss::normalizer;

use crate::dataset::Example;
use crate::decode::{DecodeOptions, decode_rgb};
use crate::error::{DataError, Result};
use crate::preprocess::{Placement, PreprocessConfig, place_image};

/// A batch of prepared images, with targets when it is meant for training.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// `[batch, height, width, 3]`.
    pub images: Vec<f32>,
    /// Height of an image.
    pub height: usize,
    /// Width of an image.
    pub width: usize,
    /// `[batch, anchors]`: class index, −1 background; empty for evaluation.
    pub class_targets: Vec<i32>,
    /// `[batch, anchors, 4]`; empty for evaluation.
    pub box_targets: Vec<f32>,
    /// Matched anchors of each image; empty for evaluation.
    pub positives: Vec<usize>,
    /// Key of each image for the draws of stochastic depth.
    pub draw_keys: Vec<u64>,
    /// Image ids of the data set.
    pub image_ids: Vec<i64>,
    /// 1/s of each image: input pixels times it are original pixels.
    pub image_scales: Vec<f32>,
    /// Position of the stream of samples behind this batch.
    pub end_position: u64,
    /// Time spent reading and decoding.
    pub decode_us: u64,
    /// Time spent on augmentation and resizing.
    pub prepare_us: u64,
    /// Time spent assigning anchors.
    pub assign_us: u64,
}

impl Batch {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.image_ids.len()
    }

    /// Whether it holds no image.
    pub fn is_empty(&self) -> bool {
        self.image_ids.is_empty()
    }

    /// The network's view of the images.
    pub fn image_batch(&self) -> ImageBatch<'_> {
        ImageBatch {
            pixels: &self.images,
            batch: self.len(),
            height: self.height,
            width: self.width,
        }
    }

    /// The engine's view of a training batch.
    pub fn train_batch(&self) -> TrainBatch<'_> {
        TrainBatch {
            images: self.image_batch(),
            targets: Targets {
                class_targets: &self.class_targets,
                box_targets: &self.box_targets,
                normalizer: normalizer(self.positives.iter().sum()),
            },
            draw_keys: &self.draw_keys,
        }
    }

    fn clear(&mut self) {
        self.images.clear();
        self.class_targets.clear();
        self.box_targets.clear();
        self.positives.clear();
        self.draw_keys.clear();
        self.image_ids.clear();
        self.image_scales.clear();
        (self.decode_us, self.prepare_us, self.assign_us) = (0, 0, 0);
    }
}

/// What turns examples into rows of a batch.
#[derive(Debug)]
pub struct Preparation {
    /// Pixels and boxes.
    pub preprocess: PreprocessConfig,
    /// Decoder limits and orientation.
    pub decode: DecodeOptions,
    /// Largest encoded image in bytes.
    pub max_encoded_bytes: u64,
    /// Category ids to class indices.
    pub label_map: LabelMap,
    /// Leave crowd objects out of training.
    pub skip_crowd: bool,
    /// Seed of flips and jitter.
    pub seed: u64,
}

/// Which sample of the stream an example is read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleKey {
    /// Passes over the data set before this one.
    pub pass: u64,
    /// Index of the example.
    pub index: u64,
}

impl Preparation {
    /// Empties `batch` and sets its image size; fill it with [`Self::append`].
    pub fn start(&self, batch: &mut Batch) {
        batch.clear();
        batch.height = self.preprocess.image_size.height;
        batch.width = self.preprocess.image_size.width;
    }

    /// Appends one example: augmented and with targets where an `assigner` is given, as evaluation places it otherwise.
    ///
    /// # Errors
    /// What reading and decoding report, naming the file; an image of another size than annotated; a category that the label map
    /// lacks.
    ///
    /// # Determinism
    /// A function of (seed, key, example) alone.
    pub fn append(
        &self,
        batch: &mut Batch,
        example: &Example,
        key: SampleKey,
        assigner: Option<&Assigner>,
    ) -> Result<()> {
        let clock = std::time::Instant::now();
        let bytes = example.source.read_bytes(self.max_encoded_bytes)?;
        let image = decode_rgb(&bytes, &self.decode).map_err(|reason| DataError::Image {
            file: example.file_name.clone(),
            reason,
        })?;
        let differs = |annotated: u32, decoded: u32| annotated != 0 && annotated != decoded;
        if differs(example.width, image.width()) || differs(example.height, image.height()) {
            return Err(DataError::SizeMismatch {
                file: example.file_name.clone(),
                decoded: image.dimensions(),
                annotated: (example.width, example.height),
            });
        }
        batch.decode_us += clock.elapsed().as_micros() as u64;

        let clock = std::time::Instant::now();
        let (height, width) = (image.height() as usize, image.width() as usize);
        let config = &self.preprocess;
        let placement = match assigner {
            Some(_) => Placement::draw(config, height, width, self.seed, key.pass, key.index),
            None => Placement::evaluation(config, height, width),
        };
        let at = batch.images.len();
        batch.images.resize(at + batch.height * batch.width * 3, 0.0);
        place_image(config, &image, &placement, &mut batch.images[at..]);
        batch.prepare_us += clock.elapsed().as_micros() as u64;

        if let Some(assigner) = assigner {
            let clock = std::time::Instant::now();
            let (boxes, classes) = self.place_objects(example, height, width, &placement)?;
            let (class_at, box_at) = (batch.class_targets.len(), batch.box_targets.len());
            batch.class_targets.resize(class_at + assigner.num_anchors(), 0);
            batch.box_targets.resize(box_at + assigner.num_anchors() * 4, 0.0);
            let positives = assigner.assign(
                &boxes,
                &classes,
                &mut batch.class_targets[class_at..],
                &mut batch.box_targets[box_at..],
            );
            batch.positives.push(positives);
            batch.assign_us += clock.elapsed().as_micros() as u64;
        }
        // Different in every pass, so that stochastic depth is too.
        batch.draw_keys.push(key.pass << 32 | key.index);
        batch.image_ids.push(example.image_id);
        batch.image_scales.push(1.0 / placement.scale);
        Ok(())
    }

    /// Boxes left after augmentation, in input pixels, with their class indices.
    fn place_objects(
        &self,
        example: &Example,
        height: usize,
        width: usize,
        placement: &Placement,
    ) -> Result<(Vec<[f32; 4]>, Vec<i32>)> {
        let (height, width) = (height as f64, width as f64);
        let mut boxes = Vec::with_capacity(example.objects.len());
        let mut classes = Vec::with_capacity(example.objects.len());
        for (record, object) in example.objects.iter().enumerate() {
            if object.is_crowd && self.skip_crowd {
                continue;
            }
            let class = self
                .label_map
                .class_index(object.category)
                .ok_or_else(|| DataError::Category {
                    file: example.file_name.clone(),
                    record,
                    category: object.category.0,
                })?;
            let [x, y, w, h] = object.box_xywh_px;
            // Records hold float32 corners divided by the image size.
            let normalized = [
                (y / height) as f32,
                (x / width) as f32,
                ((y + h) / height) as f32,
                ((x + w) / width) as f32,
            ];
            if let Some(placed) = placement.place_box(&self.preprocess, normalized) {
                boxes.push(placed);
                classes.push(class.0 as i32);
            }
        }
        Ok((boxes, classes))
    }
}
