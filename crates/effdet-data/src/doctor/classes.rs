//! Categories: ids that exist, maps that agree, and how the objects spread over them.

use std::collections::{BTreeMap, BTreeSet};

use effdet_model::label_map::LabelMap;

use super::findings::{Check, Instance, Problem, Severity};
use super::{ClassMap, ClassOutputs, Split};
use crate::dataset::Category;
use crate::inspect::statistics;

/// Lines of two class maps that are printed side by side.
const LINES: usize = 20;
/// Objects below which a category is rare.
const FEW: usize = 10;
/// Ratio of the most to the least frequent category that is worth a note.
const IMBALANCE: usize = 100;

/// `trains`: whether the split is the one to learn from.
pub(super) fn check(split: &Split, trains: bool, problems: &mut Vec<Problem>) {
    let categories = &split.dataset.categories;
    let name = split.name.as_str();
    unknown(split, problems);
    coco_ids(split, problems);
    let background = |category: &&Category| {
        let name = category.name.trim_matches('_').to_ascii_lowercase();
        matches!(name.as_str(), "background" | "bg")
    };
    let place = |category: &Category, what: &str| {
        Instance::file(
            &split.place,
            format!("category {} ({}) {what}", category.id, category.name),
        )
    };
    let found: Vec<Instance> = (categories.iter().filter(background))
        .map(|category| place(category, "stands for background"))
        .collect();
    push(Check::BackgroundClass, name, found, problems);
    let mut names: BTreeMap<&str, &Category> = BTreeMap::new();
    let mut shared = Vec::new();
    for category in categories {
        if let Some(first) = names.insert(&category.name, category) {
            shared.push(place(category, &format!("is called as category {} is", first.id)));
        }
    }
    push(Check::DuplicateName, name, shared, problems);
    let counts = statistics(&split.dataset).categories;
    let unused: Vec<Instance> = (counts.iter().filter(|count| count.objects == 0))
        .map(|count| {
            let what = format!("category {} ({}) has no object", count.id, count.name);
            Instance::file(&split.place, what)
        })
        .collect();
    push(Check::UnusedCategory, name, unused, problems);
    let rare: Vec<Instance> = (counts.iter())
        .filter(|count| (1..FEW).contains(&count.objects))
        .map(|count| {
            let what = format!(
                "category {} ({}) has {} objects",
                count.id, count.name, count.objects
            );
            Instance::file(&split.place, what)
        })
        .collect();
    if trains {
        push(Check::FewObjects, name, rare, problems);
    }
    let used = || counts.iter().filter(|count| count.objects > 0);
    if let (Some(most), Some(least)) = (
        used().max_by_key(|count| count.objects),
        used().min_by_key(|count| count.objects),
    ) && most.objects >= IMBALANCE * least.objects
    {
        let detail = format!(
            "{} ({} objects) is {} times as frequent as {} ({})",
            most.name,
            most.objects,
            most.objects / least.objects,
            least.name,
            least.objects
        );
        let instance = Instance::file(&split.place, &detail);
        problems.push(Problem::new(Check::Imbalance, name, 1, [instance]).detail(detail));
    }
}

fn push(check: Check, split: &str, instances: Vec<Instance>, problems: &mut Vec<Problem>) {
    if !instances.is_empty() {
        problems.push(Problem::new(check, split, instances.len(), instances));
    }
}

/// Objects of categories that do not exist, and whether a shift by one explains them.
fn unknown(split: &Split, problems: &mut Vec<Problem>) {
    let unknown = &split.report.unknown_categories;
    if unknown.is_empty() {
        return;
    }
    let name = split.name.as_str();
    let known: BTreeSet<u32> = split
        .dataset
        .categories
        .iter()
        .map(|category| category.id.0)
        .collect();
    let count: usize = unknown.values().sum();
    let list: Vec<String> = unknown
        .iter()
        .map(|(category, count)| format!("{category} ({count} objects)"))
        .collect();
    let instances: Vec<Instance> = (split.report.faults.iter())
        .filter(|fault| fault.kind == crate::report::FindingKind::UnknownCategory)
        .map(|fault| Instance {
            file: fault.file.clone(),
            record: Some(fault.record),
            what: fault.what.clone(),
            box_xywh_px: None,
        })
        .collect();
    let listed = format!("not in the class map: {}", list.join(", "));
    let used: Option<BTreeSet<u32>> = unknown.keys().map(|id| id.parse().ok()).collect();
    if let (Some(mut used), true) = (used, split.format != "YOLO") {
        used.extend(
            (split.dataset.examples.iter())
                .flat_map(|example| &example.objects)
                .map(|object| object.category.0),
        );
        for (by, all_fit) in [
            (
                1,
                used.iter()
                    .all(|id| id.checked_add(1).is_some_and(|next| known.contains(&next))),
            ),
            (-1, used.iter().all(|id| *id > 0 && known.contains(&(id - 1)))),
        ] {
            if all_fit {
                let detail = format!("{listed}. With {by:+} every id is in it");
                problems.push(Problem::new(Check::OffByOne, name, count, instances).detail(detail));
                return;
            }
        }
        let coco = LabelMap::coco();
        let is_coco_id = |id: &u32| coco.name(effdet_model::label_map::CategoryId(*id)).is_some();
        if known.iter().copied().eq(1..=80) && used.iter().all(is_coco_id) {
            let detail = format!(
                "{listed}. The class map numbers 80 categories 1 to 80, the annotations use COCO's ids 1 to 90"
            );
            problems.push(Problem::new(Check::UnknownCategory, name, count, instances).detail(detail));
            return;
        }
    }
    problems.push(Problem::new(Check::UnknownCategory, name, count, instances).detail(listed));
}

