//! Any data set to a COCO folder; to records, see [`tfrecord::write`](crate::tfrecord::write).

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::coco::{self, confined_join};
use crate::dataset::{DetectionDataset, Example};
use crate::decode::probe;
use crate::error::{DataError, Result};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CocoFolder {
    /// Annotations.
    pub json: PathBuf,
    /// Folder of the images.
    pub images: PathBuf,
}

/// Writes `<folder>/annotations/instances_<split>.json` and the images, byte for byte, to `<folder>/<split>/`.
///
/// The annotations are written last. `progress` is called after every image.
///
/// # Errors
/// A file name that leaves the folder, occurs twice, or is there already; an image that cannot be read or has another size than
/// annotated; [`DataError::Io`].
pub fn to_coco_folder(
    dataset: &DetectionDataset,
    folder: &Path,
    split: &str,
    max_encoded_bytes: u64,
    progress: &mut dyn FnMut(),
) -> Result<CocoFolder> {
    let images = confined_join(folder, split, folder)?;
    let json = folder.join("annotations").join(format!("instances_{split}.json"));
    if json.exists() {
        return Err(DataError::Caller {
            what: format!(
                "{} is there already: choose another folder or split",
                json.display()
            ),
        });
    }
    let mut taken = HashSet::with_capacity(dataset.examples.len());
    let mut examples = Vec::with_capacity(dataset.examples.len());
    for example in &dataset.examples {
        let encoded = example.source.read_bytes(max_encoded_bytes)?;
        let probed = probe(&encoded).map_err(|reason| DataError::Image {
            file: example.file_name.clone(),
            reason,
        })?;
        let (decoded, annotated) = ((probed.width, probed.height), (example.width, example.height));
        if annotated.0 != 0 && annotated.1 != 0 && annotated != decoded {
            return Err(DataError::SizeMismatch {
                file: example.file_name.clone(),
                decoded,
                annotated,
            });
        }
        let file = confined_join(&images, &example.file_name, &json)?;
        if !taken.insert(file.clone()) || file.exists() {
            return Err(DataError::Caller {
                what: format!(
                    "{} is there already: choose an empty folder, or rename images that share a name",
                    file.display()
                ),
            });
        }
        write_file(&file, &encoded)?;
        examples.push(Example {
            width: decoded.0,
            height: decoded.1,
            ..example.clone()
        });
        progress();
    }
    let dataset = DetectionDataset {
        name: dataset.name.clone(),
        examples,
        categories: dataset.categories.clone(),
    };
    coco::write(&dataset, &json)?;
    Ok(CocoFolder { json, images })
}

fn write_file(file: &Path, bytes: &[u8]) -> Result<()> {
    let parent = file.parent().unwrap_or(Path::new("."));
    let written = fs::create_dir_all(parent).and_then(|()| fs::write(file, bytes));
    written.map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Category, ImageSource, ObjectAnnotation};
    use crate::layout::Layout;
    use effdet_model::label_map::CategoryId;
    use std::sync::Arc;

    fn dataset(file_names: &[&str]) -> DetectionDataset {
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(6, 4)
            .write_to(&mut png, image::ImageFormat::Png)
            .unwrap();
        let png: Arc<[u8]> = png.into_inner().into();
        let examples = file_names.iter().zip(1..).map(|(name, image_id)| Example {
            image_id,
            source_id: image_id.to_string(),
            file_name: name.to_string(),
            width: 0,
            height: 0,
            source: ImageSource::Memory(Arc::clone(&png)),
            objects: vec![ObjectAnnotation {
                box_xywh_px: [0.1, 0.2, 3.3, 2.4],
                category: CategoryId(9),
                area: 1.5,
                is_crowd: true,
                difficult: false,
            }],
        });
        DetectionDataset {
            name: "test".into(),
            examples: examples.collect(),
            categories: vec![Category {
                id: CategoryId(9),
                name: "thing".into(),
            }],
        }
    }

    fn convert(data: &DetectionDataset, folder: &Path) -> Result<CocoFolder> {
        to_coco_folder(data, folder, "train", 1 << 20, &mut || {})
    }

    #[test]
    fn a_written_folder_is_found_and_reads_back_with_sizes_filled_in() {
        let data = dataset(&["a.png", "sub/b.png"]);
        let folder = tempfile::tempdir().unwrap();
        convert(&data, folder.path()).unwrap();
        let layout = Layout::find(folder.path()).unwrap();
        let (read, _) = layout.split("train").unwrap().load().unwrap();
        assert_eq!(read.categories, data.categories);
        for (read, written) in read.examples.iter().zip(&data.examples) {
            assert_eq!((read.width, read.height), (6, 4));
            assert_eq!(
                (read.image_id, &read.file_name, &read.objects),
                (written.image_id, &written.file_name, &written.objects)
            );
            assert_eq!(
                read.source.read_bytes(1 << 20).unwrap(),
                written.source.read_bytes(1 << 20).unwrap()
            );
        }
    }

    #[test]
    fn nothing_is_written_outside_the_folder_or_over_another_file() {
        let folder = tempfile::tempdir().unwrap();
        for names in [&["../a.png"][..], &["/tmp/a.png"], &["a.png", "a.png"]] {
            assert!(
                convert(&dataset(names), &folder.path().join("out")).is_err(),
                "{names:?}"
            );
        }
        assert!(!folder.path().join("a.png").exists());
        assert!(!folder.path().join("out/annotations").exists());
    }
}
