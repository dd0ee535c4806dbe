//! Where events go: DLLogger lines, TensorBoard event files, CSV tables, a page of curves.
//!
//! Every sink writes through at once, so a killed run leaves whole lines but for the last one. All are opened at the step that a run
//! starts or resumes from: tables, curves and DLLogger lines then take back the steps behind it, which the resumed run makes again;
//! TensorBoard is told to drop them.

mod csv;
mod curves;
mod dllogger;
mod tensorboard;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use csv::Csv;
pub use curves::Curves;
pub use dllogger::{DlLogger, DlLoggerConfig};
pub use tensorboard::TensorBoard;

use crate::error::TrainError;

/// A file that grows at its end; each write reaches the system at once.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Opens `path` to append, creating it and its folder.
    fn append(path: &Path) -> Result<Self, TrainError> {
        create_parent(path)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(failed(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        self.file.write_all(bytes).map_err(failed(&self.path))
    }

    /// Cuts the file to its first `length` bytes.
    fn truncate(&mut self, length: u64) -> Result<(), TrainError> {
        self.file.set_len(length).map_err(failed(&self.path))
    }
}

fn create_parent(path: &Path) -> Result<(), TrainError> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(failed(folder)),
        None => Ok(()),
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> TrainError {
    let path = path.display().to_string();
    move |source| TrainError::Log {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod testing {
    use effdet_metrics::{CocoSummary, Dataset, DetectionRow, EvalOptions, GroundTruth, evaluate};

    use crate::error::TrainError;
    use crate::events::{Event, EventSink, StepRecord};

    /// A step with recognisable numbers.
    pub fn record(step: u64) -> StepRecord {
        let x = step as f32;
        StepRecord {
            step,
            epoch: (step - 1) / 4,
            loss: 10.0 / x,
            det_loss: 9.0 / x,
            class_loss: 8.0 / x,
            box_loss: 0.1 / x,
            box_iou_loss: 0.0,
            l2_loss: 1.0 / x,
            learning_rate: 0.01 * x,
            gradient_norm: 2.0,
            raw_gradient_norm: 3.0,
            loss_scale: 1.0,
            seconds: 0.5,
            wait_s: 0.125,
            prepare_s: 0.75,
            images: 4,
        }
    }

    /// One object that is found: AP 1.
    pub fn summary() -> CocoSummary {
        let bbox_xywh_px = [10.0, 10.0, 40.0, 50.0];
        let truth = [GroundTruth {
            id: 1,
            image_id: 1,
            category_id: 1,
            bbox_xywh_px,
            area: 2000.0,
            iscrowd: false,
            ignore: false,
        }];
        let found = [DetectionRow {
            image_id: 1,
            category_id: 1,
            bbox_xywh_px,
            score: 0.9,
        }];
        let dataset = Dataset {
            image_ids: &[1],
            category_ids: &[1],
            ground_truth: &truth,
        };
        evaluate(&dataset, &found, &EvalOptions::default()).unwrap()
    }

    /// Feeds `sink` the steps `first..=last` of a run of 8 steps in epochs of 4, evaluated after each epoch.
    pub fn feed(sink: &mut dyn EventSink, first: u64, last: u64) -> Result<(), TrainError> {
        let summary = summary();
        sink.event(&Event::Started {
            step: first - 1,
            total_steps: 8,
            steps_per_epoch: 4,
        })?;
        for step in first..=last {
            sink.event(&Event::Step(record(step)))?;
            if step.is_multiple_of(4) {
                sink.event(&Event::Evaluated {
                    step,
                    epoch: step / 4,
                    summary: &summary,
                })?;
            }
        }
        sink.event(&Event::Finished {
            step: last,
            images_per_second: 8.0,
            elapsed_s: 4.0,
        })
    }
}
