//! How far a load is, on a terminal: with the feature `hub`, whose models take a while.

use jamba_core::Progress;

/// A function that shows progress on stderr, if that is a terminal.
#[cfg(feature = "hub")]
pub fn bar() -> impl FnMut(Progress) {
    use indicatif::{ProgressBar, ProgressStyle};
    use jamba_core::Stage;

    // Hidden by indicatif where stderr is no terminal.
    let style = "{msg} [{wide_bar}] {bytes} of {total_bytes}, {eta}";
    let style = ProgressStyle::with_template(style);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
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

/// A function that shows nothing.
#[cfg(not(feature = "hub"))]
pub fn bar() -> impl FnMut(Progress) {
    |_| {}
}
