//! `effdet eval`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use effdet_ckpt::weights_hash;
use effdet_data::coco::{ResultRow, read_results, write_results};
use effdet_metrics::{CocoSummary, Dataset, DetectionRow, EvalOptions, ImageSet, evaluate};
use effdet_train::eval::Evaluator;
use serde_json::json;

use super::checkpoint::Trained;
use super::engine::cpu_engine;
use super::ground_truth;
use super::model::apply_overrides;
use super::progress::Progress;
use super::ranks::{self, Job};
use super::sources::{self, Part};
use crate::cli::{EvalArgs, StepMemory};

/// A score with the names of its categories.
struct Scored {
    title: String,
    summary: CocoSummary,
    names: HashMap<i64, String>,
}

/// Scores a checkpoint on a data set, or a results file on its ground truth.
pub fn run(args: &EvalArgs) -> Result<ExitCode> {
    ranks::run(&args.ranks, |job| report(args, job).map(|()| ExitCode::SUCCESS))
}

fn report(args: &EvalArgs, job: &Job<'_>) -> Result<()> {
    let scored = match (&args.results, &args.ground_truth, &args.checkpoint) {
        (Some(results), Some(truth), _) => score_file(results, truth, args.only_images_with_detections)?,
        (_, _, Some(checkpoint)) => score_checkpoint(checkpoint, args, job)?,
        _ => bail!("give --checkpoint with data, or --results with --ground-truth"),
    };
    if !job.is_root() {
        return Ok(());
    }
    for warning in &scored.summary.warnings {
        tell!("warning: {warning}");
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", as_json(&scored))?;
        return Ok(());
    }
    write!(out, "{}", scored.summary.table())?;
    if args.per_class {
        write!(out, "\n{}", per_class_table(&scored.summary, &scored.names))?;
    }
    if args.checkpoint.is_some() {
        let stats = &scored.summary.stats[..6];
        let csv: Vec<String> = stats
            .iter()
            .map(|value| format!("{:.2}", 100.0 * value))
            .collect();
        writeln!(out, "\n{} csv format: {}", scored.title, csv.join(","))?;
    }
    Ok(())
}

fn score_file(results: &Path, truth: &Path, only_images_with_detections: bool) -> Result<Scored> {
    let reference = ground_truth::read(truth)?;
    let rows: Vec<DetectionRow> = (read_results(results)?.iter())
        .map(|row| DetectionRow {
            image_id: row.image_id,
            category_id: row.category_id,
            bbox_xywh_px: row.bbox,
            score: row.score,
        })
        .collect();
    let category_ids: Vec<i64> = reference.categories.iter().map(|(id, _)| *id).collect();
    let dataset = Dataset {
        image_ids: &reference.image_ids,
        category_ids: &category_ids,
        ground_truth: &reference.objects,
    };
    let images = if only_images_with_detections {
        ImageSet::OnlyWithDetections
    } else {
        ImageSet::All
    };
    let summary = evaluate(&dataset, &rows, &EvalOptions { images })
        .with_context(|| format!("{} against {}", results.display(), truth.display()))?;
    Ok(Scored {
        title: results.display().to_string(),
        summary,
        names: reference.categories.into_iter().collect(),
    })
}

fn score_checkpoint(checkpoint: &Path, args: &EvalArgs, job: &Job<'_>) -> Result<Scored> {
    let mut trained = Trained::open(checkpoint)?;
    apply_overrides(&mut trained.hparams, &args.hparams)?;
    let mut dataset = sources::require(&args.source, Part::Val)?;
    if let Some(limit) = args.eval_samples {
        dataset.examples.truncate(limit);
    }
    check_categories(&trained, &dataset, job)?;
    let network = trained.network()?;
    let weights = trained.weights(&network, args.raw_weights)?;
    ranks::verify_evaluation(job, &weights_hash(&weights), &dataset)?;
    let mut engine_args = args.engine.clone();
    engine_args.threads = job.threads(args.engine.threads);
    let mut engine = cpu_engine(&network, &engine_args, StepMemory::default())?;
    let names = (dataset.categories.iter())
        .map(|category| (i64::from(category.id.0), category.name.clone()))
        .collect();
    let evaluator = Evaluator {
        dataset: Arc::new(dataset),
        hparams: trained.hparams.clone(),
        label_map: trained.label_map.clone(),
        batch_size: args.batch_size,
        workers: 1,
        only_images_with_detections: args.only_images_with_detections,
    };
    let images = evaluator.dataset.examples.len() as u64;
    let mut progress = job.is_root().then(|| Progress::new(images, "images"));
    let mut shown = 0;
    let evaluation = evaluator.run_on_ranks(&mut engine, &weights, job.group, &mut |done, _| {
        if let Some(progress) = &mut progress {
            progress.advance((done - shown) as u64);
        }
        shown = done;
    })?;
    drop(progress);
    if let Some(path) = args.save_results.as_ref().filter(|_| job.is_root()) {
        let rows: Vec<ResultRow> = (evaluation.detections.iter())
            .map(|row| ResultRow {
                image_id: row.image_id,
                category_id: row.category_id,
                bbox: row.bbox_xywh_px,
                score: row.score,
            })
            .collect();
        write_results(path, &rows)?;
        tell!("{} detections in {}", rows.len(), path.display());
    }
    Ok(Scored {
        title: format!("{} {}", trained.hparams.name, trained.reader.path().display()),
        summary: evaluation.summary,
        names,
    })
}

/// A checkpoint of other classes would score 0 without a word.
fn check_categories(
    trained: &Trained,
    dataset: &effdet_data::dataset::DetectionDataset,
    job: &Job<'_>,
) -> Result<()> {
    for category in &dataset.categories {
        let trained_name = trained.label_map.name(category.id);
        if trained_name.is_some_and(|name| name != category.name) {
            bail!(
                "{}: category {} is {:?}, the checkpoint was trained with {:?} there: evaluate on data of the same categories",
                dataset.name,
                category.id,
                category.name,
                trained_name.unwrap_or_default()
            );
        }
        if trained_name.is_none() && job.is_root() {
            tell!(
                "warning: {}: the checkpoint does not know category {} ({}); its objects count as missed",
                dataset.name,
                category.id,
                category.name
            );
        }
    }
    Ok(())
}

fn as_json(scored: &Scored) -> serde_json::Value {
    let metrics: serde_json::Map<_, _> = (scored.summary.named())
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .collect();
    let per_class: Vec<_> = (scored.summary.per_class.iter())
        .map(|class| {
            json!({"category_id": class.category_id, "name": scored.names.get(&class.category_id),
                   "objects": class.num_objects, "AP": class.ap, "AP50": class.ap50, "AP75": class.ap75,
                   "AR100": class.ar100})
        })
        .collect();
    json!({"of": scored.title, "metrics": metrics, "per_class": per_class})
}

/// One line per category.
pub fn per_class_table(summary: &CocoSummary, names: &HashMap<i64, String>) -> String {
    let mut table = format!(
        "{:>6}  {:<24} {:>8} {:>7} {:>7} {:>7} {:>7}\n",
        "id", "class", "objects", "AP", "AP50", "AP75", "AR100"
    );
    for class in &summary.per_class {
        let name = names.get(&class.category_id).map_or("", String::as_str);
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "{:>6}  {name:<24} {:>8} {:>7.3} {:>7.3} {:>7.3} {:>7.3}",
            class.category_id, class.num_objects, class.ap, class.ap50, class.ap75, class.ar100
        );
    }
    table
}
