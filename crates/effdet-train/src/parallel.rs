//! Loops over flat buffers on several threads.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use effdet_model::engine::Workers;

/// Values that are worth a worker of their own.
const VALUES_PER_WORKER: usize = 1 << 18;

/// How many of `workers` workers pay for `values` values.
pub(crate) fn useful_workers(values: usize, workers: usize) -> usize {
    (values / VALUES_PER_WORKER).clamp(1, workers.max(1))
}

/// Does `work` on every job, on the workers if there are any; results in the order of the jobs.
pub(crate) fn map<T: Send, R: Send>(
    workers: Option<&dyn Workers>,
    jobs: Vec<T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let Some(workers) = workers else {
        return jobs.into_iter().map(work).collect();
    };
    let jobs: Vec<_> = (jobs.into_iter())
        .map(|job| (Mutex::new(Some(job)), Mutex::new(None)))
        .collect();
    workers.each(jobs.len(), &|index| {
        let (job, result) = &jobs[index];
        let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
        *result.lock().unwrap_or_else(PoisonError::into_inner) = job.map(&work);
    });
    (jobs.into_iter())
        .map(|(_, result)| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .map(|result| result.expect("every job has run"))
        .collect()
}

/// The parts of `values` at ascending, disjoint ranges.
///
/// # Panics
/// When the ranges are not ascending or leave the slice.
pub(crate) fn split_mut<T>(values: &mut [T], ranges: impl Iterator<Item = Range<usize>>) -> Vec<&mut [T]> {
    let (mut rest, mut at) = (values, 0);
    ranges
        .map(|range| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(range.end - at);
            rest = after;
            let part = &mut part[range.start - at..];
            at = range.end;
            part
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod testing {
    use effdet_model::engine::Workers;

    /// A new thread for every job, of which as many count as one is told.
    #[derive(Debug)]
    pub(crate) struct Threads(pub usize);

    impl Workers for Threads {
        fn count(&self) -> usize {
            self.0
        }

        fn each(&self, jobs: usize, job: &(dyn Fn(usize) + Sync)) {
            std::thread::scope(|scope| {
                for index in 0..jobs {
                    scope.spawn(move || job(index));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_ranges_and_results_keep_their_order() {
        for workers in [None, Some(&testing::Threads(4) as &dyn Workers)] {
            let mut values: Vec<usize> = (0..10).collect();
            let parts = split_mut(&mut values, [0..2, 3..3, 5..9].into_iter());
            assert_eq!(parts, [&[0, 1][..], &[], &[5, 6, 7, 8]]);
            assert_eq!(map(workers, parts, |part| part.len()), [2, 0, 4]);
            assert!(map(workers, Vec::<u8>::new(), usize::from).is_empty());
        }
    }

    #[test]
    fn workers_are_used_where_there_is_work_for_them() {
        assert_eq!(
            [0, 300_000, 600_000, 1 << 30].map(|n| useful_workers(n, 4)),
            [1, 1, 2, 4]
        );
        assert_eq!(useful_workers(1 << 30, 0), 1);
    }
}
