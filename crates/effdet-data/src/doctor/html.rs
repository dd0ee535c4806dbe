//! The diagnosis as one HTML file: tables, charts and the worst examples with their boxes; images inline, no script.
//!
//! Every text from the data is escaped; boxes are SVG over the image, so that those outside it show, too.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::Cursor;

use base64::Engine as _;
use image::RgbImage;
use image::imageops::{FilterType, resize};

use super::findings::{Instance, Problem, Severity};
use super::{Diagnosis, Split, SplitFigures};
use crate::dataset::Example;
use crate::decode::{DecodeOptions, MAX_ENCODED_BYTES, decode_rgb};
use crate::inspect::SIDE_BINS_PX;

/// How much a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HtmlOptions {
    /// Images of each problem.
    pub images_per_problem: usize,
    /// Images of the page.
    pub images: usize,
    /// Longer side of an image in pixels.
    pub side_px: u32,
    /// Largest encoded image in bytes.
    pub max_encoded_bytes: u64,
}

impl Default for HtmlOptions {
    fn default() -> Self {
        Self {
            images_per_problem: 6,
            images: 60,
            side_px: 360,
            max_encoded_bytes: MAX_ENCODED_BYTES,
        }
    }
}

/// Categories of a chart; more are counted.
const BARS: usize = 30;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}\
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}table{border-collapse:collapse}td,th{padding:.25em .7em;text-align:left;\
border-bottom:1px solid #ddd;vertical-align:top}.error{color:#b00020;font-weight:600}.warning{color:#9a5b00;font-weight:600}\
.note{color:#456}.remedy{color:#155724}figure{display:inline-block;margin:.4em;vertical-align:top;max-width:380px}\
figcaption{font-size:.8em;overflow-wrap:anywhere}svg{max-width:100%;height:auto}code{background:#f3f3f3;padding:0 .2em}\
li{overflow-wrap:anywhere}";

/// Text for HTML; control characters, and those that turn the direction of a line, become visible.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other if crate::text::is_hidden(other) => {
                write!(out, "\\u{{{:x}}}", u32::from(other)).expect("writing to a string does not fail");
            }
            other => out.push(other),
        }
    }
    out
}

macro_rules! put {
    ($out:expr, $($arg:tt)*) => {
        write!($out, $($arg)*).expect("writing to a string does not fail")
    };
}

/// Renders a diagnosis of `splits`.
///
/// # Determinism
/// The same diagnosis gives the same bytes.
pub fn page(diagnosis: &Diagnosis, splits: &[Split], title: &str, options: &HtmlOptions) -> String {
    let mut out = String::new();
    put!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\
         <title>Data doctor: {0}</title><style>{STYLE}</style></head><body><h1>Data doctor: {0}</h1><p>",
        escaped(title)
    );
    for severity in [Severity::Error, Severity::Warning, Severity::Note] {
        put!(
            out,
            "<span class=\"{0}\">{1} {0}s</span> ",
            severity.name(),
            diagnosis.count(severity)
        );
    }
    out.push_str("</p>");
    overview(&mut out, &diagnosis.splits);
    problem_table(&mut out, &diagnosis.problems);
    let mut gallery = Gallery::new(splits, options);
    for (index, problem) in diagnosis.problems.iter().enumerate() {
        problem_section(&mut out, index, problem, &mut gallery);
    }
    anchors(&mut out, diagnosis);
    for (figures, split) in diagnosis.splits.iter().zip(splits) {
        charts(&mut out, figures, split);
    }
    out.push_str("</body></html>\n");
    out
}

fn overview(out: &mut String, splits: &[SplitFigures]) {
    out.push_str(
        "<h2>Splits</h2><table><tr><th>split</th><th>format</th><th>images</th><th>without objects</th><th>objects</th>\
         <th>crowds</th><th>categories</th><th>small / medium / large</th><th>place</th></tr>",
    );
    for split in splits {
        let figures = &split.statistics;
        let [small, medium, large] = figures.small_medium_large;
        put!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{small} / {medium} / {large}</td>\
             <td>{}</td></tr>",
            escaped(&split.name),
            split.format,
            figures.images,
            figures.images_without_objects,
            figures.objects,
            figures.crowds,
            figures.categories.len(),
            escaped(&split.place)
        );
    }
    out.push_str("</table>");
}

