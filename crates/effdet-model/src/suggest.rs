//! "Did you mean": the nearest known name.

use strsim::damerau_levenshtein;

/// `; did you mean "…"?` for the nearest of `known`, or an empty string when none is near.
///
/// Nearness is the Damerau–Levenshtein distance (insertions, deletions, substitutions and transpositions of neighbours) without
/// regard to case. A name is near when at most a third of the longer of the two has to change, rounded up; of equally near
/// ones the first is taken.
pub fn nearest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let given = given.to_lowercase();
    known
        .filter_map(|name| {
            let distance = damerau_levenshtein(&given, &name.to_lowercase());
            let longer = given.chars().count().max(name.chars().count());
            // A name of which nothing is left is not near, however short.
            (distance <= longer.div_ceil(3) && distance < longer).then_some((distance, name))
        })
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| format!("; did you mean {name:?}?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::nearest;

    fn suggestion(given: &str, known: &[&str]) -> String {
        nearest(given, known.iter().copied())
    }

    #[test]
    fn a_missing_letter_counts_less_than_another_ending() {
        let known = ["num_scales", "num_classes", "name"];
        assert_eq!(
            suggestion("num_clases", &known),
            "; did you mean \"num_classes\"?"
        );
    }

    #[test]
    fn swapped_neighbours_are_one_mistake() {
        assert_eq!(suggestion("haed", &["shed", "head"]), "; did you mean \"head\"?");
    }

    #[test]
    fn case_is_no_mistake() {
        assert_eq!(
            suggestion("GAUSSIAN", &["linear", "gaussian"]),
            "; did you mean \"gaussian\"?"
        );
    }

    #[test]
    fn of_equally_near_names_the_first_is_taken() {
        assert_eq!(suggestion("d9", &["d0", "d1"]), "; did you mean \"d0\"?");
    }

    #[test]
    fn nothing_is_suggested_for_a_name_that_resembles_none() {
        let known = ["learning_rate", "momentum", "d0"];
        for given in ["", "x", "banana", "xy", "num_classes"] {
            assert_eq!(suggestion(given, &known), "", "{given:?}");
        }
        assert_eq!(suggestion("anything", &[]), "");
    }
}
