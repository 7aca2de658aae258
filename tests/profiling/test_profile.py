"""A profile is written, read, checked against thresholds, compared, shown and drawn; nothing is measured here."""

import io
import json
import re
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pytest
from figure_checks import check_figure
from matplotlib.colors import to_hex
from PIL import Image
from profiles import example_json, example_profile, gpu_json, gpu_profile, measured, stage
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from fastssl.common.errors import UserError
from fastssl.common.figures import LIGHT_GRAY, VERMILLION, save_figure
from fastssl.profiling.bottleneck import RESOURCES, Cost, CostModel, Setup, describe_bottleneck
from fastssl.profiling.compare import Change, compare, compare_table, differences
from fastssl.profiling.device_stages import PHASES
from fastssl.profiling.page import write_page
from fastssl.profiling.plots import draw_profile
from fastssl.profiling.profile import STAGES, Measurement, Profile, device_time, read_profile, was_busy, write_profile
from fastssl.profiling.profiler import is_certain, is_off, remarks_on
from fastssl.profiling.tables import details, headline, profile_table, stage_rows, time_rows
from fastssl.profiling.thresholds import failed_thresholds, parse_thresholds
from fastssl.profiling.wording import PART_NAMES, RESOURCE_NAMES, STAGE_NAMES, percent, si, significant

HOSTILE = "[bold]x[/] <script>alert('x')</script> \"> $x$ :cat: \x1b[31m \ud800 \u202e 中"


def hostile_profile() -> Profile:
    """A profile with untrusted text in every text field."""
    return gpu_profile(
        name=HOSTILE, measured_at=HOSTILE, fastssl_version=HOSTILE, remarks=[HOSTILE], trace=HOSTILE,
        overrides=[HOSTILE], recipe={HOSTILE: {"$y$": HOSTILE}},
        environment={HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}}, bottleneck__sentence=HOSTILE,
        machine__device=HOSTILE, machine__peak_source=HOSTILE, data__path=HOSTILE, data__layout=HOSTILE,
        data__storage=HOSTILE, data__crop=HOSTILE, run__precision=HOSTILE, stages__step__phases_note=HOSTILE,
        stages__communication__missing=HOSTILE,
    )  # fmt: skip


def sparse_profile() -> Profile:
    """A profile with only the stages that every run has."""
    profile = example_json(bottleneck__next=None, bottleneck__twice_as_fast={})
    measured_stages = {name: stage(100.0) for name in ("views", "step", "replay", "end_to_end")}
    absent = {name: stage(None, missing=f"{name} was not possible") for name in profile["stages"]}
    return Profile.model_validate(profile | {"stages": absent | measured_stages})


PROFILES = {"cpu": example_profile, "gpu": gpu_profile, "hostile": hostile_profile, "sparse": sparse_profile}
every_profile = pytest.mark.parametrize("profile", [make() for make in PROFILES.values()], ids=PROFILES)


