"""The commands as a person runs them: help at once, one-line errors, a page and a chat beside training, and afterwards."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from own_tasks import Traced
from whole_runs import RECIPE, Command, jevons, metrics, write_recipe

from jevons import __version__
from jevons.tasks.base import Problem

SMALL = RECIPE.replace("tokens = 4_500", "tokens = 2_000").replace("steps = 5", "steps = 2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, run directory) made by `jevons up --no-serve`."""
    home = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(home, SMALL)
    code, text = jevons("up", recipe, "--out", home / "out", "--port", 0, "--no-serve", log=home / "log", patch=no_browser)
    assert code == 0, text
    assert "/runs" in text and "report.html" in text and "pretrain" in text and "grpo" in text
    return recipe, home / "out"


def get(url, timeout=60):
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return response.status, response.read().decode()


def ask(url, text="write sun moon", **options):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "seed": 1} | options
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def address(command):
    """The server's address, once the command has printed it."""
    pattern = re.compile(r"http://127\.0\.0\.1:\d+")
    assert command.wait_for(lambda: pattern.search(command.text)), command.text
    return pattern.search(command.text).group()


# -- at once ----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    for arguments in (["--help"], ["up", "--help"], ["eval", "--help"], ["--version"]):
        command = [sys.executable, "-X", "importtime", "-m", "jevons.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert "typer" in imported
        assert not imported & {"torch", "fastapi", "uvicorn", "numpy", "tokenizers", "safetensors", "rich"}
    assert done.stdout.strip() == __version__


def test_help_names_every_command(tmp_path):
    code, text = jevons("--help", log=tmp_path / "log")
    assert code == 0
    for name in ("up", "run", "eval", "serve", "chat", "info"):
        assert re.search(rf"^  {name} +\w", text, re.M)
    wrong = (("fly",), ("run",), ("eval", ".", "--votes", "2", "--samples", "3"),
             ("up", "--port", "99999"), ("eval", ".", "--n", "0"), ("chat", ".", "--temperature", "9"))
    for arguments in wrong:
        code, text = jevons(*arguments, log=tmp_path / "log")
        assert code == 2 and "Traceback" not in text and "Error" in text


# -- what is wrong is one line ----------------------------------------------------------------------------------------


def one_line(text):
    """The only line printed, an error."""
    assert "Traceback" not in text
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("change,named", [
    (("[cost]", "[costs]"), "`costs`"),
    (("batch_tokens", "batch_token"), "`stages[0].batch_token`; the nearest known key is `stages[0].batch_tokens`"),
    (("steps = 5", "steps = 0"), "`stages.1.steps` = 0"),
    (("preset =", "from = 'x'\npreset ="), "exactly one of"),
    ((":Traced", ":Even"), "no method `trace`"),
    (("own_tasks.py", "other.py"), "there is no file other.py"),
    (("kind = \"eval\"", "kind = \"evil\""), "'evil'"),
])
def test_a_bad_recipe_is_one_line(tmp_path, change, named):
    assert change[0] in RECIPE
    recipe = write_recipe(tmp_path, RECIPE.replace(*change))
    code, text = jevons("run", recipe, "--out", tmp_path / "out", log=tmp_path / "log")
    assert code == 1 and named in one_line(text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments,named", [
    (("run", "nothing"), "countdown-laptop"),
    (("run", "nothing.toml"), "recipe file nothing.toml does not exist"),
    (("serve", "nowhere"), "nowhere is not a directory"),
    (("info", "nowhere"), "nowhere/config.json does not exist"),
    (("chat", "."), "config.json"),
    (("eval", "nowhere"), "nowhere is not a directory"),
    (("eval", "CKPT", "--task", "countdwn"), "did you mean 'countdown'"),
    (("eval", "CKPT", "--numbers", "3"), "numbers"),
    (("eval", "CKPT", "--dump", "no/such/file"), "there is no directory no/such"),
])
def test_other_mistakes_are_one_line_too(whole, tmp_path, arguments, named):
    arguments = [whole[1] / "final" if a == "CKPT" else a for a in arguments]
    code, text = jevons(*arguments, log=tmp_path / "log")
    assert code == 1 and named in one_line(text)


