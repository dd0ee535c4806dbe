//! `curves.svg`: losses, learning rate, gradient norm, speed and AP of a run as one self-contained picture.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::csv::{EvaluationRow, read_evaluations, read_steps};
use super::{create_parent, failed};
use crate::error::TrainError;
use crate::events::{Event, EventSink, StepRecord};

/// Points of a curve; beyond twice as many, neighbours are averaged.
const MAX_POINTS: usize = 250;
/// Quantities of a step that are drawn.
const QUANTITIES: usize = 7;
/// Panel size in pixels.
const PANEL: (f64, f64) = (480.0, 270.0);
/// Space left of, above, right of and below the plot of a panel.
const MARGIN: [f64; 4] = [62.0, 34.0, 14.0, 30.0];
/// Okabe and Ito's colours: told apart with every kind of colour vision.
const COLOURS: [&str; 3] = ["#0072b2", "#d55e00", "#009e73"];
/// A logarithmic axis is taken when the largest value is this many times the smallest.
const LOG_RATIO: f64 = 30.0;

/// Draws the curves of a run after every evaluation, every checkpoint and at the end.
#[derive(Debug)]
pub struct Curves {
    path: PathBuf,
    steps: Thinned,
    evaluations: Vec<EvaluationRow>,
}

impl Curves {
    /// Draws into `path`; the curves begin with the rows up to `step` of the tables that [`super::Csv`] left in `folder`.
    ///
    /// # Errors
    /// [`TrainError::Log`] when a table is there but cannot be read.
    pub fn open(path: &Path, folder: &Path, step: u64) -> Result<Self, TrainError> {
        let mut steps = Thinned::default();
        let earlier = read_steps(folder)?.into_iter().filter(|row| row.step <= step);
        earlier.for_each(|row| steps.push(&row));
        let mut evaluations = read_evaluations(folder)?;
        evaluations.retain(|row| row.step <= step);
        Ok(Self {
            path: path.to_owned(),
            steps,
            evaluations,
        })
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let quantity = |name, column: usize| Curve {
            name,
            points: self.steps.curve(column),
        };
        let metric = |name, column: usize| Curve {
            name,
            points: self
                .evaluations
                .iter()
                .filter(|row| row.stats[column] >= 0.0)
                .map(|row| (row.step as f64, row.stats[column]))
                .collect(),
        };
        let panels = [
            (
                "Loss",
                Axis::Auto,
                vec![quantity("total", 0), quantity("class", 1), quantity("L2", 3)],
            ),
            ("Box loss", Axis::Auto, vec![quantity("box", 2)]),
            ("Learning rate", Axis::FromZero, vec![quantity("", 4)]),
            ("Gradient norm", Axis::Auto, vec![quantity("after clipping", 5)]),
            (
                "Held-out images",
                Axis::Unit,
                vec![metric("AP", 0), metric("AP50", 1), metric("AP75", 2)],
            ),
            ("Images per second", Axis::FromZero, vec![quantity("", 6)]),
        ];
        let rows = panels.len().div_ceil(2);
        let (width, height) = (2.0 * PANEL.0, rows as f64 * PANEL.1);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        );
        for (index, (title, axis, curves)) in panels.iter().enumerate() {
            let origin = ((index % 2) as f64 * PANEL.0, (index / 2) as f64 * PANEL.1);
            panel(&mut svg, origin, title, *axis, curves);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn draw(&self) -> Result<(), TrainError> {
        create_parent(&self.path)?;
        // A viewer that reloads the file never sees half of it.
        let scratch = self.path.with_extension("svg.tmp");
        fs::write(&scratch, self.svg()).map_err(failed(&scratch))?;
        fs::rename(&scratch, &self.path).map_err(failed(&self.path))
    }
}

impl EventSink for Curves {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Step(record) => {
                self.steps.push(record);
                Ok(())
            }
            Event::Evaluated { step, summary, .. } => {
                self.evaluations.push(EvaluationRow {
                    step: *step,
                    stats: summary.stats,
                });
                self.draw()
            }
            Event::Saved { .. } | Event::Finished { .. } => self.draw(),
            _ => Ok(()),
        }
    }
}

/// Steps in bounded memory: averages over `stride` steps each.
#[derive(Debug)]
struct Thinned {
    stride: u64,
    points: Vec<Mean>,
}

/// Sums over some steps.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    count: u64,
    step_sum: f64,
    sums: [f64; QUANTITIES],
}

impl Default for Thinned {
    fn default() -> Self {
        Self {
            stride: 1,
            points: Vec::new(),
        }
    }
}

impl Thinned {
    fn push(&mut self, record: &StepRecord) {
        if self.points.last().is_none_or(|last| last.count >= self.stride) {
            if self.points.len() >= 2 * MAX_POINTS {
                self.points = self.points.chunks(2).map(Mean::merge).collect();
                self.stride *= 2;
            }
            self.points.push(Mean::default());
        }
        if let Some(last) = self.points.last_mut() {
            last.add(record);
        }
    }

