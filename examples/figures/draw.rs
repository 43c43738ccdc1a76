//! A chart of lines over powers of two, as SVG for pages of any colour.

use std::ops::Range;
use std::path::Path;

use jamba_core::{Error, Result};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// Width and height, and the part on the right that the names of the lines take.
const SIZE: (u32, u32) = (820, 440);
const NAMES: u32 = 230;
/// Pixels between the names of two lines at least.
const SPACING: i32 = 16;
/// Readable on white and on black: text, grid and lines.
const INK: RGBColor = RGBColor(125, 133, 144);
const LINES: [RGBColor; 5] = [
    RGBColor(219, 109, 40),
    RGBColor(56, 139, 253),
    RGBColor(46, 160, 67),
    RGBColor(171, 104, 240),
    RGBColor(219, 97, 162),
];

/// How values lie on the vertical axis.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// Doubled from one tick to the next.
    Log,
}

/// What is drawn.
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x_title: &'static str,
    pub(crate) y_title: &'static str,
    /// Positions on the horizontal axis, ascending, that have a tick.
    pub(crate) ticks: Vec<usize>,
    pub(crate) scale: Scale,
    /// Name and points of each line.
    pub(crate) lines: Vec<(String, Vec<(usize, f64)>)>,
    /// Values that are marked across, and what they are.
    pub(crate) levels: Vec<(String, f64)>,
}

impl Chart {
    /// Writes the chart to a file. One without a point is not drawn: `false`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write(&self, path: &Path) -> Result<bool> {
        let io = |source| Error::Io { path: path.into(), source };
        let mut svg = String::new();
        let is_drawn = self.draw(&mut svg).map_err(|e| io(std::io::Error::other(e.to_string())))?;
        if is_drawn {
            std::fs::write(path, svg).map_err(io)?;
        }
        Ok(is_drawn)
    }

    fn draw(&self, svg: &mut String) -> std::result::Result<bool, Box<dyn std::error::Error + '_>> {
        let values = self.lines.iter().flat_map(|(_, points)| points.iter().map(|(_, y)| *y));
        let values = values.chain(self.levels.iter().map(|(_, y)| *y));
        let (least, most) = values.fold((f64::MAX, 0.0), |(a, b), y| (y.min(a), y.max(b)));
        let ([first, .., last] | [first @ last]) = self.ticks[..] else { return Ok(false) };
        if self.lines.iter().all(|(_, points)| points.is_empty()) || most <= 0.0 {
            return Ok(false);
        }
        let y_ticks = match self.scale {
            Scale::Linear => linear_ticks(most),
            Scale::Log => {
                let (from, to) = (least.log2().floor() as i32, most.log2().ceil() as i32);
                (from..=to.max(from + 1)).map(f64::from).collect()
            }
        };
        let x_at = |x: usize| (x as f64).log2();
        let y_at = |y: f64| if self.scale == Scale::Log { y.log2() } else { y };
        let x_ticks: Vec<_> = self.ticks.iter().map(|x| x_at(*x)).collect();
        let x_range = x_at(first) - 0.2..x_at(last) + 0.2;
        let top = y_ticks.last().copied().unwrap_or(most).max(y_at(most));
        let y_range = y_ticks.first().copied().unwrap_or(0.0)..top;
        let x_label: fn(f64) -> String = |x| short(x.exp2().round() as usize);
        let y_label: fn(f64) -> String = match self.scale {
            // Without what a multiple of a tenth is off by.
            Scale::Linear => |y| ((1e6 * y).round() / 1e6).to_string(),
            Scale::Log => |y| y.exp2().to_string(),
        };

        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let text = |size| ("sans-serif", size).into_font().color(&INK);
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, text(17))
            .margin(12)
            .margin_right(NAMES)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(
                Axis { coord: x_range.clone().into(), ticks: x_ticks, label: x_label },
                Axis { coord: y_range.into(), ticks: y_ticks, label: y_label },
            )?;
        chart
            .configure_mesh()
            .axis_style(INK)
            .bold_line_style(INK.mix(0.3))
            .label_style(text(13))
            .axis_desc_style(text(14))
            .x_desc(self.x_title)
            .y_desc(self.y_title)
            .draw()?;

        let mut names = Vec::new();
        for (name, y) in &self.levels {
            let level = [(x_range.start, y_at(*y)), (x_range.end, y_at(*y))];
            chart.draw_series(DashedLineSeries::new(level, 6, 4, INK.stroke_width(2)))?;
            names.push((chart.backend_coord(&level[1]).1, name, INK));
        }
        for ((name, points), color) in self.lines.iter().zip(LINES.iter().cycle()) {
            let points: Vec<_> = points.iter().map(|(x, y)| (x_at(*x), y_at(*y))).collect();
            chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?;
            chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, color.filled())))?;
            if let Some(end) = points.last() {
                names.push((chart.backend_coord(end).1, name, *color));
            }
        }
        // Each beside the end of its line, or below the name above it.
        names.sort_by_key(|(y, ..)| *y);
        let mut free = 0;
        for (y, name, color) in names {
            let y = y.max(free);
            free = y + SPACING;
            let at = ((SIZE.0 - NAMES + 8) as i32, y - 5);
            root.draw(&Text::new(name.as_str(), at, ("sans-serif", 14).into_font().color(&color)))?;
        }
        root.present()?;
        drop(chart);
        drop(root);
        Ok(true)
    }
}

/// An axis with ticks where they are wanted.
struct Axis {
    coord: RangedCoordf64,
    ticks: Vec<f64>,
    label: fn(f64) -> String,
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.coord.map(value, limit)
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        // No lines between the ticks.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.coord.range()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

/// From zero to beyond `most` in four to eight steps of 1, 2 or 5 times a power of ten.
fn linear_ticks(most: f64) -> Vec<f64> {
    let power = 10f64.powf((most / 4.0).log10().floor());
    let step = [5.0, 2.0, 1.0].map(|n| n * power).into_iter().find(|step| most / step >= 4.0);
    let step = step.unwrap_or(power);
    (0..=(most / step).ceil() as u32).map(|n| f64::from(n) * step).collect()
}

/// A number in units of 1024, where it is a multiple: 4K, 1M.
pub(crate) fn short(n: usize) -> String {
    match n {
        0 => "0".into(),
        n if n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}
