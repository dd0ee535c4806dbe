//! TensorBoard event files: records of `tensorflow.Event` with masked CRC32C framing.
//!
//! ```text
//! <folder>/events.out.tfevents.*              every logged step: losses, learning_rate, gradient_norm, examples/sec …
//! <folder>/train/events.out.tfevents.*        every epoch: the mean of each loss, as epoch_<name>
//! <folder>/validation/events.out.tfevents.*   every evaluation: the twelve COCO numbers
//! ```
//!
//! Source: `tensorflow/core/util/event.proto` and `tensorflow/core/framework/summary.proto`.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use effdet_data::tfrecord::framing::write_record;
use prost::Message;

use super::{LogFile, failed};
use crate::error::TrainError;
use crate::events::{DataTime, Event, EventSink, StepRecord};

/// First record of every event file.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.status`: readers drop what earlier files of the folder hold from this event's step on.
const SESSION_START: i32 = 1;
/// Event files that one folder may get in one second.
const MAX_FILES_PER_SECOND: u32 = 1000;

#[derive(Clone, PartialEq, Message)]
struct EventMessage {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Writes the event files of a run.
#[derive(Debug)]
pub struct TensorBoard {
    steps: EventFile,
    train: EventFile,
    validation: EventFile,
    log_steps: u64,
    steps_per_epoch: u64,
    /// Since the last logged step: steps, images, how the loader kept up.
    pending: (u64, f64, DataTime),
    /// Sums of the epoch's losses and the steps in them.
    epoch: ([f64; LOSSES.len()], u64),
}

/// A quantity of a step: its tag and where it comes from.
type Scalar = (&'static str, fn(&StepRecord) -> f32);

/// Losses by the names of the reference.
const LOSSES: [Scalar; 6] = [
    ("loss", |r| r.loss),
    ("det_loss", |r| r.det_loss),
    ("cls_loss", |r| r.class_loss),
    ("box_loss", |r| r.box_loss),
    ("box_iou_loss", |r| r.box_iou_loss),
    ("reg_l2_loss", |r| r.l2_loss),
];

impl TensorBoard {
    /// Opens new event files in `folder` for the steps behind `step`, logging every `log_steps` of them.
    ///
    /// TensorBoard drops what earlier files of the folder hold for later steps.
    ///
    /// # Errors
    /// [`TrainError::Log`].
    pub fn open(folder: &Path, step: u64, log_steps: u64) -> Result<Self, TrainError> {
        Ok(Self {
            steps: EventFile::create(folder, step)?,
            // The steps of this one are epochs; `Started` says how long they are.
            train: EventFile::create(&folder.join("train"), 0)?,
            validation: EventFile::create(&folder.join("validation"), step)?,
            log_steps: log_steps.max(1),
            steps_per_epoch: 1,
            pending: (0, 0.0, DataTime::default()),
            epoch: ([0.0; LOSSES.len()], 0),
        })
    }

    fn log_step(&mut self, record: &StepRecord) -> Result<(), TrainError> {
        self.pending.0 += 1;
        self.pending.1 += record.images as f64;
        self.pending.2.add(record);
        if self.pending.0 < self.log_steps {
            return Ok(());
        }
        let (steps, images, data) = std::mem::take(&mut self.pending);
        let seconds = data.seconds.max(1e-9);
        let mut scalars: Vec<(String, f64)> = LOSSES
            .iter()
            .map(|(name, pick)| ((*name).to_owned(), f64::from(pick(record))))
            .collect();
        for (name, value) in [
            ("learning_rate", f64::from(record.learning_rate)),
            ("gradient_norm", f64::from(record.gradient_norm)),
            ("loss_scale", f64::from(record.loss_scale)),
            ("global_step/sec", steps as f64 / seconds),
            ("examples/sec", images / seconds),
            ("data_wait_share", data.waiting()),
            ("loader_cores_needed", data.loader_cores() as f64),
        ] {
            scalars.push((name.to_owned(), value));
        }
        self.steps.scalars(record.step, scalars)
    }

    fn log_epoch(&mut self, record: &StepRecord) -> Result<(), TrainError> {
        for (sum, (_, pick)) in self.epoch.0.iter_mut().zip(&LOSSES) {
            *sum += f64::from(pick(record));
        }
        self.epoch.1 += 1;
        if !record.step.is_multiple_of(self.steps_per_epoch) {
            return Ok(());
        }
        let (sums, count) = std::mem::take(&mut self.epoch);
        let mut scalars: Vec<(String, f64)> = LOSSES
            .iter()
            .zip(sums)
            .map(|((name, _), sum)| (format!("epoch_{name}"), sum / count as f64))
            .collect();
        scalars.push(("epoch_learning_rate".to_owned(), f64::from(record.learning_rate)));
        self.train.scalars(record.epoch, scalars)
    }
}

impl EventSink for TensorBoard {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Started {
                step,
                steps_per_epoch,
                ..
            } => {
                self.steps_per_epoch = (*steps_per_epoch).max(1);
                match step / self.steps_per_epoch {
                    0 => Ok(()),
                    epochs => self.train.restart(epochs),
                }
            }
            Event::Step(record) => {
                self.log_step(record)?;
                self.log_epoch(record)
            }
            Event::Evaluated { step, summary, .. } => {
                let scalars = summary
                    .named()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect();
                self.validation.scalars(*step, scalars)
            }
            _ => Ok(()),
        }
    }
}

/// One event file.
#[derive(Debug)]
struct EventFile(LogFile);

