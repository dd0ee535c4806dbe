//! What to do about samples that are damaged: stop, or leave them out before anything is trained or scored.
//!
//! Nothing is replaced while training runs: the damaged samples are found first, by reading and decoding every image, and the
//! data set is what remains. So epochs, orders and draws depend on the data alone, a list says what is missing, and an image
//! that breaks later still stops the run.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::dataset::{DetectionDataset, Example, ImageSource};
use crate::decode::{DecodeOptions, decode_rgb};
use crate::error::{DataError, Result};
use crate::report::{Finding, FindingKind, LoadReport};

/// How many damaged samples are bearable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cap {
    /// So many.
    Count(usize),
    /// So many in a hundred, at least one.
    Percent(f64),
}

impl Cap {
    /// Samples that may be left out of `total`.
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Count(count) => count,
            Self::Percent(0.0) => 0,
            Self::Percent(percent) => ((percent / 100.0 * total as f64) as usize).max(1),
        }
    }
}

impl FromStr for Cap {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text:?} is neither a number of samples nor a percentage such as 1%");
        match text.strip_suffix('%') {
            Some(percent) => {
                let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
                match (0.0..=100.0).contains(&percent) {
                    true => Ok(Self::Percent(percent)),
                    false => Err(wrong()),
                }
            }
            None => text.trim().parse().map(Self::Count).map_err(|_| wrong()),
        }
    }
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A sample that is left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Excluded {
    /// File, record and reason.
    #[serde(flatten)]
    pub finding: Finding,
    /// Image id, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_id: Option<i64>,
    /// Where its bytes are, for [`quarantine`].
    #[serde(skip)]
    pub source: Option<ImageSource>,
}

/// Whether a fault damages its own sample and nothing else.
fn is_damage(kind: FindingKind) -> bool {
    matches!(
        kind,
        FindingKind::Malformed
            | FindingKind::MissingFile
            | FindingKind::DamagedRecord
            | FindingKind::Undecodable
            | FindingKind::SizeDiffers
    )
}

/// Takes the damaged samples of a load report, and finds and removes those whose images cannot be used.
///
/// `progress` is called after every image.
///
/// # Errors
/// [`DataError::Malformed`] for faults that are no damage (an unknown category, say) and for more damage than `cap` allows.
///
/// # Determinism
/// The same for any number of threads.
pub fn exclude(
    dataset: &mut DetectionDataset,
    report: &mut LoadReport,
    cap: Cap,
    (decode, max_encoded_bytes): (&DecodeOptions, u64),
    threads: usize,
    progress: &(dyn Fn() + Sync),
) -> Result<Vec<Excluded>> {
    if let Some(fault) = report.faults.iter().find(|fault| !is_damage(fault.kind)) {
        return Err(DataError::Malformed {
            file: fault.file.clone().into(),
            what: format!(
                "{}. This is no damage of one sample, so it is not left out: correct it",
                fault.what
            ),
        });
    }
    let total = dataset.examples.len() + report.faults.len() + report.skipped.len();
    let of_report = |finding: Finding| Excluded {
        finding,
        image_id: None,
        source: None,
    };
    let faults = std::mem::take(&mut report.faults);
    let skipped = std::mem::take(&mut report.skipped);
    let mut excluded: Vec<Excluded> = faults.into_iter().chain(skipped).map(of_report).collect();
    let damaged = undecodable(&dataset.examples, decode, max_encoded_bytes, threads, progress);
    for (index, kind, error) in damaged.iter().rev() {
        let example = dataset.examples.remove(*index);
        excluded.push(Excluded {
            finding: Finding {
                kind: *kind,
                file: place(&example),
                record: *index as i64,
                what: error.to_string(),
                box_xywh_px: None,
            },
            image_id: Some(example.image_id),
            source: Some(example.source),
        });
    }
    excluded.sort_by(|a, b| (&a.finding.file, a.finding.record).cmp(&(&b.finding.file, b.finding.record)));
    let allowed = cap.of(total);
    if excluded.len() > allowed {
        let first: Vec<String> = excluded
            .iter()
            .take(8)
            .map(|excluded| excluded.finding.to_string())
            .collect();
        return Err(DataError::Malformed {
            file: dataset.name.clone().into(),
            what: format!(
                "{} of {total} samples are damaged, more than the {allowed} allowed: copy or convert the data again. The first: {}",
                excluded.len(),
                first.join("; ")
            ),
        });
    }
    Ok(excluded)
}

/// File of an image and, in a record file, its offset.
fn place(example: &Example) -> String {
    match &example.source {
        ImageSource::File(file) => file.display().to_string(),
        ImageSource::Record { shard, offset, .. } => {
            format!("{}, byte {offset} ({})", shard.display(), example.file_name)
        }
        ImageSource::Memory(_) => example.file_name.clone(),
    }
}

/// Examples whose images cannot be used, ascending.
fn undecodable(
    examples: &[Example],
    decode: &DecodeOptions,
    max_encoded_bytes: u64,
    threads: usize,
    progress: &(dyn Fn() + Sync),
) -> Vec<(usize, FindingKind, DataError)> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(example) = examples.get(index) else { break };
            if let Some((kind, error)) = damage(example, decode, max_encoded_bytes) {
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                found.push((index, kind, error));
            }
            progress();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(examples.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(index, ..)| *index);
    found
}

