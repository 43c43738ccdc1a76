//! The server over HTTP, on the demo model.

mod replies;
mod running;
mod service;