impl EventFile {
    /// Creates a file of its own in `folder`; steps behind `step` replace those of earlier files.
    fn create(folder: &Path, step: u64) -> Result<Self, TrainError> {
        fs::create_dir_all(folder).map_err(failed(folder))?;
        let seconds = now().as_secs();
        let mut number = 0;
        let mut file = loop {
            let path = folder.join(format!("events.out.tfevents.{seconds}.effdet.{number}"));
            match OpenOptions::new().create_new(true).append(true).open(&path) {
                Ok(file) => break Self(LogFile { path, file }),
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists && number < MAX_FILES_PER_SECOND =>
                {
                    number += 1;
                }
                Err(error) => return Err(failed(&path)(error)),
            }
        };
        file.write(0, What::FileVersion(FILE_VERSION.to_owned()))?;
        if step > 0 {
            file.restart(step + 1)?;
        }
        Ok(file)
    }

    /// Makes readers drop the steps from `first` on of earlier files.
    fn restart(&mut self, first: u64) -> Result<(), TrainError> {
        let status = SESSION_START;
        self.write(first, What::SessionLog(SessionLog { status }))
    }

    fn scalars(&mut self, step: u64, scalars: Vec<(String, f64)>) -> Result<(), TrainError> {
        let value = scalars
            .into_iter()
            .map(|(tag, value)| SummaryValue {
                tag,
                simple_value: Some(value as f32),
            })
            .collect();
        self.write(step, What::Summary(Summary { value }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<(), TrainError> {
        let event = EventMessage {
            wall_time: now().as_secs_f64(),
            step: step as i64,
            what: Some(what),
        };
        let mut record = Vec::new();
        write_record(&mut record, &event.encode_to_vec()).map_err(failed(&self.0.path))?;
        self.0.write(&record)
    }
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::testing::{feed, record};
    use effdet_data::tfrecord::framing::RecordReader;

    /// Reads every event of a folder's files, in the order of their names; the reader checks both checksums of each record.
    fn events(folder: &Path) -> Vec<EventMessage> {
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        let mut events = Vec::new();
        for file in files {
            let bytes = fs::read(&file).unwrap();
            let mut reader = RecordReader::new(&bytes[..], &file, bytes.len() as u64, 1 << 20);
            while let Some(record) = reader.next_record().unwrap() {
                events.push(EventMessage::decode(&record.payload[..]).unwrap());
            }
        }
        events
    }

    fn scalar(event: &EventMessage, tag: &str) -> Option<f32> {
        match event.what.as_ref()? {
            What::Summary(summary) => summary.value.iter().find(|v| v.tag == tag)?.simple_value,
            _ => None,
        }
    }

    /// `(step, value)` of a tag in a folder.
    fn series(folder: &Path, tag: &str) -> Vec<(i64, f32)> {
        events(folder)
            .iter()
            .filter_map(|event| Some((event.step, scalar(event, tag)?)))
            .collect()
    }

    #[test]
    fn scalars_read_back_with_intact_checksums() {
        let folder = tempfile::tempdir().unwrap();
        feed(&mut TensorBoard::open(folder.path(), 0, 2).unwrap(), 1, 8).unwrap();
        let root = events(folder.path());
        assert_eq!(root[0].what, Some(What::FileVersion(FILE_VERSION.to_owned())));
        assert!(root[0].wall_time > 1.7e9);
        let expected: Vec<_> = [2, 4, 6, 8].map(|step| (step as i64, record(step).loss)).into();
        assert_eq!(series(folder.path(), "loss"), expected);
        let speeds: Vec<_> = [2, 4, 6, 8].map(|step| (step, 8.0)).into();
        assert_eq!(series(folder.path(), "examples/sec"), speeds);
        let shares: Vec<_> = [2, 4, 6, 8].map(|step| (step, 0.25)).into();
        assert_eq!(series(folder.path(), "data_wait_share"), shares);
        // 0.75 s of preparing while 0.375 s are computed.
        let cores: Vec<_> = [2, 4, 6, 8].map(|step| (step, 2.0)).into();
        assert_eq!(series(folder.path(), "loader_cores_needed"), cores);
        assert_eq!(
            series(&folder.path().join("validation"), "AP"),
            [(4, 1.0), (8, 1.0)]
        );
        let mean = |steps: std::ops::RangeInclusive<u64>| {
            (steps.map(|step| f64::from(record(step).box_loss)).sum::<f64>() / 4.0) as f32
        };
        assert_eq!(
            series(&folder.path().join("train"), "epoch_box_loss"),
            [(0, mean(1..=4)), (1, mean(5..=8))]
        );
    }

    #[test]
    fn a_resumed_run_tells_readers_to_drop_the_lost_steps() {
        let folder = tempfile::tempdir().unwrap();
        feed(&mut TensorBoard::open(folder.path(), 0, 1).unwrap(), 1, 7).unwrap();
        feed(&mut TensorBoard::open(folder.path(), 5, 1).unwrap(), 6, 8).unwrap();
        let restarts = |folder: &Path| -> Vec<i64> {
            events(folder)
                .iter()
                .filter(|event| matches!(event.what, Some(What::SessionLog(SessionLog { status: 1 }))))
                .map(|event| event.step)
                .collect()
        };
        assert_eq!(restarts(folder.path()), [6]);
        assert_eq!(restarts(&folder.path().join("train")), [1]);
    }

    /// Source: field numbers of `event.proto` and `summary.proto`.
    #[test]
    fn a_scalar_has_the_bytes_of_the_published_schema() {
        let event = EventMessage {
            wall_time: 1.0,
            step: 3,
            what: Some(What::Summary(Summary {
                value: vec![SummaryValue {
                    tag: "AP".to_owned(),
                    simple_value: Some(0.5),
                }],
            })),
        };
        let value = [0x0a, 2, b'A', b'P', 0x15, 0, 0, 0, 0x3f];
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x10, 3, 0x2a, 11, 0x0a, 9];
        expected.extend(value);
        assert_eq!(event.encode_to_vec(), expected);
    }
}
