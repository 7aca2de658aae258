"""Recipes and sweep files from elsewhere: each mistake or trap in them ends at once, in one short sentence."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.common.errors import LONGEST_QUOTE, UserError, in_short, quote
from fastssl.recipe import MAX_BYTES, Recipe, load_recipe
from fastssl.sweep import expand, load_sweep
from fastssl.sweep.progress import last_log_line

MINE = "name: mine\ndata: {train: x.beton}\n"
NINES = "9" * 5000
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def laughs(levels: int, copies: int, merge: bool = False) -> str:
    """The first level of anchors is repeated copies ** levels times in the last."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * copies)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


@pytest.fixture
def refusal(tmp_path):
    """A function: the sentence with which a recipe is refused, within seconds."""

    def refused(text: str, *overrides: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            load_recipe(path, overrides)
        assert time.monotonic() - start < 10
        sentence = str(error.value)
        assert "\n" not in sentence and len(sentence) < 200 + len(str(path)) + LONGEST_QUOTE
        return sentence

    return refused


@pytest.mark.parametrize(
    "text, problem",
    [
        (laughs(30, 9), "more than 100,000 values"),
        (laughs(12, 8, merge=True), "more than 100,000 values"),
        (MINE + "seed: &a [*a]\n", "within its own anchor"),
        ("&a\n<<: *a\n" + MINE, "within its own anchor"),
        (MINE + "seed: " + "[" * 5000, "nested too deeply"),
        ("- " * 60_000, "nested too deeply"),
        ("{" * 60_000, "nested too deeply"),
        ("{" + "a, " * 40_000 + "}", "'a' is there twice"),
        (MINE + "#" * MAX_BYTES, "larger than the 131,072 bytes"),
    ],
)
def test_no_yaml_takes_long(refusal, text, problem):
    assert problem in refusal(text)


def test_a_few_aliases_are_taken_and_an_override_changes_one_of_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE + "views:\n  first: &v {blur: 0.5}\n  second: *v\n  jitter: {<<: &j {hue: 0.3}, p: 0.1}\n")
    views = load_recipe(path, ["views.first.solarize=1"]).views
    assert views.first.blur == views.second.blur == 0.5 and (views.jitter.hue, views.jitter.p) == (0.3, 0.1)
    assert (views.first.solarize, views.second.solarize) == (1, 0)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("seed: 2020-01-01", "'2020-01-01'"),
        ("seed: 2020-13-45", "'2020-13-45'"),
        ("seed: 1:30:00", "'1:30:00'"),
        ("seed: !!int x", "type int is 'x'"),
        ("seed: !!float x", "type float is 'x'"),
        ("seed: !!bool x", "type bool is 'x'"),
        ("seed: !!binary aGk=", "binary"),
        ("seed: !!set {a}", "set"),
        ("seed: !!timestamp x", "timestamp"),
        ("seed: !!python/name:os.system", "python/name"),
        (f"seed: {NINES}", "no value of the type int is '999"),
        (f"seed: 0x{'f' * 50_000}", "200000 bits"),
        (f"train: {{epochs: {NINES[:4000]}}}", "13288 bits"),
        ("train: {epochs: .inf}", "finite"),
        ("optim: {warmup_epochs: 1e308}", "optim.warmup_epochs"),
        ("optim: {lr: .inf}", "optim.lr must be a finite number"),
        ("optim: {options: {eps: .nan}}", "optim.options.eps"),
        ("views: {std: [.nan]}", "views.std"),
        ("views: {ratio: [1, .inf]}", "views.ratio"),
        (f"views: {{std: [{'-1, ' * 64}]}}", "views.std must be above 0"),
        ("1: 2", "line 3: a key is not a name"),
        ("null: 2", "line 3: a key is not a name"),
        ("[a]: 2", "line 3: a key is not a name"),
        ("train: {1: 2}", "line 3: a key is not a name"),
        ("name: twice", "line 3: the key 'name' is there twice"),
        ("train: {epochs: 1, epochs: 2}", "line 3: the key 'epochs' is there twice"),
        (f"? {'a' * 50_000}\n: 2", "unknown key aaa"),
        (f"seed: {'x' * 50_000}", "seed"),
        (f"objective: {{name: {'x' * 50_000}}}", "objective.name"),
        (f"objective: {{name: {'[' * 90}{']' * 90}}}", "objective.name"),
        (f"seed: [{'1, ' * 30_000}]", "seed"),
        ("run: {dir: \"a\\0b\"}", "run.dir must be a path"),
        ("model: {init: \"a\\eb\"}", "model.init must be a path"),
        ("data: {train: \"\\ud800\"}", "is there twice"),
        ("probe: {train: \"\\ud800\"}", "probe.train must be a path"),
    ],
)  # fmt: skip
def test_a_value_of_any_type_is_one_sentence(refusal, line, problem):
    assert problem in refusal(MINE + line + "\n")


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../../x", "/x", "a//b", ".hidden", "x/", "a\\0b", "\\e[2J", "x" * 201]
)
def test_a_name_stays_within_runs(refusal, name):
    assert "must be a folder within runs/" in refusal(f'name: "{name}"\ndata: {{train: x.beton}}\n')


