//! The reference behind the engine trait.

use std::marker::PhantomData;
use std::sync::Arc;

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::engine::{
    Engine, EngineError, HeadOutputs, ImageBatch, LevelOutput, Mode, StepLosses, StepOptions, TraceSink,
    TrainBatch,
};
use effdet_model::loss::{self, HeadGradients, HeadSlices, LossConfig};
use effdet_model::network::{MapSize, Network};
use effdet_model::weights::Weights;

use super::network::{self, Forward, Pass};
use super::{DrawKeys, Float, Parameters, Tape, Tensor, Value};

/// Runs a network by the plain reference, computing in `F`.
///
/// Losses and the gradients of the head outputs come from [`effdet_model::loss`], which takes f32; everything else stays in
/// `F` until the results are rounded to the f32 of the trait.
#[derive(Debug)]
pub struct ReferenceEngine<F> {
    network: Arc<Network>,
    anchors: Anchors,
    number: PhantomData<F>,
}

impl<F: Float> ReferenceEngine<F> {
    /// An engine for one network.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] when the network has no valid anchors.
    pub fn new(network: Arc<Network>) -> Result<Self, EngineError> {
        let anchors = Anchors::new(&AnchorConfig::from(&network.hparams)).map_err(|error| {
            EngineError::Unsupported {
                feature: error.to_string(),
                remedy: "change the hyper-parameters of the anchors",
            }
        })?;
        Ok(Self {
            network,
            anchors,
            number: PhantomData,
        })
    }

    fn check(&self, weights: &Weights, images: &ImageBatch<'_>) -> Result<(), EngineError> {
        let table = &self.network.variables;
        let remedy = "use the weights of the network that the engine was made for";
        expect(
            "trainable weights",
            weights.trainable.len(),
            table.trainable_len(),
            remedy,
        )?;
        expect(
            "moving statistics",
            weights.statistics.len(),
            table.statistics_len(),
            remedy,
        )?;
        let size = self.network.hparams.image_size;
        images.check(size.height, size.width)
    }

    fn check_training(&self, batch: &TrainBatch<'_>, gradients: &[f32]) -> Result<(), EngineError> {
        let rows = batch.images.batch * self.anchors.len();
        let remedy = "pass targets for every anchor of every image";
        expect("class targets", batch.targets.class_targets.len(), rows, remedy)?;
        expect("box targets", batch.targets.box_targets.len(), 4 * rows, remedy)?;
        expect(
            "draw keys",
            batch.draw_keys.len(),
            batch.images.batch,
            "pass one key per image",
        )?;
        let trainable = self.network.variables.trainable_len();
        expect(
            "gradients",
            gradients.len(),
            trainable,
            "pass a buffer as long as the trainable weights",
        )
    }

    /// Values of a head in the order of anchors: `[batch, anchors, values per anchor]`.
    fn flatten(tape: &Tape<'_, F>, levels: &[Value], batch: usize) -> Vec<f32> {
        let images = (0..batch).flat_map(|image| levels.iter().map(move |&level| (image, level)));
        images
            .flat_map(|(image, level)| image_values(tape.value(level), image))
            .map(|x| x.to_f32())
            .collect()
    }

    /// The way back of [`flatten`](Self::flatten): one gradient tensor per level.
    fn unflatten(tape: &Tape<'_, F>, levels: &[Value], flat: &[f32]) -> Vec<(Value, Tensor<F>)> {
        let mut gradients: Vec<_> = levels
            .iter()
            .map(|&level| (level, tape.value(level).zeros_like()))
            .collect();
        let mut rest = flat.iter();
        for image in 0..gradients[0].1.batch {
            for (_, gradient) in &mut gradients {
                let values = gradient.map.cells() * gradient.channels;
                let image = &mut gradient.data[image * values..][..values];
                image
                    .iter_mut()
                    .zip(&mut rest)
                    .for_each(|(to, &from)| *to = F::from_f32(from));
            }
        }
        gradients
    }
}

