"""The report: what it must say, and that nothing in a run can break or abuse the page."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from multum import _report_charts as charts
from multum._measure import DISTURBED
from multum._report import report, summary, test_summary
from multum._report_run import parse
from multum._report_words import points, short
from multum.errors import InputError, MultumError

FULL = (12, 1536)
SHRUNK = [(6, 300), (0, 220), (5, 310), (3, 290), (0, 150)]
RUNGS = [
    # name, technique, blocks, vocabulary, MB, ms, accuracy
    ("rung-01", "vocabulary trimmed to the data", [FULL] * 6, 14210, 15.9, 3.61, 0.869),
    ("rung-02", "heads, neurons and layers pruned, distilled", [(10, 940)] * 5 + [(7, 610)], 14210, 12.9, 2.31, 0.871),
    ("rung-03", "heads, neurons and layers pruned, distilled", [(8, 512), (5, 300), (7, 420)] * 2, 14210, 10.1, 1.52, 0.866),
    ("rung-04", "heads, neurons and layers pruned, distilled", SHRUNK, 14210, 8.8, 0.97, 0.861),
    ("rung-05", "heads, neurons and layers pruned, distilled", [(5, 180), (4, 190), (2, 210)], 14210, 7.4, 0.66, 0.851),
    ("rung-05-longer", "distilled for longer", [(5, 180), (4, 190), (2, 210)], 14210, 7.4, 0.66, 0.856),
]  # fmt: skip


def metrics(mb: float, ms: float, accuracy: float, runtime: str, precision: str, *, split: str = "validation", first: float = 13.4):
    return {
        "schema": 1,
        "task": "text-classification",
        "split": split,
        "n": 1000,
        "quality": {
            "metric": "accuracy",
            "value": accuracy,
            "ci95": [accuracy - 0.021, accuracy + 0.019],
            "others": {"f1_macro": accuracy - 0.001},
        },
        "size": {
            "bytes_on_disk": int(mb * 1e6),
            "parameters": int(mb * 9e5),
            "nonzero_parameters": int(mb * 9e5),
            "macs_per_example": 27_000_000,
        },
        "speed": {
            "runtime": runtime,
            "precision": precision,
            "threads": 2,
            "batch_size": 1,
            "p50_ms": ms,
            "p90_ms": ms * 1.41,
            "examples_per_s": 900 / ms,
            "texts": "the split's own lengths",
            "tokenize_p50_ms": 0.07,
            "throughput_batch_size": 32,
            "lengths": {"p50": 25, "p90": 43},
            "rounds": 30,
            "ratio_to_first": {"value": first / ms, "ci95": [first / ms * 0.98, first / ms * 1.03]},
        },
        "memory": {"peak_rss_mb": 120 + mb * 2.1},
        "truncated": 3,
    }


def candidate(
    name: str, folder: str, technique: str, blocks, vocabulary, mb, ms, accuracy, runtime="onnxruntime", precision="int8"
):
    drop = round((0.872 - accuracy) * 100, 4)
    broken = [f"drop {drop:.2f} is above 1"] if drop > 1.1 else []
    return {
        "name": name,
        "folder": folder,
        "target": folder if runtime == "pytorch" else f"{folder}/{runtime}-{precision}",
        "technique": technique,
        "runtime": runtime,
        "precision": precision,
        "blocks": [list(pair) for pair in blocks],
        "full": list(FULL),
        "vocabulary": vocabulary,
        "validation": metrics(mb, ms, accuracy, runtime, precision),
        "test": None,
        "drop": drop,
        "speedup": round(13.4 / ms, 3),
        "steps": ["finetune"],
        "broken": broken,
        "holds": not broken,
        "reason": "; ".join(broken),
    }


def sample_run(*, finished: bool = True) -> dict:
    """A `run.json` like those that `shrink` writes."""
    whole = [FULL] * 6
    forms = [
        candidate("original", "original", "the model as it came, in torch", whole, 30522, 91.4, 13.4, 0.872, "pytorch", "fp32"),
        *(
            candidate(f"original, {r} {p}", "original", f"{r} {p}", whole, 30522, mb, ms, acc, r, p)
            for r, p, mb, ms, acc in (
                ("onnxruntime", "fp32", 91.6, 6.92, 0.872),
                ("onnxruntime", "int8", 23.4, 3.66, 0.869),
                ("openvino", "fp32", 91.5, 6.31, 0.872),
                ("openvino", "int8", 24.1, 3.9, 0.868),
            )
        ),
    ]
    rungs = [candidate(name, name, technique, *rest) for name, technique, *rest in RUNGS]
    run = {
        "schema": 1,
        "task": "text-classification",
        "model": "nreimers/MiniLM-L6-H384-uncased",
        "arguments": {"model": "nreimers/MiniLM-L6-H384-uncased", "task": "text-classification", "data": "reviews.csv", "seed": 0},
        "data": {
            "source": "reviews.csv",
            "sizes": {"train": 8530, "validation": 1066, "test": 1066},
            "notes": ["dropped 4 rows without text", "dropped 37 duplicates (same text)"],
            "fingerprints": {"train": "9f86d081884c7d65", "validation": "60303ae22b998861", "test": "fd61a03af4f77d87"},
        },
        "budget": {"max_drop": 1.1, "max_latency_ms": None, "max_size_bytes": None, "min_speedup": None},
        "time_limit_s": None,
        "seed": 0,
        "threads": 2,
        "quick": True,
        "candidates": forms + rungs,
        "stages": [{"name": "fine-tune the original", "seconds": 80.2}, {"name": "rung-02: prune", "seconds": 31.0}],
        "elapsed_s": 361.5,
        "versions": {"python": "3.11.9", "multum": "0.1.0", "torch": "2.6.0"},
        "machine": {"processor": "A Processor @ 2.60GHz", "cores": 2, "system": "Linux x86_64"},
        "when": "2026-01-05T10:00:00+00:00",
    }
    if finished:
        run |= {"chosen": "rung-04", "met": True, "why": "the fastest that keeps to every limit on validation"}
        run["runtimes"] = {
            "of": "rung-04",
            "said": ["No gain: onnxruntime int8 on 1 thread is the fastest"],
            "rows": [["", "MB", "27 tokens x 1, ms"], ["onnxruntime int8 on 1 thread", "8.7", "0.486"]],
            "left_out": {"openvino bf16": "this processor has no bf16 instructions"},
        }
        for entry, accuracy in ((forms[0], 0.867), (forms[2], 0.866), (rungs[3], 0.861)):
            speed, size = entry["validation"]["speed"], entry["validation"]["size"]["bytes_on_disk"] / 1e6
            entry["test"] = metrics(size, speed["p50_ms"], accuracy, speed["runtime"], speed["precision"], split="test")
    return run


RECIPE = {
    "schema": 1,
    "base": "nreimers/MiniLM-L6-H384-uncased",
    "revision": None,
    "loads_without_multum": False,
    "steps": [
        {"step": "finetune", "fields": {"epochs": 2, "learning_rate": 1e-4}, "parameters": [22713986, 22713986]},
        {"step": "trim_vocabulary", "fields": {"splits": ["train"]}, "parameters": [22713986, 16449410]},
        {"step": "prune_structured", "fields": {"speedup": 1.5}, "kept_blocks": list(range(6)), "parameters": [16449410, 12012300]},
        {"step": "prune_structured", "fields": {"speedup": 1.5}, "kept_blocks": [0, 1, 3, 4, 5], "parameters": [12012300, 9000100]},
        {"step": "distill", "fields": {"epochs": 1, "temperature": 2.0}, "parameters": [9000100, 9000100]},
    ],
}  # fmt: skip


def write(folder: Path, run: dict, *, chosen: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    if chosen:
        (folder / "chosen").mkdir(exist_ok=True)
        (folder / "chosen" / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


class Page(HTMLParser):
    """What matters of a page: text, and everything that could be fetched or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "xlink:href", "action", "data")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write(tmp_path_factory.mktemp("runs") / "reviews", sample_run())
    assert report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(folder) -> str:
    return (folder / "report.html").read_text()


