//! Which data sets there are and where.

/// A data set that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Name on the command line.
    pub name: &'static str,
    /// Where it lies; a mirror has the same paths below its own address.
    pub base_url: &'static str,
    /// Terms of use.
    pub terms: &'static str,
    /// Its archives.
    pub parts: &'static [Part],
}

/// One archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Name on the command line.
    pub name: &'static str,
    /// Path below the base address.
    pub path: &'static str,
    /// Size in bytes.
    pub bytes: u64,
    /// MD5 of the file, as its publishers and torchvision give it.
    pub md5: &'static str,
}

impl Part {
    /// File name.
    pub fn file_name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// Every data set.
pub const CATALOG: &[Set] = &[
    Set {
        name: "coco2017",
        base_url: "http://images.cocodataset.org",
        terms: "annotations CC BY 4.0; every image under its own Flickr licence, see cocodataset.org",
        parts: &[
            Part {
                name: "annotations",
                path: "annotations/annotations_trainval2017.zip",
                bytes: 252_907_541,
                md5: "f4bbac642086de4f52a3fdda2de5fa2c",
            },
            Part {
                name: "val",
                path: "zips/val2017.zip",
                bytes: 815_585_330,
                md5: "442b8da7639aecaf257c1dceb8ba8c80",
            },
            Part {
                name: "train",
                path: "zips/train2017.zip",
                bytes: 19_336_861_798,
                md5: "cced6f7f71b7629ddf16f17bbcfab6b2",
            },
        ],
    },
    Set {
        name: "voc2007",
        base_url: "http://host.robots.ox.ac.uk/pascal/VOC/voc2007",
        terms: "images under the terms of Flickr, see the page of the VOC challenge",
        parts: &[
            Part {
                name: "trainval",
                path: "VOCtrainval_06-Nov-2007.tar",
                bytes: 460_032_000,
                md5: "c52e279531787c972589f7e41ab4ae64",
            },
            Part {
                name: "test",
                path: "VOCtest_06-Nov-2007.tar",
                bytes: 451_020_800,
                md5: "b6e924de25625d8de591ea690078ad9f",
            },
        ],
    },
    Set {
        name: "voc2012",
        base_url: "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        terms: "images under the terms of Flickr, see the page of the VOC challenge",
        parts: &[Part {
            name: "trainval",
            path: "VOCtrainval_11-May-2012.tar",
            bytes: 1_999_639_040,
            md5: "6cd6e144f989b92b3379bac3b3de84fd",
        }],
    },
];

/// The set of a name.
pub fn find(name: &str) -> Option<&'static Set> {
    CATALOG.iter().find(|set| set.name == name)
}
