//! Decoded images kept for later passes, in memory or in files.
//!
//! What comes out of a cache is what the decoder gave, so batches have the same bits with and without one.
//!
//! A file of the disk cache: `EFFDETRG`, width and height (u32, little-endian), RGB bytes, CRC-32C of all before it. Its name is the
//! SHA-256 of the encoded image, so a changed image is another file. Files get their names by renaming whole ones; what does not
//! check is decoded and written again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};

const MAGIC: &[u8; 8] = b"EFFDETRG";
const HEADER_BYTES: usize = 16;
const FOOTER_BYTES: usize = 4;
/// Age at which a file that is not whole belongs to no run any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Keeps decoded images up to a limit; images past it are decoded each time.
#[derive(Debug)]
pub struct ImageCache {
    place: Place,
    limit_bytes: u64,
    used_bytes: AtomicU64,
    /// Nothing more is kept: a file could not be written.
    /// Why no more images are kept.
    closed: OnceLock<String>,
}

#[derive(Debug)]
enum Place {
    /// By index of the example.
    Memory(Vec<OnceLock<Arc<RgbImage>>>),
    Disk(PathBuf),
}

impl ImageCache {
    /// A cache in memory for a data set of `examples` images.
    pub fn in_memory(examples: usize, limit_bytes: u64) -> Self {
        Self::new(
            Place::Memory((0..examples).map(|_| OnceLock::new()).collect()),
            limit_bytes,
            0,
        )
    }

