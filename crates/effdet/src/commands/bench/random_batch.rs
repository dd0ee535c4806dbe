//! The fixed batch that steps are timed on.

use anyhow::Result;
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::engine::{ImageBatch, Targets, TrainBatch};
use effdet_model::loss::normalizer;
use effdet_model::network::Network;
use effdet_model::rng::{Draws, Purpose};

/// Objects per image, about COCO's mean.
const OBJECTS_PER_IMAGE: usize = 8;

/// A batch of noise with boxes of every size.
pub struct RandomBatch {
    pixels: Vec<f32>,
    class_targets: Vec<i32>,
    box_targets: Vec<f32>,
    positives: usize,
    draw_keys: Vec<u64>,
    height: usize,
    width: usize,
}

impl RandomBatch {
    /// `images` images at the network's size.
    pub fn new(network: &Network, images: usize) -> Result<Self> {
        let hparams = &network.hparams;
        let (height, width) = (hparams.image_size.height, hparams.image_size.width);
        let anchors = Anchors::new(&AnchorConfig::from(hparams))?;
        let assigner = Assigner::new(&anchors);
        let mut batch = Self {
            pixels: Vec::with_capacity(images * height * width * 3),
            class_targets: vec![0; images * anchors.len()],
            box_targets: vec![0.0; images * anchors.len() * 4],
            positives: 0,
            draw_keys: (0..images as u64).collect(),
            height,
            width,
        };
        for image in 0..images {
            let mut draws = Draws::new(0, Purpose::Synthetic, 0, image as u64);
            (batch.pixels).extend((0..height * width * 3).map(|_| draws.normal() as f32));
            let mut side = |extent: usize| {
                let extent = extent as f32;
                let length = extent * draws.range(0.05, 0.6);
                let start = (extent - length) * draws.uniform();
                (start, start + length)
            };
            let boxes: Vec<[f32; 4]> = (0..OBJECTS_PER_IMAGE)
                .map(|_| {
                    let ((top, bottom), (left, right)) = (side(height), side(width));
                    [top, left, bottom, right]
                })
                .collect();
            let classes: Vec<i32> = (0..OBJECTS_PER_IMAGE)
                .map(|object| (object % hparams.num_classes) as i32)
                .collect();
            let rows = image * anchors.len()..(image + 1) * anchors.len();
            batch.positives += assigner.assign(
                &boxes,
                &classes,
                &mut batch.class_targets[rows.clone()],
                &mut batch.box_targets[rows.start * 4..rows.end * 4],
            );
        }
        Ok(batch)
    }

    /// Bytes of pixels and targets.
    pub fn bytes(&self) -> usize {
        4 * (self.pixels.len() + self.class_targets.len() + self.box_targets.len())
    }

    /// The inputs.
    pub fn images(&self) -> ImageBatch<'_> {
        ImageBatch {
            pixels: &self.pixels,
            batch: self.draw_keys.len(),
            height: self.height,
            width: self.width,
        }
    }

    /// Inputs and targets.
    pub fn training(&self) -> TrainBatch<'_> {
        TrainBatch {
            images: self.images(),
            targets: Targets {
                class_targets: &self.class_targets,
                box_targets: &self.box_targets,
                normalizer: normalizer(self.positives),
            },
            draw_keys: &self.draw_keys,
        }
    }
}
