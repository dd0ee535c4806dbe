//! `effdet bench scale`: what several ranks cost, measured, and a model of more of them.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use effdet_dist::{ProcessGroup, Wire};
use effdet_model::engine::{Engine, StepOptions};
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::{Reduction, train_step_on_ranks};
use serde_json::{Value, json};

use super::distribution::Distribution;
use super::random_batch::RandomBatch;
use crate::cli::ScaleOptions;
use crate::commands::engine::cpu_engine;
use crate::commands::model::resolve_hparams;
use crate::commands::ranks::Job;

/// Values of the sums that are timed: 4 KiB to 16 MiB, and the gradients.
const SIZES: [usize; 4] = [1 << 10, 1 << 14, 1 << 18, 1 << 22];
/// Values of one bucket of a sum.
const BUCKET: usize = 1 << 20;

/// A network between machines: name, bytes per second, seconds per exchange, seconds per further message.
const NETWORKS: [(&str, f64, f64, f64); 3] = [
    (
        "10 Gbit/s Ethernet, 1.25 GB/s, 30 us, 3 us per message",
        1.25e9,
        30e-6,
        3e-6,
    ),
    (
        "100 Gbit/s Ethernet, 12.5 GB/s, 10 us, 1 us per message",
        12.5e9,
        10e-6,
        1e-6,
    ),
    (
        "HDR InfiniBand, 25 GB/s, 2 us, 0.3 us per message",
        25e9,
        2e-6,
        0.3e-6,
    ),
];
const MODEL_RANKS: [usize; 7] = [1, 8, 32, 128, 256, 512, 1024];

/// When the gradients of a step are summed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Summed {
    Never,
    Behind,
    During,
}
const SUMMED: [Summed; 3] = [Summed::Never, Summed::Behind, Summed::During];

/// A part of the gradients that is finished before the backward pass is.
#[derive(Clone, Copy)]
struct Part {
    /// Seconds before the end of the step.
    early_s: f64,
    values: usize,
}

/// What was measured with some ranks.
struct Measured {
    ranks: usize,
    /// Seconds of a step with its sums, of one that sums behind the backward pass, and of one without sums.
    step_s: f64,
    behind_s: f64,
    alone_s: f64,
    /// Seconds of a sum by number of values.
    sums_s: Vec<(usize, f64)>,
}

/// Times steps and sums on 1, 2, 4 … ranks of the job and models what lies beyond.
pub fn run(options: &ScaleOptions, job: &Job<'_>) -> Result<()> {
    let bench = &options.bench;
    ensure!(
        bench.steps > 0 && bench.batch_size > 0,
        "--steps and --batch-size must be at least 1"
    );
    let network = Arc::new(Network::new(&resolve_hparams(&bench.model, "d0")?)?);
    let mut engine_args = bench.engine.clone();
    engine_args.threads = job.threads(bench.engine.threads);
    let mut engine = cpu_engine(&network, &engine_args, bench.step_memory())?;
    let batch = RandomBatch::new(&network, bench.batch_size)?;
    let all = job.group;
    let mut sizes: Vec<usize> = (0..usize::BITS)
        .map(|bit| 1 << bit)
        .take_while(|&n| n < all.size())
        .collect();
    sizes.push(all.size());
    let mut measured = Vec::new();
    let parts = match all.is_root() {
        true => parts_of_step(&mut engine, &network, &batch)?,
        false => Vec::new(),
    };
    all.barrier()?;
    for ranks in sizes {
        if let Some(group) = all.first(ranks) {
            measured.push(measure(
                &mut engine,
                &network,
                &batch,
                bench.steps,
                bench.warmup,
                &*group,
            )?);
        }
        // The others wait asleep.
        all.barrier()?;
    }
    if !job.is_root() {
        return Ok(());
    }
    let report = Report {
        model: network.hparams.name.clone(),
        batch: bench.batch_size,
        threads: engine.threads(),
        values: network.variables.trainable_len(),
        statistics: network.variables.statistics_len(),
        parts,
        measured,
    };
    let mut out = std::io::stdout().lock();
    match bench.json {
        true => writeln!(out, "{}", report.json())?,
        false => report.print(&mut out)?,
    }
    Ok(())
}

/// Median of the seconds of `count` runs of `work`.
fn median_s(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let clock = Instant::now();
        work()?;
        times.push(clock.elapsed().as_secs_f64());
    }
    Ok(Distribution::new(&times).percentile_s(50))
}