    /// `(step, value)` of one quantity; what is not finite is left out.
    fn curve(&self, column: usize) -> Vec<(f64, f64)> {
        self.points
            .iter()
            .map(|mean| {
                (
                    mean.step_sum / mean.count as f64,
                    mean.sums[column] / mean.count as f64,
                )
            })
            .filter(|(_, value)| value.is_finite())
            .collect()
    }
}

impl Mean {
    fn add(&mut self, record: &StepRecord) {
        let values = [
            f64::from(record.loss),
            f64::from(record.class_loss),
            f64::from(record.box_loss),
            f64::from(record.l2_loss),
            f64::from(record.learning_rate),
            f64::from(record.gradient_norm),
            record.images as f64 / record.seconds.max(1e-9),
        ];
        self.count += 1;
        self.step_sum += record.step as f64;
        self.sums
            .iter_mut()
            .zip(values)
            .for_each(|(sum, value)| *sum += value);
    }

    fn merge(parts: &[Self]) -> Self {
        let mut merged = Self::default();
        for part in parts {
            merged.count += part.count;
            merged.step_sum += part.step_sum;
            merged
                .sums
                .iter_mut()
                .zip(part.sums)
                .for_each(|(sum, value)| *sum += value);
        }
        merged
    }
}

/// A named line of a panel.
struct Curve {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

/// How the vertical axis is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Axis {
    /// Logarithmic for wide ranges, else linear.
    Auto,
    /// Linear from 0.
    FromZero,
    /// 0 to 1.
    Unit,
}

/// Maps values to `[0, 1]`.
#[derive(Debug, Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Scale {
    fn vertical(axis: Axis, curves: &[Curve]) -> Self {
        let values = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.1);
        let (low, high) = (
            values().fold(f64::INFINITY, f64::min),
            values().fold(f64::NEG_INFINITY, f64::max),
        );
        let logarithmic = axis == Axis::Auto && low > 0.0 && high / low > LOG_RATIO;
        let (low, high) = match axis {
            Axis::Unit => (0.0, 1.0),
            Axis::FromZero => (0.0, high * 1.05),
            Axis::Auto if logarithmic => (low / 1.2, high * 1.2),
            Axis::Auto => (low - 0.05 * (high - low), high + 0.05 * (high - low)),
        };
        Self {
            low,
            high: if high > low { high } else { low + 1.0 },
            logarithmic,
        }
    }

    fn place(&self, value: f64) -> f64 {
        match self.logarithmic {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        }
    }

    /// Round numbers within the scale.
    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let wide = decades.clone().count() > 4;
            let marks: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
            return decades
                .flat_map(|decade| marks.iter().map(move |mark| mark * 10f64.powi(decade)))
                .filter(|tick| (self.low..=self.high).contains(tick))
                .collect();
        }
        let raw = (self.high - self.low) / 5.0;
        let decade = 10f64.powf(raw.log10().floor());
        let step = decade
            * match raw / decade {
                r if r <= 1.0 => 1.0,
                r if r <= 2.0 => 2.0,
                r if r <= 5.0 => 5.0,
                _ => 10.0,
            };
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|k| k as f64 * step).collect()
    }
}