@pytest.mark.parametrize("name", ["2020-01-01", "a/b", "my run (2)", "画像", "x" * 200])
def test_other_names_are_taken(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: {name}\ndata: {{train: x.beton}}\n")
    recipe = load_recipe(path)
    assert recipe.name == name
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "override",
    ["a..b=1", "=1", ".a=1", "train.=1", "seed", f"seed={NINES}", "seed=!!int x", "seed=" + "[" * 5000,
     "seed=2020-13-45", "seed=&a [*a]", "seed={a: 1, a: 2}", "name=a\0b", "name=\ud800", "data.train={" * 500,
     "train.epochs=!!python/x", "train.epochs=" + "x" * 5000, "x" * 5000,
     "x" * 5000 + "=1", ".".join("a" * 20_000) + "=1",
     "seed.x.y=1", "train.epochs=1e300", "model.projector.layers=10_000_000", "model.projector.hidden=1_000_000_000"],
)  # fmt: skip
def test_an_override_of_any_form_is_one_sentence(refusal, override):
    refusal(MINE + "seed: 0\n", override)


def test_quotes_are_short_printable_and_quick():
    deep: list[object] = []
    for _ in range(60):
        deep = [deep, deep]  # 2 ** 60 values
    endless: dict[str, object] = {}
    endless["x"] = endless
    for value in (deep, endless, "x" * 10**6, 10**5000, [10**5000] * 9, {"a": "b" * 999}, b"x" * 999, ESCAPE, "\ud800"):
        assert len(quote(value)) <= LONGEST_QUOTE and quote(value).isprintable()
    assert quote("a.jpg") == "'a.jpg'" and quote([1, {"a": None}]) == "[1, {'a': None}]" and quote(-7) == "-7"
    assert in_short("a\n b") == "a b" and len(in_short("x" * 999)) == LONGEST_QUOTE


def test_a_checkpoint_with_an_endless_recipe_is_one_sentence(tmp_path, canvas):
    """What torch.load builds may share and contain itself, as YAML's aliases do."""
    import torch

    from fastssl.models.checkpoint import load_model

    deep: list[object] = []
    for _ in range(60):
        deep = [deep, deep]
    for recipe in (
        {"seed": deep},
        {"objective": {"name": deep}},
        {"name": "../x"},
        deep,
    ):
        torch.save({"recipe": recipe, "model": {}, "step": 0}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="holds a recipe that this version of fastssl does not know") as error:
            load_model(tmp_path / "x.pt")
        assert len(str(error.value)) < 300 + LONGEST_QUOTE


