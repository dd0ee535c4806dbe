//! One sample and one batch of network inputs.

use std::sync::Arc;
use std::time::Instant;

use effdet_model::assign::{AssignScratch, Assigner};
use effdet_model::engine::{ImageBatch, Targets, TrainBatch};
use effdet_model::label_map::LabelMap;
use effdet_model::loss::normalizer;
use image::RgbImage;

use crate::augment::AugmentConfig;
use crate::augment::compose::Sample;
use crate::cache::ImageCache;
use crate::dataset::Example;
use crate::decode::{DecodeOptions, decode_rgb};
use crate::error::{DataError, Result};
use crate::jpeg::{JpegDecoder, Reduction};
use crate::preprocess::{Placement, PreprocessConfig, place_image};
use crate::resize::Placer;

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
    /// Where decoded images are kept; none = decoded each time. Not used where images are turned by their orientation or decoded in
    /// reduced size.
    pub cache: Option<Arc<ImageCache>>,
}

/// Memory for preparing samples, one after the other.
#[derive(Debug, Default)]
pub struct Scratch {
    encoded: Vec<u8>,
    jpeg: JpegDecoder,
    placer: Placer,
    boxes_yxyx_norm: Vec<[f32; 4]>,
    sample_classes: Vec<i32>,
    boxes_yxyx_px: Vec<[f32; 4]>,
    classes: Vec<i32>,
    assign: AssignScratch,
}

impl Scratch {
    /// The sample's boxes in input pixels, those of which nothing is left apart, with their classes.
    fn place_boxes(&mut self, config: &PreprocessConfig, placement: &Placement) {
        self.boxes_yxyx_px.clear();
        self.classes.clear();
        for (&corners, &class) in self.boxes_yxyx_norm.iter().zip(&self.sample_classes) {
            if let Some(placed) = placement.place_box(config, corners) {
                self.boxes_yxyx_px.push(placed);
                self.classes.push(class);
            }
        }
    }
}

/// Where the time of one sample went.
struct Times {
    last: Instant,
    decode_us: u64,
    prepare_us: u64,
}

