//! The prefetching loader: batches in a fixed order, prepared by several threads.
//!
//! Training reads an endless stream of samples: position p is example `permutation(pass)[p mod N]` of pass `p / N`, where the
//! permutation is keyed by (seed, pass). So one number says where a run stands, whatever the batch size, and every example is
//! seen once per pass. Evaluation reads the examples in order, once; its last batch may be smaller.
//!
//! Several ranks read the same stream: each takes its part of every batch in training ([`Shard::of`] of the batch), its part of the
//! examples in evaluation. So the union of what the ranks read does not depend on their number.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use effdet_model::assign::Assigner;
use effdet_model::rng::{Draws, Purpose};

use crate::batch::{Batch, Preparation, SampleKey, Scratch};
use crate::dataset::DetectionDataset;
use crate::error::{DataError, Result};

/// What a loader delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoaderMode {
    /// Augmented samples with targets, without end, from a position of the stream on.
    Train {
        /// First sample.
        start_position: u64,
    },
    /// Every example once, in order.
    Evaluate,
}

/// The part of the work that one of several ranks takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Number of the rank, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub ranks: usize,
}

impl Shard {
    /// The whole, for a single rank.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This rank's part of `count` things: contiguous, in the order of the ranks, sizes that differ by one at most.
    pub fn of(self, count: u64) -> std::ops::Range<u64> {
        let (rank, ranks) = (self.rank as u64, self.ranks as u64);
        count * rank / ranks..count * (rank + 1) / ranks
    }
}

/// How a loader works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Images per batch: of all ranks together in training, of this one in evaluation.
    pub batch_size: usize,
    /// The part of this rank.
    pub shard: Shard,
    /// Threads; 0 = prepare on the calling thread.
    pub workers: usize,
    /// Batches kept ready, beside the one that each worker is making.
    pub prefetch: usize,
    /// What it delivers.
    pub mode: LoaderMode,
}

/// Delivers batches in order.
///
/// # Determinism
/// Batches depend on the data, the preparation's seed and the position alone: the same for any number of workers.
#[derive(Debug)]
pub struct Loader {
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
    /// Used when there are no threads.
    scratch: Scratch,
    /// Number of the next batch to deliver.
    next: u64,
    wait_us: u64,
    failed: bool,
}

/// What the threads share.
#[derive(Debug)]
struct Work {
    dataset: Arc<DetectionDataset>,
    preparation: Preparation,
    assigner: Option<Assigner>,
    config: LoaderConfig,
    queue: Mutex<Queue>,
    /// A batch became ready.
    ready: Condvar,
    /// Room for another batch.
    room: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Next batch to claim.
    claimed: u64,
    /// Batches delivered.
    delivered: u64,
    done: BTreeMap<u64, Result<Batch>>,
    /// Buffers that came back.
    spare: Vec<Batch>,
    /// Permutations of the passes at hand.
    orders: BTreeMap<u64, Arc<Vec<u32>>>,
    stop: bool,
}

impl Loader {
    /// Starts a loader over `dataset`; an `assigner` is needed for training.
    ///
    /// # Errors
    /// [`DataError::Empty`] for a data set or batch size of 0.
    pub fn new(
        dataset: Arc<DetectionDataset>,
        preparation: Preparation,
        assigner: Option<Assigner>,
        config: LoaderConfig,
    ) -> Result<Self> {
        if dataset.examples.is_empty() || config.batch_size == 0 {
            return Err(DataError::Empty {
                name: dataset.name.clone(),
            });
        }
        let assigner = assigner.filter(|_| matches!(config.mode, LoaderMode::Train { .. }));
        let work = Arc::new(Work {
            dataset,
            preparation,
            assigner,
            config,
            queue: Mutex::default(),
            ready: Condvar::new(),
            room: Condvar::new(),
        });
        let threads = (0..config.workers)
            .map(|_| {
                let work = Arc::clone(&work);
                std::thread::spawn(move || work.run())
            })
            .collect();
        Ok(Self {
            work,
            threads,
            scratch: Scratch::default(),
            next: 0,
            wait_us: 0,
            failed: false,
        })
    }

