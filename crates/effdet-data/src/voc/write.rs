//! The common model of a data set to a VOC folder.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use effdet_model::label_map::CategoryId;

use crate::coco::write_categories;
use crate::confine::confined_join;
use crate::convert::{ConvertOptions, Converted};
use crate::dataset::{DetectionDataset, Example};
use crate::error::{DataError, Result};
use crate::folder::{Copied, ImageCopier, Written};
use crate::sidecar;

/// Writes `Annotations/`, `JPEGImages/` and `ImageSets/Main/<split>.txt`, `categories.json` and a [sidecar](crate::sidecar).
///
/// Crowds are kept in the sidecar only. The list is written last; after an error nothing of this split is left. `progress` is
/// called after every image.
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
    let list = confined_join(&root.join("ImageSets/Main"), &format!("{split}.txt"), root)?;
    crate::convert::refuse_existing(&list)?;
    crate::convert::same_categories(&root.join("categories.json"), dataset)?;
    let names: HashMap<CategoryId, &str> = (dataset.categories.iter())
        .map(|category| (category.id, category.name.as_str()))
        .collect();
    let images = root.join("JPEGImages");
    let mut copier = ImageCopier::new(&images, options.max_encoded_bytes);
    let mut written = Written::default();
    let mut converted = Converted::default();
    let (mut stems, mut files) = (String::new(), Vec::new());
    for example in &dataset.examples {
        let copied = copier.copy(example, root, &mut written)?;
        let stem = stem(&copied.file_name)?;
        let xml = confined_join(&root.join("Annotations"), &format!("{stem}.xml"), root)?;
        written.write(&xml, annotation(example, &copied, &names)?.as_bytes())?;
        writeln!(stems, "{stem}").expect("writing to a string does not fail");
        converted.count(example);
        files.push(copied.file_name);
        progress();
    }
    sidecar::write(&sidecar::file(root, split), dataset, &files)?;
    write_categories(&root.join("categories.json"), &dataset.categories)?;
    written.write(&list, stems.as_bytes())?;
    written.keep();
    converted.places = vec![list, images];
    Ok(converted)
}

/// A list has one name a line and may have a column of numbers.
fn stem(file_name: &str) -> Result<&str> {
    let stem = file_name.rsplit_once('.').map_or(file_name, |(stem, _)| stem);
    let column = ["-1", "0", "1"].iter().any(|tail| {
        stem.strip_suffix(tail)
            .is_some_and(|head| head.ends_with(char::is_whitespace))
    });
    if column || stem != stem.trim() || stem.contains(['\n', '\r']) {
        let what = format!("image {file_name:?} cannot be named in a VOC list: rename it");
        return Err(DataError::Caller { what });
    }
    Ok(stem)
}

fn annotation(example: &Example, copied: &Copied, names: &HashMap<CategoryId, &str>) -> Result<String> {
    let mut xml = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        writeln!(xml, "{text}").expect("writing to a string does not fail");
    };
    line(format_args!("<annotation>"));
    line(format_args!("  <folder>JPEGImages</folder>"));
    line(format_args!(
        "  <filename>{}</filename>",
        escaped(&copied.file_name)?
    ));
    line(format_args!(
        "  <size><width>{}</width><height>{}</height><depth>3</depth></size>",
        copied.width, copied.height
    ));
    line(format_args!("  <segmented>0</segmented>"));
    for (record, object) in example.objects.iter().enumerate() {
        if object.is_crowd {
            continue;
        }
        let name = names.get(&object.category).ok_or_else(|| DataError::Category {
            file: example.file_name.clone(),
            record,
            category: object.category.0,
        })?;
        let [x, y, w, h] = object.box_xywh_px;
        line(format_args!("  <object>"));
        line(format_args!("    <name>{}</name>", escaped(name)?));
        line(format_args!("    <pose>Unspecified</pose>"));
        line(format_args!("    <truncated>0</truncated>"));
        line(format_args!(
            "    <difficult>{}</difficult>",
            u8::from(object.difficult)
        ));
        line(format_args!(
            "    <bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>",
            x + w,
            y + h
        ));
        line(format_args!("  </object>"));
    }
    line(format_args!("</annotation>"));
    Ok(xml)
}

fn escaped(text: &str) -> Result<String> {
    if text.trim() != text || text.chars().any(char::is_control) {
        let what = format!("{text:?} cannot be written to XML and read again: rename it");
        return Err(DataError::Caller { what });
    }
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            other => out.push(other),
        }
    }
    Ok(out)
}