def printed(renderable: RenderableType, width: int) -> str:
    """Return what `fastssl` prints."""
    console = Console(width=width, file=io.StringIO(), markup=False, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def written(tmp_path, text: str):
    path = tmp_path / "p.json"
    path.write_text(text)
    return path


# The file


@every_profile
def test_a_profile_comes_back_as_it_was_written(tmp_path, profile):
    write_profile(tmp_path / "new" / "p.json", profile)
    assert read_profile(tmp_path / "new" / "p.json") == profile
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.json"]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_profile(tmp_path / "p.json", example_profile(seconds=float("nan")))
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for write, name in ((write_profile, "p.json"), (write_page, "p.html")):
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / "file" / name, example_profile())


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"schema_version": 2, "recipe": ' + "[" * 500 + "]" * 500 + "}", "not readable as JSON"),
        ("[]", "not a profile"),
        ("{}", "not a profile"),
        ('{"rows": []}', "not a profile"),
        ('{"schema": 1, "legs": {}}', "not a profile"),
        ('{"schema_version": 3, "stages": 0}', "was written by another version of fastssl: profile the recipe again."),
        (
            '{"schema_version": true, "stages": 0}',
            "was written by another version of fastssl: profile the recipe again.",
        ),
        ('{"schema_version": 2, "stages": 0}', "is a damaged profile"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        read_profile(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_and_unreadable_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="No profile at .*: `fastssl profile RECIPE --json"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read .*Is a directory"):
        read_profile(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_profile(tmp_path / "bytes.json")


@pytest.mark.parametrize(
    "key, value",
    [
        ("stages__decode__images_per_second__median", "fast"),
        ("stages__decode__images_per_second__median", True),
        ("stages__decode__images_per_second__median", 0.0),
        ("stages__decode__images_per_second__median", -1.0),
        ("stages__decode__images_per_second__median", 1e300),
        ("stages__decode__images_per_second__median", 10**400),
        ("stages__decode__images_per_second__median", float("nan")),
        ("stages__decode__images_per_second__high", 1.0),
        ("stages__decode__images_per_second__windows", []),
        ("stages__decode__workers", {"many": measured(1)}),
        ("stages__decode__workers", [1]),
        ("stages__decode__knee", "2"),
        ("stages__step__phases", {"$x$": measured(1)}),
        ("stages__end_to_end__wait_seconds", {"p50": 0.1}),
        ("stages__end_to_end", None),
        ("prediction__resource_seconds", {"disk": None}),
        ("prediction__relative_error", "none"),
        ("bottleneck__sentence", None),
        ("bottleneck__sentence", "x" * 10_000),
        ("bottleneck__twice_as_fast", {"decode": 0}),
        ("machine__cores", 10**400),
        ("data__resolution", "32"),
        ("remarks", "one"),
        ("recipe", []),
    ],
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, key, value):
    path = written(tmp_path, json.dumps(example_json(**{key: value})))
    with pytest.raises(UserError, match=re.escape(key.replace("__", ".").split(".high")[0])) as raised:
        read_profile(path)
    assert str(raised.value).endswith(": profile the recipe again.") and "\n" not in str(raised.value)


def everywhere(value: object, path: tuple = ()):
    """Yield the path of every entry of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from everywhere(inner, (*path, key))


def test_every_profile_that_is_read_can_be_shown(tmp_path):
    """Each entry in turn is left out or replaced: the file is refused in one sentence, or all that shows it works."""
    whole, refused, shown = gpu_json(), 0, 0
    complete = gpu_profile()
    alike = [path for path in everywhere(whole) if len(path) > 3 and path[1] != "decode" or "windows" in path[:-1]]
    for path in everywhere(whole):
        if path in alike:
            continue
        for value in (None, "", 1e18):
            changed = deepcopy(whole)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            if value == "":
                del inner[path[-1]]
            try:
                profile = read_profile(written(tmp_path, json.dumps(changed)))
            except UserError:
                refused += 1
                continue
            printed(profile_table(profile, 80), 80)
            printed(compare_table("a", "b", complete, profile), 80)
            shown += 1
    assert refused > 100 and shown > 100


# Thresholds


def test_values_below_their_thresholds_are_named():
    profile = gpu_profile()
    above = ["accelerator_utilization=0.9", "images_per_second=11000", "mfu=.1", "gpu_utilization=0"]
    assert failed_thresholds(profile, parse_thresholds([*above, "decode.images_per_second=1e4"])) == []
    below = ["accelerator_utilization=0.99", "images_per_second=12000", "mfu=0.5", "decode.images_per_second=1e6"]
    sentences = failed_thresholds(profile, parse_thresholds([*above, *below]))
    assert sentences[:3] == [
        "accelerator_utilization is 0.983, below 0.99.", "images_per_second is 11400, below 12000.",
        "mfu is 0.159, below 0.5.",
    ]  # fmt: skip
    assert len(sentences) == 4 and sentences[3].startswith("decode.images_per_second is 1647")


@pytest.mark.parametrize(
    "text, says",
    [
        ("accelerator_utilisation=0.9", "did you mean accelerator_utilization?"),
        ("decod.images_per_second=3", "did you mean decode.images_per_second?"),
        ("zzz=1", "the keys are images_per_second, accelerator_utilization, mfu"),
        ("images_per_second", "is not KEY=VALUE with a number: write it like images_per_second=1000"),
        ("images_per_second=fast", "is not KEY=VALUE with a number"),
        ("images_per_second=nan", "is not KEY=VALUE with a number"),
        ("images_per_second=1e999", "is not KEY=VALUE with a number"),
        ("mfu=40", "mfu is a share from 0 to 1"),
        ("", "the keys are"),
        ("mfu=0.4", "--fail-under mfu is not in this profile (it was not measured)"),
        ("gpu_utilization=0.4", "is not in this profile (there was no GPU)"),
        ("launch.images_per_second=4", "is not in this profile (there is no GPU)"),
        ("replay.images_per_second=0.4", "is not in this profile (it was too hot)"),
    ],
)
def test_a_threshold_that_cannot_be_checked_is_one_sentence(text, says):
    profile = example_profile(stages__step__mfu=None, stages__replay=stage(None, missing="it was too hot."))
    with pytest.raises(UserError, match=re.escape(says)):
        failed_thresholds(profile, parse_thresholds([text]))


# Two profiles


def test_a_change_is_beyond_noise_where_windows_are_apart_and_medians_differ_by_2_percent():
    def judged(a: float, b: float, spread: float = 0.01, unit: str = "images/s") -> str:
        return change(a, b, spread, unit).word

    def change(a: float, b: float, spread: float = 0.01, unit: str = "images/s") -> Change:
        return Change("x", unit, *(Measurement(**measured(x, spread)) for x in (a, b)))

    assert judged(100, 103) == "better" and judged(103, 100) == "worse"
    assert judged(100, 103, 0.02) == "noise"  # the windows overlap
    assert judged(100, 101.5, 0.001) == "noise"  # they do not, but differ by less than 2 %
    assert Change("x", "images/s", Measurement(**measured(100)), None).word == "only in A"
    assert judged(1, 2, unit="ms per image") == "worse" and change(1, 2, unit="ms per image").ratio == 2
    assert change(0, 2, unit="%").ratio is None


def test_the_rule_errs_in_one_case_of_ten():
    """The probability that the caption states, simulated: three windows each, from one distribution."""
    windows = np.random.default_rng(0).normal(100, 20, (20_000, 2, 3))
    apart = (windows[:, 0].max(1) < windows[:, 1].min(1)) | (windows[:, 1].max(1) < windows[:, 0].min(1))
    assert apart.mean() == pytest.approx(0.1, abs=0.01)


def test_all_rates_are_compared():
    a = example_profile()
    b = example_profile(
        stages__step__phases__forward=measured(9e-4), stages__transfer=stage(None),
        stages__decode__workers={"1": measured(1000, 0.03), "2": measured(3000)},
    )  # fmt: skip
    changes = {change.name: change for change in compare(a, b)}
    assert {name for name, x in changes.items() if x.word in ("better", "worse")} == {
        "image decoding, 2 threads",
        "forward pass",
    }
    assert changes["image decoding, 2 threads"].ratio == pytest.approx(3000 / 1980)
    assert changes["batch transfer"].word == "only in A" and changes["forward pass"].word == "worse"
    assert {"accelerator utilization", "reading from page cache", "waiting for data"} <= changes.keys()
    assert "kernel launching" not in changes  # neither has it


def test_differences_that_may_be_the_cause_are_named():
    a = example_profile()
    b = example_profile(
        environment__packages={"torch": "2.16.0", "ffcv": "1.0.2"}, recipe__train={"batch_size": 128, "compile": True},
        machine__peak_flops=2e11, data__in_page_cache=0.31, run__batch_size=128,
    )  # fmt: skip
    assert differences(a, b) == [
        ("recipe.train.batch_size", "256", "128"),  # once, without run.batch_size
        ("data.in_page_cache", "about 100 %", "about 30 %"),
        ("environment.packages.torch", "2.15.0", "2.16.0"),
        ("recipe.train.compile", "-", "true"),
    ]
    moved = example_profile(recipe__data__train="b.beton", data__path="b.beton")
    assert differences(a, moved) == [("recipe.data.train", "data/mnist/train.beton", "b.beton")]
    read = example_profile(recipe__data__train="b.beton", data__path="/mnt/b.beton")
    assert [key for key, *_ in differences(a, read)] == ["recipe.data.train", "data.path"]  # which is not the same
    started = example_profile(environment={**a.environment, "command": ["fastssl", "profile"], "slurm_job": "7"})
    assert differences(a, started) == []
    assert differences(a, deepcopy(a)) == []
    text = printed(compare_table("a.json", "b.json", a, b), 80)
    assert "environment.packages.torch" in text and "The bottleneck is the same: image decoding." in text


def lead(a: Profile, b: Profile) -> list[str]:
    """Return the lines before the table."""
    return printed(compare_table("a.json", "b.json", a, b), 400).split("\n\n")[0].splitlines()


def test_a_comparison_leads_with_the_faster_profile_and_what_changed():
    a, fast = example_profile(remarks=[]), {"remarks": [], "stages__end_to_end__images_per_second": measured(2_290)}
    b = example_profile(**fast, stages__decode__images_per_second=measured(4_100), bottleneck__stage="step")
    assert lead(a, b) == [
        "B trains 1.99x faster: 2,290 images/s instead of 1,150.",
        "The bottleneck changed: image decoding in A, the training step in B.",
        "Faster in B, beyond the noise: image decoding 2.07x (0.261 ms per image less).",
    ]
    assert lead(b, a)[0] == "B trains 1.99x slower: 1,150 images/s instead of 2,290."
    assert lead(b, a)[2] == "Slower in B, beyond the noise: image decoding 2.07x (0.261 ms per image more)."
    assert lead(a, a) == [
        "A and B train equally fast, within the noise: 1,150 and 1,150 images/s.",
        "The bottleneck is the same: image decoding.",
        "No stage changed by more than the noise.",
    ]


def test_a_comparison_adds_crops_and_views_where_another_stage_makes_the_crops():
    full = example_profile(data__crop="cpu", stages__cpu_augment=stage(10_000), remarks=[])
    canvas = example_profile(data__crop="gpu", stages__views=stage(8_000), remarks=[])
    assert lead(full, canvas)[-1] == (
        "The crops are a part of cropping on the CPU in A and of view augmentation in B, so the sum of these two is "
        "compared, too."
    )
    sums = [change for change in compare(full, canvas) if change.name == "cropping on the CPU + view augmentation"]
    assert [(x.a.median, x.b.median, x.word) for x in sums] == [
        (pytest.approx(1 / (1 / 10_000 + 1 / 9_100)), pytest.approx(8_000), "better")
    ]
    # Not the views alone, which are slower.
    assert "Faster in B, beyond the noise: cropping on the CPU + view augmentation 1.68x" in lead(full, canvas)[2]
    assert "Slower" not in " ".join(lead(full, canvas))
    assert not any("crops" in line for line in lead(canvas, canvas))
    assert not any("+" in change.name for change in compare(canvas, canvas))


def test_the_whole_loader_is_named_first():
    loads = {"stages__loader": stage(16_000), "stages__step": stage(5_200)}
    line = lead(example_profile(), example_profile(**loads))[2]
    assert line.startswith("Faster in B, beyond the noise: whole data loader 8.38x (0.461 ms per image less), training")


def test_a_comparison_repeats_the_remarks_and_does_not_overlook_a_busy_machine():
    remarks = ["The stages predict 1.05 images/s. More on that.", "Other processes kept 2.0 CPU cores busy."]
    faster = {"stages__end_to_end__images_per_second": measured(2_290), "stages__step": stage(5_200)}
    said = lead(example_profile(remarks=remarks), example_profile(**faster, remarks=[]))
    assert said[0].startswith("B trains 1.99x faster, perhaps because of the load of the machine in A: 2,290 images/s")
    cause = "beyond the noise, or because of the load of the machine in A"
    assert said[2].startswith(f"Faster in B, {cause}: training step 1.37x")
    assert said[3:] == ["Note on A: The stages predict 1.05 images/s. Other processes kept 2.0 CPU cores busy."]
    said = lead(example_profile(remarks=remarks), example_profile(**faster, remarks=remarks))
    assert f"Faster in B, {cause} and B: " in said[2] and said[4].startswith("Note on B: The stages")


def test_the_remarks_on_a_busy_machine_are_recognized():
    profile = example_profile(data__batches_per_epoch=100)
    for relative_error, others in ((0.4, 0.0), (0.0, 2.0)):
        profile.prediction.relative_error = relative_error
        profile.remarks = remarks_on(profile.data, profile.prediction, "step", profile.stages, others)
        assert len(profile.remarks) == 1 and was_busy(profile)
    profile.remarks = remarks_on(profile.data, profile.prediction, "step", profile.stages, others=0.0)
    assert not was_busy(profile)


def test_the_stages_that_save_the_most_time_are_named_first_and_without_their_parts():
    a = example_profile()
    b = example_profile(
        stages__views__images_per_second=measured(40_000), stages__step__images_per_second=measured(5_200),
        stages__step__phases__forward=measured(8e-6), stages__storage=stage(9_000),
        stages__decode__workers={"1": measured(2_000), "2": measured(1_980)},
    )  # fmt: skip
    assert lead(a, b)[2] == (
        "Faster in B, beyond the noise: view augmentation 4.40x (0.0849 ms per image less), training step 1.37x "
        "(0.0709 ms per image less)."
    )
    small = example_profile(
        stages__transfer__images_per_second=measured(820_000), stages__step__images_per_second=measured(4_200)
    )
    names = lead(a, small)[2].split(":")[1]
    assert names.index("training step") < names.index("batch transfer 2.00x")


def test_numbers_of_threads_are_in_order_and_shares_change_by_points():
    a = example_profile(stages__end_to_end__data_wait=measured(0.0))
    b = example_profile(stages__decode__workers={str(n): measured(n) for n in (1, 4, 16)})
    text = printed(compare_table("a", "b", a, b), 100)
    assert re.findall(r"image decoding, (\d+) thread", text) == ["1", "2", "4", "16"]
    names = [change.name for change in compare(a, b)]
    assert names.index("image decoding, 16 threads") < names.index("batch transfer")
    (line,) = [line for line in text.splitlines() if "waiting for data" in line]
    assert line.split()[-3:] == ["+43.0", "points", "worse"] and "43 %" in line


def test_the_comparison_states_its_rule_and_how_often_it_errs():
    text = " ".join(printed(compare_table("a.json", "[b].json", example_profile(), gpu_profile()), 80).split())
    assert "A a.json" in text and "B [b].json" in text and "…" not in text
    assert "do not overlap, and their medians differ by more than 2.0 %" in text
    assert "With three windows each, equal speeds do not overlap in one case of ten" in text
    assert "Kernel launching is not in A: there is no GPU" in text


# What a person sees


def test_the_time_of_the_device_adds_up():
    parts = device_time(example_profile())
    assert list(parts)[:3] == ["wait for data", "views", "forward"]
    assert parts["wait for data"] == pytest.approx(0.43 / 1150) and parts["views"] == pytest.approx(1 / 9100)
    assert "rest of the step" not in parts  # the phases are all of it, but for 2 %
    without_draws = example_json()
    del without_draws["stages"]["step"]["phases"]["draws"]
    rest = device_time(Profile.model_validate(without_draws))["rest of the step"]
    assert rest == pytest.approx(1 / 3800 - (8.1e-5 + 1.4e-5 + 3e-6 + 1.3e-4 + 9e-6))
    assert device_time(example_profile(stages__step__phases={}))["step"] == pytest.approx(1 / 3800)
    assert device_time(sparse_profile()) == {"views": 0.01, "step": 0.01}


def test_a_phase_that_noise_hides_is_not_said_to_take_no_time():
    profile = example_profile(stages__step__phases__kl=measured(0.0), stages__end_to_end__data_wait=measured(0.0))
    rows = {row.part: row[1:] for row in time_rows(profile)}
    assert rows["KL term"] == ("below the noise", "") and rows["waiting for data"] == ("0", "0.0 %")
    (axes,) = figure_named(profile, "time").axes
    labels = [text.get_text() for text in axes.texts]
    assert labels.count("below the noise") == 1 and "0 ms, 0.0 %" in labels
    compared = printed(compare_table("a", "b", profile, profile), 160)
    assert re.search(r"KL term +noise +noise +noise", compared)


def test_every_key_has_a_name():
    assert set(STAGE_NAMES) == set(STAGES) and set(RESOURCE_NAMES) == {*RESOURCES, "cores"}
    assert {*device_time(gpu_profile()), *PHASES} <= set(PART_NAMES)
    assert len(set(STAGE_NAMES.values())) == len(STAGES)


def test_the_table_shows_the_details_of_each_stage():
    rows = {row.stage: row for row in stage_rows(gpu_profile())}
    assert rows["training step"] == ("training step", "14,250", "± 1.0 %", "0.00400", True)
    assert "gradient all-reduce" not in rows
    shown = details(gpu_profile(data__in_page_cache=0.55, stages__decode__knee=8))
    assert shown["reading from disk"].endswith("55 % of the file was in the page cache")
    assert shown["image decoding"] == "16 threads are 13.2x as fast as one, more than 8 give less than 5 %"
    assert shown["batch transfer"].endswith("36.2 GB/s of 55.0 GB/s possible")
    assert shown["training step"] == "157 TFLOP/s, 16 % of the device's peak (MFU); 41.2 GB of memory at most"
    assert shown["training end to end"] == (
        "waits for data 1.2 % of the time; waits 0.10 ms for a batch (median; 99th percentile 9.3 ms); CPU cores busy "
        "61 % of the time; GPU busy 97 % of the time (nvidia-smi); 1,755 of 1,980 MHz, 512 W"
    )
    assert shown["gradient all-reduce"] == "not measured. There is one process"


def test_shares_are_of_the_time_of_training_end_to_end():
    profile = example_profile()
    rows = time_rows(profile)
    assert rows[0] == ("training end to end", "0.870", "100 %")  # 1,150 images/s
    shares = {row.part: row.share for row in rows}
    assert shares["waiting for data"] == "43 %" and shares["backward pass"] == "15 %"  # 0.13 of 0.87 ms
    whole = device_time(gpu_profile())
    exchanged = device_time(gpu_profile(stages__communication=stage(100_000)))
    assert exchanged["communication"] == pytest.approx(1e-5)  # of which the backward pass was timed with it
    assert exchanged["backward"] == pytest.approx(whole["backward"] - 1e-5)


@every_profile
@pytest.mark.parametrize("width", [60, 80, 100, 125, 160, 200])
def test_the_table_fits_and_cuts_nothing_off(profile, width):
    text = printed(profile_table(profile, width), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text and "\x1b" not in text
    words = " ".join(text.replace("┃", " ").split())
    for remark in [profile.bottleneck.sentence, profile.bottleneck.advice, *profile.remarks]:
        assert "".join(remark.split()) in "".join(words.split())
    for row in stage_rows(profile):
        for cell in row[:4]:
            assert cell in words
    for name, detail in details(profile).items():
        assert name in words.split("More on each stage")[1]
        assert set(detail.split()) <= set(words.split()) or "<script>" in detail


def tables_in(shown: RenderableType) -> list[Table]:
    if isinstance(shown, Group):
        return [table for part in shown.renderables for table in tables_in(part)]
    if isinstance(shown, Padding):
        return tables_in(shown.renderable)
    return [shown] if isinstance(shown, Table) else []


def test_no_column_is_narrower_than_its_words_at_any_width():
    """12 characters are enough for each word of the command's screens that is not a name of the user's."""
    a, b = gpu_profile(), example_profile()
    shown = [profile_table(a, 80), profile_table(b, 80), compare_table("a.json", "b.json", a, b)]
    tables = [table for one in shown for table in tables_in(one)]
    assert len(tables) >= 8
    for width in range(60, 201):
        console = Console(width=width, markup=False)
        for table in tables:
            whole = table._calculate_column_widths(console, console.options.update(width=1000))
            widths = table._calculate_column_widths(console, console.options)
            assert sum(widths) <= width
            assert all(w >= min(12, w_whole) for w, w_whole in zip(widths, whole, strict=True)), (width, widths)


def test_untrusted_words_are_shown_as_they_are():
    text = printed(profile_table(hostile_profile(), 160), 160)
    assert "[bold]x[/] <script>" in text and ":cat:" in text and r"\x1b[31m \ud800 \u202e" in text


def test_the_verdict_comes_first_then_what_changes_its_meaning():
    profile = example_profile(bottleneck__advice="What helps: more cores.")
    text = printed(profile_table(profile, 160), 160)
    order = ["Image decoding is the bottleneck", "What helps: more cores.", "another program may be running"]
    order += ["zprob_barlow on AMD EPYC", "1,150 images/s", "1,163 images/s (+1.1 %)", "43 %; loading takes the rest"]
    order += [
        "the training step at 2,700 images/s, without the bottleneck",
        "1.40x for image decoding, 1.20x for training step",
    ]
    order += ["image decoding *", "where the time goes", "Shares of time are those of", "More on each stage"]
    positions = [text.index(words) for words in order]
    assert positions == sorted(positions)


def test_a_balanced_profile_has_no_next_limit():
    assert "next limit" in headline(example_profile())
    assert "next limit" not in headline(example_profile(bottleneck__stage="balanced"))


@pytest.mark.parametrize(
    "utilization, waited, loader_cpu_seconds, said",
    [
        (0.76, 0.0, 5e-6, "76 %; the rest: other processes, or noise (good: 90 % or more)"),
        (0.76, 0.15, 5e-6, "76 %; loading takes the rest (good: 90 % or more)"),
        # 30 % of the time of two cores: 0.87 ms per image.
        (0.76, 0.0, 0.3 * 2 / 1150, "76 %; loading takes the rest (good: 90 % or more)"),
        (0.97, 0.001, 5e-6, "97 %; the rest: other processes, or noise (good: 90 % or more)"),
        (1.0, 0.0, 5e-6, "100 % (good: 90 % or more)"),
    ],
)
def test_loading_is_blamed_only_for_what_it_takes(utilization, waited, loader_cpu_seconds, said):
    profile = example_profile(
        bottleneck__accelerator_utilization=utilization, stages__end_to_end__data_wait=measured(waited),
        stages__loader=stage(1_180, loader_cpu_seconds),
    )  # fmt: skip
    assert headline(profile)["accelerator utilization"] == said


def test_what_changes_the_meaning_of_the_verdict_is_remarked():
    def remarks(**changes) -> list[str]:
        profile = gpu_profile(data__batches_per_epoch=100, **changes)
        return remarks_on(profile.data, profile.prediction, "step", profile.stages, others=0.0)

    assert remarks() == []
    (said,) = remarks(stages__storage=stage(8_000))
    assert said.startswith("100 % of the file was in the page cache") and "limited to 8,000 images/s" in said
    assert remarks(stages__storage=stage(8_000), data__in_page_cache=0.0) == []  # it was read from the disk
    (said,) = remarks(stages__end_to_end__images_per_second=measured(11_400, 0.15))
    assert "varied by ± 15 %" in said
    profile = gpu_profile(data__batches_per_epoch=1)
    said = remarks_on(profile.data, profile.prediction, "step", profile.stages, others=1.5)
    assert "1.5 CPU cores" in said[0] and "only 1 batch," in said[1]


@pytest.mark.parametrize(
    "stage_name, waits, step, ends",
    [
        ("step", 0.4, 15.2, "so the bottleneck is uncertain. Profile again when nothing else runs."),
        ("step", 0.002, 40.0, "so the bottleneck is uncertain. Profile again when nothing else runs."),
        ("decode", 0.002, 15.2, "so the bottleneck is uncertain. Profile again when nothing else runs."),
        (
            "step", 0.002, 15.2,
            "so speedup and next limit are uncertain. The bottleneck is not: training waits for data only 0.2 % of the "
            "time. Profile again when nothing else runs.",
        ),
    ],
)  # fmt: skip
def test_a_prediction_that_is_off_says_what_is_uncertain(stage_name, waits, step, ends):
    """The step is certain if it takes most of the measured time and training hardly waits for data."""
    profile = example_profile(
        prediction__predicted_images_per_second=15.3, prediction__measured_images_per_second=12.8,
        prediction__relative_error=15.3 / 12.8 - 1, stages__step=stage(step),
        stages__end_to_end__data_wait=measured(waits), stages__end_to_end__images_per_second=measured(12.8),
        data__batches_per_epoch=100,
    )  # fmt: skip
    (said,) = remarks_on(profile.data, profile.prediction, stage_name, profile.stages, others=0.0)
    assert said == f"The stages predict 15.3 images/s, 20 % more than the 12.8 measured, {ends}"
    assert is_off(profile.prediction)
    assert is_certain(stage_name, profile.prediction, profile.stages) == ("is not" in ends)
    slower = profile.prediction.model_copy(update=dict(predicted_images_per_second=9.6, relative_error=-0.25))
    said = remarks_on(profile.data, slower, stage_name, profile.stages, others=0.0)[0]
    assert said.startswith("The stages predict 9.60 images/s, 25 % less than the 12.8 measured, so")


def test_verdict_and_table_give_the_same_speedup():
    """Of a prediction that is off: the verdict said 1.72x, the table 1.99x."""
    costs, measured_rate = CostModel({"step": Cost(1 / 15.3), "decode": Cost(1 / 400)}, cores=2), 12.8
    setup = Setup(workers=2, layout="canvas", storage="jpg")
    verdict = describe_bottleneck(costs, setup, 1 / measured_rate)
    profile = example_profile(
        prediction__predicted_images_per_second=15.3, prediction__measured_images_per_second=measured_rate,
        bottleneck__twice_as_fast={"step": costs.with_speedup("step", 2).images_per_second()},
    )  # fmt: skip
    assert "make training 1.72x as fast" in verdict
    assert headline(profile)["speedup from halving a stage"] == "1.72x for training step"


def test_threads_are_not_said_to_be_faster_than_their_number():
    workers = {"1": measured(1000), "2": measured(2640)}
    shown = details(example_profile(stages__decode__workers=workers))["image decoding"]
    assert shown == "2 threads are 2.64x as fast as one (what is above 2x is noise)"


def test_numbers_are_short_and_never_in_exponents():
    assert [significant(x) for x in (0, 1e-5, 0.0123, 1.5, 99.96, 1234.5)] == [
        "0", "0.0000100", "0.0123", "1.50", "100.0", "1,234",
    ]  # fmt: skip
    assert [si(x, "B/s") for x in (0, 12, 1.21e10, 3e20)] == ["0 B/s", "12.0 B/s", "12.1 GB/s", "300,000 PB/s"]
    assert [percent(x) for x in (0.003, 0.0996, 0.9)] == ["0.3 %", "10 %", "90 %"]


@pytest.mark.filterwarnings("error")
@every_profile
def test_the_figures_are_drawn(tmp_path, profile):
    for drawn in draw_profile(profile):
        save_figure(tmp_path / "p.png", drawn.figure)
        with Image.open(tmp_path / "p.png") as image:
            assert image.width == 570 and 400 < image.height < 600  # 365 px of a page of 400
            bottom = np.asarray(image.convert("L"))[-30:]
            is_empty = not drawn.figure.axes[0].axison  # "not measured"
            assert bottom.min() < 128 or is_empty  # no white band where a caption would be
            assert np.asarray(image.convert("L")).std() > 5  # not blank
        check_figure(drawn.figure)
        assert drawn.caption


def caption_of(profile: Profile, name: str) -> str:
    return {drawn.name: drawn.caption for drawn in draw_profile(profile)}[name]


def figure_named(profile: Profile, name: str):
    return {drawn.name: drawn.figure for drawn in draw_profile(profile)}[name]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("replay, drawn", [(2_680, True), (60_000, False), (60, True), (1e-3, False), (None, False)])
def test_the_rate_that_the_device_needs_is_drawn_or_said(replay, drawn):
    profile = example_profile(stages__replay=stage(replay))
    (axes,) = figure_named(profile, "threads").axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["linear scaling", *([f"needed: {significant(replay)}"] if drawn else []), "measured"]
    caption = caption_of(profile, "threads")
    assert ("dotted" in caption) == drawn and ("need 60,000 images/s, far above" in caption) == (replay == 60_000)
    assert ("need only 0.00100 images/s, too few to be drawn" in caption) == (replay == 1e-3)


@every_profile
def test_a_caption_explains_the_colors_that_its_figure_shows(profile):
    for drawn in draw_profile(profile)[:3]:
        (axes,) = drawn.figure.axes
        colors = {to_hex(bar.get_facecolor()).upper() for bar in axes.patches}
        assert ("Orange: " in drawn.caption) == (VERMILLION in colors)
        assert ("Gray: " in drawn.caption) == (LIGHT_GRAY in colors)
    assert "Dashed line: " in caption_of(profile, "resources")


def test_a_resource_is_shown_in_shares_of_the_training_time():
    (axes,) = figure_named(gpu_profile(), "resources").axes
    shown = {text.get_text() for text in axes.texts}
    assert "99 %" in shown and "24 %" in shown  # 0.0866 and 0.021 of 0.0877 ms


def test_a_share_above_all_of_the_time_is_explained():
    profile = gpu_profile(prediction__measured_images_per_second=14_000.0)
    (axes,) = figure_named(profile, "resources").axes
    assert "121 %" in {text.get_text() for text in axes.texts}
    assert "More than 100 %: the stages, timed one by one, took longer" in caption_of(profile, "resources")
    assert "More than 100 %" not in caption_of(gpu_profile(), "resources")


class Words(HTMLParser):
    """The tags of a page, with their attributes, and the text between them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


@every_profile
def test_the_page_is_self_contained_and_runs_no_foreign_code(tmp_path, profile):
    write_page(tmp_path / "p.html", profile)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    found = Words(page)
    assert "script" not in found.tags and "link" not in found.tags and found.tags.count("img") == 4
    assert {name for name, _ in found.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "alt", "src", "class", "tabindex", "role", "aria-label",
    }  # fmt: skip
    assert dict(found.attributes)["src"].startswith("data:image/png;base64,")
    assert "http://" not in page and "https://" not in page and "\x1b" not in page
    assert ("<script>" in found.text) == ("<script>" in profile.name)  # shown, not run
    for words in ("ui.perfetto.dev", "not measured", "Machine, data, versions and recipe"):
        assert words in found.text


def test_the_page_shows_what_the_table_shows(tmp_path):
    profile = gpu_profile(trace="[x].trace.json.gz")
    write_page(tmp_path / "p.html", profile)
    text = Words((tmp_path / "p.html").read_text(encoding="utf-8")).text
    for cell in [cell for row in [*stage_rows(profile), *time_rows(profile)] for cell in row if isinstance(cell, str)]:
        assert cell in text
    for words in (profile.bottleneck.sentence, "[x].trace.json.gz", "There is one process", "2.15.0", "157 TFLOP/s"):
        assert words in text
    assert "prefers-color-scheme: dark" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "NVIDIA H200 datasheet" in text and profile.remarks[0] in text and "timed apart" in text
