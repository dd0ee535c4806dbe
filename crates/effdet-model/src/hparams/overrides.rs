//! Overrides: `k=v` pairs, TOML, YAML.

use serde_json::Value;

use super::{HParams, HParamsError};
use crate::suggest::nearest;

impl HParams {
    /// Applies `key=value,key2=value2`.
    ///
    /// Keys may be dotted (`nms_configs.iou_thresh`); `*` in a value splits it into a list. Values are `true`/`false`, numbers,
    /// `none`/`null`, quoted or bare strings.
    ///
    /// # Errors
    /// Unknown keys (with the nearest known one), values that do not fit, malformed parts. Nothing is changed then.
    pub fn override_with_pairs(&mut self, text: &str) -> Result<(), HParamsError> {
        let mut tree = serde_json::Map::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=').filter(|(_, value)| !value.contains('=')) else {
                return Err(HParamsError::Syntax {
                    part: part.to_owned(),
                });
            };
            let mut slot = &mut tree;
            let mut keys = key.trim().split('.').peekable();
            while let Some(key) = keys.next() {
                if keys.peek().is_none() {
                    slot.insert(key.to_owned(), parse_value(value.trim()));
                    break;
                }
                let child = slot
                    .entry(key)
                    .or_insert_with(|| Value::Object(serde_json::Map::new()));
                let Value::Object(child) = child else {
                    return Err(HParamsError::Syntax {
                        part: part.to_owned(),
                    });
                };
                slot = child;
            }
        }
        self.override_with_tree(&Value::Object(tree))
    }

    /// Applies a TOML document.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`], and [`HParamsError::Parse`].
    pub fn override_with_toml(&mut self, text: &str) -> Result<(), HParamsError> {
        let tree: Value = toml::from_str(text).map_err(|error| HParamsError::Parse {
            format: "TOML",
            reason: error.to_string(),
        })?;
        self.override_with_tree(&tree)
    }

    /// Applies a YAML document.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`], and [`HParamsError::Parse`].
    pub fn override_with_yaml(&mut self, text: &str) -> Result<(), HParamsError> {
        let tree: Value = serde_saphyr::from_str(text).map_err(|error| HParamsError::Parse {
            format: "YAML",
            reason: error.to_string(),
        })?;
        self.override_with_tree(&tree)
    }

    /// Merges a tree of values; `profile` is applied first because other keys refine it.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`].
    pub fn override_with_tree(&mut self, tree: &Value) -> Result<(), HParamsError> {
        let mut merged = self.clone();
        if let Some(profile) = tree.get("profile") {
            let profile = serde_json::from_value(profile.clone()).map_err(|_| HParamsError::Value {
                key: "profile".into(),
                value: profile.to_string(),
                reason: "known profiles: seed, google".into(),
            })?;
            merged.set_profile(profile);
        }
        let mut current = serde_json::to_value(&merged).expect("hyper-parameters have string keys only");
        merge(&mut current, tree, "")?;
        // Leaves are applied one by one so that a bad value is reported under its own key.
        for (path, value) in leaves(tree, "") {
            let mut probe = serde_json::to_value(&merged).expect("hyper-parameters have string keys only");
            set_path(&mut probe, &path, value);
            if let Err(error) = serde_json::from_value::<Self>(probe) {
                let reason = error.to_string();
                return Err(HParamsError::Value {
                    key: path,
                    value: value.to_string(),
                    reason,
                });
            }
        }
        merged = serde_json::from_value(current).map_err(|error| HParamsError::Value {
            key: "hyper-parameters".into(),
            value: tree.to_string(),
            reason: error.to_string(),
        })?;
        merged.validate()?;
        *self = merged;
        Ok(())
    }
}

/// Reads a value as the reference's override strings write it.
fn parse_value(text: &str) -> Value {
    if text.contains('*') && !text.starts_with(['"', '\'']) {
        return Value::Array(text.split('*').map(|part| parse_value(part.trim())).collect());
    }
    match text {
        "true" | "True" => return Value::Bool(true),
        "false" | "False" => return Value::Bool(false),
        "none" | "None" | "null" => return Value::Null,
        _ => {}
    }
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return Value::String(inner.to_owned());
        }
    }
    if let Ok(number) = text.parse::<i64>() {
        return Value::from(number);
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Value::from(number),
        _ => Value::String(text.to_owned()),
    }
}

fn merge(into: &mut Value, from: &Value, path: &str) -> Result<(), HParamsError> {
    let Value::Object(from) = from else {
        return Err(HParamsError::Syntax {
            part: from.to_string(),
        });
    };
    let Value::Object(into) = into else {
        return Err(HParamsError::Value {
            key: path.to_owned(),
            value: Value::Object(from.clone()).to_string(),
            reason: "is a single value, not a group of keys".into(),
        });
    };
    for (key, value) in from {
        let full = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let known: Vec<String> = into.keys().cloned().collect();
        let Some(slot) = into.get_mut(key) else {
            let suggestion = nearest(key, known.iter().map(String::as_str));
            return Err(HParamsError::UnknownKey {
                key: full,
                suggestion,
            });
        };
        if value.is_object() && slot.is_object() {
            merge(slot, value, &full)?;
        } else {
            *slot = value.clone();
        }
    }
    Ok(())
}

fn leaves<'a>(tree: &'a Value, path: &str) -> Vec<(String, &'a Value)> {
    match tree {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| {
                leaves(
                    value,
                    &if path.is_empty() {
                        key.clone()
                    } else {
                        format!("{path}.{key}")
                    },
                )
            })
            .collect(),
        value => vec![(path.to_owned(), value)],
    }
}

fn set_path(tree: &mut Value, path: &str, value: &Value) {
    let mut slot = tree;
    for key in path.split('.') {
        slot = &mut slot[key];
    }
    *slot = value.clone();
}
