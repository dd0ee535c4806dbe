//! Shard files: their names, and whether a set of them is complete.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// `<prefix>-<index>-of-<total><suffix>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardName {
    /// File name before the numbers.
    pub(crate) prefix: String,
    /// Counted from 0.
    pub(crate) index: usize,
    /// Shards of the set.
    pub(crate) total: usize,
    suffix: String,
}

impl ShardName {
    pub(crate) fn parse(file: &Path) -> Option<Self> {
        let name = file.file_name()?.to_str()?;
        let (head, tail) = name.rsplit_once("-of-")?;
        let (prefix, index) = head.rsplit_once('-')?;
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (total, suffix) = tail.split_at(digits);
        let number = |text: &str| (text.len() >= 5).then(|| text.parse().ok()).flatten();
        Some(Self {
            prefix: prefix.to_owned(),
            index: number(index)?,
            total: number(total)?,
            suffix: suffix.to_owned(),
        })
    }

    pub(crate) fn file_name(prefix: &str, index: usize, total: usize) -> String {
        format!("{prefix}-{index:05}-of-{total:05}.tfrecord")
    }
}

/// Whether a file is called as shards are.
pub(crate) fn is_shard_file(file: &Path) -> bool {
    let name = file
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    let numbered = ShardName::parse(Path::new(plain)).is_some_and(|shard| shard.suffix.is_empty());
    plain.ends_with(".tfrecord") || plain.ends_with(".tfrecords") || plain.ends_with(".tfrec") || numbered
}

/// Files that match a glob pattern, sorted; half-written ones (`.tmp`) are left out.
///
/// # Errors
/// [`DataError::Caller`] for an invalid pattern and one that nothing matches; [`DataError::Malformed`] for a set of shards
/// `…-00000-of-00032…` that is not complete, unless `allow_partial`.
pub fn find_shards(pattern: &str, allow_partial: bool) -> Result<Vec<PathBuf>> {
    let paths = glob::glob(pattern).map_err(|error| DataError::Caller {
        what: format!("{pattern:?} is no file pattern: {error}"),
    })?;
    let mut shards = Vec::new();
    for path in paths {
        let path = path.map_err(|error| DataError::Io {
            file: error.path().to_path_buf(),
            source: error.into(),
        })?;
        // Half-written shards, and what lies beside shards, match patterns like `train*`.
        let other = path
            .extension()
            .is_some_and(|extension| extension == "tmp" || extension == "json");
        if path.is_file() && !other {
            shards.push(path);
        }
    }
    shards.sort();
    if shards.is_empty() {
        return Err(DataError::Caller {
            what: format!(
                "no file matches {pattern:?}: check the folder, and quote the pattern if the shell may expand it"
            ),
        });
    }
    if !allow_partial {
        check_complete(&shards)?;
    }
    Ok(shards)
}