/// When the gradients of a step are ready; the second step, which finds everything in place.
fn parts_of_step(engine: &mut dyn Engine, network: &Network, batch: &RandomBatch) -> Result<Vec<Part>> {
    let mut weights = Weights::init(&network.variables, 0);
    let mut gradients = vec![0.0f32; weights.trainable.len()];
    let (batch, options) = (batch.training(), StepOptions::default());
    engine.train_step(&mut weights, &batch, &options, &mut gradients)?;
    let (sender, finished) = std::sync::mpsc::channel::<&mut [f32]>();
    let clock = Instant::now();
    let gradients = &mut gradients[..];
    std::thread::scope(|scope| {
        let parts = scope.spawn(move || {
            let note = |part: &mut [f32]| Part {
                early_s: -clock.elapsed().as_secs_f64(),
                values: part.len(),
            };
            finished.into_iter().map(note).collect::<Vec<_>>()
        });
        engine.train_step_in_parts(&mut weights, &batch, &options, gradients, sender)?;
        let end_s = clock.elapsed().as_secs_f64();
        let mut parts = parts
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        parts.iter_mut().for_each(|part| part.early_s += end_s);
        Ok(parts)
    })
}

fn measure(
    engine: &mut dyn Engine,
    network: &Network,
    batch: &RandomBatch,
    steps: usize,
    warmup: usize,
    group: &dyn ProcessGroup,
) -> Result<Measured> {
    let mut weights = Weights::init(&network.variables, 0);
    let mut gradients = vec![0.0f32; weights.trainable.len()];
    let (batch, options) = (batch.training(), StepOptions::default());
    let reduction = Reduction {
        group,
        wire: Wire::F32,
        share: 1.0 / group.size() as f32,
    };
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    // In turns, so that what disturbs one disturbs the others.
    for round in 0..warmup + steps {
        for (summed, times) in SUMMED.iter().zip(&mut times) {
            group.barrier()?;
            let clock = Instant::now();
            if *summed == Summed::During && group.size() > 1 {
                train_step_on_ranks(engine, &mut weights, &batch, &options, &mut gradients, reduction)?;
            } else {
                engine.train_step(&mut weights, &batch, &options, &mut gradients)?;
            }
            match summed {
                Summed::Behind => group.all_reduce_sum(&mut gradients, reduction.wire)?,
                // The slowest rank ends every kind of step.
                Summed::Never | Summed::During => group.barrier()?,
            }
            if round >= warmup {
                times.push(clock.elapsed().as_secs_f64());
            }
        }
    }
    let [alone_s, behind_s, step_s] = times.map(|times| Distribution::new(&times).percentile_s(50));
    let mut by_size = Vec::new();
    if group.size() > 1 {
        for values in SIZES.into_iter().chain([gradients.len()]) {
            let mut buffer = vec![0.0f32; values];
            group.all_reduce_sum(&mut buffer, Wire::F32)?;
            by_size.push((
                values,
                median_s(9, || Ok(group.all_reduce_sum(&mut buffer, Wire::F32)?))?,
            ));
        }
    }
    Ok(Measured {
        ranks: group.size(),
        step_s,
        alone_s,
        behind_s,
        sums_s: by_size,
    })
}

impl Measured {
    /// What the sums add to a step beyond the time that they share with the backward pass.
    fn exposed_s(&self) -> f64 {
        (self.step_s - self.alone_s).max(0.0)
    }

    /// What they add behind the backward pass.
    fn behind_s(&self) -> f64 {
        (self.behind_s - self.alone_s).max(0.0)
    }
}

struct Report {
    model: String,
    batch: usize,
    threads: usize,
    values: usize,
    statistics: usize,
    /// Of a step on one rank.
    parts: Vec<Part>,
    measured: Vec<Measured>,
}

impl Report {
    fn img_s(&self, measured: &Measured) -> f64 {
        (self.batch * measured.ranks) as f64 / measured.step_s
    }

    fn efficiency(&self, measured: &Measured) -> f64 {
        self.img_s(measured) / (measured.ranks as f64 * self.img_s(&self.measured[0]))
    }

    /// Seconds of a step on `ranks` ranks of one machine each, by the costs of a network.
    ///
    /// A sum takes `2·(N−1)/N·bytes/bandwidth + exchanges·(latency + (N−2)·message)` with two exchanges per bucket. Parts are summed
    /// one after the other, each from when it was ready in the measured step; statistics and losses (two exchanges) and the stop
    /// flag (one) follow.
    fn modelled_s(&self, ranks: usize, network: (&str, f64, f64, f64)) -> f64 {
        let (_, bandwidth, latency_s, message_s) = network;
        let compute_s = self.measured[0].step_s;
        if ranks == 1 {
            return compute_s;
        }
        let n = ranks as f64;
        let cost_s = |values: usize, exchanges: usize| {
            let bytes = 4.0 * values as f64;
            2.0 * (n - 1.0) / n * bytes / bandwidth + exchanges as f64 * (latency_s + (n - 2.0) * message_s)
        };
        let summed_s = (self.parts.iter()).fold(0.0f64, |end_s, part| {
            end_s.max(compute_s - part.early_s) + cost_s(part.values, 2 * part.values.div_ceil(BUCKET))
        });
        summed_s.max(compute_s) + cost_s(self.statistics, 3)
    }

