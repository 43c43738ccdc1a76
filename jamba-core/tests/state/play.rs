//! Plays: anything that can be done with sessions, in any order, and what they hold then. For the
//! tests of real models, and for those of `src/session` that see inside.

use jamba_core::{Session, Snapshot};
use proptest::prelude::*;
use tempfile::TempDir;

#[derive(Clone, Debug)]
pub(crate) enum Act {
    Append(Vec<u32>),
    AppendEach(Vec<u32>),
    /// A token whose step fails.
    Fail(u32),
    Fork,
    Swap,
    Snapshot,
    Restore(usize),
    Rewind(usize),
    Mark,
    CheckpointEvery(usize),
    Save,
    Load,
    Reset,
}

/// Up to 40 of them; of appends, fewer than `longest` tokens at a time. `fails` is the token whose
/// step fails, if there is one.
pub(crate) fn acts(longest: usize, fails: Option<u32>) -> impl Strategy<Value = Vec<Act>> {
    let tokens = move || prop::collection::vec(10u32..90, 1..longest);
    let act = prop_oneof![
        6 => tokens().prop_map(Act::Append),
        2 => tokens().prop_map(Act::AppendEach),
        1 => Just(fails.map_or(Act::Swap, Act::Fail)),
        1 => Just(Act::Fork),
        2 => Just(Act::Swap),
        3 => Just(Act::Snapshot),
        3 => any::<usize>().prop_map(Act::Restore),
        5 => any::<usize>().prop_map(Act::Rewind),
        2 => Just(Act::Mark),
        1 => (0usize..7).prop_map(Act::CheckpointEvery),
        1 => Just(Act::Save),
        1 => Just(Act::Load),
        1 => Just(Act::Reset),
    ];
    prop::collection::vec(act, 1..40)
}

/// Plays `acts` on `session` and up to two forks of it. After each, the session that it was done with
/// must have the tokens that it should; `check` is told it, the act, and what `before` said of it.
pub(crate) fn play<T>(
    session: Session,
    acts: &[Act],
    before: impl Fn(&Session) -> T,
    mut check: impl FnMut(&Session, &Act, T),
) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("state.safetensors");
    let mut sessions = vec![session];
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let mut saved = None;
    for act in acts {
        let crowded = sessions.len() >= 3;
        let s = &mut sessions[0];
        let (room, held) = (s.context() - s.position(), s.tokens().to_vec());
        let of_before = before(s);
        let mut expected = held.clone();
        match act {
            Act::Append(ids) | Act::AppendEach(ids) if ids.len() <= room => {
                match act {
                    Act::Append(_) => drop(s.append(ids).unwrap()),
                    _ => s.append_each(ids, |_, _| ()).unwrap(),
                }
                expected.extend(ids);
            }
            Act::Append(_) | Act::AppendEach(_) => {}
            Act::Fail(id) if room > 0 => {
                s.append(&[*id]).unwrap_err();
                s.rewind(0).unwrap();
            }
            Act::Fail(_) => {}
            Act::Fork if !crowded => {
                let fork = s.fork().unwrap();
                sessions.push(fork);
            }
            Act::Fork => {}
            Act::Swap => {
                sessions.rotate_left(1);
                expected = sessions[0].tokens().to_vec();
            }
            Act::Snapshot => {
                let snapshot = s.snapshot().unwrap();
                assert_eq!(snapshot.tokens(), held);
                snapshots.push(snapshot);
            }
            Act::Restore(i) => {
                if let Some(i) = i.checked_rem(snapshots.len()) {
                    s.restore(&snapshots[i]).unwrap();
                    expected = snapshots[i].tokens().to_vec();
                }
            }
            Act::Rewind(n) => {
                let position = held.len() - n % (held.len() + 1);
                let rewound = s.rewind_to(position).unwrap();
                if position < held.len() {
                    assert_eq!(rewound.checkpoint.unwrap_or(0) + rewound.replayed, position);
                }
                expected.truncate(position);
            }
            Act::Mark => drop(s.mark().unwrap()),
            Act::CheckpointEvery(n) => s.checkpoint_every(*n),
            Act::Save => {
                s.save(&file).unwrap();
                saved = Some(held);
            }
            Act::Load => {
                if let Some(tokens) = &saved {
                    s.load(&file).unwrap();
                    expected = tokens.clone();
                }
            }
            Act::Reset => {
                s.reset().unwrap();
                expected.clear();
            }
        }
        assert_eq!(sessions[0].tokens(), expected, "{act:?}");
        check(&sessions[0], act, of_before);
    }
}
