//! `steps.csv` and `evaluations.csv`: one row per update and per evaluation.

use std::fs;
use std::io;
use std::path::Path;

use effdet_metrics::METRIC_NAMES;

use super::{LogFile, failed};
use crate::error::TrainError;
use crate::events::{Event, EventSink, StepRecord};

const STEPS_FILE: &str = "steps.csv";
const EVALUATIONS_FILE: &str = "evaluations.csv";
const STEPS_HEADER: &str = "step,epoch,loss,det_loss,class_loss,box_loss,box_iou_loss,l2_loss,learning_rate,gradient_norm,\
                            raw_gradient_norm,seconds,wait_s,images\n";

/// Writes both tables.
///
/// Numbers are written so that reading them back gives the same bits.
#[derive(Debug)]
pub struct Csv {
    steps: LogFile,
    evaluations: LogFile,
}

/// One row of `evaluations.csv`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct EvaluationRow {
    pub step: u64,
    pub stats: [f64; 12],
}

impl Csv {
    /// Opens the tables in `folder` for the steps behind `step`; rows of later steps are removed.
    ///
    /// # Errors
    /// [`TrainError::Log`] when a file cannot be written, or has other columns.
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let evaluations_header = format!("step,epoch,{}\n", METRIC_NAMES.join(","));
        Ok(Self {
            steps: open_table(&folder.join(STEPS_FILE), STEPS_HEADER, step)?,
            evaluations: open_table(&folder.join(EVALUATIONS_FILE), &evaluations_header, step)?,
        })
    }
}

impl EventSink for Csv {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Step(r) => {
                let row = format!(
                    "{},{},{},{},{},{},{},{},{},{},{},{},{},{}\n",
                    r.step,
                    r.epoch,
                    r.loss,
                    r.det_loss,
                    r.class_loss,
                    r.box_loss,
                    r.box_iou_loss,
                    r.l2_loss,
                    r.learning_rate,
                    r.gradient_norm,
                    r.raw_gradient_norm,
                    r.seconds,
                    r.wait_s,
                    r.images
                );
                self.steps.write(row.as_bytes())
            }
            Event::Evaluated { step, epoch, summary } => {
                let stats = summary.stats.map(|value| value.to_string()).join(",");
                self.evaluations
                    .write(format!("{step},{epoch},{stats}\n").as_bytes())
            }
            _ => Ok(()),
        }
    }
}

/// Opens a table at the end of its rows up to `step`.
fn open_table(path: &Path, header: &str, step: u64) -> Result<LogFile, TrainError> {
    let mut table = LogFile::append(path)?;
    let text = fs::read_to_string(path).map_err(failed(path))?;
    if text.is_empty() {
        table.write(header.as_bytes())?;
        return Ok(table);
    }
    let Some(rows) = text.strip_prefix(header) else {
        let other = io::Error::other("it has other columns than this version writes; move it away");
        return Err(failed(path)(other));
    };
    let kept = whole_rows(rows)
        .take_while(|row| step_of(row).is_some_and(|found| found <= step))
        .map(|row| row.len() + 1)
        .sum::<usize>();
    table.truncate((header.len() + kept) as u64)?;
    Ok(table)
}

/// Lines that end with a newline: a killed process may leave half of one.
fn whole_rows(rows: &str) -> impl Iterator<Item = &str> {
    rows.split_inclusive('\n').map_while(|row| row.strip_suffix('\n'))
}

fn step_of(row: &str) -> Option<u64> {
    row.split(',').next()?.parse().ok()
}

/// The steps that `folder` holds; none without a table.
pub(super) fn read_steps(folder: &Path) -> Result<Vec<StepRecord>, TrainError> {
    let text = read_or_empty(&folder.join(STEPS_FILE))?;
    Ok(whole_rows(&text).skip(1).map_while(parse_step).collect())
}

/// The evaluations that `folder` holds; none without a table.
pub(super) fn read_evaluations(folder: &Path) -> Result<Vec<EvaluationRow>, TrainError> {
    let text = read_or_empty(&folder.join(EVALUATIONS_FILE))?;
    Ok(whole_rows(&text).skip(1).map_while(parse_evaluation).collect())
}

fn read_or_empty(path: &Path) -> Result<String, TrainError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.map_err(failed(path)),
    }
}

/// The loss scale and the loader's time have no column: 1 and 0.
fn parse_step(row: &str) -> Option<StepRecord> {
    let mut cells = row.split(',');
    Some(StepRecord {
        step: cells.next()?.parse().ok()?,
        epoch: cells.next()?.parse().ok()?,
        loss: cells.next()?.parse().ok()?,
        det_loss: cells.next()?.parse().ok()?,
        class_loss: cells.next()?.parse().ok()?,
        box_loss: cells.next()?.parse().ok()?,
        box_iou_loss: cells.next()?.parse().ok()?,
        l2_loss: cells.next()?.parse().ok()?,
        learning_rate: cells.next()?.parse().ok()?,
        gradient_norm: cells.next()?.parse().ok()?,
        raw_gradient_norm: cells.next()?.parse().ok()?,
        loss_scale: 1.0,
        seconds: cells.next()?.parse().ok()?,
        wait_s: cells.next()?.parse().ok()?,
        prepare_s: 0.0,
        images: cells.next()?.parse().ok()?,
    })
}

fn parse_evaluation(row: &str) -> Option<EvaluationRow> {
    let mut cells = row.split(',');
    let step = cells.next()?.parse().ok()?;
    let mut stats = [0.0; 12];
    let mut values = cells.skip(1);
    for stat in &mut stats {
        *stat = values.next()?.parse().ok()?;
    }
    Some(EvaluationRow { step, stats })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::testing::{feed, record, summary};

    /// What a row holds of a record.
    fn without_loader_time(step: u64) -> StepRecord {
        StepRecord {
            prepare_s: 0.0,
            ..record(step)
        }
    }

    #[test]
    fn rows_read_back_to_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        feed(&mut Csv::open(folder.path(), 0).unwrap(), 1, 8).unwrap();
        assert_eq!(
            read_steps(folder.path()).unwrap(),
            (1..=8).map(without_loader_time).collect::<Vec<_>>()
        );
        let evaluations = read_evaluations(folder.path()).unwrap();
        let expected = [4, 8].map(|step| EvaluationRow {
            step,
            stats: summary().stats,
        });
        assert_eq!(evaluations, expected);
    }

    #[test]
    fn a_resumed_run_leaves_the_tables_of_an_uninterrupted_one() {
        let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        feed(&mut Csv::open(whole.path(), 0).unwrap(), 1, 8).unwrap();
        // Killed within the row of step 7; the last checkpoint is that of step 5.
        feed(&mut Csv::open(cut.path(), 0).unwrap(), 1, 7).unwrap();
        let file = cut.path().join(STEPS_FILE);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, &text[..text.len() - 5]).unwrap();
        feed(&mut Csv::open(cut.path(), 5).unwrap(), 6, 8).unwrap();
        for name in [STEPS_FILE, EVALUATIONS_FILE] {
            let read = |folder: &Path| fs::read_to_string(folder.join(name)).unwrap();
            assert_eq!(read(cut.path()), read(whole.path()), "{name}");
        }
    }

    #[test]
    fn a_table_with_other_columns_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(STEPS_FILE);
        fs::write(&file, "step,mood\n1,good\n").unwrap();
        let error = Csv::open(folder.path(), 0).unwrap_err().to_string();
        assert!(error.contains(STEPS_FILE) && error.contains("columns"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "step,mood\n1,good\n");
    }
}