def test_a_truncated_checkpoint_is_named(whole, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (whole[1] / "final").iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    for command in ("serve", "chat", "eval"):
        code, text = jevons(command, broken, log=tmp_path / "log")
        assert code == 1 and f"{broken}/model.safetensors is truncated" in one_line(text)


def test_a_port_in_use_is_said_before_any_training(whole, tmp_path):
    recipe = write_recipe(tmp_path, SMALL)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments in (("up", recipe, "--out", tmp_path / "out"), ("serve", whole[1] / "final")):
            code, text = jevons(*arguments, "--port", port, log=tmp_path / "log")
            assert code == 1 and one_line(text).startswith(f"error: port {port} on 127.0.0.1 is in use by another program;")
    assert not (tmp_path / "out").exists()


# -- beside and after training ----------------------------------------------------------------------------------------


def slow_steps() -> None:
    """Time enough to look at a run while it trains; no browser."""
    from jevons.train.loop import Loop

    no_browser()
    step = Loop._step
    Loop._step = lambda self: (time.sleep(0.15), step(self))[1]


def no_browser() -> None:
    os.environ.pop("DISPLAY", None)
    os.environ.pop("WAYLAND_DISPLAY", None)


def test_up_shows_trains_answers_and_serves(tmp_path):
    recipe, out = write_recipe(tmp_path, SMALL), tmp_path / "out"
    command = Command("up", recipe, "--out", out, "--port", 0, log=tmp_path / "log", patch=slow_steps)
    url = address(command)
    assert get(f"{url}/runs")[0] == 200
    assert not any(x["kind"] == "step" for x in metrics(out)), "the page was there before the first step"
    answer = ask(url)
    assert not any(x["kind"] == "done" for x in metrics(out)), "answered while it trained"
    assert answer["model"].startswith("nano-") and answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert command.wait_for(lambda: "served" in command.text), command.text
    assert metrics(out)[-1]["kind"] == "done"
    answer = ask(url)
    assert answer["model"] == "nano" and 0 < answer["usage"]["completion_tokens"] <= 8
    assert ask(url)["choices"] == answer["choices"], "one seed, one answer"
    assert json.loads(get(f"{url}/v1/models")[1])["data"][0]["id"] == "nano"
    assert get(f"{url}/")[0] == 200
    command.send(signal.SIGINT)
    assert command.end() == 0, command.text

    before = (out / "metrics.jsonl").read_bytes()
    command = Command("up", recipe, "--out", out, "--port", 0, log=tmp_path / "log2", patch=no_browser)
    again = address(command)
    assert ask(again)["choices"] == answer["choices"] and (out / "metrics.jsonl").read_bytes() == before
    command.send(signal.SIGTERM)
    assert command.end() == 0, command.text
    with pytest.raises(urllib.error.URLError):
        get(f"{again}/")


def test_up_stopped_while_training_goes_on(tmp_path):
    recipe, out = write_recipe(tmp_path, SMALL), tmp_path / "out"
    command = Command("up", recipe, "--out", out, "--port", 0, log=tmp_path / "log", patch=slow_steps)
    assert command.wait_for(lambda: any(x["kind"] == "step" for x in metrics(out))), command.text
    command.send(signal.SIGINT)
    assert command.end() == 130, command.text
    assert "The same command goes on from there" in command.text and "served" not in command.text
    steps = [x["step"] for x in metrics(out) if x["kind"] == "step"]
    code, text = jevons("up", recipe, "--out", out, "--port", 0, "--no-serve", log=tmp_path / "log", patch=no_browser)
    assert code == 0, text
    assert [x["step"] for x in metrics(out) if x.get("stage") == "pretrain" and x["kind"] == "step"] == [1, 2, 3, 4]
    assert 0 < len(steps) < 4


def test_up_without_serving_ends_by_itself(whole):
    assert [x["kind"] for x in metrics(whole[1])][-1] == "done"
    assert (whole[1] / "final/model.safetensors").exists() and (whole[1] / "report.html").exists()


# -- a checkpoint -----------------------------------------------------------------------------------------------------


def test_eval_can_be_rescored_by_anybody(whole, tmp_path):
    dump = tmp_path / "dump.jsonl"
    arguments = ("eval", whole[1] / "final", "--n", 12, "--seed", 7, "--max-tokens", 8)
    code, text = jevons(*arguments, "--json", "--dump", dump, log=tmp_path / "log")
    assert code == 0, text
    result = json.loads(text)
    assert (result["n"], result["seed"], result["task"]) == (12, 7, "even")
    assert result["low"] <= result["accuracy"] <= result["high"]
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    task = Traced()
    right = [task.score(Problem(x["prompt"], x["key"], x["data"]), x["completion"]).correct == 1.0 for x in lines]
    assert sum(right) / len(right) == result["accuracy"] and len(right) == 12
    code, text = jevons(*arguments, log=tmp_path / "log")
    assert code == 0 and f"{result['accuracy']:.1%}" in text and "95 % interval" in text
    code, text = jevons(*arguments, "--votes", 3, log=tmp_path / "log")
    assert code == 0 and re.findall(r"^(\S+@\d) +[\d.]+%  \(95 % interval", text, re.M) == ["pass@1", "cons@3", "pass@3"]
    code, text = jevons("eval", whole[1] / "final", "--task", "countdown", "--numbers", 4, "--n", 3, "--max-tokens", 4, "--json",
                        log=tmp_path / "log")
    assert code == 0 and json.loads(text)["task"] == "countdown", text


def test_serve_answers_and_asks_for_its_key(whole, tmp_path):
    command = Command("serve", whole[1] / "final", "--port", 0, "--api-key", "secret", log=tmp_path / "log")
    url = address(command)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url)
    assert refused.value.code == 401
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.loads(response.read())["data"][0]["id"] == "nano"
    command.send(signal.SIGINT)
    assert command.end() == 0, command.text


def test_chat_reads_questions_from_a_pipe(whole):
    arguments = [sys.executable, "-m", "jevons.cli", "chat", str(whole[1] / "final"), "--max-tokens", "8", "--temperature", "0"]
    questions = ("write sun moon", "", "sun " * 2000)
    done = subprocess.run(arguments, input="\n".join(questions) + "\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    first, *answers = done.stdout.split("> ")
    assert "Ctrl-D ends the chat" in first and len(answers) == 4, "two questions, an empty line and the end"
    assert answers[0].strip() and "context" in answers[2], "a question that is too long is said, and the chat goes on"


def test_info(whole, tmp_path):
    code, text = jevons("info", log=tmp_path / "log")
    assert code == 0 and "torch" in text and "compute_dtype" in text
    code, text = jevons("info", whole[1] / "final", "--json", log=tmp_path / "log")
    values = json.loads(text)
    assert code == 0 and values["architecture"] == "DeepseekV3ForCausalLM" and values["vocabulary"] == 288
    assert values["recipe"] == "nano" and values["score of grpo"].endswith("of 6 held-out problems")
    code, text = jevons("info", whole[1] / "final", log=tmp_path / "log")
    assert code == 0 and "8 routed, 2 a token, 1 shared" in text