def made(tmp_path: Path, run: dict, **options) -> str:
    return report(write(tmp_path / "run", run, **options)).read_text()


def front_matter(card: Path) -> dict:
    text = card.read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_page_fetches_nothing(html):
    seen = Page(html)
    assert seen.links == []
    assert not {"link", "img", "iframe", "object", "embed", "image", "use"} & set(seen.tags)
    assert not re.search(r"url\(|@import|xmlns", html)
    assert "http" not in html.lower()


def test_page_has_everything_of_the_run(html):
    run, text = sample_run(), Page(html).text
    for entry in run["candidates"]:
        assert entry["name"] in text
        assert entry["technique"] in text
    for words in (*run["data"]["notes"], "60303ae22b998861", "A Processor @ 2.60GHz", "temperature 2.0", "1 min 20 s", "quick run"):
        assert words in text
    assert "13.8× faster, 10.4× smaller, 0.6 points lower on held-out test" in text
    assert "Accuracy 86.1 % (95 % interval 84.0–88.0) against 86.7 % (84.6–88.6)" in text
    assert html.count("<svg") == 6
    assert "No gain: onnxruntime int8 on 1 thread is the fastest." in text
    assert all(cell in text for row in run["runtimes"]["rows"] for cell in row)
    assert "openvino bf16 was left out: this processor has no bf16 instructions" in text


