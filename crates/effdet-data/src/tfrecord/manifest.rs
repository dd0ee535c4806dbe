//! What a set of shards should hold: counts, checksums and classes.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::shards::ShardName;
use crate::coco::write_json;
use crate::dataset::{DetectionDataset, read_file};
use crate::error::{DataError, Result};

/// Entries for a hundred thousand shards take less.
const MAX_BYTES: u64 = 64 << 20;

/// Contents of `<prefix>.manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Records in all shards.
    pub records: u64,
    /// Objects in all shards.
    pub objects: u64,
    /// Names of the categories by id.
    pub categories: BTreeMap<u32, String>,
    /// Shards in order.
    pub shards: Vec<ShardEntry>,
}

/// What one shard should hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name.
    pub file: String,
    /// Records.
    pub records: u64,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 of the file in hexadecimal.
    pub sha256: String,
}

/// `<prefix>.manifest.json`.
pub(super) fn file(prefix: &Path) -> PathBuf {
    let mut file = prefix.as_os_str().to_owned();
    file.push(".manifest.json");
    file.into()
}

impl Manifest {
    pub(super) fn new(dataset: &DetectionDataset, shards: Vec<ShardEntry>) -> Self {
        let category = |category: &crate::dataset::Category| (category.id.0, category.name.clone());
        Self {
            records: dataset.examples.len() as u64,
            objects: dataset
                .examples
                .iter()
                .map(|example| example.objects.len() as u64)
                .sum(),
            categories: dataset.categories.iter().map(category).collect(),
            shards,
        }
    }

    pub(super) fn write(&self, file: &Path) -> Result<()> {
        write_json(file, self)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`DataError::Malformed`], [`DataError::Io`].
    pub fn read(file: &Path) -> Result<Self> {
        serde_json::from_slice(&read_file(file, MAX_BYTES)?).map_err(|error| DataError::Malformed {
            file: file.to_path_buf(),
            what: format!("is no manifest of shards ({error}): remove it, or convert the data set again"),
        })
    }
}

/// Compares the number of records of shards with the manifests beside them.
pub(super) fn check(shards: &[PathBuf], records: impl Iterator<Item = u64>) -> Result<()> {
    let mut manifests: HashMap<PathBuf, Option<Manifest>> = HashMap::new();
    for (shard, records) in shards.iter().zip(records) {
        let Some(name) = ShardName::parse(shard) else {
            continue;
        };
        let file = file(&shard.with_file_name(name.prefix));
        if !manifests.contains_key(&file) {
            let manifest = file.is_file().then(|| Manifest::read(&file)).transpose()?;
            manifests.insert(file.clone(), manifest);
        }
        let Some(Some(manifest)) = manifests.get(&file) else {
            continue;
        };
        let entry = (manifest.shards.iter()).find(|entry| shard.ends_with(&entry.file));
        if let Some(entry) = entry
            && entry.records != records
        {
            return Err(DataError::Malformed {
                file: shard.clone(),
                what: format!(
                    "holds {records} records, {} says {}: copy or convert the shards again",
                    file.display(),
                    entry.records
                ),
            });
        }
    }
    Ok(())
}
