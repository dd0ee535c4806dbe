//! `effdet data doctor`, and its quick form before training.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use effdet_data::dataset::Category;
use effdet_data::doctor::{
    Check, ClassMap, ClassOutputs, Depth, Diagnosis, HtmlOptions, Instance, Options, Problem, Severity,
    Split, examine, page,
};
use effdet_data::error::DataError;
use effdet_data::layout::Layout;
use effdet_data::report::{Faults, LoadOptions};
use effdet_data::text::printable;
use effdet_model::anchors::AnchorConfig;
use effdet_model::hparams::HParams;
use effdet_model::label_map::LabelMap;

use super::checkpoint::Trained;
use super::model::{apply_overrides, resolve_hparams};
use super::progress::Progress;
use super::run_config::{RunData, class_outputs, label_map_of};
use super::sources::{self, Part};
use crate::cli::{DoctorArgs, SourceArgs};

/// Places that the table shows for each finding; all of them are in the JSON and on the page.
const INSTANCES_SHOWN: usize = 3;

/// Examines a data set and reports.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let mut unreadable = Vec::new();
    let splits = load(args, &mut unreadable)?;
    let mut class_maps = Vec::new();
    let mut hparams = resolve_hparams(&args.model, "d0")?;
    let label_map = match splits.first() {
        Some(split) => label_map_of(&split.dataset).ok(),
        None => None,
    };
    let mut given = Vec::new();
    if let Some(path) = &args.checkpoint {
        let named = args.model.model.is_some() || args.model.profile.is_some();
        ensure!(
            !named,
            "--checkpoint brings its own model and profile: leave out --model and --profile"
        );
        let trained = Trained::open(path)?;
        let source = format!("checkpoint {}", path.display());
        class_maps.push(class_map(source.clone(), &trained.label_map));
        given.push((source, trained.hparams.num_classes));
        if args.model.num_classes.is_none() && label_map.as_ref() == Some(&trained.label_map) {
            let outputs = class_outputs(&trained.label_map, hparams.profile);
            given.push(("training on this data".to_owned(), outputs));
        }
        hparams = trained.hparams;
        apply_overrides(&mut hparams, &args.model.hparams)?;
        if let Some(size) = args.model.image_size {
            hparams.image_size = size;
        }
    }
    if let Some(json) = &args.source.val_json {
        class_maps.push(ClassMap {
            source: json.display().to_string(),
            categories: effdet_data::coco::read_categories(json)?,
            may_lack: true,
        });
    }
    if let Some(outputs) = args.model.num_classes {
        given.push(("--num-classes".to_owned(), outputs));
    }
    let options = Options {
        depth: if args.quick { Depth::Quick } else { Depth::Full },
        class_outputs: label_map.map(|map| ClassOutputs {
            needed: map.min_num_classes(),
            given,
        }),
        anchors: Some((model_name(&hparams), AnchorConfig::from(&hparams))),
        class_maps,
        held_out: vec![args.source.val_split.clone(), "test".into()],
        max_objects_per_image: hparams.max_instances_per_image,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        ..Options::default()
    };
    let total: usize = splits.iter().map(|split| split.dataset.examples.len()).sum();
    let progress = Mutex::new(Progress::new(total as u64, "images examined"));
    let mut diagnosis = examine(&splits, &options, &|images| {
        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.advance(images as u64);
    });
    drop(progress);
    for problem in unreadable {
        diagnosis.add(problem);
    }
    if let Some(file) = &args.html {
        let title = place(&args.source);
        let text = page(&diagnosis, &splits, &title, &HtmlOptions::default());
        std::fs::write(file, text).with_context(|| format!("--html: cannot write {}", file.display()))?;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&diagnosis)?)?;
    } else {
        print(&mut out, &diagnosis)?;
        if let Some(file) = &args.html {
            writeln!(out, "page with the worst examples drawn: {}", file.display())?;
        }
    }
    let failed =
        diagnosis.count(Severity::Error) > 0 || (args.strict && diagnosis.count(Severity::Warning) > 0);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn place(source: &SourceArgs) -> String {
    let data = source.data.as_deref().or(source.train_json.as_deref());
    let data = data.map(|path| path.display().to_string());
    data.or_else(|| source.training_file_pattern.clone())
        .unwrap_or_default()
}

