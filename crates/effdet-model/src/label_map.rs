//! Class indices of the network, category ids of data sets, and their names.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::suggest::nearest;

/// An output of the class head, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClassIndex(pub u32);

/// A category id of a data set, as its annotation files write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CategoryId(pub u32);

impl fmt::Display for ClassIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for CategoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How category ids become class indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Indexing {
    /// Index = id − 1, as the reference: gaps between ids stay unused outputs.
    IdMinusOne,
    /// The categories in ascending order of their ids get the indices 0, 1, 2, …
    Contiguous,
}

/// Why a label map was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LabelMapError {
    /// Two categories share an id.
    #[error("category id {id} belongs to both {first:?} and {second:?}: ids must be unique")]
    DuplicateId {
        /// The id.
        id: CategoryId,
        /// Name of the earlier category.
        first: String,
        /// Name of the later category.
        second: String,
    },
    /// Id 0 where indices are ids less one.
    #[error("category {name:?} has id 0, but class index = id - 1 needs ids from 1: use contiguous indices")]
    IdZero {
        /// Name of the category.
        name: String,
    },
    /// No built-in map of that name.
    #[error("unknown label map {name:?}{suggestion}; known: {}", BUILT_IN.join(", "))]
    UnknownName {
        /// The name given.
        name: String,
        /// `; did you mean …?` or nothing.
        suggestion: String,
    },
}

/// Names of the built-in label maps.
pub const BUILT_IN: &[&str] = &["coco", "voc", "waymo"];

/// The categories of a data set and their places in the class head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Parts", into = "Parts")]
pub struct LabelMap {
    indexing: Indexing,
    names: BTreeMap<CategoryId, String>,
    /// Ids by class index; empty unless indices are contiguous.
    ids: Vec<CategoryId>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    indexing: Indexing,
    categories: Vec<(CategoryId, String)>,
}

impl TryFrom<Parts> for LabelMap {
    type Error = LabelMapError;

    fn try_from(parts: Parts) -> Result<Self, LabelMapError> {
        Self::new(parts.indexing, parts.categories)
    }
}

impl From<LabelMap> for Parts {
    fn from(map: LabelMap) -> Self {
        Self {
            indexing: map.indexing,
            categories: map.names.into_iter().collect(),
        }
    }
}

impl LabelMap {
    /// A map of the given categories, in any order.
    ///
    /// # Errors
    /// [`LabelMapError::DuplicateId`]; [`LabelMapError::IdZero`] when indices are ids less one.
    pub fn new(
        indexing: Indexing,
        categories: impl IntoIterator<Item = (CategoryId, String)>,
    ) -> Result<Self, LabelMapError> {
        let mut names = BTreeMap::new();
        for (id, name) in categories {
            if indexing == Indexing::IdMinusOne && id.0 == 0 {
                return Err(LabelMapError::IdZero { name });
            }
            if let Some(first) = names.get(&id).cloned() {
                return Err(LabelMapError::DuplicateId {
                    id,
                    first,
                    second: name,
                });
            }
            names.insert(id, name);
        }
        let ids = match indexing {
            Indexing::IdMinusOne => Vec::new(),
            Indexing::Contiguous => names.keys().copied().collect(),
        };
        Ok(Self { indexing, names, ids })
    }

