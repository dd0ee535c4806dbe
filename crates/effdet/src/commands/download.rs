//! `effdet data download`.

#[cfg(not(feature = "download"))]
use anyhow::{Result, bail};

#[cfg(not(feature = "download"))]
use crate::cli::DownloadArgs;

#[cfg(feature = "download")]
pub use with_network::run;

/// Says that this binary has no network.
#[cfg(not(feature = "download"))]
pub fn run(args: &DownloadArgs) -> Result<()> {
    bail!(
        "{:?}: this binary was built without downloads; build it with the feature `download`",
        args.set
    )
}

#[cfg(feature = "download")]
mod with_network {
    use std::fs;
    use std::io::Write;
    use std::time::Duration;

    use anyhow::{Context, Result, bail};
    use effdet_data::text::printable;
    use effdet_fetch::{CATALOG, Checksum, Limits, Part, Request, Set, fetch, find, unpack};

    use super::super::progress::Progress;
    use crate::cli::{DownloadArgs, DownloadSet};

    /// An archive of photos hardly shrinks; annotations shrink to a tenth.
    const SWELLING: u64 = 20;
    /// COCO has 118,287 images and a few folders.
    const ENTRIES: u64 = 1_000_000;

    /// Fetches, checks and unpacks a data set.
    pub fn run(args: &DownloadArgs) -> Result<()> {
        let name = match args.set {
            DownloadSet::Coco2017 => "coco2017",
            DownloadSet::Voc2007 => "voc2007",
            DownloadSet::Voc2012 => "voc2012",
        };
        let set = find(name).with_context(|| format!("{name} is not among {} sets", CATALOG.len()))?;
        let parts = chosen(set, &args.parts)?;
        let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
        tell!("{name}: {:.1} GB; {}", bytes as f64 / 1e9, set.terms);
        for part in parts {
            one(set, part, args)?;
        }
        writeln!(
            std::io::stdout(),
            "{name} is in {0}; look at it:  effdet data doctor --data {0}",
            args.output.display()
        )?;
        Ok(())
    }

    fn chosen<'a>(set: &'a Set, names: &[String]) -> Result<Vec<&'a Part>> {
        if names.is_empty() {
            return Ok(set.parts.iter().collect());
        }
        let part = |name: &String| {
            set.parts.iter().find(|part| part.name == name).with_context(|| {
                let known: Vec<&str> = set.parts.iter().map(|part| part.name).collect();
                format!("--parts {name}: {} has {}", set.name, known.join(", "))
            })
        };
        names.iter().map(part).collect()
    }

    fn one(set: &Set, part: &Part, args: &DownloadArgs) -> Result<()> {
        let base = args.base_url.as_deref().unwrap_or(set.base_url);
        if !base.starts_with("http://") && !base.starts_with("https://") {
            bail!("--base-url {base:?}: http:// or https:// is needed");
        }
        let url = format!("{}/{}", base.trim_end_matches('/'), part.path);
        let archive = args.output.join(part.file_name());
        // A mark tells that an archive was unpacked whole.
        let mark = args.output.join(format!(".{}.unpacked", part.file_name()));
        if mark.is_file() {
            tell!("{} was fetched and unpacked before", part.file_name());
            return Ok(());
        }
        tell!("{}", printable(&url));
        let checksum = Checksum::Md5(part.md5.to_owned());
        let request = Request {
            url: &url,
            target: &archive,
            checksum: &checksum,
            max_bytes: args.max_bytes,
            pause: Duration::from_secs(1),
        };
        let mut progress = Progress::new(part.bytes, "bytes");
        fetch(&request, &mut |have, _| progress.set(have))?;
        drop(progress);
        let limits = Limits {
            total_bytes: part.bytes * SWELLING,
            entries: ENTRIES,
        };
        let mut progress = Progress::new(part.bytes, "bytes unpacked, about");
        let unpacked = unpack(&archive, &args.output, &limits, &mut |bytes| progress.set(bytes))?;
        drop(progress);
        tell!("{} files, {:.1} MB", unpacked.files, unpacked.bytes as f64 / 1e6);
        fs::write(&mark, "").with_context(|| format!("cannot write {}", mark.display()))?;
        if !args.keep_archives {
            fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        Ok(())
    }
}