fn model_name(hparams: &HParams) -> String {
    hparams.name.trim_start_matches("efficientdet-").to_owned()
}

fn class_map(source: String, label_map: &LabelMap) -> ClassMap {
    let category = |(id, name): (_, &str)| Category {
        id,
        name: name.to_owned(),
    };
    ClassMap {
        source,
        categories: label_map.categories().map(category).collect(),
        may_lack: false,
    }
}

/// The splits that can be read, the training split first; the others become problems.
fn load(args: &DoctorArgs, unreadable: &mut Vec<Problem>) -> Result<Vec<Split>> {
    let options = LoadOptions {
        faults: Faults::Collect,
        follow_links: args.source.follow_links,
        ..LoadOptions::default()
    };
    ensure!(
        sources::is_given(&args.source),
        "no data: give --data DIR, or the files one by one"
    );
    let mut unread = |name: &str, place: String, error: anyhow::Error| {
        let check = match error.downcast_ref() {
            Some(DataError::NoBoxes { .. }) => Check::NoBoxes,
            _ => Check::UnreadableSplit,
        };
        let error = super::describe(&error);
        let problem = Problem::new(check, name, 1, [Instance::file(place, &error)]);
        unreadable.push(problem.detail(error));
    };
    let mut splits = Vec::new();
    if let Some(root) = args.source.data.as_ref().filter(|_| !has_files(&args.source)) {
        let layout = Layout::find(root)?;
        let mut names: Vec<String> = match args.splits.as_slice() {
            [] => layout.splits.keys().cloned().collect(),
            names => names.to_vec(),
        };
        // What is trained on comes first.
        names.sort_by_key(|name| *name != args.source.train_split);
        for name in names {
            let source = layout.split(&name)?;
            match source.load_with(&options) {
                Ok((dataset, report)) => splits.push(Split {
                    name,
                    place: root.display().to_string(),
                    format: source.format_name(),
                    dataset,
                    report,
                }),
                Err(error) => unread(&name, root.display().to_string(), error.into()),
            }
        }
        return Ok(splits);
    }
    for (name, part) in [("train", Part::Train), ("val", Part::Val)] {
        match sources::read_part(&args.source, part, &options) {
            Ok(None) => {}
            Ok(Some(loaded)) => splits.push(Split {
                name: name.to_owned(),
                place: loaded.place,
                format: loaded.format,
                dataset: loaded.dataset,
                report: loaded.report,
            }),
            Err(error) => unread(name, place(&args.source), error),
        }
    }
    Ok(splits)
}

fn has_files(source: &SourceArgs) -> bool {
    source.train_json.is_some()
        || source.val_json.is_some()
        || source.training_file_pattern.is_some()
        || source.val_file_pattern.is_some()
}

fn print(out: &mut impl Write, diagnosis: &Diagnosis) -> Result<()> {
    for split in &diagnosis.splits {
        let figures = &split.statistics;
        writeln!(
            out,
            "{}: {}, {} images ({} opened, {} of them readable), {} objects, {} categories",
            printable(&split.name),
            split.format,
            figures.images,
            split.images.examined,
            split.images.readable,
            figures.objects,
            figures.categories.len()
        )?;
    }
    if let Some(report) = &diagnosis.anchors {
        let (width, height) = report.input_px;
        let [small, medium, large] = report
            .by_size
            .map(|size| format!("{:.1} % of {}", 100.0 * size.recall(), size.boxes));
        writeln!(
            out,
            "anchors of {} at {width}x{height} overlap by half: {small} small, {medium} medium, {large} large boxes",
            report.model
        )?;
    }
    writeln!(out)?;
    for problem in &diagnosis.problems {
        writeln!(
            out,
            "{:<8} {:<20} {:<10} {:>6}  {}",
            problem.severity.name(),
            problem.check.code(),
            printable(&problem.split),
            problem.count,
            problem.title
        )?;
        // Most notes are counts; one with details says what to do about them.
        if problem.severity == Severity::Note && problem.detail.is_empty() {
            continue;
        }
        write_details(out, problem)?;
    }
    writeln!(
        out,
        "{} errors, {} warnings, {} notes",
        diagnosis.count(Severity::Error),
        diagnosis.count(Severity::Warning),
        diagnosis.count(Severity::Note)
    )?;
    Ok(())
}