impl Times {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            decode_us: 0,
            prepare_us: 0,
        }
    }

    fn lap_us(&mut self) -> u64 {
        let now = Instant::now();
        let lap = now - std::mem::replace(&mut self.last, now);
        lap.as_micros() as u64
    }

    fn decoded(&mut self) {
        self.decode_us = self.lap_us();
    }

    fn prepared(&mut self) {
        self.prepare_us = self.lap_us();
    }
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
    /// Empties `batch` and makes room for `images` of them, with targets where an `assigner` is given; fill it with
    /// [`Self::append`].
    pub fn start(&self, batch: &mut Batch, images: usize, assigner: Option<&Assigner>) {
        batch.clear();
        batch.height = self.preprocess.image_size.height;
        batch.width = self.preprocess.image_size.width;
        // What was there is overwritten image by image.
        batch.images.resize(images * batch.height * batch.width * 3, 0.0);
        let anchors = assigner.map_or(0, Assigner::num_anchors);
        batch.class_targets.resize(images * anchors, 0);
        batch.box_targets.resize(images * anchors * 4, 0.0);
    }

    /// Appends the example of a key: augmented and with targets where an `assigner` is given, as evaluation places it otherwise.
    ///
    /// # Errors
    /// What reading and decoding report, naming the file; an image of another size than annotated; a category that the label map
    /// lacks.
    ///
    /// # Panics
    /// When [`Self::start`] made no room for it.
    ///
    /// # Determinism
    /// A function of (seed, key, examples) alone.
    pub fn append(
        &self,
        batch: &mut Batch,
        examples: &[Example],
        key: SampleKey,
        assigner: Option<&Assigner>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let example = &examples[key.index as usize];
        let at = batch.len();
        let size = batch.height * batch.width * 3;
        let out = &mut batch.images[at * size..][..size];
        let (placement, times) = self.fill(out, examples, key, assigner.is_some(), scratch)?;
        batch.decode_us += times.decode_us;
        batch.prepare_us += times.prepare_us;

        if let Some(assigner) = assigner {
            let clock = Instant::now();
            scratch.place_boxes(&self.preprocess, &placement);
            let anchors = assigner.num_anchors();
            let positives = assigner.assign_with(
                &mut scratch.assign,
                &scratch.boxes_yxyx_px,
                &scratch.classes,
                &mut batch.class_targets[at * anchors..][..anchors],
                &mut batch.box_targets[at * anchors * 4..][..anchors * 4],
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

    /// Decodes and places an example: as the training sample of its key, its objects in `scratch`, or for evaluation.
    fn fill(
        &self,
        out: &mut [f32],
        examples: &[Example],
        key: SampleKey,
        training: bool,
        scratch: &mut Scratch,
    ) -> Result<(Placement, Times)> {
        if !training || !self.augment.is_on(key.pass) {
            return self.place(out, (&examples[key.index as usize], key), training, scratch);
        }
        let mut times = Times::start();
        let image = self.decode(examples, key.index)?;
        times.decoded();
        let (sample, placement) = self.augment(examples, image, key)?;
        place_image(&self.preprocess, &sample.image, &placement, out);
        (scratch.boxes_yxyx_norm, scratch.sample_classes) = (sample.boxes_yxyx_norm, sample.classes);
        times.prepared();
        Ok((placement, times))
    }

    /// [`Self::fill`] where nothing but the placement changes the pixels.
    ///
    /// The placement is known before the image is decoded, so that only what it shows need be.
    fn place(
        &self,
        out: &mut [f32],
        (example, key): (&Example, SampleKey),
        training: bool,
        scratch: &mut Scratch,
    ) -> Result<(Placement, Times)> {
        let config = &self.preprocess;
        let placement = |(width, height): (usize, usize)| match training {
            true => Placement::draw(config, height, width, self.seed, key.pass, key.index),
            false => Placement::evaluation(config, height, width),
        };
        let reduction = |(width, height): (usize, usize), placement: &Placement| match training {
            true if config.reduced_decode => {
                Reduction::leaving([(width, placement.scaled_width), (height, placement.scaled_height)])
            }
            _ => Reduction::NONE,
        };
        let mut times = Times::start();
        let kept = self.cached(example, key.index, &mut scratch.encoded)?;
        if kept.is_none() {
            (example.source).read_into(self.max_encoded_bytes, &mut scratch.encoded)?;
        }
        let opened = match kept.is_some() || self.decode.apply_orientation {
            true => None,
            false => scratch.jpeg.open(&scratch.encoded),
        };
        let fits = |&(width, height): &(usize, usize)| (width * height) as u64 <= self.decode.max_pixels;
        let decoded = opened.filter(fits).and_then(|size| {
            let placement = placement(size);
            let reduction = reduction(size, &placement);
            let region = scratch.placer.plan(config, size, &placement, reduction);
            scratch.jpeg.decode(&scratch.encoded, region, reduction)?;
            Some((size, placement))
        });
        let (size, placement) = match decoded {
            Some((size, placement)) => {
                self.check_size(example, (size.0 as u32, size.1 as u32))?;
                times.decoded();
                scratch.placer.place(config, &mut scratch.jpeg, out);
                (size, placement)
            }
            None => {
                let image = match kept {
                    Some(image) => image,
                    None => Arc::new(self.decode_bytes(example, &scratch.encoded)?),
                };
                times.decoded();
                let size = (image.width() as usize, image.height() as usize);
                let placement = placement(size);
                scratch.placer.plan(config, size, &placement, Reduction::NONE);
                scratch.placer.place(config, &mut &*image, out);
                (size, placement)
            }
        };
        times.prepared();
        if training {
            let (boxes, classes) = (&mut scratch.boxes_yxyx_norm, &mut scratch.sample_classes);
            self.objects(example, size, boxes, classes)?;
        }
        Ok((placement, times))
    }

    /// What the network sees of a training sample.
    ///
    /// # Errors
    /// Those of [`Self::append`].
    pub fn training_view(&self, examples: &[Example], key: SampleKey) -> Result<TrainingView> {
        let size = self.preprocess.image_size;
        let mut pixels = vec![0.0; size.height * size.width * 3];
        let mut scratch = Scratch::default();
        let (placement, _) = self.fill(&mut pixels, examples, key, true, &mut scratch)?;
        scratch.place_boxes(&self.preprocess, &placement);
        Ok(TrainingView {
            pixels,
            boxes_yxyx_px: scratch.boxes_yxyx_px,
            classes: scratch.classes,
        })
    }

    fn augment(&self, examples: &[Example], image: RgbImage, key: SampleKey) -> Result<(Sample, Placement)> {
        let config = &self.preprocess;
        let sample = self.sample(&examples[key.index as usize], image)?;
        let load = |index: u64| {
            let example = &examples[index as usize];
            self.sample(example, self.decode(examples, index)?)
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
    fn decode(&self, examples: &[Example], index: u64) -> Result<RgbImage> {
        let example = &examples[index as usize];
        if let Some(image) = self.cached(example, index, &mut Vec::new())? {
            return Ok(RgbImage::clone(&image));
        }
        self.decode_bytes(example, &example.source.read_bytes(self.max_encoded_bytes)?)
    }

    /// The image of an example from the cache, decoded for it where it has room; none where it has not.
    fn cached(&self, example: &Example, index: u64, encoded: &mut Vec<u8>) -> Result<Option<Arc<RgbImage>>> {
        // Images are kept as they are stored: neither turned nor reduced.
        let as_stored = !self.decode.apply_orientation && !self.preprocess.reduced_decode;
        let Some(cache) = self.cache.as_ref().filter(|_| as_stored) else {
            return Ok(None);
        };
        let read = |encoded: &mut Vec<u8>| example.source.read_into(self.max_encoded_bytes, encoded);
        if cache.wants_bytes() {
            read(encoded)?;
        }
        if let Some(image) = cache.get(index, encoded) {
            self.check_size(example, image.dimensions())?;
            return Ok(Some(image));
        }
        if !cache.has_room((example.width, example.height)) {
            return Ok(None);
        }
        if !cache.wants_bytes() {
            read(encoded)?;
        }
        let image = Arc::new(self.decode_bytes(example, encoded)?);
        cache.put(index, encoded, &image);
        Ok(Some(image))
    }

    fn decode_bytes(&self, example: &Example, bytes: &[u8]) -> Result<RgbImage> {
        let image = decode_rgb(bytes, &self.decode).map_err(|reason| DataError::Image {
            file: example.file_name.clone(),
            reason,
        })?;
        self.check_size(example, image.dimensions())?;
        Ok(image)
    }

    fn check_size(&self, example: &Example, decoded: (u32, u32)) -> Result<()> {
        if !example.fits(decoded) {
            return Err(DataError::SizeMismatch {
                file: example.file_name.clone(),
                decoded,
                annotated: (example.width, example.height),
            });
        }
        Ok(())
    }

    /// An image with the objects that are trained on.
    fn sample(&self, example: &Example, image: RgbImage) -> Result<Sample> {
        let size = (image.width() as usize, image.height() as usize);
        let (mut boxes_yxyx_norm, mut classes) = (Vec::new(), Vec::new());
        self.objects(example, size, &mut boxes_yxyx_norm, &mut classes)?;
        Ok(Sample {
            image,
            boxes_yxyx_norm,
            classes,
        })
    }

    /// The objects that are trained on, in place of what the lists hold.
    fn objects(
        &self,
        example: &Example,
        (width, height): (usize, usize),
        boxes_yxyx_norm: &mut Vec<[f32; 4]>,
        classes: &mut Vec<i32>,
    ) -> Result<()> {
        let (height, width) = (height as f64, width as f64);
        boxes_yxyx_norm.clear();
        classes.clear();
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
        Ok(())
    }
}