impl<F: Float> Engine for ReferenceEngine<F> {
    fn train_step(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &mut [f32],
    ) -> Result<StepLosses, EngineError> {
        self.check(weights, &batch.images)?;
        self.check_training(batch, gradients)?;
        if options.sync.is_some() {
            return Err(EngineError::Unsupported {
                feature: "batch norm over several ranks".into(),
                remedy: "use the fast engine, or one rank",
            });
        }
        let parameters = Parameters::<F>::from(&*weights);
        let mut tape = Tape::new(&self.network, &parameters);
        let keys = DrawKeys {
            seed: options.seed,
            epoch: options.epoch,
            images: batch.draw_keys,
        };
        let pass = Pass::Train(Some(keys));
        let outputs = network::forward(&mut tape, &self.network, image_tensor(&batch.images), pass);

        let class_logits = Self::flatten(&tape, &outputs.class_logits, batch.images.batch);
        let box_codes = Self::flatten(&tape, &outputs.box_codes, batch.images.batch);
        let (mut dclass, mut dbox) = (vec![0.0; class_logits.len()], vec![0.0; box_codes.len()]);
        let losses = loss::detection_loss(
            &LossConfig::from(&self.network.hparams),
            &self.anchors,
            &HeadSlices {
                class_logits: &class_logits,
                box_codes: &box_codes,
                num_classes: self.network.hparams.num_classes,
            },
            &batch.targets,
            Some(HeadGradients {
                class_logits: &mut dclass,
                box_codes: &mut dbox,
            }),
        )?;

        for gradient in dclass.iter_mut().chain(&mut dbox) {
            *gradient *= options.loss_scale;
        }
        let mut seeds = Self::unflatten(&tape, &outputs.class_logits, &dclass);
        seeds.extend(Self::unflatten(&tape, &outputs.box_codes, &dbox));
        round_into(&tape.backward(seeds), gradients);
        round_into(&tape.moved_statistics(), &mut weights.statistics);
        Ok(losses)
    }

    fn infer(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        outputs: &mut HeadOutputs,
    ) -> Result<(), EngineError> {
        self.check(weights, images)?;
        let parameters = Parameters::<F>::from(weights);
        let mut tape = Tape::new(&self.network, &parameters);
        let Forward {
            class_logits,
            box_codes,
            ..
        } = network::forward(&mut tape, &self.network, image_tensor(images), Pass::Infer);
        outputs.batch = images.batch;
        outputs.levels = (class_logits.iter().zip(&box_codes))
            .map(|(&class_logits, &box_codes)| {
                let MapSize { height, width } = tape.value(class_logits).map;
                let [class_logits, box_codes] =
                    [class_logits, box_codes].map(|value| rounded(tape.value(value)));
                LevelOutput {
                    height,
                    width,
                    class_logits,
                    box_codes,
                }
            })
            .collect();
        Ok(())
    }

    /// Hands over the names of [`Forward::named`]. Nothing is dropped in training mode, there are no keys to draw by.
    fn trace(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        mode: Mode,
        sink: &mut TraceSink<'_>,
    ) -> Result<(), EngineError> {
        self.check(weights, images)?;
        let parameters = Parameters::<F>::from(weights);
        let mut tape = Tape::new(&self.network, &parameters);
        let pass = match mode {
            Mode::Train => Pass::Train(None),
            Mode::Infer => Pass::Infer,
        };
        let outputs = network::forward(&mut tape, &self.network, image_tensor(images), pass);
        for (name, value) in &outputs.named {
            let tensor = tape.value(*value);
            sink(name, &tensor.shape(), &rounded(tensor));
        }
        Ok(())
    }
}

fn expect(
    what: &'static str,
    actual: usize,
    expected: usize,
    remedy: &'static str,
) -> Result<(), EngineError> {
    if actual == expected {
        Ok(())
    } else {
        Err(EngineError::Shape {
            what,
            actual,
            expected,
            remedy,
        })
    }
}

fn image_tensor<F: Float>(images: &ImageBatch<'_>) -> Tensor<F> {
    Tensor {
        batch: images.batch,
        map: MapSize {
            height: images.height,
            width: images.width,
        },
        channels: 3,
        data: images.pixels.iter().map(|&value| F::from_f32(value)).collect(),
    }
}

