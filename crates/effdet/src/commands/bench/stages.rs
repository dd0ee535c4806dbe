//! Where the time of a step goes: a clock behind the engine's probe and its table.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use effdet_cpu::probe::{Kernel, Probe, Stage, Work};
use serde_json::{Value, json};

/// Charges the time between two reports to the later one.
///
/// So the little that runs between kernels belongs to the kernel that follows, and the parts add up to the whole.
#[derive(Debug)]
pub struct StageClock(Mutex<Ledger>);

#[derive(Debug)]
struct Ledger {
    last: Instant,
    stage: Option<Stage>,
    steps: u64,
    entries: BTreeMap<Entry, Cost>,
}

/// A line of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Entry {
    Engine(Stage, Kernel),
    /// What the caller does after the engine's step.
    Optimizer,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    seconds: f64,
    flops: f64,
    bytes: f64,
}

impl Cost {
    fn add(&mut self, seconds: f64, work: Work) {
        self.seconds += seconds;
        self.flops += work.flops as f64;
        self.bytes += work.bytes as f64;
    }

    fn merge(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// The most that the machine can do, which shares are taken of.
#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Billions of floating-point operations per second with the threads in use.
    pub gflop_s: f64,
    /// Billions of bytes per second from and to main memory.
    pub gb_s: f64,
}

impl StageClock {
    /// A clock with an empty ledger.
    pub fn new() -> Self {
        Self(Mutex::new(Ledger {
            last: Instant::now(),
            stage: None,
            steps: 0,
            entries: BTreeMap::new(),
        }))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a step.
    pub fn start_step(&self) {
        self.ledger().last = Instant::now();
    }

    /// Ends a step; what ran since the engine's last kernel is the optimiser's.
    pub fn end_step(&self) {
        let mut ledger = self.ledger();
        ledger.charge(Entry::Optimizer, Work::default());
        ledger.steps += 1;
    }

    /// The ledger per step of `images` images.
    pub fn table(&self, images: usize) -> StageTable {
        let ledger = self.ledger();
        let per_image = 1.0 / (ledger.steps.max(1) as f64 * images as f64);
        let entries = ledger.entries.iter().map(|(&entry, cost)| {
            let cost = Cost {
                seconds: cost.seconds * per_image,
                flops: cost.flops * per_image,
                bytes: cost.bytes * per_image,
            };
            (entry, cost)
        });
        StageTable {
            entries: entries.collect(),
        }
    }
}

impl Ledger {
    fn charge(&mut self, entry: Entry, work: Work) {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        self.entries.entry(entry).or_default().add(seconds, work);
    }
}

impl Probe for StageClock {
    fn enter(&self, stage: Stage) {
        self.ledger().stage = Some(stage);
    }

    fn done(&self, kernel: Kernel, work: Work) {
        let mut ledger = self.ledger();
        let stage = ledger.stage.unwrap_or(Stage::Weights);
        ledger.charge(Entry::Engine(stage, kernel), work);
    }
}

/// Time and work per image.
#[derive(Debug)]
pub struct StageTable {
    entries: Vec<(Entry, Cost)>,
}

impl Entry {
    /// Part of the network, all blocks together.
    fn part(&self) -> &'static str {
        match self {
            Self::Engine(Stage::Stem | Stage::Block(_), _) => "backbone",
            Self::Engine(Stage::Weights, _) => "weights",
            Self::Engine(Stage::Pyramid, _) => "pyramid",
            Self::Engine(Stage::ClassHead, _) => "class head",
            Self::Engine(Stage::BoxHead, _) => "box head",
            Self::Engine(Stage::Heads, _) => "heads",
            Self::Optimizer => "optimiser",
        }
    }

    fn kernel(&self) -> String {
        match self {
            Self::Engine(_, kernel) => kernel.to_string(),
            Self::Optimizer => "after the engine".to_owned(),
        }
    }

    fn stage(&self) -> String {
        match self {
            Self::Engine(stage, _) => stage.to_string(),
            Self::Optimizer => "optimiser".to_owned(),
        }
    }
}

impl StageTable {
    /// Costs added up over the entries of one key, in the order in which the network first meets them.
    fn grouped<K: PartialEq>(&self, key: impl Fn(&Entry) -> K) -> Vec<(K, Cost)> {
        let mut groups: Vec<(K, Cost)> = Vec::new();
        for (entry, cost) in &self.entries {
            let key = key(entry);
            match groups.iter_mut().find(|(known, _)| *known == key) {
                Some((_, sum)) => sum.merge(cost),
                None => groups.push((key, *cost)),
            }
        }
        groups
    }

