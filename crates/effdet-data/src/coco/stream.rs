//! The arrays of an instances JSON, element by element: what is not needed is skipped while it is read, and nothing but the
//! element at hand is kept.

use std::fmt;
use std::io::{BufReader, Read};
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::dataset::stable_id;
use crate::error::{DataError, Result};

/// Where the elements go.
pub(super) trait Sink {
    fn image(&mut self, image: RawImage) -> Result<()>;
    fn annotation(&mut self, annotation: RawAnnotation) -> Result<()>;
    fn category(&mut self, category: RawCategory) -> Result<()>;
    /// The array of images is through.
    fn images_end(&mut self) -> Result<()>;
    /// The array of annotations is through.
    fn annotations_end(&mut self);
}

#[derive(Deserialize)]
pub(super) struct RawImage {
    pub id: Id,
    pub file_name: String,
    #[serde(default)]
    pub width: u32,
    #[serde(default)]
    pub height: u32,
}

#[derive(Deserialize)]
pub(super) struct RawAnnotation {
    #[serde(default)]
    pub id: Option<Id>,
    pub image_id: Id,
    pub category_id: Option<u32>,
    #[serde(default)]
    pub bbox: RawBox,
    pub area: Option<f64>,
    #[serde(default)]
    pub iscrowd: Flag,
}

#[derive(Deserialize, serde::Serialize)]
pub(super) struct RawCategory {
    pub id: u32,
    pub name: String,
}

/// A number, or a text that stands for one.
pub(super) struct Id {
    pub number: i64,
    pub text: Option<String>,
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct IdVisitor;
        impl Visitor<'_> for IdVisitor {
            type Value = Id;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id: a whole number or a text")
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> std::result::Result<Id, E> {
                Ok(Id { number, text: None })
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> std::result::Result<Id, E> {
                let number = i64::try_from(number).map_err(|_| E::custom("an id beyond 2^63"))?;
                Ok(Id { number, text: None })
            }
            fn visit_f64<E: serde::de::Error>(self, number: f64) -> std::result::Result<Id, E> {
                let whole = number.fract() == 0.0 && number.abs() <= 9e15;
                match whole {
                    true => self.visit_i64(number as i64),
                    false => Err(E::custom("an id that is no whole number")),
                }
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Id, E> {
                Ok(Id {
                    number: stable_id(text),
                    text: Some(text.to_owned()),
                })
            }
        }
        deserializer.deserialize_any(IdVisitor)
    }
}

/// A list that should hold four numbers.
#[derive(Default)]
pub(super) struct RawBox {
    pub values: [f64; 4],
    /// Numbers in the list, also beyond four.
    pub len: usize,
}

impl<'de> Deserialize<'de> for RawBox {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct BoxVisitor;
        impl<'de> Visitor<'de> for BoxVisitor {
            type Value = RawBox;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of four numbers")
            }
            fn visit_unit<E>(self) -> std::result::Result<RawBox, E> {
                Ok(RawBox::default())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<RawBox, A::Error> {
                let mut raw = RawBox::default();
                while let Some(value) = list.next_element::<f64>()? {
                    if let Some(slot) = raw.values.get_mut(raw.len) {
                        *slot = value;
                    }
                    raw.len += 1;
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_any(BoxVisitor)
    }
}

/// 0, 1, true, false or null.
#[derive(Default)]
pub(super) struct Flag(pub bool);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct FlagVisitor;
        impl Visitor<'_> for FlagVisitor {
            type Value = Flag;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("0 or 1")
            }
            fn visit_unit<E>(self) -> std::result::Result<Flag, E> {
                Ok(Flag(false))
            }
            fn visit_bool<E>(self, flag: bool) -> std::result::Result<Flag, E> {
                Ok(Flag(flag))
            }
            fn visit_i64<E>(self, flag: i64) -> std::result::Result<Flag, E> {
                Ok(Flag(flag != 0))
            }
            fn visit_u64<E>(self, flag: u64) -> std::result::Result<Flag, E> {
                Ok(Flag(flag != 0))
            }
            fn visit_f64<E>(self, flag: f64) -> std::result::Result<Flag, E> {
                Ok(Flag(flag != 0.0))
            }
        }
        deserializer.deserialize_any(FlagVisitor)
    }
}