    /// A map of a list of names: ids 1, 2, 3, …, indices 0, 1, 2, ….
    pub fn from_names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        let names: BTreeMap<_, _> = (1..)
            .map(CategoryId)
            .zip(names.into_iter().map(Into::into))
            .collect();
        let ids = names.keys().copied().collect();
        Self {
            indexing: Indexing::Contiguous,
            names,
            ids,
        }
    }

    /// A built-in map, see [`BUILT_IN`].
    ///
    /// # Errors
    /// [`LabelMapError::UnknownName`].
    pub fn built_in(name: &str) -> Result<Self, LabelMapError> {
        match name {
            "coco" => Ok(Self::coco()),
            "voc" => Ok(Self::voc()),
            "waymo" => Ok(Self::waymo()),
            _ => Err(LabelMapError::UnknownName {
                name: name.to_owned(),
                suggestion: nearest(name, BUILT_IN.iter().copied()),
            }),
        }
    }

    /// COCO: 80 categories on the ids 1..=90, index = id − 1.
    pub fn coco() -> Self {
        Self::id_minus_one(COCO.iter().map(|&(id, name)| (CategoryId(id), name)))
    }

    /// Pascal VOC: 20 categories in alphabetical order.
    pub fn voc() -> Self {
        Self::id_minus_one((1..).map(CategoryId).zip(VOC.iter().copied()))
    }

    /// Waymo Open: vehicle, pedestrian, cyclist.
    pub fn waymo() -> Self {
        Self::id_minus_one((1..).map(CategoryId).zip(WAYMO.iter().copied()))
    }

    fn id_minus_one(categories: impl Iterator<Item = (CategoryId, &'static str)>) -> Self {
        Self {
            indexing: Indexing::IdMinusOne,
            names: categories.map(|(id, name)| (id, name.to_owned())).collect(),
            ids: Vec::new(),
        }
    }

    /// How ids become indices.
    pub fn indexing(&self) -> Indexing {
        self.indexing
    }

    /// Number of named categories.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are no categories.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Class outputs needed to hold every category.
    pub fn min_num_classes(&self) -> usize {
        match self.indexing {
            Indexing::IdMinusOne => self.names.keys().next_back().map_or(0, |id| id.0 as usize),
            Indexing::Contiguous => self.ids.len(),
        }
    }

    /// The class index of a category; none for a category that is not in the map.
    pub fn class_index(&self, id: CategoryId) -> Option<ClassIndex> {
        match self.indexing {
            Indexing::IdMinusOne => self.names.contains_key(&id).then(|| ClassIndex(id.0 - 1)),
            Indexing::Contiguous => {
                let index = self.ids.binary_search(&id).ok()?;
                u32::try_from(index).ok().map(ClassIndex)
            }
        }
    }

    /// The category id that a class index stands for.
    ///
    /// With [`Indexing::IdMinusOne`] this is index + 1 even for the unnamed gaps; with [`Indexing::Contiguous`], none beyond the
    /// last category.
    pub fn category_id(&self, class: ClassIndex) -> Option<CategoryId> {
        match self.indexing {
            Indexing::IdMinusOne => class.0.checked_add(1).map(CategoryId),
            Indexing::Contiguous => self.ids.get(usize::try_from(class.0).ok()?).copied(),
        }
    }

    /// The name of a category.
    pub fn name(&self, id: CategoryId) -> Option<&str> {
        self.names.get(&id).map(String::as_str)
    }

    /// The name of a class index.
    pub fn class_name(&self, class: ClassIndex) -> Option<&str> {
        self.name(self.category_id(class)?)
    }

    /// Categories in ascending order of their ids.
    pub fn categories(&self) -> impl Iterator<Item = (CategoryId, &str)> {
        self.names.iter().map(|(&id, name)| (id, name.as_str()))
    }
}

#[rustfmt::skip]
const COCO: [(u32, &str); 80] = [
    (1, "person"), (2, "bicycle"), (3, "car"), (4, "motorcycle"), (5, "airplane"), (6, "bus"), (7, "train"), (8, "truck"),
    (9, "boat"), (10, "traffic light"), (11, "fire hydrant"), (13, "stop sign"), (14, "parking meter"), (15, "bench"),
    (16, "bird"), (17, "cat"), (18, "dog"), (19, "horse"), (20, "sheep"), (21, "cow"), (22, "elephant"), (23, "bear"),
    (24, "zebra"), (25, "giraffe"), (27, "backpack"), (28, "umbrella"), (31, "handbag"), (32, "tie"), (33, "suitcase"),
    (34, "frisbee"), (35, "skis"), (36, "snowboard"), (37, "sports ball"), (38, "kite"), (39, "baseball bat"),
    (40, "baseball glove"), (41, "skateboard"), (42, "surfboard"), (43, "tennis racket"), (44, "bottle"), (46, "wine glass"),
    (47, "cup"), (48, "fork"), (49, "knife"), (50, "spoon"), (51, "bowl"), (52, "banana"), (53, "apple"), (54, "sandwich"),
    (55, "orange"), (56, "broccoli"), (57, "carrot"), (58, "hot dog"), (59, "pizza"), (60, "donut"), (61, "cake"),
    (62, "chair"), (63, "couch"), (64, "potted plant"), (65, "bed"), (67, "dining table"), (70, "toilet"), (72, "tv"),
    (73, "laptop"), (74, "mouse"), (75, "remote"), (76, "keyboard"), (77, "cell phone"), (78, "microwave"), (79, "oven"),
    (80, "toaster"), (81, "sink"), (82, "refrigerator"), (84, "book"), (85, "clock"), (86, "vase"), (87, "scissors"),
    (88, "teddy bear"), (89, "hair drier"), (90, "toothbrush"),
];