/// COCO's names on other ids than COCO's.
fn coco_ids(split: &Split, problems: &mut Vec<Problem>) {
    let coco = LabelMap::coco();
    let names: BTreeSet<&str> = coco.categories().map(|(_, name)| name).collect();
    let own: BTreeSet<&str> = (split.dataset.categories.iter())
        .map(|category| category.name.as_str())
        .collect();
    let elsewhere: Vec<&Category> = (split.dataset.categories.iter())
        .filter(|category| {
            names.contains(category.name.as_str()) && coco.name(category.id) != Some(&category.name)
        })
        .collect();
    if !names.is_subset(&own) || elsewhere.is_empty() {
        return;
    }
    let instances = elsewhere.iter().map(|category| {
        Instance::file(
            &split.place,
            format!("{} has id {}, not COCO's", category.name, category.id),
        )
    });
    let ids = split.dataset.categories.iter().map(|category| category.id.0);
    let detail = format!(
        "{} categories with ids {} to {}",
        split.dataset.categories.len(),
        ids.clone().min().unwrap_or(0),
        ids.max().unwrap_or(0)
    );
    problems.push(Problem::new(Check::CocoIds, &split.name, elsewhere.len(), instances).detail(detail));
}

/// Compares the class maps of splits with the first one's and with others.
pub(super) fn compare(splits: &[Split], maps: &[ClassMap], problems: &mut Vec<Problem>) {
    let Some((first, rest)) = splits.split_first() else {
        return;
    };
    let own = &first.dataset.categories;
    for split in rest {
        differences(
            (&first.name, own),
            (&split.name, &split.dataset.categories),
            false,
            problems,
        );
        let trained = statistics(&first.dataset).categories;
        let held_out = statistics(&split.dataset).categories;
        let missing: Vec<Instance> = held_out
            .iter()
            .filter(|count| count.objects > 0)
            .filter(|count| {
                trained
                    .iter()
                    .any(|other| other.id == count.id && other.objects == 0)
            })
            .map(|count| {
                let what = format!("{} has {} objects in {}", count.name, count.objects, split.name);
                Instance::file(&split.place, what)
            })
            .collect();
        push(Check::Untrained, &split.name, missing, problems);
    }
    for map in maps {
        differences(
            (&first.name, own),
            (&map.source, &map.categories),
            map.may_lack,
            problems,
        );
    }
}

/// Fewer outputs than categories, which is an error, or two numbers of them: 80, 90 and 91 are all said to be COCO's.
pub(super) fn outputs(outputs: &ClassOutputs, problems: &mut Vec<Problem>) {
    let needed = outputs.needed;
    let instances = |given: &mut dyn Iterator<Item = &(String, usize)>| -> Vec<Instance> {
        let told = |(source, count): &(String, usize)| {
            let what = format!("{source}: {count} class outputs; the categories need {needed}");
            Instance::file(source, what)
        };
        given.map(told).collect()
    };
    let lacking = instances(&mut outputs.given.iter().filter(|(_, count)| *count < needed));
    let all = instances(&mut outputs.given.iter());
    let differ = outputs.given.windows(2).any(|pair| pair[0].1 != pair[1].1);
    let (found, severity) = match lacking.is_empty() {
        false => (lacking, Severity::Error),
        true if differ => (all, Severity::Warning),
        true => return,
    };
    let detail = (found.iter().map(|instance| instance.what.as_str()))
        .collect::<Vec<_>>()
        .join(", ");
    let source = outputs.given.first().map_or("", |(source, _)| source);
    let problem = Problem::new(Check::OutputsDiffer, source, found.len(), found);
    problems.push(problem.detail(detail).severity(severity));
}

/// One problem with both maps side by side where they differ.
fn differences(
    (name, own): (&str, &[Category]),
    (other_name, other): (&str, &[Category]),
    may_lack: bool,
    problems: &mut Vec<Problem>,
) {
    let by_id = |categories: &'_ [Category]| -> BTreeMap<u32, String> {
        categories
            .iter()
            .map(|category| (category.id.0, category.name.clone()))
            .collect()
    };
    let (own, other) = (by_id(own), by_id(other));
    let ids: BTreeSet<u32> = own.keys().chain(other.keys()).copied().collect();
    let differing: Vec<u32> = ids
        .into_iter()
        .filter(|id| match (own.get(id), other.get(id)) {
            (Some(a), Some(b)) => a != b,
            (Some(_), None) => !may_lack,
            _ => true,
        })
        .collect();
    if differing.is_empty() {
        return;
    }
    let text = |map: &BTreeMap<u32, String>, id: &u32| {
        map.get(id)
            .map_or_else(|| "-".to_owned(), |name| format!("{name:?}"))
    };
    let instances = (differing.iter().take(LINES)).map(|id| {
        let what = format!(
            "id {id}: {} in {name}, {} in {other_name}",
            text(&own, id),
            text(&other, id)
        );
        Instance::file(other_name, what)
    });
    let renumbered = own.values().collect::<BTreeSet<_>>() == other.values().collect::<BTreeSet<_>>();
    let detail = match renumbered {
        true => format!("{name} and {other_name} have the same names under different ids"),
        false => format!("{} ids differ between {name} and {other_name}", differing.len()),
    };
    let problem = Problem::new(Check::ClassMapDiffers, other_name, differing.len(), instances);
    problems.push(problem.detail(detail).severity(Severity::Error));
}
