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
    /// Seconds that the machine's ceilings would allow.
    floor_s: f64,
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
        self.floor_s += other.floor_s;
    }

    /// Time at the machine's ceilings over the time it took; none for work that is not counted.
    fn share_of_ceiling(&self) -> Option<f64> {
        (self.floor_s > 0.0).then(|| self.floor_s / self.seconds)
    }

    /// With the time of this work at the machine's ceilings: the slower of arithmetic and memory counts.
    fn with_floor(self, gflop_s: f64, gb_s: f64) -> Self {
        let floor_s = (1e-9 * self.flops / gflop_s).max(1e-9 * self.bytes / gb_s);
        Self { floor_s, ..self }
    }
}

/// The most that the machine can do, which shares are taken of.
#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Billions of floating-point operations per second with the threads in use.
    pub gflop_s: f64,
    /// The same for the products of pointwise convolutions, which half precision may make of bfloat16.
    pub pointwise_gflop_s: f64,
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

    /// The ledger per step of `images` images; with `peaks`, also the share of the machine's ceilings.
    pub fn table(&self, images: usize, peaks: Option<Peaks>) -> StageTable {
        let ledger = self.ledger();
        let per_image = 1.0 / (ledger.steps.max(1) as f64 * images as f64);
        let entries = ledger.entries.iter().map(|(&entry, cost)| {
            let cost = Cost {
                seconds: cost.seconds * per_image,
                flops: cost.flops * per_image,
                bytes: cost.bytes * per_image,
                floor_s: 0.0,
            };
            let cost = peaks.map_or(cost, |peaks| cost.with_floor(entry.gflop_s(peaks), peaks.gb_s));
            (entry, cost)
        });
        StageTable {
            entries: entries.collect(),
            peaks,
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
    peaks: Option<Peaks>,
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

    fn gflop_s(&self, peaks: Peaks) -> f64 {
        match self {
            Self::Engine(_, Kernel::Pointwise | Kernel::PointwiseBackward) => peaks.pointwise_gflop_s,
            _ => peaks.gflop_s,
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

    /// Writes a line per part and kernel, with the share of the machine's ceiling that the nominal work reaches where it is known.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let total: f64 = self.entries.iter().map(|(_, cost)| cost.seconds).sum();
        let rows = self.grouped(|entry| (entry.part(), entry.kernel()));
        if let Some(peaks) = self.peaks {
            let pointwise = match peaks.pointwise_gflop_s == peaks.gflop_s {
                true => String::new(),
                false => format!(" ({:.0} in products of bfloat16)", peaks.pointwise_gflop_s),
            };
            writeln!(
                out,
                "  ceilings measured: {:.0} GFLOP/s{pointwise}, {:.1} GB/s from main memory; what caches keep can exceed the latter",
                peaks.gflop_s, peaks.gb_s
            )?;
        }
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
            if self.peaks.is_some() { "  ceiling" } else { "" }
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
            match cost.share_of_ceiling() {
                Some(share) => writeln!(out, "  {:>6.0}%", 100.0 * share)?,
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
                "share_of_ceiling": cost.share_of_ceiling(),
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
        let ceilings = self.peaks.map(|peaks| {
            json!({
                "gflop_s": peaks.gflop_s, "pointwise_gflop_s": peaks.pointwise_gflop_s, "gb_s": peaks.gb_s,
            })
        });
        json!({ "kernels": kernels, "stages": stages, "ceilings": ceilings })
    }
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

        let table = clock.table(2, None);
        let total: f64 = table.entries.iter().map(|(_, cost)| cost.seconds).sum();
        assert!(total * 2.0 <= elapsed, "{total} of {elapsed}");
        let rows = table.grouped(|entry| (entry.part(), entry.kernel()));
        assert_eq!(rows.len(), 2, "both blocks are one line, the optimiser another");
        assert_eq!((rows[0].1.flops, rows[0].1.bytes), (2000.0, 20.0));
        assert_eq!(table.json()["stages"].as_array().map(Vec::len), Some(3));
    }

    #[test]
    fn the_ceiling_is_the_slower_of_arithmetic_and_memory() {
        let share = |flops: f64, bytes: f64| {
            let cost = Cost {
                seconds: 1.0,
                flops,
                bytes,
                floor_s: 0.0,
            };
            cost.with_floor(100.0, 10.0).share_of_ceiling()
        };
        assert_eq!(share(50e9, 1e9), Some(0.5));
        assert_eq!(share(50e9, 8e9), Some(0.8));
        assert_eq!(share(0.0, 0.0), None);
    }

    #[test]
    fn bfloat16_products_have_a_ceiling_of_their_own() {
        let clock = StageClock::new();
        clock.start_step();
        let work = Work {
            flops: 1 << 20,
            bytes: 1,
        };
        clock.done(Kernel::Stem, work);
        clock.done(Kernel::PointwiseBackward, work);
        clock.end_step();
        let peaks = Peaks {
            gflop_s: 1.0,
            pointwise_gflop_s: 2.0,
            gb_s: 1.0,
        };
        let floors: Vec<f64> = (clock.table(1, Some(peaks)).entries.iter())
            .map(|(_, cost)| cost.floor_s)
            .filter(|&floor| floor > 0.0)
            .collect();
        assert_eq!(floors[0], 2.0 * floors[1]);
    }
}
