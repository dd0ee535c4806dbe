//! Progress of a run on the terminal.

use std::io::IsTerminal;
use std::time::Duration;

use effdet_train::error::TrainError;
use effdet_train::events::{DataTime, Event, EventSink, StepRecord};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Lines of a run whose stderr is no terminal: one every so many seconds.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Shows a bar with ETA on a terminal, a line now and then elsewhere.
pub struct Terminal {
    bar: ProgressBar,
    interactive: bool,
    quiet: bool,
    last_line: std::time::Instant,
    steps_per_epoch: u64,
    recent: Vec<StepRecord>,
    evaluating: bool,
}

impl Terminal {
    /// A display; `quiet` shows warnings only.
    pub fn new(quiet: bool) -> Self {
        let interactive = std::io::stderr().is_terminal() && !quiet;
        let target = if interactive {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let template = "{wide_bar} {pos}/{len}  {eta} left  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let last_line = std::time::Instant::now();
        Self {
            bar,
            interactive,
            quiet,
            last_line,
            steps_per_epoch: 1,
            recent: Vec::new(),
            evaluating: false,
        }
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| tell!("{line}"));
    }

    /// Losses, speed, the share of time spent waiting for data and what would end it, averaged since the last call.
    fn summary(&mut self) -> String {
        let Some(last) = self.recent.last().copied() else {
            return String::new();
        };
        let mean = |pick: fn(&StepRecord) -> f64| {
            self.recent.iter().map(pick).sum::<f64>() / self.recent.len() as f64
        };
        let seconds = mean(|r| r.seconds).max(1e-9);
        let mut data = DataTime::default();
        self.recent.iter().for_each(|record| data.add(record));
        let text = format!(
            "epoch {:.2}  loss {:.3} (class {:.3}, box {:.4})  lr {:.2e}  {:.1} img/s  {data}",
            last.step as f64 / self.steps_per_epoch as f64,
            mean(|r| f64::from(r.loss)),
            mean(|r| f64::from(r.class_loss)),
            mean(|r| f64::from(r.box_loss)),
            last.learning_rate,
            mean(|r| r.images as f64) / seconds,
        );
        self.recent.clear();
        text
    }
}

impl EventSink for Terminal {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Started {
                step,
                total_steps,
                steps_per_epoch,
            } => {
                self.steps_per_epoch = *steps_per_epoch;
                self.bar.set_length(*total_steps);
                self.bar.set_position(*step);
                self.bar.reset_eta();
            }
            Event::Step(record) => {
                self.evaluating = false;
                self.recent.push(*record);
                self.bar.set_position(record.step);
                if self.interactive {
                    if self.recent.len() >= 10 || record.step <= 10 {
                        let text = self.summary();
                        self.bar.set_message(text);
                    }
                } else if !self.quiet && self.last_line.elapsed() >= LINE_EVERY {
                    self.last_line = std::time::Instant::now();
                    let total = self.bar.length().unwrap_or(0);
                    let text = self.summary();
                    tell!("step {}/{total}  {text}", record.step);
                }
            }
            Event::Evaluating { done, total } => {
                if self.interactive {
                    self.bar.set_message(format!("evaluating {done}/{total} images"));
                }
            }
            Event::Evaluated { step, epoch, summary } if !self.quiet => {
                let [ap, ap50, ap75, ..] = summary.stats;
                self.say(&format!(
                    "step {step}, epoch {epoch}: AP {ap:.4}  AP50 {ap50:.4}  AP75 {ap75:.4}"
                ));
            }
            Event::LossScaled {
                step,
                scale,
                before,
                skipped_steps,
            } if !self.quiet => self.say(&if scale < before {
                format!(
                    "step {step}: gradients overflowed, update skipped ({skipped_steps} so far); loss scale {before} → {scale}"
                )
            } else {
                format!("step {step}: loss scale {before} → {scale}")
            }),
            Event::Warning(text) => self.say(&format!("warning: {text}")),
            Event::Finished { .. } => self.bar.finish_and_clear(),
            Event::Evaluated { .. } | Event::Saved { .. } | Event::LossScaled { .. } => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_long_steps_wait_for_data_and_which_cores_would_end_it() {
        let record = StepRecord {
            step: 4,
            epoch: 0,
            loss: 2.0,
            det_loss: 2.0,
            class_loss: 1.0,
            box_loss: 0.02,
            box_iou_loss: 0.0,
            l2_loss: 0.0,
            learning_rate: 0.01,
            gradient_norm: 1.0,
            raw_gradient_norm: 1.0,
            loss_scale: 1.0,
            seconds: 0.5,
            wait_s: 0.25,
            prepare_s: 0.7,
            images: 8,
        };
        let mut terminal = Terminal::new(true);
        terminal.recent = vec![record; 2];
        let line = terminal.summary();
        assert!(
            line.ends_with("16.0 img/s  waiting 50 % (3 loader cores would end it)"),
            "{line}"
        );
    }
}