fn problem_table(out: &mut String, problems: &[Problem]) {
    out.push_str("<h2>Findings</h2>");
    if problems.is_empty() {
        out.push_str("<p>None.</p>");
        return;
    }
    out.push_str("<table><tr><th></th><th>check</th><th>split</th><th>count</th><th>what</th></tr>");
    for (index, problem) in problems.iter().enumerate() {
        put!(
            out,
            "<tr><td class=\"{0}\">{0}</td><td><a href=\"#p{index}\">{1}</a></td><td>{2}</td><td>{3}</td><td>{4}</td></tr>",
            problem.severity.name(),
            problem.check.code(),
            escaped(&problem.split),
            problem.count,
            escaped(&problem.title)
        );
    }
    out.push_str("</table>");
}

fn problem_section(out: &mut String, index: usize, problem: &Problem, gallery: &mut Gallery<'_>) {
    put!(
        out,
        "<h2 id=\"p{index}\"><span class=\"{0}\">{0}</span> {1}, {2}: {3} &times; {4}</h2>",
        problem.severity.name(),
        problem.check.code(),
        escaped(&problem.split),
        problem.count,
        escaped(&problem.title)
    );
    if !problem.detail.is_empty() {
        put!(out, "<p>{}</p>", escaped(&problem.detail));
    }
    put!(
        out,
        "<p class=\"remedy\">What to do: {}.</p><ul>",
        escaped(&problem.remedy)
    );
    for instance in &problem.instances {
        let record = instance
            .record
            .map_or_else(String::new, |record| format!(", record {record}"));
        put!(
            out,
            "<li><code>{}</code>{record}: {}</li>",
            escaped(&instance.file),
            escaped(&instance.what)
        );
    }
    let more = problem.count.saturating_sub(problem.instances.len());
    if more > 0 {
        put!(out, "<li>and {more} more</li>");
    }
    out.push_str("</ul>");
    gallery.figures(out, problem);
}

/// Images drawn with their boxes.
struct Gallery<'a> {
    /// Examples by split and file name.
    examples: HashMap<(&'a str, &'a str), &'a Example>,
    names: HashMap<(&'a str, u32), &'a str>,
    options: &'a HtmlOptions,
    left: usize,
}

impl<'a> Gallery<'a> {
    fn new(splits: &'a [Split], options: &'a HtmlOptions) -> Self {
        let mut examples = HashMap::new();
        let mut names = HashMap::new();
        for split in splits {
            for example in &split.dataset.examples {
                examples.insert((split.name.as_str(), example.file_name.as_str()), example);
            }
            for category in &split.dataset.categories {
                names.insert((split.name.as_str(), category.id.0), category.name.as_str());
            }
        }
        Self {
            examples,
            names,
            options,
            left: options.images,
        }
    }

    fn figures(&mut self, out: &mut String, problem: &Problem) {
        let mut drawn = HashSet::new();
        for instance in &problem.instances {
            if drawn.len() >= self.options.images_per_problem || self.left == 0 {
                return;
            }
            let key = (problem.split.as_str(), instance.file.as_str());
            let Some(example) = self.examples.get(&key).copied() else {
                continue;
            };
            if !drawn.insert(&instance.file) {
                continue;
            }
            let same_file = problem
                .instances
                .iter()
                .filter(|other| other.file == instance.file);
            if self.figure(out, &problem.split, example, same_file).is_some() {
                self.left -= 1;
            }
        }
    }

