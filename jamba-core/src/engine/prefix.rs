//! States of prompts that were read and of replies, found again by their tokens.
//!
//! A radix tree over tokens: a path from the root spells the beginning of prompts, and a node may
//! hold the state after its path. The longest stored state that begins a new prompt is where the
//! prompt is read from; there is no grid of blocks. How far the tree knows a prompt beyond that
//! state tells where prompts part: a junction, at which a state is worth keeping.

use std::collections::{BTreeMap, HashMap};

use crate::state::Snapshot;

/// What a prefix cache has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixStats {
    /// Prompts that began with a stored state.
    pub hits: u64,
    /// Prompts that did not.
    pub misses: u64,
    /// Tokens of prompts that were not run, thanks to stored states.
    pub hit_tokens: u64,
    /// States held.
    pub states: usize,
    /// Bytes held; what states share counts once.
    pub bytes: u64,
    /// States given up for newer ones.
    pub evicted: u64,
}

/// Stored states under a budget of bytes; the least recently used is given up first.
pub(super) struct PrefixCache {
    /// The root is the first. Nodes not in use are in `free`.
    nodes: Vec<Node>,
    free: Vec<usize>,
    budget: u64,
    clock: u64,
    /// Nodes with a state, by when it was used last.
    by_use: BTreeMap<u64, usize>,
    /// Of everything that states may share: how many do, and its bytes.
    shared: HashMap<usize, (usize, u64)>,
    stats: PrefixStats,
}

#[derive(Default)]
struct Node {
    parent: usize,
    /// Tokens from the parent to here.
    edge: Vec<u32>,
    /// By the first token of their edges.
    children: HashMap<u32, usize>,
    state: Option<(Snapshot, u64)>,
}

const ROOT: usize = 0;

/// What the tree knows of a prompt.
pub(super) struct Found {
    /// The longest stored state that begins it.
    pub(super) state: Option<Snapshot>,
    /// Tokens from the beginning that it has in common with prompts seen before.
    pub(super) known: usize,
}

impl PrefixCache {
    pub(super) fn new(budget: u64) -> Self {
        Self {
            nodes: vec![Node::default()],
            free: Vec::new(),
            budget,
            clock: 0,
            by_use: BTreeMap::new(),
            shared: HashMap::new(),
            stats: PrefixStats::default(),
        }
    }

    pub(super) fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Looks a prompt up. A state of the whole prompt counts only if its logits are known.
    pub(super) fn find(&mut self, prompt: &[u32]) -> Found {
        let (mut at, mut known, mut best) = (ROOT, 0, None);
        while let Some(&child) = prompt.get(known).and_then(|id| self.nodes[at].children.get(id)) {
            let edge = &self.nodes[child].edge;
            let common = common(edge, &prompt[known..]);
            known += common;
            if common < edge.len() {
                break;
            }
            at = child;
            let usable = |state: &Snapshot| known < prompt.len() || !state.logits().is_empty();
            if self.nodes[at].state.as_ref().is_some_and(|(state, _)| usable(state)) {
                best = Some(at);
            }
        }
        let state = best.and_then(|node| {
            self.touch(node);
            Some(self.nodes[node].state.as_ref()?.0.clone())
        });
        match &state {
            Some(state) => {
                self.stats.hits += 1;
                self.stats.hit_tokens += state.position() as u64;
            }
            None => self.stats.misses += 1,
        }
        Found { state, known }
    }

    /// Stores a state, unless it alone is more than the budget.
    pub(super) fn insert(&mut self, state: Snapshot) {
        if state.position() == 0 || state.bytes() + path_bytes(&state) > self.budget {
            return;
        }
        let node = self.path(state.tokens());
        self.take(node);
        self.stats.states += 1;
        self.stats.bytes += state.own_bytes() + path_bytes(&state);
        for (segment, bytes) in state.segments() {
            let (uses, _) = self.shared.entry(segment).or_insert((0, bytes));
            *uses += 1;
            if *uses == 1 {
                self.stats.bytes += bytes;
            }
        }
        self.nodes[node].state = Some((state, 0));
        self.touch(node);
        while self.stats.bytes > self.budget {
            let Some((_, oldest)) = self.by_use.first_key_value() else { break };
            let oldest = *oldest;
            self.take(oldest);
            self.prune(oldest);
            self.stats.evicted += 1;
        }
    }

