//! One sample and one batch of network inputs.

use effdet_model::assign::Assigner;
use effdet_model::engine::{ImageBatch, Targets, TrainBatch};
use effdet_model::label_map::LabelMap;
use effdet_model::loss::normalizer;
use image::RgbImage;

use crate::augment::AugmentConfig;
use crate::augment::compose::Sample;
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
    /// Augmentation of training samples beside flip and jitter.
    pub augment: AugmentConfig,
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

/// A training sample as the network sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingView {
    /// `[height, width, 3]`, normalised.
    pub pixels: Vec<f32>,
    /// Boxes in input pixels.
    pub boxes_yxyx_px: Vec<[f32; 4]>,
    /// Class index of each box.
    pub classes: Vec<i32>,
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

    /// Appends the example of a key: augmented and with targets where an `assigner` is given, as evaluation places it otherwise.
    ///
    /// # Errors
    /// What reading and decoding report, naming the file; an image of another size than annotated; a category that the label map
    /// lacks.
    ///
    /// # Determinism
    /// A function of (seed, key, examples) alone.
    pub fn append(
        &self,
        batch: &mut Batch,
        examples: &[Example],
        key: SampleKey,
        assigner: Option<&Assigner>,
    ) -> Result<()> {
        let example = &examples[key.index as usize];
        let clock = std::time::Instant::now();
        let image = self.decode(example)?;
        batch.decode_us += clock.elapsed().as_micros() as u64;

        let clock = std::time::Instant::now();
        let config = &self.preprocess;
        let (sample, placement) = match assigner {
            Some(_) => self.augment(examples, image, key)?,
            None => {
                let placement =
                    Placement::evaluation(config, image.height() as usize, image.width() as usize);
                let (boxes_yxyx_norm, classes) = (Vec::new(), Vec::new());
                let sample = Sample {
                    image,
                    boxes_yxyx_norm,
                    classes,
                };
                (sample, placement)
            }
        };
        let at = batch.images.len();
        batch.images.resize(at + batch.height * batch.width * 3, 0.0);
        place_image(config, &sample.image, &placement, &mut batch.images[at..]);
        batch.prepare_us += clock.elapsed().as_micros() as u64;

        if let Some(assigner) = assigner {
            let clock = std::time::Instant::now();
            let (boxes, classes) = placed(config, &sample, &placement);
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

    /// What the network sees of a training sample.
    ///
    /// # Errors
    /// Those of [`Self::append`].
    pub fn training_view(&self, examples: &[Example], key: SampleKey) -> Result<TrainingView> {
        let image = self.decode(&examples[key.index as usize])?;
        let (sample, placement) = self.augment(examples, image, key)?;
        let size = self.preprocess.image_size;
        let mut pixels = vec![0.0; size.height * size.width * 3];
        place_image(&self.preprocess, &sample.image, &placement, &mut pixels);
        let (boxes, classes) = placed(&self.preprocess, &sample, &placement);
        Ok(TrainingView {
            pixels,
            boxes_yxyx_px: boxes,
            classes,
        })
    }

    fn augment(&self, examples: &[Example], image: RgbImage, key: SampleKey) -> Result<(Sample, Placement)> {
        let config = &self.preprocess;
        let sample = self.sample(&examples[key.index as usize], image)?;
        let load = |index: u64| {
            let example = &examples[index as usize];
            self.sample(example, self.decode(example)?)
        };
        let numbers = (self.seed, key.pass, key.index);
        let count = examples.len() as u64;
        let sample = self
            .augment
            .apply(sample, config.image_size, numbers, count, load)?;
        let (height, width) = (sample.image.height() as usize, sample.image.width() as usize);
        let placement = Placement::draw(config, height, width, self.seed, key.pass, key.index);
        Ok((sample, placement))
    }

    /// The image of an example, of the size that it is annotated with.
    fn decode(&self, example: &Example) -> Result<RgbImage> {
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
        Ok(image)
    }

    /// An image with the objects that are trained on.
    fn sample(&self, example: &Example, image: RgbImage) -> Result<Sample> {
        let (height, width) = (f64::from(image.height()), f64::from(image.width()));
        let mut boxes_yxyx_norm = Vec::with_capacity(example.objects.len());
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
            boxes_yxyx_norm.push([
                (y / height) as f32,
                (x / width) as f32,
                ((y + h) / height) as f32,
                ((x + w) / width) as f32,
            ]);
            classes.push(class.0 as i32);
        }
        Ok(Sample {
            image,
            boxes_yxyx_norm,
            classes,
        })
    }
}

/// Boxes left after placing, in input pixels, with their class indices.
fn placed(config: &PreprocessConfig, sample: &Sample, placement: &Placement) -> (Vec<[f32; 4]>, Vec<i32>) {
    let placed = |(&b, &class): (&[f32; 4], &i32)| Some((placement.place_box(config, b)?, class));
    (sample.boxes_yxyx_norm.iter().zip(&sample.classes))
        .filter_map(placed)
        .unzip()
}