def test_keys_reach_all_that_unfolds_or_scrolls(html):
    assert html.count("<details>") == html.count("<summary>") > 1
    assert html.count('<pre tabindex="0">') == html.count("<pre") > 0
    assert "summary:focus-visible" in html


def test_charts_use_only_colours_that_the_page_replaces(html):
    drawn = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{3,6})"', "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))))
    assert charts.COLORS["chosen"] in drawn
    assert drawn <= set(charts.COLORS.values())
    assert all(html.count(f"--{name}:") == 3 for name in charts.COLORS)  # light, dark, paper


HOSTILE = "<img src=x onerror=alert(1)>\"'`|{{ 7*7 }}\u0000\ud800]]></svg><script>x()</script>"


def test_hostile_text_stays_text(tmp_path):
    run = sample_run()
    for entry in run["candidates"]:
        entry["technique"] += HOSTILE
        entry["broken"] = [HOSTILE]
        for split in ("validation", "test"):
            if entry[split]:
                entry[split]["quality"]["metric"] = HOSTILE
                entry[split]["speed"]["threads"] = HOSTILE
    run["candidates"][5]["name"] += HOSTILE
    run |= {"model": HOSTILE, "why": HOSTILE, "task": HOSTILE, "versions": {HOSTILE: HOSTILE}, "machine": {"processor": HOSTILE}}
    run["data"] |= {"notes": [HOSTILE], "source": HOSTILE}
    run["stages"].append({"name": HOSTILE, "seconds": 1})
    run["runtimes"] = {"of": HOSTILE, "said": [HOSTILE], "rows": [[HOSTILE] * 2] * 2, "left_out": {HOSTILE: HOSTILE}}
    path = write(tmp_path / "run", run)
    (path / "chosen" / "recipe.json").write_text(
        json.dumps({"base": HOSTILE, "steps": [{"step": HOSTILE, "fields": {HOSTILE: HOSTILE}}]})
    )
    seen = Page(report(path).read_text())
    assert seen.links == []
    assert seen.handlers == []
    assert seen.tags.count("script") == 1
    assert "img" not in seen.tags
    assert "49" not in "".join(word for word in seen.words if "onerror" in word)
    for card in (path / "README.md", path / "chosen" / "README.md"):
        front = front_matter(card)
        assert front["pipeline_tag"] == HOSTILE.replace("\u0000", " ").replace("\ud800", " ")
        assert "base_model" not in front
        assert "<img" not in card.read_text().split("---\n", 2)[2]


@pytest.mark.parametrize("measure", ["p50", "size"])
def test_waterfall_adds_up(measure):
    run = parse(sample_run())
    rows = charts.parts(run, measure)
    first, *steps, last = rows
    assert first.total
    assert last.total
    assert not any(row.total for row in steps)
    assert first.change + sum(row.change for row in steps) == pytest.approx(last.change)
    assert first.change == getattr(run.original.validation, measure)
    assert last.change == getattr(run.chosen.validation, measure)
    names = ["original, onnxruntime fp32", "original, onnxruntime int8", "rung-01", "rung-02", "rung-03", "rung-04"]
    timed = ", 2 threads" if measure == "p50" else ""
    assert [row.name for row in steps] == [f"{name}{timed}" for name in names]  # OpenVINO is not on the way


