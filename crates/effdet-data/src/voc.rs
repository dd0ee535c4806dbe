//! Pascal VOC folders: `Annotations/*.xml`, `JPEGImages/`, `ImageSets/Main/<split>.txt`.
//!
//! A box is `[xmin, ymin, xmax − xmin, ymax − ymin]`, corners as written (the convention of automl's converter). Categories are
//! the twenty of VOC when every name belongs to them, otherwise the names found, sorted, with ids from 1.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::Path;

use effdet_model::label_map::{CategoryId, LabelMap};
use quick_xml::Reader;
use quick_xml::events::Event;

use crate::coco::{clip, confined_join};
use crate::dataset::{
    Category, DetectionDataset, Example, ImageSource, LoadReport, ObjectAnnotation, read_file,
};
use crate::error::{DataError, Result};

/// Elements deeper than this are no VOC annotation.
const MAX_DEPTH: usize = 16;
/// No list and no annotation is as long as this.
const MAX_TEXT_BYTES: u64 = 64 << 20;

#[derive(Debug, Default, PartialEq)]
struct Annotation {
    width: u32,
    height: u32,
    objects: Vec<RawObject>,
}

#[derive(Debug, Default, PartialEq)]
struct RawObject {
    name: String,
    difficult: bool,
    /// xmin, ymin, xmax, ymax.
    corners: [Option<f64>; 4],
}

fn malformed(file: &Path, what: String) -> DataError {
    DataError::Malformed {
        file: file.to_path_buf(),
        what,
    }
}

/// Reads one annotation; entities other than the five of XML are refused.
fn parse(file: &Path, text: &str) -> Result<Annotation> {
    let mut reader = Reader::from_str(text);
    let mut annotation = Annotation::default();
    let mut path: Vec<String> = Vec::new();
    let mut content = String::new();
    let mut rooted = false;
    loop {
        let at = reader.buffer_position();
        let bad = |what: String| malformed(file, format!("byte {at}: {what}"));
        match reader.read_event().map_err(|error| bad(error.to_string()))? {
            Event::Start(tag) => {
                path.push(tag.name().as_ref().to_owned());
                if path.len() > MAX_DEPTH {
                    return Err(bad(format!(
                        "elements nest deeper than {MAX_DEPTH}: not a VOC annotation"
                    )));
                }
                rooted |= path == ["annotation"];
                if path == ["annotation", "object"] {
                    annotation.objects.push(RawObject::default());
                }
                content.clear();
            }
            Event::Empty(tag) => rooted |= path.is_empty() && tag.name().as_ref() == "annotation",
            Event::Text(text) => content.push_str(&text),
            Event::GeneralRef(reference) => {
                let name: &str = &reference;
                let known = match name {
                    "amp" => '&',
                    "lt" => '<',
                    "gt" => '>',
                    "quot" => '"',
                    "apos" => '\'',
                    _ => return Err(bad(format!("entity &{name}; is not allowed"))),
                };
                content.push(known);
            }
            Event::End(_) => {
                take_value(file, &mut annotation, &path, content.trim())?;
                path.pop();
                content.clear();
            }
            Event::DocType(_) => return Err(bad("a document type is not allowed: remove it".into())),
            Event::Eof if path.is_empty() && rooted => return Ok(annotation),
            Event::Eof if path.is_empty() => {
                return Err(bad(
                    "ends without <annotation>: the file is empty or no VOC annotation".into(),
                ));
            }
            Event::Eof => {
                return Err(bad(format!(
                    "ends inside <{}>: the file is truncated",
                    path.join("/")
                )));
            }
            _ => {}
        }
    }
}

