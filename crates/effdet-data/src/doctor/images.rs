//! Images: whether they can be read, are what the annotations say, and lie in one split only.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::findings::{Check, Instance, Problem};
use super::{Depth, Options, Split};
use crate::dataset::Example;
use crate::decode::{decode_rgb, probe};
use crate::error::DataError;
use crate::header::{Colour, colour, extension_fits, orientation};

/// Images that a quick look opens.
const QUICK_IMAGES: usize = 64;

/// What the images of a split are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ImageCensus {
    /// Images that were opened.
    pub examined: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Of them, those that can be decoded (or, in a quick look, whose header can be read).
    pub readable: usize,
    /// Greyscale ones.
    pub greyscale: usize,
    /// With an EXIF orientation.
    pub rotated: usize,
    /// First example of each content.
    #[serde(skip)]
    contents: HashMap<[u8; 32], usize>,
}

/// What one image is.
struct Facts {
    bytes: u64,
    size: (u32, u32),
    format_name: &'static str,
    colour: Colour,
    orientation: u8,
    digest: Option<[u8; 32]>,
}

fn facts(example: &Example, options: &Options) -> Result<Facts, DataError> {
    let bytes = example.source.read_bytes(options.max_encoded_bytes)?;
    let image = |reason| DataError::Image {
        file: example.file_name.clone(),
        reason,
    };
    let probed = probe(&bytes).map_err(image)?;
    let mut digest = None;
    if options.depth == Depth::Full {
        decode_rgb(&bytes, &options.decode).map_err(image)?;
        digest = Some(Sha256::digest(&bytes).into());
    }
    Ok(Facts {
        bytes: bytes.len() as u64,
        size: (probed.width, probed.height),
        format_name: probed.format_name,
        colour: colour(&bytes),
        orientation: orientation(&bytes),
        digest,
    })
}

pub(super) fn check(
    split: &Split,
    options: &Options,
    progress: &(dyn Fn(usize) + Sync),
) -> (ImageCensus, Vec<Problem>) {
    let examples = &split.dataset.examples;
    let step = match options.depth {
        Depth::Full => 1,
        Depth::Quick => examples.len().div_ceil(QUICK_IMAGES).max(1),
    };
    let chosen: Vec<usize> = (0..examples.len()).step_by(step).collect();
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Result<Facts, DataError>)>> = Mutex::default();
    let work = || {
        while let Some(&index) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = facts(&examples[index], options);
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            results.push((index, found));
            drop(results);
            progress(1);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.min(chosen.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    summarise(split, &results)
}

fn summarise(split: &Split, results: &[(usize, Result<Facts, DataError>)]) -> (ImageCensus, Vec<Problem>) {
    let mut census = ImageCensus::default();
    let mut found: HashMap<Check, Vec<Instance>> = HashMap::new();
    for (index, result) in results {
        let example = &split.dataset.examples[*index];
        let mut put = |check, what: String| {
            let instance = Instance::file(&example.file_name, what);
            found.entry(check).or_default().push(instance);
        };
        census.examined += 1;
        let facts = match result {
            Ok(facts) => facts,
            Err(error) => {
                let check = match error {
                    DataError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                        Check::MissingFile
                    }
                    _ => Check::Undecodable,
                };
                put(check, error.to_string());
                continue;
            }
        };
        census.readable += 1;
        census.bytes += facts.bytes;
        let (width, height) = facts.size;
        if !example.fits(facts.size) {
            let turned = facts.size == (example.height, example.width) && facts.orientation >= 5;
            let why = match turned {
                true => ": EXIF turns it, the boxes refer to the upright image",
                false => "",
            };
            put(
                Check::SizeDiffers,
                format!(
                    "{width}x{height} pixels, annotated as {}x{}{why}",
                    example.width, example.height
                ),
            );
        }
        if facts.orientation != 1 {
            census.rotated += 1;
            put(
                Check::ExifRotation,
                format!("EXIF orientation {}", facts.orientation),
            );
        }
        match facts.colour {
            Colour::Rgb | Colour::Unknown => {}
            Colour::Grey => {
                census.greyscale += 1;
                put(Check::Greyscale, "one channel".into());
            }
            Colour::Cmyk => put(Check::OtherColours, "CMYK".into()),
            Colour::Palette => put(Check::OtherColours, "a palette".into()),
            Colour::SixteenBit => put(Check::OtherColours, "16 bits a sample".into()),
            Colour::Alpha => put(Check::OtherColours, "an alpha channel".into()),
        }
        if !extension_fits(&example.file_name, facts.format_name) {
            put(
                Check::Extension,
                format!("is a {} file", facts.format_name.to_ascii_uppercase()),
            );
        }
        if let Some(digest) = facts.digest {
            match census.contents.entry(digest) {
                std::collections::hash_map::Entry::Vacant(place) => {
                    place.insert(*index);
                }
                std::collections::hash_map::Entry::Occupied(first) => {
                    let first = &split.dataset.examples[*first.get()];
                    put(
                        Check::DuplicateContent,
                        format!("the same bytes as {}", first.file_name),
                    );
                }
            }
        }
    }
    let problem = |(check, instances): (Check, Vec<Instance>)| {
        Problem::new(check, &split.name, instances.len(), instances)
    };
    let mut problems: Vec<Problem> = found.into_iter().map(problem).collect();
    problems.sort_by_key(|problem| problem.check);
    (census, problems)
}

/// Images that both splits hold.
pub(super) fn leakage(
    (train, train_images): (&Split, &ImageCensus),
    (held_out, held_out_images): (&Split, &ImageCensus),
    problems: &mut Vec<Problem>,
) {
    let mut shared: Vec<(usize, usize)> = (held_out_images.contents.iter())
        .filter_map(|(digest, &index)| Some((index, *train_images.contents.get(digest)?)))
        .collect();
    if shared.is_empty() {
        return;
    }
    shared.sort_unstable();
    let instances = shared.iter().map(|&(index, first)| {
        let (file, first) = (
            &held_out.dataset.examples[index].file_name,
            &train.dataset.examples[first].file_name,
        );
        Instance::file(file, format!("the same bytes as {first} of {}", train.name))
    });
    let detail = format!(
        "{} of the {} images of {}",
        shared.len(),
        held_out.dataset.examples.len(),
        held_out.name
    );
    problems.push(Problem::new(Check::Leakage, &held_out.name, shared.len(), instances).detail(detail));
}