    /// The node of these tokens, made if it is not there.
    fn path(&mut self, tokens: &[u32]) -> usize {
        let (mut at, mut done) = (ROOT, 0);
        while done < tokens.len() {
            let rest = &tokens[done..];
            let Some(&child) = self.nodes[at].children.get(&rest[0]) else {
                return self.add(at, rest.to_vec());
            };
            let common = common(&self.nodes[child].edge, rest);
            at = if common < self.nodes[child].edge.len() {
                self.split(child, common)
            } else {
                child
            };
            done += common;
        }
        at
    }

    fn add(&mut self, parent: usize, edge: Vec<u32>) -> usize {
        let first = edge[0];
        let node = Node { parent, edge, ..Node::default() };
        let index = match self.free.pop() {
            Some(index) => {
                self.nodes[index] = node;
                index
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.nodes[parent].children.insert(first, index);
        index
    }

    /// Puts a node `at` tokens down the edge of `child`.
    fn split(&mut self, child: usize, at: usize) -> usize {
        let parent = self.nodes[child].parent;
        let rest = self.nodes[child].edge.split_off(at);
        let edge = std::mem::replace(&mut self.nodes[child].edge, rest);
        let middle = self.add(parent, edge);
        let first = self.nodes[child].edge[0];
        self.nodes[middle].children.insert(first, child);
        self.nodes[child].parent = middle;
        middle
    }

    /// Takes the state out of a node.
    fn take(&mut self, node: usize) {
        let Some((state, used)) = self.nodes[node].state.take() else { return };
        self.by_use.remove(&used);
        self.stats.states -= 1;
        self.stats.bytes -= state.own_bytes() + path_bytes(&state);
        for (segment, bytes) in state.segments() {
            if let Some((uses, _)) = self.shared.get_mut(&segment) {
                *uses -= 1;
                if *uses == 0 {
                    self.shared.remove(&segment);
                    self.stats.bytes -= bytes;
                }
            }
        }
    }

    /// Removes a node that leads nowhere, and those that then lead nowhere; where a node merely
    /// leads on, its edge becomes part of the next.
    fn prune(&mut self, mut node: usize) {
        while node != ROOT && self.nodes[node].state.is_none() {
            let Node { parent, children, .. } = &self.nodes[node];
            let parent = *parent;
            match children.len() {
                0 => {
                    let first = self.nodes[node].edge[0];
                    self.nodes[parent].children.remove(&first);
                    self.nodes[node] = Node::default();
                    self.free.push(node);
                    node = parent;
                }
                1 => {
                    let removed = std::mem::take(&mut self.nodes[node]);
                    self.free.push(node);
                    for child in removed.children.into_values() {
                        let mut edge = removed.edge.clone();
                        edge.extend_from_slice(&self.nodes[child].edge);
                        self.nodes[parent].children.insert(edge[0], child);
                        self.nodes[child].edge = edge;
                        self.nodes[child].parent = parent;
                    }
                    return;
                }
                _ => return,
            }
        }
    }

    fn touch(&mut self, node: usize) {
        if let Some((_, used)) = &mut self.nodes[node].state {
            self.by_use.remove(used);
            self.clock += 1;
            *used = self.clock;
            self.by_use.insert(self.clock, node);
        }
    }
}

/// Bytes of the tree for one state, if it shares no edge.
fn path_bytes(state: &Snapshot) -> u64 {
    size_of_val(state.tokens()) as u64
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;
    use crate::backend::Limits;
    use crate::session::Session;
    use crate::testing::Script;

    #[derive(Clone, Debug)]
    enum Act {
        Append(Vec<u32>),
        Rewind(usize),
        Fork,
        Swap,
        Insert,
        /// The tokens of the session but so many, and then others.
        Find(usize, Vec<u32>),
    }

    fn act() -> impl Strategy<Value = Act> {
        // Few tokens, so that prompts have much in common.
        let tokens = |most| prop::collection::vec(10u32..12, 0..most);
        prop_oneof![
            3 => tokens(9).prop_map(Act::Append),
            2 => any::<usize>().prop_map(Act::Rewind),
            1 => Just(Act::Fork),
            2 => Just(Act::Swap),
            5 => Just(Act::Insert),
            4 => (any::<usize>(), tokens(4)).prop_map(|(n, ids)| Act::Find(n, ids)),
        ]
    }

    /// What the cache holds, as a list: least recently used first.
    #[derive(Default)]
    struct Plain(Vec<Snapshot>);

    impl Plain {
        fn bytes(&self) -> u64 {
            let shared: HashMap<_, _> = self.0.iter().flat_map(Snapshot::segments).collect();
            let own = self.0.iter().map(|state| state.own_bytes() + path_bytes(state));
            own.sum::<u64>() + shared.values().sum::<u64>()
        }

        fn insert(&mut self, state: Snapshot, budget: u64) -> u64 {
            if state.position() == 0 || state.bytes() + path_bytes(&state) > budget {
                return 0;
            }
            self.0.retain(|other| other.tokens() != state.tokens());
            self.0.push(state);
            let held = self.0.len();
            while self.bytes() > budget {
                self.0.remove(0);
            }
            (held - self.0.len()) as u64
        }

        fn find(&mut self, prompt: &[u32]) -> (usize, usize) {
            let known = self.0.iter().map(|state| common(state.tokens(), prompt)).max();
            let states = self.0.iter().enumerate();
            let fitting = states.filter(|(_, state)| prompt.starts_with(state.tokens()));
            let longest = fitting.max_by_key(|(_, state)| state.position()).map(|(i, _)| i);
            let found = longest.map_or(0, |i| {
                let state = self.0.remove(i);
                let position = state.position();
                self.0.push(state);
                position
            });
            (found, known.unwrap_or(0))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(5),
            cases: 300,
            ..ProptestConfig::default()
        })]

        /// Also where states share what sessions that live have forked and rewound: what is found is
        /// the longest, what is given up the least recently used, and what is counted is there.
        #[test]
        fn it_is_a_list_under_a_budget(
            acts in prop::collection::vec(act(), 1..80),
            budget in 0u64..12_000,
        ) {
            let limits = Limits { slots: 1, context: 100, tokens: 8, outputs: 8 };
            let mut sessions: Vec<Session> = vec![Script::new(limits).session().0];
            let (mut cache, mut plain) = (PrefixCache::new(budget), Plain::default());
            let mut evicted = 0;
            for act in &acts {
                let crowded = sessions.len() > 3;
                let s = &mut sessions[0];
                match act {
                    Act::Append(ids) if !ids.is_empty() && s.check(ids).is_ok() => {
                        s.append(ids).unwrap();
                    }
                    Act::Rewind(n) => drop(s.rewind(n % (s.position() + 1)).unwrap()),
                    Act::Fork if !crowded => {
                        let fork = s.fork().unwrap();
                        sessions.push(fork);
                    }
                    Act::Swap => sessions.rotate_left(1),
                    Act::Insert => {
                        let state = s.snapshot().unwrap();
                        cache.insert(state.clone());
                        evicted += plain.insert(state, budget);
                    }
                    Act::Find(n, ids) => {
                        let cut = s.position() - n % (s.position() + 1);
                        let prompt = [&s.tokens()[..cut], ids].concat();
                        let Found { state, known } = cache.find(&prompt);
                        let found = state.map_or(0, |state| state.position());
                        prop_assert_eq!((found, known), plain.find(&prompt));
                    }
                    _ => {}
                }
                let stats = cache.stats();
                prop_assert_eq!((stats.states, stats.bytes), (plain.0.len(), plain.bytes()));
                prop_assert_eq!(stats.evicted, evicted);
                prop_assert!(stats.bytes <= budget);
                // No node leads nowhere, and none merely leads on.
                let nodes = cache.nodes.len() - cache.free.len() - 1;
                prop_assert!(nodes <= 2 * stats.states, "{nodes} nodes");
            }
        }
    }
}