fn take_value(file: &Path, annotation: &mut Annotation, path: &[String], text: &str) -> Result<()> {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let number = || -> Result<f64> {
        let value = text.parse::<f64>().ok().filter(|v| v.is_finite());
        value.ok_or_else(|| {
            malformed(
                file,
                format!("<{}> is {text:?}, a number is needed", path.join("/")),
            )
        })
    };
    let side = || -> Result<u32> {
        let value = number()?;
        if value.fract() != 0.0 || !(0.0..=f64::from(u32::MAX)).contains(&value) {
            let what = format!(
                "<{}> is {text:?}, a whole number of pixels is needed",
                path.join("/")
            );
            return Err(malformed(file, what));
        }
        Ok(value as u32)
    };
    match path.as_slice() {
        ["annotation", "size", "width"] => annotation.width = side()?,
        ["annotation", "size", "height"] => annotation.height = side()?,
        ["annotation", "object", rest @ ..] => {
            let Some(object) = annotation.objects.last_mut() else {
                return Ok(());
            };
            match rest {
                ["name"] => object.name = text.to_owned(),
                ["difficult"] => object.difficult = number()? != 0.0,
                ["bndbox", "xmin"] => object.corners[0] = Some(number()?),
                ["bndbox", "ymin"] => object.corners[1] = Some(number()?),
                ["bndbox", "xmax"] => object.corners[2] = Some(number()?),
                ["bndbox", "ymax"] => object.corners[3] = Some(number()?),
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}

/// Reads one split of a VOC folder.
///
/// Images get ids from 1 in the order of the split's list. Categories come from all annotations of the folder, so that every
/// split has the same ones.
///
/// # Errors
/// A missing list, annotation or image, an image that is listed twice, and malformed annotations, each with its file.
pub fn load(root: &Path, split: &str) -> Result<(DetectionDataset, LoadReport)> {
    let list = root.join("ImageSets/Main").join(format!("{split}.txt"));
    let names = category_names(root)?;
    let voc = LabelMap::voc();
    let categories: Vec<Category> = if names
        .iter()
        .all(|name| voc.categories().any(|(_, voc)| voc == name))
    {
        voc.categories()
            .map(|(id, name)| Category {
                id,
                name: name.to_owned(),
            })
            .collect()
    } else {
        (names.into_iter().zip(1..))
            .map(|(name, id)| Category {
                id: CategoryId(id),
                name,
            })
            .collect()
    };

    let mut report = LoadReport::default();
    let mut examples = Vec::new();
    let mut listed = HashSet::new();
    for line in read_text(&list)?.lines() {
        // Lists of a single class have a second column.
        let Some(stem) = line.split_whitespace().next() else {
            continue;
        };
        if !listed.insert(stem.to_owned()) {
            return Err(malformed(
                &list,
                format!("names {stem} twice: remove one of the lines"),
            ));
        }
        let xml = confined_join(&root.join("Annotations"), &format!("{stem}.xml"), &list)?;
        let annotation = parse(&xml, &read_text(&xml)?)?;
        let image = image_file(root, stem, &list)?;
        let mut example = Example {
            image_id: examples.len() as i64 + 1,
            source_id: stem.to_owned(),
            file_name: image
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            source: ImageSource::File(image),
            width: annotation.width,
            height: annotation.height,
            objects: Vec::new(),
        };
        for (index, object) in annotation.objects.into_iter().enumerate() {
            let [Some(xmin), Some(ymin), Some(xmax), Some(ymax)] = object.corners else {
                return Err(malformed(
                    &xml,
                    format!("object {index} ({}) has no complete bndbox", object.name),
                ));
            };
            let category = categories.iter().find(|category| category.name == object.name);
            let category = category
                .ok_or_else(|| malformed(&xml, format!("object {index} has no name")))?
                .id;
            let bbox = [xmin, ymin, xmax - xmin, ymax - ymin];
            let Some(box_xywh_px) = clip(bbox, &example, index as i64, &mut report) else {
                continue;
            };
            example.objects.push(ObjectAnnotation {
                box_xywh_px,
                category,
                area: box_xywh_px[2] * box_xywh_px[3],
                is_crowd: false,
                difficult: object.difficult,
            });
        }
        examples.push(example);
    }
    if examples.is_empty() {
        return Err(malformed(&list, "lists no image".into()));
    }
    let folder = root
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok((
        DetectionDataset {
            name: format!("{folder} {split}"),
            examples,
            categories,
        },
        report,
    ))
}

fn read_text(file: &Path) -> Result<String> {
    String::from_utf8(read_file(file, MAX_TEXT_BYTES)?)
        .map_err(|_| malformed(file, "is no UTF-8 text: save it as such".into()))
}

fn category_names(root: &Path) -> Result<BTreeSet<String>> {
    let folder = root.join("Annotations");
    let io = |source| DataError::Io {
        file: folder.clone(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&folder).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|extension| extension == "xml") {
            names.extend(
                parse(&file, &read_text(&file)?)?
                    .objects
                    .into_iter()
                    .map(|object| object.name),
            );
        }
    }
    names.remove("");
    Ok(names)
}

fn image_file(root: &Path, stem: &str, list: &Path) -> Result<std::path::PathBuf> {
    let folder = root.join("JPEGImages");
    for extension in ["jpg", "jpeg", "png", "JPG"] {
        let file = confined_join(&folder, &format!("{stem}.{extension}"), list)?;
        if file.is_file() {
            return Ok(file);
        }
    }
    Err(malformed(
        list,
        format!(
            "names {stem}, but {} has no such .jpg, .jpeg or .png",
            folder.display()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<annotation><size><width>20</width><height>10</height></size>\
        <object><name>A &amp; B</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>8</ymax></bndbox>\
        <part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object></annotation>";

    fn parse_text(text: &str) -> Result<Annotation> {
        parse(Path::new("a.xml"), text)
    }

    #[test]
    fn an_annotation_gives_size_and_objects_and_ignores_parts() {
        let annotation = parse_text(XML).unwrap();
        assert_eq!((annotation.width, annotation.height), (20, 10));
        let expected = RawObject {
            name: "A & B".into(),
            difficult: true,
            corners: [Some(1.0), Some(2.0), Some(5.0), Some(8.0)],
        };
        assert_eq!(annotation.objects, [expected]);
    }

    #[test]
    fn every_truncation_is_an_error_that_names_the_file() {
        for len in 1..XML.len() {
            let error = parse_text(&XML[..len]).unwrap_err().to_string();
            assert!(error.contains("a.xml"), "{error}");
        }
    }

    #[test]
    fn entities_document_types_and_deep_nesting_are_refused() {
        let bomb = "<!DOCTYPE a [<!ENTITY x \"y\">]><annotation>&x;</annotation>";
        assert!(parse_text(bomb).is_err());
        assert!(
            parse_text("<annotation>&x;</annotation>")
                .unwrap_err()
                .to_string()
                .contains("&x;")
        );
        let deep = format!("{}{}", "<a>".repeat(17), "</a>".repeat(17));
        assert!(parse_text(&deep).unwrap_err().to_string().contains("nest"));
    }

    #[test]
    fn a_file_that_is_empty_or_holds_something_else_is_refused() {
        for text in ["", "\n", "<?xml version=\"1.0\"?>", "<html></html>", "<html/>"] {
            let error = parse_text(text).unwrap_err().to_string();
            assert!(
                error.contains("a.xml") && error.contains("<annotation>"),
                "{error}"
            );
        }
        assert_eq!(parse_text("<annotation/>").unwrap(), Annotation::default());
    }

    #[test]
    fn sizes_that_no_image_has_are_refused() {
        for size in ["-20", "20.5", "1e10"] {
            let text = XML.replace("<width>20<", &format!("<width>{size}<"));
            let error = parse_text(&text).unwrap_err().to_string();
            assert!(error.contains("size/width") && error.contains(size), "{error}");
        }
        let whole = parse_text(&XML.replace("<width>20<", "<width>20.0<"));
        assert_eq!(whole.unwrap().width, 20);
    }

    #[test]
    fn an_image_that_is_listed_twice_is_refused() {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("Annotations/a.xml", XML),
            ("JPEGImages/a.jpg", ""),
            ("ImageSets/Main/train.txt", "a\na\n"),
        ] {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let error = load(root.path(), "train").unwrap_err().to_string();
        assert!(error.contains("train.txt") && error.contains("twice"), "{error}");
    }

    #[test]
    fn numbers_that_are_none_are_named() {
        let text = XML.replace("<xmin>1<", "<xmin>one<");
        assert!(parse_text(&text).unwrap_err().to_string().contains("bndbox/xmin"));
    }

    #[test]
    fn the_real_set_has_its_known_counts() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/bccd");
        if !root.exists() {
            println!("skipped: ../shared/data is absent");
            return;
        }
        let mut dropped = 0;
        let mut objects = 0;
        for (split, images) in [("train", 205), ("val", 87), ("test", 72)] {
            let (dataset, report) = load(&root, split).unwrap();
            assert_eq!(dataset.examples.len(), images, "{split}");
            let names: Vec<&str> = dataset.categories.iter().map(|c| c.name.as_str()).collect();
            assert_eq!(names, ["Platelets", "RBC", "WBC"]);
            dropped += report.dropped.len();
            objects += dataset.examples.iter().map(|e| e.objects.len()).sum::<usize>();
        }
        assert_eq!((dropped, objects), (2, 4886));
    }
}