def test_a_recipe_s_run_names_its_own_folder(tmp_path):
    run = sample_run() | {"kind": "recipe"}
    folder = write(tmp_path / "reviews", run, chosen=False)
    (folder / "model").mkdir()
    (folder / "model" / "recipe.json").write_text(json.dumps(RECIPE))
    page = report(folder).read_text(encoding="utf-8")
    assert "multum predict model" in page
    assert "from the folder of the run, <code>reviews</code>" in page
    assert "predict chosen" not in page
    assert 'from_pretrained("model")' in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "model" / "README.md").is_file()


def test_path_leaves_out_rungs_that_led_nowhere():
    run = sample_run()
    other = copy.deepcopy(run["candidates"][8])
    run["candidates"].append(other | {"name": "rung-03-taught", "folder": "rung-03-taught", "made_from": "rung-03"})
    run["chosen"] = "rung-03-taught"
    assert [c.name for c in parse(run).path()][-4:] == ["rung-01", "rung-02", "rung-03", "rung-03-taught"]


def test_path_to_another_runtime_and_to_an_export():
    run = sample_run()
    other = copy.deepcopy(run["candidates"][8])
    again = {"name": "rung-04, openvino", "runtime": "openvino", "technique": "another runtime", "made_from": "rung-04"}
    run["candidates"].append(other | again)
    run["chosen"] = "rung-04, openvino"
    assert [c.name for c in parse(run).path()][-2:] == ["rung-04", "rung-04, openvino"]
    run["chosen"] = "original, openvino int8"
    assert [c.name for c in parse(run).path()] == ["original", "original, openvino fp32", "original, openvino int8"]
    run["chosen"] = "original"
    assert [c.name for c in parse(run).path()] == ["original"]


def test_removed_blocks_stand_where_they_were(html, tmp_path):
    blocks = re.findall(r"<li[^>]*><b>(\d+)</b>(.*?)</li>", html, flags=re.DOTALL)
    assert [number for number, inside in blocks if "block removed" in inside] == ["3"]
    assert [number for number, inside in blocks if "attention removed" in inside] == ["2", "6"]
    unknown = made(tmp_path, sample_run(), chosen=False)
    assert "is not on record" in unknown
    assert "is not on record" not in html


def test_unfinished_runs(tmp_path):
    page = Page(made(tmp_path, sample_run(finished=False), chosen=False))
    assert "This run is not finished" in page.text
    assert "rung-05-longer" in page.text
    assert "Held-out test" not in page.text
    empty = sample_run(finished=False) | {"candidates": []}
    page = Page(made(tmp_path, empty, chosen=False))
    assert "Nothing has been measured yet" in page.text
    assert "svg" not in page.tags
    assert summary(empty) == [["name", "quality, % (95 %)", "drop", "p50 ms", "threads", "speed-up", "size MB", ""]]
    assert not (tmp_path / "run" / "chosen").exists()


def test_missed_budget_says_what_was_missed(tmp_path):
    run = sample_run() | {"met": False, "why": "speed-up 13.8x is below 20x"}
    run["budget"] = {"max_drop": 1.1, "max_latency_ms": 5.0, "max_size_bytes": 20_000_000, "min_speedup": 20.0}
    page = Page(made(tmp_path, run))
    assert "✕ Budget not met on validation. Speed-up 13.8x is below 20x." in page.text
    assert page.text.count("✓ held") == 3
    assert "at least 20× 13.8× ✕ missed" in re.sub(r"(?<=[a-z×s])(?=(at|\d+\.\d×|✕))", " ", page.text).replace("  ", " ")


@pytest.mark.parametrize("count", [1, 300])
def test_few_and_many_blocks(tmp_path, count):
    run = sample_run()
    run["candidates"] = [run["candidates"][0], run["candidates"][8]]
    for entry, pair in zip(run["candidates"], ([12, 1536], [3, 40]), strict=True):
        entry["blocks"] = [pair] * count
    page = made(tmp_path, run)
    assert len(re.findall(r"<li[^>]*><b>", page)) == count
    assert len(page) < 2_000_000