    /// The next batch; none when an evaluation is through, or after an error.
    ///
    /// # Errors
    /// The first error of the batch's samples, in stream order; the loader ends with it.
    pub fn next_batch(&mut self) -> Option<Result<Batch>> {
        if self.failed || self.next >= self.work.batch_count() {
            return None;
        }
        let clock = Instant::now();
        let number = self.next;
        self.next += 1;
        let batch = if self.threads.is_empty() {
            let spare = self.work.lock().spare.pop().unwrap_or_default();
            self.work.prepare(number, spare, &mut self.scratch)
        } else {
            let mut queue = self.work.lock();
            let batch = loop {
                match queue.done.remove(&number) {
                    Some(batch) => break batch,
                    None => {
                        queue = self
                            .work
                            .ready
                            .wait(queue)
                            .unwrap_or_else(PoisonError::into_inner)
                    }
                }
            };
            queue.delivered = number + 1;
            drop(queue);
            self.work.room.notify_all();
            batch
        };
        self.wait_us += clock.elapsed().as_micros() as u64;
        self.failed = batch.is_err();
        Some(batch)
    }

    /// Gives a batch's memory back for the next ones.
    pub fn recycle(&mut self, batch: Batch) {
        let mut queue = self.work.lock();
        if queue.spare.len() <= self.work.config.prefetch + self.work.config.workers {
            queue.spare.push(batch);
        }
    }

    /// Time spent waiting in [`Self::next_batch`] so far.
    pub fn wait_us(&self) -> u64 {
        self.wait_us
    }

