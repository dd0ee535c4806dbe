//! How the times of the counted steps are distributed.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};

/// The times of the counted steps, fastest first.
pub struct Distribution {
    sorted_s: Vec<f64>,
}

impl Distribution {
    /// Of at least one time, in seconds.
    pub fn new(times_s: &[f64]) -> Self {
        let mut sorted_s = times_s.to_vec();
        sorted_s.sort_by(f64::total_cmp);
        Self { sorted_s }
    }

    /// The smallest time that at least `percent` % of all times do not exceed.
    pub fn percentile_s(&self, percent: usize) -> f64 {
        let rank = (percent * self.sorted_s.len()).div_ceil(100);
        self.sorted_s[rank.clamp(1, self.sorted_s.len()) - 1]
    }

    /// Mean of the fastest `percent` % of all times, rounded down but at least one: what the reference calls
    /// `latency_90`, `latency_95` and `latency_99`. It lies below the percentile of the same number.
    pub fn mean_of_fastest_s(&self, percent: usize) -> f64 {
        let count = (percent * self.sorted_s.len() / 100).max(1);
        self.sorted_s[..count].iter().sum::<f64>() / count as f64
    }

    /// Adds the percentiles in milliseconds, and the reference's figures under its names: seconds, except
    /// `inference_latency_ms`.
    pub fn add_to(&self, report: &mut Value, batch_size: usize) {
        report["latency_ms"] = json!(1e3 * self.percentile_s(50));
        for percent in [50, 90, 95, 99] {
            report[format!("latency_p{percent}_ms")] = json!(1e3 * self.percentile_s(percent));
            if percent > 50 {
                report[format!("latency_{percent}")] = json!(self.mean_of_fastest_s(percent));
            }
        }
        let mean_s = self.mean_of_fastest_s(100);
        report["latency_avg"] = json!(mean_s);
        report["inference_time"] = json!(mean_s);
        report["inference_fps"] = json!(batch_size as f64 / mean_s);
        report["inference_latency_ms"] = json!(1e3 * mean_s);
    }

    /// The same as lines of text.
    pub fn print(&self, out: &mut impl Write, batch_size: usize) -> Result<()> {
        let ms = |percent| 1e3 * self.percentile_s(percent);
        writeln!(
            out,
            "  {:.2} img/s at the median; per step: fastest {:.1} ms, p50 {:.1}, p90 {:.1}, p95 {:.1}, p99 {:.1}; {} steps",
            batch_size as f64 / self.percentile_s(50),
            1e3 * self.sorted_s[0],
            ms(50),
            ms(90),
            ms(95),
            ms(99),
            self.sorted_s.len()
        )?;
        let trimmed = |percent| 1e3 * self.mean_of_fastest_s(percent);
        writeln!(
            out,
            "  means as the reference prints them: all {:.1} ms, fastest 90 % {:.1}, 95 % {:.1}, 99 % {:.1}",
            trimmed(100),
            trimmed(90),
            trimmed(95),
            trimmed(99)
        )?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let four = Distribution::new(&[4.0, 2.0, 1.0, 3.0]);
        assert_eq!(four.percentile_s(50), 2.0);
        assert_eq!(four.percentile_s(90), 4.0);
        assert_eq!(Distribution::new(&[1.0]).percentile_s(50), 1.0);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Distribution::new(&hundred).percentile_s(99), 99.0);
    }

    #[test]
    fn the_reference_averages_the_fastest_share() {
        let ten = Distribution::new(&[10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(ten.mean_of_fastest_s(90), 5.0);
        assert_eq!(ten.mean_of_fastest_s(100), 5.5);
        assert_eq!(Distribution::new(&[7.0]).mean_of_fastest_s(90), 7.0);
    }

    #[test]
    fn reports_carry_milliseconds_and_the_names_of_the_reference() {
        let mut report = json!({});
        Distribution::new(&[0.5, 0.25]).add_to(&mut report, 3);
        assert_eq!(report["latency_ms"], 250.0);
        assert_eq!(report["latency_p99_ms"], 500.0);
        assert_eq!(report["latency_99"], 0.25);
        assert_eq!(report["latency_avg"], 0.375);
        assert_eq!(report["inference_fps"], 8.0);
        assert_eq!(report["inference_latency_ms"], 375.0);
    }
}
