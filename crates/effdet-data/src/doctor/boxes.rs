//! Boxes: whether there are any, what their numbers mean, and which are odd.

use super::Split;
use super::findings::{Check, Instance, Problem, Severity};

/// Fewer boxes prove nothing about a convention.
const FEWEST: usize = 10;
/// Share of boxes that fit as written from which on the convention is not in doubt.
const FIT: f64 = 0.9;
/// Share of boxes that another reading has to put inside their images.
const FIT_OTHERWISE: f64 = 0.995;
/// Share of images without objects that is worth a note.
const EMPTY: f64 = 0.1;

pub(super) fn check(split: &Split, max_objects_per_image: usize, problems: &mut Vec<Problem>) {
    let examples = &split.dataset.examples;
    let name = &split.name;
    let objects: usize = examples.iter().map(|example| example.objects.len()).sum();
    if objects == 0 && split.report.census.boxes == 0 && !examples.is_empty() {
        let instance = Instance::file(&split.place, format!("{} images, no box", examples.len()));
        problems.push(Problem::new(Check::NoBoxes, name, 1, [instance]));
    }
    if let Some(reading) = other_reading(split) {
        let count = split.report.census.boxes;
        let instance = Instance::file(&split.place, &reading);
        problems.push(Problem::new(Check::BoxConvention, name, count, [instance]).detail(reading));
    }
    let empty: Vec<&str> = (examples.iter())
        .filter(|example| example.objects.is_empty())
        .map(|example| example.file_name.as_str())
        .collect();
    if !empty.is_empty() && objects > 0 {
        let share = empty.len() as f64 / examples.len() as f64;
        let instances = empty.iter().map(|file| Instance::file(*file, "no object"));
        let problem = Problem::new(Check::EmptyImages, name, empty.len(), instances);
        let severity = if share > EMPTY {
            Severity::Warning
        } else {
            Severity::Note
        };
        problems.push(problem.severity(severity));
    }
    let crowds = examples.iter().flat_map(|example| {
        let crowds = example.objects.iter().enumerate();
        crowds
            .filter(|(_, object)| object.is_crowd)
            .map(|(index, object)| Instance {
                file: example.file_name.clone(),
                record: Some(index as i64),
                what: "a crowd".into(),
                box_xywh_px: Some(object.box_xywh_px),
            })
    });
    count(Check::Crowds, name, crowds, problems);
    let difficult = examples.iter().flat_map(|example| {
        let difficult = example.objects.iter().filter(|object| object.difficult);
        difficult.map(|_| Instance::file(&example.file_name, "a difficult object"))
    });
    count(Check::Difficult, name, difficult, problems);
    let many = examples
        .iter()
        .filter(|example| example.objects.len() > max_objects_per_image);
    let many =
        many.map(|example| Instance::file(&example.file_name, format!("{} objects", example.objects.len())));
    count(Check::ManyObjects, name, many, problems);
    let mut twice = Vec::new();
    for example in examples {
        let mut seen = std::collections::HashSet::new();
        for (index, object) in example.objects.iter().enumerate() {
            let key = (
                object.category,
                object.box_xywh_px.map(f64::to_bits),
                object.is_crowd,
            );
            if !seen.insert(key) {
                twice.push(Instance {
                    file: example.file_name.clone(),
                    record: Some(index as i64),
                    what: format!(
                        "box {:?} of category {} again",
                        object.box_xywh_px, object.category
                    ),
                    box_xywh_px: Some(object.box_xywh_px),
                });
            }
        }
    }
    count(Check::DuplicateBoxes, name, twice.into_iter(), problems);
}

fn count(check: Check, split: &str, instances: impl Iterator<Item = Instance>, problems: &mut Vec<Problem>) {
    let instances: Vec<Instance> = instances.collect();
    if !instances.is_empty() {
        problems.push(Problem::new(check, split, instances.len(), instances));
    }
}

/// The reading of the four numbers that fits when the format's own does not.
fn other_reading(split: &Split) -> Option<String> {
    let census = &split.report.census;
    let share = |count: usize| count as f64 / census.boxes as f64;
    if census.boxes < FEWEST {
        return None;
    }
    let as_written = format!(
        "read as written, {} of {} boxes lie inside their images",
        census.fit, census.boxes
    );
    if split.format != "YOLO" && share(census.below_one) >= FIT_OTHERWISE {
        return Some(
            "every number of every box is at most 1: they are divided by the size of the image, pixels are needed".into(),
        );
    }
    if matches!(split.format, "YOLO" | "TFRecord") && share(census.far_outside) >= 0.5 {
        return Some(format!(
            "{as_written}; they lie far outside: they are in pixels, fractions of the image's size are needed"
        ));
    }
    if share(census.fit) >= FIT {
        return None;
    }
    let readings = [
        (
            census.fit_as_corners,
            "the last two numbers are the far corner (xmin, ymin, xmax, ymax), width and height are needed",
        ),
        (
            census.fit_as_size,
            "the last two numbers are width and height, the far corner (xmin, ymin, xmax, ymax) is needed",
        ),
        (
            census.fit_transposed,
            "x and y have changed places (ymin, xmin, … instead of xmin, ymin, …)",
        ),
        (
            census.fit_as_centre,
            "the first two numbers are the centre, the near corner is needed",
        ),
        (
            census.fit_as_corner,
            "the first two numbers are the near corner, the centre is needed",
        ),
    ];
    let (count, reading) = readings.into_iter().max_by_key(|(count, _)| *count)?;
    (share(count) >= FIT_OTHERWISE).then(|| format!("{as_written}, {count} do if {reading}"))
}
