//! What signals ask of a run.
//!
//! | signal | asks |
//! |---|---|
//! | SIGTERM, SIGINT, SIGUSR2 | to save at the end of the step, or in the middle of an evaluation, and to end; before the first step, to end at once |
//! | SIGINT, twice | to end at once; what is saved is whole |
//! | SIGUSR1 | to save and go on |
//! | SIGHUP, SIGPIPE | nothing: a run outlives its terminal |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use effdet_train::requests::Requests;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::ranks;

/// Signals to a rank within this time are one request to stop: they can reach it directly and through mpirun.
const SAME_REQUEST: Duration = Duration::from_secs(5);

/// Where signals to a run end up.
#[derive(Debug, Default)]
pub struct Control {
    /// For the trainer.
    pub requests: Arc<Requests>,
    /// Whether there is a run to save.
    training: AtomicBool,
    /// The signal that asked for the end first.
    stopped_by: AtomicI32,
}

impl Control {
    /// Listens from here on, for a run on `ranks` ranks.
    pub fn listen(ranks: usize) -> Result<Arc<Self>> {
        let control = Arc::new(Self::default());
        let heard = Arc::clone(&control);
        let mut first: Option<Instant> = None;
        on_signals(
            &[SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGHUP],
            move |signal| match signal {
                SIGHUP => {}
                SIGUSR1 => heard.requests.save.store(true, Ordering::Relaxed),
                _ => {
                    // What a launcher sends to every rank stands for SIGTERM: mpirun passes it on.
                    let signal = if signal == SIGUSR2 { SIGTERM } else { signal };
                    if !heard.training.load(Ordering::SeqCst) {
                        tell!("stopped before the first step: nothing is lost");
                        std::process::exit(128 + signal);
                    }
                    let since = first.get_or_insert_with(Instant::now).elapsed();
                    let again = heard.requests.stop.swap(true, Ordering::SeqCst);
                    if again && signal == SIGINT && (ranks == 1 || since > SAME_REQUEST) {
                        std::process::exit(128 + SIGINT);
                    }
                    if !again {
                        heard.stopped_by.store(signal, Ordering::SeqCst);
                        if ranks::speaks() {
                            tell!("\nsaving after this step; Ctrl-C once more leaves at once");
                        }
                    }
                }
            },
        )?;
        Ok(control)
    }

    /// From here on there is something to save.
    pub fn training_begins(&self) {
        self.training.store(true, Ordering::SeqCst);
    }

    /// Exit code of a run that was asked to end: 128 + signal; SIGTERM where another rank was asked.
    pub fn exit_code(&self) -> u8 {
        match self.stopped_by.load(Ordering::SeqCst) {
            0 => 128 + SIGTERM as u8,
            signal => 128 + signal as u8,
        }
    }
}

/// Calls `react` for every one of `signals`, on a thread of its own.
pub fn on_signals(signals: &[i32], mut react: impl FnMut(i32) + Send + 'static) -> Result<()> {
    let mut signals = Signals::new(signals).context("cannot listen for signals")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(&mut react))
        .context("cannot start the thread that listens for signals")?;
    Ok(())
}
