"""Text, JSONL and parquet, here and on a hub-shaped server: every document whole and in order, every mistake named."""

import hashlib
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jevons.data import sources
from jevons.data.sources import DataError, find_files
from jevons.recipe import RecipeError, SourceTable, parse_recipe, with_overrides

REPO = "someone/stories"


def documents(path, **options):
    """Every document of a source, its pieces joined."""
    out, open_one = [], []
    for file in find_files(SourceTable(path=str(path), **options)):
        last = 0
        for piece in file.pieces(path.parent / "scratch" if hasattr(path, "parent") else None):
            open_one.append(piece.text)
            assert last <= piece.read <= file.size
            last = piece.read
            if piece.ends:
                out.append("".join(open_one))
                open_one = []
        assert last == file.size and not open_one
    return out


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=300)


@given(words, st.sampled_from(["", "\n\n", "☃", "ab"]), st.integers(1, 40))
def test_text_comes_whole_whatever_the_blocks(tmp_path_factory, text, separator, block):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        assert documents(path, separator=separator) == (text.split(separator) if separator else [text])


def test_text_pieces_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 100)
    path = tmp_path / "a.txt"
    path.write_text("\n".join("x" * random.randint(0, 30) for _ in range(200)))
    (file,) = find_files(SourceTable(path=str(path)))
    pieces = list(file.pieces(tmp_path))
    assert len(pieces) > 10 and all(p.text.endswith("\n") for p in pieces[:-1]) and [p.ends for p in pieces].count(True) == 1