    /// One image; none where it cannot be decoded.
    fn figure<'i>(
        &self,
        out: &mut String,
        split: &str,
        example: &Example,
        faulty: impl Iterator<Item = &'i Instance>,
    ) -> Option<()> {
        let bytes = example.source.read_bytes(self.options.max_encoded_bytes).ok()?;
        let image = decode_rgb(&bytes, &DecodeOptions::default()).ok()?;
        let (width, height) = image.dimensions();
        let faulty: Vec<[f64; 4]> = faulty.filter_map(|instance| instance.box_xywh_px).collect();
        // Room for what lies outside, but no more than half an image on each side.
        let reach = |low: fn(&[f64; 4]) -> f64, side: u32| {
            let over = faulty.iter().map(low).fold(0.0, f64::max);
            over.min(f64::from(side) / 2.0)
        };
        let left = reach(|b| -b[0], width);
        let top = reach(|b| -b[1], height);
        let mut right = 0.0_f64;
        let mut bottom = 0.0_f64;
        for [x, y, w, h] in &faulty {
            right = right.max(x + w - f64::from(width)).min(f64::from(width) / 2.0);
            bottom = bottom.max(y + h - f64::from(height)).min(f64::from(height) / 2.0);
        }
        let stroke = (f64::from(width.max(height)) / f64::from(self.options.side_px)).max(0.5) * 2.0;
        put!(
            out,
            "<figure><svg width=\"{0}\" viewBox=\"{1} {2} {3} {4}\" xmlns=\"http://www.w3.org/2000/svg\">\
             <image width=\"{width}\" height=\"{height}\" preserveAspectRatio=\"none\" href=\"data:image/jpeg;base64,{5}\"/>",
            self.options.side_px,
            -left,
            -top,
            f64::from(width) + left + right,
            f64::from(height) + top + bottom,
            thumbnail(&image, self.options.side_px)?
        );
        for object in &example.objects {
            let name = self.names.get(&(split, object.category.0)).copied().unwrap_or("");
            rectangle(out, object.box_xywh_px, "#1e90ff", stroke, name);
        }
        for box_xywh_px in faulty {
            rectangle(out, box_xywh_px, "#ff2020", stroke * 1.5, "at fault");
        }
        put!(
            out,
            "</svg><figcaption>{} ({width}&times;{height})</figcaption></figure>",
            escaped(&example.file_name)
        );
        Some(())
    }
}

fn rectangle(out: &mut String, [x, y, w, h]: [f64; 4], colour: &str, stroke: f64, title: &str) {
    // A box without area shows as a cross of its sides.
    let (x, w) = if w < 0.0 { (x + w, -w) } else { (x, w.max(stroke)) };
    let (y, h) = if h < 0.0 { (y + h, -h) } else { (y, h.max(stroke)) };
    put!(
        out,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{stroke}\">\
         <title>{}</title></rect>",
        escaped(title)
    );
}

fn thumbnail(image: &RgbImage, side_px: u32) -> Option<String> {
    let (width, height) = image.dimensions();
    let scale = (f64::from(side_px) / f64::from(width.max(height))).min(1.0);
    let side = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    let small = match scale < 1.0 {
        true => resize(image, side(width), side(height), FilterType::Triangle),
        false => image.clone(),
    };
    let mut jpeg = Cursor::new(Vec::new());
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 80)
        .encode_image(&small)
        .ok()?;
    Some(base64::engine::general_purpose::STANDARD.encode(jpeg.into_inner()))
}

fn anchors(out: &mut String, diagnosis: &Diagnosis) {
    let Some(report) = &diagnosis.anchors else {
        return;
    };
    let (width, height) = report.input_px;
    put!(
        out,
        "<h2>Anchors of {} at {width}&times;{height}</h2><table><tr><th>boxes</th><th>count</th>\
         <th>overlapped by half</th><th>mean of the best overlap</th></tr>",
        escaped(&report.model)
    );
    let rows = ["small", "medium", "large"].into_iter().zip(&report.by_size);
    for (name, recall) in rows.chain([("all", &report.all)]) {
        put!(
            out,
            "<tr><td>{name}</td><td>{}</td><td>{:.1} %</td><td>{:.3}</td></tr>",
            recall.boxes,
            100.0 * recall.recall(),
            recall.mean_iou
        );
    }
    out.push_str("</table>");
    if let Some(suggestion) = &report.suggestion {
        put!(
            out,
            "<p class=\"remedy\"><code>--hparams {}</code> covers {:.1} % instead of {:.1} %.</p>",
            escaped(&suggestion.hparams),
            100.0 * suggestion.recall,
            100.0 * suggestion.recall_before
        );
    }
}

