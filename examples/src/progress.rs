//! How far something is, in a bar on stderr: hidden by indicatif where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};
use jamba_core::{Progress, Stage};

/// A function that shows how far a load is.
pub fn bar() -> impl FnMut(Progress) {
    let style = style("{msg} [{wide_bar}] {bytes} of {total_bytes}, {eta}");
    let mut current: Option<(Stage, ProgressBar)> = None;
    move |Progress { stage, done, total, .. }| {
        if current.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            let text = match &stage {
                Stage::Download { file } => file.clone(),
                _ => "weights".into(),
            };
            let bar = ProgressBar::new(total).with_style(style.clone()).with_message(text);
            current = Some((stage, bar));
        }
        if let Some((_, bar)) = &current {
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
    }
}

/// A bar of `count` steps, with a text after it in indicatif's notation.
pub fn steps(count: usize, text: &str) -> ProgressBar {
    ProgressBar::new(count as u64).with_style(style(&format!("[{{wide_bar}}] {text}")))
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}
