//! The common model of a data set to a YOLO folder.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use effdet_model::label_map::CategoryId;

use super::config::{Config, labels_of};
use crate::coco::write_categories;
use crate::confine::confined_join;
use crate::convert::{ConvertOptions, Converted, refuse_existing, same_categories};
use crate::dataset::DetectionDataset;
use crate::error::{DataError, Result};
use crate::folder::{ImageCopier, Written};
use crate::sidecar;

/// Writes `images/<split>/`, `labels/<split>/`, `data.yaml`, `categories.json` and a [sidecar](crate::sidecar).
///
/// Crowds are kept in the sidecar only. `data.yaml` names every split of the folder and is written last; after an error nothing of
/// this split is left. `progress` is called after every image.
///
/// # Errors
/// As [`coco_folder`](crate::convert::coco_folder); categories that differ from those of a split that is there already.
pub fn write(
    dataset: &DetectionDataset,
    root: &Path,
    split: &str,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(),
) -> Result<Converted> {
    let images = confined_join(&root.join("images"), split, root)?;
    refuse_existing(&images)?;
    same_categories(&root.join("categories.json"), dataset)?;
    let classes: HashMap<CategoryId, usize> = (dataset.categories.iter().enumerate())
        .map(|(class, category)| (category.id, class))
        .collect();
    let mut copier = ImageCopier::new(&images, options.max_encoded_bytes);
    let mut written = Written::default();
    let mut converted = Converted::default();
    let mut files = Vec::with_capacity(dataset.examples.len());
    for example in &dataset.examples {
        let copied = copier.copy(example, root, &mut written)?;
        let mut labels = String::new();
        for (record, object) in example.objects.iter().enumerate() {
            if object.is_crowd {
                continue;
            }
            let class = classes.get(&object.category).ok_or_else(|| DataError::Category {
                file: example.file_name.clone(),
                record,
                category: object.category.0,
            })?;
            labels.push_str(&line(*class, object.box_xywh_px, copied.width, copied.height));
        }
        let image = images.join(&copied.file_name);
        written.write(&labels_of(&image), labels.as_bytes())?;
        converted.count(example);
        files.push(copied.file_name);
        progress();
    }
    sidecar::write(&sidecar::file(root, split), dataset, &files)?;
    write_categories(&root.join("categories.json"), &dataset.categories)?;
    let config = root.join("data.yaml");
    write_config(&config, split, dataset)?;
    written.keep();
    converted.places = vec![config, images, root.join("labels").join(split)];
    Ok(converted)
}

/// One label and its line end.
pub(super) fn line(class: usize, [x, y, w, h]: [f64; 4], width: u32, height: u32) -> String {
    let (width, height) = (f64::from(width), f64::from(height));
    let (cx, cy) = ((x + w / 2.0) / width, (y + h / 2.0) / height);
    format!("{class} {cx} {cy} {} {}\n", w / width, h / height)
}

fn write_config(file: &Path, split: &str, dataset: &DetectionDataset) -> Result<()> {
    let mut splits: Vec<String> = match file.exists() {
        true => Config::read(file)?.splits.into_keys().collect(),
        false => Vec::new(),
    };
    if !splits.iter().any(|known| known == split) {
        splits.push(split.to_owned());
    }
    splits.sort();
    let mut yaml = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        writeln!(yaml, "{text}").expect("writing to a string does not fail");
    };
    for split in &splits {
        put(format_args!(
            "{}: {}",
            quoted(split),
            quoted(&format!("images/{split}"))
        ));
    }
    put(format_args!("nc: {}", dataset.categories.len()));
    put(format_args!("names:"));
    for (class, category) in dataset.categories.iter().enumerate() {
        put(format_args!("  {class}: {}", quoted(&category.name)));
    }
    let mut scratch = file.as_os_str().to_owned();
    scratch.push(".tmp");
    let write = fs::write(&scratch, yaml).and_then(|()| fs::rename(&scratch, file));
    write.map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })
}

/// A YAML string; plain where that cannot be misread. JSON strings are YAML strings.
fn quoted(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '/'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    match plain {
        true => text.to_owned(),
        false => serde_json::Value::from(text).to_string(),
    }
}
