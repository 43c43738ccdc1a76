//! What comes back of requests, however it is waited for.

use std::sync::Mutex;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use jamba_core::{Arrival, Engine, EngineOptions, FinishReason, Request, Streams};

use crate::support::{SMALL, alone, endless, golden, options, same, tokenizer};

#[test]
fn a_stream_can_be_asked_without_waiting() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut first = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(first.next(), Some(Ok(_))));
    // The only slot is taken: nothing comes of the second, however it is asked.
    let mut second = engine.submit(Request::new(vec![4, 5], options(2, 5))).unwrap();
    assert!(second.try_next().is_pending());
    let start = Instant::now();
    assert!(second.next_timeout(Duration::from_millis(30)).is_pending());
    assert!(start.elapsed() >= Duration::from_millis(30));
    assert!(second.next_timeout(Duration::ZERO).is_pending());
    first.cancel();
    let mut ids = Vec::new();
    loop {
        match second.next_timeout(Duration::MAX) {
            Poll::Pending => panic!("it was to wait"),
            Poll::Ready(Some(piece)) => ids.push(piece.unwrap().id.unwrap()),
            Poll::Ready(None) => break,
        }
    }
    let request = Request::new(vec![4, 5], options(2, 5));
    assert_eq!(ids, alone(&model, 64, &request).ids);
    assert!(matches!(second.try_next(), Poll::Ready(None)));
    assert!(second.next().is_none() && second.usage().is_some());
    // Of an engine that is gone, too, the end comes.
    let left = first.by_ref().last();
    assert!(left.is_none_or(|piece| piece.is_ok()));
    assert_eq!(first.finish_reason(), Some(FinishReason::Cancelled));
}

/// An executor of one task: it parks its thread until it is woken.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn a_task_is_woken_for_every_piece() {
    let model = golden("pure-mamba");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let waker = Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let request = Request::new(vec![4, 5], options(2, 20));
    let mut stream = engine.submit(request.clone()).unwrap();
    let mut ids = Vec::new();
    loop {
        match stream.poll_next(&mut Context::from_waker(&waker)) {
            Poll::Pending => std::thread::park(),
            Poll::Ready(Some(piece)) => ids.extend(piece.unwrap().id),
            Poll::Ready(None) => break,
        }
    }
    assert_eq!(ids, alone(&model, 64, &request).ids);
}

/// Submits another request as soon as it is woken, on the thread that wakes.
struct Submit {
    engine: Engine,
    streams: Mutex<Vec<jamba_core::Stream>>,
}

impl Wake for Submit {
    fn wake(self: std::sync::Arc<Self>) {
        let stream = self.engine.submit(Request::new(vec![4], options(1, 2))).unwrap();
        self.streams.lock().unwrap().push(stream);
    }
}

/// Whoever is woken may use the engine: nothing is locked, also when a waiting request is cancelled.
#[test]
fn a_waker_may_submit() {
    let model = golden("pure-mamba");
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut running = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(running.next(), Some(Ok(_))));
    let submit = std::sync::Arc::new(Submit { engine: engine.clone(), streams: Mutex::default() });
    let waker = Waker::from(submit.clone());
    let mut waiting = engine.submit(Request::new(vec![4], options(1, 2))).unwrap();
    assert!(waiting.poll_next(&mut Context::from_waker(&waker)).is_pending());
    waiting.cancel();
    assert!(waiting.next().is_none());
    assert_eq!(waiting.finish_reason(), Some(FinishReason::Cancelled));
    drop(running);
    let start = Instant::now();
    while submit.streams.lock().unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing was submitted");
        std::thread::yield_now();
    }
    let stream = submit.streams.lock().unwrap().pop().unwrap();
    assert!(stream.collect_all().unwrap().finish_reason.is_some());
}

#[test]
fn several_streams_are_waited_for_together() {
    let model = golden("paper-block");
    let engine = Engine::new(&model, &tokenizer(), SMALL).unwrap();
    let requests: Vec<Request> = (0..40)
        .map(|i| Request::new(vec![5, 6, 7 + i as u32], options(i, i as usize % 20)))
        .collect();
    let mut streams = Streams::new();
    assert!(streams.next().is_none() && matches!(streams.try_next(), Poll::Ready(None)));
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(streams.push(engine.submit(request.clone()).unwrap()), i);
    }
    // One is read alone, one is cancelled by its number, one is dropped.
    let own = streams.remove(7).unwrap().collect_all().unwrap();
    same(&own, &alone(&model, 64, &requests[7]));
    streams.get(8).unwrap().cancel();
    drop(streams.remove(9));
    let mut ids = vec![Vec::new(); requests.len()];
    let mut ended = vec![0; requests.len()];
    for (number, arrival) in &mut streams {
        match arrival {
            Arrival::Piece(piece) => ids[number].extend(piece.id),
            Arrival::End(stream) => {
                let stream = stream.unwrap();
                ended[number] += 1;
                assert!(stream.finish_reason().is_some() && stream.usage().is_some());
            }
        }
    }
    assert!(streams.is_empty() && streams.get(0).is_none() && streams.remove(1).is_none());
    for (i, request) in requests.iter().enumerate() {
        let expected = alone(&model, 64, request).ids;
        match i {
            7 | 9 => assert_eq!(ended[i], 0),
            8 => assert!(ended[i] == 1 && expected.starts_with(&ids[i])),
            _ => assert!(ended[i] == 1 && ids[i] == expected, "{i}"),
        }
    }
    // Nothing comes of what waits.
    let options_of = EngineOptions { slots: 1, context: 100_000, ..SMALL };
    let engine = Engine::new(&model, &tokenizer(), options_of).unwrap();
    let mut running = engine.submit(Request::new(vec![4], endless(1))).unwrap();
    assert!(matches!(running.next(), Some(Ok(_))));
    streams.push(engine.submit(Request::new(vec![4], options(1, 3))).unwrap());
    assert!(streams.try_next().is_pending());
    assert!(streams.next_timeout(Duration::from_millis(20)).is_pending());
    drop(running);
    assert!(matches!(streams.next(), Some((40, _))));
}
