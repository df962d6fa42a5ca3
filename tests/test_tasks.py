"""Tasks by name: built-in, from a file, and errors that say what would be right."""

import random
import subprocess
import sys

import pytest

from jevons.tasks.base import Problem, Reward, Task
from jevons.tasks.registry import TaskError, load_task

OWN = '''
from dataclasses import dataclass
from jevons.tasks.base import Problem, Reward

@dataclass
class Echo:
    limit: int = 9
    name = "echo"

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def sample(self, rng):
        n = rng.randint(1, self.limit)
        return Problem(f"say {n}", str(n), {"n": n})

    def score(self, problem, text):
        return Reward({"correct": float(text.endswith(str(problem.data["n"])))})

class Mute:
    name = "mute"
    def sample(self, rng): ...

class Empty: ...

class Nameless:
    def sample(self, rng): ...
    def score(self, problem, text): ...
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_built_in_task_with_arguments():
    task = load_task("countdown", {"numbers": 4, "high": 12})
    assert isinstance(task, Task) and task.numbers == 4
    assert len(task.sample(random.Random()).data["numbers"]) == 4
    assert load_task("countdown").numbers == 3


def test_a_class_in_a_file(own):
    task = load_task(f"{own}:Echo", {"limit": 3})
    problem = task.sample(random.Random())
    assert isinstance(problem, Problem) and problem.data["n"] <= 3
    assert isinstance(task.score(problem, f"</think>{problem.data['n']}"), Reward)


def test_a_change_of_the_file_is_seen(own):
    load_task(f"{own}:Echo")
    own.write_text(OWN.replace("limit: int = 9", "limit: int = 123_456"))
    assert load_task(f"{own}:Echo").limit == 123_456


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("countdwn", {}, "did you mean 'countdown'"),
        ("zzz", {}, "known: countdown"),
        ("countdown", {"nubmers": 3}, "unexpected keyword argument 'nubmers'; it takes .*numbers"),
        ("countdown", {"numbers": 99}, "numbers must be 2 to 6, got 99"),
        ("{dir}/absent.py:Echo", {}, "there is no file .*absent.py"),
        ("{dir}/own.py", {}, "path/to/file.py:ClassName"),
        ("{dir}/own.py:", {}, "path/to/file.py:ClassName"),
        ("{dir}/own.py:Ecko", {}, "has no class Ecko; it has Echo, Mute, Empty, Nameless"),
        ("{dir}/own.py:Mute", {}, "no method score;"),
        ("{dir}/own.py:Empty", {}, "no method sample and no method score"),
        ("{dir}/own.py:Nameless", {}, "has no `name`"),
        ("{dir}/own.py:Echo", {"limit": 0}, "limit must be at least 1, got 0"),
        ("{dir}/own.py:Echo", {"size": 1}, "unexpected keyword argument 'size'"),
    ],
)
def test_errors_name_what_would_be_right(own, name, args, message):
    with pytest.raises(TaskError, match=message):
        load_task(name.format(dir=own.parent), args)


def test_a_file_that_cannot_be_imported_is_named(tmp_path):
    for text, reason in (("import no_such_module_anywhere", "ModuleNotFoundError"), ("def (", "SyntaxError")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(TaskError, match=f"broken.py cannot be imported: {reason}"):
            load_task(f"{tmp_path}/broken.py:Task")


WATCHED = """
from jevons.tasks.base import Problem, Reward
class Faulty:
    name = "faulty"
    def sample(self, rng):
        return Problem("q", "the key", {}) if rng else None
    def score(self, problem, text):
        return {"right": Reward({"correct": 1.0}), "nan": Reward({"correct": 1.0, "format": float("nan")}),
                "none": None, "bare": 1.0}[text]
    def trace(self, problem, rng):
        return text_of(problem)
"""


def test_what_a_class_of_ones_own_raises_or_gives_is_said(tmp_path):
    (tmp_path / "own.py").write_text(WATCHED)
    task = load_task(f"{tmp_path}/own.py:Faulty")
    problem = task.sample(True)
    assert task.name == "faulty" and task.score(problem, "right").correct == 1.0
    assert not hasattr(task, "sample_heldout") and callable(task.trace)
    for call, message in [
        (lambda: task.sample(None), r"own.py:Faulty': sample gave None; a Problem would be right"),
        (lambda: task.score(problem, "nan"), r"score of problem 'the key' and the answer 'nan' gave Reward.*nan.*finite numbers"),
        (lambda: task.score(problem, "none"), r"gave None; a Reward of finite numbers would be right"),
        (lambda: task.score(problem, "bare"), r"gave 1.0; a Reward"),
        (lambda: task.score(problem, "other"), r"raised KeyError: 'other' \(.*own.py, line 8\)"),
        (lambda: task.trace(problem, None), r"trace raised NameError: name 'text_of' is not defined \(.*own.py, line 11\)"),
    ]:
        with pytest.raises(TaskError, match=message):
            call()


def test_tasks_load_without_torch():
    code = "import sys, jevons.tasks.registry as r; r.load_task('countdown'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
