//! Names of the Hub.

use std::path::{Component, Path};

use jamba_core::hub::Hub;

/// A name and a revision, a line each: nothing outside of the cache is looked at.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (id, revision) = text.split_once('\n').map_or((text, None), |(a, b)| (a, Some(b)));
    let hub = Hub {
        endpoint: "http://127.0.0.1:9".into(),
        cache: concat!(env!("CARGO_MANIFEST_DIR"), "/no-such-cache").into(),
        token: None,
        offline: true,
    };
    assert!(hub.folder(id, revision, |_| {}).is_err());
    if Hub::is_id(id) {
        let name = Path::new(id);
        let is_plain = |part| matches!(part, Component::Normal(_));
        assert!(name.components().count() == 2 && name.components().all(is_plain), "{id}");
    }
}