fn damage(
    example: &Example,
    decode: &DecodeOptions,
    max_encoded_bytes: u64,
) -> Option<(FindingKind, DataError)> {
    let bytes = match example.source.read_bytes(max_encoded_bytes) {
        Ok(bytes) => bytes,
        Err(error) => return Some((FindingKind::Undecodable, error)),
    };
    match decode_rgb(&bytes, decode) {
        Err(reason) => Some((
            FindingKind::Undecodable,
            DataError::Image {
                file: example.file_name.clone(),
                reason,
            },
        )),
        Ok(image) => (!example.fits(image.dimensions())).then(|| {
            let error = DataError::SizeMismatch {
                file: example.file_name.clone(),
                decoded: image.dimensions(),
                annotated: (example.width, example.height),
            };
            (FindingKind::SizeDiffers, error)
        }),
    }
}

/// Writes one JSON object a line for every sample that is left out.
///
/// # Errors
/// [`DataError::Io`].
pub fn write_list(file: &Path, excluded: &[Excluded]) -> Result<()> {
    let write = || -> io::Result<()> {
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut output = BufWriter::new(File::create(file)?);
        for sample in excluded {
            serde_json::to_writer(&mut output, sample)?;
            output.write_all(b"\n")?;
        }
        output.flush()
    };
    write().map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })
}

/// Copies the bytes of damaged images into a folder as `<number in the list>.bin`; what cannot be read is not copied.
///
/// The data set itself stays as it is.
///
/// # Errors
/// [`DataError::Io`].
pub fn quarantine(folder: &Path, excluded: &[Excluded], max_encoded_bytes: u64) -> Result<usize> {
    let mut copied = 0;
    for (number, sample) in excluded.iter().enumerate() {
        let bytes = sample
            .source
            .as_ref()
            .and_then(|source| source.read_bytes(max_encoded_bytes).ok());
        let Some(bytes) = bytes else { continue };
        let file = folder.join(format!("{number:06}.bin"));
        let write = fs::create_dir_all(folder).and_then(|()| fs::write(&file, bytes));
        write.map_err(|source| DataError::Io { file, source })?;
        copied += 1;
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{SyntheticConfig, dataset};

    fn damaged() -> DetectionDataset {
        let config = SyntheticConfig {
            image_size: 48,
            ..SyntheticConfig::default()
        };
        let mut data = dataset(&config, 0..10);
        data.examples[3].source = ImageSource::Memory(b"nothing"[..].into());
        data.examples[7].width = 50;
        let bytes = data.examples[8].source.read_bytes(1 << 20).unwrap();
        data.examples[8].source = ImageSource::Memory(bytes[..bytes.len() / 2].into());
        data
    }

    fn run(
        data: &mut DetectionDataset,
        report: &mut LoadReport,
        cap: Cap,
        threads: usize,
    ) -> Result<Vec<Excluded>> {
        let limits = (&DecodeOptions::default(), 1 << 20);
        exclude(data, report, cap, limits, threads, &|| {})
    }

    #[test]
    fn damaged_samples_are_left_out_and_listed_with_their_reasons() {
        let mut expected = None;
        for threads in [1, 3] {
            let mut data = damaged();
            let excluded = run(&mut data, &mut LoadReport::default(), Cap::Count(3), threads).unwrap();
            let ids: Vec<i64> = data.examples.iter().map(|example| example.image_id).collect();
            assert_eq!(ids, [1, 2, 3, 5, 6, 7, 10]);
            let folder = tempfile::tempdir().unwrap();
            let list = folder.path().join("a/list.jsonl");
            write_list(&list, &excluded).unwrap();
            let text = fs::read_to_string(list).unwrap();
            assert_eq!(text.lines().count(), 3);
            assert!(
                text.contains("neither JPEG nor PNG")
                    && text.contains("50x48")
                    && text.contains("end marker")
            );
            assert_eq!(
                quarantine(&folder.path().join("q"), &excluded, 1 << 20).unwrap(),
                3
            );
            assert_eq!(fs::read(folder.path().join("q/000000.bin")).unwrap(), b"nothing");
            assert_eq!(*expected.get_or_insert(text.clone()), text);
        }
    }

    #[test]
    fn more_damage_than_allowed_and_faults_that_are_none_stop() {
        for cap in [Cap::Count(2), Cap::Percent(20.0), Cap::Percent(0.0)] {
            let error = run(&mut damaged(), &mut LoadReport::default(), cap, 1)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("3 of 10") && error.contains("000003.jpg"),
                "{error}"
            );
        }
        let fault = |kind| LoadReport {
            faults: vec![Finding {
                kind,
                file: "a.json".into(),
                record: 4,
                what: "odd".into(),
                box_xywh_px: None,
            }],
            ..LoadReport::default()
        };
        let mut report = fault(FindingKind::UnknownCategory);
        assert!(
            run(&mut damaged(), &mut report, Cap::Count(9), 1)
                .unwrap_err()
                .to_string()
                .contains("a.json")
        );
        let mut report = fault(FindingKind::MissingFile);
        assert_eq!(
            run(&mut damaged(), &mut report, Cap::Count(9), 1).unwrap().len(),
            4
        );
    }

    #[test]
    fn caps_are_numbers_or_percentages() {
        assert_eq!("12".parse(), Ok(Cap::Count(12)));
        assert_eq!("1.5%".parse(), Ok(Cap::Percent(1.5)));
        assert_eq!(Cap::Percent(1.5).of(1000), 15);
        assert_eq!((Cap::Percent(1.0).of(10), Cap::Percent(0.0).of(10)), (1, 0));
        for wrong in ["", "x", "-1", "101%", "%"] {
            assert!(wrong.parse::<Cap>().is_err(), "{wrong}");
        }
    }
}
