//! Loops over flat buffers on several threads.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::resume_unwind;
use std::thread;

/// Values that are worth a thread of their own: starting one takes as long as a sweep over a tenth of them.
const VALUES_PER_THREAD: usize = 1 << 18;

/// How many of `threads` threads pay for `values` values.
pub(crate) fn useful_threads(values: usize, threads: NonZeroUsize) -> usize {
    (values / VALUES_PER_THREAD).clamp(1, threads.get())
}

/// Does `work` on every job, each on a thread of its own, the first one on this thread; results in the order of the jobs.
pub(crate) fn map<T: Send, R: Send>(mut jobs: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if jobs.is_empty() {
        return Vec::new();
    }
    let rest = jobs.split_off(1);
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = (rest.into_iter())
            .map(|job| scope.spawn(move || work(job)))
            .collect();
        let mut results: Vec<R> = jobs.into_iter().map(work).collect();
        for thread in running {
            results.push(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        results
    })
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
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_ranges_and_results_keep_their_order() {
        let mut values: Vec<usize> = (0..10).collect();
        let parts = split_mut(&mut values, [0..2, 3..3, 5..9].into_iter());
        assert_eq!(parts, [&[0, 1][..], &[], &[5, 6, 7, 8]]);
        assert_eq!(map(parts, |part| part.len()), [2, 0, 4]);
        assert!(map(Vec::<u8>::new(), usize::from).is_empty());
    }

    #[test]
    fn threads_are_used_where_there_is_work_for_them() {
        let four = NonZeroUsize::new(4).unwrap();
        assert_eq!(
            [0, 300_000, 600_000, 1 << 30].map(|n| useful_threads(n, four)),
            [1, 1, 2, 4]
        );
    }
}