/// Refuses sets of shards with gaps and mixed sets.
///
/// # Errors
/// [`DataError::Malformed`] naming what is missing.
pub fn check_complete(shards: &[PathBuf]) -> Result<()> {
    let mut sets: BTreeMap<(PathBuf, String), (usize, &Path, Vec<usize>)> = BTreeMap::new();
    for file in shards {
        let Some(name) = ShardName::parse(file) else {
            continue;
        };
        // A shard and its compressed copy are the same shard.
        let suffix = name.suffix.strip_suffix(".gz").unwrap_or(&name.suffix);
        let set = (file.with_file_name(&name.prefix), suffix.to_owned());
        let (total, first, found) = sets.entry(set).or_insert((name.total, file, Vec::new()));
        if *total != name.total || name.index >= name.total {
            return Err(DataError::Malformed {
                file: file.clone(),
                what: format!(
                    "does not belong to the same set of shards as {}: remove the older set, or give a pattern \
                     that matches one of them",
                    first.display()
                ),
            });
        }
        if found.contains(&name.index) {
            return Err(DataError::Malformed {
                file: file.clone(),
                what: format!(
                    "shard {:05} of this set is there twice, once compressed: remove one of them",
                    name.index
                ),
            });
        }
        found.push(name.index);
    }
    for (total, first, mut found) in sets.into_values() {
        found.sort_unstable();
        let missing: Vec<usize> = (0..total)
            .filter(|index| found.binary_search(index).is_err())
            .take(4)
            .collect();
        if missing.is_empty() {
            continue;
        }
        let mut what = format!(
            "of this set {} of {total} shards are there; missing:",
            found.len()
        );
        for index in &missing {
            write!(what, " {index:05}").expect("writing to a string does not fail");
        }
        let more = total - found.len() - missing.len();
        if more > 0 {
            write!(what, " and {more} more").expect("writing to a string does not fail");
        }
        what.push_str(". Copy or convert them again, or allow a partial set");
        return Err(DataError::Malformed {
            file: first.to_path_buf(),
            what,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn find(names: &[&str], pattern: &str) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = find_shards(&folder.path().join(pattern).to_string_lossy(), false)?;
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        Ok(found.iter().map(name).collect())
    }

    #[test]
    fn names_of_shards_are_understood_and_written_alike() {
        let file = ShardName::file_name("train", 7, 256);
        assert_eq!(file, "train-00007-of-00256.tfrecord");
        let name = ShardName::parse(Path::new(&file)).unwrap();
        assert_eq!((name.prefix.as_str(), name.index, name.total), ("train", 7, 256));
        for other in [
            "train.tfrecord",
            "train-7-of-256",
            "train-of-00256",
            "a-00001-of-",
        ] {
            assert_eq!(ShardName::parse(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_complete_set_is_found_sorted_and_without_half_written_files() {
        let names = [
            "val-00001-of-00002.tfrecord",
            "val-00000-of-00002.tfrecord",
            "val-00000-of-00002.tfrecord.tmp",
        ];
        assert_eq!(find(&names, "val-*").unwrap(), [names[1], names[0]]);
    }

    #[test]
    fn a_shard_and_its_compressed_copy_are_refused() {
        let names = ["val-00000-of-00001.tfrecord", "val-00000-of-00001.tfrecord.gz"];
        let error = find(&names, "*").unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    #[test]
    fn files_of_records_are_told_from_what_lies_beside_them() {
        for (name, is) in [
            ("a.tfrecord", true),
            ("a.tfrecord.gz", true),
            ("train-00000-of-00002", true),
            ("train-00000-of-00002.gz", true),
            ("train.manifest.json", false),
            ("a.tfrecord.tmp", false),
            ("train-00000-of-00002.txt", false),
        ] {
            assert_eq!(is_shard_file(Path::new(name)), is, "{name}");
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let names = ["val-00000-of-00003.tfrecord", "val-00002-of-00003.tfrecord"];
        let error = find(&names, "*").unwrap_err().to_string();
        assert!(
            error.contains("2 of 3") && error.contains("missing: 00001."),
            "{error}"
        );
    }

    #[test]
    fn two_sets_of_one_name_are_not_mixed() {
        let names = [
            "val-00000-of-00001.tfrecord",
            "val-00000-of-00002.tfrecord",
            "val-00001-of-00002.tfrecord",
        ];
        let error = find(&names, "*").unwrap_err().to_string();
        assert!(error.contains("same set"), "{error}");
    }

    #[test]
    fn a_pattern_without_matches_is_named() {
        let error = find(&["a.txt"], "*.tfrecord").unwrap_err().to_string();
        assert!(error.contains("*.tfrecord"), "{error}");
        assert!(find_shards("a***", false).is_err());
    }

    #[test]
    fn files_with_other_names_are_taken_as_they_are() {
        assert_eq!(find(&["a.tfrecord"], "*.tfrecord").unwrap(), ["a.tfrecord"]);
    }
}
