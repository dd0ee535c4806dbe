//! The network description against the measured tables of the reference.

use effdet_model::hparams::{HParams, PRESETS};
use effdet_model::network::{Network, StageGroup, VariableKind};

fn network(name: &str, num_classes: usize) -> Network {
    let mut hparams = HParams::preset(name).unwrap();
    hparams.num_classes = num_classes;
    Network::new(&hparams).unwrap()
}

/// Source: `variables_d0.tsv`, dumped from the reference's own model.
#[test]
fn d0_has_the_709_variables_of_the_reference_in_its_order() {
    let table = include_str!("../../../tests/golden/variables_d0.tsv");
    let network = network("efficientdet-d0", 91);
    let rows: Vec<Vec<&str>> = table
        .lines()
        .skip(1)
        .map(|line| line.split('\t').collect())
        .collect();
    assert_eq!(rows.len(), 709);
    assert_eq!(network.variables.len(), rows.len());
    for (variable, row) in network.variables.iter().zip(&rows) {
        let shape = match variable.shape.as_slice() {
            [] => "scalar".to_owned(),
            shape => shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
        };
        let trainable = if variable.kind == VariableKind::Trainable {
            "yes"
        } else {
            "no"
        };
        let len = variable.len.to_string();
        let got = [
            variable.name.as_str(),
            &shape,
            &len,
            trainable,
            &variable.object_key,
            &variable.upstream_name,
        ];
        assert_eq!(got, row[1..7], "row {}", row[0]);
    }
}

/// Source: the reference's network, regularised set (150 variables, 3,820,960 values).
#[test]
fn the_l2_term_covers_kernels_only() {
    let network = network("efficientdet-d0", 91);
    let covered: Vec<usize> = network
        .variables
        .iter()
        .filter(|v| v.is_regularized())
        .map(|v| v.len)
        .collect();
    assert_eq!((covered.len(), covered.iter().sum::<usize>()), (150, 3_820_960));
}

struct Row {
    name: &'static str,
    trainable: usize,
    statistics: usize,
    gmac: f64,
    parts: Option<[f64; 3]>,
    anchors: usize,
}

/// Parameters, statistics, GMAC, its backbone/FPN/heads parts and anchors with 90 classes at the native size.
const TABLE: &[Row] = &[
    Row {
        name: "d0",
        trainable: 3_880_067,
        statistics: 47_136,
        gmac: 2.492,
        parts: Some([1.901, 0.136, 0.455]),
        anchors: 49_104,
    },
    Row {
        name: "d1",
        trainable: 6_625_898,
        statistics: 71_456,
        gmac: 6.003,
        parts: Some([4.468, 0.451, 1.085]),
        anchors: 76_725,
    },
    Row {
        name: "d2",
        trainable: 8_097_039,
        statistics: 81_776,
        gmac: 10.832,
        parts: Some([7.430, 1.216, 2.186]),
        anchors: 110_484,
    },
    Row {
        name: "d3",
        trainable: 12_032_296,
        statistics: 114_304,
        gmac: 24.569,
        parts: Some([14.888, 3.756, 5.924]),
        anchors: 150_381,
    },
    Row {
        name: "d4",
        trainable: 20_723_675,
        statistics: 167_312,
        gmac: 54.584,
        parts: Some([30.503, 10.745, 13.336]),
        anchors: 196_416,
    },
    Row {
        name: "d5",
        trainable: 33_653_315,
        statistics: 227_392,
        gmac: 134.13,
        parts: Some([75.039, 27.275, 31.819]),
        anchors: 306_900,
    },
    Row {
        name: "d6",
        trainable: 51_871_782,
        statistics: 311_984,
        gmac: 224.12,
        parts: Some([107.28, 54.063, 62.775]),
        anchors: 306_900,
    },
    Row {
        name: "d7",
        trainable: 51_871_782,
        statistics: 311_984,
        gmac: 322.73,
        parts: Some([154.49, 77.850, 90.395]),
        anchors: 441_936,
    },
    Row {
        name: "d7x",
        trainable: 77_147_166,
        statistics: 417_728,
        gmac: 407.63,
        parts: Some([238.65, 78.520, 90.462]),
        anchors: 442_260,
    },
    Row {
        name: "lite0",
        trainable: 3_243_470,
        statistics: 47_136,
        gmac: 0.974,
        parts: None,
        anchors: 19_206,
    },
    Row {
        name: "lite1",
        trainable: 4_248_318,
        statistics: 63_072,
        gmac: 1.967,
        parts: None,
        anchors: 27_621,
    },
    Row {
        name: "lite2",
        trainable: 5_252_334,
        statistics: 72_560,
        gmac: 3.371,
        parts: None,
        anchors: 37_629,
    },
    Row {
        name: "lite3",
        trainable: 8_350_862,
        statistics: 104_192,
        gmac: 7.480,
        parts: None,
        anchors: 49_104,
    },
    Row {
        name: "lite3x",
        trainable: 9_280_862,
        statistics: 111_712,
        gmac: 13.98,
        parts: None,
        anchors: 76_725,
    },
    Row {
        name: "lite4",
        trainable: 15_130_894,
        statistics: 155_504,
        gmac: 20.17,
        parts: None,
        anchors: 76_725,
    },
];

/// Whether `value` rounds to `printed` in four or five significant digits, as the table prints it.
fn rounds_to(value: f64, printed: f64) -> bool {
    (value - printed).abs() <= printed * 6e-4 + 5e-4
}

#[test]
fn every_preset_has_the_parameters_and_multiply_adds_of_the_published_table() {
    assert_eq!(TABLE.len(), PRESETS.len());
    for row in TABLE {
        let network = network(row.name, 90);
        let name = row.name;
        assert_eq!(
            network.variables.trainable_len(),
            row.trainable,
            "{name} trainable"
        );
        assert_eq!(
            network.variables.statistics_len(),
            row.statistics,
            "{name} statistics"
        );
        assert_eq!(network.num_anchors(), row.anchors, "{name} anchors");
        let costs = network.stage_costs();
        assert_eq!(
            costs.iter().map(|c| c.trainable).sum::<usize>(),
            row.trainable,
            "{name} stage sum"
        );
        assert_eq!(
            costs.iter().map(|c| c.statistics).sum::<usize>(),
            row.statistics,
            "{name} stage sum"
        );
        let gmac = |group: Option<StageGroup>| {
            costs
                .iter()
                .filter(|c| group.is_none_or(|g| c.group == g))
                .map(|c| c.macs)
                .sum::<u64>() as f64
                / 1e9
        };
        assert!(
            rounds_to(gmac(None), row.gmac),
            "{name}: {} GMAC, {} expected",
            gmac(None),
            row.gmac
        );
        if let Some(parts) = row.parts {
            for (group, printed) in [StageGroup::Backbone, StageGroup::Fpn, StageGroup::Heads]
                .into_iter()
                .zip(parts)
            {
                let got = gmac(Some(group));
                assert!(
                    rounds_to(got, printed),
                    "{name} {group:?}: {got} GMAC, {printed} expected"
                );
            }
        }
    }
}

/// Source: the reference's `model.variables` of each preset.
#[test]
fn variable_counts_of_larger_presets_match_the_reference() {
    for (name, count) in [
        ("d0", 709),
        ("d1", 912),
        ("d3", 1165),
        ("d6", 1565),
        ("d7x", 1902),
    ] {
        assert_eq!(network(name, 91).variables.len(), count, "{name}");
    }
    assert_eq!(network("d0", 91).variables.trainable_len(), 3_880_652);
}
