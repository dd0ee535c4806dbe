//! Kinds of problems, their severity and their remedy.

use serde::Serialize;

/// Places that a problem lists; more are counted.
const INSTANCES: usize = 20;

/// How grave a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Training on this is pointless or will stop.
    Error,
    /// Training works and may give less than it could.
    Warning,
    /// Worth knowing.
    Note,
}

impl Severity {
    /// `error`, `warning` or `note`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

macro_rules! checks {
    ($($(#[$meta:meta])* $variant:ident = $code:literal, $severity:ident, $title:literal, $remedy:literal;)+) => {
        /// What is checked.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Check {
            $($(#[$meta])* $variant,)+
        }

        impl Check {
            /// Every check.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in reports.
            pub fn code(self) -> &'static str {
                match self { $(Self::$variant => $code),+ }
            }

            /// How grave it is, unless the circumstances say otherwise.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity),+ }
            }

            /// What it means.
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title),+ }
            }

            /// What to do.
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy),+ }
            }
        }
    };
}

checks! {
    /// A split could not be read at all.
    UnreadableSplit = "unreadable-split", Error, "the split cannot be read",
        "see the message: it says what was expected and where";
    /// There is nothing to learn from.
    NoBoxes = "no-boxes", Error, "no image has a box",
        "convert again from the file with the boxes (instances_*.json of COCO, not captions_*.json); the reference's get_coco.sh passes the captions and gives records like these";
    /// The four numbers of the boxes mean something else.
    BoxConvention = "box-convention", Error, "the numbers of the boxes mean something else than the format says",
        "convert the boxes to the format's convention; see the message for the reading that fits";
    /// Objects of categories that do not exist.
    UnknownCategory = "unknown-category", Error, "objects of categories that are not in the class map",
        "add the categories to the class map, or correct the ids";
    /// Ids are shifted by one.
    OffByOne = "off-by-one", Error, "category ids are shifted by one against the class map",
        "add or subtract one from every category id of the annotations, or renumber the class map";
    /// Two class maps do not agree.
    ClassMapDiffers = "class-map-differs", Error, "class maps differ",
        "use one class map for every split, the evaluation file and the checkpoint; renumber the one that is wrong";
    /// Numbers of class outputs do not agree.
    OutputsDiffer = "outputs-differ", Warning, "numbers of class outputs do not agree",
        "give --num-classes of the checkpoint, or take one with as many outputs: the class predictor of another starts anew";
    /// An object without a category.
    NoCategory = "no-category", Error, "objects without a category", "give every object a category, or remove it";
    /// An annotation without a box.
    NoBox = "no-box", Error, "annotations without a complete box", "give every object a box, or remove the annotation";
    /// A box that is no number.
    NotFinite = "not-finite", Error, "boxes or areas that are no finite numbers", "correct the numbers, or remove the objects";
    /// An annotation of an image that does not exist.
    UnknownImage = "unknown-image", Error, "annotations of images that are not in the list of images",
        "add the images, or remove the annotations";
    /// An image that is there twice.
    DuplicateImage = "duplicate-image", Error, "images that are listed twice", "remove one of the entries";
    /// A name that leaves the data folder.
    NameEscapes = "name-escapes", Error, "file names that leave the data folder",
        "use names relative to the image folder; copy what lies elsewhere, or allow links with --follow-links";
    /// An image that is not there.
    MissingFile = "missing-file", Error, "files that are not there", "check the image folder and the names; copy what is missing";
    /// An annotation that makes no sense.
    Malformed = "malformed", Error, "annotation files that make no sense", "correct the file at the place named, or leave the image out";
    /// A damaged record.
    DamagedRecord = "damaged-record", Error, "damaged records",
        "copy or convert the shards again, or train without them: --on-corrupt skip";
    /// An image that cannot be decoded.
    Undecodable = "undecodable", Error, "images that cannot be read or decoded",
        "replace them, remove them, or train without them: --on-corrupt skip";
    /// An image of another size than annotated.
    SizeDiffers = "size-differs", Error, "images of another size than annotated",
        "the images were resized or turned after annotation: restore the originals, or scale the boxes";
    /// Images in training and held-out data.
    Leakage = "leakage", Warning, "images of the training data are in the held-out data, too",
        "remove them from one of the two: scores on them say nothing";
    /// EXIF says the image is to be turned.
    ExifRotation = "exif-rotation", Warning, "images that EXIF says are to be turned",
        "EXIF is ignored, boxes are taken for the stored pixels; if the annotation tool showed them upright, turn the pixels and drop the tag (exiftran -a, jhead -autorot)";
    /// A box that runs past its image.
    BoxClipped = "box-clipped", Warning, "boxes that run past their image; they are cut to it",
        "nothing needs to be done where the object goes on beyond the edge; otherwise correct the boxes";
    /// A box without area.
    BoxNoArea = "box-no-area", Warning, "boxes without area; they are left out", "draw them again, or remove them";
    /// A box outside its image.
    BoxOutside = "box-outside", Warning, "boxes outside their image; they are left out", "correct or remove them";
    /// An object that is annotated twice.
    DuplicateBoxes = "duplicate-boxes", Warning, "objects that are annotated twice: same box, same category", "remove one of each";
    /// Names of COCO on other ids.
    CocoIds = "coco-ids", Warning, "the names are those of COCO, the ids are not",
        "COCO's 80 categories have the ids 1 to 90 with gaps (91 outputs in the reference, 90 upstream); with ids 1 to 80 results cannot be scored against instances_val2017.json, and weights trained on COCO mean other classes";
    /// A category for background.
    BackgroundClass = "background-class", Warning, "a category that stands for background",
        "remove it: every anchor without an object is background already";
    /// Two ids with one name.
    DuplicateName = "duplicate-name", Warning, "categories that share a name", "merge them, or give them different names";
    /// A category that is evaluated and never trained.
    Untrained = "untrained", Warning, "categories of the held-out data without an object in the training data",
        "add examples to the training data: their AP will be 0";
    /// An image that is there twice under two names.
    DuplicateContent = "duplicate-content", Warning, "images with the same content under different names",
        "remove the copies, unless they are meant to count more";
    /// Anchors that do not fit.
    AnchorRecall = "anchor-recall", Warning, "boxes that no anchor overlaps by half",
        "see the anchors that are suggested; a larger --image-size helps small objects";
    /// A category with few objects.
    FewObjects = "few-objects", Warning, "categories with fewer than ten objects to learn from", "add examples";
    /// Labels changed after a conversion.
    Edited = "edited", Note, "labels that were changed after a conversion", "nothing, if that was intended; the labels are used";
    /// An annotation id that occurs twice.
    DuplicateAnnotation = "duplicate-annotation", Note, "annotation ids that occur more than once",
        "number the annotations again: tools that look annotations up by id lose all but one";
    /// Categories without objects.
    UnusedCategory = "unused-category", Note, "categories without an object", "remove them from the class map if they are not needed";
    /// Classes of very different frequency.
    Imbalance = "imbalance", Note, "categories of very different frequency", "add examples of the rare ones, or expect lower AP on them";
    /// Images without objects.
    EmptyImages = "empty-images", Note, "images without an object", "nothing, if they show background; otherwise annotate them";
    /// Images with more objects than the reference can take.
    ManyObjects = "many-objects", Note, "images with more objects than max_instances_per_image",
        "the reference fails on these; here all are used in training, evaluation keeps the best 100 detections of an image";
    /// Crowds.
    Crowds = "crowds", Note, "crowd regions; they are left out of training and ignored in evaluation", "nothing";
    /// Objects marked as difficult.
    Difficult = "difficult", Note, "objects marked as difficult; they are used as any other", "nothing, or leave them out";
    /// Images of one channel.
    Greyscale = "greyscale", Note, "greyscale images; the channel is repeated", "nothing";
    /// Images of other colours than RGB.
    OtherColours = "other-colours", Note, "images in CMYK, with a palette, an alpha channel or 16 bits; they are converted to RGB", "nothing";
    /// A file that is called otherwise than its content.
    Extension = "extension", Note, "files whose extension does not fit their content", "nothing: the content counts";
}

