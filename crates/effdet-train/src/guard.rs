//! Watches a run for numbers that are none: where they began, the batch that brought them, and jumps of loss and gradients.

use std::collections::BTreeMap;

use effdet_ckpt::{CkptError, encode_tensors};
use effdet_data::batch::Batch;
use effdet_model::engine::{Engine, EngineError, Mode};
use effdet_model::network::{VariableKind, VariableTable};
use effdet_model::weights::Weights;
use serde::{Deserialize, Serialize};

/// What happens when a loss, a gradient or a statistic is no number. The step is never taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnNonFinite {
    /// Save the state before the step and end the run.
    #[default]
    Stop,
    /// Leave the batch out; the schedule does not advance.
    SkipStep,
    /// Go back to the newest checkpoint and on behind the batch.
    Rewind,
}

/// Steps that may be skipped one after the other, and rewinds without a step beyond, before the run ends nevertheless.
pub const MAX_SKIPS: u32 = 10;
/// See [`MAX_SKIPS`].
pub const MAX_REWINDS: u32 = 3;

/// A step that was not taken.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// Updates before it.
    pub step: u64,
    /// What was looked at: the loss, the gradient norm, a statistic.
    pub what: &'static str,
    /// Its value.
    pub value: f32,
    /// The first place where it went wrong, as far as it can be told.
    pub place: String,
    /// Image ids of the step, of all ranks.
    pub images: Vec<i64>,
    /// Position of the stream of samples behind the step.
    pub end_position: u64,
    /// The batch as the bytes of a safetensors file, for replay.
    pub batch: Vec<u8>,
}

/// Whether all values are finite.
pub fn all_finite(values: &[f32]) -> bool {
    // Eight sums side by side, which the compiler makes one vector of.
    let mut sums = [0.0f32; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            // Zero for every number, NaN for everything else.
            *sum += value * 0.0;
        }
    }
    sums.iter().chain(rest).all(|value| value.is_finite())
}

/// The first place of a training step where a value is not finite, in the order in which values are made.
///
/// `weights` are those before the step, `gradients` those of it.
///
/// # Errors
/// Those of the engine.
pub fn first_non_finite(
    engine: &mut dyn Engine,
    table: &VariableTable,
    weights: &Weights,
    batch: &Batch,
    gradients: &[f32],
) -> Result<String, EngineError> {
    let images_with = |values: &[f32]| -> Vec<i64> {
        let per_image = (values.len() / batch.len().max(1)).max(1);
        let found = values.chunks(per_image).zip(&batch.image_ids);
        found
            .filter(|(values, _)| !all_finite(values))
            .map(|(_, &id)| id)
            .collect()
    };
    for (what, values) in [("pixels", &batch.images), ("box targets", &batch.box_targets)] {
        let images = images_with(values);
        if !images.is_empty() {
            return Ok(format!("the {what} of the images {images:?}"));
        }
    }
    for variable in table {
        if !all_finite(weights.slice(variable.kind, variable.range())) {
            return Ok(format!("the weights, {}", variable.name));
        }
    }
    let mut first = None;
    engine.trace(
        weights,
        &batch.image_batch(),
        Mode::Train,
        &mut |name, shape, values| {
            if first.is_none() && !all_finite(values) {
                let of_images = match shape.first() == Some(&batch.len()) {
                    true => format!(", images {:?}", images_with(values)),
                    false => String::new(),
                };
                first = Some(format!("the forward pass, output {name}{of_images}"));
            }
        },
    )?;
    // Gradients are made from the end of the network to its beginning.
    let gradient = || {
        let trainable = table.iter().filter(|v| v.kind == VariableKind::Trainable);
        let of = trainable.rev().find(|v| !all_finite(&gradients[v.range()]));
        of.map(|variable| format!("the backward pass, gradient of {}", variable.name))
    };
    Ok(first
        .or_else(gradient)
        .unwrap_or_else(|| "the loss: every output and gradient is finite".to_owned()))
}

/// A batch as the bytes of a safetensors file, with what a replay needs as notes.
///
/// # Errors
/// [`CkptError::InvalidState`].
pub fn encode_batch(batch: &Batch, step: u64, place: &str) -> Result<Vec<u8>, CkptError> {
    let (n, anchors) = (batch.len(), batch.class_targets.len() / batch.len().max(1));
    let classes: Vec<f32> = batch.class_targets.iter().map(|&class| class as f32).collect();
    let numbers = |values: Vec<String>| values.join(" ");
    let notes = BTreeMap::from([
        ("step".to_owned(), step.to_string()),
        ("place".to_owned(), place.to_owned()),
        (
            "image_ids".to_owned(),
            numbers(batch.image_ids.iter().map(i64::to_string).collect()),
        ),
        (
            "draw_keys".to_owned(),
            numbers(batch.draw_keys.iter().map(u64::to_string).collect()),
        ),
        (
            "positives".to_owned(),
            numbers(batch.positives.iter().map(usize::to_string).collect()),
        ),
    ]);
    encode_tensors(
        &[
            ("pixels", &[n, batch.height, batch.width, 3], &batch.images),
            ("class_targets", &[n, anchors], &classes),
            ("box_targets", &[n, anchors, 4], &batch.box_targets),
        ],
        notes,
    )
}

/// Steps before jumps are reported.
const SPIKE_WARM_UP: u32 = 50;
/// Weight of the newest step in the moving mean and variance.
const SPIKE_RATE: f64 = 0.02;
/// Standard deviations from the mean that are worth a warning.
const SPIKE_Z: f64 = 8.0;

/// Reports values that jump out of their moving mean and variance.
#[derive(Debug)]
pub struct SpikeWatch {
    name: &'static str,
    mean: f64,
    variance: f64,
    seen: u32,
}

impl SpikeWatch {
    /// Watches values called `name`.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            mean: 0.0,
            variance: 0.0,
            seen: 0,
        }
    }

    /// Takes the next value; a message when it jumps.
    pub fn see(&mut self, step: u64, value: f32) -> Option<String> {
        let value = f64::from(value);
        let deviation = value - self.mean;
        let z = deviation / self.variance.sqrt();
        self.seen += 1;
        // The first values weigh as in a plain mean.
        let rate = SPIKE_RATE.max(1.0 / f64::from(self.seen));
        self.mean += rate * deviation;
        self.variance = (1.0 - rate) * (self.variance + rate * deviation * deviation);
        let jumps = self.seen > SPIKE_WARM_UP && z > SPIKE_Z && z.is_finite();
        jumps.then(|| {
            format!(
                "step {step}: {} is {value:.4}, {z:.0} standard deviations above its mean of {:.4}",
                self.name,
                value - deviation
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_no_number_is_found_wherever_it_stands() {
        for len in [1, 7, 8, 9, 40] {
            let mut values = vec![f32::MAX; len];
            assert!(all_finite(&values));
            for at in 0..len {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let kept = std::mem::replace(&mut values[at], bad);
                    assert!(!all_finite(&values), "{bad} at {at} of {len}");
                    values[at] = kept;
                }
            }
        }
        assert!(all_finite(&[]));
    }

    #[test]
    fn a_jump_is_reported_and_noise_and_the_first_steps_are_not() {
        let mut watch = SpikeWatch::new("the loss");
        assert_eq!(watch.see(1, 40.0), None);
        for step in 2..400 {
            let noise = (step * 7919 % 100) as f32 / 100.0;
            assert_eq!(watch.see(step, 2.0 + noise), None, "step {step}");
        }
        let message = watch.see(400, 30.0).unwrap();
        assert!(
            message.contains("step 400") && message.contains("the loss is 30.0"),
            "{message}"
        );
    }
}
