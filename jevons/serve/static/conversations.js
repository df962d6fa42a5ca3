// Conversations in localStorage, one key each. Messages form a tree: an edit or another try is a sibling, and every
// node remembers which of its children is shown.

const PREFIX = "jevons.conversation.";
const fresh = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

export function create() {
  const now = Date.now();
  return { id: fresh(), title: "", created: now, updated: now, nodes: { root: { id: "root", children: [], shown: 0 } } };
}

export function loadAll() {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (!key.startsWith(PREFIX)) continue;
      const conversation = JSON.parse(localStorage.getItem(key));
      if (conversation?.nodes?.root) found.push(conversation);
    }
  } catch { /* storage is off or foreign: what was read is kept */ }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Keep a conversation; where storage is full the oldest others go. False if it could not be kept at all. */
export function save(conversation) {
  conversation.updated = Date.now();
  for (let attempt = 0; attempt < 20; attempt++) {
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      const oldest = loadAll().filter((other) => other.id !== conversation.id).pop();
      if (!oldest) return false;
      remove(oldest.id);
    }
  }
  return false;
}

export function remove(id) {
  try { localStorage.removeItem(PREFIX + id); } catch { /* nothing was kept */ }
}

/** Add a message under `parent` and show it. */
export function add(conversation, parent, message) {
  const node = { id: fresh(), parent, children: [], shown: 0, ...message };
  conversation.nodes[node.id] = node;
  const siblings = conversation.nodes[parent].children;
  siblings.push(node.id);
  conversation.nodes[parent].shown = siblings.length - 1;
  if (!conversation.title && node.role === "user") conversation.title = node.content.trim().slice(0, 120);
  return node;
}

/** The messages shown, first to last. */
export function path(conversation) {
  const shown = [];
  let node = conversation.nodes.root;
  while (node.children.length) {
    node = conversation.nodes[node.children[node.shown]];
    shown.push(node);
  }
  return shown;
}

/** The place of a node among its siblings: {index, count}. */
export function place(conversation, node) {
  const siblings = conversation.nodes[node.parent].children;
  return { index: siblings.indexOf(node.id), count: siblings.length };
}

export function show(conversation, node, index) {
  conversation.nodes[node.parent].shown = index;
}

/** Messages to send for an answer under the user message `node`: the whole path, or that message alone. */
export function messagesFor(conversation, node, withEarlier) {
  const messages = [];
  for (let at = node; at && at.id !== "root"; at = conversation.nodes[at.parent]) {
    if (at.role === "assistant" && !at.content) { // a turn without an answer cannot be sent: forget what came before it
      break;
    }
    messages.unshift({ role: at.role, content: at.content });
    if (!withEarlier) break;
  }
  return messages[0]?.role === "assistant" ? messages.slice(1) : messages;
}

export function matches(conversation, query) {
  const text = [conversation.title, ...Object.values(conversation.nodes).map((node) => node.content ?? "")].join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