@pytest.mark.parametrize("block", [7, 2**20])
def test_what_is_not_utf8_is_named_by_line_and_byte(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    good = "\n".join("ä" * random.randint(0, 20) for _ in range(50)).encode() + b"\n"
    (tmp_path / "a.txt").write_bytes(good + b"ok \xff more")
    with pytest.raises(DataError, match=rf"a.txt line 51: not UTF-8 text: invalid start byte at byte {len(good) + 3}"):
        documents(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(good + "ä".encode()[:1])
    with pytest.raises(DataError, match=rf"b.txt line 51: not UTF-8 text: unexpected end of data at byte {len(good)}"):
        documents(tmp_path / "b.txt")


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    rows = [{"q": f"{random.random()} ☃", "a": random.choice(["yes", "", None]), "n": i} for i in range(700)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=90)
    wanted = [f"{r['q']}\n{r['a'] or ''}" for r in rows]
    assert documents(tmp_path / "a.jsonl", key=["q", "a"]) == documents(tmp_path / "a.parquet", key=["q", "a"]) == wanted
    assert documents(tmp_path / "a.jsonl", key="q") == documents(tmp_path / "a.parquet", key="q") == [r["q"] for r in rows]


@pytest.mark.parametrize("line,message", [
    (b'{"text": 3}', r"line 3: 'text' is 3 \(int\); a text would be right"),
    (b'{"txt": "x", "id": 1}', r"line 3: no key 'text'; it has 'txt', 'id'"),
    (b'{}', r"line 3: no key 'text'; it has none"),
    (b'["x"]', r"line 3: a list; an object with the key 'text' would be right"),
    (b'{"text": "x"', r"line 3: not JSON: Expecting ',' delimiter"),
    (b"[" * 100_000, r"line 3: not JSON: maximum recursion depth"),
    (b'{"text": "\xe4"}', r"line 3: not UTF-8 text: invalid continuation byte at byte 10 of the line"),
])
def test_bad_jsonl_lines(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl " + message):
        documents(tmp_path / "bad.jsonl")


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'txt'; it has text, n"):
        documents(tmp_path / "a.parquet", key="txt")
    with pytest.raises(DataError, match=r"a\.parquet row 1: 'n' is 1 \(int\)"):
        documents(tmp_path / "a.parquet", key="n")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"b\.parquet: unreadable parquet"):
        documents(tmp_path / "b.parquet")
    spoilt = bytearray(data)
    spoilt[4:40] = bytes(36)
    (tmp_path / "c.parquet").write_bytes(spoilt)
    with pytest.raises(DataError, match=r"c\.parquet: unreadable parquet"):
        documents(tmp_path / "c.parquet")


def test_files_by_folder_and_glob(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl", "notes.pdf", "data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "j"}\n' if name.endswith("l") else name)
    assert documents(tmp_path) == ["a.md", "b.txt", "j"]
    assert documents(tmp_path / "*.txt") == ["b.txt"] and documents(tmp_path / "**" / "*.jsonl") == ["j"]
    assert documents(tmp_path / "data", format="text") == ["data"]
    with pytest.raises(DataError, match=r"data: the ending says no format; `format` can be"):
        documents(tmp_path / "data")
    with pytest.raises(DataError, match=r"nowhere does not exist; a file, folder or glob of \.txt"):
        documents(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no file that can be read"):
        documents(tmp_path / "empty")


# -- a hub ---------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One dataset repository as the hub shows it: its files' list, and each with ETag and commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        headers, status, body = {}, 200, b""
        match = re.fullmatch(rf"/datasets/{REPO}/resolve/{hub.commit}/(.+)", path)
        if path.startswith(f"/api/datasets/{REPO}"):
            hub.revisions.append(path.removeprefix(f"/api/datasets/{REPO}").removeprefix("/revision/"))
            files = [{"rfilename": n, "size": len(d), "blobId": hashlib.sha1(d).hexdigest()} for n, d in hub.files.items()]
            body = json.dumps({"id": REPO, "sha": hub.commit, "siblings": files}).encode()
        elif match and match[1] in hub.files:
            body = hub.files[match[1]]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": hub.commit}
            hub.asked += [match[1]] if self.command == "GET" else []
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.commit, server.asked, server.revisions = True, "c" * 40, [], []
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    server.files = {"README.md": b"# Stories"}
    for part in range(3):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"story {part} {i}" for i in range(5)]}), sink)
        server.files[f"data/{2 - part}.parquet"] = sink.getvalue().to_pybytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_hub_dataset_comes_one_file_at_a_time(hub, tmp_path):
    found, scratch = find_files(SourceTable(path=f"hub:{REPO}")), tmp_path / "scratch"
    assert [f.path for f in found] == ["data/0.parquet", "data/1.parquet", "data/2.parquet"] and not hub.asked
    texts = []
    for number, file in enumerate(found):
        for piece in file.pieces(scratch):
            texts.append(piece.text)
            assert [p.name for p in scratch.rglob("*.parquet")] == [f"{number}.parquet"]
            assert hub.asked == [f.path for f in found[: number + 1]]
        assert not scratch.exists()
    assert texts == [f"story {part} {i}" for part in (2, 1, 0) for i in range(5)]
    assert [f.path for f in find_files(SourceTable(path=f"hub:{REPO}@v1/data/[12]*"))] == ["data/1.parquet", "data/2.parquet"]
    assert hub.revisions[-1] == "v1"
    assert find_files(SourceTable(path=f"hub:{REPO}"))[0].record() == found[0].record()
    hub.files["data/0.parquet"] += b"x"
    assert find_files(SourceTable(path=f"hub:{REPO}"))[0].record() != found[0].record()


def test_shards_of_a_hub_need_it_no_more_once_they_are_whole(hub, tmp_path):
    from jevons.data.shards import build_shards
    from jevons.data.tokenizer import train_tokenizer

    tokenizer, source = train_tokenizer(["story 0 1 2 3 4"] * 3, 288), SourceTable(path=f"hub:{REPO}")

    def stop(read, total, tokens):
        if read > total / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build_shards([source], tokenizer, tmp_path / "out", shard_tokens=20, on_progress=stop)
    before = hub.asked[:]
    shards = build_shards([source], tokenizer, tmp_path / "out", shard_tokens=20)
    assert before[0] == "data/0.parquet" and "data/0.parquet" not in hub.asked[len(before) :]
    text = tokenizer.decode(shards.tokens(0, shards.total).tolist(), skip_special=True)
    assert text == "".join(f"story {part} {i}" for part in (2, 1, 0) for i in range(5))
    assert not (tmp_path / "out" / "download").exists()
    hub.commit, asked = "d" * 40, len(hub.revisions)
    build_shards([source], tokenizer, tmp_path / "out", shard_tokens=20)
    assert len(hub.revisions) == asked


