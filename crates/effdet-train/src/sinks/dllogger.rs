//! DLLogger lines: `DLLL ` and a JSON object, as NVIDIA's tools read them.
//!
//! Source: the reference's `utils/callback_utils.py` (`TimeHistory`) and `train.py`; times are UTC.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::LogFile;
use crate::error::TrainError;
use crate::events::{Event, EventSink};

/// Metrics of a run and their units.
const UNITS: [(&str, Option<&str>); 5] = [
    ("avg_fps_training", Some("images/s")),
    ("avg_fps_training_per_GPU", Some("images/s")),
    ("avg_latency_training", Some("s")),
    ("training_loss", None),
    ("e2e_training_time", Some("s")),
];

/// How a DLLogger file is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DlLoggerConfig {
    /// The file, `time_log.txt` in the reference.
    pub path: PathBuf,
    /// Steps between two lines of speed.
    pub log_steps: u64,
    /// Ranks of the run.
    pub ranks: usize,
    /// Step that the run starts or goes on from.
    pub step: u64,
}

/// Writes DLLogger lines; an existing file is continued behind the step that the run goes on from.
#[derive(Debug)]
pub struct DlLogger {
    log: LogFile,
    log_steps: u64,
    ranks: f64,
    started: Instant,
    total_steps: u64,
    last_logged: u64,
    /// Since the last line: steps, seconds, images of all ranks.
    pending: (u64, f64, f64),
    /// `(fps, latency)` of each line.
    speeds: Vec<(f64, f64)>,
    training_loss: f32,
}

#[derive(Serialize)]
struct Metadata<'a> {
    timestamp: String,
    elapsedtime: String,
    datetime: String,
    r#type: &'a str,
    metric: &'a str,
    metadata: Value,
}

#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    datetime: String,
    elapsedtime: String,
    r#type: &'a str,
    step: Value,
    data: Value,
}

impl DlLogger {
    /// Opens the file and writes the units of a new one.
    ///
    /// # Errors
    /// [`TrainError::Log`].
    pub fn open(config: &DlLoggerConfig) -> Result<Self, TrainError> {
        let mut log = LogFile::append(&config.path)?;
        let text = fs::read_to_string(&config.path).map_err(super::failed(&config.path))?;
        let kept = (text.split_inclusive('\n'))
            .take_while(|line| is_up_to(line, config.step))
            .map(str::len)
            .sum::<usize>();
        log.truncate(kept as u64)?;
        let is_new = kept == 0;
        let mut logger = Self {
            log,
            log_steps: config.log_steps.max(1),
            ranks: config.ranks.max(1) as f64,
            started: Instant::now(),
            total_steps: 0,
            last_logged: 0,
            pending: (0, 0.0, 0.0),
            speeds: Vec::new(),
            training_loss: 0.0,
        };
        if is_new {
            for (metric, unit) in UNITS {
                let (timestamp, datetime, elapsedtime) = logger.times();
                logger.write(&Metadata {
                    timestamp,
                    elapsedtime,
                    datetime,
                    r#type: "METADATA",
                    metric,
                    metadata: json!({ "unit": unit }),
                })?;
            }
        }
        Ok(logger)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.log.path
    }

    fn times(&self) -> (String, String, String) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (
            format!("{}.{:06}", now.as_secs(), now.subsec_micros()),
            utc(now.as_secs(), now.subsec_micros()),
            format!("{:.6}", self.started.elapsed().as_secs_f64()),
        )
    }

    fn write(&mut self, content: &impl Serialize) -> Result<(), TrainError> {
        let text =
            serde_json::to_string(content).map_err(|error| super::failed(&self.log.path)(error.into()))?;
        self.log.write(format!("DLLL {text}\n").as_bytes())
    }

    fn line(&mut self, step: Value, data: Value) -> Result<(), TrainError> {
        let (timestamp, datetime, elapsedtime) = self.times();
        self.write(&Line {
            timestamp,
            datetime,
            elapsedtime,
            r#type: "LOG",
            step,
            data,
        })
    }
}

/// Whether a line is whole and of the steps up to `step`; the summary of a run that ended is not.
fn is_up_to(line: &str, step: u64) -> bool {
    let content = line
        .strip_suffix('\n')
        .and_then(|line| line.strip_prefix("DLLL "));
    let Some(Ok(line)) = content.map(serde_json::from_str::<Value>) else {
        return false;
    };
    let data = &line["data"];
    let last = data["steps"][1].as_u64();
    data.get("avg_fps_training").is_none() && last.is_none_or(|last| last <= step)
}