fn write_details(out: &mut impl Write, problem: &Problem) -> Result<()> {
    if !problem.detail.is_empty() {
        writeln!(out, "         {}", printable(&problem.detail))?;
    }
    let repeats = |instance: &&Instance| instance.what != problem.detail;
    for instance in problem.instances.iter().filter(repeats).take(INSTANCES_SHOWN) {
        let record = instance
            .record
            .map_or_else(String::new, |record| format!(", record {record}"));
        writeln!(
            out,
            "           {}{record}: {}",
            printable(&instance.file),
            printable(&instance.what)
        )?;
    }
    if problem.count > INSTANCES_SHOWN && problem.instances.len() > 1 {
        writeln!(out, "           and {} more", problem.count - INSTANCES_SHOWN)?;
    }
    writeln!(out, "         remedy: {}", problem.remedy)?;
    Ok(())
}

/// The quick form before training: errors stop, warnings are printed.
pub fn before_training(
    data: &RunData,
    hparams: &HParams,
    pretrained: Option<&Path>,
    speak: bool,
) -> Result<()> {
    let mut splits = Vec::new();
    for origin in &data.origins {
        let (name, dataset) = match (origin.part, &data.val) {
            (Part::Train, _) => ("train", &data.train),
            (Part::Val, Some(val)) => ("val", val),
            (Part::Val, None) => continue,
        };
        splits.push(Split {
            name: name.to_owned(),
            place: origin.place.clone(),
            format: origin.format,
            dataset: dataset.as_ref().clone(),
            report: origin.report.clone(),
        });
    }
    let (mut class_maps, mut outputs) = (Vec::new(), None);
    if let Some(path) = pretrained
        && let Ok(trained) = Trained::open(path)
    {
        let source = format!("checkpoint {}", path.display());
        let label_map = label_map_of(&data.train)?;
        // Weights of other classes are replaced where they do not fit; the same number of classes under other names is a trap.
        if trained.label_map.min_num_classes() == label_map.min_num_classes() {
            class_maps.push(class_map(source.clone(), &trained.label_map));
        }
        // So is another number of outputs for the same classes.
        if trained.label_map == label_map {
            outputs = Some(ClassOutputs {
                needed: label_map.min_num_classes(),
                given: vec![
                    (source, trained.hparams.num_classes),
                    ("this run".to_owned(), hparams.num_classes),
                ],
            });
        }
    }
    let options = Options {
        depth: Depth::Quick,
        anchors: Some((model_name(hparams), AnchorConfig::from(hparams))),
        class_maps,
        class_outputs: outputs,
        max_objects_per_image: hparams.max_instances_per_image,
        ..Options::default()
    };
    let diagnosis = examine(&splits, &options, &|_| {});
    // Other weights under the same number of outputs may be meant.
    let is_map = |problem: &Problem| {
        problem.check == Check::ClassMapDiffers && problem.split.starts_with("checkpoint")
    };
    let errors: Vec<&Problem> = (diagnosis.problems.iter())
        .filter(|problem| problem.severity == Severity::Error && !is_map(problem))
        .collect();
    if speak {
        let mut text = Vec::new();
        for problem in &diagnosis.problems {
            if problem.severity == Severity::Note {
                continue;
            }
            let severity = if is_map(problem) {
                "warning"
            } else {
                problem.severity.name()
            };
            writeln!(
                text,
                "{severity}: {}, {}: {} x {}",
                problem.check.code(),
                printable(&problem.split),
                problem.count,
                problem.title
            )?;
            write_details(&mut text, problem)?;
        }
        if !text.is_empty() {
            tell!("{}", String::from_utf8_lossy(&text).trim_end());
        }
    }
    if let Some(problem) = errors.first() {
        bail!(
            "{}: {}. effdet data doctor shows all there is; --no-doctor trains nevertheless",
            problem.title,
            printable(&problem.detail)
        );
    }
    Ok(())
}