    /// Writes a line per part and kernel; with `peaks`, also the share of the machine's ceiling that the nominal work reaches.
    pub fn print(&self, out: &mut impl Write, peaks: Option<Peaks>) -> io::Result<()> {
        let total: f64 = self.entries.iter().map(|(_, cost)| cost.seconds).sum();
        let rows = self.grouped(|entry| (entry.part(), entry.kernel()));
        let width = rows
            .iter()
            .map(|((_, kernel), _)| kernel.len())
            .max()
            .unwrap_or(0);
        writeln!(
            out,
            "  {:<10}  {:<width$}  {:>8}  {:>6}  {:>8}  {:>6}{}",
            "part",
            "kernel",
            "ms/image",
            "share",
            "GFLOP/s",
            "GB/s",
            if peaks.is_some() { "  ceiling" } else { "" }
        )?;
        let mut last = None;
        for ((part, kernel), cost) in &rows {
            let name = if last == Some(*part) { "" } else { part };
            last = Some(*part);
            write!(
                out,
                "  {name:<10}  {kernel:<width$}  {:>8.2}  {:>5.1}%  {}  {}",
                1e3 * cost.seconds,
                100.0 * cost.seconds / total,
                rate(cost.flops / cost.seconds, 8),
                rate(cost.bytes / cost.seconds, 6),
            )?;
            match peaks {
                Some(peaks) => writeln!(out, "  {:>6.0}%", 100.0 * share_of_ceiling(cost, peaks))?,
                None => writeln!(out)?,
            }
        }
        writeln!(out, "  {:<10}  {:<width$}  {:>8.2}", "all", "", 1e3 * total)
    }

    /// The same as JSON: `kernels` by part and kernel, `stages` by stage of the network.
    pub fn json(&self) -> Value {
        let cost = |cost: &Cost| {
            json!({
                "ms_per_image": 1e3 * cost.seconds,
                "gflop_s": 1e-9 * cost.flops / cost.seconds,
                "gb_s": 1e-9 * cost.bytes / cost.seconds,
            })
        };
        let with = |mut value: Value, names: &[(&str, &str)]| {
            for (key, name) in names {
                value[*key] = json!(name);
            }
            value
        };
        let kernels: Vec<Value> = (self.grouped(|entry| (entry.part(), entry.kernel())).iter())
            .map(|((part, kernel), sum)| with(cost(sum), &[("part", part), ("kernel", kernel)]))
            .collect();
        let stages: Vec<Value> = (self.grouped(Entry::stage).iter())
            .map(|(stage, sum)| with(cost(sum), &[("stage", stage)]))
            .collect();
        json!({ "kernels": kernels, "stages": stages })
    }
}

/// Time at the machine's ceilings over the time it took: the slower of arithmetic and memory counts.
fn share_of_ceiling(cost: &Cost, peaks: Peaks) -> f64 {
    let floor_s = (1e-9 * cost.flops / peaks.gflop_s).max(1e-9 * cost.bytes / peaks.gb_s);
    floor_s / cost.seconds
}

/// Billions per second, a dash for none.
fn rate(per_second: f64, width: usize) -> String {
    if per_second > 0.0 {
        format!("{:>width$.1}", 1e-9 * per_second)
    } else {
        format!("{:>width$}", "–")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entries_of_the_ledger_add_up_to_the_step() {
        let clock = StageClock::new();
        let begin = Instant::now();
        clock.start_step();
        clock.enter(Stage::Block(3));
        clock.done(
            Kernel::Pointwise,
            Work {
                flops: 1000,
                bytes: 10,
            },
        );
        clock.enter(Stage::Block(4));
        clock.done(
            Kernel::Pointwise,
            Work {
                flops: 3000,
                bytes: 30,
            },
        );
        clock.end_step();
        let elapsed = begin.elapsed().as_secs_f64();

        let table = clock.table(2);
        let total: f64 = table.entries.iter().map(|(_, cost)| cost.seconds).sum();
        assert!(total * 2.0 <= elapsed, "{total} of {elapsed}");
        let rows = table.grouped(|entry| (entry.part(), entry.kernel()));
        assert_eq!(rows.len(), 2, "both blocks are one line, the optimiser another");
        assert_eq!((rows[0].1.flops, rows[0].1.bytes), (2000.0, 20.0));
        assert_eq!(table.json()["stages"].as_array().map(Vec::len), Some(3));
    }

    #[test]
    fn the_ceiling_is_the_slower_of_arithmetic_and_memory() {
        let peaks = Peaks {
            gflop_s: 100.0,
            gb_s: 10.0,
        };
        let cost = |flops: f64, bytes: f64| Cost {
            seconds: 1.0,
            flops,
            bytes,
        };
        assert_eq!(share_of_ceiling(&cost(50e9, 1e9), peaks), 0.5);
        assert_eq!(share_of_ceiling(&cost(50e9, 8e9), peaks), 0.8);
    }
}
