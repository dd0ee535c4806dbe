//! `effdet inspect machine`.

use std::io::Write;

use anyhow::Result;
use effdet_cpu::ceilings::{has_bf16_products, has_tile_products};
use effdet_cpu::engine::fastest_bf16;
use effdet_cpu::kernels::Executor;
use effdet_cpu::simd::Isa;
use effdet_cpu::storage::Products;
use serde_json::{Value, json};

use super::ceilings::{BEYOND_CACHES, copy_gb_s, fork_join_us, fresh_page_us, gflop_s, read_gb_s};
use super::engine::{chosen_isa, chosen_threads};
use super::host::{ForeignLoad, available_bytes, cache_bytes, cpu_name, write_foreign};
use super::progress::Progress;
use crate::cli::EngineArgs;

/// A ceiling with one thread and with all.
struct Ceiling {
    name: String,
    unit: &'static str,
    one: f64,
    all: Option<f64>,
}

/// Prints what the machine has, what was chosen, and the measured ceilings.
pub fn run(engine: &EngineArgs, as_json: bool) -> Result<()> {
    let isa = chosen_isa(engine)?;
    let all_threads = chosen_threads(engine);
    let [l1, l2, l3] = cache_bytes();
    let load = ForeignLoad::start();
    let ceilings = measure(isa, all_threads, l2, l3);
    let foreign_cores = load.cores();
    let why = if engine.isa.is_some() {
        "asked for"
    } else {
        "the widest that this processor has"
    };
    let executor = Executor::new(1, isa);
    let (pairs, tiles) = (has_bf16_products(&executor), has_tile_products(&executor));
    let available: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    let mut out = std::io::stdout().lock();
    if as_json {
        let ceilings: Vec<Value> = (ceilings.iter())
            .map(|c| json!({ "name": c.name, "unit": c.unit, "one_thread": c.one, "all_threads": c.all }))
            .collect();
        let report = json!({
            "cpu": cpu_name(), "threads": all_threads, "available_bytes": available_bytes(),
            "cache_bytes": { "l1": l1, "l2": l2, "l3": l3 },
            "isa": isa.to_string(), "isa_available": available, "bf16_products": pairs, "bf16_tiles": tiles,
            "bf16": fastest_bf16().to_string(), "ceilings": ceilings,
            "foreign_cores": foreign_cores,
        });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    let mib = |bytes: Option<usize>| {
        bytes.map_or("unknown".to_owned(), |bytes| match bytes >> 20 {
            0 => format!("{} KiB", bytes >> 10),
            mib => format!("{mib} MiB"),
        })
    };
    writeln!(
        out,
        "processor         {}",
        cpu_name().as_deref().unwrap_or("unknown")
    )?;
    writeln!(out, "threads           {all_threads}")?;
    if let Some(bytes) = available_bytes() {
        writeln!(
            out,
            "memory available  {:.1} GiB",
            bytes as f64 / f64::from(1 << 30)
        )?;
    }
    writeln!(
        out,
        "caches            L1 {}, L2 {}, L3 {}",
        mib(l1),
        mib(l2),
        mib(l3)
    )?;
    writeln!(
        out,
        "instruction set   {isa}, {why}; available: {}",
        available.join(", ")
    )?;
    writeln!(
        out,
        "bfloat16 products {} in pairs, {} in tiles; --precision bf16 means {}",
        if pairs {
            "by an instruction (vdpbf16ps)"
        } else {
            "as f32 multiply-adds"
        },
        if tiles {
            "by an instruction (AMX)"
        } else {
            "as f32 multiply-adds"
        },
        fastest_bf16(),
    )?;
    writeln!(
        out,
        "\n{:<42} {:>12} {:>12}",
        "ceiling",
        "1 thread",
        format!("{all_threads} threads")
    )?;
    for ceiling in &ceilings {
        let value = |value: f64| format!("{value:.1}");
        writeln!(
            out,
            "{:<42} {:>12} {:>12}  {}",
            ceiling.name,
            value(ceiling.one),
            ceiling.all.map_or("–".to_owned(), value),
            ceiling.unit
        )?;
    }
    write_foreign(&mut out, foreign_cores)?;
    Ok(())
}

fn measure(isa: Isa, all_threads: usize, l2: Option<usize>, l3: Option<usize>) -> Vec<Ceiling> {
    let (one, all) = (Executor::new(1, isa), Executor::new(all_threads, isa));
    let both = |measure: &dyn Fn(&Executor) -> f64| (measure(&one), (all_threads > 1).then(|| measure(&all)));
    let mut ceilings = Vec::new();
    let mut progress = Progress::new(9 + Isa::available().len() as u64, "measuring");
    let mut add = |name: String, unit, (one, all): (f64, Option<f64>)| {
        progress.advance(1);
        ceilings.push(Ceiling { name, unit, one, all });
    };
    for isa in Isa::available() {
        let of = |threads| gflop_s(&Executor::new(threads, isa), Products::Single);
        let all = (all_threads > 1).then(|| of(all_threads));
        add(format!("f32 multiply-adds, {isa}"), "GFLOP/s", (of(1), all));
    }
    for (name, products) in [("pair", Products::Bf16Pairs), ("tile", Products::Bf16Tiles)] {
        add(
            format!("bfloat16 {name} products, {isa}"),
            "GFLOP/s",
            both(&|executor| gflop_s(executor, products)),
        );
    }
    // A thread's part of L2; what lies well beyond it for the shared L3.
    let in_l2 = l2.unwrap_or(512 << 10) / 2;
    let in_l3 = (l3.unwrap_or(8 << 20) / 2).max(2 * in_l2);
    add(
        "read from L2".to_owned(),
        "GB/s",
        both(&|executor| read_gb_s(executor, in_l2 * executor.pool().threads())),
    );
    add(
        "read from L3".to_owned(),
        "GB/s",
        both(&|executor| read_gb_s(executor, in_l3)),
    );
    add(
        "read from main memory".to_owned(),
        "GB/s",
        both(&|executor| read_gb_s(executor, BEYOND_CACHES)),
    );
    add(
        "copy in main memory, read + written".to_owned(),
        "GB/s",
        both(&|executor| copy_gb_s(executor, BEYOND_CACHES, false)),
    );
    add(
        "the same, written past the caches".to_owned(),
        "GB/s",
        both(&|executor| copy_gb_s(executor, BEYOND_CACHES, true)),
    );
    add(
        "fork and join of an empty job".to_owned(),
        "µs",
        both(&fork_join_us),
    );
    add(
        "first write to a page of 4 KiB".to_owned(),
        "µs",
        (fresh_page_us(), None),
    );
    ceilings
}