/// Why reading stopped.
pub(super) enum Stop {
    /// The sink said so.
    Sink(DataError),
    /// The text is not the expected JSON.
    Json(serde_json::Error),
}

/// Reads an instances JSON into `sink`; a byte-order mark is skipped.
pub(super) fn read(input: impl Read, sink: &mut impl Sink) -> std::result::Result<(), Stop> {
    let mut input = BufReader::with_capacity(1 << 18, input);
    let mut stopped = None;
    let result = skip_byte_order_mark(&mut input)
        .map_err(serde_json::Error::io)
        .and_then(|()| {
            let mut json = serde_json::Deserializer::from_reader(input);
            TopLevel {
                sink,
                stopped: &mut stopped,
            }
            .deserialize(&mut json)?;
            json.end()
        });
    match (stopped, result) {
        (Some(error), _) => Err(Stop::Sink(error)),
        (None, Err(error)) => Err(Stop::Json(error)),
        (None, Ok(())) => Ok(()),
    }
}

fn skip_byte_order_mark(input: &mut BufReader<impl Read>) -> std::io::Result<()> {
    use std::io::BufRead;
    if input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        input.consume(3);
    }
    Ok(())
}

struct TopLevel<'a, S> {
    sink: &'a mut S,
    stopped: &'a mut Option<DataError>,
}

impl<'de, S: Sink> DeserializeSeed<'de> for TopLevel<'_, S> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, S: Sink> Visitor<'de> for TopLevel<'_, S> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with images, annotations and categories")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut seen = [false; 3];
        let mut once = |field: usize, name: &str| match std::mem::replace(&mut seen[field], true) {
            true => Err(A::Error::custom(format!("{name:?} is there twice"))),
            false => Ok(()),
        };
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Images => {
                    once(0, "images")?;
                    map.next_value_seed(Elements::new(self.sink, self.stopped, S::image))?;
                    keep(self.stopped, self.sink.images_end())?;
                }
                Key::Annotations => {
                    once(1, "annotations")?;
                    map.next_value_seed(Elements::new(self.sink, self.stopped, S::annotation))?;
                    self.sink.annotations_end();
                }
                Key::Categories => {
                    once(2, "categories")?;
                    map.next_value_seed(Elements::new(self.sink, self.stopped, S::category))?;
                }
                Key::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

fn keep<E: serde::de::Error>(
    stopped: &mut Option<DataError>,
    result: Result<()>,
) -> std::result::Result<(), E> {
    result.map_err(|error| {
        *stopped = Some(error);
        E::custom("stopped")
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase", field_identifier)]
enum Key {
    Images,
    Annotations,
    Categories,
    #[serde(other)]
    Other,
}

struct Elements<'a, S, T> {
    sink: &'a mut S,
    stopped: &'a mut Option<DataError>,
    take: fn(&mut S, T) -> Result<()>,
    element: PhantomData<T>,
}

impl<'a, S, T> Elements<'a, S, T> {
    fn new(sink: &'a mut S, stopped: &'a mut Option<DataError>, take: fn(&mut S, T) -> Result<()>) -> Self {
        Self {
            sink,
            stopped,
            take,
            element: PhantomData,
        }
    }
}

impl<'de, S, T: Deserialize<'de>> DeserializeSeed<'de> for Elements<'_, S, T> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, S, T: Deserialize<'de>> Visitor<'de> for Elements<'_, S, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        while let Some(element) = list.next_element::<T>()? {
            keep(self.stopped, (self.take)(self.sink, element))?;
        }
        Ok(())
    }
}
