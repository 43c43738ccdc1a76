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
