//! One stream of events, many sinks.

use std::fmt;

use effdet_metrics::CocoSummary;

use crate::error::TrainError;

/// What happens in a run.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    /// Before the first step.
    Started {
        /// Updates done before, when resumed.
        step: u64,
        /// Updates of the whole run.
        total_steps: u64,
        /// Updates per epoch.
        steps_per_epoch: u64,
    },
    /// After each update.
    Step(StepRecord),
    /// An evaluation is under way.
    Evaluating {
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
    },
    /// After an evaluation.
    Evaluated {
        /// Updates done.
        step: u64,
        /// Epochs done.
        epoch: u64,
        /// The COCO numbers.
        summary: &'a CocoSummary,
    },
    /// A checkpoint is on disk.
    Saved {
        /// Updates done.
        step: u64,
        /// Its directory.
        path: &'a std::path::Path,
    },
    /// The loss scale changed: it doubled after many clean steps, or gradients overflowed and the update was skipped.
    LossScaled {
        /// Steps done.
        step: u64,
        /// From the next step on.
        scale: f32,
        /// Until then.
        before: f32,
        /// Updates skipped since the start of training.
        skipped_steps: u64,
    },
    /// Something worth knowing.
    Warning(String),
    /// After the last step.
    Finished {
        /// Updates done.
        step: u64,
        /// Images per second over the run, the first tenth left out.
        images_per_second: f64,
        /// Seconds since the start of the run.
        elapsed_s: f64,
    },
}

/// One update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Updates done, this one included.
    pub step: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Total loss, L2 included.
    pub loss: f32,
    /// Detection loss.
    pub det_loss: f32,
    /// Class loss.
    pub class_loss: f32,
    /// Box loss, unweighted.
    pub box_loss: f32,
    /// IoU loss.
    pub box_iou_loss: f32,
    /// L2 term.
    pub l2_loss: f32,
    /// Learning rate.
    pub learning_rate: f32,
    /// Gradient norm after clipping.
    pub gradient_norm: f32,
    /// Gradient norm before clipping.
    pub raw_gradient_norm: f32,
    /// Factor of the gradients on their way through the network; 1 without loss scaling.
    pub loss_scale: f32,
    /// Seconds of the whole step, data included.
    pub seconds: f64,
    /// Seconds spent waiting for data.
    pub wait_s: f64,
    /// Seconds that the loader's threads took for the images of this rank, all threads together.
    pub prepare_s: f64,
    /// Images of the step, those of all ranks together.
    pub images: usize,
}

/// How the loader keeps up with the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DataTime {
    /// Seconds of the steps, data included.
    pub seconds: f64,
    /// Seconds of them spent waiting for data.
    pub wait_s: f64,
    /// Seconds that the loader's threads took, all threads together.
    pub prepare_s: f64,
}

/// Share of waiting from which on more cores are worth a word.
const WORTH_CORES: f64 = 0.05;

impl DataTime {
    /// Adds a step.
    pub fn add(&mut self, record: &StepRecord) {
        self.seconds += record.seconds;
        self.wait_s += record.wait_s;
        self.prepare_s += record.prepare_s;
    }

    /// Share of the time that is spent waiting for data.
    pub fn waiting(&self) -> f64 {
        self.wait_s / self.seconds.max(1e-9)
    }

    /// Cores that prepare as fast as the steps compute, beside those that compute: `⌈prepare / (seconds − wait)⌉`, at least 1.
    pub fn loader_cores(&self) -> u64 {
        let compute_s = (self.seconds - self.wait_s).max(1e-9);
        ((self.prepare_s / compute_s).ceil() as u64).max(1)
    }
}

impl fmt::Display for DataTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "waiting {:.0} %", 100.0 * self.waiting())?;
        if self.waiting() >= WORTH_CORES && self.prepare_s > 0.0 {
            let cores = self.loader_cores();
            let plural = if cores == 1 { "" } else { "s" };
            write!(f, " ({cores} loader core{plural} would end it)")?;
        }
        Ok(())
    }
}

/// Receives events in order.
pub trait EventSink {
    /// Takes one event.
    ///
    /// # Errors
    /// A log that cannot be written stops the run.
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cores_that_end_the_waiting_prepare_a_step_while_one_is_computed() {
        // A step computes for 0.25 s; its images take a thread 0.6 s.
        let slow = DataTime {
            seconds: 0.6,
            wait_s: 0.35,
            prepare_s: 0.6,
        };
        assert_eq!(slow.loader_cores(), 3);
        assert_eq!(slow.to_string(), "waiting 58 % (3 loader cores would end it)");
        let fast = DataTime {
            seconds: 1.0,
            wait_s: 0.01,
            prepare_s: 0.5,
        };
        assert_eq!(
            (fast.loader_cores(), fast.to_string()),
            (1, "waiting 1 %".to_owned())
        );
        assert_eq!(DataTime::default().to_string(), "waiting 0 %");
        let on_the_training_thread = DataTime {
            seconds: 0.5,
            wait_s: 0.1,
            prepare_s: 0.1,
        };
        assert_eq!(
            on_the_training_thread.to_string(),
            "waiting 20 % (1 loader core would end it)"
        );
    }
}