def test_better_than_the_original_and_the_original_itself(tmp_path):
    run = sample_run()
    run["candidates"][8]["test"]["quality"] |= {"value": 0.872, "ci95": [0.85, 0.89]}
    assert "0.5 points higher on held-out test" in Page(made(tmp_path, run)).text
    run["chosen"] = "original"
    assert "The original stays" in made(tmp_path, run)


def test_summaries():
    run = sample_run()
    header, *rows = summary(run)
    assert header == ["name", "accuracy, % (95 %)", "drop", "p50 ms", "threads", "speed-up", "size MB", ""]
    assert [row[0] for row in rows] == [entry["name"] for entry in run["candidates"]]
    assert rows[8] == ["rung-04", "86.1 (84.0–88.0)", "1.10", "0.970", "2", "13.8×", "8.80", "chosen"]
    assert [row[-1] for row in rows].count("chosen") == 1
    tested = test_summary(run)
    assert [row[0] for row in tested] == ["on test", "original", "original, onnxruntime int8", "rung-04"]
    assert tested[3] == ["rung-04", "86.1 (84.0–88.0)", "0.60", "0.970", "2", "13.8×", "8.80", "chosen"]
    assert test_summary(sample_run(finished=False)) == []


def test_cards(folder):
    for card in (folder / "README.md", folder / "chosen" / "README.md"):
        front = front_matter(card)
        assert front["library_name"] == "transformers"
        assert front["pipeline_tag"] == "text-classification"
        assert front["base_model"] == "nreimers/MiniLM-L6-H384-uncased"
        assert front["metrics"] == ["accuracy"]
        assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.861}]
    assert 'from_pretrained("chosen")' in (folder / "README.md").read_text()
    assert 'from_pretrained(".")' in (folder / "chosen" / "README.md").read_text()


def test_a_card_says_where_the_model_comes_from(folder, tmp_path):
    cards = [(folder / place / "README.md").read_text() for place in (".", "chosen")]
    for card in cards:
        limits, came = card.index("## Limits"), card[card.index("## Provenance") :]
        assert limits < card.index("## Provenance")
        lines = [line for line in came.splitlines() if line][1:]
        assert all(line.startswith("- ") for line in lines)
        assert lines[0] == "- Base model: nreimers/MiniLM-L6-H384-uncased"
        assert lines[1].startswith(
            "- Steps: finetune, trim\\_vocabulary, prune\\_structured, prune\\_structured, distill; every field"
        )
        assert [line.rpartition(": ")[2] for line in lines[3:6]] == list(sample_run()["data"]["fingerprints"].values())
        assert "- Versions: python 3.11.9, multum 0.1.0, torch 2.6.0" in lines
        assert "2026-01-05T10:00:00+00:00" in lines[-1]
    assert "`chosen/recipe.json`" in cards[0]
    assert "`recipe.json`" in cards[1]
    report(write(tmp_path / "run", sample_run(finished=False), chosen=False))
    assert "Steps:" not in (tmp_path / "run" / "README.md").read_text()


def test_a_folder_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    path = write(tmp_path / "run", sample_run() | {"model": "models/mine"}, chosen=False)
    report(path)
    assert "base_model" not in front_matter(path / "README.md")


