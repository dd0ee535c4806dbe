//! Summary figures of a data set.

use std::collections::BTreeMap;

use effdet_model::label_map::CategoryId;
use serde::Serialize;

use crate::dataset::DetectionDataset;

/// Upper ends of the bins of box sides in pixels; the last bin is open.
pub const SIDE_BINS_PX: [f64; 8] = [8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Figures of a data set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// Images.
    pub images: usize,
    /// Images without any object.
    pub images_without_objects: usize,
    /// Objects, crowds included.
    pub objects: usize,
    /// Objects that are crowds.
    pub crowds: usize,
    /// Objects marked as difficult.
    pub difficult: usize,
    /// Most objects of an image.
    pub max_objects_per_image: usize,
    /// Objects by category, in ascending order of the ids; those without objects, too.
    pub categories: Vec<CategoryCount>,
    /// Objects by the area classes of the COCO metric: below 32², up to 96², above.
    pub small_medium_large: [usize; 3],
    /// Objects by √(width·height) of their box: below 8 pixels, below 16, …, 1024 and more ([`SIDE_BINS_PX`]).
    pub box_side_histogram: [usize; 9],
    /// Images by `(width, height)`, most frequent first; `(0, 0)` = unknown.
    pub image_sizes: Vec<((u32, u32), usize)>,
}

/// Objects of one category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CategoryCount {
    /// Id.
    pub id: CategoryId,
    /// Name.
    pub name: String,
    /// Objects.
    pub objects: usize,
    /// Images with such objects.
    pub images: usize,
}

/// Counts images, objects, categories and sizes.
pub fn statistics(dataset: &DetectionDataset) -> Statistics {
    let mut counts: BTreeMap<CategoryId, (usize, usize)> = BTreeMap::new();
    let mut sizes: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    let mut small_medium_large = [0; 3];
    let mut box_side_histogram = [0; SIDE_BINS_PX.len() + 1];
    for example in &dataset.examples {
        *sizes.entry((example.width, example.height)).or_default() += 1;
        let mut seen = Vec::new();
        for object in &example.objects {
            let (objects, images) = counts.entry(object.category).or_default();
            *objects += 1;
            if !seen.contains(&object.category) {
                seen.push(object.category);
                *images += 1;
            }
            let class = match object.area {
                area if area < 32.0 * 32.0 => 0,
                area if area <= 96.0 * 96.0 => 1,
                _ => 2,
            };
            small_medium_large[class] += 1;
            let side = (object.box_xywh_px[2] * object.box_xywh_px[3]).sqrt();
            box_side_histogram[SIDE_BINS_PX.partition_point(|&end| end <= side)] += 1;
        }
    }
    let categories = (dataset.categories.iter())
        .map(|category| {
            let (objects, images) = counts.get(&category.id).copied().unwrap_or_default();
            CategoryCount {
                id: category.id,
                name: category.name.clone(),
                objects,
                images,
            }
        })
        .collect();
    let mut image_sizes: Vec<_> = sizes.into_iter().collect();
    image_sizes.sort_by_key(|&(_, images)| std::cmp::Reverse(images));
    let objects = || dataset.examples.iter().flat_map(|example| &example.objects);
    let lens = || dataset.examples.iter().map(|example| example.objects.len());
    Statistics {
        images: dataset.examples.len(),
        images_without_objects: lens().filter(|&len| len == 0).count(),
        objects: objects().count(),
        crowds: objects().filter(|object| object.is_crowd).count(),
        difficult: objects().filter(|object| object.difficult).count(),
        max_objects_per_image: lens().max().unwrap_or(0),
        categories,
        small_medium_large,
        box_side_histogram,
        image_sizes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Category, Example, ImageSource, ObjectAnnotation};
    use std::sync::Arc;

    fn example(image_id: i64, bytes: &[u8], objects: &[(u32, f64, f64)]) -> Example {
        let object = |&(category, side, area): &(u32, f64, f64)| ObjectAnnotation {
            box_xywh_px: [0.0, 0.0, side, side],
            category: CategoryId(category),
            area,
            is_crowd: category == 2,
            difficult: false,
        };
        Example {
            image_id,
            source_id: image_id.to_string(),
            file_name: format!("{image_id}.jpg"),
            width: 640,
            height: 480,
            source: ImageSource::Memory(Arc::from(bytes)),
            objects: objects.iter().map(object).collect(),
        }
    }

    fn dataset(examples: Vec<Example>) -> DetectionDataset {
        let category = |(id, name): (u32, &str)| Category {
            id: CategoryId(id),
            name: name.into(),
        };
        DetectionDataset {
            name: "test".into(),
            examples,
            categories: [(1, "cat"), (2, "crowd"), (3, "none")].map(category).to_vec(),
        }
    }

    #[test]
    fn objects_are_counted_by_category_and_size() {
        let data = dataset(vec![
            example(1, b"", &[(1, 7.9, 1023.0), (1, 8.0, 1024.0), (2, 2000.0, 9217.0)]),
            example(2, b"", &[]),
            example(3, b"", &[(1, 100.0, 9216.0)]),
        ]);
        let found = statistics(&data);
        assert_eq!(
            (found.images, found.images_without_objects, found.objects),
            (3, 1, 4)
        );
        assert_eq!((found.crowds, found.max_objects_per_image), (1, 3));
        let counts: Vec<_> = found.categories.iter().map(|c| (c.objects, c.images)).collect();
        assert_eq!(counts, [(3, 2), (1, 1), (0, 0)]);
        assert_eq!(found.small_medium_large, [1, 2, 1]);
        assert_eq!(found.box_side_histogram, [1, 1, 0, 0, 1, 0, 0, 0, 1]);
        assert_eq!(found.image_sizes, [((640, 480), 3)]);
    }
}