    fn json(&self) -> Value {
        let measured: Vec<Value> = (self.measured.iter())
            .map(|m| {
                let sums: Vec<Value> = (m.sums_s.iter())
                    .map(|(values, seconds)| json!({"bytes": 4 * values, "ms": 1e3 * seconds}))
                    .collect();
                json!({"ranks": m.ranks, "step_ms": 1e3 * m.step_s, "exposed_sum_ms": 1e3 * m.exposed_s(), "sum_behind_ms": 1e3 * m.behind_s(), "img_s": self.img_s(m),
                       "efficiency": self.efficiency(m), "all_reduce": sums})
            })
            .collect();
        let modelled: Vec<Value> = NETWORKS
            .iter()
            .map(|&network| {
                let points: Vec<Value> = MODEL_RANKS
                    .iter()
                    .map(|&ranks| {
                        let step_s = self.modelled_s(ranks, network);
                        json!({"ranks": ranks, "step_ms": 1e3 * step_s, "efficiency": self.measured[0].step_s / step_s})
                    })
                    .collect();
                json!({"network": network.0, "points": points})
            })
            .collect();
        json!({"bench": "scale", "model": self.model, "batch_per_rank": self.batch, "threads_per_rank": self.threads,
               "measured": measured, "modelled": modelled})
    }

    fn print(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "{}: {} images per rank, {} threads per rank; gradients of {:.1} MiB, summed during the backward pass",
            self.model,
            self.batch,
            self.threads,
            (4 * self.values) as f64 / f64::from(1 << 20)
        )?;
        writeln!(
            out,
            "{:>6} {:>10} {:>10} {:>16} {:>22} {:>11}",
            "ranks", "img/s", "step, ms", "exposed sum, ms", "behind the pass, ms", "efficiency"
        )?;
        for m in &self.measured {
            writeln!(
                out,
                "{:>6} {:>10.2} {:>10.1} {:>16.2} {:>22.2} {:>9.1} %",
                m.ranks,
                self.img_s(m),
                1e3 * m.step_s,
                1e3 * m.exposed_s(),
                1e3 * m.behind_s(),
                1e2 * self.efficiency(m)
            )?;
        }
        for m in self.measured.iter().filter(|m| !m.sums_s.is_empty()) {
            write!(out, "sums on {} ranks:", m.ranks)?;
            for (values, seconds) in &m.sums_s {
                write!(out, "  {} KiB {:.2} ms", 4 * values / 1024, 1e3 * seconds)?;
            }
            writeln!(out)?;
        }
        writeln!(
            out,
            "\nA model, not measured: weak scaling with one rank per machine, from the step above and a network's stated costs"
        )?;
        write!(out, "{:<60}", "efficiency, % at ranks")?;
        for ranks in MODEL_RANKS {
            write!(out, "{ranks:>7}")?;
        }
        writeln!(out)?;
        for network in NETWORKS {
            write!(out, "{:<60}", network.0)?;
            for ranks in MODEL_RANKS {
                write!(
                    out,
                    "{:>7.1}",
                    1e2 * self.measured[0].step_s / self.modelled_s(ranks, network)
                )?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_begins_with_what_was_measured_and_loses_with_ranks_and_slower_networks() {
        let report = Report {
            model: "d0".into(),
            batch: 4,
            threads: 1,
            values: 3_900_000,
            statistics: 47_000,
            parts: vec![
                Part {
                    early_s: 0.2,
                    values: 3_000_000,
                },
                Part {
                    early_s: 0.0,
                    values: 900_000,
                },
            ],
            measured: vec![Measured {
                ranks: 1,
                step_s: 0.5,
                behind_s: 0.5,
                alone_s: 0.5,
                sums_s: Vec::new(),
            }],
        };
        for network in NETWORKS {
            let times: Vec<f64> = MODEL_RANKS
                .iter()
                .map(|&n| report.modelled_s(n, network))
                .collect();
            assert_eq!(times[0], 0.5);
            assert!(times.is_sorted());
        }
        // The first part is summed before the second is ready: 2·31/32·3.788 MB at 1.25 GB/s, 5 exchanges of 30 + 30·3 us are left.
        let expected = 0.5 + 2.0 * 31.0 / 32.0 * 3.788e6 / 1.25e9 + 5.0 * 120e-6;
        assert!((report.modelled_s(32, NETWORKS[0]) - expected).abs() < 1e-9);
    }
}