/// A tick's text.
fn label(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-3..1e6).contains(&magnitude) {
        return format!("{value:.0e}");
    }
    // Multiples of a step carry rounding noise in their last digits.
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Appends one panel. Writing to a `String` cannot fail.
fn panel(svg: &mut String, (left, top): (f64, f64), title: &str, axis: Axis, curves: &[Curve]) {
    let (x0, y0) = (left + MARGIN[0], top + MARGIN[1]);
    let (width, height) = (PANEL.0 - MARGIN[0] - MARGIN[2], PANEL.1 - MARGIN[1] - MARGIN[3]);
    let _ = writeln!(
        svg,
        "<text x=\"{x0}\" y=\"{:.1}\" font-size=\"13\" font-weight=\"bold\">{title}</text>\n\
         <rect x=\"{x0}\" y=\"{y0}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#999\"/>",
        y0 - 12.0
    );
    let last_step = curves.iter().flat_map(|curve| &curve.points).map(|point| point.0);
    let last_step = last_step.fold(0.0, f64::max);
    if last_step == 0.0 {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#777\">nothing yet</text>",
            x0 + width / 2.0,
            y0 + height / 2.0
        );
        return;
    }
    let horizontal = Scale {
        low: 0.0,
        high: last_step,
        logarithmic: false,
    };
    let vertical = Scale::vertical(axis, curves);
    let place_x = |step: f64| x0 + width * horizontal.place(step);
    let place_y = |value: f64| y0 + height * (1.0 - vertical.place(value));
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444\">step</text>",
        x0 - 12.0,
        y0 + height + 15.0
    );
    for tick in horizontal.ticks() {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444\">{}</text>",
            place_x(tick),
            y0 + height + 15.0,
            label(tick)
        );
    }
    for tick in vertical.ticks() {
        let y = place_y(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{x0} {y:.1}h{width}\" stroke=\"#e5e5e5\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444\">{}</text>",
            x0 - 6.0,
            y + 4.0,
            label(tick)
        );
    }
    let mut legend = String::new();
    for (curve, colour) in curves.iter().zip(COLOURS) {
        let mut path = String::new();
        for (i, &(step, value)) in curve.points.iter().enumerate() {
            let command = if i == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", place_x(step), place_y(value));
        }
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" stroke-linejoin=\"round\"/>"
        );
        if axis == Axis::Unit {
            // Evaluations are few: each gets a dot, so that a single one shows too.
            for &(step, value) in &curve.points {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>",
                    place_x(step),
                    place_y(value)
                );
            }
        }
        if let (false, Some(&(_, value))) = (curve.name.is_empty(), curve.points.last()) {
            let _ = write!(
                legend,
                "<tspan dx=\"10\" fill=\"{colour}\">{} {}</tspan>",
                curve.name,
                short(value)
            );
        }
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{legend}</text>",
        x0 + width,
        y0 - 12.0
    );
}

/// A value to three figures.
fn short(value: f64) -> String {
    let magnitude = value.abs();
    match magnitude {
        m if m != 0.0 && m < 1e-3 => format!("{value:.2e}"),
        m if m < 1.0 => format!("{value:.4}"),
        m if m < 100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::Csv;
    use crate::sinks::testing::{feed, record};

    #[test]
    fn a_run_is_drawn_with_all_its_panels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        feed(&mut Curves::open(&path, folder.path(), 0).unwrap(), 1, 8).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        for text in [
            "Loss",
            "Box loss",
            "Learning rate",
            "AP50 1.00",
            "total 1.25",
            "box 0.0125",
        ] {
            assert!(svg.contains(text), "{text} in\n{svg}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("nothing yet"));
        assert_eq!(
            svg.matches("<circle").count(),
            3 * 2,
            "three metrics of two evaluations"
        );
        assert!(!folder.path().join("curves.svg.tmp").exists());
    }

    #[test]
    fn a_resumed_run_draws_the_steps_before_it_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        feed(&mut Csv::open(folder.path(), 0).unwrap(), 1, 7).unwrap();
        feed(&mut Curves::open(&path, folder.path(), 5).unwrap(), 6, 8).unwrap();
        let resumed = fs::read_to_string(&path).unwrap();
        feed(
            &mut Curves::open(&path, &folder.path().join("none"), 0).unwrap(),
            1,
            8,
        )
        .unwrap();
        assert_eq!(resumed, fs::read_to_string(&path).unwrap());
    }

    #[test]
    fn a_run_without_steps_and_losses_that_are_no_numbers_are_drawn_too() {
        let folder = tempfile::tempdir().unwrap();
        let mut curves = Curves::open(&folder.path().join("curves.svg"), folder.path(), 0).unwrap();
        assert_eq!(curves.svg().matches("nothing yet").count(), 6);
        let mut broken = record(1);
        broken.loss = f32::NAN;
        curves.event(&Event::Step(broken)).unwrap();
        curves.event(&Event::Step(record(2))).unwrap();
        assert!(!curves.svg().contains("NaN"));
    }

    #[test]
    fn long_runs_keep_few_points_and_their_averages() {
        let mut thinned = Thinned::default();
        for step in 1..=100_000 {
            thinned.push(&record(step));
        }
        assert!(thinned.points.len() <= 2 * MAX_POINTS);
        assert_eq!(thinned.points.iter().map(|p| p.count).sum::<u64>(), 100_000);
        // The learning rate of `record` is linear in the step, so its averages lie on the same line.
        for (step, rate) in thinned.curve(4) {
            assert!((rate - 0.01 * step).abs() < 1e-4 * rate, "{step}: {rate}");
        }
    }

    #[test]
    fn ticks_are_round_and_within_the_scale() {
        let ticks = |low, high, logarithmic| {
            Scale {
                low,
                high,
                logarithmic,
            }
            .ticks()
            .into_iter()
            .map(label)
            .collect::<Vec<_>>()
        };
        assert_eq!(ticks(0.0, 1.0, false), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(ticks(0.3, 40.0, true), ["0.5", "1", "2", "5", "10", "20"]);
        assert_eq!(
            ticks(0.002, 5000.0, true),
            ["0.01", "0.1", "1", "10", "100", "1000"]
        );
    }
}
