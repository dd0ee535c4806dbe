//! How the rows of a tensor are cut into blocks and tasks.

use std::ops::Range;

/// Most rows of a block: a multiple of all tile heights, and few enough for 240 columns to stay in the L2 cache.
pub(crate) const BLOCK_ROWS: usize = 96;

/// Consecutive rows of one image and one batch-norm group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Number of rows (pixels).
    pub rows: usize,
    /// Index of the image.
    pub image: usize,
    /// Index of the group that batch norm takes its statistics over: 0 in the backbone, the level in the heads.
    pub group: usize,
}

/// How the rows of a tensor are cut into blocks and tasks; a function of the shapes alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowPlan {
    rows: usize,
    images: usize,
    /// Blocks of each group, one range after the other.
    groups: Vec<Range<usize>>,
    blocks: Vec<RowBlock>,
}

/// A run of rows that is worked on at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowBlock {
    pub row: usize,
    pub rows: usize,
    pub image: usize,
    pub group: usize,
}

/// Consecutive blocks of one group, worked on by one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowTask {
    pub blocks: Range<usize>,
    pub group: usize,
}

impl RowPlan {
    /// The plan for rows laid out as `segments`, one after the other.
    ///
    /// # Panics
    /// When the groups do not ascend from 0 without gaps, segment by segment.
    pub fn new(segments: &[Segment]) -> Self {
        let mut plan = Self {
            rows: 0,
            images: 0,
            groups: Vec::new(),
            blocks: Vec::new(),
        };
        for segment in segments {
            let known = plan.groups.len();
            assert!(
                segment.group == known || segment.group + 1 == known,
                "group {} follows group {}: groups ascend from 0 without gaps",
                segment.group,
                known as isize - 1
            );
            for start in (0..segment.rows).step_by(BLOCK_ROWS) {
                plan.blocks.push(RowBlock {
                    row: plan.rows + start,
                    rows: BLOCK_ROWS.min(segment.rows - start),
                    image: segment.image,
                    group: segment.group,
                });
            }
            let end = plan.blocks.len();
            match plan.groups.get_mut(segment.group) {
                Some(blocks) => blocks.end = end,
                None => plan
                    .groups
                    .push(plan.groups.last().map_or(0, |last| last.end)..end),
            }
            plan.rows += segment.rows;
            plan.images = plan.images.max(segment.image + 1);
        }
        plan
    }

    /// The plan for `[images, rows_per_image, channels]`, all in group 0.
    pub fn images(images: usize, rows_per_image: usize) -> Self {
        Self::levels(images, &[rows_per_image])
    }

    /// The plan for tensors of several levels one after the other, each `[images, rows_per_level[level], channels]`; a group
    /// per level.
    pub fn levels(images: usize, rows_per_level: &[usize]) -> Self {
        let level = |(group, &rows)| (0..images).map(move |image| Segment { rows, image, group });
        Self::new(
            &rows_per_level
                .iter()
                .enumerate()
                .flat_map(level)
                .collect::<Vec<_>>(),
        )
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of images: one more than the largest index.
    pub fn image_count(&self) -> usize {
        self.images
    }

    /// Number of groups.
    pub fn group_count(&self) -> usize {
        self.groups.len()
    }

    pub(crate) fn blocks(&self, task: &RowTask) -> &[RowBlock] {
        &self.blocks[task.blocks.clone()]
    }

    /// The rows of the block that a worker is likely to turn to after block `index` of `task`: the next one of the task, or
    /// the first one of the next task. Empty where there is none.
    pub(crate) fn rows_after(&self, tasks: &[RowTask], task: usize, index: usize) -> Range<usize> {
        let next = tasks[task].blocks.start + index + 1;
        let next = if next < tasks[task].blocks.end {
            Some(next)
        } else {
            tasks.get(task + 1).map(|t| t.blocks.start)
        };
        next.map_or(0..0, |next| {
            self.blocks[next].row..self.blocks[next].row + self.blocks[next].rows
        })
    }

    /// Cuts each group into tasks of about equal size, about `limit` in all and at most one more per group.
    ///
    /// A single group gives a multiple of four where it can: of an odd number of equal tasks one thread of two has one more.
    pub(crate) fn tasks(&self, limit: usize) -> Vec<RowTask> {
        let quota = self.blocks.len().div_ceil(limit).max(1);
        let mut tasks = Vec::with_capacity(limit + self.groups.len());
        for (group, blocks) in self.groups.iter().enumerate() {
            let count = match (self.groups.len(), limit.min(blocks.len())) {
                (1, count) if count > 4 => count / 4 * 4,
                (1, count) => count,
                _ => blocks.len().div_ceil(quota),
            };
            // Larger tasks between smaller ones, so that any run of them comes out even.
            let at = |task: usize| blocks.start + blocks.len() * task / count;
            tasks.extend((0..count).map(|task| RowTask {
                blocks: at(task)..at(task + 1),
                group,
            }));
        }
        tasks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows_once_and_cross_no_image() {
        let plan = RowPlan::levels(3, &[200, 96, 1]);
        assert_eq!(
            (plan.rows(), plan.image_count(), plan.group_count()),
            (3 * 297, 3, 3)
        );
        let mut next = 0;
        for block in &plan.blocks {
            assert_eq!(block.row, next);
            assert!(block.rows > 0 && block.rows <= BLOCK_ROWS);
            next += block.rows;
        }
        assert_eq!(next, plan.rows());
        let of_group_0: Vec<_> = plan
            .blocks
            .iter()
            .filter(|b| b.group == 0)
            .map(|b| (b.rows, b.image))
            .collect();
        assert_eq!(
            of_group_0,
            [
                (96, 0),
                (96, 0),
                (8, 0),
                (96, 1),
                (96, 1),
                (8, 1),
                (96, 2),
                (96, 2),
                (8, 2)
            ]
        );
    }

    #[test]
    fn tasks_cover_all_blocks_once_and_cross_no_group() {
        for limit in [1, 2, 7, 32, 1000] {
            let plan = RowPlan::levels(4, &[4096, 1024, 256, 64, 16]);
            let tasks = plan.tasks(limit);
            assert!(tasks.len() <= limit + plan.group_count());
            let mut next = 0;
            for task in &tasks {
                assert_eq!(task.blocks.start, next);
                assert!(!task.blocks.is_empty());
                assert!(plan.blocks(task).iter().all(|block| block.group == task.group));
                next = task.blocks.end;
            }
            assert_eq!(next, plan.blocks.len());
        }
    }

    #[test]
    fn tasks_of_a_single_group_come_in_fours_and_their_halves_are_even() {
        for (blocks, limit, expected) in [(44, 13, 12), (44, 16, 16), (12, 8, 8), (6, 64, 4), (3, 16, 3)] {
            let tasks = RowPlan::images(1, blocks * BLOCK_ROWS).tasks(limit);
            assert_eq!(tasks.len(), expected);
            let sizes: Vec<_> = tasks.iter().map(|task| task.blocks.len()).collect();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            let half: usize = sizes[..expected / 2].iter().sum();
            assert!(most - least <= 1 && half == blocks / 2, "{sizes:?}");
        }
    }

    #[test]
    #[should_panic(expected = "groups ascend")]
    fn a_gap_between_groups_is_refused() {
        RowPlan::new(&[Segment {
            rows: 1,
            image: 0,
            group: 1,
        }]);
    }
}
