//! Progress bars.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work that takes less time gets no bar.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bar on stderr that appears after two seconds, on terminals only.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    visible: bool,
    wanted: bool,
}

impl Progress {
    /// A bar for `total` items called `what`.
    pub fn new(total: u64, what: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let template = format!("{what} {{wide_bar}} {{pos}}/{{len}}  {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Self {
            bar,
            started: Instant::now(),
            visible: false,
            wanted: std::io::stderr().is_terminal(),
        }
    }

    /// Counts `items` more.
    pub fn advance(&mut self, items: u64) {
        if self.wanted && !self.visible && self.started.elapsed() >= PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.visible = true;
        }
        self.bar.inc(items);
    }

    /// Sets the number of items that are through.
    #[cfg(feature = "download")]
    pub fn set(&mut self, items: u64) {
        self.advance(items.saturating_sub(self.bar.position()));
    }

    /// Prints a line to stderr without tearing the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| tell!("{line}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
