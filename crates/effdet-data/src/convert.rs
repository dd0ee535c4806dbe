//! Any data set to a COCO, VOC or YOLO folder; to records, see [`tfrecord::write`](crate::tfrecord::write).

use std::path::{Path, PathBuf};

use crate::coco::{self, read_categories};
use crate::confine::confined_join;
use crate::dataset::{DetectionDataset, Example};
use crate::decode::MAX_ENCODED_BYTES;
use crate::error::{DataError, Result};
use crate::folder::{ImageCopier, Written};

/// How a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Largest encoded image in bytes.
    pub max_encoded_bytes: u64,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            max_encoded_bytes: MAX_ENCODED_BYTES,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Converted {
    /// Images.
    pub images: usize,
    /// Objects in the format's own files.
    pub objects: usize,
    /// Crowds, which VOC and YOLO cannot hold; they are in the sidecar.
    pub crowds: usize,
    /// Files and folders, the annotations first.
    pub places: Vec<PathBuf>,
}

impl Converted {
    pub(crate) fn count(&mut self, example: &Example) {
        let crowds = example.objects.iter().filter(|object| object.is_crowd).count();
        self.images += 1;
        self.objects += example.objects.len() - crowds;
        self.crowds += crowds;
    }
}

/// Writes `<folder>/annotations/instances_<split>.json` and the images, byte for byte, to `<folder>/<split>/`.
///
/// The annotations are written last; after an error nothing of this split is left. `progress` is called after every image.
///
/// # Errors
/// A file name that leaves the folder, occurs twice, or is there already; an image that cannot be read or has another size than
/// annotated; [`DataError::Io`].
pub fn coco_folder(
    dataset: &DetectionDataset,
    folder: &Path,
    split: &str,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(),
) -> Result<Converted> {
    let images = confined_join(folder, split, folder)?;
    let json = folder.join("annotations").join(format!("instances_{split}.json"));
    refuse_existing(&json)?;
    let mut copier = ImageCopier::new(&images, options.max_encoded_bytes);
    let mut written = Written::default();
    let mut converted = Converted::default();
    let mut examples = Vec::with_capacity(dataset.examples.len());
    for example in &dataset.examples {
        let copied = copier.copy(example, &json, &mut written)?;
        converted.count(example);
        examples.push(Example {
            file_name: copied.file_name,
            width: copied.width,
            height: copied.height,
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
    written.keep();
    // JSON says which objects are crowds.
    converted.objects += std::mem::take(&mut converted.crowds);
    converted.places = vec![json, images];
    Ok(converted)
}

/// Refuses to write a split that is there.
pub(crate) fn refuse_existing(file: &Path) -> Result<()> {
    match file.exists() {
        true => Err(DataError::Caller {
            what: format!(
                "{} is there already: choose another folder or split",
                file.display()
            ),
        }),
        false => Ok(()),
    }
}

/// Refuses categories that differ from those of the folder's other splits.
pub(crate) fn same_categories(file: &Path, dataset: &DetectionDataset) -> Result<()> {
    if file.is_file() && read_categories(file)? != dataset.categories {
        return Err(DataError::Caller {
            what: format!(
                "{} has other categories than {}: write them to different folders",
                file.display(),
                dataset.name
            ),
        });
    }
    Ok(())
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

    fn convert(data: &DetectionDataset, folder: &Path) -> Result<Converted> {
        coco_folder(data, folder, "train", &ConvertOptions::default(), &mut || {})
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
