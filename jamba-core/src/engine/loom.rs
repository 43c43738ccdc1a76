//! Every interleaving of the engine's thread and those that submit and read, within loom's bounds:
//! `RUSTFLAGS="--cfg loom" cargo test -p jamba-core --lib engine::loom`.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::channel::channel;
use super::queue::tests::job;
use super::queue::{EngineStats, Shared};
use super::stream::Event;

#[test]
fn loom_what_is_sent_is_received_in_order() {
    loom::model(|| {
        let (sender, receiver) = channel();
        let thread = thread::spawn(move || {
            assert!(sender.send(1));
            assert!(sender.send(2));
        });
        assert_eq!(receiver.receive(None), Poll::Ready(Some(1)));
        assert_eq!(receiver.receive(None), Poll::Ready(Some(2)));
        assert_eq!(receiver.receive(None), Poll::Ready(None));
        assert_eq!(receiver.try_receive(), Poll::Ready(None));
        thread.join().unwrap();
    });
}

#[test]
fn loom_a_receiver_may_go_at_any_time() {
    loom::model(|| {
        let (sender, receiver) = channel();
        let thread = thread::spawn(move || {
            let heard = sender.send(1);
            (heard, sender.send(2))
        });
        let seen = receiver.try_receive();
        drop(receiver);
        let heard = thread.join().unwrap();
        // Who is not heard once is never heard again; what was seen was heard.
        assert!(heard != (false, true) && (seen.is_pending() || heard.0));
    });
}

/// Lets one thread wait for a ring, as an executor does.
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }
}

#[test]
fn loom_no_wake_is_lost() {
    loom::model(|| {
        let (sender, receiver) = channel();
        let thread = thread::spawn(move || {
            sender.send(1);
        });
        let bell = Arc::new(Bell { rung: Mutex::new(false), changed: Condvar::new() });
        let waker = Waker::from(bell.clone());
        let mut got = Vec::new();
        loop {
            match receiver.poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(Some(event)) => got.push(event),
                Poll::Ready(None) => break,
                Poll::Pending => {
                    let mut rung = bell.rung.lock().unwrap();
                    while !*rung {
                        rung = bell.changed.wait(rung).unwrap();
                    }
                    *rung = false;
                }
            }
        }
        assert_eq!(got, [1]);
        thread.join().unwrap();
    });
}

/// A job that is accepted is taken or ended; one that is not is refused.
#[test]
fn loom_no_job_is_lost_when_the_engine_closes() {
    loom::model(|| {
        let shared = Arc::new(Shared::new(2));
        let submitter = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (job, receiver) = job(0);
                shared.push(job).is_ok().then_some(receiver)
            })
        };
        let closer = {
            let shared = shared.clone();
            thread::spawn(move || shared.close())
        };
        let mut taken = 0;
        while let Some(jobs) = shared.take(true, EngineStats::default(), |_| true) {
            taken += jobs.len();
            for job in jobs {
                job.events.send(Event::cancelled(Default::default()));
            }
        }
        shared.abandon();
        closer.join().unwrap();
        match submitter.join().unwrap() {
            Some(receiver) => {
                assert_eq!(taken, 1);
                assert!(matches!(receiver.receive(None), Poll::Ready(Some(Event::Finished(..)))));
            }
            None => assert_eq!(taken, 0),
        }
    });
}

/// Also if it ends in a panic: whoever waits hears that nothing more comes.
#[test]
fn loom_an_engine_that_ends_leaves_nobody_waiting() {
    loom::model(|| {
        let shared = Arc::new(Shared::new(2));
        let engine = {
            let shared = shared.clone();
            thread::spawn(move || shared.abandon())
        };
        let (job, receiver) = job(0);
        let accepted = shared.push(job).is_ok();
        engine.join().unwrap();
        assert!(matches!(receiver.receive(None), Poll::Ready(None)) || !accepted);
    });
}