@pytest.fixture
def special_files(tmp_path):
    """Files that are no regular ones, or have no end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "gap.yaml").touch()
    os.truncate(tmp_path / "gap.yaml", 200 * 10**9)
    (tmp_path / "link.yaml").symlink_to("pipe.yaml")
    return [*(tmp_path / f"{name}.yaml" for name in ("pipe", "folder", "gap", "link")), Path("/dev/zero")]


def test_commands_refuse_recipes_that_are_no_regular_files(special_files, tmp_path, fastssl):
    for file in special_files:
        for command in (["train"], ["sweep"], ["profile"], ["recipes", "show"], ["recipes", "copy"]):
            to = [tmp_path / "copy.yaml"] if command[-1] == "copy" else []
            code, out, err = fastssl(*command, file, *to)
            assert code == 2 and not out and str(file) in err and err.count("\nhint: ") == 1, err
    assert not (tmp_path / "copy.yaml").exists()


def test_weights_that_are_no_regular_files_are_refused(special_files, canvas):
    from fastssl.models.weights_file import read_weights

    for file in special_files:
        if file.name != "gap.yaml":
            with pytest.raises(UserError, match=str(file)):
                read_weights(str(file), "model.init: ")


def test_copy_writes_through_no_link(tmp_path, fastssl):
    (tmp_path / "link.yaml").symlink_to("elsewhere.yaml")
    code, _, err = fastssl("recipes", "copy", "recipes/barlow.yaml", tmp_path / "link.yaml")
    assert code == 2 and "exists already" in err and not (tmp_path / "elsewhere.yaml").exists()
    code, _, err = fastssl("recipes", "copy", "recipes/barlow.yaml", tmp_path / "copy.yaml")
    assert code == 0 and load_recipe(tmp_path / "copy.yaml").name == "barlow", err


def test_the_terminal_gets_no_escape_sequences(tmp_path, fastssl):
    path = tmp_path / f"a{ESCAPE}\nb.yaml"
    path.write_text(f"# {ESCAPE}\nname: mine\n")
    for command in (["train", path], ["sweep", path], ["train", path, f"seed={ESCAPE}"], ["train", ESCAPE],
                    ["recipes", "show", path], ["inspect", ESCAPE], ["eval", "knn", ESCAPE]):  # fmt: skip
        _, out, err = fastssl(*command)
        assert "\x1b" not in out + err and "\x07" not in out + err and r"\x1b" in out + err


def sweep_file(tmp_path: Path, text: str, name: str = "tiny") -> Path:
    (tmp_path / "mine.yaml").write_text(MINE)
    path = tmp_path / "sweep.yaml"
    path.write_text(f'name: "{name}"\n' + text.replace("MINE", str(tmp_path / "mine.yaml")))
    return path


def grids(axes: str, more: str = "") -> str:
    return f"grids: [{{recipe: MINE, {more} axes: {{{axes}}}}}]\n"


TEN = f"[{', '.join(map(str, range(10)))}]"


@pytest.mark.parametrize(
    "text, problem",
    [
        (grids(", ".join(f"optim.options.k{k}: {TEN}" for k in range(9))), "has 1000000000 runs, more than 10,000"),
        (grids(f"seed: [{', '.join(map(str, range(20_000)))}]"), "has 20000 runs, more than 10,000"),
        (grids(f"seed: [{'1, ' * 200_000}]"), "larger than the 131,072 bytes"),
        (grids(", ".join(f"k{k}: [1]" for k in range(21))), "axes"),
        (grids("seed: [1]", more='name: "../up",'), "grids.0.name"),
        (grids("seed: [1]", more='name: "",'), "grids.0.name"),
        (grids("seed: [1]", more=f"name: {'x' * 101},"), "grids.0.name"),
        (grids("seed: [1]", more='name: "a\\0b",'), "grids.0.name"),
        (grids("seed: []"), "axes.seed"),
        (grids("seed: [1, 1]"), "an axis has a value twice"),
        (grids("data.train: [" + "x" * 300 + "]"), "a folder cannot have a name of"),
        (grids("seed: [2020-13-45]"), "seed"),
        (grids("seed: [.inf]"), "seed"),
        (grids("name: [../../x]"), "must be a folder within runs/"),
        ('dir: "a\\0b"\n' + grids("seed: [1]"), "dir"),
        ("grids: [{recipe: MINE}, {recipe: MINE}]\n", "Two grids of the sweep tiny are named mine"),
        ("grids: [{recipe: MINE, name: slurm}]\n", "like the folder of SLURM's logs"),
        ('grids: [{recipe: "...yaml"}]\n', "would be named '..': give it a `name:`"),
        ("grids: [{recipe: /dev/zero}]\n", "/dev/zero is a folder or a device"),
        ("grids: [{recipe: MINE, set: {run.dir: /tmp/x}}]\n", "leave out run.dir"),
    ],
)
def test_a_hostile_sweep_is_one_sentence(tmp_path, text, problem):
    path = sweep_file(tmp_path, text)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        expand(load_sweep(path))
    assert time.monotonic() - start < 10
    assert problem in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("name", ["../up", "/abs", "", ".", "a/b", "a\\0b", "\\e[2J"])
def test_the_name_of_a_sweep_is_one_folder(tmp_path, name):
    path = sweep_file(tmp_path, grids("seed: [1]"), name)
    with pytest.raises(UserError, match="name"):
        load_sweep(path)


def test_every_run_of_a_sweep_is_within_its_folder(tmp_path):
    axes = "optim.options./x/y: [1], data.val: [../../y, /z, '..', '']"
    sweep = load_sweep(sweep_file(tmp_path, f"dir: {tmp_path}/out\n" + grids(axes)))
    runs = expand(sweep)
    assert len(runs) == 4
    for run in runs:
        assert Path(os.path.normpath(run.dir)).parent == tmp_path / "out" / "mine"


def test_recipes_are_read_with_little_memory(tmp_path):
    """A recipe of a few KB that stands for billions of values, read by a process that may not grow by 500 MB."""
    (tmp_path / "mine.yaml").write_text(laughs(30, 9))
    code = (
        "import resource, fastssl.recipe as r\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 5 * 10**8,) * 2)\n"
        "try:\n    r.load_recipe('mine.yaml')\nexcept r.UserError as error:\n    print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "more than 100,000 values" in answer.stdout, answer.stderr


def test_numbers_have_limits_that_leave_room_for_every_run(tmp_path):
    """What people may well ask for loads; memory is compared when the run starts."""
    (tmp_path / "mine.yaml").write_text(MINE)
    recipe = load_recipe(
        tmp_path / "mine.yaml",
        ["train.epochs=100000", "train.batch_size=65536", "model.projector={layers: 8, hidden: 16384, out: 32768}",
         "views.size=1024", "embedding.samples=1000", "checkpoint.every=1000000000", "data.workers=512"],
    )  # fmt: skip
    assert isinstance(recipe, Recipe) and recipe.views.size == 1024


def test_a_sweep_shows_no_escape_sequences(tmp_path, fastssl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    axes = 'optim.name: ["a\\e[2Jb", "c\\e]0;x\\ad"], "optim.options.k\\e": [1]'
    path = sweep_file(tmp_path, f"dir: {tmp_path}/out\n" + grids(axes))
    for run in expand(load_sweep(path)):  # what a run from elsewhere may hold
        run.dir.mkdir(parents=True)
        (run.dir / "recipe.yaml").write_text(run.recipe.to_yaml())
        (run.dir / "encoder.safetensors").touch()
        (run.dir / "output.log").write_text(f"error: {ESCAPE}\n")
        assert last_log_line(run) == ESCAPE
    _, out, err = fastssl("sweep", path, "--dry-run")
    assert "2 runs, 2 finished" in out and r"a\x1b[2Jb" in out, err
    assert "\x1b" not in out + err and "\x07" not in out + err
