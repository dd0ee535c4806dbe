//! One annotation file.

use std::path::Path;

use quick_xml::Reader;
use quick_xml::events::Event;

use super::malformed;
use crate::error::Result;

/// Elements deeper than this are no VOC annotation.
const MAX_DEPTH: usize = 16;

/// What an annotation file says.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Annotation {
    /// Width in pixels, 0 = unknown.
    pub width: u32,
    /// Height in pixels, 0 = unknown.
    pub height: u32,
    /// Objects in order.
    pub objects: Vec<RawObject>,
}

/// An object as the file writes it.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct RawObject {
    /// Category.
    pub name: String,
    /// Hard to recognise.
    pub difficult: bool,
    /// xmin, ymin, xmax, ymax.
    pub corners: [Option<f64>; 4],
}

/// Reads one annotation; entities other than the five of XML are refused.
///
/// # Errors
/// [`DataError::Malformed`](crate::error::DataError::Malformed) with file and byte; never panics on any input.
pub fn parse(file: &Path, text: &str) -> Result<Annotation> {
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
    fn numbers_that_are_none_are_named() {
        let text = XML.replace("<xmin>1<", "<xmin>one<");
        assert!(parse_text(&text).unwrap_err().to_string().contains("bndbox/xmin"));
    }
}
