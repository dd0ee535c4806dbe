//! Collectives between threads: results, bits, and every way in which a rank can fail its peers.

use std::time::Duration;

use effdet_dist::threads::run_ranks;
use effdet_dist::{Collective, DistError, ProcessGroup, Wire, agree, same_weights};

const TIMEOUT: Duration = Duration::from_secs(20);

/// Different on every rank, of all magnitudes, so that another order of additions would give other bits.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| {
            let x = ((i * 2_654_435_761 + rank * 40_503) % 1_000_003) as f32 / 1_000_003.0 - 0.5;
            x * 10f32.powi((i % 9) as i32 - 4)
        })
        .collect()
}

/// The plain sum in the order of the ranks.
fn expected(size: usize, len: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; len];
    for rank in 0..size {
        for (sum, value) in sums.iter_mut().zip(values(rank, len)) {
            *sum += f64::from(value);
        }
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

#[test]
fn a_sum_is_the_plain_one_in_the_order_of_the_ranks_for_any_length_and_number_of_ranks() {
    for size in [1, 2, 3, 5] {
        for len in [0, 1, 2, 7, 2048, 2049, 10_007] {
            let sums = run_ranks(size, TIMEOUT, |group| {
                let mut values = values(group.rank(), len);
                group.all_reduce_sum(&mut values, Wire::F32).unwrap();
                values
            });
            for sum in sums {
                assert_eq!(sum, expected(size, len), "{size} ranks, {len} values");
            }
        }
    }
}

#[test]
fn a_buffer_of_several_buckets_is_summed_to_its_end() {
    let len = (1 << 20) + 4097;
    let sums = run_ranks(2, TIMEOUT, |group| {
        let mut values = values(group.rank(), len);
        group.all_reduce_sum(&mut values, Wire::F32).unwrap();
        values
    });
    assert_eq!(sums[0], expected(2, len));
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn a_sum_in_half_precision_has_the_same_bits_on_every_rank_and_is_as_close_as_two_roundings() {
    for len in [100, 5000] {
        let sums = run_ranks(3, TIMEOUT, |group| {
            let mut values: Vec<f32> = values(group.rank(), len).iter().map(|v| 1e-2 * v).collect();
            group.all_reduce_sum(&mut values, Wire::F16).unwrap();
            values
        });
        assert!(sums.iter().all(|sum| *sum == sums[0]));
        let magnitude = |i: usize| -> f32 { (0..3).map(|rank| 1e-2 * values(rank, len)[i].abs()).sum() };
        for (i, (half, full)) in sums[0].iter().zip(expected(3, len)).enumerate() {
            // 2⁻¹¹ of each value and of the sum, and the smallest subnormal.
            let tolerance = 2.0 * magnitude(i) / 2048.0 + 4.0 * 6e-8;
            assert!((half - 1e-2 * full).abs() <= tolerance, "{i}: {half} and {full}");
        }
    }
}

#[test]
fn doubles_are_summed_exactly_where_they_can_be() {
    let sums = run_ranks(4, TIMEOUT, |group| {
        let mut values: Vec<f64> = (0..3000).map(|i| (i + group.rank()) as f64).collect();
        group.all_reduce_sum_f64(&mut values).unwrap();
        values
    });
    assert!(
        sums.iter()
            .all(|sum| sum.iter().enumerate().all(|(i, &v)| v == (4 * i + 6) as f64))
    );
}

#[test]
fn a_nan_of_one_rank_reaches_all() {
    for wire in [Wire::F32, Wire::F16] {
        let sums = run_ranks(3, TIMEOUT, |group| {
            let mut values = vec![1.0; 4000];
            if group.rank() == 1 {
                values[3999] = f32::NAN;
            }
            group.all_reduce_sum(&mut values, wire).unwrap();
            values
        });
        assert!(
            sums.iter()
                .all(|sum| sum[3999].is_nan() && sum[..3999].iter().all(|&v| v == 3.0))
        );
    }
}

#[test]
fn a_flag_of_one_rank_is_seen_by_all() {
    for setter in [Some(2), None] {
        let seen = run_ranks(3, TIMEOUT, |group| {
            group.any(setter == Some(group.rank())).unwrap()
        });
        assert_eq!(seen, [setter.is_some(); 3]);
    }
}

#[test]
fn a_broadcast_gives_every_rank_the_bytes_of_its_root() {
    for len in [0usize, 3, 2048, 100_001] {
        for root in 0..3 {
            let received = run_ranks(3, TIMEOUT, |group| {
                let mut bytes: Vec<u8> = (0..len).map(|i| (i * 7 + group.rank()) as u8).collect();
                group.broadcast(&mut bytes, root).unwrap();
                bytes
            });
            let sent: Vec<u8> = (0..len).map(|i| (i * 7 + root) as u8).collect();
            assert!(
                received.iter().all(|bytes| *bytes == sent),
                "{len} bytes from {root}"
            );
        }
    }
    let text = run_ranks(3, TIMEOUT, |group| {
        let own = vec![b'x'; 5 * group.rank()];
        group.broadcast_bytes(own, 2).unwrap()
    });
    assert!(text.iter().all(|bytes| bytes.len() == 10));
}

#[test]
fn a_gathering_keeps_ranks_and_lengths_apart() {
    let gathered = run_ranks(4, TIMEOUT, |group| {
        group
            .all_gather(&vec![group.rank() as u8; group.rank() * 1000])
            .unwrap()
    });
    for all in gathered {
        for (rank, bytes) in all.iter().enumerate() {
            assert_eq!(*bytes, vec![rank as u8; rank * 1000]);
        }
    }
}

#[test]
fn a_missing_rank_is_named_with_its_machine_and_the_operation() {
    let short = Duration::from_millis(100);
    let errors = run_ranks(3, short, |group| match group.rank() {
        2 => None,
        _ => group.all_reduce_sum(&mut [1.0; 5000], Wire::F32).err(),
    });
    for error in &errors[..2] {
        let Some(DistError::DeadlineMissed { collective, rank, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!((*collective, *rank), (Collective::AllReduceSum, 2));
        let text = error.as_ref().map(DistError::to_string).unwrap_or_default();
        assert!(text.contains("rank 2 on this process is missing"), "{text}");
    }
}

#[test]
fn buffers_of_different_lengths_are_refused_with_both_lengths() {
    let errors = run_ranks(2, TIMEOUT, |group| {
        let mut values = vec![0.0; 10 + group.rank()];
        group.all_reduce_sum(&mut values, Wire::F32).unwrap_err()
    });
    let DistError::LengthMismatch {
        rank,
        expected,
        actual,
        ..
    } = errors[0]
    else {
        panic!("{:?}", errors[0]);
    };
    assert_eq!((rank, expected, actual), (1, 40, 44));
}

#[test]
fn different_operations_are_refused() {
    let errors = run_ranks(2, TIMEOUT, |group| match group.rank() {
        0 => group.barrier().unwrap_err(),
        _ => group.all_gather(&[1]).unwrap_err(),
    });
    assert!(errors[0].to_string().contains("all-gather"), "{}", errors[0]);
}

#[test]
fn ranks_that_were_started_differently_all_see_a_table_of_what_differs() {
    let fact = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let results = run_ranks(3, TIMEOUT, |group| {
        let mut facts = vec![fact("seed", "1"), fact("batch_size", "8")];
        if group.rank() == 1 {
            facts[0].1 = "2".into();
            facts.push(fact("extra", "yes"));
        }
        agree(group, &facts)
    });
    for result in results {
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("seed: rank 0 on this process has 1, rank 1 on this process has 2"),
            "{text}"
        );
        assert!(
            text.contains("extra: rank 0 on this process has (absent), rank 1"),
            "{text}"
        );
        assert!(!text.contains("batch_size") && !text.contains("rank 2"), "{text}");
    }
    let same = run_ranks(2, TIMEOUT, |group| agree(group, &[fact("seed", "1")]));
    assert_eq!(same, [Ok(()), Ok(())]);
}

#[test]
fn diverged_weights_are_found() {
    let results = run_ranks(3, TIMEOUT, |group| {
        let digest = if group.rank() == 2 { "b" } else { "a" };
        same_weights(group, 7, digest)
    });
    assert!(
        results
            .iter()
            .all(|result| matches!(result, Err(DistError::Diverged { step: 7, rank: 2, .. })))
    );
}

#[test]
fn the_first_ranks_are_a_group_of_their_own() {
    let sums = run_ranks(3, TIMEOUT, |group| {
        let mut values = vec![1.0 + group.rank() as f32; 3000];
        let first = group.first(2);
        assert_eq!(first.is_some(), group.rank() < 2);
        if let Some(first) = first {
            assert_eq!((first.rank(), first.size()), (group.rank(), 2));
            first.all_reduce_sum(&mut values, Wire::F32).unwrap();
        }
        group.barrier().unwrap();
        values[2999]
    });
    assert_eq!(sums, [3.0, 3.0, 3.0]);
}
