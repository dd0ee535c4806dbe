//! A trained network that finds objects in decoded images.

use std::sync::Arc;

use anyhow::Result;
use effdet_data::preprocess::{Placement, PreprocessConfig, place_image};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::detect::{Detection, postprocess_evaluation, postprocess_global};
use effdet_model::engine::{Engine, HeadOutputs, ImageBatch};
use effdet_model::hparams::{NmsConfigs, NmsMethod};
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use image::RgbImage;

use crate::draw::{Annotation, draw};

/// Network, weights and post-processing as they serve.
pub struct Detector<'a> {
    engine: &'a mut dyn Engine,
    weights: &'a Weights,
    anchors: Anchors,
    preprocess: PreprocessConfig,
    nms: NmsConfigs,
    pixels: Vec<f32>,
    outputs: HeadOutputs,
}

impl<'a> Detector<'a> {
    /// A detector of `network`'s hyper-parameters but with the suppression of `nms`: class-agnostic as the reference serves for the
    /// methods hard and gaussian, per class as it evaluates for linear and diou.
    pub fn new(
        engine: &'a mut dyn Engine,
        network: &Arc<Network>,
        weights: &'a Weights,
        nms: NmsConfigs,
    ) -> Result<Self> {
        let size = network.hparams.image_size;
        Ok(Self {
            engine,
            weights,
            anchors: Anchors::new(&AnchorConfig::from(&network.hparams))?,
            preprocess: PreprocessConfig::new(&network.hparams),
            nms,
            pixels: vec![0.0; size.height * size.width * 3],
            outputs: HeadOutputs::default(),
        })
    }

    /// Detections scoring above `score_threshold` in pixels of `image`, best first.
    pub fn detect(&mut self, image: &RgbImage, score_threshold: f32) -> Result<Vec<Detection>> {
        let (height, width) = (image.height() as usize, image.width() as usize);
        let placement = Placement::evaluation(&self.preprocess, height, width);
        place_image(&self.preprocess, image, &placement, &mut self.pixels);
        let images = ImageBatch {
            pixels: &self.pixels,
            batch: 1,
            height: self.preprocess.image_size.height,
            width: self.preprocess.image_size.width,
        };
        self.engine.infer(self.weights, &images, &mut self.outputs)?;
        let scale = 1.0 / placement.scale;
        let (outputs, anchors, nms) = (&self.outputs, &self.anchors, &self.nms);
        let mut detections = match nms.method {
            NmsMethod::Hard | NmsMethod::Gaussian => postprocess_global(outputs, 0, anchors, nms, scale)?,
            // Methods that the serving path does not know.
            NmsMethod::Linear | NmsMethod::Diou => postprocess_evaluation(outputs, 0, anchors, nms, scale)?,
        };
        detections.retain(|detection| detection.score > score_threshold);
        for detection in &mut detections {
            // The network input is padded, so a box clipped to it may still leave the image.
            let [ymin, xmin, ymax, xmax] = detection.box_yxyx_px;
            let (bottom, right) = (height as f32, width as f32);
            detection.box_yxyx_px = [
                ymin.min(bottom),
                xmin.min(right),
                ymax.min(bottom),
                xmax.min(right),
            ];
        }
        Ok(detections)
    }
}

/// Draws detections with `name: NN%`.
pub fn annotate(image: &mut RgbImage, detections: &[Detection], label_map: &LabelMap, line_thickness: u32) {
    let annotations: Vec<Annotation> = detections
        .iter()
        .map(|detection| {
            let id = label_map.category_id(detection.class);
            let name = label_map.class_name(detection.class).unwrap_or("N/A");
            Annotation {
                box_yxyx_px: detection.box_yxyx_px,
                label: format!("{name}: {}%", (100.0 * detection.score) as u32),
                category: id.map_or(0, |id| id.0),
            }
        })
        .collect();
    draw(image, &annotations, line_thickness);
}