#[rustfmt::skip]
const VOC: [&str; 20] = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
];

const WAYMO: [&str; 3] = ["vehicle", "pedestrian", "cyclist"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coco_has_80_names_on_ids_1_to_90_with_ten_gaps() {
        let coco = LabelMap::coco();
        assert_eq!((coco.len(), coco.min_num_classes()), (80, 90));
        let gaps: Vec<u32> = (1..=90)
            .filter(|&id| coco.name(CategoryId(id)).is_none())
            .collect();
        assert_eq!(gaps, [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]);
        assert_eq!(coco.name(CategoryId(90)), Some("toothbrush"));
        assert_eq!(coco.class_name(ClassIndex(0)), Some("person"));
    }

    #[test]
    fn gaps_of_coco_are_outputs_without_a_category() {
        let coco = LabelMap::coco();
        assert_eq!(coco.class_index(CategoryId(12)), None);
        assert_eq!(coco.category_id(ClassIndex(11)), Some(CategoryId(12)));
        assert_eq!(coco.class_name(ClassIndex(11)), None);
        assert_eq!(coco.category_id(ClassIndex(u32::MAX)), None);
    }

    #[test]
    fn built_in_maps_are_found_by_name_and_near_misses_are_suggested() {
        assert_eq!(
            LabelMap::built_in("voc").unwrap().class_name(ClassIndex(19)),
            Some("tvmonitor")
        );
        assert_eq!(LabelMap::built_in("waymo").unwrap().min_num_classes(), 3);
        let message = LabelMap::built_in("cocoo").unwrap_err().to_string();
        assert!(message.contains("did you mean \"coco\"?"), "{message}");
    }

    #[test]
    fn sparse_ids_become_contiguous_indices_in_ascending_order_and_back() {
        let categories = [(70, "toilet"), (3, "car"), (1000, "thing")];
        let categories = categories.map(|(id, name)| (CategoryId(id), name.to_owned()));
        let map = LabelMap::new(Indexing::Contiguous, categories).unwrap();
        assert_eq!(map.min_num_classes(), 3);
        for (index, id) in [(0, 3), (1, 70), (2, 1000)] {
            assert_eq!(map.class_index(CategoryId(id)), Some(ClassIndex(index)));
            assert_eq!(map.category_id(ClassIndex(index)), Some(CategoryId(id)));
        }
        assert_eq!(map.category_id(ClassIndex(3)), None);
        assert_eq!(map.class_index(CategoryId(4)), None);
    }

    #[test]
    fn clashing_and_zero_ids_are_refused() {
        let twice = [(CategoryId(1), "a".to_owned()), (CategoryId(1), "b".to_owned())];
        let error = LabelMap::new(Indexing::Contiguous, twice).unwrap_err();
        assert_eq!(
            error.to_string(),
            "category id 1 belongs to both \"a\" and \"b\": ids must be unique"
        );
        let zero = || [(CategoryId(0), "background".to_owned())];
        assert!(LabelMap::new(Indexing::IdMinusOne, zero()).is_err());
        assert!(LabelMap::new(Indexing::Contiguous, zero()).is_ok());
    }

    #[test]
    fn a_map_survives_being_written_and_read() {
        for map in [LabelMap::coco(), LabelMap::from_names(["bolt", "nut"])] {
            let text = serde_json::to_string(&map).unwrap();
            assert_eq!(serde_json::from_str::<LabelMap>(&text).unwrap(), map);
        }
        let clash = r#"{"indexing":"contiguous","categories":[[1,"a"],[1,"b"]]}"#;
        assert!(serde_json::from_str::<LabelMap>(clash).is_err());
    }
}
