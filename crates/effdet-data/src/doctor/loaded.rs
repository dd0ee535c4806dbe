//! Problems that loading found.

use super::Split;
use super::findings::{Check, Instance, Problem};
use crate::report::{Finding, FindingKind};

/// The check that a kind of finding belongs to.
fn check_of(kind: FindingKind) -> Check {
    match kind {
        FindingKind::Clipped => Check::BoxClipped,
        FindingKind::NoArea => Check::BoxNoArea,
        FindingKind::Outside => Check::BoxOutside,
        FindingKind::Crowd => Check::Crowds,
        FindingKind::UnknownImage => Check::UnknownImage,
        FindingKind::UnknownCategory => Check::UnknownCategory,
        FindingKind::NoCategory => Check::NoCategory,
        FindingKind::NoBox => Check::NoBox,
        FindingKind::NotFinite => Check::NotFinite,
        FindingKind::DuplicateImage => Check::DuplicateImage,
        FindingKind::DuplicateAnnotation => Check::DuplicateAnnotation,
        FindingKind::Escape => Check::NameEscapes,
        FindingKind::MissingFile => Check::MissingFile,
        FindingKind::Malformed => Check::Malformed,
        FindingKind::DamagedRecord => Check::DamagedRecord,
        FindingKind::Undecodable => Check::Undecodable,
        FindingKind::SizeDiffers => Check::SizeDiffers,
        FindingKind::Edited => Check::Edited,
    }
}

fn instance(finding: &Finding) -> Instance {
    Instance {
        file: finding.file.clone(),
        record: Some(finding.record),
        what: finding.what.clone(),
        box_xywh_px: finding.box_xywh_px,
    }
}

/// Groups the findings of a load report.
pub(super) fn check(split: &Split, problems: &mut Vec<Problem>) {
    let report = &split.report;
    let lists = [
        &report.faults,
        &report.skipped,
        &report.dropped,
        &report.clipped,
        &report.notes,
    ];
    for check in Check::ALL {
        // The classes module knows more about these.
        if *check == Check::UnknownCategory {
            continue;
        }
        let of_check = |finding: &&Finding| check_of(finding.kind) == *check;
        let mut found: Vec<&Finding> = lists.into_iter().flatten().filter(of_check).collect();
        if found.is_empty() {
            continue;
        }
        let mut detail = String::new();
        if *check == Check::BoxClipped {
            let (over, more_than_one) = overhang(split, &found);
            found.sort_by(|a, b| over(b).total_cmp(&over(a)));
            detail = format!("{more_than_one} of them by more than a pixel");
        }
        let instances = found.iter().map(|finding| instance(finding));
        problems.push(Problem::new(*check, &split.name, found.len(), instances).detail(detail));
    }
}

/// How far a clipped box runs past its image, and for how many that is more than a pixel.
fn overhang<'a>(split: &'a Split, found: &[&Finding]) -> (impl Fn(&Finding) -> f64 + 'a, usize) {
    let sizes: std::collections::HashMap<&str, (u32, u32)> = (split.dataset.examples.iter())
        .map(|example| (example.file_name.as_str(), (example.width, example.height)))
        .collect();
    let over = move |finding: &Finding| {
        let size = sizes.get(finding.file.as_str());
        let Some(([x, y, w, h], &(width, height))) = finding.box_xywh_px.zip(size) else {
            return 0.0;
        };
        let (width, height) = (f64::from(width), f64::from(height));
        (x + w - width).max(y + h - height).max(-x).max(-y)
    };
    let more_than_one = found.iter().filter(|finding| over(finding) > 1.0).count();
    (over, more_than_one)
}