fn image_values<F: Float>(tensor: &Tensor<F>, image: usize) -> impl Iterator<Item = F> {
    let values = tensor.map.cells() * tensor.channels;
    tensor.data[image * values..][..values].iter().copied()
}

fn rounded<F: Float>(tensor: &Tensor<F>) -> Vec<f32> {
    tensor.data.iter().map(|x| x.to_f32()).collect()
}

fn round_into<F: Float>(from: &[F], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
}

#[cfg(test)]
mod tests {
    use effdet_model::engine::Targets;
    use effdet_model::hparams::{HParams, ImageSize};

    use super::super::ops::gradient_check::noise;
    use super::*;

    const SIDE: usize = 64;

    fn small() -> Arc<Network> {
        let mut hparams = HParams::preset("efficientdet-d0").unwrap();
        hparams.image_size = ImageSize::square(SIDE);
        hparams.num_classes = 2;
        Arc::new(Network::new(&hparams).unwrap())
    }

    fn pixels(batch: usize) -> Vec<f32> {
        noise(0, batch * SIDE * SIDE * 3)
            .into_iter()
            .map(|x| x as f32)
            .collect()
    }

    fn images(pixels: &[f32]) -> ImageBatch<'_> {
        let batch = pixels.len() / (SIDE * SIDE * 3);
        ImageBatch {
            pixels,
            batch,
            height: SIDE,
            width: SIDE,
        }
    }

    #[test]
    fn an_image_is_inferred_as_if_it_were_alone() {
        let network = small();
        let weights = Weights::init(&network.variables, 1);
        let mut engine = ReferenceEngine::<f32>::new(network).unwrap();
        let pixels = pixels(2);
        let mut infer = |pixels: &[f32]| {
            let mut outputs = HeadOutputs::default();
            engine.infer(&weights, &images(pixels), &mut outputs).unwrap();
            outputs
        };
        let (both, second) = (infer(&pixels), infer(&pixels[pixels.len() / 2..]));
        for (both, second) in both.levels.iter().zip(&second.levels) {
            assert_eq!(
                both.class_logits[both.class_logits.len() / 2..],
                second.class_logits
            );
            assert_eq!(both.box_codes[both.box_codes.len() / 2..], second.box_codes);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let network = small();
        let mut weights = Weights::init(&network.variables, 1);
        let before = weights.clone();
        let (anchors, trainable) = (network.num_anchors(), network.variables.trainable_len());
        let mut engine = ReferenceEngine::<f32>::new(network).unwrap();
        let pixels = pixels(1);
        let mut step = |class_targets: &[i32], draw_keys: &[u64], gradients: usize| {
            let box_targets = vec![0.0; 4 * anchors];
            let targets = Targets {
                class_targets,
                box_targets: &box_targets,
                normalizer: 1.0,
            };
            let batch = TrainBatch {
                images: images(&pixels),
                targets,
                draw_keys,
            };
            let mut gradients = vec![7.0; gradients];
            let result = engine.train_step(&mut weights, &batch, &StepOptions::default(), &mut gradients);
            let untouched = gradients.iter().all(|&gradient| gradient == 7.0) && weights == before;
            (result.unwrap_err(), untouched)
        };

        let background = vec![-1; anchors];
        let mut unknown_class = background.clone();
        unknown_class[5] = 2;
        for (class_targets, keys, gradients, what) in [
            (&background[1..], &[0][..], trainable, "class targets"),
            (&background[..], &[], trainable, "draw keys"),
            (&background[..], &[0], trainable - 1, "gradients"),
        ] {
            let (error, untouched) = step(class_targets, keys, gradients);
            assert!(
                matches!(error, EngineError::Shape { what: name, .. } if name == what),
                "{what}: {error}"
            );
            assert!(untouched, "{what}");
        }
        let (error, untouched) = step(&unknown_class, &[0], trainable);
        assert!(matches!(error, EngineError::Targets(_)), "{error}");
        assert!(untouched);
    }
}