def test_missing_and_damaged_runs(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*run\.json"):
        report(tmp_path)
    for text in ("{", "[]", '"run"'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            report(tmp_path)
    run = sample_run()
    run["candidates"][1]["validation"]["speed"]["p50_ms"] = 0
    del run["candidates"][2]["technique"]
    run["candidates"][3]["blocks"] = [[1]]
    run["chosen"] = "rung-77"
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError) as caught:
        report(tmp_path)
    assert len(caught.value.problems) == 4
    for words in ("candidates[1].validation.speed", "'technique'", "candidates[3].blocks", "rung-77"):
        assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def places(value, path=()):
    """Every place in a JSON value."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@pytest.mark.parametrize("junk", [None, "text", -1, 10**400, [], {}, [1, "a"], True], ids=lambda junk: repr(junk)[:9])
def test_any_one_wrong_value_gives_a_page_or_an_input_error(tmp_path, monkeypatch, junk):
    monkeypatch.setattr("multum._report_page._charts", lambda run: {})
    original = sample_run()
    original["candidates"] = [original["candidates"][i] for i in (0, 8)]
    pages = 0
    for path in [*places(original)]:
        run = copy.deepcopy(original)
        inside = run
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = junk
        try:
            made(tmp_path, run)
            pages += 1
        except InputError as error:
            assert "damaged" in str(error), path  # noqa: PT017
    assert pages > 20


def test_output_elsewhere(tmp_path):
    path = write(tmp_path / "run", sample_run())
    assert report(path, tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert not (path / "report.html").exists()
    with pytest.raises(InputError, match="is a folder"):
        report(path, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MultumError, match="cannot write"):
        report(path, tmp_path / "file" / "page.html")


def test_same_run_same_page(folder, html, tmp_path):
    assert report(folder, tmp_path / "again.html").read_text() == html


def test_report_needs_no_torch(tmp_path):
    write(tmp_path, sample_run())
    code = (
        "import sys, pathlib; from multum._report import report; report(pathlib.Path(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.0500"), (0.97, "0.970"), (9.996, "10.00"), (13.42, "13.4"), (1234.5, "1,234"), (-2.5, "-2.50")],
)
def test_significant_digits(value, text):
    assert short(value) == text


def test_points():
    assert [points(value) for value in (1, 0.6, 1.25, 10, 0)] == ["1 point", "0.6 points", "1.25 points", "10 points", "0 points"]


if __name__ == "__main__":
    print(report(write(Path(sys.argv[1]), sample_run())))


def test_warnings_stand_at_the_top_of_the_page_and_the_card(tmp_path):
    run = sample_run() | {"warnings": ["something <b>else</b> ran"], "model": "/home/me/.cache/models/minilm"}
    folder = write(tmp_path / "reviews", run)
    page, card = (report(folder).read_text(encoding="utf-8"), (folder / "README.md").read_text(encoding="utf-8"))
    assert "⚠ Something &lt;b&gt;else&lt;/b&gt; ran." in page
    assert page.index("Something &lt;b") < page.index("Quality against latency")
    assert "**Something" in card
    assert "minilm" in page.split("</title>")[0]
    assert "/home/me" not in page.split("</h1>")[0]


def test_a_recipe_without_limits_met_none(tmp_path: Path) -> None:
    run = sample_run() | {"kind": "recipe", "budget": {}, "met": True, "why": "the recipe's last step"}
    page = Page(made(tmp_path, run))
    assert "Budget met" not in page.text
    assert "✓ Done. The recipe's last step." in page.text


def test_the_original_s_form_is_the_one_that_rungs_were_compared_with() -> None:
    """It was the fastest when the walk began; timed again, another one is."""
    run = sample_run()
    forms = [entry for entry in run["candidates"][1:] if entry["folder"] == "original"]
    for entry in forms:
        entry["first_p50_ms"], entry["drop"], entry["test"] = 9.0, 0.0, None
    forms[-1]["first_p50_ms"] = 0.1
    assert parse(run).strongest.name == forms[-1]["name"]
    assert min(forms, key=lambda entry: entry["validation"]["speed"]["p50_ms"]) is not forms[-1]


@pytest.mark.parametrize(("drops", "found"), [((0.1, 0.0), 1), ((0.1, 0.2), None)])
def test_no_form_that_drops_too_much_is_what_rungs_were_compared_with(drops: tuple[float, float], found: int | None) -> None:
    """Nothing at all was allowed here; where no form keeps to that it was the original in torch."""
    run = sample_run(finished=False)
    run["budget"]["max_drop"] = 0.0
    original, *forms = [entry for entry in run["candidates"] if entry["folder"] == "original"][:3]
    for entry, drop, ms in zip(forms, drops, (1.0, 2.0), strict=True):
        entry["first_p50_ms"], entry["drop"], entry["test"] = ms, drop, None
    strongest = parse(run | {"candidates": [original, *forms]}).strongest
    assert (strongest.name if strongest else None) == (None if found is None else forms[found]["name"])


def test_a_speed_that_was_disturbed_is_no_headline(tmp_path: Path) -> None:
    page = Page(made(tmp_path, sample_run() | {"warnings": [DISTURBED]}))
    assert "Of unknown speed, " in page.text
    assert "× faster, " not in page.text
