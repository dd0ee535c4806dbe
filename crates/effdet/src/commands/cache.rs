//! The cache of decoded images that the command line asks for.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use effdet_data::cache::ImageCache;
use effdet_data::dataset::DetectionDataset;
use effdet_model::hparams::HParams;

use super::memory::gb;
use crate::cli::CacheArgs;

/// The cache for `dataset`, with a line on what it will take; none where it is not asked for.
///
/// `spare_bytes`: memory that the command leaves free, half of which a cache in memory may take. `default_folder`: of a disk cache.
pub fn image_cache(
    args: &CacheArgs,
    hparams: &HParams,
    dataset: &DetectionDataset,
    spare_bytes: u64,
    default_folder: &Path,
) -> Result<Option<(Arc<ImageCache>, String)>> {
    let on_disk = args.cache == "disk";
    ensure!(
        args.cache_dir.is_none() || on_disk,
        "--cache-dir is the folder of --cache disk: give both"
    );
    ensure!(
        args.cache_limit.is_none() || args.cache != "none",
        "--cache-limit limits --cache ram or --cache disk: give one of them"
    );
    ensure!(
        args.cache == "none" || !hparams.reduced_decode,
        "--cache keeps whole images, --reduced-decode decodes each as small as its sample needs: give one of them"
    );
    let decoded: u64 = (dataset.examples.iter())
        .map(|example| 3 * u64::from(example.width) * u64::from(example.height))
        .sum();
    let (cache, place, limit) = match args.cache.as_str() {
        "none" => return Ok(None),
        "ram" => {
            let limit = args.cache_limit.unwrap_or(spare_bytes / 2);
            let cache = ImageCache::in_memory(dataset.examples.len(), limit);
            (cache, "memory".to_owned(), limit)
        }
        _ => {
            let folder = args.cache_dir.as_deref().unwrap_or(default_folder);
            let limit = args.cache_limit.unwrap_or(u64::MAX);
            (
                ImageCache::on_disk(folder, limit)?,
                folder.display().to_string(),
                limit,
            )
        }
    };
    let within = match limit {
        u64::MAX => String::new(),
        limit => format!(", at most {}", gb(limit)),
    };
    let line = format!(
        "cache: {} of decoded images in {place}{within}; {} there",
        gb(decoded),
        gb(cache.used_bytes())
    );
    Ok(Some((Arc::new(cache), line)))
}
