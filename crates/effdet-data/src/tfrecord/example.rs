//! `tf.train.Example` and its parts, as in TensorFlow's `example.proto` and `feature.proto`.

use std::collections::BTreeMap;

use bytes::Bytes;

/// One record: named lists.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Example {
    /// The lists.
    #[prost(message, optional, tag = "1")]
    pub features: Option<Features>,
}

/// Named lists; written in ascending order of their names.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Features {
    /// The lists by name.
    #[prost(btree_map = "string, message", tag = "1")]
    pub feature: BTreeMap<String, Feature>,
}

/// A list of one of three types.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Feature {
    /// The list; none = empty, of any type.
    #[prost(oneof = "Kind", tags = "1, 2, 3")]
    pub kind: Option<Kind>,
}

/// The types of list.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    /// Byte strings.
    #[prost(message, tag = "1")]
    Bytes(BytesList),
    /// Floats.
    #[prost(message, tag = "2")]
    Floats(FloatList),
    /// Integers.
    #[prost(message, tag = "3")]
    Ints(Int64List),
}

/// Byte strings.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BytesList {
    /// Values.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub value: Vec<Bytes>,
}

/// Floats, packed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FloatList {
    /// Values.
    #[prost(float, repeated, tag = "1")]
    pub value: Vec<f32>,
}

/// Integers, packed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Int64List {
    /// Values.
    #[prost(int64, repeated, tag = "1")]
    pub value: Vec<i64>,
}

/// A feature of another type than needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("feature {key:?} is a list of {found}, a list of {expected} is needed")]
pub struct WrongType {
    key: String,
    expected: &'static str,
    found: &'static str,
}

impl Kind {
    fn type_name(&self) -> &'static str {
        match self {
            Self::Bytes(_) => "bytes",
            Self::Floats(_) => "floats",
            Self::Ints(_) => "integers",
        }
    }
}

impl Example {
    fn kind(&self, key: &str) -> Option<&Kind> {
        self.features.as_ref()?.feature.get(key)?.kind.as_ref()
    }

    /// A list of byte strings; empty where there is none.
    ///
    /// # Errors
    /// [`WrongType`].
    pub fn bytes(&self, key: &str) -> Result<&[Bytes], WrongType> {
        match self.kind(key) {
            None => Ok(&[]),
            Some(Kind::Bytes(list)) => Ok(&list.value),
            Some(other) => Err(wrong_type(key, "bytes", other)),
        }
    }

    /// A list of floats; empty where there is none.
    ///
    /// # Errors
    /// [`WrongType`].
    pub fn floats(&self, key: &str) -> Result<&[f32], WrongType> {
        match self.kind(key) {
            None => Ok(&[]),
            Some(Kind::Floats(list)) => Ok(&list.value),
            Some(other) => Err(wrong_type(key, "floats", other)),
        }
    }

    /// A list of integers; empty where there is none.
    ///
    /// # Errors
    /// [`WrongType`].
    pub fn ints(&self, key: &str) -> Result<&[i64], WrongType> {
        match self.kind(key) {
            None => Ok(&[]),
            Some(Kind::Ints(list)) => Ok(&list.value),
            Some(other) => Err(wrong_type(key, "integers", other)),
        }
    }

    fn set(&mut self, key: &str, kind: Kind) {
        let features = self.features.get_or_insert_default();
        features
            .feature
            .insert(key.to_owned(), Feature { kind: Some(kind) });
    }

    /// Sets a list of byte strings.
    pub fn set_bytes(&mut self, key: &str, value: Vec<Bytes>) {
        self.set(key, Kind::Bytes(BytesList { value }));
    }

    /// Sets a list of floats.
    pub fn set_floats(&mut self, key: &str, value: Vec<f32>) {
        self.set(key, Kind::Floats(FloatList { value }));
    }

    /// Sets a list of integers.
    pub fn set_ints(&mut self, key: &str, value: Vec<i64>) {
        self.set(key, Kind::Ints(Int64List { value }));
    }
}

fn wrong_type(key: &str, expected: &'static str, found: &Kind) -> WrongType {
    WrongType {
        key: key.to_owned(),
        expected,
        found: found.type_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    /// Bytes written out by hand from the encoding rules: map entries {1: key, 2: Feature}, packed numbers.
    #[test]
    fn the_wire_format_is_the_one_of_example_proto() {
        let mut example = Example::default();
        example.set_ints("h", vec![300]);
        example.set_floats("x", vec![1.0]);
        example.set_bytes("y", vec![Bytes::from_static(b"ab")]);
        let expected = [
            &[0x0a, 38][..],
            &[0x0a, 11, 0x0a, 1, b'h', 0x12, 6, 0x1a, 4, 0x0a, 2, 0xac, 0x02],
            &[
                0x0a, 13, 0x0a, 1, b'x', 0x12, 8, 0x12, 6, 0x0a, 4, 0, 0, 0x80, 0x3f,
            ],
            &[0x0a, 11, 0x0a, 1, b'y', 0x12, 6, 0x0a, 4, 0x0a, 2, b'a', b'b'],
        ]
        .concat();
        let mut expected = expected;
        expected[1] = (expected.len() - 2) as u8;
        assert_eq!(example.encode_to_vec(), expected);
        assert_eq!(Example::decode(&expected[..]).unwrap(), example);
    }

    #[test]
    fn numbers_may_also_come_unpacked() {
        let unpacked = [
            0x0a, 15, 0x0a, 13, 0x0a, 1, b'h', 0x12, 8, 0x1a, 6, 0x08, 1, 0x08, 2, 0x08, 3,
        ];
        assert_eq!(
            Example::decode(&unpacked[..]).unwrap().ints("h").unwrap(),
            [1, 2, 3]
        );
    }

    #[test]
    fn a_feature_of_another_type_is_named() {
        let mut example = Example::default();
        example.set_floats("image/height", vec![1.0]);
        let error = example.ints("image/height").unwrap_err().to_string();
        assert_eq!(
            error,
            "feature \"image/height\" is a list of floats, a list of integers is needed"
        );
        assert_eq!(example.ints("image/width").unwrap(), &[] as &[i64]);
    }

    #[test]
    fn deep_nesting_and_huge_varints_are_errors() {
        // Groups inside groups in an unknown field.
        assert!(Example::decode(&vec![0x1b; 100_000][..]).is_err());
        assert!(Example::decode(&[0xff; 64][..]).is_err());
        // A length of 2^63 bytes.
        let huge = [
            0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01, 0,
        ];
        assert!(Example::decode(&huge[..]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_equal(
            ints in prop::collection::vec(any::<i64>(), 0..8),
            floats in prop::collection::vec(-1e30f32..1e30, 0..8),
            bytes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..4),
        ) {
            let mut example = Example::default();
            example.set_ints("i", ints);
            example.set_floats("f", floats);
            example.set_bytes("b", bytes.into_iter().map(Bytes::from).collect());
            prop_assert_eq!(Example::decode(&example.encode_to_vec()[..]).unwrap(), example);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Example::decode(&bytes[..]);
        }
    }
}