    /// A cache of files in `folder`, which is made if it is not there; files of earlier runs are used and count.
    ///
    /// # Errors
    /// [`DataError::Io`] when the folder cannot be made or read.
    pub fn on_disk(folder: &Path, limit_bytes: u64) -> Result<Self> {
        let io = |source| DataError::Io {
            file: folder.to_path_buf(),
            source,
        };
        fs::create_dir_all(folder).map_err(io)?;
        let mut used = 0;
        for entry in fs::read_dir(folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "partial")
            {
                // Of a run that was killed, unless it is young: another run may be writing it.
                let written = entry.metadata().and_then(|metadata| metadata.modified());
                if written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED)) {
                    let _ = fs::remove_file(entry.path());
                }
            } else {
                used += entry.metadata().map_err(io)?.len();
            }
        }
        Ok(Self::new(Place::Disk(folder.to_path_buf()), limit_bytes, used))
    }

    fn new(place: Place, limit_bytes: u64, used_bytes: u64) -> Self {
        Self {
            place,
            limit_bytes,
            used_bytes: AtomicU64::new(used_bytes),
            closed: OnceLock::new(),
        }
    }

    /// Bytes of the images that are kept.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Whether images are found by their encoded bytes and not by their index.
    pub(crate) fn wants_bytes(&self) -> bool {
        matches!(self.place, Place::Disk(_))
    }

    /// Why no more images are kept since the first that could not be written; images that are there already are read on.
    pub fn closed(&self) -> Option<&str> {
        self.closed.get().map(String::as_str)
    }

    /// The image of example `index`, whose encoded bytes are `encoded` where [`Self::wants_bytes`].
    pub(crate) fn get(&self, index: u64, encoded: &[u8]) -> Option<Arc<RgbImage>> {
        match &self.place {
            Place::Memory(images) => images.get(index as usize)?.get().cloned(),
            Place::Disk(folder) => read(&folder.join(file_name(encoded))).map(Arc::new),
        }
    }

    /// Whether an image of this size would be kept.
    pub(crate) fn has_room(&self, (width, height): (u32, u32)) -> bool {
        let bytes = 3 * u64::from(width) * u64::from(height);
        self.closed.get().is_none() && self.used_bytes().saturating_add(bytes) <= self.limit_bytes
    }

    /// Keeps an image if there is room.
    pub(crate) fn put(&self, index: u64, encoded: &[u8], image: &Arc<RgbImage>) {
        let bytes = image.as_raw().len() as u64;
        let reserve = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.limit_bytes);
        let reserved = (self.used_bytes).fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve);
        if self.closed.get().is_some() || reserved.is_err() {
            return;
        }
        let kept = match &self.place {
            Place::Memory(images) => images
                .get(index as usize)
                .is_some_and(|slot| slot.set(Arc::clone(image)).is_ok()),
            Place::Disk(folder) => {
                let file = folder.join(file_name(encoded));
                let written = write(&file, image);
                // A full disk must not end a training that does without.
                if let Err(error) = &written {
                    self.closed
                        .get_or_init(|| format!("cannot write {}: {error}", file.display()));
                }
                written.is_ok()
            }
        };
        if !kept {
            self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

fn file_name(encoded: &[u8]) -> String {
    let digest = Sha256::digest(encoded);
    let mut name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    name.push_str(".rgb");
    name
}

/// A whole file; none where it is absent or damaged.
fn read(file: &Path) -> Option<RgbImage> {
    let mut bytes = fs::read(file).ok()?;
    let end = bytes.len().checked_sub(FOOTER_BYTES)?;
    let (body, crc) = bytes.split_at(end);
    if crc32c::crc32c(body).to_le_bytes() != *crc || body.get(..8)? != MAGIC {
        return None;
    }
    let number = |at: usize| Some(u32::from_le_bytes(*body.get(at..)?.first_chunk::<4>()?));
    let (width, height) = (number(8)?, number(12)?);
    bytes.truncate(end);
    bytes.drain(..HEADER_BYTES);
    (bytes.len() as u64 == 3 * u64::from(width) * u64::from(height))
        .then(|| RgbImage::from_raw(width, height, bytes))
        .flatten()
}

fn write(file: &Path, image: &RgbImage) -> io::Result<()> {
    // Several threads and processes may write the same image; the last one to rename wins, with the same content.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let partial = file.with_extension(format!("{}-{number}.partial", std::process::id()));
    let mut header = MAGIC.to_vec();
    header.extend(image.width().to_le_bytes());
    header.extend(image.height().to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&header), image.as_raw());
    let written = File::create(&partial).and_then(|mut output| {
        output.write_all(&header)?;
        output.write_all(image.as_raw())?;
        output.write_all(&crc.to_le_bytes())
    });
    match written.and_then(|()| fs::rename(&partial, file)) {
        Ok(()) => Ok(()),
        Err(error) => {
            let _ = fs::remove_file(&partial);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_write_the_same_image_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let (file, image) = (folder.path().join("same.rgb"), image(7));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| write(&file, &image).unwrap()));
            }
        });
        assert_eq!(read(&file).as_ref(), Some(&*image));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    fn image(value: u8) -> Arc<RgbImage> {
        Arc::new(RgbImage::from_pixel(5, 3, image::Rgb([value, 1, 2])))
    }

    #[test]
    fn images_are_kept_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        for cache in [
            ImageCache::in_memory(3, 90),
            ImageCache::on_disk(folder.path(), 90).unwrap(),
        ] {
            for index in 0..3u8 {
                assert_eq!(cache.has_room((5, 3)), index < 2);
                cache.put(u64::from(index), &[index], &image(index));
            }
            let kept = [0, 1, 2].map(|index: u8| cache.get(u64::from(index), &[index]));
            assert_eq!(kept, [Some(image(0)), Some(image(1)), None], "{cache:?}");
            assert_eq!(cache.used_bytes(), 90);
        }
    }

    #[test]
    fn damaged_and_half_written_files_are_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ImageCache::on_disk(folder.path(), 1 << 20).unwrap();
        cache.put(0, b"encoded", &image(9));
        let file = folder.path().join(file_name(b"encoded"));
        let whole = fs::read(&file).unwrap();
        for damage in 0..whole.len() {
            fs::write(&file, &whole[..damage]).unwrap();
            assert_eq!(cache.get(0, b"encoded"), None, "cut at {damage}");
            let mut flipped = whole.clone();
            flipped[damage] ^= 4;
            fs::write(&file, &flipped).unwrap();
            assert_eq!(cache.get(0, b"encoded"), None, "flipped at {damage}");
        }
        cache.put(0, b"encoded", &image(9));
        assert_eq!(cache.get(0, b"encoded"), Some(image(9)));
        let partial = folder.path().join("x.7.partial");
        fs::write(&partial, b"half").unwrap();
        let again = || ImageCache::on_disk(folder.path(), 1 << 20).unwrap();
        assert_eq!(again().used_bytes(), whole.len() as u64);
        assert!(partial.exists(), "another run may be writing it");
        let long_ago = std::time::SystemTime::now() - 2 * ABANDONED;
        let file = File::options().write(true).open(&partial).unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(again().used_bytes(), whole.len() as u64);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_goes_away_ends_the_keeping_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ImageCache::on_disk(folder.path(), 1 << 20).unwrap();
        folder.close().unwrap();
        cache.put(0, b"encoded", &image(1));
        assert!(!cache.has_room((1, 1)));
        assert!(
            cache
                .closed()
                .is_some_and(|reason| reason.contains("cannot write"))
        );
        assert_eq!((cache.get(0, b"encoded"), cache.used_bytes()), (None, 0));
    }
}
