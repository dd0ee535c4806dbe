//! What the system says about this machine and process; none where it does not say.

use std::fs;
use std::time::Instant;

/// Name of the processor.
pub fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Largest resident size of this process so far, in MiB.
pub fn peak_rss_mib() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Clock ticks per second of `/proc`; 100 on every Linux since 2.6.
const TICKS_PER_SECOND: f64 = 100.0;

/// Measures how many processors others keep busy.
pub struct ForeignLoad {
    started: Instant,
    busy: Option<(u64, u64)>,
}

impl ForeignLoad {
    /// Starts measuring.
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            busy: busy_ticks(),
        }
    }

    /// Mean number of processors that other processes kept busy since the start.
    pub fn cores(&self) -> Option<f64> {
        let (all_before, own_before) = self.busy?;
        let (all, own) = busy_ticks()?;
        let foreign = (all - all_before) as f64 - (own - own_before) as f64;
        Some((foreign / TICKS_PER_SECOND / self.started.elapsed().as_secs_f64()).max(0.0))
    }
}

/// Busy ticks of the machine and of this process.
fn busy_ticks() -> Option<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let fields: Vec<u64> = (stat.lines().next()?.split_whitespace().skip(1))
        .map_while(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is within user.
    let all = fields.iter().take(8).sum::<u64>() - fields.get(3)? - fields.get(4)?;
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    // The command name may hold spaces and parentheses; the rest follows the last one.
    let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    let own = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some((all, own))
}

/// Memory of this machine in GiB.
pub fn memory_gib() -> Option<f64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / f64::from(1 << 20))
}
