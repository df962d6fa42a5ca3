"""Pages of the cache: who uses which, and which prefixes they hold. No torch here.

A page is free, used (by one or more sequences), or cached: nobody uses it, but a prompt that begins with the same tokens finds it
again by its key, which is a hash of all tokens up to its end. Cached pages are given away in the order of their last use.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field


def page_key(parent: bytes, tokens: Seq[int]) -> bytes:
    """The key of a page that holds `tokens` and follows the page of key `parent`."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass
class Prefix:
    """What `PagePool.match` found. Its pages are in use until they are released, `partial` too."""

    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    partial: int | None = None  # a page that begins with the tokens that follow: to be copied, since it goes on otherwise
    partial_tokens: int = 0


class PagePool:
    """`root` keys the first page of every prompt; pages of other weights, under another root, are never found."""

    def __init__(self, pages: int, size: int, caching: bool = True, root: bytes = b""):
        if min(pages, size) < 1:
            raise ValueError(f"pages {pages} and size {size} must be at least 1")
        self.pages, self.size, self.caching, self.root = pages, size, caching, root
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages without users, the longest unused first
        self._known: dict[int, tuple[bytes, bytes, tuple[int, ...]]] = {}  # page -> (its parent's key, its key, its tokens)
        self._by_key: dict[bytes, int] = {}
        self._children: dict[bytes, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.pages - self.free - self.cached

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one user, cached ones where no free ones are left; None where there are not enough."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._idle)))
            page = self._free.pop()
            self._users[page] = 1
            taken.append(page)
        return taken

    def match(self, tokens: Seq[int]) -> Prefix:
        """The longest known prefix of `tokens`, never all of them: the last one must be computed to be answered."""
        found, parent, size = Prefix(), self.root, self.size
        if not self.caching:
            return found
        last = len(tokens) - 1
        while (len(found.pages) + 1) * size <= last:
            at = len(found.pages) * size
            key = page_key(parent, tokens[at : at + size])
            page = self._by_key.get(key)
            if page is None:
                break
            self._use(page)
            found.pages.append(page)
            found.keys.append(key)
            parent = key
        rest = tokens[len(found.pages) * size : min(last, (len(found.pages) + 1) * size)]
        for page in self._children.get(parent, ()):
            own = self._known[page][2]
            same = next((i for i, (a, b) in enumerate(zip(rest, own, strict=False)) if a != b), min(len(rest), len(own)))
            if same > found.partial_tokens:
                found.partial, found.partial_tokens = page, same
        if found.partial is not None:
            self._use(found.partial)
        return found

    def register(self, page: int, parent: bytes, tokens: Seq[int]) -> tuple[bytes, bool]:
        """Make a full page findable: its key, and whether it now is (not where another page holds the same already)."""
        key = page_key(parent, tokens)
        if not self.caching or key in self._by_key or page in self._known:
            return key, False
        assert self._users[page] and len(tokens) == self.size
        self._known[page] = (parent, key, tuple(tokens))
        self._by_key[key] = page
        self._children.setdefault(parent, []).append(page)
        return key, True

    def release(self, pages: Seq[int]) -> None:
        """One user less for each. Give a sequence's pages in order: its later ones are given away first."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was released more often than it was taken"
            if self._users[page]:
                continue
            if page in self._known:
                self._idle[page] = None
            else:
                self._free.append(page)

    def sole(self, page: int) -> bool:
        """Whether one user holds the page and nobody can find it: only then may it be written to."""
        return self._users[page] == 1 and page not in self._known

    def clear(self) -> None:
        """Forget all prefixes: the weights have changed."""
        for page in list(self._known):
            self._forget(page)

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._idle.pop(page, None)

    def _forget(self, page: int) -> None:
        parent, key, _ = self._known.pop(page)
        del self._by_key[key]
        self._children[parent].remove(page)
        if not self._children[parent]:
            del self._children[parent]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def check_integrity(self) -> None:
        """Every page is free, cached or used, and the books agree. Raises AssertionError."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle
        for page, users in enumerate(self._users):
            assert (users == 0) == (page in free or page in idle) and users >= 0
        assert self.free + self.cached + self.used == self.pages
        assert idle <= set(self._known) and not free & set(self._known)
        assert {key: page for page, (_, key, _) in self._known.items()} == self._by_key
        assert sorted(p for pages in self._children.values() for p in pages) == sorted(self._known)