impl EventSink for DlLogger {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Started {
                step, total_steps, ..
            } => {
                (self.last_logged, self.total_steps) = (*step, *total_steps);
                Ok(())
            }
            Event::Step(record) => {
                self.training_loss = record.loss;
                self.pending.0 += 1;
                self.pending.1 += record.seconds;
                self.pending.2 += record.images as f64;
                if self.pending.0 < self.log_steps {
                    return Ok(());
                }
                let (_, latency, images) = std::mem::take(&mut self.pending);
                let fps = images / latency.max(1e-9);
                self.speeds.push((fps, latency));
                let steps = [self.last_logged, record.step];
                self.last_logged = record.step;
                self.line(
                    json!("PARAMETER"),
                    json!({ "Latency": format!("{latency:.2} seconds"), "fps": fps, "steps": steps }),
                )
            }
            Event::Evaluated { step, epoch, summary } => {
                // The reference names the epoch of the final evaluation by the text of a checkpoint's name.
                let epoch = match *step >= self.total_steps {
                    true => json!(epoch.to_string()),
                    false => json!(epoch),
                };
                let ap = (summary.ap() * 1e4).round() / 1e2;
                self.line(
                    json!([]),
                    json!({ "epoch": epoch, "validation_accuracy_mAP": ap }),
                )
            }
            Event::Finished { elapsed_s, .. } => {
                let counted = &self.speeds[self.speeds.len() / 10..];
                let mean = |pick: fn(&(f64, f64)) -> f64| {
                    counted.iter().map(pick).sum::<f64>() / counted.len().max(1) as f64
                };
                let (fps, latency) = (mean(|speed| speed.0), mean(|speed| speed.1));
                let data = json!({
                    "avg_fps_training": fps,
                    "avg_fps_training_per_GPU": fps / self.ranks,
                    "avg_latency_training": latency,
                    "training_loss": self.training_loss,
                    "e2e_training_time": elapsed_s,
                });
                self.line(json!([]), data)
            }
            _ => Ok(()),
        }
    }
}

/// `YYYY-MM-DD HH:MM:SS.ffffff` of a Unix time.
///
/// Source of the calendar arithmetic: H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn utc(seconds: u64, micros: u32) -> String {
    let (days, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{micros:06}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::testing::{feed, record};

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line.strip_prefix("DLLL ").unwrap()).unwrap())
            .collect()
    }

    fn logged(folder: &Path, log_steps: u64, step: u64) -> (DlLogger, PathBuf) {
        let path = folder.join("time_log.txt");
        let config = DlLoggerConfig {
            path: path.clone(),
            log_steps,
            ranks: 1,
            step,
        };
        (DlLogger::open(&config).unwrap(), path)
    }

    #[test]
    fn a_run_is_logged_as_the_reference_logs_it() {
        let folder = tempfile::tempdir().unwrap();
        let (mut logger, path) = logged(folder.path(), 2, 0);
        feed(&mut logger, 1, 8).unwrap();
        let lines = lines(&path);
        let keys = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mut expected = [
            "timestamp",
            "elapsedtime",
            "datetime",
            "type",
            "metric",
            "metadata",
        ];
        expected.sort_unstable();
        for (line, (metric, unit)) in lines.iter().zip(UNITS) {
            assert_eq!(keys(line), expected);
            assert_eq!(
                (&line["type"], &line["metric"]),
                (&json!("METADATA"), &json!(metric))
            );
            assert_eq!(line["metadata"]["unit"], json!(unit));
        }
        let mut expected = ["timestamp", "datetime", "elapsedtime", "type", "step", "data"];
        expected.sort_unstable();
        let content: Vec<(Value, Value)> = lines[UNITS.len()..]
            .iter()
            .map(|line| {
                assert_eq!(keys(line), expected);
                assert!(line["timestamp"].as_str().unwrap().parse::<f64>().unwrap() > 1.7e9);
                (line["step"].clone(), line["data"].clone())
            })
            .collect();
        let speed = |from: u64| {
            let data = json!({ "Latency": "1.00 seconds", "fps": 8.0, "steps": [from, from + 2] });
            (json!("PARAMETER"), data)
        };
        let accuracy = |epoch: Value| {
            let data = json!({ "epoch": epoch, "validation_accuracy_mAP": 100.0 });
            (json!([]), data)
        };
        let loss = serde_json::to_value(record(8).loss).unwrap();
        let stats = json!({ "avg_fps_training": 8.0, "avg_fps_training_per_GPU": 8.0, "avg_latency_training": 1.0,
                            "training_loss": loss, "e2e_training_time": 4.0 });
        let expected = [
            speed(0),
            speed(2),
            accuracy(json!(1)),
            speed(4),
            speed(6),
            accuracy(json!("2")),
            (json!([]), stats),
        ];
        assert_eq!(content, expected);
    }

    #[test]
    fn a_resumed_run_leaves_the_lines_of_an_uninterrupted_one() {
        let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let content = |path: &Path| -> Vec<(Value, Value)> {
            let pick = |line: Value| (line["step"].clone(), line["data"].clone());
            lines(path).into_iter().map(pick).collect()
        };
        let (mut logger, whole) = logged(whole.path(), 1, 0);
        feed(&mut logger, 1, 8).unwrap();
        // Stopped in order after step 7 and then killed within a line; the last checkpoint is that of step 5.
        let (mut logger, path) = logged(cut.path(), 1, 0);
        feed(&mut logger, 1, 7).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 5]).unwrap();
        let (mut logger, _) = logged(cut.path(), 1, 5);
        feed(&mut logger, 6, 8).unwrap();
        assert_eq!(content(&path), content(&whole));
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00.000007"),
            (951_827_696, "2000-02-29 12:34:56.000007"),
            (1_704_067_199, "2023-12-31 23:59:59.000007"),
            (4_107_542_400, "2100-03-01 00:00:00.000007"),
        ] {
            assert_eq!(utc(seconds, 7), expected);
        }
    }
}
