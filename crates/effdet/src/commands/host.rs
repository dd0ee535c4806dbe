//! What the system says about this machine and process; none where it does not say.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

/// Name of the processor.
pub fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Sizes of the first processor's caches for data: L1, L2, L3.
pub fn cache_bytes() -> [Option<usize>; 3] {
    let mut sizes = [None; 3];
    let root = Path::new("/sys/devices/system/cpu/cpu0/cache");
    for index in 0..8 {
        let read = |file: &str| fs::read_to_string(root.join(format!("index{index}")).join(file));
        let (Ok(level), Ok(kind), Ok(size)) = (read("level"), read("type"), read("size")) else {
            break;
        };
        let size = size.trim();
        let (digits, unit) = match size.strip_suffix('K') {
            Some(digits) => (digits, 1 << 10),
            None => (
                size.trim_end_matches('M'),
                if size.ends_with('M') { 1 << 20 } else { 1 },
            ),
        };
        let slot = level
            .trim()
            .parse::<usize>()
            .ok()
            .and_then(|level| sizes.get_mut(level.wrapping_sub(1)));
        if let (Some(slot), Ok(number), true) = (slot, digits.parse::<usize>(), kind.trim() != "Instruction")
        {
            *slot = Some(number * unit);
        }
    }
    sizes
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

/// Warns under a measurement that other processes disturbed.
pub fn write_foreign(out: &mut impl Write, foreign_cores: Option<f64>) -> io::Result<()> {
    match foreign_cores.filter(|&cores| cores > 0.1) {
        Some(cores) => writeln!(
            out,
            "  other processes kept {cores:.1} processors busy: measure again on an idle machine"
        ),
        None => Ok(()),
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

/// Memory of this machine that processes can still take.
pub fn available_bytes() -> Option<u64> {
    meminfo("MemAvailable:")
}

fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Memory that the limits of this process's control groups leave.
pub fn cgroup_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let number = |file: &Path| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let root = Path::new("/sys/fs/cgroup");
    let own = root.join(path.trim_start_matches('/'));
    // A limit of any group above counts; `max` is none.
    (own.ancestors().take_while(|folder| folder.starts_with(root)))
        .filter_map(|folder| {
            let limit = number(&folder.join("memory.max"))?;
            Some(limit.saturating_sub(number(&folder.join("memory.current")).unwrap_or(0)))
        })
        .min()
}