fn charts(out: &mut String, figures: &SplitFigures, split: &Split) {
    let statistics = &figures.statistics;
    put!(
        out,
        "<h2>{}: labels</h2><h3>Objects by category</h3>",
        escaped(&figures.name)
    );
    let mut categories: Vec<_> = statistics.categories.iter().collect();
    categories.sort_by_key(|category| std::cmp::Reverse(category.objects));
    bars(
        out,
        categories
            .iter()
            .take(BARS)
            .map(|category| (category.name.clone(), category.objects)),
    );
    if categories.len() > BARS {
        put!(out, "<p>and {} more categories</p>", categories.len() - BARS);
    }
    out.push_str("<h3>Side of the boxes in pixels (square root of the area)</h3>");
    let ends = SIDE_BINS_PX.iter().map(|end| format!("below {end}"));
    let sides = ends.chain([format!("from {}", SIDE_BINS_PX[SIDE_BINS_PX.len() - 1])]);
    bars(out, sides.zip(statistics.box_side_histogram));
    out.push_str("<h3>Width by height of the boxes</h3>");
    let ratios = [0.25, 0.5, 0.8, 1.25, 2.0, 4.0];
    let mut counts = [0; 7];
    let mut heat = [[0_usize; 24]; 24];
    let mut per_image: Vec<usize> = vec![0; 8];
    for example in &split.dataset.examples {
        per_image[match example.objects.len() {
            0 => 0,
            1 => 1,
            2..=4 => 2,
            5..=9 => 3,
            10..=19 => 4,
            20..=49 => 5,
            50..=99 => 6,
            _ => 7,
        }] += 1;
        for object in &example.objects {
            let [x, y, w, h] = object.box_xywh_px;
            counts[ratios.partition_point(|&ratio| ratio <= w / h)] += 1;
            if example.width > 0 && example.height > 0 {
                let cell = |center: f64, side: u32| ((center / f64::from(side) * 24.0) as usize).min(23);
                heat[cell(y + h / 2.0, example.height)][cell(x + w / 2.0, example.width)] += 1;
            }
        }
    }
    let names = ratios.iter().map(|ratio| format!("below {ratio}"));
    bars(out, names.chain(["from 4".to_owned()]).zip(counts));
    out.push_str("<h3>Objects of an image</h3>");
    let names = ["0", "1", "2-4", "5-9", "10-19", "20-49", "50-99", "100 or more"];
    bars(out, names.map(str::to_owned).into_iter().zip(per_image));
    out.push_str("<h3>Where the centres of the boxes lie</h3><svg width=\"240\" viewBox=\"0 0 24 24\">");
    let most = heat.iter().flatten().copied().max().unwrap_or(0).max(1);
    for (row, cells) in heat.iter().enumerate() {
        for (column, count) in cells.iter().enumerate() {
            put!(
                out,
                "<rect x=\"{column}\" y=\"{row}\" width=\"1.02\" height=\"1.02\" fill=\"#0b3d91\" fill-opacity=\"{:.3}\"/>",
                *count as f64 / most as f64
            );
        }
    }
    out.push_str("</svg>");
}

/// A bar chart as a table.
fn bars(out: &mut String, rows: impl Iterator<Item = (String, usize)>) {
    let rows: Vec<(String, usize)> = rows.collect();
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    out.push_str("<table>");
    for (name, count) in rows {
        put!(
            out,
            "<tr><td>{}</td><td>{count}</td><td><svg width=\"400\" height=\"12\"><rect width=\"{:.1}\" height=\"12\" \
             fill=\"#4a7ab5\"/></svg></td></tr>",
            escaped(&name),
            400.0 * count as f64 / most as f64
        );
    }
    out.push_str("</table>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_and_hidden_characters_of_names_are_harmless() {
        assert_eq!(
            escaped("<script>\"&'\u{1b}[31m\u{202e}é"),
            "&lt;script&gt;&quot;&amp;&#39;\\u{1b}[31m\\u{202e}é"
        );
    }
}