/// One place where a problem shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Instance {
    /// File.
    pub file: String,
    /// Record in it: annotation id, line or index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record: Option<i64>,
    /// What about it.
    pub what: String,
    /// The box at fault: x, y, width, height in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub box_xywh_px: Option<[f64; 4]>,
}

impl Instance {
    /// A place that is a file.
    pub fn file(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            record: None,
            what: what.into(),
            box_xywh_px: None,
        }
    }
}

/// One problem of one split.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Problem {
    /// How grave it is.
    pub severity: Severity,
    /// Which one.
    pub check: Check,
    /// Split; empty for the whole data set.
    pub split: String,
    /// How many times.
    pub count: usize,
    /// What it means.
    pub title: String,
    /// Details of this data set; may be empty.
    pub detail: String,
    /// What to do.
    pub remedy: String,
    /// Where, the first of them.
    pub instances: Vec<Instance>,
}

impl Problem {
    /// A problem that shows in `count` places, of which some are given.
    pub fn new(
        check: Check,
        split: &str,
        count: usize,
        instances: impl IntoIterator<Item = Instance>,
    ) -> Self {
        Self {
            severity: check.severity(),
            check,
            split: split.to_owned(),
            count,
            title: check.title().to_owned(),
            detail: String::new(),
            remedy: check.remedy().to_owned(),
            instances: instances.into_iter().take(INSTANCES).collect(),
        }
    }

    /// With details.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// With another severity.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_names_in_json_and_every_check_has_a_remedy() {
        for check in Check::ALL {
            let json = serde_json::to_string(check).unwrap();
            assert_eq!(json, format!("{:?}", check.code()));
            assert!(!check.title().is_empty() && !check.remedy().is_empty());
        }
    }
}