def test_what_a_hub_refuses(hub, tmp_path):
    with pytest.raises(DataError, match="hub:someone/else could not be fetched"):
        find_files(SourceTable(path="hub:someone/else"))
    with pytest.raises(DataError, match=f"hub:{REPO}/no/such does not exist"):
        find_files(SourceTable(path=f"hub:{REPO}/no/such"))
    file = find_files(SourceTable(path=f"hub:{REPO}"))[0]
    del hub.files[file.path]
    with pytest.raises(DataError, match=f"hub:{REPO}/data/0.parquet could not be fetched"):
        list(file.pieces(tmp_path / "scratch"))


# -- recipes -------------------------------------------------------------------------------------------------------------

TEXT = """
name = "x"
[model]
preset = "v3-nano"
[data]
sources = [{ path = "a.txt" }]
[[stages]]
kind = "pretrain"
tokens = 100
"""


@pytest.mark.parametrize("old,new,message", [
    ('path = "a.txt"', 'pth = "a.txt"', r"`data.sources\[0\].pth`; the nearest known key is `data.sources\[0\].path`"),
    ("[data]", "[data]\nsequence_len = 3", r"unknown key `data.sequence_len`; the nearest known key is `data.seq_len`"),
    ("[data]", "[data]\nvalidation = [{ paht = 'b' }]", r"unknown key `data.validation\[0\].paht`"),
    ("[data]", "[data]\nvalidation = 0.7", r"`data.validation` = 0.7: .*a share from 0 to 0.5, or a list of sources"),
    ("[data]", "[data]\nvalidation = [{ path = 'b', weight = 1 }]", r"`weight` has no meaning for them"),
    ("[data]", "[data]\nmask = 'some'", r"`data.mask` = 'some': Input should be 'none' or 'document'"),
    ("}]", "}, { path = 'b.txt', weight = 2 }]", r"give every source a weight, or none of them"),
    ("[{ path", "[{ weight = 0, path", r"`data.sources.0.weight` = 0: Input should be greater than 0"),
    ("tokens = 100", "tokens = 100\n[[stages]]\nkind = 'eval'", r"the eval stage needs a \[task\]"),
])
def test_what_a_recipe_may_not_say_of_its_data(old, new, message):
    assert parse_recipe(TEXT).task is None
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TEXT.replace(old, new, 1))


def test_recipes_without_data_have_a_task():
    text = TEXT.replace('[data]\nsources = [{ path = "a.txt" }]\n', "")
    assert parse_recipe(text).task.name == "countdown" and parse_recipe(text).data is None


def test_set_changes_values_and_the_text_says_so():
    sets = ["data.sources.0.path=b c.txt", "stages.0.tokens=2_000", "model.set.hidden_size=32", "seed=7",
            "data.validation=[{path='v.txt'}]", "description=a = \"b\""]
    text = with_overrides(TEXT, sets)
    recipe = parse_recipe(text)
    assert text.startswith(TEXT.rstrip("\n")) and with_overrides(TEXT, []) == TEXT
    assert recipe.data.sources[0].path == "b c.txt" and recipe.stages[0].tokens == 2000 and recipe.seed == 7
    assert recipe.model.set == {"hidden_size": 32} and recipe.data.validation[0].path == "v.txt"
    assert recipe.description == 'a = "b"'
    for bad, message in (("seed", r"--set 'seed': KEY=VALUE would be right"), ("sede=1", r"unknown key `sede`"),
                         ("stages.3.tokens=1", r"override 'stages.3.tokens' leads nowhere"),
                         ("name.x=1", r"override 'name.x' leads nowhere"),
                         ("stages.0.tokens=many", r"stages.0.tokens` = 'many'")):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(with_overrides(TEXT, [bad]))