    /// Batches of an evaluation.
    pub fn batch_count(&self) -> u64 {
        self.work.batch_count()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.work.lock().stop = true;
        self.work.room.notify_all();
        for thread in self.threads.drain(..) {
            // A worker's panic has been delivered as an error already.
            let _ = thread.join();
        }
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue is consistent between any two statements that can panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn batch_count(&self) -> u64 {
        match self.config.mode {
            LoaderMode::Train { .. } => u64::MAX,
            LoaderMode::Evaluate => {
                let own = self.config.shard.of(self.dataset.examples.len() as u64);
                (own.end - own.start).div_ceil(self.config.batch_size as u64)
            }
        }
    }

    fn run(&self) {
        let mut scratch = Scratch::default();
        loop {
            let (number, spare) = {
                let mut queue = self.lock();
                loop {
                    if queue.stop || queue.claimed >= self.batch_count() {
                        return;
                    }
                    let ahead = (self.config.prefetch + self.config.workers) as u64;
                    if queue.claimed < queue.delivered + ahead {
                        break;
                    }
                    queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                queue.claimed += 1;
                (queue.claimed - 1, queue.spare.pop().unwrap_or_default())
            };
            // A panic would leave the consumer waiting for ever.
            let prepared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.prepare(number, spare, &mut scratch)
            }));
            let batch = prepared.unwrap_or(Err(DataError::Internal {
                what: "a loader thread panicked",
            }));
            self.lock().done.insert(number, batch);
            self.ready.notify_all();
        }
    }

    /// Prepares batch `number`.
    fn prepare(&self, number: u64, mut batch: Batch, scratch: &mut Scratch) -> Result<Batch> {
        let size = self.config.batch_size as u64;
        let count = self.dataset.examples.len() as u64;
        let (positions, end) = match self.config.mode {
            LoaderMode::Train { start_position } => {
                let start = start_position + number * size;
                let own = self.config.shard.of(size);
                (start + own.start..start + own.end, start + size)
            }
            LoaderMode::Evaluate => {
                let own = self.config.shard.of(count);
                let start = own.start + number * size;
                let end = (start + size).min(own.end);
                (start..end, end)
            }
        };
        let assigner = self.assigner.as_ref();
        let images = (positions.end - positions.start) as usize;
        self.preparation.start(&mut batch, images, assigner);
        for position in positions {
            let key = self.key(position);
            let examples = &self.dataset.examples;
            self.preparation
                .append(&mut batch, examples, key, assigner, scratch)?;
        }
        batch.end_position = end;
        Ok(batch)
    }

    fn key(&self, position: u64) -> SampleKey {
        let count = self.dataset.examples.len() as u64;
        let (pass, place) = (position / count, position % count);
        let index = match self.config.mode {
            LoaderMode::Evaluate => place,
            LoaderMode::Train { .. } => u64::from(self.order(pass)[place as usize]),
        };
        SampleKey { pass, index }
    }

    /// The permutation of a pass.
    fn order(&self, pass: u64) -> Arc<Vec<u32>> {
        if let Some(order) = self.lock().orders.get(&pass) {
            return Arc::clone(order);
        }
        let mut order: Vec<u32> = (0..self.dataset.examples.len() as u32).collect();
        Draws::new(self.preparation.seed, Purpose::Shuffle, pass, 0).shuffle(&mut order);
        let order = Arc::new(order);
        let mut queue = self.lock();
        queue.orders.insert(pass, Arc::clone(&order));
        while queue.orders.len() > 3 {
            queue.orders.pop_first();
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::augment::AugmentConfig;
    use crate::cache::ImageCache;
    use crate::dataset::{Category, Example, ImageSource, ObjectAnnotation};
    use crate::preprocess::PreprocessConfig;
    use crate::synthetic::{CLASS_NAMES, SyntheticConfig, render};
    use effdet_model::anchors::{AnchorConfig, Anchors};
    use effdet_model::hparams::{HParams, ImageSize};
    use effdet_model::label_map::{CategoryId, LabelMap};

    fn hparams() -> HParams {
        let mut hparams = HParams::preset("d0").unwrap();
        hparams.image_size = ImageSize::square(64);
        hparams
    }

    fn dataset(count: u64) -> DetectionDataset {
        let config = SyntheticConfig {
            image_size: 48,
            ..SyntheticConfig::default()
        };
        let examples = (0..count)
            .map(|index| {
                let image = render(&config, index);
                let object = |&(category, box_xywh_px): &(CategoryId, [f64; 4])| ObjectAnnotation {
                    box_xywh_px,
                    category,
                    area: box_xywh_px[2] * box_xywh_px[3],
                    is_crowd: false,
                    difficult: false,
                };
                Example {
                    image_id: index as i64 + 1,
                    source_id: format!("{}", index + 1),
                    file_name: format!("{index}.jpg"),
                    width: 48,
                    height: 48,
                    objects: image.objects.iter().map(object).collect(),
                    source: ImageSource::Memory(image.jpeg.into()),
                }
            })
            .collect();
        let categories = (CLASS_NAMES.iter().zip(1..))
            .map(|(name, id)| Category {
                id: CategoryId(id),
                name: (*name).to_owned(),
            })
            .collect();
        DetectionDataset {
            name: "shapes".into(),
            examples,
            categories,
        }
    }

    fn loader(dataset: &DetectionDataset, batch_size: usize, workers: usize, mode: LoaderMode) -> Loader {
        let config = LoaderConfig {
            batch_size,
            shard: Shard::WHOLE,
            workers,
            prefetch: 3,
            mode,
        };
        start(dataset, config)
    }

    fn start(dataset: &DetectionDataset, config: LoaderConfig) -> Loader {
        start_augmented(dataset, config, Default::default())
    }

    fn start_augmented(dataset: &DetectionDataset, config: LoaderConfig, augment: AugmentConfig) -> Loader {
        start_cached(dataset, config, augment, None)
    }

    fn start_cached(
        dataset: &DetectionDataset,
        config: LoaderConfig,
        augment: AugmentConfig,
        cache: Option<Arc<ImageCache>>,
    ) -> Loader {
        start_preprocessed(dataset, config, PreprocessConfig::new(&hparams()), augment, cache)
    }

    fn start_preprocessed(
        dataset: &DetectionDataset,
        config: LoaderConfig,
        preprocess: PreprocessConfig,
        augment: AugmentConfig,
        cache: Option<Arc<ImageCache>>,
    ) -> Loader {
        let preparation = Preparation {
            preprocess,
            augment,
            decode: Default::default(),
            max_encoded_bytes: 1 << 20,
            label_map: LabelMap::from_names(CLASS_NAMES),
            skip_crowd: true,
            seed: 7,
            cache,
        };
        let anchors = Anchors::new(&AnchorConfig::from(&hparams())).unwrap();
        Loader::new(
            Arc::new(dataset.clone()),
            preparation,
            Some(Assigner::new(&anchors)),
            config,
        )
        .unwrap()
    }

    fn comparable(mut batch: Batch) -> Batch {
        (batch.decode_us, batch.prepare_us, batch.assign_us) = (0, 0, 0);
        batch
    }

    fn take(loader: &mut Loader, count: usize) -> Vec<Batch> {
        (0..count)
            .map(|_| {
                let batch = loader.next_batch().unwrap().unwrap();
                let copy = comparable(batch.clone());
                loader.recycle(batch);
                copy
            })
            .collect()
    }

    #[test]
    fn batches_are_the_same_for_any_number_of_workers() {
        let data = dataset(5);
        let mode = LoaderMode::Train { start_position: 0 };
        let expected = take(&mut loader(&data, 2, 0, mode), 7);
        assert_eq!(expected[6].end_position, 14);
        for workers in [1, 3] {
            assert_eq!(
                take(&mut loader(&data, 2, workers, mode), 7),
                expected,
                "{workers} workers"
            );
        }
    }

    #[test]
    fn a_loader_started_in_the_middle_of_a_pass_goes_on_with_the_same_samples() {
        let data = dataset(5);
        let whole = take(
            &mut loader(&data, 2, 1, LoaderMode::Train { start_position: 0 }),
            6,
        );
        for skipped in 1..5usize {
            let start_position = whole[skipped - 1].end_position;
            let mode = LoaderMode::Train { start_position };
            assert_eq!(
                take(&mut loader(&data, 2, 2, mode), 6 - skipped),
                whole[skipped..]
            );
        }
    }

    #[test]
    fn every_pass_sees_every_example_once_in_its_own_order() {
        let data = dataset(6);
        let batches = take(
            &mut loader(&data, 3, 1, LoaderMode::Train { start_position: 0 }),
            6,
        );
        let mut orders = Vec::new();
        for pass in batches.chunks(2) {
            let ids: Vec<i64> = pass.iter().flat_map(|batch| batch.image_ids.clone()).collect();
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [1, 2, 3, 4, 5, 6]);
            orders.push(ids);
        }
        assert!(orders[0] != orders[1] || orders[1] != orders[2]);
    }

    #[test]
    fn an_evaluation_reads_all_examples_in_order_and_ends() {
        let data = dataset(5);
        for workers in [0, 2] {
            let mut loader = loader(&data, 2, workers, LoaderMode::Evaluate);
            assert_eq!(loader.batch_count(), 3);
            let mut ids = Vec::new();
            while let Some(batch) = loader.next_batch() {
                let batch = batch.unwrap();
                assert!(batch.class_targets.is_empty());
                assert!(batch.image_scales.iter().all(|&scale| scale == 0.75));
                ids.extend(batch.image_ids);
            }
            assert_eq!(ids, [1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn ranks_read_the_batches_of_one_process_in_parts_that_make_the_whole() {
        // Fewer images than ranks, a remainder in every batch, and batches that cross a pass.
        for (images, ranks) in [(2, 3), (5, 2), (6, 4)] {
            let data = dataset(images);
            let mode = LoaderMode::Train { start_position: 1 };
            let whole = take(&mut loader(&data, 5, 0, mode), 3);
            let mut parts: Vec<Loader> = (0..ranks)
                .map(|rank| {
                    let config = LoaderConfig {
                        batch_size: 5,
                        shard: Shard { rank, ranks },
                        workers: 1,
                        prefetch: 1,
                        mode,
                    };
                    start(&data, config)
                })
                .collect();
            for batch in &whole {
                let parts: Vec<Batch> = parts.iter_mut().flat_map(|part| take(part, 1)).collect();
                let ids: Vec<i64> = parts.iter().flat_map(|part| part.image_ids.clone()).collect();
                let pixels: Vec<f32> = parts.iter().flat_map(|part| part.images.clone()).collect();
                assert_eq!((&ids, &pixels), (&batch.image_ids, &batch.images));
                assert!(parts.iter().all(|part| part.end_position == batch.end_position));
                assert!(
                    parts
                        .iter()
                        .all(|part| [5 / ranks, 5usize.div_ceil(ranks)].contains(&part.len()))
                );
            }
        }
    }

    #[test]
    fn ranks_evaluate_every_image_once_in_the_order_of_one_process() {
        for (images, ranks) in [(5, 1), (5, 2), (5, 4), (2, 3)] {
            let data = dataset(images);
            let mut ids = Vec::new();
            for rank in 0..ranks {
                let config = LoaderConfig {
                    batch_size: 2,
                    shard: Shard { rank, ranks },
                    workers: 1,
                    prefetch: 1,
                    mode: LoaderMode::Evaluate,
                };
                let mut loader = start(&data, config);
                while let Some(batch) = loader.next_batch() {
                    ids.extend(batch.unwrap().image_ids);
                }
            }
            assert_eq!(
                ids,
                (1..=images as i64).collect::<Vec<_>>(),
                "{images} on {ranks}"
            );
        }
    }

    #[test]
    fn an_undecodable_image_ends_the_loader_with_its_name() {
        let mut data = dataset(4);
        data.examples[2].source = ImageSource::Memory(Arc::from(&b"not an image"[..]));
        for workers in [0, 2] {
            let mut loader = loader(&data, 1, workers, LoaderMode::Evaluate);
            assert!(loader.next_batch().unwrap().is_ok());
            assert!(loader.next_batch().unwrap().is_ok());
            let error = loader.next_batch().unwrap().unwrap_err().to_string();
            assert!(error.contains("2.jpg"), "{error}");
            assert!(loader.next_batch().is_none());
        }
    }

    #[test]
    fn an_image_of_another_size_than_annotated_is_named_with_both_sizes() {
        let mut data = dataset(1);
        let first = |data: &DetectionDataset| loader(data, 1, 0, LoaderMode::Evaluate).next_batch().unwrap();
        data.examples[0].width = 50;
        let message = first(&data).unwrap_err().to_string();
        assert!(
            ["0.jpg", "48x48", "50x48"]
                .iter()
                .all(|part| message.contains(part)),
            "{message}"
        );
        (data.examples[0].width, data.examples[0].height) = (0, 0);
        assert!(first(&data).is_ok(), "an unknown size is no mismatch");
    }

    #[test]
    fn a_loader_dropped_with_work_in_flight_ends_its_threads() {
        let data = dataset(6);
        let mut loader = loader(&data, 2, 3, LoaderMode::Train { start_position: 0 });
        take(&mut loader, 1);
        let work = Arc::downgrade(&loader.work);
        drop(loader);
        assert!(work.upgrade().is_none(), "a worker outlived its loader");
    }

    #[test]
    fn an_unknown_category_is_named() {
        let mut data = dataset(1);
        data.examples[0].objects[0].category = CategoryId(77);
        let error = loader(&data, 1, 0, LoaderMode::Train { start_position: 0 })
            .next_batch()
            .unwrap()
            .unwrap_err();
        assert!(error.to_string().contains("77"), "{error}");
    }

    #[test]
    fn targets_of_a_batch_count_its_positives() {
        let data = dataset(3);
        let batch = &take(
            &mut loader(&data, 3, 0, LoaderMode::Train { start_position: 0 }),
            1,
        )[0];
        let positives = batch.class_targets.iter().filter(|&&class| class >= 0).count();
        assert_eq!(batch.positives.iter().sum::<usize>(), positives);
        assert_eq!(batch.train_batch().targets.normalizer, positives as f32 + 1.0);
    }

    #[test]
    fn images_from_a_cache_give_the_same_batches() {
        let dataset = dataset(7);
        let mode = LoaderMode::Train { start_position: 0 };
        let folder = tempfile::tempdir().unwrap();
        let image_bytes = 48 * 48 * 3;
        let mosaic = AugmentConfig {
            mosaic: 0.5,
            ..AugmentConfig::default()
        };
        for augment in [AugmentConfig::default(), mosaic] {
            let passes = |workers, cache| {
                let config = LoaderConfig {
                    batch_size: 3,
                    shard: Shard::WHOLE,
                    workers,
                    prefetch: 3,
                    mode,
                };
                let mut loader = start_cached(&dataset, config, augment.clone(), cache);
                take(&mut loader, 8)
                    .into_iter()
                    .map(comparable)
                    .collect::<Vec<_>>()
            };
            let expected = passes(0, None);
            for workers in [0, 2] {
                // Room for all images, and for three of them.
                for limit in [u64::MAX, 3 * image_bytes] {
                    let memory = Arc::new(ImageCache::in_memory(7, limit));
                    assert_eq!(passes(workers, Some(Arc::clone(&memory))), expected);
                    assert_eq!(memory.used_bytes(), limit.min(7 * image_bytes));
                    let disk = ImageCache::on_disk(folder.path(), limit).unwrap();
                    assert_eq!(passes(workers, Some(Arc::new(disk))), expected);
                }
            }
        }
    }

    #[test]
    fn reduced_decoding_changes_the_training_samples_that_shrink_to_half_and_nothing_else() {
        let dataset = dataset(7);
        let read = |reduced_decode, mode, workers, cache| -> Vec<Batch> {
            let config = LoaderConfig {
                batch_size: 1,
                shard: Shard::WHOLE,
                workers,
                prefetch: 3,
                mode,
            };
            let mut preprocess = PreprocessConfig::new(&hparams());
            // An evaluation shrinks the images of 48 pixels to half too.
            preprocess.image_size = ImageSize::square(24);
            preprocess.target_size = ImageSize::square(64);
            preprocess.reduced_decode = reduced_decode;
            let mut loader = start_preprocessed(&dataset, config, preprocess, Default::default(), cache);
            take(&mut loader, 7)
        };
        let training = LoaderMode::Train { start_position: 0 };
        let (whole, reduced) = (read(false, training, 0, None), read(true, training, 0, None));
        let mut changed = 0;
        for (whole, reduced) in whole.iter().zip(&reduced) {
            // 1/s: pixels of the image per pixel of the input.
            let shrinks = reduced.image_scales[0] >= 2.0;
            assert_eq!(
                whole.images != reduced.images,
                shrinks,
                "{}",
                reduced.image_scales[0]
            );
            assert_eq!(whole.class_targets, reduced.class_targets);
            assert_eq!(whole.box_targets, reduced.box_targets);
            changed += usize::from(shrinks);
        }
        assert!((1..7).contains(&changed), "{changed} of 7 samples shrink");
        assert_eq!(read(true, training, 2, None), reduced, "other workers");
        let cache = Arc::new(ImageCache::in_memory(7, u64::MAX));
        assert_eq!(read(true, training, 0, Some(cache)), reduced, "with a cache");
        let evaluation = LoaderMode::Evaluate;
        assert_eq!(read(true, evaluation, 0, None), read(false, evaluation, 0, None));
    }

    #[test]
    fn every_augmentation_is_the_same_for_any_number_of_workers_and_changes_the_pixels() {
        let dataset = dataset(6);
        let batches = |workers, augment: AugmentConfig| -> Vec<Batch> {
            let config = LoaderConfig {
                batch_size: 4,
                shard: Shard::WHOLE,
                workers,
                prefetch: 2,
                mode: LoaderMode::Train { start_position: 3 },
            };
            let mut loader = start_augmented(&dataset, config, augment);
            let mut batch = || Batch {
                decode_us: 0,
                prepare_us: 0,
                assign_us: 0,
                ..loader.next_batch().unwrap().unwrap()
            };
            (0..3).map(|_| batch()).collect()
        };
        let plain = AugmentConfig::default();
        let everything = AugmentConfig {
            policy: Some("v1".parse().unwrap()),
            grid_mask: true,
            hsv: [0.015, 0.7, 0.4],
            mosaic: 0.5,
            mixup: 0.5,
            mosaic_until_pass: Some(1),
        };
        let expected = batches(0, everything.clone());
        for workers in [1, 3] {
            assert_eq!(batches(workers, everything.clone()), expected, "{workers}");
        }
        assert_ne!(batches(0, plain.clone()), expected);
        let mosaics = AugmentConfig {
            mosaic: 1.0,
            mixup: 1.0,
            mosaic_until_pass: Some(1),
            ..plain.clone()
        };
        // Position 6 begins the second pass, where they have ended.
        let (mixed, unmixed) = (batches(0, mosaics), batches(0, plain));
        assert_ne!(mixed[0], unmixed[0]);
        assert_eq!(mixed[1..], unmixed[1..]);
    }
}
